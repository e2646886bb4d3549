"""`sinkwindow chat`: in a pseudo-terminal past 20,000 tokens, from a pipe, and in everything that goes wrong."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from calling import raising
from lab_tiny import CHAT_TEMPLATE, WORDS, exit_status, random_text, run, save_chatty, tiny_model, tiny_tokenizer
from sinkwindow import Chat
from sinkwindow_lab.chatting import HELP, Printer, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Piped = Callable[..., tuple[int, str, str]]

ANSWER: Final = r"\n((?:w\d+ ?)+)\r\n"
SIZES: Final = ("--window", 48, "--buffer", 8)
# Makes standard input the terminal of a new session, so that Ctrl-C arrives, and becomes the command.
IN_TERMINAL: Final = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that can chat."""
    return save_chatty(tmp_path_factory.mktemp("chatty"))


# -- a terminal -------------------------------------------------------------------------------------------------------


class Typist:
    """Types into a command in a pseudo-terminal and reads what it shows."""

    def __init__(self, *arguments: object) -> None:
        self._end, theirs = pty.openpty()
        command = [sys.executable, "-m", "sinkwindow_lab", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "80", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown, self._news = "", threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                found = os.read(self._end, 4096)
            except OSError:  # of Linux, when the other end is closed
                found = b""
            with self._news:
                self.shown = self.shown + found.decode(errors="replace") if found else self.shown + "\0"
                self._news.notify_all()
            if not found:
                return

    def type(self, keys: str, pattern: str, *, prompt: bool = True) -> re.Match[str]:
        """Type at the next prompt, or at once; return the first match of a pattern in what is shown from then on."""
        if prompt:
            self.wait(r"> $")
        start = len(self.shown)
        os.write(self._end, keys.encode())
        return self.wait(pattern, start)

    def wait(self, pattern: str, start: int = 0) -> re.Match[str]:
        """Wait for a match in what is shown, or for the end."""
        with self._news:
            self._news.wait_for(lambda: re.search(pattern, self.shown[start:]) or self.shown.endswith("\0"))
        found = re.search(pattern, self.shown[start:])
        assert found is not None, self.shown[start:]
        return found

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C at the next prompt until a match is shown.

        A signal between Python's prompt and its read is noticed only with the next line or signal.
        """
        self.wait(r"> $")
        start = len(self.shown)
        with self._news:
            shown = False
            while not shown:
                os.write(self._end, b"\x03")
                shown = self._news.wait_for(lambda: re.search(f"{pattern}|\0", self.shown[start:]) is not None, 1.0)
        self.wait(pattern, start)

    def stats(self) -> dict[str, float]:
        """Return the numbers of `/stats`."""
        words = (
            r"kept +([\d,]+) tokens, ([\d,]+) of.*\s+evicted +([\d,]+) tokens in ([\d,]+).*\s+forwarded +([\d,]+).*"
            r"\s+cache +([\d.]+) \w+\s+speed +(?:-|([\d.]+) tokens/s)"
        )
        names = ("kept", "pinned", "evicted", "evictions", "forwarded", "size", "speed")
        values = [float((one or "0").replace(",", "")) for one in self.type("/stats\n", words).groups()]
        return dict(zip(names, values, strict=True))

    def close(self) -> int:
        """Type Ctrl-D and return the exit status."""
        self.type("\x04", "\0")
        status = self.process.wait()
        self._reader.join()
        os.close(self._end)
        return status


@pytest.fixture
def typist(folder: Path) -> Iterator[Typist]:
    """Return a running chat, with a system prompt of two words."""
    typing = Typist("--model", folder, "--system", "w1 w2", *SIZES, "--max-new-tokens", 20)
    yield typing
    typing.process.kill()


def test_a_chat_in_a_terminal_runs_for_ever(typist: Typist, folder: Path, tmp_path: Path) -> None:
    """Past 20,000 tokens memory is what it was when the cache was full; files, stops and resets work on the way."""
    sizes, turns, stats = [], 0, {"forwarded": 0.0}
    while stats["forwarded"] < 20_000:
        turns += 1
        typist.type(f"{random_text(1000, seed=turns)}\n", ANSWER)
        stats = typist.stats()
        sizes.append(stats["size"])
    # A turn: `w28`, the message, `w29`, the answer, of which the last token comes with the next turn.
    assert stats["forwarded"] == 3 + turns * (1 + 1000 + 1 + 20) - 1
    assert stats["evicted"] == stats["forwarded"] - stats["kept"]
    assert 4 + 48 <= stats["kept"] <= 4 + 48 + 8
    assert stats["pinned"] == 4
    assert stats["evictions"] > 20_000 // 9 - 20
    assert len(set(sizes)) == 1
    assert sizes[0] > 0
    assert stats["speed"] > 0

    file = tmp_path / "chat file"
    typist.type(f"/save {file}\n", "saved ")
    first = typist.type("w3 w4\n", ANSWER)[1]
    typist.type(f"/load {file}\n", r"loaded .*, ([\d,]+) tokens")
    assert typist.type("w3 w4\n", ANSWER)[1] == first
    typist.type("/reset\n", "a new conversation")
    assert typist.stats()["kept"] == 0
    typist.type("w5\n", ANSWER)
    assert typist.stats() | {"size": 0, "speed": 0} == {
        "kept": 3 + 1 + 1 + 1 + 19,
        "pinned": 4,
        "evicted": 0,
        "evictions": 0,
        "forwarded": 25,
        "size": 0,
        "speed": 0,
    }
    assert typist.close() == 0

    going_on = Typist("--model", folder, "--load", file, "--max-new-tokens", 20)
    assert going_on.type("w3 w4\n", ANSWER)[1] == first
    assert going_on.stats()["forwarded"] > 20_000
    assert going_on.close() == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(folder: Path) -> None:
    """The answer counts as far as it was said; at the prompt Ctrl-C says how to end."""
    typing = Typist("--model", folder, *SIZES, "--max-new-tokens", 1_000_000)
    typing.type("w3\n", r"w\d+ w\d+ w\d+")
    typing.type("\x03", "stopped: the answer counts as far as it was said", prompt=False)
    said = typing.stats()
    assert 3 < said["forwarded"] < 1_000_000
    typing.interrupt("Ctrl-D or /quit ends")
    assert typing.stats()["forwarded"] == said["forwarded"]
    assert typing.close() == 0


# -- a pipe -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Piped:
    """Return a function that runs the command with lines from a pipe; it returns status, standard output and error."""

    def run_piped(lines: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)  # even so, answers go to a file
        return run(capsys, "chat", *arguments)

    return run_piped


@pytest.fixture
def chat() -> Chat:
    """Return what the command makes of the tiny model."""
    return Chat(tiny_model(), tiny_tokenizer(CHAT_TEMPLATE), window=48, buffer=8)


def test_lines_from_a_pipe_are_answered(folder: Path, piped: Piped) -> None:
    """Standard output has the answers of `Chat` and nothing else; a line that ends the chat is not needed."""
    options = ("--model", folder, *SIZES, "--max-new-tokens", 5, "--system", "w9")
    status, out, err = piped("w3 w4\n\n  w5  \n", *options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    twin = Chat(model, AutoTokenizer.from_pretrained(folder), "w9", window=48, buffer=8)
    expected = [twin.ask(message, max_new_tokens=5, do_sample=False) for message in ("w3 w4", "w5")]
    assert (status, out.splitlines()) == (0, expected)
    assert err.splitlines()[-1].endswith("Ctrl-D ends")


def test_sampling_needs_a_temperature(folder: Path, piped: Piped) -> None:
    """At a high one two answers differ; at 0, the default, they are the same."""
    options = ("--model", folder, *SIZES, "--max-new-tokens", 20)
    lines = "w3\n/reset\nw3\n/quit\nw3\n"
    answers = [
        piped(lines, *options, *more)[1].splitlines() for more in ((), ("--temperature", 0), ("--temperature", 50.0))
    ]
    assert answers[0] == answers[1] == [answers[0][0], "a new conversation", answers[0][0]]
    assert answers[2][0] != answers[2][2]


def test_errors_of_commands_are_lines_and_the_chat_goes_on(folder: Path, tmp_path: Path, piped: Piped) -> None:
    """Each is one line on standard error; afterwards a message is answered."""
    (tmp_path / "other").write_bytes(b"nothing of ours")
    lines = [
        "/nonsense",
        "/save",
        f"/save {tmp_path}/no/folder",
        "/load",
        f"/load {tmp_path}/nothing",
        f"/load {tmp_path}/other",
    ]
    options = ("--model", folder, *SIZES, "--max-new-tokens", 3)
    status, out, err = piped("\n".join([*lines, "/help", "w3"]), *options)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    words = ("no command /nonsense", "/save needs", "cannot be saved", "/load needs", "is no file", "is no file that")
    assert status == 0
    for line, part in zip(errors, words, strict=True):
        assert part in line
    assert len(out.splitlines()) == len(HELP) + 1
    assert all(command in out for command in HELP)


@pytest.mark.parametrize("lines", ["w3\nw4", "/save a\n/save b\n"])
@pytest.mark.parametrize(("error", "status"), [(BrokenPipeError(32, "a reader"), 1), (OSError(28, "a disk"), 2)])
def test_answers_that_cannot_be_written_end_the_chat(
    lines: str,
    error: OSError,
    status: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piped: Piped,
) -> None:
    """As any command, without a word where a reader went away; what comes later is not run."""
    monkeypatch.chdir(tmp_path)
    fails, write = raising(error), sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (fails if text.strip() else write)(text))
    ended, _, err = piped(lines, "--model", folder, "--max-new-tokens", 3)
    assert (ended, err.count("error: ")) == (status, status - 1)
    assert not (tmp_path / "b").exists()


def test_an_interrupted_command_does_not_end_the_chat(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an interrupted answer does not."""
    monkeypatch.setattr(chat, "save", raising(KeyboardInterrupt()))
    Terminal(chat, {})._take("/save somewhere")
    assert capsys.readouterr().err == "stopped\n"


def test_a_failure_in_a_turn_is_a_line(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory that is not there, or anything else: the next message is answered."""
    for error, words in ((MemoryError(), "not enough memory"), (RuntimeError("a b\nc"), "a b c"), (KeyError(), "Key")):
        hook = chat.model.register_forward_pre_hook(raising(error))
        Terminal(chat, {})._take("w3")
        hook.remove()
        assert re.fullmatch(rf"error: .*{words}.*\n", capsys.readouterr().err)
    Terminal(chat, {"max_new_tokens": 3})._take("w3")
    assert len(capsys.readouterr().out.split()) == 3


def test_a_stop_before_the_answer_says_so(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    """Then the message was not read."""
    hook = chat.model.register_forward_pre_hook(raising(KeyboardInterrupt()))
    Terminal(chat, {})._take("w3")
    hook.remove()
    assert "stopped: the message was not read" in capsys.readouterr().err
    assert chat.cache.seen_tokens == [0]


def test_an_answer_does_not_act_on_the_terminal(
    tmp_path: Path, piped: Piped, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escapes are shown as escapes; line ends stay."""
    save_chatty(tmp_path, words=tuple(f"\x1b[2J{word}" if word > "w" else word for word in WORDS))
    _, out, _ = piped("w3\n", "--model", tmp_path, *SIZES, "--max-new-tokens", 4)
    assert out.count("\\x1b[2J") == out.count("w") == 4
    assert "\x1b" not in out
    Printer(tiny_tokenizer()).on_finalized_text("a\r\n\x07\tb\n")
    assert capsys.readouterr().out == "a\\r\n\\x07    b\n"


REFUSED: Final[list[tuple[tuple[object, ...], str]]] = [
    (("--window", 0), "--window 0 must be 1"),
    (("--buffer", -1), "--buffer -1 must be 0"),
    (("--max-new-tokens", 0), "--max-new-tokens 0 must be 1"),
    (("--temperature", -1), "--temperature -1.0 must be 0"),
    (("--temperature", "inf"), "--temperature inf must be 0 or more, and finite"),
    (("--load", "nowhere"), "--load nowhere: path nowhere is no file"),
    (("--load", "nowhere", "--system", "w1"), "--system cannot be given with --load"),
    (("--load", "nowhere", "--window", 7), "--window cannot be given with --load"),
    (("--load", "."), "--load .: "),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_options_that_make_no_chat_are_refused(
    arguments: tuple[object, ...], words: str, folder: Path, piped: Piped
) -> None:
    """In one line, with status 2."""
    status, out, err = piped("w3\n", "--model", folder, *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {words}")


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_chat_needs_both_streams(
    stream: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the shell has closed is an error, before a model is loaded."""
    monkeypatch.setattr(sys, stream, None)
    assert exit_status("chat", "--model", "nowhere") == 2
    assert re.fullmatch("error: .* one of them is closed.*\n", capsys.readouterr().err)


def test_a_base_model_is_refused(tmp_path: Path, piped: Piped) -> None:
    """With its name, and what there is to do."""
    save_chatty(tmp_path, None)
    status, _, err = piped("w3\n", "--model", tmp_path)
    assert status == 2
    assert re.search(r"error: model .* cannot chat: The tokenizer has no chat template", err)


def test_an_older_transformers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, piped: Piped) -> None:
    """In one line, with the release that a chat needs."""
    monkeypatch.setattr("sinkwindow.chat.TAKES_NEW_TOKENS_ALONE", False)
    status, _, err = piped("w3\n", "--model", folder)
    assert status == 2
    assert re.search(r"^error: model .* cannot chat: .* needs transformers 5\.3", err.splitlines()[-1])


def test_what_a_chat_warns_of_is_shown(tmp_path: Path, piped: Piped) -> None:
    """That a template has no system prompt, that the sizes exceed what the model was trained on."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    save_chatty(tmp_path, refuses + CHAT_TEMPLATE)
    options = ("--model", tmp_path, "--system", "w1", "--window", 600, "--max-new-tokens", 3)
    status, out, err = piped("w3\n", *options)
    assert (status, len(out.split())) == (0, 3)
    assert re.findall("^warning: .*(takes no system prompt|positions)", err, re.MULTILINE) == [
        "takes no system prompt",
        "positions",
    ]
