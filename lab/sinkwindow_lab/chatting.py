"""`sinkwindow chat`: a conversation in a terminal, or with lines from a pipe. Answers go to standard output."""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from sinkwindow import Chat, Family
from sinkwindow_lab.errors import LabError, explain, printable, say
from sinkwindow_lab.inputs.models import LoadedModel

with suppress(ImportError):  # it is not on every system; where it is, input() has a history and can be edited
    import readline  # noqa: F401

HELP = {
    "/stats": "what the cache keeps, has evicted and has cost",
    "/save FILE": "save the conversation",
    "/load FILE": "go on with a saved one",
    "/reset": "forget the conversation, not the system prompt",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


def open_chat(
    loaded: LoadedModel, *, system: str | None, file: Path | None, family: Family | None = None, **sizes: Any
) -> Chat:
    """Return a new chat, or the one in a file; show what it warns of."""
    given = [f"--{name}" for name, value in {"system": system, **sizes}.items() if value is not None]
    if file is not None and given:
        raise LabError(f"{given[0]} cannot be given with --load: the file has that of its conversation")
    sizes = {name: value for name, value in sizes.items() if value is not None}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            if file is None:
                chat = Chat(loaded.model, loaded.tokenizer, system, family=family, **sizes)
            else:
                chat = Chat.load(file, loaded.model, loaded.tokenizer)
        except (ImportError, OSError, ValueError) as error:
            subject = f"model {loaded.record.name!r} cannot chat" if file is None else f"--load {file}"
            raise LabError(f"{subject}: {getattr(error, 'strerror', None) or error}") from error
    for one in found:
        say(f"warning: {one.message}")
    return chat


class Printer(TextStreamer):
    """Shows an answer as it comes: whole words, none of which acts on the terminal."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []  # of the prompt, then of each token [s]

    def put(self, value: Any) -> None:
        """Take the prompt, then each token."""
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002 - as its base
        """Show text that later tokens do not change."""
        lines = "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))
        sys.stdout.write(lines + "\n" * stream_end)
        sys.stdout.flush()

    def speed(self) -> str:
        """Return the tokens per second after the first one."""
        tokens = self.times[1:]
        return f"{(len(tokens) - 1) / (tokens[-1] - tokens[0]):.1f} tokens/s" if len(tokens) > 1 else "-"


class Terminal:
    """The conversation between a chat and whoever types."""

    def __init__(self, chat: Chat, arguments: dict[str, Any]) -> None:
        self.chat = chat
        self._arguments = arguments  # of generate
        self._speed = "-"
        self._console = Console(highlight=False, markup=False)

    def run(self) -> None:
        """Answer lines until there are no more."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except KeyboardInterrupt:
                say("\nCtrl-D or /quit ends")
                continue
            except EOFError:
                break
            if line == "/quit":
                break
            if line:
                self._take(line)

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        method: Callable[[str], None] | None = getattr(self, f"_do_{command[1:]}", None)
        try:
            if not command.startswith("/"):
                self._answer(line)
            elif method:
                method(rest.strip())
            else:
                say(f"error: there is no command {command}: /help lists them")
        except KeyboardInterrupt:
            say("stopped")
        except OSError:  # nobody reads the answers, or they cannot be written
            raise
        except Exception as error:  # noqa: BLE001 - whatever a message or a command meets, the conversation goes on
            words = explain(error) or str(error) or type(error).__name__
            say(f"error: {' '.join(words.split())}")

    def _answer(self, message: str) -> None:
        printer, before = Printer(self.chat.tokenizer), self.chat.cache.forwarded_tokens
        try:
            self.chat.ask(message, printer, **self._arguments)
        except KeyboardInterrupt:
            said = self.chat.cache.forwarded_tokens > before
            say("stopped: " + ("the answer counts as far as it was said" if said else "the message was not read"))
        self._speed = printer.speed()

    def _do_stats(self, _: str) -> None:
        cache = self.chat.cache
        kept, table = len(cache.retained_tokens[0]), Table.grid(padding=(0, 2))
        table.add_row("kept", f"{kept:,} tokens, {min(kept, cache.retention.num_sinks):,} of them pinned")
        table.add_row("evicted", f"{cache.seen_tokens[0] - kept:,} tokens in {cache.num_evictions:,} evictions")
        table.add_row("forwarded", f"{cache.forwarded_tokens:,} tokens")
        table.add_row("cache", filesize.decimal(cache.nbytes))
        table.add_row("speed", self._speed)
        self._console.print(table)

    def _do_save(self, name: str) -> None:
        with _file("/save", name) as path:
            self.chat.save(path)
        say(f"saved {name}", err=False)

    def _do_load(self, name: str) -> None:
        with _file("/load", name) as path:
            chat = Chat.load(path, self.chat.model, self.chat.tokenizer)
        self.chat.cache.detach()
        self.chat = chat
        say(f"loaded {name}, {chat.cache.seen_tokens[0]:,} tokens", err=False)

    def _do_reset(self, _: str) -> None:
        self.chat.reset()
        say("a new conversation", err=False)

    def _do_help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in HELP.items():
            table.add_row(command, meaning)
        self._console.print(table)


@contextmanager
def _file(command: str, name: str) -> Iterator[Path]:
    if not name:
        raise LabError(f"{command} needs the name of a file")
    try:
        yield Path(name).expanduser()
    except OSError as error:
        raise LabError(str(error)) from error
