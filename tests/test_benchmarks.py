"""Benchmarks measure what their names say and do not time wrong results; a run without measurements fails."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
    compare,
    gate,
)

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure import micro, timing
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
COLUMNS: Final = ["result", "params", "version"]


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a small model and empty caches, since asv measures each number in a process of its own."""
    monkeypatch.setitem(common.MODELS, "cpu", ("tiny", "float32"))
    cached = (common.model_for, common.checked_configuration, common.filled)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def _measures(suite: type) -> list[str]:
    return [name for name in dir(suite) if name.startswith(("time_", "timeraw_", "track_"))]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_parameters_are_static_and_named(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter has a name and plain values, the same with and without a GPU, so that histories continue."""
    assert len(suite.params) == len(suite.param_names)
    assert all(isinstance(value, (str, int)) for values in suite.params for value in values)
    monkeypatch.setattr(common, "has_cuda", lambda: True)
    assert common.without_gpu(suite.params) == []
    monkeypatch.setattr(common, "has_cuda", lambda: False)
    skipped = set(common.without_gpu(suite.params))
    assert skipped == {one for one in itertools.product(*suite.params) if "cuda" in one}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_measures_have_names_versions_and_units(suite: Any) -> None:
    """Each measure has a name for its graph, a version, and a unit that is not a throughput."""
    assert _measures(suite)
    for name in _measures(suite):
        measure = getattr(suite, name)
        assert measure.pretty_name
        assert measure.version
        assert name.startswith("time") or measure.unit in {"bytes", "PPL"}


def test_timer_counts_seconds_per_token_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens in five seconds are half a second per token; the clock waits for the device at both ends."""
    now, waits = iter([2.0, 7.0]), []
    real = timing.HostClock
    monkeypatch.setattr(timing, "waiter", lambda device: lambda: waits.append(device.type))
    monkeypatch.setattr(timing, "HostClock", lambda wait: real(lambda: next(now), wait))
    clock = common.per_token_clock(10, "cpu")
    assert -clock() + clock() == pytest.approx(0.5)
    assert waits == ["cpu", "cpu"]


@pytest.mark.parametrize("streamed", [1, 10])
def test_a_sample_has_one_eviction(streamed: int) -> None:
    """In the steady state all samples do the same work."""
    suite = bench_attention.Attention()
    for _ in range(3):
        suite.setup("streaming_4_252", streamed, "cpu")
        before = suite.steps.cache.num_evictions
        suite.time_attention_and_update("streaming_4_252", streamed, "cpu")
        assert suite.steps.cache.num_evictions == before + 1


def test_samples_of_growing_caches_start_at_the_same_length() -> None:
    """Before each sample a stock cache is cropped, and a streaming cache that starts empty is reset."""
    for name, streamed in (("baseline", 10), ("streaming_4_252", 0)):
        steps = common.filled(name, "cpu", streamed)
        for _ in range(2):
            steps.rewind(streamed * common.LIMITS[name])
            assert steps.cache.get_seq_length() == streamed * common.LIMITS[name]
            steps.step()


def test_first_token_comes_from_a_fresh_session() -> None:
    """Each sample feeds its whole prompt to an empty cache."""
    suite = bench_decode.FirstToken()
    suite.setup("streaming_4_252", 64, "cpu")
    assert suite.session.kept_tokens == 0
    suite.time_first_token()
    assert suite.session.kept_tokens == 64
    suite.teardown()


def test_decode_generates_as_the_lab_does() -> None:
    """A sample of the dense baseline feeds, one by one, as many tokens as its time is divided by."""
    suite = bench_decode.OutputToken()
    suite.setup("baseline", 1, "cpu")
    before = suite.session.kept_tokens
    suite.time_token()
    assert suite.session.kept_tokens == before + common.DENSE_SAMPLE == before + suite.tokens


def test_batches_decode_all_rows() -> None:
    """The batch size and the dtype are those of the parameters."""
    suite = bench_decode.BatchedOutputToken()
    suite.setup("streaming_4_252", 8, "bfloat16", "cpu")
    assert suite.session.cache.batch_size == 8
    assert suite.steps.session.model.dtype == torch.bfloat16
    suite.time_token()


def test_compiled_steps_run_at_fixed_shapes() -> None:
    """All rows decode in the static cache; the test runs eagerly, since compiling is slow."""
    suite = bench_decode.CompiledOutputToken()
    with torch.compiler.set_stance("force_eager"):
        suite.setup("static_4_252", 8, "cpu")
        cache, before = suite.session.cache, suite.session.cache.forwarded_tokens
        suite.time_token()
    assert cache.is_compileable
    assert cache.batch_size == 8
    assert cache.forwarded_tokens == before + common.EVICTION_PERIOD == before + suite.tokens


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement is skipped, with a message that says what to install; eager steps are not timed instead."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(NotImplementedError, match=r"torch\.compile needs: install it"):
        bench_decode.CompiledOutputToken().setup("static_4_252", 1, "cpu")


def test_cache_bytes_of_the_dense_baseline_are_its_tensors() -> None:
    """The number is keys and values x layers x heads x head size x four bytes x tokens."""
    suite = bench_memory.CacheBytes()
    sizes = micro.geometry(common.model_for("cpu"))
    tokens = 256 + common.WARM_UP
    expected = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * 4 * tokens
    assert suite.track_bytes("baseline", 1) == expected


def test_cache_bytes_of_streaming_stay_flat() -> None:
    """A stream of a hundred times the limit takes as many bytes as a stream of one limit."""
    suite = bench_memory.CacheBytes()
    assert suite.track_bytes("streaming_4_252", 100) == suite.track_bytes("streaming_4_252", 1) > 0


def test_peak_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is the same in every run and above the cache's size; it is skipped for commits whose lab lacks it."""
    suite = bench_memory.PeakMemory()
    monkeypatch.setattr(bench_memory, "PROMPT", 300)
    suite.setup("streaming_4_60", "cpu")
    suite.model = common.model_for("cpu")
    cache = common.filled("streaming_4_60", "cpu", 1).session.cache_bytes
    assert cache < suite.track_peak() == suite.track_peak() < 300 * cache
    monkeypatch.delattr("sinkwindow_lab.measure.memory.generation_peaks")
    with pytest.raises(NotImplementedError, match="no generation_peaks"):
        suite.setup("streaming_4_60", "cpu")


def test_whole_text_is_read_once() -> None:
    """The session sees the text once; the benchmark of the reference reads a text of the same length."""
    suite = bench_text.WholeText()
    suite.setup("streaming_4_60", "cpu")
    suite.time_logits()
    assert suite.session.cache.seen_tokens == [bench_text.TOKENS]
    suite.teardown()
    by_reference = bench_text.WholeTextByReference()
    by_reference.setup("reference")
    assert by_reference.ids.shape == (1, bench_text.TOKENS)
    assert by_reference.reads == by_reference.read_by_reference
    by_reference.teardown()


def test_perplexity_keeps_six_digits() -> None:
    """Digits beyond the sixth depend on the order of summation."""
    assert bench_perplexity.rounded(23.51934567) == 23.5193


def test_perplexity_of_a_commit_without_lab_is_missing() -> None:
    """The measurement is skipped: neither zero nor an error."""
    with pytest.raises(NotImplementedError, match="cannot measure"):
        bench_perplexity.Perplexity().setup(None, "baseline")


def test_lab_of_an_old_commit_is_missing() -> None:
    """The measurement is skipped if a commit does not have the module."""
    with pytest.raises(NotImplementedError, match=r"sinkwindow\.lab\.not_there"):
        common.lab("not_there")


@pytest.mark.parametrize("name", ["streaming_4_60", "streaming_4_60_0", "static_4_252"])
def test_wrong_positions_are_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that does not rotate its sinks is refused before anything is timed."""
    monkeypatch.setattr(Rotary, "rotate_by", lambda _self, states, _distance: states)
    with torch.compiler.set_stance("force_eager"), pytest.raises(LabError, match="its speed means nothing"):
        common.checked_configuration(name)


@pytest.mark.parametrize("name", ["baseline", "streaming_2_6_0", "streaming_2_6_3", "window_0_8"])
@pytest.mark.parametrize("tokens", [4, 9, 41])
def test_right_caches_pass_their_check(name: str, tokens: int) -> None:
    """Before and after evictions, attention and logits agree with the definition up to rounding."""
    model = random_model("tiny")
    assert micro.check(parse(name), model, tokens) < 1e-5
    assert micro.check_logits(parse(name), model, tokens) < 1e-5


def test_long_calls_reach_the_attention_of_the_model() -> None:
    """A long call returns one attention output per query, also across evictions."""
    for name in ("baseline", "streaming_4_60"):
        steps = micro.AttentionSteps(parse(name), random_model("tiny"))
        steps.fill(100)
        assert steps.long_call(50).shape == (1, 50, 4, 8)
        steps.close()


def test_unknown_shapes_and_caches_are_refused() -> None:
    """The message lists the valid names."""
    with pytest.raises(LabError, match=r"choose from tiny"):
        random_model("huge")
    with pytest.raises(LabError, match="has no cache"):
        micro.AttentionSteps(parse("recompute_8"), random_model("tiny"))


def _saved(folder: Path, values: list[float | None] | None, commit: str = "a" * 40) -> Path:
    """Write what asv writes for one benchmark with two devices."""
    (folder / "machine").mkdir(parents=True, exist_ok=True)
    benchmark = {"name": "Suite.time_it", "params": [["'cpu'", "'cuda'"]]}
    (folder / "benchmarks.json").write_text(json.dumps({"Suite.time_it": benchmark, "version": 2}))
    entry = {"Suite.time_it": [values, [], "1"]} if values != [] else {}
    results = {"commit_hash": commit, "result_columns": COLUMNS, "results": entry}
    (folder / "machine" / f"{commit[:8]}.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize(
    ("values", "gpu", "code"),
    [
        ([1.0, math.nan], False, gate.OK),
        ([1.0, 2.0], True, gate.OK),
        ([1.0, math.nan], True, gate.MISSING),
        ([math.nan, math.nan], False, gate.NOTHING_RAN),
        ([1.0, None], True, gate.FAILED),
        (None, False, gate.FAILED),
        ([], False, gate.NOTHING_RAN),
    ],
)
def test_gate_distinguishes_failures(tmp_path: Path, values: list[float | None], code: int, *, gpu: bool) -> None:
    """Measured, skipped without a GPU, missing, failed, and nothing measured are different results."""
    assert gate.judge(_saved(tmp_path, values), None, gpu=gpu).code == code


def test_gate_detects_that_nothing_ran(tmp_path: Path) -> None:
    """An empty folder and results that are older than the run do not count."""
    assert gate.judge(tmp_path, None).code == gate.NOTHING_RAN
    _saved(tmp_path, [1.0, 2.0])
    stamp = tmp_path / "started"
    stamp.touch()
    later = stamp.stat().st_mtime_ns + 10**9
    os.utime(stamp, ns=(later, later))
    assert gate.judge(tmp_path, stamp).code == gate.NOTHING_RAN
    assert gate.main(["--results", str(tmp_path), "--newer-than", str(stamp)]) == gate.NOTHING_RAN


def test_gate_allows_missing_numbers_of_old_commits(tmp_path: Path) -> None:
    """Only the commit that must be complete needs results of all benchmarks."""
    _saved(tmp_path, [1.0, 2.0], "a" * 40)
    _saved(tmp_path, [], "b" * 40)
    assert gate.judge(tmp_path, None, gpu=True, complete="a" * 40).code == gate.OK
    assert gate.judge(tmp_path, None, gpu=True, complete="b" * 40).code == gate.MISSING
    assert gate.judge(tmp_path, None, gpu=True, complete="b" * 40, selected="Other").code == gate.NOTHING_RAN


def test_comparison_runs_exact_figures_and_times_separately() -> None:
    """Every benchmark is in one of two passes; the factor for exact figures allows no change."""
    exact, timed = compare.passes("base", "head", 1.2, None)
    assert exact[exact.index("--factor") + 1] == "1.0001"
    assert exact[exact.index("--bench") + 1] == compare.EXACT
    assert timed[timed.index("--bench") + 1] == f"^(?!.*({compare.EXACT}))"
    assert all("--interleave-rounds" in command for command in (exact, timed))


def test_a_failed_benchmark_hides_no_other_regression(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If asv stops because a benchmark failed, the other results are still compared, and the status is a failure."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 2 if "continuous" in command else 0, stdout="0123\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gate, "judge", lambda *_, **__: gate.Findings(failed=["CacheBytes"]))
    code = compare.compare("base", "head", factor=1.2, bench=None, gpu=False, root=tmp_path)
    assert code == gate.FAILED
    shown = [command for command in ran if command[1] == "compare"]
    assert [command[command.index("--factor") + 1] for command in shown] == [str(compare.EXACT_FACTOR), "1.2"]
    assert all(command[-2:] == ["base", "head"] for command in shown)


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
