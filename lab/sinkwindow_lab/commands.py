"""The commands of `sinkwindow`. Results go to standard output or files, progress to standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkwindow_lab import speed_commands
from sinkwindow_lab.errors import LabError

if TYPE_CHECKING:
    from sinkwindow_lab.measure.methods import Scores
    from sinkwindow_lab.records import BosPolicy, Documents, PerplexityRecord, SpeedRecord
    from sinkwindow_lab.ways.configurations import Configuration

app = typer.Typer(
    help="Measures attention sinks with a sliding window: perplexity, speed, memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option(help="Hub id or folder of a causal LM; the embedded one by default.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")]
Json = Annotated[bool, typer.Option("--json", help="Print the records as JSON.")]
Bos = Annotated[str, typer.Option(help="none, or add: put the tokenizer's BOS in front of the text.")]
Sinks = Annotated[int, typer.Option(help="S, first tokens to keep.")]
Window = Annotated[int, typer.Option(help="W, most recent tokens to keep in an eviction.")]
Buffer = Annotated[int, typer.Option(help="B, tokens above S + W before an eviction.")]
Config = Annotated[str | None, typer.Option(help="A configuration by name, such as baseline; instead of S, W and B.")]
PARTS = "experiments, mistakes, sinks, sizes, along, steps, where, recall"
CORPUS_HELP = "shakespeare, python-docs, wikitext, wikitext-103, pg19, or a text, jsonl or parquet file"


@app.command()
def tables(
    model: Model = None,
    corpus: Annotated[list[str] | None, typer.Option(help=f"{CORPUS_HELP}; repeatable.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    configs: Annotated[str | None, typer.Option(help="Rows, separated by commas.")] = None,
    bos: Bos = "none",
    out: Annotated[Path, typer.Option(help="Folder for the report and for finished measurements.")] = Path("results"),
    only: Annotated[str | None, typer.Option(help=f"Parts, separated by commas: {PARTS}.")] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="The same questions over far fewer tokens.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run has finished.")] = False,
) -> None:
    """Measure experiments and studies, and write them as JSON, Markdown, pictures and one HTML page."""
    from sinkwindow_lab import files
    from sinkwindow_lab.inputs import corpora, models
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.render import output
    from sinkwindow_lab.reports import experiments
    from sinkwindow_lab.reports.studies.collect import chosen_parts
    from sinkwindow_lab.store import Store
    from sinkwindow_lab.ways import configurations

    parts = chosen_parts(only)
    rows = configurations.parse_list(configs or experiments.DEFAULT_CONFIGURATIONS)
    policy = _bos(bos)
    folder = files.output_folder(out)
    texts = [corpora.load_corpus(name) for name in corpus or experiments.DEFAULT_CORPORA]
    _check_names([text.name for text in texts])
    loaded = models.load_model(model, device=device, dtype=dtype)
    plan = experiments.QUICK if quick else experiments.FULL
    store = Store(folder / "measurements", fresh=fresh)
    with Bars(experiments.count_measurements(plan, rows, len(texts), parts)) as bars:
        report = experiments.run(loaded, texts, rows, plan, bos=policy, reporter=bars, parts=parts, store=store)
    for path in output.write_report(report, folder):
        typer.echo(f"wrote {path}")
    if store.reused:
        typer.echo(f"note: {store.reused} measurements are from an earlier run; --fresh measures again", err=True)


@app.command()
def render(
    source: Annotated[Path, typer.Argument(help="A paper_tables.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; the file's own by default.")] = None,
) -> None:
    """Write the pages of an earlier run again, from its JSON."""
    from sinkwindow_lab import files
    from sinkwindow_lab.render import output

    report = output.read_report(source)
    for path in output.write_report(report, files.output_folder(out or source.parent)):
        typer.echo(f"wrote {path}")


@app.command()
def perplexity(
    corpus: Annotated[str, typer.Option(help=CORPUS_HELP)] = "shakespeare",
    tokens: Annotated[int, typer.Option(help="Tokens read; targets are one fewer per text.")] = 2000,
    sinks: Sinks = 4,
    window: Window = 1020,
    buffer: Buffer = 64,
    config: Config = None,
    method: Annotated[str, typer.Option(help="token: one per call; blocks: long calls; both: and compare.")] = "blocks",
    block: Annotated[int, typer.Option(help="Tokens per call; streaming gives the same for any.")] = 256,
    bos: Bos = "none",
    documents: Annotated[str, typer.Option(help="concat: as one text; apart: each from a fresh start.")] = "concat",
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    save_nll: Annotated[Path | None, typer.Option(help="Write each target's loss, as safetensors.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Score one configuration on one text, each target once."""
    from sinkwindow_lab import files
    from sinkwindow_lab.inputs import corpora, machine, models
    from sinkwindow_lab.inputs.tokens import encode
    from sinkwindow_lab.measure import methods
    from sinkwindow_lab.progress import Bars

    chosen, ways = _configuration(config, sinks, window, buffer), methods.methods(method)
    policy, reading = _bos(bos), _documents(documents)
    target = None if save_nll is None else files.output_file("--save-nll", save_nll)
    text = corpora.load_corpus(corpus)
    loaded = models.load_model(model, device=device, dtype=dtype)
    ids = encode(text, loaded.tokenizer, tokens=tokens, bos=policy, documents=reading)
    if ids.ids.shape[1] < tokens:
        typer.echo(f"note: corpus {text.name!r} has {ids.ids.shape[1]} tokens, {tokens} were requested", err=True)
    with Bars(len(ways)) as bars:
        scores = methods.score(chosen, loaded, ids, ways, block=block, reporter=bars)
    origin = {"corpus": text.record(), "model": loaded.record, "machine": machine.describe(loaded.model.device)}
    shown = _scores_json(scores, **origin)
    if target is not None:
        methods.save_losses(target, scores, ids, records=shown)
    typer.echo(shown if as_json else _scores_lines(scores))


@app.command()
def speed(
    corpus: Annotated[str, typer.Option(help=f"Where the prompt comes from: {CORPUS_HELP}.")] = "shakespeare",
    prompt: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    configs: Annotated[str, typer.Option(help="Configurations, separated by commas.")] = "baseline,streaming_8_256",
    rounds: Annotated[int, typer.Option(help="How often all generate, interleaved; medians are shown.")] = 1,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    *,
    as_json: Json = False,
) -> None:
    """Time greedy generation: TTFT, TPOT, throughput, peak memory."""
    from sinkwindow_lab.inputs import corpora, machine, models
    from sinkwindow_lab.inputs.tokens import encode
    from sinkwindow_lab.measure import speed as timing
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.ways import configurations

    rows = configurations.parse_list(configs)
    text = corpora.load_corpus(corpus)
    loaded = models.load_model(model, device=device, dtype=dtype)
    ids = encode(text, loaded.tokenizer, tokens=prompt)
    with Bars(max(rounds, 1)) as bars:
        records = timing.measure(
            rows,
            loaded.model,
            ids.ids,
            tokens,
            rounds=rounds,
            on_round=lambda _: bars.begin("speed, interleaved", tokens * len(rows)),
            on_token=lambda _: bars.advance(),
        )
    origin = {"corpus": text.record(), "model": loaded.record, "machine": machine.describe(loaded.model.device)}
    typer.echo(_as_json(records, **origin) if as_json else "\n".join(map(_speed_line, records)))


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
def configs() -> None:
    """List the forms of configuration names and what they mean."""
    from sinkwindow_lab.ways.configurations import SHAPES

    width = max(len(shape.example) for shape in SHAPES)
    for shape in SHAPES:
        typer.echo(f"{shape.example:<{width}}  {shape.meaning}")


app.command()(speed_commands.floors)
app.command()(speed_commands.speed_report)
app.command()(speed_commands.gpu_report)


def _configuration(name: str | None, sinks: int, window: int, buffer: int) -> Configuration:
    from sinkwindow_lab.ways import configurations

    return configurations.streaming(sinks, window, buffer) if name is None else configurations.parse(name)


def _bos(policy: str) -> BosPolicy:
    if policy == "none":
        return "none"
    if policy == "add":
        return "add"
    raise LabError(f"--bos {policy} is unknown; choose none or add")


def _documents(name: str) -> Documents:
    if name == "concat":
        return "concat"
    if name == "apart":
        return "apart"
    raise LabError(f"--documents {name} is unknown; choose concat or apart")


def _check_names(names: list[str]) -> None:
    """Refuse two texts of one name: they could not be told apart, since columns are named by corpus."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LabError(f"corpus {repeated[0]!r} is given twice; give each text once, and files different names")


def _as_json(result: Any, **records: Any) -> str:
    content = [one.model_dump() for one in result] if isinstance(result, list) else result.model_dump()
    return json.dumps({"result": content, **{name: one.model_dump() for name, one in records.items()}}, indent=1)


def _scores_json(scores: Scores, **records: Any) -> str:
    content: dict[str, Any] = {"result": scores.main.record.model_dump()}
    if scores.speed_ratio is not None:
        content["token_by_token"] = scores.found["token"].record.model_dump()
        content["speed_ratio"] = scores.speed_ratio
        content["largest_nll_difference"] = scores.largest_difference
    return json.dumps({**content, **{name: one.model_dump() for name, one in records.items()}}, indent=1)


def _scores_lines(scores: Scores) -> str:
    lines = [_perplexity_line(one.record) for one in scores.found.values()]
    if scores.speed_ratio is not None:
        lines.append(
            f"blocks of {scores.main.record.block} are {scores.speed_ratio:.1f} times as fast as token by token; "
            f"largest difference of a loss {scores.largest_difference:.1e}"
        )
    return "\n".join(lines)


def _perplexity_line(record: PerplexityRecord) -> str:
    return (
        f"PPL {record.perplexity:.4f}  NLL {record.mean_nll:.5f} +- {record.standard_error:.5f}  "
        f"{record.bits_per_byte:.4f} bits/byte  {record.targets:,} targets  {record.evictions} evictions  "
        f"{record.tokens_per_second:.1f} tok/s  ({record.configuration}, {record.corpus}, "
        f"{record.block} tok/call)"
    )


def _speed_line(record: SpeedRecord) -> str:
    return (
        f"{record.configuration}: TTFT {record.median('ttft_s'):.3f} s  TPOT {record.median('tpot_ms'):.2f} ms  "
        f"total {record.median('total_s'):.2f} s  {record.median('throughput'):.2f} tok/s"
        + ("" if record.peak_gb is None else f"  {record.peak_gb:.3f} GB")
    )
