"""The command line end to end on a tiny model, and every user error."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import TYPE_CHECKING

import pytest

from lab_tiny import TINY, random_text, run, save_tiny, succeeded
from sinkwindow_lab import records
from sinkwindow_lab.errors import LabError, require
from sinkwindow_lab.measure.generation import PROMPTS
from sinkwindow_lab.measure.mechanics import log
from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.reports.tables import plan
from sinkwindow_lab.reports.tables.page import page

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and some texts."""
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    (path / "long.txt").write_text(random_text(300), encoding="utf-8")
    (path / "other.txt").write_text(random_text(290), encoding="utf-8")
    (path / "one.txt").write_text("w1", encoding="utf-8")
    (path / "empty.txt").write_text(" \n", encoding="utf-8")
    (path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return path


def test_tables_writes_all_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of configuration can be measured, with two files as corpora; the page is rendered from the JSON."""
    monkeypatch.setattr(plan, "QUICK", TINY)
    names = "baseline,streaming_2_6_3,window_0_8,recompute_8,stale_ranks_2_6_3,eager_eviction_2_6_3"
    texts = ("--corpus", folder / "long.txt", "--corpus", folder / "other.txt")
    options = ("--configs", names, "--only", "experiments", "--quick", "--bos", "add", "--out", tmp_path / "new" / "r")
    out, _ = succeeded(capsys, "tables", "--model", folder, *texts, *options)
    assert [line.split("/")[-1] for line in out.splitlines()] == ["paper_tables.json", "paper_tables.md", "report.html"]
    report = read_report(tmp_path / "new/r/paper_tables.json")
    assert (tmp_path / "new/r/paper_tables.md").read_text(encoding="utf-8") == page(report).markdown
    assert "added in front of each text" in page(report).markdown
    assert [one.name for one in report.configurations] == names.split(",")
    first = [one for one in report.measurements if one.part == "experiment 1"]
    assert {one.samples[0] for one in first if one.metric == "targets"} == {39}
    assert {one.configuration for one in first if one.metric == "TPOT"} == {
        "baseline",
        "streaming_2_6_3",
        "recompute_8",
    }
    assert {one.configuration for one in first if one.metric == "PPL"} == {*names.split(",")} - {"recompute_8"}


def test_perplexity_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is JSON and nothing else; it has the result, the text and the model."""
    options = ("--tokens", 60, "--sinks", 2, "--window", 6, "--buffer", 3, "--json")
    out, _ = succeeded(capsys, "perplexity", "--model", folder, "--corpus", folder / "long.txt", *options)
    found = json.loads(out)
    assert (found["result"]["configuration"], found["result"]["targets"]) == ("streaming_2_6_3", 59)
    assert found["result"]["PPL"] == pytest.approx(math.exp(found["result"]["NLL"]))
    text = records.TextRecord.model_validate(found["text"])
    assert (text.tokens, text.targets, text.bos, text.documents) == (60, 59, "none", "concat")
    assert records.CorpusRecord.model_validate(found["corpus"]).name == "long"
    assert records.ModelRecord.model_validate(found["model"]).source == "folder"


def test_perplexity_by_name_and_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration may be given by name; a text shorter than requested is read to its end, with a message."""
    options = ("--config", "baseline", "--tokens", 5000, "--bos", "add")
    out, err = succeeded(capsys, "perplexity", "--model", folder, "--corpus", folder / "long.txt", *options)
    assert out.startswith("PPL ")
    assert "300 targets" in out
    assert "301 tokens of corpus 'long' were read, 5000 were requested" in err


def test_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has one line per configuration, or is their measurements as JSON, the samples of all rounds."""
    common = ("speed", "--model", folder, "--corpus", folder / "long.txt", "--prompt", 9, "--tokens", 3)
    lines = succeeded(capsys, *common)[0].splitlines()
    assert [line.partition(":")[0] for line in lines] == ["baseline", "streaming_8_256"]
    assert re.search(r"TTFT [\d.]+ \[[\d.]+,\s[\d.]+\] s  TPOT [\d.]+ \[.*\] ms  total .* s  .* tok/s  .* GB", lines[0])
    found = json.loads(succeeded(capsys, *common, "--configs", "baseline", "--rounds", 2, "--json")[0])
    measurements = [records.Measurement.model_validate(one) for one in found["result"]]
    counts = {one.metric: len(one.samples) for one in measurements}
    assert (counts["TPOT"], counts["TTFT"], counts["total"]) == (2 * 2, 2 * PROMPTS, 2)


def test_mechanics_shows_each_eviction(capsys: pytest.CaptureFixture[str]) -> None:
    """Each eviction is 329 -> 264, as in the log of the original reproduction, with the shape before and after."""
    out, _ = succeeded(capsys, "mechanics", "--evictions", 2)
    assert out.count("329 -> 264") == 2
    assert "[1, 2, 328, 8]" in out
    assert "tokens 8..72 gone" in out


@pytest.mark.parametrize(
    ("numbers", "message"), [((2, 4, 1, 0), "evictions=0"), ((2, 0, 1, 1), "window"), ((-1, 4, 1, 1), "num_sinks")]
)
def test_mechanics_refuses_bad_numbers(numbers: tuple[int, int, int, int], message: str) -> None:
    """The cache's own message becomes a user error."""
    with pytest.raises(LabError, match=message):
        list(log(*numbers[:3], evictions=numbers[3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("perplexity", "--corpus", "nowhere.txt"), "neither a file nor a known name"),
        (("perplexity", "--corpus", "{folder}/empty.txt"), "is empty"),
        (("perplexity", "--corpus", "{folder}/binary.txt"), "not UTF-8"),
        (("perplexity", "--corpus", "{folder}/one.txt", "--model", "{folder}"), "at least 2"),
        (("perplexity", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--tokens", "1"), "2 or more"),
        (
            ("perplexity", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--window", "9", "--block", "0"),
            "block=0",
        ),
        (("perplexity", "--window", "0"), "window=0"),
        (("perplexity", "--config", "dense"), "unknown configuration"),
        (("perplexity", "--config", "baseline", "--sinks", "4"), "--config baseline and --sinks"),
        (("perplexity", "--method", "token", "--block", "32"), "--block and --method token"),
        (("perplexity", "--corpus", "{folder}/long.txt", "--device", "abacus"), "--device cpu always is"),
        (("perplexity", "--corpus", "{folder}/long.txt", "--model", "{folder}/long.txt"), "embedded"),
        (("tables", "--corpus", "{folder}/long.txt", "--corpus", "{folder}/long.txt"), "given twice"),
        (("tables", "--out", "{folder}/long.txt"), "choose another folder"),
        (("speed", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--tokens", "1"), "generate 2 or more"),
        (("speed", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--rounds", "0"), "rounds=0"),
        (("speed", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--prompt", "1"), "--prompt 1"),
    ],
)
def test_user_errors_are_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 2, standard error has one line that names the fix, and standard output is empty."""
    extra = ("--out", str(tmp_path)) if arguments[0] == "tables" and "--out" not in arguments else ()
    status, out, err = run(capsys, *(one.format(folder=folder) for one in (*arguments, *extra)))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--bos", "--documents", "--method"])
def test_choices_are_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option with choices lists them in its error and in the help."""
    status, _, err = run(capsys, "perplexity", option, "maybe")
    assert status == 2
    shown = {"--bos": ("none", "add"), "--documents": ("concat", "apart"), "--method": ("token", "blocks", "both")}
    assert all(word in err for word in shown[option])


# -- extras --------------------------------------------------------------------------------------------------------


def test_a_missing_module_names_the_extra() -> None:
    """The error says what to install."""
    with pytest.raises(LabError, match=r"sinkwindow\[lab\]"):
        require("no_such_module_anywhere")


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without typer the command line fails, but without a traceback."""
    monkeypatch.delitem(sys.modules, "sinkwindow_lab.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    status, _, err = run(capsys, "mechanics")
    assert status == 2
    assert "pip install 'sinkwindow[lab]'" in err
