"""Fixtures of the micro-benchmarks, which use one thread and wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.micro import AttentionSteps, check
from sinkwindow_lab.measure.timing import waiter
from sinkwindow_lab.ways.configurations import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

DEVICES: Final = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
torch.set_num_threads(1)


@pytest.fixture(params=DEVICES, scope="session")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Return a model with random weights: heads as in SmolLM2-135M on a CPU, the shape of Pythia-2.8B on a GPU."""
    if request.param == "cuda":
        return random_model("pythia-2.8b", device="cuda", dtype=torch.float16)
    return random_model("smollm2-135m-heads")


@pytest.fixture
def full_cache(model: PreTrainedModel) -> Callable[[str, int], AttentionSteps]:
    """Return a function that checks a cache and fills it to a number of tokens."""

    def build(configuration: str, seen: int) -> AttentionSteps:
        chosen = parse(configuration)
        check(chosen, random_model("tiny"), 2 * 320)
        steps = AttentionSteps(chosen, model)
        steps.fill(seen)
        return steps

    return build


@pytest.fixture
def timed(benchmark: Any, model: PreTrainedModel) -> Callable[..., None]:
    """Return a function that times another one in rounds, each with a new setup and an idle device before and after."""
    wait = waiter(model.device)

    def run(function: Callable[[], object], setup: Callable[[], object] | None = None, rounds: int = 30) -> None:
        def synchronized() -> None:
            function()
            wait()

        def ready() -> None:
            if setup is not None:
                setup()
            wait()

        benchmark.pedantic(synchronized, setup=ready, rounds=rounds, warmup_rounds=3)

    return run
