"""A tiny random copy of a model, in float64: heads have their size and RoPE, and layers their order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig as PreTrainedConfig  # its name before transformers 5.0
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sinkwindow_lab.inputs.wide import wide_copy

LAYERS = 4  # at least; more where it takes more to have a layer of each kind
VOCABULARY = 50
POSITIONS = 64  # few, so that positions are rebased often
OWN_WINDOW = 24  # shorter than the texts of the check, and longer than its lists [tokens]
SPREAD = 1.7  # standard deviation of a weight times the root of its inputs: positions then change logits a lot
LARGEST = {"intermediate_size": 40, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
LARGEST |= {"num_experts_per_tok": 2, "attention_chunk_size": OWN_WINDOW, "sliding_window": OWN_WINDOW}


class States(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers registers subclasses
    """A decoder without a head: its logits are its hidden states."""

    base_model_prefix = "model"

    def __init__(self, decoder: PreTrainedModel) -> None:
        nn.Module.__init__(self)  # not that of its base, which would have the class say what its decoder can
        self.config, self.model = decoder.config, decoder

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> CausalLMOutput:
        """Return the hidden states, [batch, tokens, width]."""
        return CausalLMOutput(logits=self.model(input_ids=input_ids, **arguments).last_hidden_state)


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy with few layers, heads, words and positions."""
    small, layers = copy.deepcopy(config), config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == layers}
    count = max([LAYERS, *(value.index(kind) + 1 for value in lists.values() for kind in value if kind is not None)])
    changes: dict[str, Any] = {name: value[:count] for name, value in lists.items()}
    for name, value in vars(config).items():
        most = next((number for end, number in LARGEST.items() if name.endswith(end)), None)
        if most is not None and isinstance(value, int):
            changes[name] = min(value, most)
        elif name.endswith("token_id"):
            changes[name] = None
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    fewer = min(groups or heads, 2)
    if groups is not None:
        changes["num_key_value_heads"] = fewer
    several = fewer * min(heads // (groups or heads), 2)
    changes |= {"num_hidden_layers": min(count, layers), "num_attention_heads": several, "hidden_size": several * width}
    changes |= {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    for name, value in changes.items():
        if hasattr(small, name):
            setattr(small, name, value)
    return small


def tiny_copy(model: PreTrainedModel, decoder: PreTrainedModel, config: PreTrainedConfig | None) -> PreTrainedModel:
    """Return a float64 model with random weights: of a model's class, or of its decoder's if there are other parts."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        own = model is not decoder and model.config is decoder.config
        chosen = tiny_config(decoder.config) if config is None else copy.deepcopy(config)
        chosen._attn_implementation = "sdpa" if decoder._supports_sdpa else "eager"  # noqa: SLF001 - no public names
        made: Any = type(model if own else decoder)(chosen)
        made = (made if own else States(made)).eval().requires_grad_(requires_grad=False)
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.copy_(SPREAD * parameter.shape[-1] ** -0.5 * noise)
            else:
                parameter.add_(0.3 * noise)
    return wide_copy(made)
