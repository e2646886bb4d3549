"""A model that is split over ranks streams as in one process: `nox -s distributed`, with gloo on a CPU.

`tests/ranks_tp.py` runs once in one process, once on two ranks and once on four; the tests compare what they found.
Logits are equal to 1e-12 of the largest one, since ranks add up products in another order.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import FAMILIES, build, can_be_static
from hybrids import FLOAT32_LOGITS
from ranks_models import NAMES, load
from ranks_tp import WORLDS, chunks, static, texts
from sinkwindow import StreamingCache, supports
from sinkwindow.model.fingerprint import RANK
from sinkwindow.saving import encoded, rank_file
from strategies import call, observe, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    Found = dict[int, list[dict[str, Any]]]

distributed = pytest.mark.distributed
PROGRAM: Final = Path(__file__).with_name("ranks_tp.py")
EQUAL: Final = 1e-12  # of the largest logit
NO_PLAN: Final = {  # in transformers 5.24: it refuses to split them
    "stablelm", "persimmon", "falcon", "falcon_alibi", "mpt", "bloom", "gpt_neox_japanese", "jetmoe",
    "modernbert-decoder", "zamba2", "zamba2_rope", "zaya",
}  # fmt: skip
WHOLE: Final = {  # their plans gather queries, keys and values, or split experts and the head alone
    "phi3", "phi3_longrope", "gpt_oss", "olmo2", "afmoe", "granitemoe", "minimax_m2", "olmo3", "olmoe", "phimoe",
    "phimoe_longrope", "olmo_hybrid", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "bamba", "granitemoehybrid",
    "granitemoehybrid_nope", "nemotron_h", "falcon_h1",
}  # fmt: skip
STATES: Final = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lara_mini"}  # states are whole, heads are split
RANKS: Final = WORLDS[1:]
ranks = pytest.mark.parametrize("world", RANKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what all processes have written."""
    place = tmp_path_factory.mktemp("ranks")
    for world in WORLDS:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent)}
        run = subprocess.run(
            [sys.executable, *start, str(PROGRAM), str(place)], env=env, check=False, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-10_000:]
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """Return what each process has found, by the number of processes."""
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in WORLDS}


def _error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinity if there is no other."""
    error = float((one.double() - other.double()).abs().max() / one.double().abs().max())
    return float("inf") if error != error else error  # noqa: PLR0124 - NaN


@distributed
@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_what_one_process_does(name: str, found: Found, record_property: Callable[..., None]) -> None:
    """Logits, tokens kept, cropped and restored, and texts: in chunks, in steps, padded, past evictions."""
    assert found[1][0]["plan"][name] == (name not in NO_PLAN)
    if name in NO_PLAN:
        return
    one, errors = found[1][0]["families"][name], []
    assert not isinstance(one, str), one
    for world in RANKS:
        for process in found[world]:
            other = process["families"][name]
            assert not isinstance(other, str), other
            assert other["goes on"]
            for what, expected in one.items():
                if "logits" in what or what == "cropped":
                    errors.append(_error(expected, other[what]))
                    assert errors[-1] < (1e-6 if name in FLOAT32_LOGITS else EQUAL), (what, world)
                elif "kept" in what:
                    assert other[what] == expected
                elif what.startswith("text") and what in other:
                    assert torch.equal(other[what], expected), (what, world)
    record_property("parallel", "all heads" if name in WHOLE else "its heads")
    record_property("error", f"{max(errors):.1e}")


@distributed
@ranks
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_PLAN])
def test_bytes_are_those_of_a_rank(name: str, world: int, found: Found) -> None:
    """They are a share where heads are split, and all where a plan gathers keys; states are whole."""
    one = found[1][0]["families"][name]["bytes"]
    for process in found[world]:
        share = process["families"][name]["bytes"] / one
        if name in STATES:
            assert 1 / world < share < 1
        else:
            assert share == (1 if name in WHOLE else 1 / world)


@distributed
def test_all_modes_of_generate_are_those_of_one_process(found: Found) -> None:
    """With the same random seed on each rank: sampling, beams, assisted decoding, chunks of the prompt."""
    modes = found[1][0]["special"]["every mode"]
    assert len(modes) == 12
    for process in found[2]:
        for mode, text in modes.items():
            assert torch.equal(process["special"]["every mode"][mode], text), mode


@distributed
def test_a_chat_is_saved_by_all_and_goes_on(found: Found) -> None:
    """All ranks give one path, and the answers are those of one process."""
    said, kept = found[1][0]["special"]["chat"]
    assert said[1] == said[2]
    assert len(kept[0]) < kept[0][-1]  # some tokens were evicted
    assert [process["special"]["chat"] for process in found[2]] == [(said, kept)] * 2


@distributed
@pytest.mark.parametrize(
    ("world", "how"),
    [
        (2, "compiled"),
        (2, "gradients"),
        (2, "each its own text"),
        (2, "gathered"),
        (2, "experts"),
        (2, "split afterwards"),
        (4, "two by two"),
        (4, "experts apart"),
    ],
)
def test_ways_to_split_and_to_run_are_exact(world: int, how: str, found: Found) -> None:
    """Compiled, with gradients, in DistributedDataParallel, FSDP, experts dealt out, FSDP over tensor parallelism."""
    for process in found[world]:
        answer = process["special"][how]
        assert (answer["error"] if isinstance(answer, dict) else answer) < EQUAL
        assert answer["goes on"] if isinstance(answer, dict) and "goes on" in answer else True


@distributed
@pytest.mark.parametrize(
    ("how", "reason"),
    [("stages", "is split into stages (pp_size)"), ("uneven", "has 3 heads of keys and values, which tp_size=2 does")],
)
def test_what_cannot_be_split_is_refused_by_name(how: str, reason: str, found: Found) -> None:
    """`supports` and the constructor give the same reason, on each rank, and what to use instead."""
    for process in found[2]:
        answer, raised = process["special"][how]
        assert reason in answer
        assert "device_map" in answer
        assert raised == f"UnsupportedModelError: {answer}"


@distributed
def test_a_model_that_is_split_under_its_caches(found: Found) -> None:
    """A cache that holds nothing serves it, with a share of the heads; what others hold or held is refused."""
    for rank, process in enumerate(found[2]):
        answer = process["special"]["split afterwards"]
        assert answer["bytes"] == 0.5
        assert answer["unchanged"]
        assert re.search(r"ValueError: .*of 2 heads on .* of 4 heads on ", answer["filled"])
        assert f"is of a whole model, and this is rank {rank} of 2" in answer["restore"]


@distributed
def test_a_mesh_of_ones_own(found: Found) -> None:
    """Whatever its dimensions are called: what FSDP gathers is whole, and what is split is a rank's."""
    for process in found[2]:
        answer = process["special"]["mesh of one's own"]
        assert answer["error"] < EQUAL
        assert answer["files"] == 2
        assert answer["goes on"]


@distributed
@ranks
def test_files_of_others_are_refused_by_name(world: int, found: Found) -> None:
    """The error says what was saved and what this is; files of different moments are refused on all ranks."""
    for rank, process in enumerate(found[world]):
        answers, own = process["special"]["foreign files"], f"and this is rank {rank} of {world}"
        assert f"is of a whole model, {own}" in answers["whole"]
        assert f"is of rank {(rank + 1) % world} of {world}, {own}" in answers["rank"]
        assert "are of different moments" in answers["moment"]
        error = "FileNotFoundError: " if rank == 1 else f"ValueError: Another rank, 1 of the {world} that share this"
        assert answers["missing"].startswith(error)
        if world > 2:
            assert f"is of rank {rank % 2} of 2, {own}" in answers["world"]
            assert "llama.rank0of2.safetensors is of a model that was split" in answers["no file"]


@distributed
def test_a_whole_model_refuses_files_of_ranks(folder: Path) -> None:
    """Given the path that the ranks were given, or the file of one of them."""
    model = load("llama", folder / "llama")
    with pytest.raises(FileNotFoundError, match=r"rank0of2\.safetensors is of a model that was split"):
        StreamingCache.load(folder / "files-2" / "llama.safetensors", model)
    with pytest.raises(ValueError, match=r"is of rank 0 of 2, and this is a whole model: .* with as many ranks"):
        StreamingCache.load(folder / "files-2" / "llama.rank0of2.safetensors", model)


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("llama", {"_tp_size": 4}, "has 2 heads of keys and values, which tp_size=4 does not divide: use a tp_size"),
        ("gpt_neox", {"_tp_size": 3}, "has 4 heads of keys and values, which tp_size=3 does not divide: use a tp_size"),
        ("phi3", {"_tp_size": 4}, ""),  # each rank has all of them
        ("llama", {"_tp_size": 2}, ""),
        ("llama", {"_pp_stage": object()}, "is split into stages (pp_size), .* use tp_size, or device_map"),
    ],
)
def test_supports_says_what_cannot_be_split(name: str, how: dict[str, Any], reason: str) -> None:
    """It reads off the model how transformers has split it."""
    model = copy.deepcopy(build(name))
    for attribute, value in how.items():
        setattr(model, attribute, value)
    answer = supports(model)
    assert bool(answer) == (not reason)
    assert re.search(reason.replace("(pp_size)", r"\(pp_size\)"), answer.reason)


def test_each_rank_has_a_file_of_its_own() -> None:
    """It is named by rank and world, whether the path has a suffix or is that file itself."""
    for path, own in (("a.b/chat.safetensors", "a.b/chat.rank1of2.safetensors"), ("chat", "chat.rank1of2")):
        assert rank_file(path, 1, 2) == rank_file(own, 1, 2) == Path(own)
    assert rank_file("chat", 0, 2) != rank_file("chat", 1, 2)


@pytest.mark.parametrize("saved", [True, False])
def test_a_snapshot_of_a_rank_is_refused_by_a_whole_model(tmp_path: Path, *, saved: bool) -> None:
    """In memory and as a file; the cache is unchanged."""
    model = build("llama")
    cache = StreamingCache(model, 1, 4, 1)
    call(model, cache, tokens(1, 1, 9))
    before, snapshot = observe(cache), cache.snapshot()
    snapshot = replace(snapshot, model={RANK: "0 of 2", **snapshot.model})
    (tmp_path / "chat.rank0of2").write_bytes(encoded(snapshot))
    with pytest.raises(ValueError, match=r"is of rank 0 of 2, and this is a whole model: .* as many ranks"):
        StreamingCache.load(tmp_path / "chat.rank0of2", model) if saved else cache.restore(snapshot)
    with pytest.raises(FileNotFoundError, match=r"chat\.rank0of2 is of a model that was split: .* as many ranks"):
        StreamingCache.load(tmp_path / "chat", model)
    assert observe(cache) == before


# -- one process, several devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [one for one in ("llama", "gemma3_text", "gpt_neox", "falcon_alibi") if one in FAMILIES]
)
def test_layers_on_a_disk_change_nothing(name: str, tmp_path: Path) -> None:
    """A `device_map` whose last layer is off-loaded: the same bits, in steps, texts, roll-backs and files."""
    build(name).save_pretrained(tmp_path)
    models = [_loaded(tmp_path)]
    stack = next(one for one, part in models[0].named_modules() if isinstance(part, torch.nn.ModuleList))
    inner = {stack, stack.rpartition(".")[0]}  # and the decoder
    parts = {one for one, _ in models[0].named_modules() if one and one.rpartition(".")[0] in {"", *inner}}
    last = max(one for one in parts if one.startswith(f"{stack}."))
    places = dict.fromkeys(parts - inner, "cpu") | {last: "disk"}
    models.append(_loaded(tmp_path, device_map=places, offload_folder=tmp_path))
    assert any(weight.is_meta for weight in models[1].parameters())
    modes, found = ("greedy", "sampling", "beams"), []
    for number, model in enumerate(models):
        found.append(chunks(model, tmp_path, f"file-{number}") | texts(model, modes))
        found[-1] |= static(model) if can_be_static(models[0]) else {}
    for what, expected in found[0].items():
        assert torch.equal(found[1][what], expected) if isinstance(expected, Tensor) else found[1][what] == expected


def _loaded(folder: Path, **how: Any) -> Any:
    """Return a model as transformers loads it: the one of `load` has forwards of its own."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how).train(mode=False)
