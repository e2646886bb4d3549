"""A cache that was saved goes on where it was, to the last bit: in this process or another, after any history."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from families import LATE, build, can_be_static
from sinkwindow import StreamingCache
from sinkwindow.saving import read
from strategies import BOTH, ModelSpec, Rule, budget, call, fresh_model, observe, rules, tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow.storage.bank import Bank
    from sinkwindow.stream.events import Eviction

FAMILIES: Final = sorted(
    {"qwen2_windows", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "falcon", "falcon_alibi"} - LATE.keys()
)
LEADING: Final = ("bloom", "mpt")  # families that take padding in front of a text only
DTYPES: Final = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}
CHILD: Final = Path(__file__).with_name("saving_child.py")
OPERATIONS: Final = ("call", "call", "step", "step", "padded", "crop", "reorder", "record", "reset")
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 30)), max_size=6)


@dataclass
class Chat:
    """A text of some rows, and the cache that it is fed to: equal chats do the same.

    Attributes:
        model: The model.
        cache: Its cache.
        padding: Whether any call may have padding, not only a text's first.
        mask: Which columns held tokens, `[rows, columns]`.
        events: What was evicted.
        done: Operations so far.
    """

    model: PreTrainedModel
    cache: StreamingCache
    padding: bool
    mask: Tensor
    events: list[Eviction] = field(default_factory=list)
    done: int = 0

    def do(self, operation: str, number: int) -> list[Tensor]:
        """Do something to the cache and return the logits of all tokens that were fed."""
        self.done += 1
        rows, columns = self.mask.shape
        if operation == "reset":
            self.cache.reset()
            self.mask = torch.ones(1 + number % 3, 0, dtype=torch.long)
        elif operation == "record":
            self.cache.activate_past_recording()
        elif operation == "crop":
            most = max(taken for taken in range(min(number, columns) + 1) if self.cache.can_crop(taken))
            self.cache.crop(-most)
            self.mask = self.mask[:, : columns - most]
        elif operation == "reorder":
            index = torch.arange(1 + number % 3) * number % rows
            if columns:
                self.cache.reorder_cache(index)
                self.mask = self.mask[index]
        elif operation == "step":
            return [self._fed(torch.ones(rows, 1, dtype=torch.long), number + n) for n in range(1 + number % 8)]
        else:
            fresh = torch.ones(rows, number, dtype=torch.long)
            if operation == "padded" and (self.padding or not columns):
                for row in range(rows):
                    fresh[row, : random.Random(number + row).randrange(number)] = 0  # noqa: S311 - not a secret
            return [self._fed(fresh, number)]
        return []

    def _fed(self, fresh: Tensor, number: int) -> Tensor:
        self.mask = torch.cat([self.mask, fresh], dim=1)
        ids = tokens(100 * self.done + number, *fresh.shape)
        return call(self.model, self.cache, ids, None if self.mask.all() else self.mask)[fresh.bool()]

    def seen(self) -> list[Any]:
        """Return all that can be observed."""
        takes = [self.cache.can_crop(columns) for columns in range(self.mask.shape[1] + 2)]
        return [*observe(self.cache), self.cache.debug_state(), self.cache.forwarded_tokens, takes, self.events]


def _chat(model: PreTrainedModel, rule: Rule, rows: int, *, padding: bool, static: bool) -> Chat:
    chat = Chat(model, rule.cache(model, static=static), padding, torch.ones(rows, 0, dtype=torch.long))
    if not static:
        chat.cache = rule.cache(model, on_evict=chat.events.append)
    return chat


def _loaded(chat: Chat, path: Path, *, static: bool = False) -> Chat:
    twin = Chat(chat.model, chat.cache, chat.padding, chat.mask, list(chat.events), chat.done)
    twin.cache = StreamingCache.load(path, chat.model, on_evict=None if static else twin.events.append)
    return twin


def _same(one: Chat, other: Chat, operation: tuple[str, int]) -> bool:
    """Do the same in two chats; return whether all bits are the same."""
    found, expected = other.do(*operation), one.do(*operation)
    bits = all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    return bits and other.seen() == one.seen()


@given(
    name=st.sampled_from([*FAMILIES, *LEADING, *DTYPES]),
    rule=rules(BOTH),
    rows=st.integers(1, 3),
    before=operations,
    after=operations,
    static=st.booleans(),
    modes=st.tuples(*[st.sampled_from(["", "inference", "meta"])] * 2),
)
@budget(0.5)
def test_a_loaded_cache_is_the_one_that_was_saved(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    rule: Rule,
    rows: int,
    before: list[tuple[str, int]],
    after: list[tuple[str, int]],
    modes: tuple[str, str],
    *,
    static: bool,
) -> None:
    """After any history it shows the same, and whatever follows gives the same bits, evictions and refusals.

    Also where one of the two was done in inference mode, or under another default device.
    """
    model = ModelSpec(max_positions=24).model(DTYPES[name]) if name in DTYPES else build(name)
    static = static and rule.evict == "token" and (name in DTYPES or can_be_static(build(name)))
    chat = _chat(model, rule, rows, padding=name not in LEADING, static=static)
    for operation in before:
        chat.do(*operation)
    path = tmp_path_factory.mktemp("saved") / "chat.safetensors"
    with _mode(modes[0]):
        chat.cache.save(path)
    with _mode(modes[1]):
        twin = _loaded(chat, path, static=static)
    assert twin.seen() == chat.seen()
    for operation in (*after, ("step", 2), ("call", 20), ("crop", 3), ("step", 1)):
        assert _same(chat, twin, operation)


def _mode(name: str) -> ExitStack:
    stack = ExitStack()
    if name:
        stack.enter_context(torch.inference_mode() if name == "inference" else torch.device("meta"))
    return stack


@pytest.mark.parametrize("history", [[], [("call", 30), ("reset", 1)], [("record", 1)]], ids=["new", "reset", "record"])
@pytest.mark.parametrize("static", [False, True])
def test_an_empty_cache_can_be_saved(tmp_path: Path, history: list[tuple[str, int]], *, static: bool) -> None:
    """One that was never fed, and one that was reset: any number of rows may follow."""
    chat = _chat(ModelSpec().model(), Rule(2, 5, 1), 2, padding=True, static=static)
    for operation in history:
        chat.do(*operation)
    chat.cache.save(tmp_path / "chat")
    twin = _loaded(chat, tmp_path / "chat", static=static)
    assert (twin.cache.batch_size, twin.cache.nbytes) == (-1, 0)
    assert twin.seen() == chat.seen()
    for operation in (("padded", 9), ("step", 20)):
        assert _same(chat, twin, operation)


def test_options_are_saved(tmp_path: Path) -> None:
    """A loaded cache refuses and warns as the one that was saved."""
    model, options = ModelSpec().model(), {"positions": "original", "on_overflow": "error"}
    with pytest.warns(UserWarning, match='positions="original"'):
        Rule(2, 5, 1).cache(model, **options).save(tmp_path / "chat")
    with pytest.warns(UserWarning, match='positions="original"'):
        cache = StreamingCache.load(tmp_path / "chat", model)
    assert cache._settings == {**Rule(2, 5, 1).arguments, **options, "static": False}
    with pytest.raises(OverflowError, match="on_overflow"):
        call(model, cache, tokens(0, 1, 20))


@pytest.mark.parametrize("static", [False, True])
def test_each_load_gives_a_cache_of_its_own(tmp_path: Path, *, static: bool) -> None:
    """What is fed to one changes neither the other nor the file; what happens to the file changes none."""
    chat = _chat(ModelSpec().model(), Rule(2, 5, 1), 2, padding=True, static=static)
    chat.do("call", 30)
    path = tmp_path / "chat"
    chat.cache.save(path)
    content = path.read_bytes()
    one, other = (_loaded(chat, path, static=static) for _ in range(2))
    one.do("call", 20)
    assert path.read_bytes() == content
    path.write_bytes(bytes(len(content)))  # in place: memory that is mapped from the file would change
    assert other.seen() == chat.seen()
    assert _same(chat, other, ("call", 20))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("static", [False, True])
def test_a_file_is_the_tensors_and_a_small_header(tmp_path: Path, rows: int, *, static: bool) -> None:
    """Its size is `nbytes` and at most 4 KiB, and only the owner of the process decides who may read it."""
    chat = _chat(ModelSpec(max_positions=128).model(), Rule(4, 60, 4), rows, padding=True, static=static)
    for operation in (("call", 30), ("padded", 20), ("record", 1), ("call", 9)):
        chat.do(*operation)
    chat.cache.save(tmp_path / "chat")
    assert 0 < (tmp_path / "chat").stat().st_size - chat.cache.nbytes < 4096
    (tmp_path / "other").touch()
    assert (tmp_path / "chat").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2_windows"])
def test_a_file_holds_nothing_of_an_earlier_text(tmp_path: Path, family: str, *, static: bool) -> None:
    """After `reset` the tensors are used again: the content is that of a file of a cache that never had them."""
    model, rule, ids = build(family), Rule(2, 5, 1), tokens(5, 2, 30)
    used, new = rule.cache(model, static=static), rule.cache(model, static=static)
    call(model, used, tokens(6, 2, 40))
    used.reset()
    mask = torch.ones_like(ids[:, :5])
    mask[0, :3] = 0
    for length, end in ((5, 5), (1, 6), (14, 20), *((1, end) for end in range(21, 27))):
        for cache, name in ((used, "used"), (new, "new")):
            call(model, cache, ids[:, end - length : end], mask if end == 5 else None)
            cache.save(tmp_path / name)
        one, other = (load_file(tmp_path / name) for name in ("used", "new"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    if not static:  # nor of what the text itself has evicted, but for what a crop can bring back
        (row, *_), (lane, *_) = used._stream.state.pools[0].lanes, used._stream.state.lanes
        filled = load_file(tmp_path / "used")["pool0.bank0.keys"][0, 0, 0].any(dim=-1)
        assert int(filled.sum()) <= rule.num_sinks + lane.seen - row.floor < len(filled)


def test_a_copy_of_the_model_is_the_same_model(tmp_path: Path) -> None:
    """A file and a snapshot go on with a model of equal weights; not with one that differs in one layer."""
    model = fresh_model(ModelSpec()).double()
    chat = _chat(model, Rule(2, 5, 1), 2, padding=True, static=False)
    chat.do("call", 30)
    chat.cache.save(tmp_path / "chat")
    snapshot, twin = chat.cache.snapshot(), copy.deepcopy(model)
    logits = chat.do("call", 9)[0]
    for cache in (StreamingCache.load(tmp_path / "chat", twin), Rule(2, 5, 1).cache(twin)):
        cache.restore(snapshot)
        assert torch.equal(call(twin, cache, tokens(209, 2, 9)).flatten(0, 1), logits)
    with torch.no_grad():
        twin.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(2)  # type: ignore[operator]  # a parameter
    before = observe(cache)
    with pytest.raises(ValueError, match="other weights"):
        cache.restore(snapshot)
    assert observe(cache) == before
    with pytest.raises(ValueError, match="other weights"):
        StreamingCache.load(tmp_path / "chat", twin)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("how", ["load", "restore", "deepcopy"])
def test_tensors_go_where_the_layers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, *, static: bool
) -> None:
    """The model may have moved since, also to several devices; `meta` stands for another one."""
    model, places = ModelSpec(layers=3).model(), [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    cache = Rule(2, 5, 1).cache(model, static=static)
    call(model, cache, tokens(0, 2, 30))
    cache.save(tmp_path / "chat")
    snapshot = cache.snapshot()
    monkeypatch.setattr("sinkwindow.copies.layer_devices", lambda *_: places)
    with torch.device("meta"):
        if how == "restore":
            cache.restore(snapshot)
        else:
            cache = StreamingCache.load(tmp_path / "chat", model) if how == "load" else copy.deepcopy(cache)
    source = read(tmp_path / "chat") if how == "load" else snapshot  # in a file free slots are zeros
    old, new = _by_layer(source.state.pools[0].banks), _by_layer(cache._stream.state.pools[0].banks)
    assert [new[layer][0].device for layer in range(3)] == places
    for layer in (0, 2):
        torch.testing.assert_close(new[layer], old[layer], rtol=0, atol=0, equal_nan=True)  # a free slot may be NaN
    assert cache.nbytes == sum(tensor.nbytes for tensors in old.values() for tensor in tensors)


def _by_layer(banks: tuple[Bank, ...]) -> dict[int, list[Tensor]]:
    return {layer: [tensor[place] for tensor in bank.tensors] for bank in banks for layer, place in bank.layers.items()}


def test_another_process_goes_on(tmp_path: Path) -> None:
    """It makes the same model, loads the file, and gets the same bits."""
    chat = _chat(ModelSpec().model(), Rule(2, 5, 1), 2, padding=True, static=False)
    for operation in (("padded", 9), ("call", 30), ("step", 3)):
        chat.do(*operation)
    chat.cache.save(tmp_path / "chat")
    mask = torch.cat([chat.mask, torch.ones(2, 20, dtype=torch.long)], dim=1)
    subprocess.run([sys.executable, CHILD, "go-on", tmp_path], check=True, timeout=600)
    found = load_file(tmp_path / "logits")["logits"]
    assert torch.equal(found, call(chat.model, chat.cache, tokens(7, 2, 20), mask))
