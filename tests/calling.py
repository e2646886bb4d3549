"""What the tests of calls share: feeding, generating, and failing."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from strategies import CACHE_NAME, ModelSpec, Rule, call

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

RULE: Final = Rule(2, 5, 1)
SPEC: Final = ModelSpec(max_positions=24)  # positions start again often, and long calls run in pieces


def fed(model: PreTrainedModel, cache: Any, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return the logits of a text's calls."""
    return [call(model, cache, part) for part in torch.split(ids, list(lengths), dim=1)]


def generated(model: PreTrainedModel, ids: Tensor, cache: Any, new: int = 12, **more: Any) -> list[int]:
    """Return the tokens of a prompt and its greedy continuation."""
    arguments: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True, **more}
    if cache is not None:
        arguments[CACHE_NAME] = cache
    return model.generate(ids, **arguments)[0].tolist()  # type: ignore[operator,no-any-return]  # a mixin's method


def logits_of(model: Any, cache: object, ids: Tensor) -> Tensor:
    """Call a model, or a module around one, in the modes of torch that are on; return its logits."""
    logits: Tensor = model(input_ids=ids, **{CACHE_NAME: cache}).logits
    return logits


@contextmanager
def failing(module: Module, kind: type[BaseException], *, after: int = 0) -> Iterator[None]:
    """Let a module raise after its forward, at its call number `after`; the block must raise that."""
    calls = [0]

    def hook(*_: object) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            raise kind("the machine stops")

    handle = module.register_forward_hook(hook)
    try:
        with pytest.raises(kind, match="the machine stops"):
            yield
    finally:
        handle.remove()
