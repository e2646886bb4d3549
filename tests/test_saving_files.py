"""Files of caches: damaged ones are refused and change nothing, and writing one leaves the old file or the new one."""

from __future__ import annotations

import json
import os
import pickle
import random
import stat
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from calling import raising
from saving_child import KILLED, TURN
from saving_child import RULE as CHAT_RULE
from saving_child import SPEC as CHAT_SPEC
from sinkwindow import StreamingCache, saving
from strategies import ModelSpec, Rule, call, fresh_model, observe, stream, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

SPEC: Final = ModelSpec(layers=1, head_dim=4)
RULE: Final = Rule(2, 5, 1)
CHILD: Final = Path(__file__).with_name("saving_child.py")


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.fixture
def model() -> PreTrainedModel:
    """Build a model that no other test uses."""
    return fresh_model(SPEC).double()


@pytest.fixture
def path(model: PreTrainedModel, tmp_path: Path) -> Path:
    """Save a cache of two rows, one of which had padding; nothing of it is left but the file."""
    cache, ids, mask = RULE.cache(model), tokens(0, 2, 20), torch.ones(2, 20)
    mask[0, :3] = 0
    stream(model, cache, ids, [9, 8, 1, 1, 1], mask)
    cache.save(tmp_path / "chat")
    return tmp_path / "chat"


def _refused(path: Path, model: PreTrainedModel, says: str = ".", kind: type[Exception] = ValueError) -> str:
    """Load a file that must be refused; return the error's text."""
    content, hooks = path.read_bytes() if path.is_file() else None, _hooks(model)
    with pytest.raises(kind, match=says) as caught:
        StreamingCache.load(path, model)
    assert _hooks(model) == hooks  # while the exception is still there
    assert (path.read_bytes() if path.is_file() else None) == content
    assert type(caught.value) in {kind, FileNotFoundError}
    return str(caught.value)


# -- damaged files ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_is_refused(path: Path, model: PreTrainedModel) -> None:
    """Wherever it ends; and one with something behind its end."""
    content = path.read_bytes()
    for length in {*range(0, len(content), 37), *range(12), len(content) - 1}:
        path.write_bytes(content[:length])
        _refused(path, model, "has written, or is cut off")
    path.write_bytes(content + b"\0")
    _refused(path, model, "has written, or is cut off")


def test_a_file_with_one_wrong_bit_is_refused(path: Path, model: PreTrainedModel) -> None:
    """In every byte of the header, and in some of each tensor."""
    content = path.read_bytes()
    dice, header = random.Random(0), 8 + int.from_bytes(content[:8], "little")  # noqa: S311 - not a secret
    text = content[:header].rstrip(b" ")
    for place in (*range(len(text)), *range(header, len(content), 61)):
        wrong = bytearray(content)
        wrong[place] ^= 1 << dice.randrange(8)
        path.write_bytes(wrong)
        _refused(path, model, "has written|is damaged")


def test_other_files_are_refused(path: Path, model: PreTrainedModel) -> None:
    """Nothing, a folder, an empty file, text, a pickle and weights are each an error that names the path."""
    others: dict[str, Callable[[Path], object]] = {
        "nothing": lambda _: None,
        "folder": Path.mkdir,
        "empty": Path.touch,
        "text": lambda other: other.write_text("{}" * 500),
        "pickle": lambda other: other.write_bytes(pickle.dumps({"state": [1, 2, 3]})),
        "weights": lambda other: save_file({"keys": torch.zeros(3)}, other),
        "weights with metadata": lambda other: save_file({"keys": torch.zeros(3)}, other, {"format": "pt"}),
    }
    for name, make in others.items():
        other = path.with_name(name)
        make(other)
        kind = OSError if name in {"nothing", "folder"} else ValueError
        assert str(other) in _refused(other, model, "is no file|has written", kind)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (SPEC.with_(layers=2), "number of layers='1'"),
        (SPEC.with_(family="qwen2"), "model type='llama'"),
        (SPEC.with_(rope="linear"), "other rotation"),
        (SPEC.with_(kv_heads=2), "other weights"),
    ],
)
def test_a_file_of_another_model_is_refused(path: Path, spec: ModelSpec, says: str) -> None:
    """The error names the first difference."""
    _refused(path, fresh_model(spec).double(), f"of a model with.*{says}")


def test_a_file_of_a_model_whose_keys_are_scaled_otherwise_is_refused(tmp_path: Path) -> None:
    """Equal weights and equal frequencies, but YaRN multiplies the keys by another factor."""
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 8}
    model, other = (fresh_model(SPEC, rope_parameters=yarn | {"attention_factor": factor}) for factor in (1.0, 3.0))
    cache = RULE.cache(model)
    call(model, cache, tokens(0, 2, 9))
    cache.save(tmp_path / "chat")
    _refused(tmp_path / "chat", other, "of a model with")


def test_a_file_of_the_model_in_another_dtype_is_refused(path: Path) -> None:
    """Its keys would be others."""
    _refused(path, fresh_model(SPEC), "dtype='torch.float64', this one has dtype='torch.float32'")


# -- files with a right checksum and a header without sense -----------------------------------------------------------


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[saving.HEADER]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _write(path: Path, content: object, tensors: dict[str, Tensor]) -> None:
    header = content if isinstance(content, str) else json.dumps(content)
    checksum = saving._checksum(header, tensors)
    path.write_bytes(save(tensors, {saving.HEADER: header, saving.CHECKSUM: checksum}))


@pytest.mark.parametrize(("number", "says"), [(1, "an older"), (3, "a newer"), (10**9, "a newer")])
def test_another_format_is_refused(path: Path, model: PreTrainedModel, number: int, says: str) -> None:
    """The error names both formats and the way out, whatever else the file holds."""
    _write(path, {"format": number}, {})
    _refused(path, model, f"format {number}, of {says} sinkwindow, and this one reads format {saving.FORMAT}: load it")


def _places(value: Any, *way: str | int) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to everything in nested lists and dicts."""
    if isinstance(value, list | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*way, key)
            yield from _places(item, *way, key)


def _changed(content: Any, way: tuple[str | int, ...], change: Callable[[Any, Any], object]) -> Any:
    content = inner = deepcopy(content)
    for key in way[:-1]:
        inner = inner[key]
    change(inner, way[-1])
    return content


def _is_a_row_of_old_columns(way: tuple[str | int, ...]) -> bool:
    """Return whether something is a list of the columns that an old call's row had, or one of them."""
    return way[:2] == ("state", "past") and way[3:4] == (2,) and len(way) > 4


def test_a_header_that_lacks_something_is_refused(path: Path, model: PreTrainedModel) -> None:
    """Each key and item is left out in turn, but for what makes another history: an old call, or a column of it."""
    content, tensors = _content(path)
    others = [way for way in _places(content) if len(way) == (6 if _is_a_row_of_old_columns(way) else 3)]
    ways = [way for way in _places(content) if way[:2] != ("state", "past") or way not in others]
    assert len(ways) > 60
    for way in ways:
        _write(path, _changed(content, way, lambda inner, key: inner.pop(key)), tensors)
        _refused(path, model)


@pytest.mark.parametrize("value", [-2, -(10**30), 1.5, "x", [], {}, None], ids=repr)
def test_a_header_with_a_value_that_is_no_count_is_refused(path: Path, model: PreTrainedModel, value: object) -> None:
    """Each is replaced in turn; only an old call's row may have had no token, or, where it says `None`, all."""
    content, tensors = _content(path)
    for way in _places(content):
        if not (value in ([], {}, None) and _is_a_row_of_old_columns(way)) and way != ("state", "past"):
            _write(path, _changed(content, way, lambda inner, key: inner.__setitem__(key, value)), tensors)
            _refused(path, model)


@pytest.mark.parametrize("header", ["", "{", "[]", "3", "null", '{"format": null}', "[" * 100_000], ids=len)
def test_a_header_that_is_something_else_is_refused(path: Path, model: PreTrainedModel, header: str) -> None:
    """No JSON, no object, no number of a format, and JSON so deep that a reader gives up."""
    _write(path, header, _content(path)[1])
    _refused(path, model, "is no file that StreamingCache.save has written")


def test_tensors_of_other_shapes_are_refused(path: Path, model: PreTrainedModel) -> None:
    """Each tensor is left out, narrowed in each dimension, flattened and cast in turn."""
    content, tensors = _content(path)
    for name, tensor in tensors.items():
        wrong = [tensor.narrow(dim, 0, tensor.shape[dim] - 1) for dim in range(5)]
        wrong += [tensor.flatten(), tensor[None], tensor.float(), tensor.long()]
        for one in wrong:
            _write(path, content, {**tensors, name: one.contiguous()})
            _refused(path, model)
        _write(path, content, {other: kept for other, kept in tensors.items() if other != name})
        _refused(path, model)


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("owner", "step"),
    [(saving, "save"), (saving, "_checksum"), (Path, "open"), (os, "fsync"), (Path, "replace")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_save_that_fails_leaves_the_old_file(
    path: Path,
    model: PreTrainedModel,
    owner: Any,
    step: str,
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whatever step: there is nothing else in the folder then, the cache is unchanged, and saving works again."""
    content, cache = path.read_bytes(), StreamingCache.load(path, model)
    call(model, cache, tokens(1, 2, 3))
    before = observe(cache)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, raising(kind("the machine stops")))
        with pytest.raises(kind, match="the machine stops"):
            cache.save(path)
    assert (path.read_bytes(), [*path.parent.iterdir()], observe(cache)) == (content, [path], before)
    cache.save(path)
    assert observe(StreamingCache.load(path, model)) == before
    assert [*path.parent.iterdir()] == [path]


def test_a_folder_that_cannot_be_flushed_is_no_failure(
    path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is there already, so no error says that the old one is unchanged."""
    cache, fsync = StreamingCache.load(path, model), os.fsync
    call(model, cache, tokens(1, 2, 3))

    def flush(handle: int) -> None:
        if os.path.isdir(f"/dev/fd/{handle}"):  # noqa: PTH112 - a handle is no path
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    cache.save(path)
    assert observe(StreamingCache.load(path, model)) == observe(cache)


@pytest.mark.skipif(os.name == "nt", reason="a file there has no such permissions, and links need a right")
def test_a_private_file_stays_private_and_a_link_stays_a_link(
    path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation that only its owner can read is not shown to others when it is saved again, at no moment."""
    link, fsync = path.with_name("link"), os.fsync
    link.symlink_to(path.name)
    cache = StreamingCache.load(path, model)

    def flush(handle: int) -> None:
        now = os.fstat(handle).st_mode
        assert stat.S_ISDIR(now) or stat.S_IMODE(now) == 0o600
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    for mode in (0o600, 0o640, 0o664):
        path.chmod(mode)
        call(model, cache, tokens(1, 2, 3))
        cache.save(link)
        assert (stat.S_IMODE(path.stat().st_mode), link.is_symlink()) == (mode, True)
        assert observe(StreamingCache.load(path, model)) == observe(cache)
    assert {*path.parent.iterdir()} == {path, link}


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a\0b", "no/such/folder", "x" * 300])
def test_a_path_that_no_file_can_have_is_an_error_of_one_kind(model: PreTrainedModel, name: str) -> None:
    """Saving to it is an `OSError` that names it; so is loading."""
    with pytest.raises(OSError, match=r"The cache cannot be saved to path .*, which is unchanged: "):
        RULE.cache(model).save(name)
    with pytest.raises(OSError, match=r"is no file|File name too long"):
        StreamingCache.load(name, model)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of a file")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A write that stops in the middle of the file, in another process."""
    model, path = CHAT_SPEC.model(), tmp_path / "chat"
    cache = CHAT_RULE.cache(model)
    call(model, cache, tokens(0, 1, 30))
    cache.save(path)
    content = path.read_bytes()
    command = [sys.executable, str(CHILD), "full-disk", str(tmp_path)]
    said = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout
    assert said == f"The cache cannot be saved to path {path}, which is unchanged: File too large."
    assert (path.read_bytes(), [*tmp_path.iterdir()]) == (content, [path])


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    """At any moment of a chat: the file is one of its turns, to the last bit, and a next process goes on from it."""
    subprocess.run([sys.executable, CHILD, "killed", tmp_path], check=True, timeout=600)
    names = {path.name for path in tmp_path.iterdir()}
    assert all(name == "chat" or name.startswith("after") or name.endswith(".part") for name in names)
    model, turns = CHAT_SPEC.model(), 0
    cache = CHAT_RULE.cache(model)
    for number in range(KILLED):
        found = StreamingCache.load(tmp_path / f"after-{number}", model)
        while cache.seen_tokens < found.seen_tokens:
            call(model, cache, tokens(turns, 1, TURN))
            turns += 1
        assert observe(found) == observe(cache)
        twin, ids = deepcopy(cache), tokens(-1, 1, 5)
        assert torch.equal(call(model, found, ids), call(model, twin, ids))
    assert turns > KILLED
