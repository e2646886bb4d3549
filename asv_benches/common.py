"""What the benchmarks share: devices, the lab of the commit at hand, clocks that count per token."""

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
# A model whose step takes milliseconds on its device: random weights, so that nothing is loaded.
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
# One eviction in each sample, so that all samples hold the same work: B + 1 tokens, the buffer being 64.
EVICTION_PERIOD: Final = 65
WARM_UP: Final = 3  # steps before anything is timed: kernels are chosen and memory is touched
DENSE_SAMPLE: Final = 8  # a growing cache has no period; few tokens, since each one makes the next slower


def shown_as(name: str, **attributes: Any) -> Callable[[F], F]:
    """Names a benchmark for readers, and its history for asv: a version is raised when numbers stop being comparable.

    Args:
        name: shown above its graph.
        **attributes: more of what asv reads off a benchmark, such as `unit`.

    Returns:
        A decorator.
    """

    def mark(function: F) -> F:
        for key, value in {"pretty_name": name, "version": "1", **attributes}.items():
            setattr(function, key, value)
        return function

    return mark


def has_cuda() -> bool:
    """Tells whether there is a GPU; importing torch just to be told that there is none would take seconds."""
    return shutil.which("nvidia-smi") is not None and bool(importlib.import_module("torch").cuda.is_available())


def without_gpu(params: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Lists the combinations that this machine cannot run: those on `cuda` where there is none.

    Args:
        params: static lists of a benchmark.

    Returns:
        Combinations to skip, for the benchmark's `skip_params`.
    """
    return [] if has_cuda() else [combination for combination in itertools.product(*params) if "cuda" in combination]


def needs_compiler() -> None:
    """Looks for what `torch.compile` compiles with.

    Raises:
        NotImplementedError: if there is none: the number is missing then, not wrong.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        message = f"no C++ compiler {compiler!r}, which torch.compile needs: install it, or name another one in CXX"
        raise NotImplementedError(message)


def lab(module: str, needs: str | None = None) -> Any:
    """Imports a module of the lab, as it was at the commit being measured.

    Args:
        module: name below `sinkwindow.lab`.
        needs: a name in it without which it is of no use.

    Returns:
        The module.

    Raises:
        NotImplementedError: if the commit has no such module or name: its numbers are missing then, not wrong.
    """
    try:
        found = importlib.import_module(f"sinkwindow.lab.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("sinkwindow"):
            raise
        message = f"this commit has no {error.name}"
        raise NotImplementedError(message) from error
    if needs is not None and not hasattr(found, needs):
        message = f"this commit has no {needs} in sinkwindow.lab.{module}"
        raise NotImplementedError(message)
    return found


@functools.cache
def model_for(device: str, dtype: str | None = None, shape: str | None = None) -> Any:
    """Builds a model with random weights, once per process.

    Args:
        device: one of `DEVICES`.
        dtype: of the weights; the device's usual one by default.
        shape: a shape of the lab; the device's usual one by default.

    Returns:
        The model.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)  # steadier than two threads that wait for each other
    usual_shape, usual_dtype = MODELS[device]
    kind = getattr(torch, dtype or usual_dtype)
    return lab("shapes").random_model(shape or usual_shape, device=device, dtype=kind)


@functools.cache
def checked_configuration(name: str) -> Any:
    """Reads a configuration, after making sure that its output is right.

    Args:
        name: as in the lab's registry.

    Returns:
        The configuration.

    Raises:
        LabError: if its logits or its attention differ from the definition.
    """
    torch = importlib.import_module("torch")
    configuration = lab("configurations").parse(name)
    tiny = model_for("cpu", shape="tiny")
    tokens = LIMITS[name] + EVICTION_PERIOD + 10  # past the first eviction
    lab("micro").check_logits(configuration, tiny, tokens)
    if configuration.kind == "static":  # its attention alone means nothing: the mask is the model's
        torch.compiler.reset()  # the tiny model's graph would be widened to all shapes
    else:
        lab("micro").check(configuration, tiny, tokens)
    return configuration


@functools.cache
def filled(name: str, device: str, streamed: int, batch: int = 1, dtype: str | None = None) -> Any:
    """Opens a checked configuration's cache and brings it to where it has seen a number of tokens, once per process.

    Args:
        name: the configuration.
        device: one of `DEVICES`.
        streamed: tokens already streamed, in limits.
        batch: rows.
        dtype: of weights and cache; the device's usual one by default.

    Returns:
        The lab's `AttentionSteps`.
    """
    configuration = checked_configuration(name)
    steps = lab("micro").AttentionSteps(configuration, model_for(device, dtype), batch=batch)
    steps.fill(streamed * LIMITS[name])
    for _ in range(WARM_UP):
        steps.step()
    return steps


def sample_tokens(name: str) -> int:
    """Tells how many tokens one sample of a configuration takes [tokens]."""
    return DENSE_SAMPLE if name == "baseline" else EVICTION_PERIOD


def per_token_clock(tokens: int, device: str) -> Callable[[], float]:
    """Makes a timer for asv that shows seconds per token and waits for the device.

    Args:
        tokens: tokens of a sample.
        device: one of `DEVICES`.

    Returns:
        The timer; differences of its values are [s/token].
    """
    timing, torch = lab("timing"), importlib.import_module("torch")
    clock = timing.HostClock(wait=timing.waiter(torch.device(device)))
    return lambda: clock.mark() / tokens
