"""What each process of `tests/test_distributed.py` does: `python tests/ranks_tp.py FOLDER`, or the same under torchrun.

A single process makes the models, writes them to FOLDER and computes what is expected of them. Ranks load their share
and compute the same. Every process writes what it found to `FOLDER/WORLD-RANK.pt`; the tests compare.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import distributed
from torch.distributed import distributed_c10d
from transformers import DynamicCache
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

import ranks_special
from families import can_be_static
from ranks_models import NAMES, load, make
from sinkwindow import StreamingCache
from strategies import CACHE_NAME, call, stream, tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

WORLDS: Final = (1, 2, 4)
RULE: Final = (2, 6, 3)
CALLS: Final = (11, 1, 1, 14, 2, 1)  # columns; evictions in and between calls
STEPS: Final = (11, *[1] * 8, 5)
MODES: Final[dict[str, dict[str, Any]]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
PATIENCE: Final = timedelta(minutes=5)  # a rank waits as long for the others, which this many processes slow down


def chunks(model: PreTrainedModel, folder: Path, name: str) -> dict[str, Any]:
    """Feed padded rows past evictions; take the last call back, go back to a snapshot, and load a file."""
    total = sum(CALLS)
    ids, mask = tokens(1, 2, total + 3), torch.ones(2, total + 3, dtype=torch.long)
    mask[0, :4] = 0
    cache = StreamingCache(model, *RULE)
    first = stream(model, cache, ids[:, :total], CALLS, mask[:, :total])[mask[:, :total].bool()]
    snapshot = cache.snapshot()
    cache.save(folder / f"{name}.safetensors")
    last = call(model, cache, ids[:, total:], mask)
    found = {"logits": torch.cat([first, last.flatten(0, 1)]), "kept": cache.retained_tokens, "bytes": cache.nbytes}
    if cache.can_crop(3):
        cache.crop(-3)
        found["cropped"] = call(model, cache, ids[:, total:], mask)
    cache.restore(snapshot)
    twins = (cache, StreamingCache.load(folder / f"{name}.safetensors", model))
    return found | {"goes on": all(torch.equal(call(model, one, ids[:, total:], mask), last) for one in twins)}


def static(model: PreTrainedModel) -> dict[str, Any]:
    """Feed steps at fixed shapes past evictions."""
    cache, ids = StreamingCache(model, *RULE, static=True), tokens(2, 2, sum(STEPS))
    return {"static logits": stream(model, cache, ids, STEPS), "static kept": cache.retained_tokens}


def texts(model: PreTrainedModel, modes: Sequence[str]) -> dict[str, Any]:
    """Generate in each mode past evictions, from the same random seed on all ranks."""
    found = {}
    for mode in modes:
        rows = 1 if mode == "prompt lookup" else 2
        ids = tokens(3, rows, 4).repeat(1, 3)
        mask = torch.ones_like(ids)
        mask[0, : 3 * (rows - 1)] = 0
        torch.manual_seed(0)
        common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        common |= {CACHE_NAME: StreamingCache(model, *RULE)}
        found[f"text, {mode}"] = model.generate(ids, **common | MODES[mode])  # type: ignore[operator]
    return found


def stock(model: PreTrainedModel) -> dict[str, Any]:
    """Feed the cache of transformers, which tells an error of ours from one of theirs."""
    cache = DynamicCache(config=model.config)
    return {"stock logits": stream(model, cache, tokens(4, 2, 24), (12, 1, 11))}


def measured(name: str, folder: Path, world: int) -> dict[str, Any]:
    """Return what is compared of a family."""
    how = {"distributed_config": DistributedConfig(tp_size=world)} if world > 1 else {}
    model = load(name, folder / name, **how)
    found = chunks(model, folder / f"files-{world}", name) | stock(model)
    if can_be_static(model):
        found |= static(model)
    if world != WORLDS[-1] or name in ranks_special.ALL_MODES:
        drafts = () if getattr(model, "_is_stateful", False) else ("prompt lookup",)  # transformers refuses them
        found |= texts(model, ("greedy", "sampling", "beams", *drafts))
    return found


def attempt(act: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns, or the text of its error: other families go on."""
    known = set(distributed_c10d._world.pg_map)
    try:
        return act(*arguments)
    except Exception as error:  # noqa: BLE001 - the test shows it
        return f"{type(error).__name__}: {error}"
    finally:  # each model opens six groups with three threads each
        for group in [one for one in distributed_c10d._world.pg_map if one not in known]:
            distributed.destroy_process_group(group)


def main(folder: Path) -> None:
    """Compute everything that the tests look at."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    names = os.environ.get("ONLY", "").split() or NAMES
    if world > 1:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    (folder / f"files-{world}").mkdir(exist_ok=True)
    if world == 1:
        plans = {name: make(name, folder / name) for name in (*names, "uneven")}
    else:
        plans = torch.load(folder / "1-0.pt")["plan"]
    found: dict[str, Any] = {"plan": plans, "families": {}, "special": {}}
    for name in names:
        if plans[name]:
            found["families"][name] = attempt(measured, name, folder, world)
    for name, act in ranks_special.ACTS[world].items():
        found["special"][name] = attempt(act, folder)
    torch.save(found, folder / f"{world}-{rank}.pt")
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    main(Path(sys.argv[1]))
