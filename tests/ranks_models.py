"""The tiny models that the processes of `tests/test_distributed.py` share: written by one, loaded by ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import BASE, FAMILIES, Family, randomize
from hybrids import HYBRIDS, limit_time_steps, type_of
from sinkwindow_lab.inputs.wide import decoder_layers, keep_norms_wide, keep_wide

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NAMES: Final = (*FAMILIES, *HYBRIDS)
# Each rank of four has a head of keys: twice the heads of the tests of one process.
DOUBLED: Final = ("num_attention_heads", "num_key_value_heads", "n_head")
WIDTHS: Final = ("hidden_size", "n_embd")


def recipe(name: str) -> Family:
    """Return how to make a family's model, with enough heads for four ranks."""
    if name == "uneven":
        return replace(FAMILIES["llama"], config={**BASE, "num_attention_heads": 3, "hidden_size": 24})
    family = FAMILIES.get(name) or Family(type_of(name), name, "", HYBRIDS[name], ("sdpa",))
    config = dict(family.config)
    widens = "head_dim" not in config or name == "helium"  # whose width is that of all its heads
    for entry in (*DOUBLED, *(WIDTHS if widens else ())):
        if entry in config:
            config[entry] *= 2
    return replace(family, config=config)


def make(name: str, folder: Path) -> bool:
    """Write a family's model to a folder; return whether it has a plan for tensor parallelism."""
    family = recipe(name)
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    loader: Any = AutoModelForCausalLM  # untyped in transformers
    model = loader.from_config(AutoConfig.for_model(family.model_type, **special | family.config))
    randomize(model, family.dtype).save_pretrained(folder)
    return bool(model.tp_plan)


def load(name: str, folder: Path, **how: Any) -> PreTrainedModel:
    """Return a family's model, or this rank's share of it, which computes in its dtype throughout."""
    family = recipe(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=family.dtype,
        attn_implementation=family.attention[0],
        experts_implementation="eager",  # grouped products do not support float64
        **how,
    )
    model.train(mode=False)
    torch.nn.Module.to(model, family.dtype)
    limit_time_steps(model, (0.0, float("inf")))
    keep_wide(decoder_layers(model))
    keep_norms_wide(model)
    return model
