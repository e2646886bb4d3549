"""The command line end to end on a tiny model, the registry of configurations, and every user error."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from lab_tiny import random_text, save_tiny, tiny_model
from sinkwindow_lab import records
from sinkwindow_lab.cli import main
from sinkwindow_lab.errors import LabError, require
from sinkwindow_lab.inputs import corpora, hub, models
from sinkwindow_lab.measure.mechanics import log
from sinkwindow_lab.render import tables
from sinkwindow_lab.reports import experiments
from sinkwindow_lab.reports.report import Report
from sinkwindow_lab.ways.configurations import parse, parse_list, streaming

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and some texts."""
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    (path / "long.txt").write_text(random_text(300), encoding="utf-8")
    (path / "other.txt").write_text(random_text(290), encoding="utf-8")
    (path / "one.txt").write_text("w1", encoding="utf-8")
    (path / "empty.txt").write_text(" \n", encoding="utf-8")
    (path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command; return exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


# -- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("baseline", "baseline", (None, None, None)),
        ("streaming_8_256", "streaming", (8, 256, 64)),
        ("streaming_8_256_0", "streaming", (8, 256, 0)),
        ("window_0_264", "window", (0, 264, 0)),
        ("window_0_264_16", "window", (0, 264, 16)),
        ("recompute_264", "recompute", (None, 264, None)),
        ("stale_ranks_8_256", "stale_ranks", (8, 256, 64)),
        ("eager_eviction_8_256_32", "eager_eviction", (8, 256, 32)),
        ("absolute_8_256", "absolute", (8, 256, 64)),
        ("call_8_256", "call", (8, 256, 0)),
    ],
)
def test_names_are_configurations(name: str, kind: str, numbers: tuple[int | None, ...]) -> None:
    """Streaming configurations have a default buffer of 64, that of the original reproduction; names do not change."""
    found = parse(name)
    assert (found.name, found.kind, (found.num_sinks, found.window, found.buffer)) == (name, kind, numbers)
    assert found.ablation is (kind in {"stale_ranks", "eager_eviction", "absolute"})


@pytest.mark.parametrize("name", ["", "Baseline", "streaming", "streaming_8", "streaming_-1_8", "window_4_8", "x_1_2"])
def test_unknown_names_list_the_shapes(name: str) -> None:
    """The error shows names that work."""
    with pytest.raises(LabError, match=r"streaming_8_256_64.*recompute_264"):
        parse(name)


def test_zero_windows_are_refused() -> None:
    """A window keeps at least the token itself."""
    with pytest.raises(LabError, match="window 0"):
        parse("streaming_8_0")


@pytest.mark.parametrize("numbers", [(-1, 4, 4), (4, 0, 4), (4, 4, -1)])
def test_numbers_out_of_range_are_named(numbers: tuple[int, int, int]) -> None:
    """The error names the number, its value, and the least that works."""
    with pytest.raises(LabError, match=r"(sinks|window|buffer)=-?\d+ is too small: it must be [01] or more"):
        streaming(*numbers)


@pytest.mark.parametrize(("names", "message"), [(" , ", "no configuration"), ("baseline,baseline", "given twice")])
def test_lists_need_distinct_names(names: str, message: str) -> None:
    """Rows are distinguished by their names."""
    with pytest.raises(LabError, match=message):
        parse_list(names)


def test_the_default_rows_parse() -> None:
    """All default rows parse, and the ablations come last."""
    found = parse_list(experiments.DEFAULT_CONFIGURATIONS)
    assert [one.ablation for one in found] == [False] * 5 + [True] * 2


# -- commands ---------------------------------------------------------------------------------------------------------


def test_tables_writes_both_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of configuration can be measured, with two files as corpora; the page is rendered from the JSON."""
    plan = experiments.Plan((experiments.Experiment("experiment 1", 40, 12, 6),), 2, 2, rounds=2, quick=True)
    monkeypatch.setattr(experiments, "QUICK", plan)
    names = "baseline,streaming_2_6_3,window_0_8,recompute_8,stale_ranks_2_6_3,eager_eviction_2_6_3"
    texts = ("--corpus", folder / "long.txt", "--corpus", folder / "other.txt")
    status, out, err = run(
        capsys, "tables", "--model", folder, *texts, "--configs", names, "--quick", "--out", tmp_path / "new" / "r"
    )
    assert (status, [line.split("/")[-1] for line in out.splitlines()]) == (
        0,
        ["paper_tables.json", "paper_tables.md", "report.html"],
    ), err
    report = Report.model_validate_json((tmp_path / "new/r/paper_tables.json").read_text(encoding="utf-8"))
    assert (tmp_path / "new/r/paper_tables.md").read_text(encoding="utf-8") == tables.render(report)
    rows = {row.configuration.name: row for row in report.experiments[0].rows}
    assert list(rows) == names.split(",")
    assert {one.targets for row in rows.values() for one in row.perplexities} == {39}
    untimed = ["window_0_8", "stale_ranks_2_6_3", "eager_eviction_2_6_3"]
    assert [name for name, row in rows.items() if row.speed is None] == untimed
    assert rows["recompute_8"].perplexities == []
    assert len((rows["baseline"].speed or pytest.fail("no speed")).rounds) == 2


def test_perplexity_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is JSON and nothing else; it has the result, the text and the model."""
    options = ("--tokens", 60, "--sinks", 2, "--window", 6, "--buffer", 3, "--json")
    status, out, err = run(capsys, "perplexity", "--model", folder, "--corpus", folder / "long.txt", *options)
    assert status == 0, err
    found = json.loads(out)
    result = records.PerplexityRecord.model_validate(found["result"])
    assert (result.configuration, result.targets, result.bos) == ("streaming_2_6_3", 59, "none")
    assert records.CorpusRecord.model_validate(found["corpus"]).name == "long"
    assert records.ModelRecord.model_validate(found["model"]).source == "folder"


def test_perplexity_by_name_and_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration may be given by name; a text shorter than requested is read to its end, with a message."""
    options = ("--config", "baseline", "--tokens", 5000, "--bos", "add")
    status, out, err = run(capsys, "perplexity", "--model", folder, "--corpus", folder / "long.txt", *options)
    assert status == 0
    assert out.startswith("PPL ")
    assert "300 targets" in out
    assert "has 301 tokens, 5000 were requested" in err


def test_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has one line per configuration, or is their records as JSON."""
    common = ("speed", "--model", folder, "--corpus", folder / "long.txt", "--prompt", 9, "--tokens", 3)
    assert len(run(capsys, *common)[1].splitlines()) == 2
    found = json.loads(run(capsys, *common, "--configs", "baseline", "--json")[1])
    assert len(records.SpeedRecord.model_validate(found["result"][0]).rounds[0].token_times_s) == 3


def test_mechanics_shows_each_eviction(capsys: pytest.CaptureFixture[str]) -> None:
    """Each eviction is 329 -> 264, as in the log of the original reproduction, with the shape before and after."""
    status, out, _ = run(capsys, "mechanics", "--evictions", 2)
    assert status == 0
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
        (("perplexity", "--bos", "maybe"), "none or add"),
        (
            ("perplexity", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--dtype", "int8"),
            "float16, bfloat16",
        ),
        (("perplexity", "--corpus", "{folder}/long.txt", "--device", "abacus"), "--device cpu always is"),
        (("perplexity", "--corpus", "{folder}/long.txt", "--model", "{folder}/long.txt"), "embedded"),
        (("tables", "--corpus", "{folder}/long.txt", "--corpus", "{folder}/long.txt"), "given twice"),
        (("tables", "--out", "{folder}/long.txt"), "choose another"),
        (("speed", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--tokens", "1"), "generate 2 or more"),
        (("speed", "--corpus", "{folder}/long.txt", "--model", "{folder}", "--rounds", "0"), "rounds=0"),
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


# -- models, corpora, hub ---------------------------------------------------------------------------------------------


def test_embedded_corpora_are_there() -> None:
    """The texts work offline, are the same on every load, and have a digest."""
    for name, documents in (("shakespeare", 42), ("python-docs", len(corpora.load_corpus("python-docs").documents))):
        first, second = corpora.load_corpus(name).record(), corpora.load_corpus(name).record()
        assert first == second
        assert (first.documents, len(first.sha256)) == (documents, 64)
        assert first.characters > 400_000


@pytest.mark.parametrize("name", ["wikitext", "pg19"])
def test_an_unreachable_hub_says_what_works_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error gives the names of the embedded texts, whatever exception the client raised."""

    class Datasets:
        @staticmethod
        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError

        @staticmethod
        def DownloadConfig(**_: object) -> None:  # noqa: N802 - a name of `datasets`
            return None

    monkeypatch.setattr(corpora, "ask", lambda *_: hub.Answer(reachable=False, commit=None))
    monkeypatch.setattr(corpora, "require", lambda _: Datasets)
    with pytest.raises(LabError, match="'shakespeare' and 'python-docs' work offline"):
        corpora.load_corpus(name)


def test_hub_texts_are_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second repository is tried if the first fails; streamed books stop at the limit; the commit is recorded."""
    asked: list[tuple[object, ...]] = []

    class Datasets:
        @staticmethod
        def load_dataset(place: str, config: str | None, **options: object) -> list[dict[str, str]]:
            asked.append((place, config, options["revision"], options["streaming"]))
            if place.startswith("deepmind"):
                raise RuntimeError
            return [{"text": "a book " * 10}] * 5

    monkeypatch.setattr(corpora, "ask", lambda *_: hub.Answer(reachable=True, commit="c0ffee"))
    monkeypatch.setattr(corpora, "require", lambda _: Datasets)
    monkeypatch.setattr(corpora, "STREAMED_CHARACTERS", 100)
    found = corpora.load_corpus("pg19").record()
    assert asked == [("deepmind/pg19", None, "c0ffee", True), ("emozilla/pg19", None, "c0ffee", True)]
    assert (found.documents, found.revision, found.source, found.split) == (2, "c0ffee", "hub emozilla/pg19", "test")


def test_an_unreachable_hub_says_that_the_embedded_model_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the name that failed, and the option to leave out."""
    monkeypatch.setattr(models, "ask", lambda *_: hub.Answer(reachable=False, commit=None))
    with pytest.raises(LabError, match=r"'nobody/nothing-tiny' cannot be loaded.*without --model the embedded SmolLM2"):
        models.load_model("nobody/nothing-tiny")


def test_models_are_described() -> None:
    """Parameters are counted once, and bytes by dtype."""
    model = tiny_model(torch.float32)
    record = models.describe(model, "tiny", "test")
    assert record.parameters == sum(one.numel() for one in model.parameters())
    assert record.weight_bytes == 4 * record.parameters
    assert (record.dtype, record.model_type, record.max_positions) == ("float32", "llama", 512)


def test_dequantized_models_lose_only_the_quantization_config() -> None:
    """The copy that is saved has the same weights, bit for bit, and no quantization config."""
    plain = models._plain(tiny_model(torch.float32))
    for name, value in tiny_model(torch.float32).state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    assert not hasattr(plain.config, "quantization_config")


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


def test_the_core_does_not_import_the_lab() -> None:
    """`import sinkwindow` works without any of the lab's dependencies."""
    program = (
        "import sys, sinkwindow; "
        "bad = [m for m in ('sinkwindow_lab', 'typer', 'pydantic', 'datasets', 'psutil') if m in sys.modules]; "
        "sys.exit(repr(bad) if 'sinkwindow_lab' in bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
