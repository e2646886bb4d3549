"""The application, and what its commands share: options, loading what they name, results as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import sinkwindow
from sinkwindow_lab import ranks
from sinkwindow_lab.errors import LabError, say
from sinkwindow_lab.records import Configuration, Measurement, ModelRecord, TextRecord

if TYPE_CHECKING:
    from sinkwindow_lab.inputs.corpora import Corpus
    from sinkwindow_lab.inputs.models import LoadedModel
    from sinkwindow_lab.inputs.tokens import TokenText

app = typer.Typer(
    help="Streams text through language models with a key-value cache of a fixed size: attention sinks and a window.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def show_version(asked: bool) -> None:  # noqa: FBT001 - as typer calls it
    """Show the version and end."""
    if asked:
        typer.echo(f"sinkwindow {sinkwindow.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version and exit.")
]


@app.callback()
def options(context: typer.Context, *, version: Version = False) -> None:  # noqa: ARG001 - its callback acts
    """Take what stands before a command."""
    if context.invoked_subcommand not in ranks.SHARED and ranks.place():
        shared = " and ".join(ranks.SHARED)
        words = f"{context.invoked_subcommand} runs in one process, {shared} in several"
        raise LabError(f"{words}: start it without torchrun, or unset RANK and WORLD_SIZE")


CORPUS_HELP = "shakespeare, python-docs, wikitext, wikitext-103, pg19, or a text, json, jsonl or parquet file"
Text = Annotated[str, typer.Option("--corpus", help=CORPUS_HELP)]
Model = Annotated[str | None, typer.Option(help="Hub id or folder of a causal LM; the embedded one by default.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, mps, ...")]
Dtypes = Literal["float16", "bfloat16", "float32", "float64"]
Dtype = Annotated[Dtypes, typer.Option(help="Of the weights, and of what is computed.")]
Untested = Annotated[
    bool, typer.Option("--untested", help="First check a model that is not in the table, on a tiny copy of it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the records as JSON.")]
Sinks = Annotated[int, typer.Option(help="S, first tokens to keep.")]
Window = Annotated[int, typer.Option(help="W, most recent tokens to keep in an eviction.")]
Buffer = Annotated[int, typer.Option(help="B, tokens above S + W before an eviction.")]
Out = Annotated[Path, typer.Option(help="Folder for the report, and for finished measurements of tables.")]
Place = tuple[str | None, str, str, bool]  # a model, its device and dtype, and whether to run its code


def warn(
    models: Sequence[ModelRecord], texts: Sequence[TextRecord], measurements: Sequence[Measurement] = ()
) -> list[str]:
    """Show what is doubtful about the numbers, and return it."""
    from sinkwindow_lab.render.origins import doubts

    found = doubts(models, texts, measurements)
    for one in found:
        say(f"warning: {one}")
    return found


def read(
    corpus: str, place: Place, ways: Sequence[Configuration], asked: str, more: int, **how: Any
) -> tuple[Corpus, LoadedModel, TokenText]:
    """Load a text and a model, and check that `ways` can read the text and `more` tokens; `how` is of `encode`."""
    from sinkwindow_lab.inputs import corpora, models
    from sinkwindow_lab.measure import requirements

    model, device, dtype, trust = place
    models.check_place(device, dtype)
    text = corpora.load_corpus(corpus)
    loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust)
    ids = loaded.encode(text, **how)
    requirements.check(ways, loaded.model, max(one.shape[1] for one in ids.texts) + more, asked)
    return text, loaded, ids


def read_texts(names: Sequence[str] | None) -> list[Corpus]:
    """Load texts by name, the embedded ones by default; reports name columns and rows by text."""
    from sinkwindow_lab.inputs import corpora
    from sinkwindow_lab.reports.tables import plan

    texts = [corpora.load_corpus(name) for name in names or plan.DEFAULT_CORPORA]
    check_distinct("corpus", [text.name for text in texts])
    return texts


def check_distinct(kind: str, names: Sequence[str]) -> None:
    """Check that no name is given twice."""
    if repeated := [name for name in names if names.count(name) > 1]:
        raise LabError(f"{kind} {repeated[0]!r} is given twice; give each one once, and files different names")


def untested_family(loaded: LoadedModel) -> sinkwindow.Family:
    """Return what a cache must be told of a model that is not in the table, after a check of a tiny copy."""
    from sinkwindow_lab.measure.untested import check_untested

    try:
        family = check_untested(loaded.model)
    except sinkwindow.UnsupportedModelError as error:
        raise LabError(str(error)) from error
    say(f"a tiny copy of {loaded.record.name} streams exactly: StreamingCache(model, family={family})")
    return family


def as_json(
    content: dict[str, Any],
    warnings: list[str],
    text: Corpus,
    loaded: LoadedModel,
    ids: TokenText,
    *,
    dated: bool = True,
) -> str:
    """Return results as JSON, with the text, the model and the machine beside them, and the date unless not `dated`."""
    from sinkwindow_lab.inputs import machine

    origin = {"text": ids.record(), "corpus": text.record(), "model": loaded.record}
    origin |= {"machine": machine.describe(loaded.model.device)}
    shown = {name: one.model_dump() for name, one in origin.items()}
    if not dated:
        del shown["machine"]["date"]
    return json.dumps({**content, "warnings": warnings, **shown}, indent=1)
