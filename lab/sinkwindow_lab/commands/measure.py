"""Commands that measure a model on texts."""

from __future__ import annotations

import functools
import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sinkwindow_lab.commands.options import (
    CORPUS_HELP,
    Buffer,
    Device,
    Dtype,
    Json,
    Model,
    Out,
    Sinks,
    Text,
    Trust,
    Untested,
    Window,
    app,
    as_json,
    check_distinct,
    read,
    read_texts,
    untested_family,
    warn,
)
from sinkwindow_lab.errors import LabError, check_number, keeping, say
from sinkwindow_lab.records import BosPolicy, Documents, measured

if TYPE_CHECKING:
    from sinkwindow_lab.measure.perplexity import Score
    from sinkwindow_lab.store import Store

command = functools.partial(app.command, rich_help_panel="Measure")

Bos = Annotated[BosPolicy, typer.Option(help="Whether to put the tokenizer's BOS in front of the text.")]
Config = Annotated[
    str | None, typer.Option(help="Configurations by name, separated by commas, such as baseline; not S, W and B.")
]
Keep = Annotated[
    Path | None,
    typer.Option(help="Folder of finished readings, for the same command to continue; several processes need one."),
]
NoTimes = Annotated[
    bool, typer.Option("--no-times", help="Leave out seconds and the date: equal results are equal files.")
]
CallLength = Annotated[int | None, typer.Option(help="Tokens per call; by default a long call, then single tokens.")]
Method = Annotated[
    Literal["token", "blocks", "both"], typer.Option(help="One token per call, long calls, or both compared.")
]
Texts = Annotated[list[str] | None, typer.Option("--corpus", help=f"{CORPUS_HELP}; repeatable.")]
PARTS = "experiments, mistakes, sinks, sizes, along, steps, where, recall"


@command()
def perplexity(
    context: typer.Context,
    corpus: Text = "shakespeare",
    tokens: Annotated[int, typer.Option(help="Tokens read; targets are one fewer per text.")] = 2000,
    sinks: Sinks = 4,
    window: Window = 1020,
    buffer: Buffer = 64,
    config: Config = None,
    method: Method = "blocks",
    block: Annotated[int, typer.Option(help="Tokens per call of --method blocks; any gives the same.")] = 256,
    bos: Bos = "none",
    documents: Annotated[Documents, typer.Option(help="As one text, or each from a fresh start.")] = "concat",
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    save_nll: Annotated[Path | None, typer.Option(help="Write each target's loss, as safetensors.")] = None,
    *,
    keep: Keep = None,
    no_times: NoTimes = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Score configurations on one text.

    Each target is scored once; PPL is the exponential of the mean loss. torchrun and accelerate share it out: a
    configuration, and with --documents apart each text of it, goes to the next free process.
    """
    from sinkwindow_lab import files
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.ranks import current
    from sinkwindow_lab.reports.tables.bench import Bench
    from sinkwindow_lab.store import Store
    from sinkwindow_lab.ways import configurations

    _check_given_once(context, config, method)
    rows = configurations.parse_list(config) if config else [configurations.streaming(sinks, window, buffer)]
    if method == "both" and len(rows) > 1:
        raise LabError("--method both compares the calls of one configuration: give one")
    if keep is None and (group := current()):
        raise LabError(f"--keep: {group.size} processes need a folder for what they have finished: give one")
    check_number("--block=", block, 1)
    target = None if save_nll is None else files.output_file("--save-nll", save_nll)
    asked = f"--config {config}" if config else f"--sinks {sinks} --window {window} --buffer {buffer}"
    place = model, device, dtype, trust_remote_code
    how = {"tokens": tokens, "bos": bos, "documents": documents}
    text, loaded, ids = read(corpus, place, rows, f"--tokens {tokens} {asked}", -1, **how)
    ways = {"token": 1, "blocks": block} if method == "both" else {method: 1 if method == "token" else block}
    bench = Bench(loaded, [text], bos, Store(keep), timed=not no_times)
    found = {}
    with keeping(bench.store.__str__) if keep else nullcontext():
        if group := current():
            pairs = itertools.product(rows, ways.values())
            bench.shared_by(group, [one for row, count in pairs for one in bench.units_of_text(row, ids, count)], [ids])
        with Bars(len(rows) * len(ways)) as bench.reporter:
            for row, (way, count) in itertools.product(rows, ways.items()):
                bench.reporter.begin(f"PPL {row.name}, {text.name}, {way}", len(ids.targets))
                found[way if len(rows) == 1 else f"{way}_{row.name}"] = bench.score_pieces(row, ids, count)
    scores = [*found.values()]
    warnings = warn([loaded.record], [ids.record()], [one for own in scores for one in own.measurements("perplexity")])
    figures = [one.figures_by_name() for one in scores]
    content: dict[str, Any] = {"result": figures if len(rows) > 1 else figures[-1]}
    lines = [str(one) for one in scores]
    if method == "both":
        compared = _compare(*scores)
        content |= {"token_by_token": figures[0], **compared}
        lines.append(f"largest difference of a loss {compared['largest_nll_difference']:.1e}")
        if "speed_ratio" in compared:
            faster = f"blocks of {block} are {compared['speed_ratio']:.1f} times as fast as token by token"
            lines[-1] = f"{faster}; {lines[-1]}"
    shown = as_json(content, warnings, text, loaded, ids, dated=not no_times)
    if target is not None:
        import torch
        from safetensors.torch import save

        tensors = {f"nll_{way}": one.nll for way, one in found.items()} | {"targets": ids.targets.contiguous()}
        tensors["lengths"] = torch.tensor([one.shape[1] for one in ids.texts])
        files.write_bytes(target, save(tensors, metadata={"records": shown}))
    typer.echo(shown if json else "\n".join(lines))
    _note_reused(bench.store, "readings", "without --keep all are read again")


def _compare(token: Score, blocks: Score) -> dict[str, float]:
    found = {"largest_nll_difference": float((token.nll - blocks.nll).abs().max())}
    if "seconds" in token.facts and "seconds" in blocks.facts:
        found["speed_ratio"] = token.facts["seconds"] / blocks.facts["seconds"]
    return found


def _check_given_once(context: typer.Context, config: str | None, method: Method) -> None:
    sources = {f"--{one}": context.get_parameter_source(one) for one in ("sinks", "window", "buffer", "block")}
    given = [option for option, source in sources.items() if source and source.name != "DEFAULT"]
    if config and given not in ([], ["--block"]):
        raise LabError(f"--config {config} and {given[0]} both say what is kept: give one of them")
    if method == "token" and "--block" in given:
        raise LabError("--block and --method token both say how long calls are: give one of them")


def _note_reused(store: Store, what: str, otherwise: str) -> None:
    if store.reused:
        say(f"note: {store.reused} {what} are from an earlier run; {otherwise}")


@command()
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
    json: Json = False,
) -> None:
    """Time greedy generation.

    Shown are TTFT, TPOT, throughput and peak memory.
    """
    from sinkwindow_lab.measure.generation import fed_tokens, generate, together
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.render.markdown import numbers
    from sinkwindow_lab.ways.configurations import parse_list

    rows = parse_list(configs)
    check_number("--prompt ", prompt, 2)
    check_number("--rounds=", rounds, 1)
    asked, more = f"--prompt {prompt} --tokens {tokens}", fed_tokens(0, tokens)
    text, loaded, ids = read(corpus, (model, device, dtype, trust_remote_code), rows, asked, more, tokens=prompt)
    warnings = warn([loaded.record], [ids.record()])
    made = []
    with Bars(rounds) as bars:
        for _ in range(rounds):
            bars.begin("speed, interleaved", (tokens - 1) * len(rows))
            stages = [[tokens]] * len(rows)
            made.append(generate(rows, loaded.model, ids.ids, stages, on_token=lambda _: bars.advance()))
    found = [
        measured("speed", loaded.record.name, way.name, tokens, together([one[tokens] for one in rounds_of_way]))
        for way, rounds_of_way in zip(rows, zip(*made, strict=True), strict=True)
    ]
    if json:
        typer.echo(as_json({"result": [one.model_dump() for own in found for one in own]}, warnings, text, loaded, ids))
        return
    for own in found:
        shown = {one.metric: one.samples for one in own}
        peak = f"  {max(shown['peak memory']) / 1e9:.3f} GB" if "peak memory" in shown else ""
        typer.echo(
            f"{own[0].configuration}: TTFT {numbers(shown['TTFT'], 3)} s  TPOT {numbers(shown['TPOT'], 2)} ms  "
            f"total {numbers(shown['total'], 2)} s  {numbers(shown['throughput'], 2)} tok/s{peak}"
        )


@command()
def tables(
    model: Model = None,
    corpus: Texts = None,
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
    """Measure everything, and write a report.

    Experiments and studies become JSON, Markdown, pictures and one HTML page.
    """
    from sinkwindow_lab import files
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.ranks import current
    from sinkwindow_lab.reports.output import prepare, write_report
    from sinkwindow_lab.reports.tables import collect, plan
    from sinkwindow_lab.store import Store
    from sinkwindow_lab.ways.configurations import parse_list

    parts = plan.chosen_parts(only)
    rows = parse_list(configs or plan.DEFAULT_CONFIGURATIONS)
    folder = prepare("tables", out)
    models.check_place(device, dtype)
    texts = read_texts(corpus)
    loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    chosen = plan.QUICK if quick else plan.FULL
    group = current()
    with nullcontext() if group and group.rank else files.alone_in(folder, say):  # rank 0 locks it for all
        store = Store(folder / "measurements", fresh=fresh)
        with keeping(store.__str__):
            report = collect.collect(
                loaded, texts, rows, chosen, parts=parts, bos=bos, store=store, progress=Bars, group=group
            )
        for path in write_report(report, folder):
            say(f"wrote {path}", err=False)
    warn(report.models, report.texts, report.measurements)
    _note_reused(store, "measurements", "--fresh measures again")


@command()
def sinks(
    model: Annotated[list[str] | None, typer.Option(help="Hub id or folder; embedded by default; repeatable.")] = None,
    corpus: Texts = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens read of each text; 2,000 by default.")] = None,
    size: Annotated[int | None, typer.Option(help="S + W of every cache, in tokens; 256 by default.")] = None,
    bos: Bos = "none",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Out = Path("results"),
    *,
    trust_remote_code: Trust = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens, and a smaller cache.")] = False,
) -> None:
    """Ask whether models need sinks.

    PPL with 0, 1, 4 and 8 of them, and where attention goes, of each model on each text.
    """
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.reports import sinks as study
    from sinkwindow_lab.reports.output import writer

    chosen = study.QUICK if quick else study.FULL
    chosen = study.Plan(chosen.size if size is None else size, chosen.tokens if tokens is None else tokens)
    check_number("--size ", chosen.size, max(study.COUNTS) + 1)
    check_number("--tokens ", chosen.tokens, 2)
    check_distinct("model", model or ())
    models.check_place(device, dtype)
    load = functools.partial(models.load_model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    texts = read_texts(corpus)
    with writer("sinks", out) as save:
        study.collect(model or [None], texts, chosen, load=load, bos=bos, save=save, progress=Bars)


@command()
def evaluate(
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of lm-eval, separated by commas.")] = "sinkwindow",
    configs: Annotated[str, typer.Option(help="Configurations, separated by commas.")] = "baseline,streaming_4_256",
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests read at once.")] = 1,
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Out = Path("results"),
    *,
    trust_remote_code: Trust = False,
) -> None:
    """Run tasks of lm-evaluation-harness.

    A table compares configurations. Needs the extra `eval` of sinkwindow.
    """
    from sinkwindow_lab.evaluation import run
    from sinkwindow_lab.inputs import models
    from sinkwindow_lab.reports.output import writer
    from sinkwindow_lab.ways.configurations import parse_list

    rows, names = parse_list(configs), [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise LabError(f"--tasks {tasks!r} names no task")
    for option, value in (("--limit=", 1 if limit is None else limit), ("--batch-size=", batch_size)):
        check_number(option, value, 1)
    models.check_place(device, dtype)
    with writer("lm-eval", out) as save:
        loaded = models.load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        save(run.evaluate(loaded, rows, names, limit=limit, batch_size=batch_size))


@command()
def render(
    source: Annotated[
        Path, typer.Argument(help="A paper_tables.json, speed.json, gpu_report.json, lm_eval.json or sinks.json.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages; the file's own by default.")] = None,
) -> None:
    """Write the pages of an earlier run again.

    They are made from its JSON; nothing is measured.
    """
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


@command()
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
    untested: Untested = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Compare the cache with the reference.

    Both run on your model; the exit status is 1 if the cache is wrong.
    """
    from sinkwindow_lab.measure import verify as check
    from sinkwindow_lab.progress import Bars
    from sinkwindow_lab.ways.configurations import streaming

    rule = streaming(sinks, window, buffer)
    check.call_lengths(rule, tokens, call_length)
    asked = f"--tokens {tokens} --sinks {sinks} --window {window} --buffer {buffer}"
    ways = [] if untested else [rule]
    text, loaded, ids = read(corpus, (model, device, dtype, trust_remote_code), ways, asked, 0, tokens=tokens)
    family = untested_family(loaded) if untested else None
    check.call_lengths(rule, ids.ids.shape[1], call_length, f"corpus {text.name!r}, tokens:")  # it may end before
    warnings = warn([loaded.record], [ids.record()])
    with Bars(check.PASSES) as bars:
        found = check.verify(loaded.model, ids.ids, rule, call_length=call_length, family=family, progress=bars)
    result = {"result": {"right": found.right, **found.model_dump()}}
    words = f"{loaded.record.name}, {text.name}\n{found}"
    typer.echo(as_json(result, warnings, text, loaded, ids) if json else words)
    if not found.right:
        raise typer.Exit(1)
