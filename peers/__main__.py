"""`python -m peers [--quick]`: build the environments, measure, write results/peers.* and docs/peers.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoTokenizer

from peers.client import Client
from peers.environments import HOME, BuildError, interpreter
from peers.plan import FULL, PEERS, QUICK, Plan
from peers.run import failed_row, left_out, measure, say, skipped_row
from peers.table import bars, failures, markdown, verdicts
from sinkwindow_lab.files import output_folder, write_text
from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.inputs.models import EMBEDDED, embedded_folder
from sinkwindow_lab.render import marked

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
DOCUMENT: Final = ROOT / "docs" / "peers.md"
PLACE: Final = "peers"
README: Final = ROOT / "README.md"
BARS_PLACE: Final = "peers-bars"
CORPUS: Final = "shakespeare"
TOKENS: Final = 6144  # more than the longest prompt and the longest text need [tokens]
CHARACTERS: Final = 60_000  # of the text, more than enough for these tokens
THREADS: Final = 2


def export(folder: Path) -> tuple[Path, int]:
    """Write the embedded model as every transformers reads it; return the file of token ids and the weights [bytes]."""
    source, _ = embedded_folder()
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    if not weights.exists() or weights.stat().st_size != (source / weights.name).stat().st_size:
        shutil.copyfile(source / weights.name, weights)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps(readable(config), indent=1))
    text = load_corpus(CORPUS).text[:CHARACTERS]
    ids = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(text).input_ids[:TOKENS]
    write_text(folder / "ids.json", json.dumps(ids))
    return folder / "ids.json", weights.stat().st_size


def readable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the RoPE base and the dtype under the names of both old and new transformers."""
    return {**config, "rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}


def start(key: str, model: Path, ids: Path) -> tuple[Client | None, dict[str, Any]]:
    """Start a peer, or return None, and its row for the record, with the reason."""
    try:
        python = interpreter(key)
    except BuildError as error:
        return None, failed_row(key, f"its environment could not be built: {error}")
    command = (python, "-m", "peers.worker", key, str(model), str(ids), str(THREADS))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH") if python == sys.executable else None])]
    client = Client(command, HOME / f"{key}.log", environment={"PYTHONPATH": os.pathsep.join(paths)})
    say(f"{key}: starting")
    hello = client.ask("hello")
    if "result" not in hello:
        client.close()
        return None, failed_row(key, f"did not start: {hello.get('error', 'no reason given')}")
    return client, {"key": key, "versions": hello["result"], "failure": None, "answers": {}}


def collect(plan: Plan, *, quick: bool) -> dict[str, Any]:
    """Start and measure all peers; return the record, as in results/peers.json."""
    HOME.mkdir(exist_ok=True)
    model = (HOME / "model").resolve()
    ids, weight_bytes = export(model)
    skipped = left_out(quick)
    started = {peer.key: start(peer.key, model, ids) for peer in PEERS if peer.key not in skipped}
    clients = {key: client for key, (client, _) in started.items() if client is not None}
    try:
        answers = measure(clients, plan)
    finally:
        for client in clients.values():
            client.close()
    rows = [
        {**started[peer.key][1], "answers": answers.get(peer.key, {})} if peer.key in started else skipped_row(peer.key)
        for peer in PEERS
    ]
    return {
        "machine": machine.describe(torch.device("cpu")).model_dump(),
        "threads": THREADS,
        "model": EMBEDDED,
        "weight_bytes": weight_bytes,
        "corpus": load_corpus(CORPUS).source,
        "quick": quick,
        "plan": dataclasses.asdict(plan),
        "peers": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print the table; fail if a target is missed, or if a peer failed, which changes no page."""
    parser = argparse.ArgumentParser(prog="peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure less, and skip the slow peers")
    parser.add_argument(
        "--no-docs", action="store_true", help="do not change README.md and docs/peers.md; implied by --quick"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for peers.md and peers.json")
    options = parser.parse_args(arguments)
    out = output_folder(options.out)
    for page, place in ((DOCUMENT, PLACE), (README, BARS_PLACE)):
        marked.check(page, place)
    record = collect(QUICK if options.quick else FULL, quick=options.quick)
    text = markdown(record)
    write_text(out / "peers.json", json.dumps(record, indent=1))
    write_text(out / "peers.md", text)
    failed = failures(record)
    if not (options.quick or options.no_docs or failed):
        marked.fill(DOCUMENT, {PLACE: text})
        marked.fill(README, {BARS_PLACE: bars(record)})
    sys.stdout.write(text)
    missed = [one for one in verdicts(record) if not one.met]
    for one in missed:
        say(f"target missed: {one}")
    for failure in failed:
        say(f"failed: {failure}")
    return bool(missed or failed)


if __name__ == "__main__":
    sys.exit(main())
