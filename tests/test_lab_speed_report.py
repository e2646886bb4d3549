"""The speed report: ratios, targets and the page by hand, what is measured, every part on a tiny shape."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab_tiny import exit_status, machine_record
from sinkwindow.stream.state import DebugState
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.clock import Side
from sinkwindow_lab.records import Measurement, Report
from sinkwindow_lab.render import marked
from sinkwindow_lab.reports.speed import collect, decode, floors, plan, texts, tricks
from sinkwindow_lab.reports.speed.compare import Comparison, comparisons, places
from sinkwindow_lab.reports.speed.floors import Place
from sinkwindow_lab.reports.speed.page import IMPOSSIBLE, PARTS, VERDICT, gain, page, sections, verdict
from sinkwindow_lab.ways.sessions import DenseSession

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
FEW = replace(plan.QUICK, models=(("tiny", "float32"),), samples={1: 3, 8: 2}, late={1: 100_000, 8: 64}, tricks=1)
TPOT = Place("tpot", "tiny shape", 1)


def steps(side: str, *samples: float, metric: str = "TPOT") -> Measurement:
    """Return times of a side."""
    return TPOT.one(side, metric, "ms", samples)


def comparison(ours: float, other: float, target: float | None, *, speed: bool = False) -> Comparison:
    """Return a comparison with a floor of 2 ms."""
    return Comparison(TPOT, "a step", steps("ours", ours), steps("theirs", other), target, speed, 2.0)


def report(*measurements: Measurement, **fields: Any) -> Report:
    """Return a report of the quick plan."""
    sizes = {"limit": 64, "prompt_limit": 16, "chunk": 32, "block": 32}
    facts = {"kind": "speed", "quick": False, "plan": sizes, "machine": machine_record(), "models": []}
    return Report.model_validate({**facts, "measurements": list(measurements), "seconds": 12.0, **fields})


def a_report(**fields: Any) -> Report:
    """Return a report whose late step is longest, without an event at 50 ms and with one at 8 ms."""
    rates = [Place("bandwidth", "cpu", 512).one(way, "rate", "GB/s", [rate]) for way, rate in (("a", 10), ("b", 20))]
    sizes = [("context", "tokens", 97), ("weights", "bytes", 3e9), ("keys and values", "bytes", 1e9)]
    return report(
        *rates,
        steps("ours", 3.0, 4.0, 5.0),
        steps("ours, late", 4.0, 4.0, 50.0, 8.0, 4.0),
        steps("ours, late", 4.0, metric="TPOT, eviction"),
        steps("ours, late", 8.0, metric="TPOT, eviction + rebase"),
        TPOT.one("ours, late", "seen", "tokens", [2000]),
        steps("ours, B = 0", 1.0, 5.0, 1.0),
        steps("DynamicCache", 4.0),
        steps("bare SDPA", 0.5, 1.5, 1.0),
        steps("short", 2.0, 2.5, 2.0),
        *(TPOT.one("short", metric, unit, [value]) for metric, unit, value in sizes),
        **fields,
    )


@pytest.mark.parametrize(
    ("one", "ratio", "met"),
    [
        (comparison(3.0, 4.0, 0.75), 0.75, True),
        (comparison(3.0, 4.0, 0.74), 0.75, False),
        (comparison(10.0, 8.0, 0.8, speed=True), 0.8, True),
        (comparison(10.0, 8.0, 0.81, speed=True), 0.8, False),
        (comparison(9.0, 1.0, None), 9.0, True),
        (comparison(math.nan, 1.0, 2.0), pytest.approx(math.nan, nan_ok=True), False),
        (comparison(math.nan, 1.0, 2.0, speed=True), pytest.approx(math.nan, nan_ok=True), False),
    ],
)
def test_a_cost_is_at_most_its_target_and_a_speed_at_least(one: Comparison, ratio: float, *, met: bool) -> None:
    """A cost is our time over the other's, a speed the other's over ours; nothing misses no target, a NaN any."""
    assert (one.ratio, one.met) == (ratio, met)


def test_a_target_beyond_the_floor_is_reported_as_such() -> None:
    """The floor of 2 ms is 0.8 of the other's 2.5 ms: no cache can reach 0.7, but one could reach 0.8."""
    assert comparison(2.25, 2.5, 0.7).complaint() == (
        "tiny shape, tpot, a step: 0.900x, target at most 0.70x; the lower bound itself is at 0.800x here"
    )
    assert comparison(2.25, 2.5, 0.8).complaint().endswith("0.900x, target at most 0.80x")
    fast = comparison(4.0, 3.0, 1.6, speed=True)
    assert fast.complaint().endswith("target at least 1.60x; the lower bound itself is at 1.500x here")
    assert comparison(4.0, 3.0, 1.5, speed=True).complaint().endswith("0.750x, target at least 1.50x")


def docs_page(folder: Path) -> Path:
    """Return a page that has a place for the verdict alone."""
    (folder / "docs.md").write_text("\n".join(marked.marks(VERDICT)), encoding="utf-8")
    return folder / "docs.md"


def text_of(found: Report) -> str:
    """Return a report's page, with plain spaces."""
    return page(found).markdown.replace("\xa0", " ")


def test_the_page_of_a_fixed_report() -> None:
    """A miss is explained before it is listed; floors, ratios, targets and the longest step are pivots."""
    text = text_of(a_report())
    lead, _, misses = text.partition("\n\n- tiny shape, tpot, batch 1, ")
    assert lead.startswith(
        "# Speed\n\nWhat you gain with tiny shape: batch 1, after 2,000 tokens, a token takes 4.0 ms"
    )
    assert "\n\n3 of 4 targets are missed, in 12 s. A target is the ratio" in lead
    assert misses.startswith("when first full, over DynamicCache at the same length: 1.000x, target at most 0.85x\n- ")
    for row in (
        "| 1 | 97 | 1.000 [0.750, 1.250] ms | 2.000 [2.000, 2.250] ms | 3.000 GB + 1.000 GB | 200.00 ms |",
        "same length | 4.000 [3.500, 4.500] ms | DynamicCache: 4.000 ms | 1.000x | <= 0.85x, missed | 1.33x |  |",
        "full | 4.000 [4.000, 8.000] ms | ours: 4.000 [3.500, 4.500] ms | 1.000x | - | 1.33x |  |",  # not judged
        "| batch 1, ours, late | 8.000 ms | median: 4.000 [4.000, 8.000] ms | 2.000x | <= 3.00x, met | - | eviction + ",
        "| - | eviction + rebase; 5 steps with eviction, rebase; any step: 12.50x |",
        "| 5.000x | <= 3.00x, missed | - | nothing; 3 steps with no event; any step: 5.00x |",
    ):
        assert row in text
    assert "\n| --- | --- | ---: | --- | ---: | ---: | ---: | --- |\n" in text  # prose to the left
    assert text_of(Report.model_validate_json(a_report().model_dump_json())) == text


def test_targets_that_the_floor_misses_are_apart() -> None:
    """A bare attention of 9.5 ms puts the floor at 11.5 ms, 2.875x of 4 ms: no cache can reach 0.85x there."""
    bare = {"bare SDPA": [9.5, 9.5, 9.5]}
    changed = [
        one.model_copy(update={"samples": bare.get(one.configuration, one.samples)}) for one in a_report().measurements
    ]
    could, _, cannot = verdict(report(*changed)).partition(IMPOSSIBLE)
    assert could.startswith("3 of 4 targets are missed, in 12 s.")
    assert [line.partition(": ")[0] for line in could.splitlines() if line.startswith("- ")] == [
        "- tiny shape, longest, batch 1, ours, B = 0"
    ]
    assert cannot.count("\n- tiny shape, tpot, batch 1, ") == cannot.count("the lower bound itself is at 2.875x") == 2
    assert IMPOSSIBLE not in verdict(a_report())


def test_what_a_user_gains_by_hand() -> None:
    """A late token takes 3 ms, 0.75x of 4 ms when first full and 0.6x of 5 ms; a quick run gains nothing."""
    place = Place("prefill", "tiny shape")
    times = {"ours": 2.0, plan.SAME_CHUNKS: 5.0, plan.INEXACT: 1.0, plan.ALONE: 1.0}
    late = {"ours": [4.0], "ours, late": [3.0], "DynamicCache": [5.0]}
    changed = [
        one.model_copy(
            update={"samples": late.get(one.configuration, one.samples) if one.metric == "TPOT" else one.samples}
        )
        for one in a_report().measurements
    ]
    changed += [place.one(side, "time", "ms/token", [took]) for side, took in times.items()]
    sizes = {"limit": 64, "prompt_limit": 256, "chunk": 32, "block": 32}
    assert gain(report(*changed, plan=sizes)) == (
        "What you gain with tiny shape: batch 1, after 2,000 tokens, a token takes 3.0 ms, 0.75x of its time "
        "when the cache was first full, and 0.60x of that with a DynamicCache of the same length; 5,120 tokens in "
        "chunks of 32 are read 2.50x as fast as by the dense model."
    )
    assert gain(report(*changed, quick=True)) == gain(report()) == ""


def test_a_page_without_a_miss_says_so() -> None:
    """All targets are met; a quick run is never judged; an unfinished one says so, and what was skipped is named."""
    slow = {"DynamicCache": [40.0], "ours, B = 0": [1.0]}
    changed = [
        one.model_copy(update={"samples": slow.get(one.configuration, one.samples)}) for one in a_report().measurements
    ]
    assert verdict(report(*changed)) == "All 4 targets are met, in 12 s."
    quick = text_of(a_report(quick=True, finished=False, skipped=["a <b>: part"]))
    assert "not judged" in quick
    assert "missed" not in quick
    assert "Unfinished" in quick
    assert "- a \\<b\\>: part\n" in quick


def test_a_run_has_a_table_for_each_place(tmp_path: Path) -> None:
    """There are always gain, verdict and floors, and each part with rows; a page gets those that it has places for."""
    places_of = ["speed-gain", "speed-verdict", "speed-floors", "speed-tpot", "speed-longest"]
    assert list(sections(a_report())) == places_of
    file = docs_page(tmp_path)
    marked.fill(file, sections(a_report()))
    assert "3 of 4 targets are missed" in file.read_text(encoding="utf-8")
    assert "200.00 ms" not in file.read_text(encoding="utf-8")  # no place for the floors


def test_sides_are_measured_per_step_with_their_events() -> None:
    """A million steps per sample divide the times; the samples of an event are measured once more on their own."""
    happened = iter(["", "", "eviction", "", "eviction"])
    side = Side(lambda: None, event=lambda: next(happened))
    whole, event = TPOT.times("TPOT", {"ours": side}, 3, CPU)
    assert (event.metric, event.samples) == ("TPOT, eviction", [whole.samples[0], whole.samples[2]])
    (short,) = TPOT.times("TPOT", {"ours": Side(partial(torch.ones, 1))}, 1, CPU, turn=10**6)
    assert short.samples[0] < 1e-3


def test_bytes_of_a_step() -> None:
    """Keys and values of two layers, two heads of 8 or 16 channels; an untied embedding is not read."""
    for shape, channels, tied in (("tiny", 8, True), ("tiny-pythia", 16, False)):
        model: Any = random_model(shape, dtype=torch.float64)
        found = {one.metric: one.median for one in floors.bytes_read(TPOT, model, 10, 3)}
        assert found["keys and values"] == 2 * 3 * 2 * 2 * channels * 10 * 8
        unread = 0 if tied else model.get_input_embeddings().weight.nbytes
        assert found["weights"] == sum(one.nbytes for one in model.parameters()) - unread


def test_decoders_keep_their_lengths() -> None:
    """A stock cache is back at its length before each sample; a streaming cache evicts at every step."""
    model = random_model("tiny")
    stock = decode.Decoder(plan.DENSE, model, 1, 20)
    side = stock.side("TPOT", turn=3)
    for _ in range(2):
        side.ready()
        assert stock.steps.cache.get_seq_length() == 20
        side.run()
    assert stock.steps.cache.get_seq_length() == 23
    side = decode.Decoder(plan.lazy(8, 0), model, 1, 20).side("TPOT")
    for _ in range(3):
        side.run()
        assert side.event is not None
        assert "eviction" in side.event()


def test_a_rebase_is_a_few_steps_away() -> None:
    """After `approach_rebase` exactly one of the next steps rebases: the one after `BEFORE_REBASE` steps."""
    ours = decode.Decoder(plan.lazy(8, 0), random_model("tiny-pythia"), 1, 600)
    ours.approach_rebase()
    side, events = ours.side("attention"), []
    for _ in range(decode.BEFORE_REBASE + 3):
        side.run()
        assert side.event is not None
        events.append(side.event())
    assert [number for number, one in enumerate(events) if "rebase" in one] == [decode.BEFORE_REBASE]


def test_events_are_distinguished() -> None:
    """The events are nothing, an eviction, rebased positions, and a window that moved."""
    before = DebugState(evictions=3, end=100, size=0, offsets=(7,), bound=0, recording=False)
    assert decode.happened(before, replace(before, end=101)) == ""
    assert decode.happened(before, replace(before, end=101, evictions=4)) == "eviction"
    after = replace(before, end=80, evictions=4, offsets=(9,))
    assert decode.happened(before, after) == "eviction + rebase + compaction"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """Run `speed-report --quick` on one tiny model with few samples; return the report and its folder."""
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "QUICK", FEW)
        assert exit_status("speed-report", "--quick", "--threads", 1, "--out", folder, "--docs", docs_page(folder)) == 0
    return Report.model_validate_json((folder / "speed.json").read_text(encoding="utf-8")), folder


def test_a_run_measures_every_part(measured: tuple[Report, Path]) -> None:
    """Each part has its rows and its targets by batch size; both files and the place in the docs are written."""
    found, folder = measured
    assert (found.finished, found.skipped, found.models[0].name) == (True, [], "tiny shape")
    assert page(found).markdown == (folder / "speed.md").read_text(encoding="utf-8")
    assert "not judged" in (folder / "docs.md").read_text(encoding="utf-8")
    targets: dict[str, list[float | None]] = {part: [] for part in PARTS}
    for one in comparisons(found):
        targets[one.place.part].append(one.target)
        assert (one.floor is None) == (one.place.part in {"longest", "memory", "tricks"}), one
    assert targets.pop("tricks") == [None] * 7
    assert targets == {
        "attention": [1.15, 1.15, None] * 2,
        "tpot": [0.85, 0.85, None, 1.02, 0.7, 0.7, None, None],
        "compiled": [1.0, 0.85, 1.0, 0.7],
        "longest": [3.0] * 4,
        "prefill": [0.7, None],
        "memory": [1.1],
        "perplexity": [15.0, 0.7],
    }
    sizes = places(found.measurements)[TPOT]["short"]
    assert sizes["context"].median == 64 + 1 + 32
    rates = [one.median for one in found.measurements if one.metric == "rate"]
    floor = next(one.floor for one in comparisons(found) if one.place == replace(TPOT, part="compiled"))
    assert floor == pytest.approx((sizes["weights"].median + sizes["keys and values"].median) / max(rates) / 1e6)


def test_tricks_with_grouped_heads_are_measured_only_if_there_are_any() -> None:
    """Each trick has two sides; the model of the Pythia kind has no grouped heads."""
    found = tricks.tricks(random_model("tiny-pythia"), "tiny", FEW)
    assert len({one.metric for one in found}) == 6
    assert len({one.configuration for one in found}) == len(found) == 12


def test_a_plan_has_sizes_and_targets_for_all_its_batches() -> None:
    """They exist for every batch size, so that a run does not fail in the middle."""
    for sizes in (plan.FULL, plan.QUICK):
        assert set(sizes.samples) == set(sizes.late) <= set(plan.TPOT)


def test_stock_caches_are_cut_before_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before chunks of 16, 16 and 8 one stock cache has all earlier tokens, one has 8 tokens, and one has none."""
    found, feed = [], DenseSession._feed

    def watched(session: DenseSession, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        found.append(session.kept_tokens)
        return feed(session, ids, last_only=last_only)

    monkeypatch.setattr(DenseSession, "_feed", watched)
    sizes = replace(FEW, prompt_limit=8, chunk=16)
    times = texts.read_chunks(random_model("tiny"), torch.zeros((1, 40), dtype=torch.long), sizes)
    assert [len(one) for one in times.values()] == [3, 3, 3, 3]
    assert found == [0, 0, 0, 16, 8, 0, 32, 8, 0]


def test_floors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The command measures a step's lower bounds for a shape, and three bandwidths."""
    assert exit_status("floors", "--shape", "tiny", "--context", 20, "--batch", 2, "--megabytes", 0.5) == 0
    text = capsys.readouterr().out
    assert all(
        row in text for row in ("\n| tiny shape | 2 | 20 | ", "\n| copy | ", "\n| sum | ", "\n| matrix times vector | ")
    )
    assert "nan" not in text


def test_a_missed_target_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is judged names each missed target in a line of its own."""
    monkeypatch.setattr(collect, "speed", lambda **_: a_report())
    assert exit_status("speed-report", "--out", tmp_path) == 1
    assert capsys.readouterr().err.count("missed: tiny shape, ") == 3
