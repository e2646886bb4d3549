"""Whatever a user gives, a mistake is one line that names it and the way out; names act neither there nor elsewhere."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from lab_tiny import ACTS, TINY, refused, run, save_tiny, succeeded, text_of_lines, tiny_model, tiny_tokenizer
from sinkwindow_lab.errors import LabError, explain
from sinkwindow_lab.files import output_file, output_folder
from sinkwindow_lab.inputs import models
from sinkwindow_lab.measure import requirements
from sinkwindow_lab.reports.tables import plan
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_lab.ways.sessions import table_of_positions

if TYPE_CHECKING:
    from pathlib import Path

LONG = "x" * 5_000
READS = ("perplexity", "sinks", "speed", "tables", "verify")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model, one with a table of 64 positions, a text, and what is broken."""
    path = tmp_path_factory.mktemp("mistakes")
    save_tiny(path / "model")
    sizes: dict[str, Any] = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, n_positions=64, bos_token_id=0, eos_token_id=1)).save_pretrained(path / "table")
    tiny_tokenizer().save_pretrained(path / "table")
    (path / "broken").mkdir()
    (path / "broken/config.json").write_text("[" * 100_000, encoding="utf-8")
    (path / "text.txt").write_text(text_of_lines(60), encoding="utf-8")
    (path / "binary.txt").write_bytes(b"\xff\x00")
    (path / "deep.jsonl").write_text("[" * 100_000, encoding="utf-8")
    (path / "number.jsonl").write_text('"w1"\n' + "1" * 5_000, encoding="utf-8")
    (path / "half.jsonl").write_text('"w1"\n"w1 \\ud800"', encoding="utf-8")
    (path / "report.json").write_text("{}", encoding="utf-8")
    for file in ("paper_tables.json", "speed.json", "gpu_report.json"):
        (path / "taken" / file).mkdir(parents=True)
    return path


def inputs(command: str, folder: Path) -> dict[str, object]:
    """Return options with which a command that reads a text runs."""
    out: dict[str, object] = {"--out": folder / "out"} if command in ("sinks", "tables") else {}
    out |= {"--only": "mistakes"} if command == "tables" else {}
    return {"--model": folder / "model", "--corpus": folder / "text.txt", **out}


def flat(options: dict[str, object]) -> list[object]:
    """Return options as arguments."""
    return [one for pair in options.items() for one in pair]


@pytest.mark.parametrize("command", READS)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--corpus", LONG, "cannot be read"),
        ("--corpus", "{}", "neither a file"),
        ("--corpus", "a\0b", "neither a file"),
        ("--corpus", ACTS, "neither a file"),
        ("--corpus", "/dev/zero", "neither a file"),
        ("--corpus", "{}/binary.txt", "not UTF-8"),
        ("--corpus", "{}/deep.jsonl", "line 1 is not JSON"),
        ("--corpus", "{}/number.jsonl", "line 2 is not JSON"),
        ("--corpus", "{}/half.jsonl", r"line 2 has half a character, '\ud800'"),
        ("--model", LONG, "runs offline"),
        ("--model", "a\0b", "runs offline"),
        ("--model", ACTS, "runs offline"),
        ("--model", "{}/broken", "runs offline"),
        ("--model", "{}/text.txt", "runs offline"),
        ("--device", "meta", "--device cpu always is"),
        ("--device", "abacus", "--device cpu always is"),
        ("--device", "hpu", "--device cpu always is"),
        ("--device", "", "--device cpu always is"),
        ("--device", ACTS, "--device cpu always is"),
        ("--dtype", "int8", "'float16', 'bfloat16'"),
        ("--dtype", ACTS, "'float16', 'bfloat16'"),
        (f"--{ACTS}", "", "--help lists"),
        (ACTS, "", "--help lists"),
    ],
)
def test_inputs_that_cannot_be_used(
    command: str, option: str, value: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads a text refuses each of them alike."""
    assert message in refused(capsys, command, *flat(inputs(command, folder) | {option: value.format(folder)}))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("perplexity", ("--tokens", "--window", "--block")),
        ("sinks", ("--tokens", "--size")),
        ("speed", ("--prompt", "--tokens", "--rounds")),
        ("verify", ("--tokens", "--window", "--call-length")),
        ("mechanics", ("--window", "--evictions")),
        ("floors", ("--context", "--batch")),
        ("speed-report", ("--threads",)),
        ("gpu-report", ("--minutes",)),
    ],
)
def test_numbers_out_of_range(
    command: str, options: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers below the least one, and what is no number."""
    fixed = flat(inputs(command, folder)) if command in READS else []
    fixed += ["--shape", "tiny"] if command == "floors" else []
    fixed += ["--out", folder / "out"] if "report" in command else []
    for option in options:
        for value in ("0", "-1", "nan", "x", ACTS, *(["9" * 4_500] if option != "--minutes" else [])):
            status, out, err = run(capsys, command, *fixed, f"{option}={value}")
            assert (status, out) == (2, "")
            lines = [line for line in err.splitlines() if not line.startswith(("[1/1]", "warning: "))]
            assert [line[:7] for line in lines] == ["error: "], (option, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("perplexity", "--window", 10**12), f"--window {10**12} --buffer 64: streaming_4_{10**12}_64 keeps"),
        (("perplexity", "--window", 10**20), "no machine keeps so many"),
        (("perplexity", "--config", f"streaming_8_{10**20 - 1}"), "no machine keeps so many"),
        (("perplexity", "--config", f"streaming_8_{LONG.replace('x', '9')}"), "no machine keeps so many"),
        (("perplexity", "--config", f"static_4_{10**12}"), "choose smaller sizes"),
        (("perplexity", "--config", f"stale_ranks_4_{10**12}"), "choose smaller sizes"),
        (("perplexity", "--config", "streaming_\u0663_\u0664"), "unknown configuration"),
        (("speed", "--configs", f"baseline,call_4_{10**12}"), f"--prompt 500 --tokens 200: call_4_{10**12} keeps"),
        (("speed", "--tokens", 10**12, "--configs", "baseline"), f"--tokens {10**12}: baseline keeps"),
        (("tables", "--configs", f"window_0_{10**12}"), "choose smaller sizes"),
        (("verify", "--buffer", 10**12, "--tokens", 2 * 10**12, "--call-length", 10**12), "choose smaller sizes"),
    ],
)
def test_sizes_that_no_machine_has(
    arguments: tuple[object, ...],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are refused before memory is asked for, with what they would take and what there is."""
    monkeypatch.setattr(plan, "FULL", TINY)
    options = inputs(arguments[0], folder) if isinstance(arguments[0], str) else {}
    options.pop("--only", None)
    assert message in refused(capsys, arguments[0], *flat(options), *arguments[1:])


def test_the_other_sizes_have_bounds_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a text: the log of a cache, lower bounds, and the number of threads."""
    assert "keeps" in refused(capsys, "mechanics", "--window", 10**12)
    for option in ("--context", "--batch"):
        assert "keeps" in refused(capsys, "floors", "--shape", "tiny", option, 10**12)
    for megabytes in ("1e30", "inf", "-1"):
        assert "--megabytes " in refused(capsys, "floors", "--shape", "tiny", "--megabytes", megabytes)
    assert "--threads " in refused(capsys, "speed-report", "--out", folder / "out", "--threads", 10**12)


@pytest.mark.parametrize(
    "out",
    ["/proc/x", "/proc", "{}/text.txt", "{}/text.txt/x", LONG, "a\0b", "/dev/null", "{}/taken", "{}/" + 260 * "x"],
)
def test_places_that_cannot_be_written(out: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are found before anything is loaded or measured, and nothing is replaced that is no file."""
    place = out.format(folder)
    for command in (["tables", *flat(inputs("tables", folder))], ["speed-report", "--quick"], ["gpu-report"]):
        assert "--out" in refused(capsys, *command, "--out", place)
    if out != "{}/text.txt":
        common = ("perplexity", "--model", folder / "nowhere", "--corpus", folder / "text.txt")
        assert "--save-nll" in refused(capsys, *common, "--save-nll", place)
        assert (
            "docs" in refused(capsys, "speed-report", "--quick", "--out", folder / "out", "--docs", place) or not place
        )


@pytest.mark.parametrize("source", ["{}/deep.jsonl", "{}/report.json", "{}/binary.txt", "{}", "/dev/zero", LONG, ACTS])
def test_reports_that_cannot_be_rendered(source: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in the place of a report's JSON."""
    assert "measure again" in (line := refused(capsys, "render", source.format(folder))) or "cannot be read" in line


def test_a_report_that_lacks_what_its_page_shows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of another version is no traceback."""
    monkeypatch.setattr(plan, "QUICK", TINY)
    options = flat(inputs("tables", folder) | {"--out": tmp_path, "--configs": "baseline"})
    succeeded(capsys, "tables", "--quick", *options)
    report = tmp_path / "paper_tables.json"
    report.write_text(report.read_text(encoding="utf-8").replace('"mistakes": {', '"others": {'), encoding="utf-8")
    assert "KeyError" in refused(capsys, "render", report)


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Not an error about a missing command."""
    status, out, err = run(capsys)
    assert status == 2
    assert "perplexity" in out + err
    assert "error" not in out + err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "No space left on device: 'a/b': free this place"),
        (MemoryError(), "not enough memory (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "(CUDA out of memory)"),
        (LabError(f"first\nsecond {ACTS}"), r"first second \x1b[2J\u202e[red]"),
        (LabError(LONG), " ... "),
    ],
)
def test_errors_that_come_late_are_one_line_too(error: Exception, message: str) -> None:
    """A full disk and a full memory are no mistakes of the code."""
    assert message in (explain(error) or "")


def test_mistakes_of_the_code_keep_their_traceback() -> None:
    """What the user cannot fix is not hidden."""
    assert explain(KeyError("a")) is None
    assert explain(RuntimeError("shapes differ")) is None


# -- positions --------------------------------------------------------------------------------------------------------


def test_tables_of_positions_are_found() -> None:
    """GPT-2 has a row for each position, OPT two more, and a Llama computes its angles."""
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(
        OPTConfig(**sizes, vocab_size=40, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=40)
    )
    assert table_of_positions(opt) == 40
    assert table_of_positions(tiny_model()) is None


@pytest.mark.parametrize("way", ["baseline", "recompute_100"])
def test_texts_end_with_the_table(way: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 64 positions can be used: the last token of a text is not fed, nor is the last one generated."""
    common = ("--model", folder / "table", "--corpus", folder / "text.txt")
    succeeded(capsys, "perplexity", *common, "--config", way, "--tokens", 65)
    line = refused(capsys, "perplexity", *common, "--config", way, "--tokens", 66)
    assert f"--tokens 66 --config {way}: {way} reads 65 tokens, and this model has 64 positions" in line
    succeeded(capsys, "speed", *common, "--configs", way, "--prompt", 50, "--tokens", 15)
    line = refused(capsys, "speed", *common, "--configs", way, "--prompt", 50, "--tokens", 16)
    assert "--prompt 50 --tokens 16" in line
    with pytest.raises(LabError, match=r"mistakes: .* 64 positions"):
        requirements.check([parse(way)], models.load_model(str(folder / "table")).model, 65, "mistakes: PPL")


def test_short_windows_need_no_long_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Re-computation starts at the first position again for every token."""
    common = ("--model", folder / "table", "--corpus", folder / "text.txt")
    succeeded(capsys, "perplexity", *common, "--config", "recompute_64", "--tokens", 99)


def test_all_jobs_are_checked_before_the_first_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A way that cannot read its text stops the tables before hours of other readings."""
    monkeypatch.setattr(plan, "FULL", TINY)
    options = inputs("tables", folder) | {"--model": folder / "table", "--out": tmp_path, "--only": "mistakes,sinks"}
    assert "gpt2" in refused(capsys, "tables", *flat(options))
    assert list((tmp_path / "measurements").iterdir()) == []


def test_tokens_that_a_model_does_not_know(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer of another model is no index error."""
    small = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1))
    small.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for command in ("perplexity", "speed", "verify"):
        line = refused(capsys, command, "--model", tmp_path, "--corpus", folder / "text.txt")
        assert "gives token 31 and it knows 8" in line


# -- before, not after ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("perplexity", "psutil"),
        ("speed", "psutil"),
        ("verify", "psutil"),
        ("tables", "psutil"),
        ("tables", "markdown_it"),
        ("floors", "psutil"),
    ],
)
def test_missing_modules_are_found_before_measuring(
    command: str,
    module: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not when a result is written; the line says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "sinkwindow_lab.render.html", raising=False)
    for measure in ("perplexity.measure", "perplexity.measure_stages", "generation.generate", "verify.verify"):
        monkeypatch.setattr(f"sinkwindow_lab.measure.{measure}", lambda *_, **__: pytest.fail("measures"))
    fixed = ["--shape", "tiny"] if command == "floors" else flat(inputs(command, folder))
    assert "pip install 'sinkwindow[lab]'" in refused(capsys, command, *fixed)


def test_the_folder_of_converted_models_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named by the variable that moves it."""
    monkeypatch.setenv("SINKWINDOW_CACHE", "/proc/x")
    with pytest.raises(LabError, match="SINKWINDOW_CACHE=/proc/x: cannot write there"):
        models.embedded_folder()


def test_checked_places_are_left_as_they_were(tmp_path: Path) -> None:
    """A check leaves no file, and does not touch the one that is there; a name may be as long as names can be."""
    target = tmp_path / ("x" * 255)
    assert output_file("--save-nll", target) == target
    assert output_folder(tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208
    target.write_text("old", encoding="utf-8")
    assert output_file("--save-nll", target).read_text(encoding="utf-8") == "old"
