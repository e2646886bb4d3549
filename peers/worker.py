"""The process of one peer, in its own environment: `python -m peers.worker PEER MODEL IDS THREADS PIPE`.

Read requests from a pipe, `{"do": name, ...arguments}`, and answer each with `{"result": ...}`, `{"refused": why}` or
`{"error": what}`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peers.adapters import Dynamic, IndexSelect, Ours, OursBuffered, Reference, RefusalError, Static
from peers.others import AttentionSinks, KVPress, Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from peers.adapters import Adapter

ADAPTERS: Final[dict[str, type[Adapter]]] = {
    "dynamic": Dynamic,
    "static": Static,
    "ours": Ours,
    "ours_buffered": OursBuffered,
    "reference": Reference,
    "index_select": IndexSelect,
    "attention_sinks": AttentionSinks,
    "sink_cache": Sink,
    "kvpress": KVPress,
}
MEASURES: Final = ("fill", "steps", "attention", "perplexity", "prompt", "chunks", "batch")


def serve(pipe: Connection, calls: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests with functions by name, until there are no more."""
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({"result": calls[request.pop("do")](**request)})
        except RefusalError as refusal:
            pipe.send({"refused": str(refusal)})
        except Exception as error:  # noqa: BLE001 - every failure of a peer becomes a cell of the table
            pipe.send({"error": f"{type(error).__name__}: {first_line(error)}"})


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of Python, torch, transformers and the peer's own packages."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", *packages):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(peer: str, model: str, ids: str, threads: str, pipe: str) -> None:
    """Serve a peer; the first request, `hello`, loads it."""

    def hello() -> dict[str, str]:
        import torch  # noqa: PLC0415 - a broken environment must become an answer

        from peers.measures import Bench  # noqa: PLC0415

        torch.set_num_threads(int(threads))
        torch.set_grad_enabled(False)
        text = torch.tensor([json.loads(Path(ids).read_text(encoding="utf-8"))])
        bench = Bench(ADAPTERS[peer](model), text)
        calls.update({name: getattr(bench, name) for name in MEASURES})
        return versions(bench.adapter.packages)

    calls: dict[str, Callable[..., Any]] = {"hello": hello}
    serve(Connection(int(pipe)), calls)


if __name__ == "__main__":
    main(*sys.argv[1:])
