"""Tiny random image-text models, their images, and what the reference gives for their text model.

A text model inside of another one is fed embeddings, in which those of images have been merged, and a mask and
positions that the model around it has made. So what is compared is the text model's hidden states in all calls of a
test, with the reference of the same text model fed the same embeddings.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from families import GQA, WEIGHT_STD
from sinkwindow_reference import reference_logits
from wide_norms import keep_norms_wide

if TYPE_CHECKING:
    from collections.abc import Iterator

WORDS: Final = 50  # tokens that stand for words; the ones above are special
IMAGE: Final = 59
TEXT: Final[dict[str, Any]] = {
    **GQA,
    "vocab_size": 60,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
HEAD: Final = {**TEXT, "head_dim": 8}
LAYERS: Final[dict[str, Any]] = {
    "num_hidden_layers": 4,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ROPE: Final = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
TOWER: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
CLIP: Final = {"model_type": "clip_vision_model", "projection_dim": 8, **TOWER}
SIGLIP: Final = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
QWEN_IDS: Final = {"video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
QWEN_TOWER: Final = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 20,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
AHEAD: Final = "attend to later ones"
KINDS: Final = "several components that differ"


@dataclass(frozen=True)
class Recipe:
    """How to build a model and an image, and what becomes of a prompt with that image.

    Attributes:
        model_type: Of the model around the text model.
        config: Arguments of its configuration.
        refused: What the refusal of a prompt with an image says; empty where it is exact.
        image: Shapes of floats that an image consists of.
        more: Other arguments that come with an image.
        tokens: Of an image.
        types: The argument that tells tokens of images from words, if the model has one.
    """

    model_type: str
    config: dict[str, Any]
    refused: str = ""
    image: tuple[tuple[str, tuple[int, ...]], ...] = (("pixel_values", (1, 3, 16, 16)),)
    more: tuple[tuple[str, Any], ...] = ()
    tokens: int = 4
    types: str = ""

    def prompt(self, ids: Tensor, images: int = 1) -> dict[str, Tensor]:
        """Return arguments of a prompt, [1, tokens], with images from its third token on."""
        ids = ids.clone()
        ids[:, 2 : 2 + images * self.tokens] = IMAGE
        generator = torch.Generator().manual_seed(3)
        floats = {name: torch.randn(shape, generator=generator).double() for name, shape in self.image}
        types = {self.types: (ids == IMAGE).long()} if self.types else {}
        return {"input_ids": ids, **floats, **{name: torch.tensor(value) for name, value in self.more}, **types}


def _llava(model_type: str, **text: Any) -> Recipe:
    text = {"model_type": model_type, **TEXT, **text}
    config = {"image_token_id": IMAGE, "text_config": text, "vision_config": CLIP, "vision_feature_layer": -1}
    return Recipe("llava", config)


def _idefics(model_type: str) -> Recipe:
    config = {"image_token_id": IMAGE, "scale_factor": 2, "text_config": {"model_type": "llama", **TEXT}}
    return Recipe(
        model_type, {**config, "vision_config": TOWER}, image=(("pixel_values", (1, 1, 3, 16, 16)),), tokens=1
    )


def _gemma(model_type: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Recipe:
    text = {"query_pre_attn_scalar": 8, **HEAD, **LAYERS, **text}
    special = {"image_token_id": IMAGE, "mm_tokens_per_image": 4}
    return Recipe(model_type, {**special, "text_config": text, "vision_config": vision}, **more)


def _gemma4(bidirectional: str | None, refused: str) -> Recipe:
    text: dict[str, Any] = {"pad_token_id": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 8}
    vision = {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2}
    grid = [[[column, row] for row in range(4) for column in range(4)]]
    more = {"more": (("image_position_ids", grid),), "types": "mm_token_type_ids", "refused": refused}
    text["use_bidirectional_attention"] = bidirectional
    return _gemma("gemma4", text, vision, image=(("pixel_values", (1, 16, 48)),), **more)


def _qwen(model_type: str, text: dict[str, Any], **vision: Any) -> Recipe:
    text = {**TEXT, "rope_parameters": ROPE, **text}
    config = {"image_token_id": IMAGE, **QWEN_IDS, "text_config": text, "vision_config": {**QWEN_TOWER, **vision}}
    image = (("pixel_values", (16, 3 * 2 * 4 * 4)),)
    return Recipe(model_type, config, KINDS, image, (("image_grid_thw", [[1, 4, 4]]),), types="mm_token_type_ids")


RECIPES: Final = {
    "llava_llama": _llava("llama"),
    "llava_mistral": _llava("mistral", sliding_window=None),
    "llava_qwen2": _llava("qwen2"),
    "idefics3": _idefics("idefics3"),
    "smolvlm": _idefics("smolvlm"),
    "mistral3": Recipe(
        "mistral3",
        {
            "image_token_id": IMAGE,
            "spatial_merge_size": 1,
            "vision_feature_layer": -1,
            "text_config": {"model_type": "mistral", "sliding_window": None, **HEAD},
            "vision_config": {"model_type": "pixtral", **TOWER},
        },
        more=(("image_sizes", [[16, 16]]),),
    ),
    "internvl": Recipe(
        "internvl",
        {
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        },
    ),
    "aya_vision": Recipe(
        "aya_vision",
        {
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "vision_feature_layer": -1,
            "adapter_layer_norm_eps": 1e-5,
            "alignment_intermediate_size": 40,
            "text_config": {"model_type": "cohere2", "logit_scale": 1.0, **TEXT, **LAYERS},
            "vision_config": {**SIGLIP, "patch_size": 4},
        },
    ),
    "gemma3": _gemma("gemma3", {}, SIGLIP, types="token_type_ids", refused=AHEAD),
    "gemma4": _gemma4(None, ""),
    "gemma4_vision": _gemma4("vision", AHEAD),
    "qwen2_vl": _qwen("qwen2_vl", {}, embed_dim=16, hidden_size=32, mlp_ratio=2, in_channels=3),
    "qwen2_5_vl": _qwen("qwen2_5_vl", {}, fullatt_block_indexes=[1], window_size=16),
    "qwen3_vl": _qwen("qwen3_vl", {"head_dim": 8}, num_position_embeddings=16, deepstack_visual_indexes=[0]),
}
REFUSED: Final = {
    "paligemma": Recipe(
        "paligemma",
        {
            "image_token_id": IMAGE,
            "projection_dim": 32,
            "vision_config": SIGLIP,
            "text_config": {"model_type": "gemma", **HEAD},
        },
        "use_bidirectional_attention lets tokens attend to later ones",
    ),
    "llama4": Recipe(
        "llama4",
        {
            "image_token_id": IMAGE,
            "text_config": {**HEAD, "intermediate_size_mlp": 40, "num_local_experts": 2, "attention_chunk_size": 16},
            "vision_config": {
                **TOWER,
                "intermediate_size": 64,
                "patch_size": 4,
                "pixel_shuffle_ratio": 0.5,
                **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
            },
        },
        "chunked_attention",
    ),
    "blip-2": Recipe(
        "blip-2",
        {
            "text_config": {"model_type": "opt", **TEXT, "word_embed_proj_dim": 32, "ffn_dim": 40},
            "vision_config": TOWER,
            "qformer_config": {**TOWER, "encoder_hidden_size": 16, "vocab_size": 60},
        },
        "absolute position embeddings",
    ),
}


@functools.cache
def build(name: str) -> PreTrainedModel:
    """Return a model, in float64 if it streams. Calls with the same name share one object, so do not change it."""
    recipe = (RECIPES | REFUSED)[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(recipe.model_type, **recipe.config)
        loader: Any = AutoModelForImageTextToText
        model: PreTrainedModel = loader.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=WEIGHT_STD)
    model.train(mode=False)
    if name in RECIPES:
        nn.Module.to(model, torch.float64)
        keep_norms_wide(model)
    return model


class _Embedded(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers registers subclasses
    """A text model that looks its tokens up in a table of embeddings; its logits are its hidden states."""

    base_model_prefix = "model"

    def __init__(self, decoder: PreTrainedModel, table: Tensor) -> None:
        nn.Module.__init__(self)
        self.config, self.model, self.table = decoder.config, decoder, table

    def forward(self, input_ids: Tensor, **arguments: Any) -> CausalLMOutput:
        """Return the hidden states, `[batch, tokens, width]`."""
        return CausalLMOutput(logits=self.model(inputs_embeds=self.table[input_ids], **arguments).last_hidden_state)


class Heard:
    """What a text model was given, and has returned, in all calls within a `with` block."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.decoder = decoder
        self._embeddings: list[Tensor] = []
        self._states: list[Tensor] = []

    def _before(self, module: Any, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        self._embeddings.append(module.get_input_embeddings()(kwargs["input_ids"]) if given is None else given)

    def _after(self, _module: object, _args: object, output: Any) -> None:
        self._states.append(output.last_hidden_state)

    @property
    def states(self) -> Tensor:
        """Its hidden states, `[batch, columns, width]`."""
        return torch.cat(self._states, dim=1)

    @torch.no_grad()
    def expected(self, mask: Tensor | None = None, **arguments: Any) -> Tensor:
        """Return what the reference gives for the same embeddings."""
        embeddings = torch.cat(self._embeddings, dim=1)
        ids = torch.arange(embeddings[..., 0].numel()).view(embeddings.shape[:2])
        return reference_logits(_Embedded(self.decoder, embeddings.flatten(0, 1)), ids, mask, **arguments)


@contextmanager
def heard(decoder: PreTrainedModel) -> Iterator[Heard]:
    """Hear a text model within the block, before and after anything that a cache does."""
    ear = Heard(decoder)
    handles = [
        decoder.register_forward_pre_hook(ear._before, with_kwargs=True, prepend=True),
        decoder.register_forward_hook(ear._after),
    ]
    try:
        yield ear
    finally:
        for handle in handles:
            handle.remove()
