"""What a cache does on a GPU is what it does on the CPU; run by `test_devices.py` in a process of its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import torch

import hybrids
from chat_tiny import made
from families import FAMILIES, build
from pretend_gpu import GPU
from sinkwindow import StreamingCache
from sinkwindow.model.families import inspect_model
from sinkwindow.model.rope import rotary_modules
from strategies import CACHE_NAME, EXACT, ModelSpec, Rule, padding_mask, stream, tokens, worst

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import GenerationMixin, PreTrainedModel

RULE: Final = Rule(2, 5, 3)
LENGTHS: Final = [20, 1, 1]  # across evictions, and steps
STATIC: Final = ("llama", "cohere2", "gpt_neox", "gemma3_text", "gpt_oss", "qwen2_windows")


def both(model: PreTrainedModel, what: Callable[[PreTrainedModel, torch.device], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what something gives on the GPU and on the CPU."""
    with torch.no_grad():
        found = what(torch.nn.Module.to(copy.deepcopy(model), GPU), GPU)
        assert found.device == GPU
        return found.cpu(), what(model, torch.device("cpu"))


ONES: Final = torch.ones(3)
FIRST: Final = torch.tensor([0])
MIXED: Final[dict[str, Callable[[Tensor], object]]] = {
    "a sum": lambda ours: ours + ONES,
    "a sum in place": lambda ours: ONES.clone().add_(ours),
    "a product in float64": lambda ours: ours.double() * ONES.double(),
    "joined": lambda ours: torch.cat([ours, ONES]),
    "numbers in a row": lambda ours: torch.stack([ours[0], ONES[0]]),
    "selected": lambda ours: ours.index_select(0, FIRST),
    "values written": lambda ours: ours.index_put_((FIRST.to(GPU),), ONES[:1]),
    "indices of the GPU": lambda ours: ONES[ours.long()],
    "a mask": lambda ours: torch.where(ONES > 0, ours, 0.0),
    "the target": lambda ours: torch.add(ours, 1, out=ONES.clone()),
}


@pytest.mark.parametrize("what", MIXED)
def test_what_a_gpu_refuses_is_refused(what: str) -> None:
    """Otherwise no other law here could fail."""
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[what](ONES.to(GPU))


def test_what_a_gpu_allows_is_allowed() -> None:
    """Indices and numbers of the CPU, and copies both ways."""
    ours = torch.arange(3.0, device=GPU)
    ours[FIRST] = ours[2] + torch.tensor(1.0)
    ours[1:].copy_(ONES[1:])
    ours.masked_fill_(ours == 1, torch.tensor(7.0))
    assert ours[FIRST].device == GPU
    assert ours.cpu().tolist() == [3.0, 7.0, 7.0]


@pytest.mark.parametrize("family", [*FAMILIES, *hybrids.HYBRIDS])
def test_a_family_streams(family: str) -> None:
    """A call across evictions and steps, whatever the family makes its positions, masks and states of."""
    check(family, static=False)


@pytest.mark.parametrize("family", STATIC)
def test_a_family_streams_statically(family: str) -> None:
    """Steps with fixed shapes."""
    check(family, static=True)


def check(family: str, *, static: bool) -> None:
    """Compare the logits of a family's model."""
    model, ids = (build if family in FAMILIES else hybrids.build)(family), tokens(0, 2, sum(LENGTHS))
    ours, expected = both(
        model, lambda model, device: stream(model, RULE.cache(model, static=static), ids.to(device), LENGTHS)
    )
    bound = FAMILIES[family].bound if family in FAMILIES else 1e-5 if family in hybrids.FLOAT32_LOGITS else EXACT
    assert worst(ours - expected) < bound


def test_rotary_modules_on_two_devices_are_compared() -> None:
    """As in a model whose layers are split over devices: they have the same frequencies there too."""
    model = copy.deepcopy(build("granite_swa"))
    before = [kind.layers for kind in inspect_model(model).kinds]
    _, second = rotary_modules(model)
    torch.nn.Module.to(second, GPU)
    assert [kind.layers for kind in inspect_model(model).kinds] == before


@pytest.mark.parametrize("static", [False, True])
def test_padded_rows_stream(*, static: bool) -> None:
    """Padding between tokens of a call, of which the rows have different numbers."""
    ids, mask = tokens(0, 3, sum(LENGTHS)), padding_mask(5, 3, LENGTHS, holes=True)
    ours, expected = both(
        ModelSpec().model(),
        lambda model, device: stream(model, RULE.cache(model, static=static), ids.to(device), LENGTHS, mask.to(device)),
    )
    assert worst((ours - expected)[mask.bool()]) < EXACT


@pytest.mark.parametrize(
    ("mode", "static"),
    [({}, False), ({}, True), ({"num_beams": 3}, False), ({"prompt_lookup_num_tokens": 3}, False)],
)
def test_generate_gives_the_same_tokens(mode: dict[str, Any], *, static: bool) -> None:
    """Greedy steps, beams that are reordered, drafts that are taken back, static steps."""
    ids = tokens(1, 1 if "prompt_lookup_num_tokens" in mode else 2, 14)
    more: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    def generate(model: PreTrainedModel, device: torch.device) -> Tensor:
        cache, generating = RULE.cache(model, static=static), cast("GenerationMixin", model)
        return cast("Tensor", generating.generate(ids.to(device), **{CACHE_NAME: cache}, **more, **mode))

    ours, expected = both(ModelSpec().model(), generate)
    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("static", [False, True])
def test_branches_and_files_go_on(tmp_path: Path, *, static: bool) -> None:
    """Snapshots, copies and files go on where the model is; a snapshot from the CPU is restored there."""
    ids, model = tokens(2, 1, 40), ModelSpec().model()
    early = RULE.cache(model, static=static)
    stream(model, early, ids[:, :20], [20])

    def life(model: PreTrainedModel, device: torch.device) -> Tensor:
        cache = RULE.cache(model, static=static)
        cache.restore(early.snapshot())
        cache.save(tmp_path / device.type)
        branches = [copy.deepcopy(cache), StreamingCache.load(tmp_path / device.type, model)]
        saved = cache.snapshot()
        found = [stream(model, branch, ids[:, 20:].to(device), [9, 1, 10]) for branch in (cache, *branches)]
        cache.restore(saved)
        found.append(stream(model, cache, ids[:, 20:].to(device), [20]))
        return torch.cat(found, dim=1)

    ours, expected = both(model, life)
    assert worst(ours - expected) < EXACT


def test_a_chat_says_the_same() -> None:
    """Turns are rendered, fed and answered."""

    def talk(model: PreTrainedModel, device: torch.device) -> Tensor:
        chat = made(model)
        for message in ("bed", "dab", "add"):
            chat.ask(message, max_new_tokens=6, do_sample=False)
        return torch.tensor([*chat.cache.retained_tokens[0], *chat.cache.seen_tokens], device=device)

    ours, expected = both(ModelSpec().model(), talk)
    assert ours.tolist() == expected.tolist()
