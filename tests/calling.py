"""What the tests of calls share: feeding, generating, failing, and streams without a model."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest
import torch

from sinkwindow import Retention
from sinkwindow.attention.rotation import Rotary
from sinkwindow.lanes import Inputs
from sinkwindow.storage.slots import Pool
from sinkwindow.stream.stream import Stream
from strategies import CACHE_NAME, ModelSpec, Rule, call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from sinkwindow.stream.call import StreamCall

RULE: Final = Rule(2, 5, 1)
WIDE: Final = Rule(1, 80, 0)  # evicts nothing: there a stock cache is the judge
LENGTHS: Final = [9, 1, 1, 7, 1, 12, 1]
KINDS: Final = pytest.mark.parametrize("static", [False, True])
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


def raising(error: BaseException) -> Callable[..., NoReturn]:
    """Return a function that raises this, whatever it is given."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


# -- a stream without a model -----------------------------------------------------------------------------------------

CPU: Final = torch.device("cpu")
RETENTION: Final = Retention(2, 4, 1)  # token 7 is the first after which tokens leave: 2 and 3
POOL: Final = Pool(RETENTION, Rotary(torch.tensor([1.0, 0.5])), (0,))


def begun(stream: Stream, columns: int, real: list[list[int]] | None = None) -> StreamCall:
    """Run a call through its only layer."""
    one = stream.begin(Inputs(len(real) if real else 1, columns, CPU, [*real] if real else None))
    states = torch.ones(one.batch, 1, columns, 4)
    one.parts[0].update(0, states, states)
    return one


def stream_of(
    columns: int,
    real: list[list[int]] | None = None,
    rule: Retention = RETENTION,
    bound: int = 10**6,
    longest: int | None = None,
) -> Stream:
    """Return a stream that was fed so many columns in a call."""
    stream = Stream([replace(POOL, retention=rule)], bound, longest=longest)
    if columns:
        stream.commit(begun(stream, columns, real))
    return stream
