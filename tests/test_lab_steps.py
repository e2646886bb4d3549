"""What is timed without a model does what a model does: by-hand calls give the attention of the definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.micro import FILL, AttentionSteps, attend, check_logits
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_reference import retained_lists, rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

PERIOD = 4096  # random tokens repeat after so many [tokens]


def rotated_steps(
    steps: AttentionSteps, model: PreTrainedModel, tokens: int
) -> tuple[list[torch.Tensor], Callable[[list[int]], torch.Tensor]]:
    """Feed keys rotated as a model does, the last token alone.

    Returns that token's output of each layer, and a function of a retained list: what the definition gives for it.
    """
    queries, keys, values = steps.draw(PERIOD)
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")).to(keys.device)
    outputs: list[torch.Tensor] = []

    def turn(states: torch.Tensor, places: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rotate(states[:, :, places % PERIOD], positions, frequencies)

    def feed(start: int, stop: int) -> None:
        places = torch.arange(start, stop, device=keys.device)

        def layer_work(layer: int, arguments: dict[str, Any]) -> None:
            at = arguments["position_ids"][0] if arguments else places
            held = steps.cache.update(turn(keys, places, at), values[:, :, places % PERIOD], layer)
            outputs.append(attend(turn(queries, places, at)[:, :, -1:], *held))

        outputs.clear()
        steps.call(stop - start, layer_work)

    def definition(kept: list[int]) -> torch.Tensor:
        places, ranks = torch.tensor(kept, device=keys.device), torch.arange(len(kept), device=keys.device)
        query = turn(queries, places[-1:], ranks[-1:])
        return attend(query, turn(keys, places, ranks), values[:, :, places % PERIOD])

    for start in range(0, tokens - 1, FILL):
        feed(start, min(start + FILL, tokens - 1))
    feed(tokens - 1, tokens)
    return outputs, definition


@torch.inference_mode()
@pytest.mark.parametrize("name", ["baseline", "streaming_2_6_0", "streaming_2_6_3", "window_0_8", "streaming_4_300"])
@pytest.mark.parametrize("tokens", [4, 9, 41, 640])
def test_steps_by_hand_are_the_definition(name: str, tokens: int) -> None:
    """The last token attends to its retained list, ranks as positions, in all layers, before and after evictions."""
    configuration, model = parse(name), random_model("tiny")
    steps = AttentionSteps(configuration, model)
    outputs, definition = rotated_steps(steps, model, tokens)
    steps.close()
    sinks, window, buffer = (0, tokens, 0) if configuration.kind == "baseline" else configuration.limits
    kept = retained_lists(tokens, num_sinks=sinks, window=window, buffer=buffer)[-1]
    assert len(outputs) == model.config.num_hidden_layers
    assert max(float((output - definition(kept)).abs().max()) for output in outputs) < 1e-5
    assert check_logits(configuration, model, tokens) < 1e-5
