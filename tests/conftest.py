"""Setup of every test: Hypothesis profiles, one thread, and poisoned memory."""

from __future__ import annotations

import functools
import inspect
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OURS: Final = ("sinkwindow", "sinkwindow_reference", "sinkwindow_lab")
UNINITIALIZED: Final = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)

# The first example pays for imports and model building, hence no deadline and no health check for slow draws.
COMMON: Final[dict[str, Any]] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", **COMMON)
# The same examples on every machine and in every run, so that a build that fails here fails locally too.
settings.register_profile("ci", derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=2_000, stateful_step_count=200, **COMMON)
# A mutant is killed by the first example that fails; no time is spent on a smaller one.
FIRST_FAILURE: Final = (Phase.explicit, Phase.generate)
settings.register_profile("mutation", derandomize=True, max_examples=25, phases=FIRST_FAILURE, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Tiny tensors gain nothing from threads, and xdist workers would compete for the cores.
torch.set_num_threads(1)

# A shell's job in the background ignores Ctrl-C, and so would the programs that tests start and press it in.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill fresh memory with values that make a result visibly wrong: NaN, or an index far out of bounds."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


def _called_by_us() -> bool:
    """Return whether the function two frames up was called from one of our packages."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in OURS


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a function that returns uninitialized memory."""

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        ours = _called_by_us()
        tensor = allocate(*args, **kwargs)
        return _poison(tensor) if ours else tensor

    return wrapper


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """Leave no graphs to other tests: torch compiles a function only so many times."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """Make the default device one that holds no values: a tensor without a device of its own cannot be read."""
    with torch.device("meta"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison the uninitialized memory that our code requests.

    A slot that is read before it was written then shows in every result, rather than only where the allocator
    happens to return memory with old content. Calls from torch and transformers are not changed.
    """
    for owner, name in UNINITIALIZED:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
