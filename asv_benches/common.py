"""Shared by the benchmarks: the lab of the measured commit, checked caches, and interleaved samples.

asv starts a process for each benchmark and combination of parameters. Here, `setup_cache` of a class measures all of
its combinations in one process, a sample of each after the other, so that a slow minute affects all of them. asv's
processes then only read the numbers: the benchmark's timer advances by one sample per call.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import itertools
import sys
import traceback
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

F = TypeVar("F")
Combination = tuple[Any, ...]

DEVICES = ["cpu", "cuda"]
# Models whose step takes milliseconds on their device; weights are random, so that nothing is loaded.
MODELS = {"cpu": ("medium", "float32"), "cuda": ("pythia-2.8b", "float16")}
STREAMED = [0, 1, 10, 100]  # tokens already streamed, in limits
LIMITS = {
    "baseline": 256,
    "streaming_4_60": 64,
    "streaming_4_60_0": 64,
    "streaming_4_252": 256,
    "streaming_4_1020": 1024,
    "static_4_252": 256,
}
# One eviction in each sample, so that all samples do the same work: B + 1 tokens, where the buffer B is 64.
EVICTION_PERIOD = 65
WARM_UP = 3  # steps before anything is timed, for choosing kernels and touching memory
DENSE_SAMPLE = 8  # a growing cache has no period; few tokens, since each makes the next one slower
CLOCK = Path(__file__).resolve().parent.parent / "lab" / "sinkwindow_lab" / "measure" / "clock.py"


def shown_as(name: str, **attributes: Any) -> Callable[[F], F]:
    """Set the title of a benchmark, and other attributes that asv reads, such as `unit`."""

    def mark(function: F) -> F:
        vars(function).update(pretty_name=name, **attributes)
        return function

    return mark


class SkipError(NotImplementedError):
    """A commit or a machine cannot have this number: asv skips a benchmark that raises a NotImplementedError."""


def lab(*modules: str, needs: str | None = None) -> Any:
    """Import the first module below `sinkwindow_lab` that the measured commit has, and that defines a name.

    Raises:
        SkipError: If it has none.
    """
    # Below sinkwindow.lab, without rooms, is the lab of earlier commits.
    names = [name for one in modules for name in (f"sinkwindow_lab.{one}", f"sinkwindow.lab.{one.rpartition('.')[2]}")]
    for found in map(_imported, names):
        if found is not None and (needs is None or hasattr(found, needs)):
            return found
    raise SkipError(f"this commit has no {needs or 'module'} in {' or '.join(names)}")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("sinkwindow"):
            raise
        return None


@functools.cache
def clock() -> Any:
    """Load the lab's timer from this checkout, so that all commits are measured with the same one."""
    spec = importlib.util.spec_from_file_location("asv_clock", CLOCK)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {CLOCK}")
    module = sys.modules["asv_clock"] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@functools.cache
def model_for(device: str, dtype: str | None = None, shape: str | None = None) -> Any:
    """Build a model with random weights; shape and dtype are those of `MODELS` by default.

    Raises:
        SkipError: If there is no such device.
    """
    torch = importlib.import_module("torch")
    if device == "cuda" and not torch.cuda.is_available():
        raise SkipError("this machine has no GPU")
    torch.set_num_threads(1)  # more stable than two threads that wait for each other
    usual_shape, usual_dtype = MODELS[device]
    kind = getattr(torch, dtype or usual_dtype)
    return lab("inputs.shapes").random_model(shape or usual_shape, device=device, dtype=kind)


@functools.cache
def checked_configuration(name: str) -> Any:
    """Parse a configuration and check its output.

    Raises:
        LabError: If its logits differ from the definition.
    """
    torch = importlib.import_module("torch")
    configuration = lab("ways.configurations").parse(name)
    tiny = model_for("cpu", shape="tiny")
    tokens = LIMITS[name] + EVICTION_PERIOD + 10  # past the first eviction
    lab("measure.micro").check_logits(configuration, tiny, tokens)
    if configuration.kind == "static":
        torch.compiler.reset()  # otherwise the tiny model's graph would be generalized to all shapes
    return configuration


def filled(name: str, device: str, streamed: int, batch: int = 1, dtype: str | None = None) -> Any:
    """Return the lab's `AttentionSteps` of a checked configuration after a number of tokens, in limits."""
    model = model_for(device, dtype)  # first: without a GPU, nothing has to be checked
    steps = lab("measure.micro").AttentionSteps(checked_configuration(name), model, batch=batch)
    steps.fill(streamed * LIMITS[name])
    for _ in range(WARM_UP):
        steps.step()
    return steps


def open_session(name: str, model: Any) -> Any:
    """Open an empty session of a checked configuration."""
    opens = lab("ways.sessions", "ways.configurations", needs="open_session")
    return opens.open_session(checked_configuration(name), model)


class Fresh:
    """A session that `ready` replaces by an empty one, before each sample."""

    def __init__(self, name: str, model: Any) -> None:
        self.open = functools.partial(open_session, name, model)
        self.session = self.open()

    def ready(self) -> None:
        """Open a session that has seen nothing."""
        self.session.close()
        self.session = self.open()


def token_ids(model: Any, columns: int, rows: int = 1) -> Any:
    """Return random token ids `[rows, columns]` on the model's device."""
    torch = importlib.import_module("torch")
    random = torch.Generator().manual_seed(columns)
    return torch.randint(0, model.config.vocab_size, (rows, columns), generator=random).to(model.device)


def sample_tokens(name: str) -> int:
    """Return how many tokens one sample of a configuration has."""
    return DENSE_SAMPLE if name == "baseline" else EVICTION_PERIOD


class Work(NamedTuple):
    """What is timed of one combination.

    Attributes:
        tokens: Of a sample; times are per token.
        runs: What a sample runs, by the name of the benchmark that reads it.
        ready: Done before each sample.
    """

    tokens: int
    runs: Mapping[str, Callable[[], object]]
    ready: Callable[[], object]


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or the error that the benchmark of this combination, and no other, will raise."""
    try:
        return function(*arguments)
    except SkipError as error:  # asv shows no number; a NotImplementedError of torch is a failure like any other
        return error
    except Exception:  # noqa: BLE001 - the traceback is shown where the number would be
        return RuntimeError(traceback.format_exc())


def in_turns(works: Mapping[Combination, Callable[[], Work]], samples: int, device: str) -> dict[Combination, Any]:
    """Time combinations, interleaved; return for each its samples [s/token] by benchmark, or its error."""
    found: dict[Combination, Any] = {combination: attempt(work) for combination, work in works.items()}

    def guarded(combination: Combination, function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            if isinstance(found[combination], Work):
                result = attempt(function)
                if isinstance(result, Exception):
                    found[combination] = result

        return run

    sides = {
        (combination, name): clock().Side(guarded(combination, run), guarded(combination, work.ready))
        for combination, work in found.items()
        if isinstance(work, Work)
        for name, run in work.runs.items()
    }
    on = importlib.import_module("torch").device(device)
    timed = clock().interleave(sides, samples, on, warm_up=1) if sides else {}
    for combination, work in found.items():
        if isinstance(work, Work):
            seconds = {name: [one / work.tokens / 1e3 for one in timed[combination, name].ms] for name in work.runs}
            found[combination] = seconds
    return found


class Suite:
    """Base of benchmarks whose `setup_cache` returns what was found for each combination: numbers, or an error.

    Each class defines `setup_cache` itself, since asv names what it returns by the line of its definition.
    """

    params: ClassVar[list[list[Any]]]
    version = "1"  # raised when numbers stop being comparable with those of earlier commits
    timeout = 900  # of `setup_cache`, which measures, and of each process that reads a number

    def combinations(self) -> list[Combination]:
        """Return all combinations of parameters."""
        return list(itertools.product(*self.params))

    def setup(self, found: dict[Combination, Any], *combination: Any) -> None:
        """Keep what was found for one combination; asv skips a benchmark that raises `SkipError`."""
        self.found = found[combination]
        if isinstance(self.found, Exception):
            raise self.found


class TimedSuite(Suite, ABC):
    """Base of benchmarks of time: `work` prepares a combination, `setup_cache` returns `measured()`."""

    apart: ClassVar[Sequence[int]] = (-1,)  # indices of parameters whose values are not compared: they need own models
    version = "2"  # version 1 measured each combination in a process of its own
    number = rounds = 1
    repeat = 10
    warmup_time = 0
    now = 0.0
    taken = 0

    @abstractmethod
    def work(self, *combination: Any) -> Work:
        """Prepare what is timed."""

    def measured(self, more: Sequence[Combination] = ()) -> dict[Combination, Any]:
        """Time all combinations, and `more`, interleaved."""
        groups: dict[Combination, list[Combination]] = {}
        for one in (*self.combinations(), *more):
            groups.setdefault(tuple(one[index] for index in self.apart), []).append(one)
        found: dict[Combination, Any] = {}
        for group in groups.values():
            device = group[0][-1] if group[0][-1] in DEVICES else "cpu"
            found |= in_turns({one: functools.partial(self.work, *one) for one in group}, self.repeat, device)
            model_for.cache_clear()
            gc.collect()  # models and their caches refer to each other
        return found

    def timer(self) -> float:
        """Return the time for asv, which only `replay` advances."""
        return self.now

    def replay(self, name: str) -> None:
        """Let the next sample of a benchmark pass."""
        self.now += self.found[name][self.taken]
        self.taken += 1
