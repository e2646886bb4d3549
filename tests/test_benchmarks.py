"""Benchmarks measure what their names say and do not time wrong results; a run without measurements fails."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch
from asv.config import Config
from asv_benches import (
    bench_attention,
    bench_cache,
    bench_decode,
    bench_import,
    bench_memory,
    bench_perplexity,
    bench_text,
    common,
)
from asv_runner.benchmarks.time import TimeBenchmark  # type: ignore[import-untyped]

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure import micro
from sinkwindow_lab.ways.configurations import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
MODULES: Final = (
    bench_attention,
    bench_cache,
    bench_decode,
    bench_import,
    bench_memory,
    bench_perplexity,
    bench_text,
)
SUITES: Final = [
    member
    for module in MODULES
    for _, member in inspect.getmembers(module, inspect.isclass)
    if member.__module__ == module.__name__ and hasattr(member, "params")
]
MEASURING: Final = [suite for suite in SUITES if issubclass(suite, common.Suite)]


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Use a small model and empty caches; return the `AttentionSteps` that the test's benchmarks open."""
    monkeypatch.setitem(common.MODELS, "cpu", ("tiny", "float32"))
    steps: list[Any] = []

    def filled(*arguments: Any) -> Any:
        steps.append(common.filled(*arguments))
        return steps[-1]

    for module in (bench_attention, bench_cache, bench_decode):
        monkeypatch.setattr(module, "filled", filled)
    yield steps
    common.model_for.cache_clear()
    common.checked_configuration.cache_clear()


def _measures(suite: type) -> list[str]:
    return [name for name in dir(suite) if name.startswith(("time_", "timeraw_", "track_"))]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_parameters_are_static_and_named(suite: Any) -> None:
    """Each parameter has a name and plain values, so that histories continue."""
    assert len(suite.params) == len(suite.param_names)
    assert all(isinstance(value, (str, int)) for values in suite.params for value in values)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_measures_have_names_versions_and_units(suite: Any) -> None:
    """Each measure has a name for its graph, a version, and a unit that is not a throughput."""
    assert _measures(suite)
    assert suite.version
    for name in _measures(suite):
        measure = getattr(suite, name)
        assert measure.pretty_name
        assert name.startswith("time") or measure.unit in {"bytes", "PPL", "x"}


def test_each_suite_measures_for_itself() -> None:
    """A class that inherited `setup_cache` would read another's numbers, since asv calls it once per line of code."""
    lines = {suite: inspect.getsourcelines(vars(suite)["setup_cache"]) for suite in MEASURING}
    assert len({str(one) for one in lines.values()}) == len(MEASURING) - 1
    assert lines[bench_decode.OverDynamicCache] == lines[bench_decode.OutputToken]


class Slow(common.TimedSuite):
    """A suite whose samples last as long as its parameter says; `broken` fails, `absent` is not there."""

    params: ClassVar[list[list[Any]]] = [[1, 2, "broken", "breaks", "absent", "lacks"]]
    apart = ()
    repeat = 3

    def work(self, *combination: Any) -> common.Work:
        """Let the fake clock pass."""
        (what,) = combination
        if what == "broken":
            raise ValueError("no such cache")
        if what == "absent":
            raise common.SkipError("an old commit")
        if what == "lacks":  # as torch does for an operation that a device does not have
            raise NotImplementedError("could not run 'aten::x'")

        def run() -> None:
            if what == "breaks":
                raise ValueError("breaks while it is timed")
            now[0] += 10.0 * what
            order.append(what)

        return common.Work(10, {"it": run}, lambda: None)

    def time_it(self, *_: object) -> None:
        """Read a sample."""
        self.replay("it")


now: Final = [0.0]
order: Final[list[int]] = []


def test_combinations_are_measured_in_turns_and_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow minute affects all; a combination that fails or is missing has its own reason."""
    clock = common.clock()
    monkeypatch.setattr(clock, "clock_for", lambda _: clock.HostClock(now=lambda: now[0]))
    found = pickle.loads(pickle.dumps(Slow().measured()))  # noqa: S301 - asv's processes read it from a file
    assert order == [1, 2] * 4  # a round of warm-up, three of samples
    assert found[(1,)] == {"it": [1.0] * 3}  # per token
    assert found[(2,)] == {"it": [2.0] * 3}
    for what, error, reason in (
        ("broken", RuntimeError, "no such"),
        ("breaks", RuntimeError, "while"),
        ("absent", common.SkipError, "old"),
        ("lacks", RuntimeError, "aten::x"),
    ):
        with pytest.raises(error, match=reason) as stop:
            Slow().setup(found, what)
        assert stop.type is error  # a NotImplementedError is a RuntimeError too, and asv would skip it


def test_asv_reads_the_samples_as_its_own() -> None:
    """The machinery of asv returns all of them in order, or the first one with `--quick`."""
    found = {(1,): {"it": [0.25, 0.5, 0.125]}}
    for attributes, samples in ((), [0.25, 0.5, 0.125]), ((SimpleNamespace(repeat=1),), [0.25]):
        suite = Slow()
        benchmark = TimeBenchmark("Slow.time_it", suite.time_it, [*attributes, suite])
        benchmark.set_cache(found)
        benchmark.set_param_idx(0)
        assert benchmark.do_setup() is False
        assert benchmark.do_run() == {"samples": samples, "number": 1}


def test_reading_a_number_imports_no_torch() -> None:
    """The processes that asv starts for each combination take no seconds."""
    names = ", ".join(module.__name__.rpartition(".")[2] for module in MODULES)
    code = f"import sys; from asv_benches import {names}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


def test_all_commits_are_measured_with_the_timer_of_this_checkout() -> None:
    """The lab's timer loads by its path alone, since older commits have another lab or none."""
    assert Path(inspect.getfile(common.clock().interleave)) == common.CLOCK
    imports = [line for line in common.CLOCK.read_text("utf-8").splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in imports if "sinkwindow" in line]


@pytest.mark.parametrize("streamed", [1, 10])
def test_a_sample_has_one_eviction(streamed: int, opened: list[Any]) -> None:
    """In the steady state all samples do the same work."""
    attention = bench_attention.Attention().work("streaming_4_252", streamed, "cpu")
    cache_work = bench_cache.CacheWork().work("each 65 tokens", "cpu")
    decode = bench_decode.OutputToken().work("streaming_4_252", streamed, "cpu")
    runs = (attention.runs["attention_and_update"], cache_work.runs["update"], decode.runs["token"])
    for work, run, steps in zip((attention, cache_work, decode), runs, opened, strict=True):
        for _ in range(3):
            work.ready()
            before = steps.cache.num_evictions
            run()
            assert steps.cache.num_evictions == before + 1
            assert work.tokens == common.EVICTION_PERIOD


@pytest.mark.parametrize(("name", "streamed"), [("baseline", 10), ("streaming_4_252", 0)])
def test_samples_of_growing_caches_start_at_the_same_length(name: str, streamed: int, opened: list[Any]) -> None:
    """Before each sample a stock cache is cropped, and a streaming cache that starts empty is reset."""
    work = bench_decode.OutputToken().work(name, streamed, "cpu")
    for _ in range(2):
        work.ready()
        before = opened[0].cache.get_seq_length()
        assert before == streamed * common.LIMITS[name] + 1
        work.runs["token"]()
        assert opened[0].cache.get_seq_length() == before + work.tokens


def test_first_token_and_text_come_from_a_fresh_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample feeds its whole prompt, or its whole text, to an empty cache."""
    sessions: list[Any] = []
    real = common.open_session

    def open_session(*what: Any) -> Any:
        sessions.append(real(*what))
        return sessions[-1]

    monkeypatch.setattr(common, "open_session", open_session)
    first = bench_decode.FirstToken().work("streaming_4_252", 64, "cpu")
    text = bench_text.WholeText().work("streaming_4_60", "cpu")
    for work, run, tokens in ((first, first.runs["first"], 64), (text, text.runs["text"], bench_text.TOKENS)):
        for _ in range(2):
            work.ready()
            assert sessions[-1].kept_tokens == 0
            run()
            assert sessions[-1].cache.seen_tokens == [tokens]
    assert (first.tokens, text.tokens) == (1, bench_text.TOKENS)


def test_the_reference_reads_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations read a text of one length on the tiny model."""
    read: list[Any] = []
    common.checked_configuration(bench_text.STREAMING)
    monkeypatch.setattr(micro, "reference_pass", lambda _configuration, _model, ids: read.append(ids.shape))
    bench_text.WholeTextByReference().work("reference").runs["text"]()
    assert read == [(1, bench_text.TOKENS)]


def test_batches_decode_all_rows(opened: list[Any]) -> None:
    """The batch size and the dtype are those of the parameters."""
    bench_decode.BatchedOutputToken().work("streaming_4_252", 8, "bfloat16", "cpu").runs["token"]()
    assert opened[0].cache.batch_size == 8
    assert opened[0].session.model.dtype == torch.bfloat16


def test_compiled_steps_run_at_fixed_shapes(opened: list[Any]) -> None:
    """All rows decode in the static cache; the test runs eagerly, since compiling is slow."""
    with torch.compiler.set_stance("force_eager"):
        work = bench_decode.CompiledOutputToken().work("static_4_252", 8, "cpu")
        cache = opened[0].session.cache
        before = cache.forwarded_tokens
        work.runs["token"]()
    assert cache.is_compileable
    assert cache.batch_size == 8
    assert cache.forwarded_tokens == before + common.EVICTION_PERIOD == before + work.tokens


def test_without_a_compiler_or_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement is skipped, with the reason; nothing else is timed instead."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(common.SkipError, match=r"torch.compile needs: install it"):
        bench_decode.CompiledOutputToken().work("static_4_252", 1, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(common.SkipError, match="no GPU"):
        bench_decode.OutputToken().work("baseline", 1, "cuda")


def test_ratios_are_of_one_turn() -> None:
    """A ratio is of samples that were taken together, over the dense cache of the same length."""
    sides = {"ours": [2.0, 6.0], "dense": [1.0, 2.0]}
    found = {
        ("streaming_4_1020", 10, "cpu"): {"token": sides["ours"]},
        ("baseline", 4, "cpu"): {"token": sides["dense"]},
    }
    suite = bench_decode.OverDynamicCache()
    suite.setup(found, "streaming_4_1020", 10, "cpu")
    assert suite.track_token() == {"samples": [2.0, 3.0], "number": 1}
    lengths = {name: common.LIMITS["baseline"] * limits for name, limits in bench_decode.SAME_LENGTH.items()}
    assert lengths == {name: common.LIMITS[name] for name in lengths}
    with pytest.raises(RuntimeError, match="out of memory"):
        suite.setup(found | {("baseline", 4, "cpu"): RuntimeError("out of memory")}, "streaming_4_1020", 10, "cpu")


def test_cache_bytes_are_those_of_tensors() -> None:
    """A dense cache takes keys and values x layers x heads x head size x 4 bytes x tokens; streaming stays flat."""
    measure = bench_memory.CacheBytes().measure
    sizes = micro.geometry(common.model_for("cpu"))
    tokens = 256 + common.WARM_UP
    assert measure("baseline", 1) == 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * 4 * tokens
    assert measure("streaming_4_252", 100) == measure("streaming_4_252", 1) > 0


def test_peak_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is the same in every run and above the cache's size; it is skipped for commits whose lab lacks it."""
    suite, real = bench_memory.PeakMemory(), common.model_for
    monkeypatch.setattr(bench_memory, "PROMPT", 300)
    monkeypatch.setattr(bench_memory, "model_for", lambda device, **_: real(device))
    cache = common.filled("streaming_4_60", "cpu", 1).session.cache_bytes
    peak = suite.measure("streaming_4_60", "cpu")
    assert cache < peak == suite.measure("streaming_4_60", "cpu") < 300 * cache
    old = SimpleNamespace(generation_peaks=lambda *_: [SimpleNamespace(tensor_bytes=7)])
    monkeypatch.setattr(bench_memory, "lab", lambda *_, **__: old)
    assert suite.measure("streaming_4_60", "cpu") == 7
    monkeypatch.undo()
    monkeypatch.delattr("sinkwindow_lab.measure.memory.generation_peaks")
    assert "no generation_peaks" in str(common.attempt(suite.measure, "streaming_4_60", "cpu"))


def test_perplexity_keeps_six_digits() -> None:
    """Digits beyond the sixth depend on the order of summation."""
    assert bench_perplexity.rounded(23.51934567) == 23.5193


def test_lab_of_an_old_commit_is_missing() -> None:
    """The measurement is skipped if a commit does not have the module; another place of the same name is looked at."""
    with pytest.raises(common.SkipError, match=r"sinkwindow\.lab\.not_there"):
        common.lab("not_there")
    assert common.lab("not_there", "measure.micro", needs="check_logits") is micro


@pytest.mark.parametrize("name", ["streaming_4_60", "streaming_4_60_0", "static_4_252"])
def test_wrong_positions_are_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that does not rotate its sinks is refused before anything is timed."""
    monkeypatch.setattr(Rotary, "rotate_by", lambda _self, states, _distance: states)
    with torch.compiler.set_stance("force_eager"), pytest.raises(LabError, match="its speed means nothing"):
        common.checked_configuration(name)


def test_long_calls_reach_the_attention_of_the_model() -> None:
    """A long call returns one attention output per query, also across evictions."""
    for name in ("baseline", "streaming_4_60"):
        steps = micro.AttentionSteps(parse(name), random_model("tiny"))
        steps.fill(100)
        assert steps.long_call(50).shape == (1, 50, 4, 8)
        steps.close()


def test_a_way_without_a_cache_is_refused() -> None:
    """Re-computation has none whose steps could be timed."""
    with pytest.raises(LabError, match="has no cache"):
        micro.AttentionSteps(parse("recompute_8"), random_model("tiny"))


def test_configuration_has_no_unknown_keys() -> None:
    """Asv silently ignores a misspelled key."""
    lines = (ROOT / "asv.conf.json").read_text("utf-8").splitlines()
    keys = json.loads("\n".join(line for line in lines if not line.strip().startswith("//")))
    assert set(keys) <= {*vars(Config()), "version", "build_cache_size"}  # asv reads the last one without declaring it
    assert all(str(keys[name]).startswith(".asv/") for name in ("env_dir", "results_dir", "html_dir"))


def test_asv_accepts_the_suite() -> None:
    """`asv check`: discovery works and every signature fits its parameters."""
    command = [sys.executable, "-m", "asv", "check", "--python=same"]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "No problems found" in run.stdout
