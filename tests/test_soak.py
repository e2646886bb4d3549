"""`nox -s soak` in small: a cache that is right is flat, and everything that grows is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmarks import soak, streams

from sinkwindow import StreamingCache
from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

RULE = (2, 6, 1)
PLAN = streams.Plan(400, RULE, checkpoints=2, early=100, timed=4, compiled=False)
FLAT = streams.Drift(error=2e-6, plain=1e-6, step=1e-7)
POINT = streams.Checkpoint(100, 50, 64, 7, 640, 2**30, 1.0, FLAT)
FOUND = streams.Found("a stream", [POINT, replace(POINT, tokens=200)], [1.0, 1.0, 5.0], [1.01, 1.02, 1.02])
TENSORS, RESIDENT, TPOT, ERRORS = range(4)  # in the order of `judge`


@pytest.fixture(scope="module")
def subject() -> streams.Subject:
    """Return the tiny model."""
    return soak.tiny()


def failing(found: streams.Found) -> list[int]:
    """Return which checks do not hold, apart from the two that depend on the machine."""
    return [number for number, one in enumerate(soak.judge(found)) if not one.holds and number in {TENSORS, ERRORS}]


@pytest.mark.parametrize("kind", soak.KINDS)
def test_the_cache_is_flat(subject: streams.Subject, kind: str) -> None:
    """Not one tensor more, and errors are those of a fresh run; every checkpoint is where it was planned."""
    found = streams.soak(subject, PLAN, kind, Reporter())
    assert failing(found) == []
    assert [(one.tokens, one.evictions) for one in found.checkpoints] == [(200, 96), (400, 196)]
    assert 0 < found.checkpoints[1].drift.plain < 1e-4
    assert (len(found.early_ms), len(found.late_ms)) == (4, 4)


def test_a_leak_is_found(subject: streams.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds on to one tensor per token has more of them at the second checkpoint."""
    kept: list[Tensor] = []
    right = StreamingCache.update

    def leaking(self: StreamingCache, key: Tensor, value: Tensor, layer: int, **more: Any) -> tuple[Tensor, Tensor]:
        kept.append(key)
        return right(self, key, value, layer, **more)

    monkeypatch.setattr(StreamingCache, "update", leaking)
    assert failing(streams.soak(subject, PLAN, "dynamic", Reporter())) == [TENSORS]


def test_what_other_code_left_is_no_error(subject: streams.Subject) -> None:
    """A tensor that left `vmap`, as one in the traceback of another test, has no storage and no size."""
    kept: list[Tensor] = []

    def escape(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    torch.vmap(escape)(torch.ones(2))
    assert streams.extent(kept[0])[1] == 0
    assert failing(streams.soak(subject, PLAN, "dynamic", Reporter())) == []


def test_a_drift_is_found(subject: streams.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that grows with the number of tokens, and is small at the first, is found."""
    right = StreamingCache.update

    def drifting(self: StreamingCache, key: Tensor, value: Tensor, layer: int, **more: Any) -> tuple[Tensor, Tensor]:
        return right(self, key * (1 + 1e-10 * self.seen_tokens[0] ** 2), value, layer, **more)

    monkeypatch.setattr(StreamingCache, "update", drifting)
    assert failing(streams.soak(subject, PLAN, "dynamic", Reporter())) == [ERRORS]


@pytest.mark.parametrize("kind", soak.KINDS)
@pytest.mark.parametrize(("target", "real"), [(3_000, True), (2**24, False), (2**31, False)])
def test_far_positions_are_exact(subject: streams.Subject, kind: str, target: int, real: bool) -> None:  # noqa: FBT001
    """Past a position the logits are those of a fresh run, streamed there or set."""
    found = streams.far(subject, RULE, kind, target, real=real)
    assert soak.judge_far("far", found).holds, found


def test_inexact_angles_are_found_far_away(subject: streams.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks rotated by float32 angles are right near the start and wrong far away."""

    def narrow(self: Rotary, distance: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.as_tensor(distance, device=device)[..., None].float() * self.inv_freq.float()
        return angles.cos().to(dtype), angles.sin().to(dtype)

    monkeypatch.setattr(Rotary, "cos_sin", narrow)
    assert not soak.judge_far("far", streams.far(subject, RULE, "static", 2**24, real=False)).holds


# -- verdict and report -----------------------------------------------------------------------------------------------


def test_each_check_judges_its_numbers() -> None:
    """Every number at its bound holds, and one beyond it does not."""
    assert all(one.holds for one in soak.judge(FOUND))
    first, last = FOUND.checkpoints
    changes: dict[int, list[streams.Checkpoint]] = {
        TENSORS: [replace(last, nbytes=65), replace(last, tensors=8), replace(last, tensor_bytes=641)],
        RESIDENT: [replace(last, resident=first.resident + soak.RESIDENT + 1)],
        ERRORS: [replace(last, drift=replace(FLAT, error=error)) for error in (2.2e-6, float("nan"))],
    }
    for number, points in changes.items():
        for point in points:
            checks = soak.judge(replace(FOUND, checkpoints=[first, point]))
            assert [index for index, one in enumerate(checks) if not one.holds] == [number]
    slow = soak.judge(replace(FOUND, late_ms=[1.03, 1.03, 1.0]))
    assert [index for index, one in enumerate(slow) if not one.holds] == [TPOT]


def test_the_program_reports_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run writes its page; what is not flat is named on standard error, and the exit status is 1."""
    quick = soak.Program(streams=((soak.tiny, PLAN),), far=((2**24, False),))
    monkeypatch.setattr(soak, "QUICK", quick)
    monkeypatch.setattr(soak, "SLOWER", 100.0)  # not a timing test
    page = tmp_path / "new" / "soak.md"
    assert soak.main(["--quick", "--out", str(page)]) == 0, capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert text.count(": holds.") == 2 * 4 + 2
    assert "| 400 | 196 |" in text
    assert "10 of 10 checks hold" in capsys.readouterr().out
    monkeypatch.setattr(soak, "RESIDENT", -(2**40))
    assert soak.main(["--quick", "--out", str(page)]) == 1
    captured = capsys.readouterr()
    wrong = [line for line in captured.err.splitlines() if line.startswith("not flat: ")]
    assert len(wrong) == 2
    assert all("resident set grows" in line for line in wrong)
    assert page.read_text(encoding="utf-8").count("DOES NOT HOLD") == 2


def test_a_stream_that_has_ended_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run takes it as it was found, and streams only what is missing."""
    program, streamed = soak.Program(streams=((soak.tiny, PLAN),), far=()), list[str]()

    def found(_subject: object, _plan: object, kind: str, _progress: object) -> streams.Found:
        streamed.append(kind)
        return replace(FOUND, title=kind)

    monkeypatch.setattr(soak, "soak", found)
    assert [one.title for one, _ in soak.streamed(program, Store(tmp_path), Reporter(), "tiny-static")] == ["static"]
    for again in (["static", "dynamic"], ["static", "dynamic"]):  # the second run streams nothing
        kept = soak.streamed(program, Store(tmp_path), Reporter())
        assert [one for one, _ in kept] == [replace(FOUND, title=kind) for kind in soak.KINDS]
        assert streamed == again


def test_other_code_or_another_model_is_streamed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is judged by what code or weights that are there no more have left."""
    program, streamed = soak.Program(streams=((soak.tiny, PLAN),), far=()), list[str]()

    def stream(*arguments: Any) -> Any:
        streamed.append(arguments[2])
        return FOUND

    monkeypatch.setattr(soak, "soak", stream)
    soak.streamed(program, Store(tmp_path), Reporter())
    assert len(streamed) == 2
    monkeypatch.setattr(soak, "code_version", lambda *_: "other code")
    soak.streamed(program, Store(tmp_path), Reporter())
    assert len(streamed) == 4

    def tiny() -> streams.Subject:
        other = right()
        with torch.no_grad():
            other.model.lm_head.weight[0, 0] += 1.0
        return other

    right = soak.tiny
    soak.streamed(replace(program, streams=((tiny, PLAN),)), Store(tmp_path), Reporter())
    assert len(streamed) == 6
    soak.streamed(program, Store(tmp_path), Reporter())
    assert len(streamed) == 6


def test_one_stream_that_is_not_flat_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--only` has the exit status of the whole program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soak, "QUICK", soak.Program(streams=((soak.tiny, PLAN),), far=()))
    for late, status in ((1.0, 0), (2.0, 1)):
        monkeypatch.setattr(soak, "soak", lambda *_, late=late: replace(FOUND, late_ms=[late]))
        assert soak.main(["--quick", "--only", "tiny-static"]) == status


def test_full_and_quick_ask_the_same() -> None:
    """Both stream the same models and go past the same positions; the quick program streams less."""
    assert [make for make, _ in soak.QUICK.streams] == [make for make, _ in soak.FULL.streams]
    assert [plan.tokens for _, plan in soak.FULL.streams] == [1_000_000, 100_000]
    assert (2**24, True) in soak.FULL.far
    assert soak.FULL.far[1:] == soak.QUICK.far[1:]
