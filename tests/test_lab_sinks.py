"""Do models need sinks: shares of attention are those of plain dense calls, and the page is made of its records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import build
from lab_tiny import loaded_tiny, random_ids, random_text, run, save_tiny, succeeded, tiny_model, tiny_tokenizer
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel, describe
from sinkwindow_lab.measure.attention import FIRST, LEARNED, SHARES, eager_twin, has_output_gate, shares, watched_layers
from sinkwindow_lab.reports import sinks
from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.ways.configurations import parse

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
EXACT: Final = 1e-6  # eager attention of transformers has its softmax in float32
TOKENS: Final = 90  # more than two calls of the measurement
BEGIN: Final = 13


def plain(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return the attention weights of one dense call without a cache, `[heads, queries, keys]` of each layer."""
    with torch.no_grad():
        return [one[0] for one in model(input_ids=ids, output_attentions=True, use_cache=False).attentions]


def close(found: list[float], expected: list[Tensor]) -> bool:
    """Return whether shares of layers are equal."""
    return len(found) == len(expected) and all(
        abs(one - float(other)) < EXACT for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "gemma2", "gpt_oss"])
def test_dense_shares_are_those_of_one_call(family: str) -> None:
    """However the text is cut into calls, they are means over heads and the queries that count, layer by layer.

    Where all layers have a window, the first keys of a query are the first of that; where some have, they are left out.
    """
    twin, ids = eager_twin(build(family)), random_ids(TOKENS)
    found, weights, window = shares(parse("baseline"), twin, ids, begin=BEGIN), plain(twin, ids), TOKENS
    if family == "mistral":
        window = twin.config.sliding_window
        assert window < TOKENS
    watched = [weights[layer] for layer in watched_layers(twin)]
    assert (len(watched) < len(weights)) == (family in ("gemma2", "gpt_oss"))
    for count, name in zip(FIRST, SHARES, strict=True):
        firsts = [(query, max(0, query + 1 - window)) for query in range(BEGIN, TOKENS)]
        expected = [[one[:, query, first : first + count].sum(-1).mean() for query, first in firsts] for one in watched]
        assert close(found[name][1], [torch.stack(one).mean() for one in expected])
    assert close(found[LEARNED][1], [1 - one[:, BEGIN:].sum(-1).mean() for one in watched])


@pytest.mark.parametrize(
    "name", ["window_0_12", "streaming_1_11_0", "streaming_4_8_0", "streaming_10_2_0", "streaming_3_5_4"]
)
def test_shares_of_a_cache_are_those_of_its_lists(name: str) -> None:
    """In the first layer, whose keys depend on their own token alone, a query sees what a text of its list would."""
    way, twin, ids = parse(name), eager_twin(tiny_model()), random_ids(TOKENS, 5)
    expected = torch.zeros(len(FIRST), dtype=torch.float64)
    kept: list[int] = []
    for query in range(TOKENS):
        kept.append(query)
        if query >= BEGIN:
            last = plain(twin, ids[:, kept])[0][:, -1]  # [heads, keys]
            expected += torch.stack([last[:, :count].sum(-1).mean() for count in FIRST])
        num_sinks, window, buffer = way.limits
        if len(kept) > num_sinks + window + buffer:
            kept = kept[:num_sinks] + kept[-window:]
    found = shares(way, twin, ids, begin=BEGIN)
    first_layer = torch.tensor([found[one][1][0] for one in SHARES], dtype=torch.float64)
    assert float((first_layer - expected / (TOKENS - BEGIN)).abs().max()) < EXACT
    assert [len(samples) for _, samples in found.values()] == [2] * 4


def test_a_twin_shares_parameters_and_nothing_else() -> None:
    """The model keeps its attention and its configuration while the twin is measured."""
    model = tiny_model()
    before, twin = model.config.to_dict(), eager_twin(model)
    assert {id(one) for one in twin.parameters()} == {id(one) for one in model.parameters()}
    assert twin.config._attn_implementation == "eager"
    assert (model.config._attn_implementation, model.config.to_dict()) == ("sdpa", before)


@pytest.mark.parametrize(("logit", "least", "most"), [(-1e4, 0.0, 1e-6), (1e4, 1 - 1e-6, 1.0)])
def test_learned_sinks_take_what_they_are_made_to(logit: float, least: float, most: float) -> None:
    """GPT-OSS: what the weights lack of 1; layers with a window of their own are left out."""
    twin = eager_twin(copy.deepcopy(build("gpt_oss")))  # that of the other tests stays as it is
    for name, parameter in twin.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(parameter, logit)
    watched = watched_layers(twin)
    assert 0 < len(watched) < twin.config.num_hidden_layers
    for name in ("baseline", "streaming_2_4_0"):
        found = shares(parse(name), twin, random_ids(40), begin=9)[LEARNED][1]
        assert len(found) == len(watched)
        assert least - 1e-5 < min(found) <= max(found) < most + 1e-5


@pytest.mark.parametrize("family", ["bloom", "mistral", "gpt_neox", "gemma2"])
def test_caches_of_other_families_are_measured(family: str) -> None:
    """Shares grow with the number of keys, up to all of them, also where calls run in pieces."""
    found = shares(parse("streaming_2_4_0"), eager_twin(build(family)), random_ids(40), begin=9)
    for one, four, eight in zip(*(found[one][1] for one in SHARES), strict=True):
        assert 0 < one < four < eight
        assert abs(eight - 1) < EXACT  # a list has seven


def test_output_gates_are_seen() -> None:
    """Qwen3-Next projects a gate with its queries; Llama has one in its MLP only; MiMo's values are short."""
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 16, "head_dim": 8, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 32, "intermediate_size": 8, "num_experts": 2}
    sizes |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1}
    loader: Any = AutoModelForCausalLM
    assert has_output_gate(loader.from_config(AutoConfig.for_model("qwen3_next", **sizes)))
    assert not has_output_gate(tiny_model())
    assert not has_output_gate(build("mimo_v2_flash"))


def test_the_page_tells_of_each_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two folders and a text: a row per model and count, ratios of the records, and the same page from the JSON."""
    folders = [save_tiny(tmp_path / one) for one in ("one", "two")]
    (tmp_path / "text.txt").write_text(random_text(120), encoding="utf-8")
    names = [one for folder in folders for one in ("--model", folder)]
    out = tmp_path / "out"
    options = ("--corpus", tmp_path / "text.txt", "--tokens", 60, "--size", 12, "--out", out)
    shown, _ = succeeded(capsys, "sinks", *names, *options)
    written = (out / "sinks.md").read_text(encoding="utf-8")
    assert written in shown
    report = read_report(out / "sinks.json")
    assert sinks.page(report).markdown == written
    assert (report.plan, report.finished, report.quick) == ({"size": 12, "tokens": 60}, True, False)
    assert [one.name for one in report.configurations][1:] == [
        "window_0_12",
        "streaming_1_11_0",
        "streaming_4_8_0",
        "streaming_8_4_0",
    ]
    for folder in folders:
        ppl = {
            one.configuration: one.median
            for one in report.measurements
            if (one.part, one.metric) == (str(folder), "PPL")
        }
        ratio = ppl["window_0_12"] / ppl["streaming_4_8_0"]
        assert (
            f"{ppl['window_0_12']:.3f} without sinks, {ratio:.2f}x of the {ppl['streaming_4_8_0']:.3f} with 4"
            in written
        )
        rows = [line for line in written.splitlines() if line.startswith("| ") and folder.name in line]
        assert len([one for one in rows if f" {ratio:.2f}x |" in one]) == 1
        assert len([one for one in rows if one.count("%") == 12]) == 5
        assert len([one for one in rows if one.endswith(" - |")]) == 5  # no learned sink


def test_each_model_is_saved_when_it_is_done() -> None:
    """Only the last report is finished; of a model with learned sinks the page tells what they take."""
    saved: list[Any] = []
    corpus, gpt_oss = Corpus("words", (random_text(80),), "test"), build("gpt_oss")
    models = {"tiny": loaded_tiny(), "gpt": LoadedModel(gpt_oss, tiny_tokenizer(), describe(gpt_oss, "gpt", "test"))}
    sinks.collect([*models], [corpus], sinks.Plan(12, 40), load=lambda one: models[one or ""], save=saved.append)
    assert [(len(one.models), len(one.texts), one.finished) for one in saved] == [(1, 1, False), (2, 2, True)]
    assert 2 * len(saved[0].measurements) == len(saved[1].measurements)
    pages = [sinks.page(one).markdown for one in saved]
    assert ["Learned sinks take" in one for one in pages] == [False, True]
    rows = [line for line in pages[1].splitlines() if line.startswith("| gpt ") and "%" in line]
    assert [one.count("%") for one in rows] == [15] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", 8), "--size 8 must be 9 or more"),
        (("--tokens", 1), "--tokens 1 must be 2 or more"),
        (("--size", 50, "--tokens", 51), "51 tokens of 'text' never fill a cache of 50"),
        (("--model", "a", "--model", "a"), "model 'a' is given twice"),
        (("--corpus", "text.txt"), "corpus 'text' is given twice"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    options: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, before anything is written."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    Path("text.txt").write_text(random_text(120), encoding="utf-8")
    model = () if "--model" in options else ("--model", "tiny")
    status, _, err = run(capsys, "sinks", *model, "--corpus", "text.txt", *options, "--out", "out")
    assert (status, message in err) == (2, True), err
    assert not list(Path().glob("out/*"))


def test_the_page_shows_one_run() -> None:
    """docs/results/sinks.md is made of the JSON beside it, and docs/sinks.md quotes its findings."""
    results = DOCS / "results"
    written = (results / "sinks.md").read_text(encoding="utf-8")
    assert sinks.page(read_report(results / "sinks.json")).markdown == written
    shown = (DOCS / "sinks.md").read_text("utf-8").partition("\n## Result\n")[2].partition("\nWhat that says")[0]
    quoted = [line for line in shown.splitlines() if line.startswith(("- **", "| "))]
    assert len(quoted) > 3
    assert [line for line in quoted if line not in written.splitlines()] == []
