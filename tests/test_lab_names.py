"""Files, folders and models may have any name: it is shown as text, and nothing in it acts on the terminal."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from lab_tiny import ACTS, random_text, save_tiny, succeeded
from sinkwindow_lab import progress
from sinkwindow_lab.errors import printable, say
from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.render.markdown import name as shown

if TYPE_CHECKING:
    from pathlib import Path


def test_names_do_not_act(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file and a folder may have any name: what is printed of them has no character that acts."""
    save_tiny(tmp_path / f"m{ACTS}")
    text = tmp_path / f"t{ACTS}\n\udcff.txt"
    text.write_text(random_text(60), encoding="utf-8")
    assert load_corpus(str(text)).name == r"t\x1b[2J\u202e[red]\n\udcff"
    common = ("--model", tmp_path / f"m{ACTS}", "--corpus", text)
    for command in (
        ("perplexity", *common, "--window", 8),
        ("speed", *common, "--tokens", 3),
        ("floors", *common[:2], "--megabytes", 1),
    ):
        out, err = succeeded(capsys, *command)
        shown_lines = (out + err).replace("\N{NO-BREAK SPACE}", "").splitlines()
        assert [printable(line) for line in shown_lines] == shown_lines
        assert "x1b" in out or command[0] == "speed"
    assert shown(ACTS) == r"\\x1b\[2J\\u202e\[red\]"
    say(f"{ACTS}\nsecond")
    assert capsys.readouterr().err == "\\x1b[2J\\u202e[red]\nsecond\n"


def test_letters_of_all_languages_are_shown() -> None:
    """Spaces and joiners act on nothing; marks of direction reorder a line, and are shown as escapes."""
    for words in (
        "\u4f60\u3000\u597d",
        "Bonjour\u00a0!",
        "\u0645\u06cc\u200c\u062e",
        "\U0001f468\u200d\U0001f469",
        "a\u00ad b",
    ):
        assert printable(words) == words
    for letter in "\x1b\u202e\u2066\u200f\u061c\u2028\ud800\x9b":
        assert printable(letter) == ascii(letter)[1:-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_show_names_as_text(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """In a terminal too, where rich reads brackets as colors."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=stream, force_terminal=terminal, width=200))
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.Bars(1) as bars:
        bars.begin(f"one {ACTS}", 2)
        bars.found(f"two {ACTS}")
    for word in ("one", "two"):
        assert rf"{word} \x1b[2J\u202e[red]" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()


def test_results_are_shown_whatever_the_terminal_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A letter that it lacks is no error at the end of a measurement."""
    save_tiny(tmp_path / "model")
    (tmp_path / "\u6587.txt").write_text(random_text(60), encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    common = ("--model", tmp_path / "model", "--corpus", tmp_path / "\u6587.txt", "--config", "baseline")
    succeeded(capsys, "perplexity", *common)
    assert b"baseline, \\u6587, 256 tok/call" in written.getvalue()
