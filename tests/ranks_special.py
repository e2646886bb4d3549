"""What `tests/ranks_tp.py` does besides: ways to run and to split a model, and what is refused of each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig

from documents import save_stand_in
from ranks_models import load
from sinkwindow import Chat, StreamingCache, supports
from strategies import CACHE_NAME, observe, stream, tokens
from test_generate_modes import MODES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

ALL_MODES: Final = ("llama", "gpt_neox", "phi3", "qwen3_moe", "gemma3_text", "qwen3_next")  # a plan of each kind
RULE: Final = (2, 6, 3)
CALLS: Final = (11, 1, 1, 14, 2, 1)
IDS: Final = tokens(5, 2, sum(CALLS))


def split(name: str, folder: Path, **sizes: int) -> PreTrainedModel:
    """Load a model that is split in some way."""
    return load(name, folder / name, distributed_config=DistributedConfig(**sizes))  # type: ignore[arg-type]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of two logits, relative to the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def error(model: Any, name: str, folder: Path, cache: StreamingCache, ids: Tensor = IDS) -> float:
    """Return how far a cache's logits are from those of a whole model."""
    whole = load(name, folder / name)
    return relative(stream(model, cache, ids, CALLS), stream(whole, StreamingCache(whole, *RULE), ids, CALLS))


def refusal(act: Callable[[], Any]) -> str:
    """Return the text of the error that something raises."""
    try:
        act()
    except (OSError, RuntimeError, ValueError) as found:
        return f"{type(found).__name__}: {found}"
    return "nothing was raised"


def world() -> int:
    """Return the number of ranks."""
    return distributed.get_world_size()


# -- ways to run --------------------------------------------------------------------------------------------------


def every_mode(folder: Path) -> dict[str, Any]:
    """Generate in all modes, and with an assistant that is on every rank."""
    whole = load("llama", folder / "llama")
    model = split("llama", folder, tp_size=world()) if distributed.is_initialized() else whole
    ids, found = tokens(6, 2, 14), {}
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for mode, arguments in MODES.items():
        torch.manual_seed(1)
        common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        own = {CACHE_NAME: StreamingCache(model, *RULE)}
        found[mode] = model.generate(ids, **common | arguments | own)  # type: ignore[operator]
    for name, static in (("assistant", False), ("static, chunks of the prompt", True)):
        more = {"prefill_chunk_size": 4} if static else {"assistant_model": whole}
        own = {CACHE_NAME: StreamingCache(model, *RULE, static=static)}
        found[name] = model.generate(ids[1:], max_new_tokens=20, do_sample=False, **own, **more)  # type: ignore[operator]
    return found


def compiled(folder: Path) -> float:
    """Compile the steps of a static cache."""
    model, whole = split("llama", folder, tp_size=world()), load("llama", folder / "llama")
    found = []
    for one in (model, whole):
        cache = StreamingCache(one, *RULE, static=True)
        parts = [stream(one, cache, IDS[:, :11], [11])]
        step: Any = torch.compile(one, fullgraph=True, backend="inductor" if one is model else "eager")
        found.append(torch.cat([*parts, stream(step, cache, IDS[:, 11:], [1] * (sum(CALLS) - 11))], dim=1))
    return relative(*found)


def gradients(folder: Path) -> float:
    """Call a model where torch records gradients: its products are of DTensors then."""
    model, whole = split("llama", folder, tp_size=world()), load("llama", folder / "llama")
    cache = StreamingCache(model, *RULE)
    with torch.enable_grad():
        logits = [model(part, **{CACHE_NAME: cache}).logits.detach() for part in torch.split(IDS, list(CALLS), dim=1)]
    return relative(torch.cat(logits, dim=1), stream(whole, StreamingCache(whole, *RULE), IDS, CALLS))


def chat(folder: Path) -> tuple[list[str], list[list[int]]]:
    """Chat, save, load and chat on; every rank gives the same path."""
    place = folder / "chatting"
    if not distributed.is_initialized():
        save_stand_in(place)
    how = {"distributed_config": DistributedConfig(tp_size=world())} if distributed.is_initialized() else {}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64, **how)
    tokenizer = AutoTokenizer.from_pretrained(place)
    one = Chat(model, tokenizer, system="the a of", window=12, buffer=2)
    said = [one.ask("to the", max_new_tokens=9)]
    one.save(place / "chat.safetensors")
    other = Chat.load(place / "chat.safetensors", model, tokenizer)
    said += [each.ask("of a", max_new_tokens=9) for each in (one, other)]
    return said, other.cache.retained_tokens


def each_its_own_text(folder: Path) -> dict[str, Any]:
    """Run a whole model on every rank, in DistributedDataParallel, with a text for each."""
    model, rank = load("llama", folder / "llama"), distributed.get_rank()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    cache = StreamingCache(model, *RULE)
    found: dict[str, Any] = {"error": error(wrapped, "llama", folder, cache, tokens(20 + rank, 2, sum(CALLS)))}
    cache.save(folder / f"own-{rank}.safetensors")
    twin = StreamingCache.load(folder / f"own-{rank}.safetensors", model)
    return found | {"goes on": observe(twin) == observe(cache)}


# -- ways to split ------------------------------------------------------------------------------------------------


def gathered(folder: Path) -> dict[str, Any]:
    """Shard weights with FSDP, which gathers them before a layer computes: each rank has all heads."""
    model, whole = split("llama", folder, fsdp_size=world()), load("llama", folder / "llama")
    cache, other = StreamingCache(model, *RULE), StreamingCache(whole, *RULE)
    found: dict[str, Any] = {"error": error(model, "llama", folder, cache)}
    stream(whole, other, IDS, CALLS)
    other.save(folder / f"whole-{distributed.get_rank()}.safetensors")
    twin = StreamingCache.load(folder / f"whole-{distributed.get_rank()}.safetensors", model)
    return found | {"goes on": observe(twin) == observe(other) == observe(cache)}


def experts(folder: Path) -> float:
    """Distribute experts, in addition to heads."""
    model = split("qwen3_moe", folder, tp_size=world(), ep_size=world())
    return error(model, "qwen3_moe", folder, StreamingCache(model, *RULE))


def two_by_two(folder: Path) -> dict[str, Any]:
    """Split over two ranks, twice, with FSDP between the two and a text for each."""
    model, group = split("llama", folder, tp_size=2, fsdp_size=2), distributed.get_rank() // 2
    cache = StreamingCache(model, *RULE)
    found: dict[str, Any] = {"error": error(model, "llama", folder, cache, tokens(30 + group, 2, sum(CALLS)))}
    cache.save(folder / "two-by-two.safetensors")
    twin = StreamingCache.load(folder / "two-by-two.safetensors", model)
    return found | {"goes on": observe(twin) == observe(cache)}


def experts_apart(folder: Path) -> float:
    """Deal out experts over the ranks of FSDP, which exchange tokens."""
    model = split("qwen3_moe", folder, tp_size=2, fsdp_size=2, ep_size=4)
    return error(model, "qwen3_moe", folder, StreamingCache(model, *RULE))


def stages(folder: Path) -> tuple[str, str]:
    """Split layers over ranks."""
    model = split("llama", folder, pp_size=world())
    return supports(model).reason, refusal(lambda: StreamingCache(model, *RULE))


def uneven(folder: Path) -> tuple[str, str]:
    """Split three heads of keys over two ranks."""
    model = split("uneven", folder, tp_size=world())
    return supports(model).reason, refusal(lambda: StreamingCache(model, *RULE))


def split_heads(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the heads of a model with two layers, without the help of transformers."""
    plan: dict[str, Any] = {}
    for layer in range(2):
        plan |= {f"model.layers.{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan[f"model.layers.{layer}.self_attn.o_proj"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)


def mesh_of_ones_own(folder: Path) -> dict[str, Any]:
    """Split heads along a dimension of any name, and shard weights by FSDP along another one."""
    model, mesh = load("llama", folder / "llama"), init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    split_heads(model, mesh["model"])
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh["data"])
    cache = StreamingCache(model, *RULE)
    found: dict[str, Any] = {"error": error(model, "llama", folder, cache)}
    cache.save(folder / "own-mesh.safetensors")
    distributed.barrier()
    twin = StreamingCache.load(folder / "own-mesh.safetensors", model)
    goes_on = torch.equal(stream(model, twin, IDS[:, :5], [5]), stream(model, cache, IDS[:, :5], [5]))
    return found | {"files": len([*folder.glob("own-mesh.*")]), "goes on": goes_on}


def split_afterwards(folder: Path) -> dict[str, Any]:
    """Split a model that caches were made for, one of which holds a text."""
    model = load("llama", folder / "llama")
    filled, empty = StreamingCache(model, *RULE), StreamingCache(model, *RULE)
    stream(model, filled, IDS, CALLS)
    snapshot, before = filled.snapshot(), observe(filled)
    split_heads(model, init_device_mesh("cpu", (world(),)))
    found: dict[str, Any] = {"error": error(model, "llama", folder, empty), "bytes": empty.nbytes / filled.nbytes}
    return found | {
        "filled": refusal(lambda: stream(model, filled, IDS[:, :2], [2])),
        "unchanged": observe(filled) == before,
        "restore": refusal(lambda: empty.restore(snapshot)),
    }


# -- files --------------------------------------------------------------------------------------------------------


def foreign_files(folder: Path) -> dict[str, str]:
    """Load what one process, other ranks, another number of ranks, or this rank at another moment has saved."""
    model, rank = split("llama", folder, tp_size=world()), distributed.get_rank()
    other = f"files-{world()}/llama.rank{(rank + 1) % world()}of{world()}.safetensors"
    names = {"whole": "files-1/llama.safetensors", "rank": other}
    if world() > 2:
        names |= {"world": f"files-2/llama.rank{rank % 2}of2.safetensors", "no file": "files-2/llama.safetensors"}
    found = {what: refusal(partial(StreamingCache.load, folder / name, model)) for what, name in names.items()}
    cache = StreamingCache(model, *RULE)
    stream(model, cache, IDS[:, :4], [4])
    cache.save(folder / "moments.safetensors")
    stream(model, cache, IDS[:, 4:6], [2])
    if rank:
        cache.save(folder / "moments.safetensors")
    distributed.barrier()
    found["moment"] = refusal(lambda: StreamingCache.load(folder / "moments.safetensors", model))
    if rank == 1:
        (folder / f"moments.rank1of{world()}.safetensors").unlink()
    distributed.barrier()
    return found | {"missing": refusal(lambda: StreamingCache.load(folder / "moments.safetensors", model))}


ACTS: Final[dict[int, dict[str, Callable[[Path], Any]]]] = {
    1: {"every mode": every_mode, "chat": chat},
    2: {
        "every mode": every_mode,
        "chat": chat,
        "compiled": compiled,
        "gradients": gradients,
        "each its own text": each_its_own_text,
        "gathered": gathered,
        "experts": experts,
        "stages": stages,
        "uneven": uneven,
        "split afterwards": split_afterwards,
        "mesh of one's own": mesh_of_ones_own,
        "foreign files": foreign_files,
    },
    4: {"two by two": two_by_two, "experts apart": experts_apart, "foreign files": foreign_files},
}
