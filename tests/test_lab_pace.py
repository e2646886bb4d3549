"""Comparisons of speed: ratios and bars by hand, interleaved samples with a fake clock, floors in plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lab_tiny import machine_record, tiny_model
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.timing import HostClock
from sinkwindow_lab.render import marked
from sinkwindow_lab.reports.pace import collect, decode, floors, plans, speed_page, texts, tricks
from sinkwindow_lab.reports.pace.records import BandwidthRecord, Comparison, FloorRecord, Series, SpeedReport
from sinkwindow_lab.reports.pace.sampling import Side, in_turns
from sinkwindow_lab.ways.configurations import parse, streaming
from sinkwindow_lab.ways.sessions import DenseSession

if TYPE_CHECKING:
    from pathlib import Path

    from sinkwindow_lab.reports.pace.records import Ratio

CPU = torch.device("cpu")


def series(*values: float, **events: str) -> Series:
    """Return samples; `s1="eviction"` is an event of sample 1."""
    named = {int(key[1:]): what for key, what in events.items()}
    return Series(name="side", unit="ms", values=list(values), events=named)


def comparison(kind: Ratio, ours: Series, other: Series, bar: float | None = None) -> Comparison:
    """Return a comparison with a floor of 2 ms."""
    return Comparison(
        part="tpot", model="tiny", what="a step", ratio_kind=kind, ours=ours, other=other, bar=bar, floor=series(2.0)
    )


def report(*rows: Comparison, quick: bool = False) -> SpeedReport:
    """Return a report with these rows."""
    bandwidth = BandwidthRecord(device="cpu", megabytes=100.0, rates={"copy": [9.0, 10.0, 11.0], "sum": [20.0]})
    floor = FloorRecord(
        model="tiny",
        batch=1,
        context=10,
        weight_bytes=3_000_000_000,
        cache_bytes=1_000_000_000,
        bare=series(1.0),
        short=series(5.0),
    )
    return SpeedReport(
        quick=quick,
        machine=machine_record(),
        models=[],
        bandwidth=bandwidth,
        floors=[floor],
        comparisons=list(rows),
        seconds=12.0,
    )


# -- ratios and bars --------------------------------------------------------------------------------------------------


def test_cost_is_ours_over_the_other() -> None:
    """Medians of 3 and 4 ms have the ratio 0.75, which meets a bar of 0.75, not 0.74; 3 ms is 1.5 times the floor."""
    row = comparison("cost", series(1.0, 3.0, 90.0), series(4.0), 0.75)
    assert (row.ratio, row.met, row.over_floor) == (0.75, True, 1.5)
    assert not row.model_copy(update={"bar": 0.74}).met


def test_speed_is_the_other_time_over_ours() -> None:
    """Ours takes 10 ms a token and the other 8: 0.8 times its tokens per second, which a bar of 0.7 allows."""
    row = comparison("speed", series(10.0), series(8.0), 0.7)
    assert (row.ratio, row.met) == (0.8, True)
    assert not row.model_copy(update={"bar": 0.81}).met


def test_the_longest_step_counts_where_the_cache_did_something() -> None:
    """A step of 50 ms without an event is noise of the machine; the eviction's 8 ms count, over a median of 4 ms."""
    steps = series(4.0, 4.0, 50.0, 8.0, 4.0, s1="eviction", s3="eviction + rebase")
    row = comparison("longest", steps, steps, 3.0)
    assert (row.ratio, row.met) == (2.0, True)
    assert steps.longest == 2
    assert steps.events[steps.longest_event] == "eviction + rebase"


def test_without_events_every_step_counts() -> None:
    """Without named events the longest step is the longest of all."""
    assert series(1.0, 5.0, 2.0).longest_event == 1


def test_a_nan_meets_no_bar() -> None:
    """A side whose time is NaN does not pass."""
    assert not comparison("cost", series(float("nan")), series(1.0), 2.0).met
    assert not comparison("speed", series(float("nan")), series(1.0), 2.0).met


def test_the_page_names_each_missed_bar_with_its_number() -> None:
    """The verdict and the row show number and bar; a row without a bar is never missed."""
    rows = [comparison("cost", series(3.0), series(2.0), 1.15), comparison("cost", series(9.0), series(1.0))]
    found = report(*rows)
    assert found.missed == rows[:1]
    page = speed_page.render(found)
    assert "1 of 1 targets are missed" in page
    assert "in 12 s:\n\n- tiny, tpot, a step: 1.500x, target at most 1.15x\n" in page
    assert "| 1.500x | <= 1.15x, missed | 1.50x |" in page
    assert "3.000 GB + 1.000 GB | 200.00 ms" in page  # 4 GB at the better way's 20 GB/s


def test_a_bar_below_the_floor_is_reported_as_such() -> None:
    """The floor of 2 ms is 0.8 of the other's 2.5 ms: no cache can reach 0.7, but one could reach 0.8."""
    row = comparison("cost", series(2.25), series(2.5), 0.7)
    assert (row.ratio, row.free) == (0.9, 0.8)
    assert "target at most 0.70x; the lower bound itself is at 0.800x here" in speed_page.complaint(row)
    assert "the lower bound" not in speed_page.complaint(row.model_copy(update={"bar": 0.8}))
    speed = comparison("speed", series(4.0), series(3.0), 1.6)  # at most 3 over 2
    assert "target at least 1.60x; the lower bound itself is at 1.500x here" in speed_page.complaint(speed)
    assert "the lower bound" not in speed_page.complaint(speed.model_copy(update={"bar": 1.5}))


def test_a_page_without_a_miss_says_so() -> None:
    """A page says that all targets are met; a quick run is never judged."""
    good = comparison("cost", series(1.0), series(2.0), 1.0)
    assert "All 1 targets are met" in speed_page.render(report(good))
    bad = comparison("cost", series(3.0), series(2.0), 1.0)
    assert "not judged" in speed_page.render(report(bad, quick=True))
    assert "missed" not in speed_page.render(report(bad, quick=True))


def test_a_report_is_unchanged_by_its_json() -> None:
    """A page rendered from the JSON file is the page that was rendered first."""
    found = report(comparison("longest", series(1.0, 2.0, s1="rebase"), series(1.0), 3.0))
    again = SpeedReport.model_validate_json(found.model_dump_json())
    assert speed_page.render(again) == speed_page.render(found)


# -- interleaved samples ----------------------------------------------------------------------------------------------


def test_sides_are_interleaved_and_warm_up_does_not_count() -> None:
    """The order is a, b, a, b; preparation is not timed; only events of counted samples are kept."""
    now, order = [0.0], []

    def run(name: str, took: float) -> None:
        order.append(name)
        now[0] += took

    def ready() -> None:
        now[0] += 100.0

    sides = {
        "a": Side(lambda: run("a", 1.0), ready=ready),
        "b": Side(lambda: run("b", 2.0), event=lambda: "eviction" if len(order) == 6 else ""),
    }
    found = in_turns(sides, 2, CPU, warm_up=1, clock=HostClock(now=lambda: now[0]))
    assert order == ["a", "b"] * 3
    assert [one.values for one in found.values()] == [[1000.0, 1000.0], [2000.0, 2000.0]]
    assert [one.events for one in found.values()] == [{}, {1: "eviction"}]


def test_no_samples_are_refused() -> None:
    """No samples have no median."""
    with pytest.raises(ValueError, match="samples=0 must be 1 or more"):
        in_turns({"a": Side(lambda: None)}, 0, CPU)


# -- floors -----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_step() -> None:
    """Keys and values of two layers, two heads of 4 channels in float64; a tied embedding is read as well."""
    model = tiny_model()
    assert floors.kept_bytes(model, 10, 3) == 2 * 3 * 2 * 2 * 4 * 10 * 8
    total = sum(one.numel() * one.element_size() for one in model.parameters())
    embedding: Any = model.get_input_embeddings()
    assert floors.read_weight_bytes(model) == total - embedding.weight.numel() * 8  # not tied: one row is read
    tied = random_model("tiny")
    assert floors.read_weight_bytes(tied) == sum(one.numel() * 4 for one in tied.parameters())


def test_bandwidth_has_every_way() -> None:
    """Bandwidth is measured in three ways, each with its samples, all above zero."""
    found = floors.bandwidth(CPU, megabytes=0.5, samples=3)
    assert sorted(found.rates) == ["copy", "matrix times vector", "sum"]
    assert all(len(one) == 3 and min(one) > 0 for one in found.rates.values())
    assert found.best == max(sorted(one)[1] for one in found.rates.values())


def test_floors_of_a_model() -> None:
    """Both sides have their samples; the length is the requested one."""
    found = floors.floors(tiny_model(torch.float32), "tiny", 20, 2, samples=2)
    assert (found.context, found.batch, len(found.bare.values), len(found.short.values)) == (20, 2, 2, 2)


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_decoders_keep_their_lengths() -> None:
    """A stock cache stays at its length, also if reset in between; a streaming cache evicts at every step."""
    model = random_model("tiny")
    stock = decode.Decoder(parse("baseline"), model, 1, 20)
    side = stock.token_side()
    for _ in range(3):
        side.ready()
        assert stock.steps.cache.get_seq_length() == 20
        side.run()
    ours = decode.Decoder(streaming(2, 6, 0), model, 1, 20)
    side = ours.token_side()
    events = []
    for _ in range(3):
        side.ready()
        side.run()
        assert side.event is not None
        events.append(side.event())
    assert all("eviction" in one for one in events)
    ours.close()
    stock.close()


def test_a_rebase_is_a_few_steps_away() -> None:
    """After `approach_rebase` exactly one of the next steps rebases: the one after `BEFORE_REBASE` steps."""
    ours = decode.Decoder(streaming(2, 6, 0), random_model("tiny-pythia"), 1, 600)
    ours.approach_rebase()
    side = ours.attention_side()
    events = []
    for _ in range(decode.BEFORE_REBASE + 3):
        side.run()
        assert side.event is not None
        events.append(side.event())
    ours.close()
    assert [number for number, one in enumerate(events) if "rebase" in one] == [decode.BEFORE_REBASE]


def test_events_are_distinguished() -> None:
    """The events are nothing, an eviction, rebased positions, and a window that moved."""
    before = decode.Happened(3, 100, 7)
    assert before.between(decode.Happened(3, 101, 7)) == ""
    assert before.between(decode.Happened(4, 101, 7)) == "eviction"
    assert before.between(decode.Happened(4, 80, 9)) == "eviction + rebase + compaction"


@pytest.mark.parametrize("batch", [1, 8])
def test_a_model_s_decoding_has_every_bar(batch: int) -> None:
    """Attention for both buffers, TPOT early and late, and the longest step have the bars of the issue, if any."""
    model = random_model("tiny")
    plan = plans.Plan(**{**vars(plans.QUICK), "samples": {1: 3, 8: 3}, "late": {1: plans.LATE, 8: 64}})
    plan = plan if batch == 8 else plans.Plan(**{**vars(plan), "late": {1: 200, 8: 64}})
    attention = decode.attention(model, "tiny", batch, plan)
    assert [one.bar for one in attention] == [1.15, 1.15, None]
    rows, floor = decode.tokens(model, "tiny", batch, plan)
    bar = plans.TPOT_BARS[batch]
    assert [one.bar for one in rows] == [bar, bar, None, None, 3.0, 3.0]
    assert (floor.batch, floor.context) == (batch, 64 + 1 + 32)
    assert all(one.over_floor is not None for one in rows[:4])


@pytest.mark.parametrize("plan", [plans.FULL, plans.QUICK], ids=["full", "quick"])
def test_a_plan_has_samples_and_bars_for_all_its_batches(plan: plans.Plan) -> None:
    """They exist for every batch size that is decoded or compiled, so that a run does not fail in the middle."""
    assert {*plan.batches, *plan.compiled} <= set(plan.samples) & set(plan.late) & set(plans.TPOT_BARS)


def test_a_run_measures_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run with one tiny model has rows in each part, and nothing is judged."""
    few = {**vars(plans.QUICK), "shapes": ("tiny",), "samples": {1: 2, 8: 2}, "tricks": 1}
    monkeypatch.setattr(collect, "QUICK", plans.Plan(**few))
    found = collect.collect(quick=True, threads=1, say=lambda _: None)
    assert {one.part for one in found.comparisons} == set(speed_page.PARTS)
    assert "not judged" in speed_page.render(found)


def test_long_inputs_have_every_bar() -> None:
    """Prefill, memory and scoring have their bars; both sides read the same number of tokens."""
    model, plan = random_model("tiny"), plans.QUICK
    prompts = texts.prefill(model, "tiny", plan)
    assert [one.bar for one in prompts] == [0.7, None]
    assert [one.bar for one in texts.memory(model, "tiny", plan)] == [1.1]
    rows = texts.scoring(model, "tiny", plan)
    assert [one.bar for one in rows] == [15.0, 0.7]
    assert {len(one.other.values) for one in rows} == {plan.scored}
    assert all(one.over_floor is not None for one in (*prompts, *rows))


def test_stock_caches_are_cut_before_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before chunks of 16, 16 and 8 one stock cache has all earlier tokens, one has 8 tokens, and one has none."""
    found = []
    feed = DenseSession._feed

    def watched(session: DenseSession, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        found.append(session.kept_tokens)
        return feed(session, ids, last_only=last_only)

    monkeypatch.setattr(DenseSession, "_feed", watched)
    times = texts.read_chunks(random_model("tiny"), streaming(2, 6, 3), torch.zeros((1, 40), dtype=torch.long), 16, 8)
    assert {side: len(one) for side, one in times.items()} == {"ours": 3, "dense": 3, "held": 3, "alone": 3}
    assert found == [0, 0, 0, 16, 8, 0, 32, 8, 0]


def test_compiled_steps_are_compared_with_reading_everything_once() -> None:
    """The floor is the time to read weights and kept bytes at 2 GB/s, whatever an eager step takes."""
    model, plan = random_model("tiny"), plans.Plan(**{**vars(plans.QUICK), "samples": {1: 3, 8: 3}})
    bandwidth = BandwidthRecord(device="cpu", megabytes=1.0, rates={"copy": [2.0]})
    rows = decode.compiled(model, "tiny", 1, plan, bandwidth)
    assert [one.bar for one in rows] == [1.0, 0.85]
    read = floors.read_weight_bytes(model) + floors.kept_bytes(model, 64 + 1 + 32, 1)
    assert all(one.floor is not None and one.floor.median == pytest.approx(read / 2e6) for one in rows)


def test_tricks_are_pairs() -> None:
    """Each design choice has two sides; grouped heads are measured only if the model has them."""
    with_groups = tricks.tricks(random_model("tiny"), "tiny", plans.QUICK)
    without = tricks.tricks(random_model("tiny-pythia"), "tiny", plans.QUICK)
    assert len(with_groups) == len(without) + 1
    assert all(one.ours.name != one.other.name and one.bar is None for one in with_groups)


# -- the page in the docs ---------------------------------------------------------------------------------------------


def test_a_run_has_a_table_for_each_place(tmp_path: Path) -> None:
    """There are always verdict and floors, and each part with rows; a page gets those that it has places for."""
    row = comparison("cost", series(3.0), series(2.0), 1.15)
    found = speed_page.sections(report(row))
    assert list(found) == ["speed-verdict", "speed-floors", "speed-tpot"]
    page = tmp_path / "speed.md"
    page.write_text("\n".join(marked.marks(speed_page.VERDICT)), encoding="utf-8")
    marked.fill(page, found)
    assert "1 of 1 targets are missed" in page.read_text(encoding="utf-8")
    assert "1.500x |" not in page.read_text(encoding="utf-8")  # no place for the row
