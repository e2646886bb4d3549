"""One thread, and a call that waits for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from sinkwindow.lab.configurations import parse
from sinkwindow.lab.micro import AttentionSteps, check
from sinkwindow.lab.shapes import random_model
from sinkwindow.lab.timing import waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

DEVICES: Final = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
torch.set_num_threads(1)


@pytest.fixture(params=DEVICES, scope="session")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Layers and heads of SmolLM2-135M on a CPU, Pythia-2.8B on a GPU; random weights."""
    if request.param == "cuda":
        return random_model("pythia-2.8b", device="cuda", dtype=torch.float16)
    return random_model("smollm2-135m-heads")


@pytest.fixture
def full_cache(model: PreTrainedModel) -> Callable[[str, int], AttentionSteps]:
    """Opens a cache that has seen so many tokens, once its output was found right."""

    def build(configuration: str, seen: int) -> AttentionSteps:
        chosen = parse(configuration)
        check(chosen, random_model("tiny"), 2 * 320)
        steps = AttentionSteps(chosen, model)
        steps.fill(seen)
        return steps

    return build


@pytest.fixture
def timed(benchmark: Any, model: PreTrainedModel) -> Callable[..., None]:
    """Times a function in rounds of fresh setups, the device idle before and after each."""
    wait = waiter(model.device)

    def run(function: Callable[[], object], setup: Callable[[], object] | None = None, rounds: int = 30) -> None:
        def synchronised() -> None:
            function()
            wait()

        def ready() -> None:
            if setup is not None:
                setup()
            wait()

        benchmark.pedantic(synchronised, setup=ready, rounds=rounds, warmup_rounds=3)

    return run
