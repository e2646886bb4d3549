"""Shared by the benchmarks: devices, the lab of the measured commit, timers that count per token."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import shutil
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

F = TypeVar("F")

DEVICES: Final = ["cpu", "cuda"]
# Models whose step takes milliseconds on their device; weights are random, so that nothing is loaded.
MODELS: Final = {"cpu": ("medium", "float32"), "cuda": ("pythia-2.8b", "float16")}
STREAMED: Final = [0, 1, 10, 100]  # tokens already streamed, in limits
LIMITS: Final = {
    "baseline": 256,
    "streaming_4_60": 64,
    "streaming_4_60_0": 64,
    "streaming_4_252": 256,
    "streaming_4_1020": 1024,
    "static_4_252": 256,
}
# One eviction in each sample, so that all samples do the same work: B + 1 tokens, where the buffer B is 64.
EVICTION_PERIOD: Final = 65
WARM_UP: Final = 3  # steps before anything is timed, for choosing kernels and touching memory
DENSE_SAMPLE: Final = 8  # a growing cache has no period; few tokens, since each makes the next one slower


def shown_as(name: str, **attributes: Any) -> Callable[[F], F]:
    """Set the title and the version of a benchmark; raise the version when its numbers stop being comparable.

    Args:
        name: the title above its graph.
        **attributes: other attributes of a benchmark that asv reads, such as `unit`.

    Returns:
        A decorator.
    """

    def mark(function: F) -> F:
        for key, value in {"pretty_name": name, "version": "1", **attributes}.items():
            setattr(function, key, value)
        return function

    return mark


def has_cuda() -> bool:
    """Return whether there is a GPU; without `nvidia-smi`, do not spend seconds on importing torch to find out."""
    return shutil.which("nvidia-smi") is not None and bool(importlib.import_module("torch").cuda.is_available())


def without_gpu(params: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return the combinations that this machine cannot run: those on `cuda` if it has no GPU.

    Args:
        params: static lists of a benchmark.

    Returns:
        Combinations to skip, for the benchmark's `skip_params`.
    """
    return [] if has_cuda() else [combination for combination in itertools.product(*params) if "cuda" in combination]


def needs_compiler() -> None:
    """Check that there is a C++ compiler for `torch.compile`.

    Raises:
        NotImplementedError: if there is none, so that asv skips the benchmark.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NotImplementedError(
            f"no C++ compiler {compiler!r}, which torch.compile needs: install it, or name another one in CXX"
        )


def lab(module: str, needs: str | None = None) -> Any:
    """Import a module of the lab, as it is in the measured commit.

    Args:
        module: name below `sinkwindow_lab`.
        needs: a name that the module must define.

    Returns:
        The module.

    Raises:
        NotImplementedError: if the commit has no such module or name, so that asv skips the benchmark.
    """
    old = f"sinkwindow.lab.{module.rpartition('.')[2]}"  # where the lab of earlier commits is
    found = _imported(f"sinkwindow_lab.{module}") or _imported(old)
    if found is None or (needs is not None and not hasattr(found, needs)):
        raise NotImplementedError(f"this commit has no {needs or 'module'} in sinkwindow_lab.{module} or {old}")
    return found


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("sinkwindow"):
            raise
        return None


@functools.cache
def model_for(device: str, dtype: str | None = None, shape: str | None = None) -> Any:
    """Build a model with random weights, once per process.

    Args:
        device: one of `DEVICES`.
        dtype: of the weights; by default as in `MODELS`.
        shape: a shape of the lab; by default as in `MODELS`.

    Returns:
        The model.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)  # more stable than two threads that wait for each other
    usual_shape, usual_dtype = MODELS[device]
    kind = getattr(torch, dtype or usual_dtype)
    return lab("inputs.shapes").random_model(shape or usual_shape, device=device, dtype=kind)


@functools.cache
def checked_configuration(name: str) -> Any:
    """Parse a configuration and check its output.

    Args:
        name: as in the lab's registry.

    Returns:
        The configuration.

    Raises:
        LabError: if its logits or its attention differ from the definition.
    """
    torch = importlib.import_module("torch")
    configuration = lab("ways.configurations").parse(name)
    tiny = model_for("cpu", shape="tiny")
    tokens = LIMITS[name] + EVICTION_PERIOD + 10  # past the first eviction
    lab("measure.micro").check_logits(configuration, tiny, tokens)
    if configuration.kind == "static":  # not checked on attention alone: the mask is the model's
        torch.compiler.reset()  # otherwise the tiny model's graph would be generalized to all shapes
    else:
        lab("measure.micro").check(configuration, tiny, tokens)
    return configuration


@functools.cache
def filled(name: str, device: str, streamed: int, batch: int = 1, dtype: str | None = None) -> Any:
    """Open the cache of a checked configuration and fill it to a number of tokens, once per process.

    Args:
        name: the configuration.
        device: one of `DEVICES`.
        streamed: tokens to stream, in limits.
        batch: rows.
        dtype: of weights and cache; by default as in `MODELS`.

    Returns:
        The lab's `AttentionSteps`.
    """
    configuration = checked_configuration(name)
    steps = lab("measure.micro").AttentionSteps(configuration, model_for(device, dtype), batch=batch)
    steps.fill(streamed * LIMITS[name])
    for _ in range(WARM_UP):
        steps.step()
    return steps


def sample_tokens(name: str) -> int:
    """Return how many tokens one sample of a configuration has [tokens]."""
    return DENSE_SAMPLE if name == "baseline" else EVICTION_PERIOD


def per_token_clock(tokens: int, device: str) -> Callable[[], float]:
    """Return a timer for asv that counts seconds per token and waits for the device.

    Args:
        tokens: tokens of a sample.
        device: one of `DEVICES`.

    Returns:
        The timer; differences of its values are [s/token].
    """
    timing, torch = lab("measure.timing"), importlib.import_module("torch")
    clock = timing.HostClock(wait=timing.waiter(torch.device(device)))
    return lambda: clock.mark() / tokens
