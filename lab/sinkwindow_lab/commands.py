"""The commands of `sinkwindow`. Results go to standard output or files, progress to standard error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sinkwindow_lab.errors import LabError, check_number, say
from sinkwindow_lab.records import BosPolicy, Configuration, Documents, Measurement, ModelRecord, TextRecord

if TYPE_CHECKING:
    from sinkwindow_lab.inputs.corpora import Corpus
    from sinkwindow_lab.inputs.models import LoadedModel
    from sinkwindow_lab.inputs.tokens import TokenText

app = typer.Typer(
    help="Measures attention sinks with a sliding window: perplexity, speed, memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CORPUS_HELP = "shakespeare, python-docs, wikitext, wikitext-103, pg19, or a text, json, jsonl or parquet file"
Text = Annotated[str, typer.Option("--corpus", help=CORPUS_HELP)]
Model = Annotated[str | None, typer.Option(help="Hub id or folder of a causal LM; the embedded one by default.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")]
Json = Annotated[bool, typer.Option("--json", help="Print the records as JSON.")]
Bos = Annotated[BosPolicy, typer.Option(help="Whether to put the tokenizer's BOS in front of the text.")]
Sinks = Annotated[int, typer.Option(help="S, first tokens to keep.")]
Window = Annotated[int, typer.Option(help="W, most recent tokens to keep in an eviction.")]
Buffer = Annotated[int, typer.Option(help="B, tokens above S + W before an eviction.")]
Config = Annotated[str | None, typer.Option(help="A configuration by name, such as baseline; instead of S, W and B.")]
CallLength = Annotated[int | None, typer.Option(help="Tokens per call; by default a long call, then single tokens.")]
Methods = Literal["token", "blocks", "both"]
Method = Annotated[Methods, typer.Option(help="One token per call, long calls, or both compared.")]
Out = Annotated[Path, typer.Option(help="Folder for the report, and for finished measurements of tables.")]
PARTS = "experiments, mistakes, sinks, sizes, along, steps, where, recall"
Place = tuple[str | None, str, str, bool]  # a model, its device and dtype, and whether to run its code
MOST_THREADS = 1024  # beyond some thousands systems refuse them, and the process ends


@app.command()
def tables(
    model: Model = None,
    corpus: Annotated[list[str] | None, typer.Option(help=f"{CORPUS_HELP}; repeatable.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    configs: Annotated[str | None, typer.Option(help="Rows, separated by commas.")] = None,
    bos: Bos = "none",
    out: Out = Path("results"),
    only: Annotated[str | None, typer.Option(help=f"Parts, separated by commas: {PARTS}.")] = None,
    *,
    trust_remote_code: Trust = False,
    quick: Annotated[bool, typer.Option("--quick", help="The same questions over far fewer tokens.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has finished.")] = False,
) -> None:
    """Measure experiments and studies, and write them as JSON, Markdown, pictures and one HTML page."""
    from sinkwindow_lab import files
    from sinkwindow_lab.inputs import corpora, models
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.reports.output import prepare, write_report
    from sinkwindow_lab.reports.tables import collect, plan
    from sinkwindow_lab.store import Store
    from sinkwindow_lab.ways.configurations import parse_list

    parts = plan.chosen_parts(only)
    rows = parse_list(configs or plan.DEFAULT_CONFIGURATIONS)
    folder = prepare("tables", out)
    models.check_place(device, dtype)
    texts = [corpora.load_corpus(name) for name in corpus or plan.DEFAULT_CORPORA]
    names = [text.name for text in texts]
    if repeated := [name for name in names if names.count(name) > 1]:  # columns are named by corpus
        raise LabError(f"corpus {repeated[0]!r} is given twice; give each text once, and files different names")
    loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    chosen = plan.QUICK if quick else plan.FULL
    with files.alone_in(folder, say):
        store = Store(folder / "measurements", fresh=fresh)
        report = collect.collect(loaded, texts, rows, chosen, parts=parts, bos=bos, store=store, progress=Bars)
        for path in write_report(report, folder):
            say(f"wrote {path}", err=False)
    warn(report.models, report.texts, report.measurements)
    if store.reused:
        typer.echo(f"note: {store.reused} measurements are from an earlier run; --fresh measures again", err=True)


@app.command()
def render(
    source: Annotated[Path, typer.Argument(help="A paper_tables.json, speed.json or gpu_report.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; the file's own by default.")] = None,
) -> None:
    """Write the pages of an earlier run again, from its JSON."""
    from sinkwindow_lab import files
    from sinkwindow_lab.reports.output import prepare, read_report, write_report

    report = read_report(source)
    with files.alone_in(prepare(report.kind, out or source.parent), say):
        try:
            paths = list(write_report(report, out or source.parent))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise LabError(f"{source} lacks what its page needs ({reason}): measure again") from error
    say("\n".join(f"wrote {path}" for path in paths), err=False)


@app.command()
def perplexity(
    corpus: Text = "shakespeare",
    tokens: Annotated[int, typer.Option(help="Tokens read; targets are one fewer per text.")] = 2000,
    sinks: Sinks = 4,
    window: Window = 1020,
    buffer: Buffer = 64,
    config: Config = None,
    method: Method = "blocks",
    block: Annotated[int, typer.Option(help="Tokens per call; streaming gives the same for any.")] = 256,
    bos: Bos = "none",
    documents: Annotated[Documents, typer.Option(help="As one text, or each from a fresh start.")] = "concat",
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    save_nll: Annotated[Path | None, typer.Option(help="Write each target's loss, as safetensors.")] = None,
    *,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Score one configuration on one text, each target once."""
    from sinkwindow_lab import files
    from sinkwindow_lab.measure.perplexity import measure
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.ways import configurations

    chosen = configurations.parse(config) if config else configurations.streaming(sinks, window, buffer)
    check_number("--block=", block, 1)
    target = None if save_nll is None else files.output_file("--save-nll", save_nll)
    asked = f"--config {config}" if config else f"--sinks {sinks} --window {window} --buffer {buffer}"
    place = model, device, dtype, trust_remote_code
    how = {"tokens": tokens, "bos": bos, "documents": documents}
    text, loaded, ids = _read(corpus, place, [chosen], f"--tokens {tokens} {asked}", -1, **how)
    found, ways = {}, ("token", "blocks") if method == "both" else (method,)
    with Bars(len(ways)) as bars:
        for way in ways:
            bars.begin(f"PPL {chosen.name}, {text.name}, {way}", len(ids.targets))
            count = 1 if way == "token" else block
            found[way] = measure(chosen, loaded.model, ids, block=count, on_block=bars.advance)
    *_, main = found.values()
    warnings = warn([loaded.record], [ids.record()], main.measurements("perplexity"))
    content: dict[str, Any] = {"result": main.figures_by_name()}
    lines = [str(one) for one in found.values()]
    if method == "both":
        single = found["token"]
        ratio = single.facts["seconds"] / main.facts["seconds"]
        difference = float((single.nll - main.nll).abs().max())
        numbers = {"speed_ratio": ratio, "largest_nll_difference": difference}
        content |= {"token_by_token": single.figures_by_name(), **numbers}
        lines.append(
            f"blocks of {block} are {ratio:.1f} times as fast as token by token; "
            f"largest difference of a loss {difference:.1e}"
        )
    shown = _as_json(content, warnings, text, loaded, ids)
    if target is not None:
        import torch
        from safetensors.torch import save

        tensors = {f"nll_{way}": one.nll for way, one in found.items()} | {"targets": ids.targets.contiguous()}
        tensors["lengths"] = torch.tensor([one.shape[1] for one in ids.texts])
        files.write_bytes(target, save(tensors, metadata={"records": shown}))
    typer.echo(shown if as_json else "\n".join(lines))


@app.command()
def speed(
    corpus: Text = "shakespeare",
    prompt: Annotated[int, typer.Option(help="Prompt length in tokens; it is the start of the corpus.")] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    configs: Annotated[str, typer.Option(help="Configurations, separated by commas.")] = "baseline,streaming_8_256",
    rounds: Annotated[int, typer.Option(help="How often all generate, interleaved; medians are shown.")] = 1,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    *,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time greedy generation: TTFT, TPOT, throughput, peak memory."""
    from sinkwindow_lab.measure.generation import fed_tokens, generate, rounds_of
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.render.markdown import numbers
    from sinkwindow_lab.ways.configurations import parse_list

    rows = parse_list(configs)
    check_number("--rounds=", rounds, 1)
    asked, more = f"--prompt {prompt} --tokens {tokens}", fed_tokens(0, tokens)
    text, loaded, ids = _read(corpus, (model, device, dtype, trust_remote_code), rows, asked, more, tokens=prompt)
    warnings = warn([loaded.record], [ids.record()])
    made = []
    with Bars(rounds) as bars:
        for _ in range(rounds):
            bars.begin("speed, interleaved", (tokens - 1) * len(rows))
            stages = [[tokens]] * len(rows)
            made.append(generate(rows, loaded.model, ids.ids, stages, on_token=lambda _: bars.advance()))
    found = [rounds_of([one[row][0] for one in made], loaded.record.name) for row in range(len(rows))]
    if as_json:
        typer.echo(
            _as_json({"result": [one.model_dump() for own in found for one in own]}, warnings, text, loaded, ids)
        )
        return
    for own in found:
        shown = {one.metric: one.samples for one in own}
        peak = f"  {max(shown['peak memory']) / 1e9:.3f} GB" if "peak memory" in shown else ""
        typer.echo(
            f"{own[0].configuration}: TTFT {numbers(shown['TTFT'], 3)} s  TPOT {numbers(shown['TPOT'], 2)} ms  "
            f"total {numbers(shown['total'], 2)} s  {numbers(shown['throughput'], 2)} tok/s{peak}"
        )


@app.command()
def mechanics(
    sinks: Sinks = 8,
    window: Window = 256,
    buffer: Buffer = 64,
    evictions: Annotated[int, typer.Option(help="Stop after this many.")] = 3,
) -> None:
    """Show the cache's shape step by step on a tiny random model, with each eviction."""
    from sinkwindow_lab.measure.mechanics import log

    for line in log(sinks, window, buffer, evictions=evictions):
        typer.echo(line)


@app.command()
def verify(
    tokens: Annotated[int, typer.Option(help="Tokens read.")] = 512,
    sinks: Sinks = 4,
    window: Window = 128,
    buffer: Buffer = 16,
    call_length: CallLength = None,
    corpus: Text = "python-docs",
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    *,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Compare the cache with the slow reference on a model; the exit status is 1 if the cache is wrong."""
    from sinkwindow_lab.measure import verify as check
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.ways.configurations import streaming

    rule = streaming(sinks, window, buffer)
    check.call_lengths(rule, tokens, call_length)
    asked = f"--tokens {tokens} --sinks {sinks} --window {window} --buffer {buffer}"
    text, loaded, ids = _read(corpus, (model, device, dtype, trust_remote_code), [rule], asked, 0, tokens=tokens)
    check.call_lengths(rule, ids.ids.shape[1], call_length, f"corpus {text.name!r}, tokens:")  # it may end before
    warnings = warn([loaded.record], [ids.record()])
    with Bars(check.PASSES) as bars:
        found = check.verify(loaded.model, ids.ids, rule, call_length=call_length, progress=bars)
    result = {"result": {"right": found.right, **found.model_dump()}}
    words = f"{loaded.record.name}, {text.name}\n{found}"
    typer.echo(_as_json(result, warnings, text, loaded, ids) if as_json else words)
    if not found.right:
        raise typer.Exit(1)


@app.command()
def configs() -> None:
    """List the forms of configuration names and what they mean."""
    from sinkwindow_lab.ways.configurations import MEANINGS, SHAPES

    width = max(len(shape.example) for shape in SHAPES)
    for shape in SHAPES:
        typer.echo(f"{shape.example:<{width}}  {MEANINGS[shape.kind]}")


@app.command()
def floors(
    model: Model = None,
    shape: Annotated[str | None, typer.Option(help="A shape with random weights instead, such as pythia-160m.")] = None,
    context: Annotated[int, typer.Option(help="Keys of the attention, in tokens.")] = 1024,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    megabytes: Annotated[float, typer.Option(help="Tensor for the bandwidth, in MB.")] = 512.0,
    *,
    trust_remote_code: Trust = False,
) -> None:
    """Measure what no cache can beat here: bare attention, a step with almost no context, memory bandwidth."""
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.inputs.shapes import random_model
    from sinkwindow_lab.measure.requirements import check_memory, memory
    from sinkwindow_lab.reports.speed import compare, page
    from sinkwindow_lab.reports.speed import floors as measured

    for name, value in (("context", context), ("batch", batch)):
        check_number(f"--{name} ", value, 1)
    place, kind = models.check_place(device, dtype)
    check_number("--megabytes ", megabytes, 0, memory(place) // 2_000_000)  # read and written
    if shape is None:
        loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        chosen, title = loaded.model, loaded.record.name
    else:
        chosen, title = random_model(shape, device=place, dtype=kind), f"{shape} shape"
    check_memory(chosen, context * batch, f"--context {context} --batch {batch}")
    found = measured.bandwidth(place, megabytes=megabytes) + measured.floors(chosen, title, context, batch)
    typer.echo(page.floor_tables(compare.places(found)))


@app.command()
def speed_report(
    out: Out = Path("results"),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    docs: Annotated[Path | None, typer.Option(help="A Markdown file with marked tables to rewrite.")] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and few samples; nothing is judged.")] = False,
) -> None:
    """Measure the cache and its lower bounds; fail if a target is missed, naming each with its number."""
    from sinkwindow_lab.files import output_file
    from sinkwindow_lab.render import marked
    from sinkwindow_lab.reports.output import writer
    from sinkwindow_lab.reports.speed import collect, compare, page

    check_number("--threads ", threads, 1, MOST_THREADS)
    if docs is not None:
        output_file("--docs", docs)
        marked.check(docs, page.VERDICT)
    with writer("speed", out) as save:
        report = collect.speed(quick=quick, threads=threads, save=save, say=say)
    if docs is not None:
        marked.fill(docs, page.sections(report))
    _judge([] if quick else [one.complaint() for one in compare.comparisons(report) if not one.met])


@app.command()
def gpu_report(
    out: Out,
    minutes: Annotated[float, typer.Option(help="Time for everything; what does not fit is skipped and named.")] = 7.5,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU by default if there is one.")] = None,
) -> None:
    """Measure large shapes on a GPU, without network, and check the cache there; without a GPU, tiny shapes."""
    from sinkwindow_lab.reports.output import writer
    from sinkwindow_lab.reports.speed import collect, page

    if not minutes > 0:
        raise LabError(f"--minutes {minutes} must be above 0")
    with writer("gpu", out) as save:
        report = collect.gpu(minutes=minutes, save=save, say=say, device=device)
    _judge(page.broken(report))


def warn(
    models: Sequence[ModelRecord], texts: Sequence[TextRecord], measurements: Sequence[Measurement] = ()
) -> list[str]:
    """Show what is doubtful about the numbers, and return it."""
    from sinkwindow_lab.render.origins import doubts

    found = doubts(models, texts, measurements)
    for one in found:
        say(f"warning: {one}")
    return found


def _read(
    corpus: str, place: Place, ways: Sequence[Configuration], asked: str, more: int, **how: Any
) -> tuple[Corpus, LoadedModel, TokenText]:
    """Load a text and a model, and check that `ways` can read the text and `more` tokens; `how` is of `encode`."""
    from sinkwindow_lab.inputs import corpora, models
    from sinkwindow_lab.inputs.tokens import encode
    from sinkwindow_lab.measure import requirements

    model, device, dtype, trust = place
    models.check_place(device, dtype)
    text = corpora.load_corpus(corpus)
    loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust)
    ids = encode(text, loaded.tokenizer, **how)
    loaded.check_ids(ids)
    requirements.check(ways, loaded.model, max(one.shape[1] for one in ids.texts) + more, asked)
    return text, loaded, ids


def _as_json(content: dict[str, Any], warnings: list[str], text: Corpus, loaded: LoadedModel, ids: TokenText) -> str:
    """Return results as JSON, with the text, the model and the machine beside them."""
    from sinkwindow_lab.inputs import machine

    origin = {"text": ids.record(), "corpus": text.record(), "model": loaded.record}
    origin |= {"machine": machine.describe(loaded.model.device)}
    shown = {name: one.model_dump() for name, one in origin.items()}
    return json.dumps({**content, "warnings": warnings, **shown}, indent=1)


def _judge(complaints: Sequence[str]) -> None:
    if complaints:
        say("\n".join(f"missed: {one}" for one in complaints))
        raise typer.Exit(1)
