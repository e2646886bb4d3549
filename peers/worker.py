"""The process of one peer, in its own environment: `python -m peers.worker PEER MODEL IDS THREADS`.

Read one JSON object per line, `{"do": name, ...arguments}`, and answer each with `{"result": ...}`, `{"refused": why}`
or `{"error": what}`. The output of libraries goes to standard error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from peers.adapters import Dynamic, IndexSelect, Ours, OursBuffered, Reference, RefusalError, Static
from peers.others import AttentionSinks, KVPress, Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

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


def serve(
    lines: Iterable[str], answer: Callable[[dict[str, Any]], None], calls: Mapping[str, Callable[..., Any]]
) -> None:
    """Answer requests until there are no more.

    Args:
        lines: requests, one JSON object each.
        answer: called with each answer.
        calls: functions that can be requested, by name.
    """
    for line in lines:
        request = json.loads(line)
        try:
            answer({"result": calls[request.pop("do")](**request)})
        except RefusalError as refusal:
            answer({"refused": str(refusal)})
        except Exception as error:  # noqa: BLE001 - every failure of a peer becomes a cell of the table
            answer({"error": f"{type(error).__name__}: {first_line(error)}"})


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


def quiet_stdout() -> IO[str]:
    """Return standard output for the answers, and send everything else that is printed to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def main(peer: str, model: str, ids: str, threads: int) -> None:
    """Serve a peer; the first request, `hello`, loads it.

    Args:
        peer: a key of `ADAPTERS`.
        model: folder of the weights.
        ids: JSON file with token ids.
        threads: number of threads for torch.
    """
    channel = quiet_stdout()

    def answer(what: dict[str, Any]) -> None:
        channel.write(json.dumps(what) + "\n")
        channel.flush()

    def hello() -> dict[str, str]:
        import torch  # noqa: PLC0415 - a broken environment must become an answer

        from peers.measures import Bench  # noqa: PLC0415

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        text = torch.tensor([json.loads(Path(ids).read_text(encoding="utf-8"))])
        bench = Bench(ADAPTERS[peer](model), text)
        calls.update({name: getattr(bench, name) for name in MEASURES})
        return versions(bench.adapter.packages)

    calls: dict[str, Callable[..., Any]] = {"hello": hello}
    serve(sys.stdin, answer, calls)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
