"""Numbers that cannot be right, or are not what was asked for, say so: in the terminal, in JSON and on a page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from lab_tiny import (
    TINY,
    loaded_tiny,
    machine_record,
    random_text,
    save_tiny,
    succeeded,
    tiny_bench,
    tiny_model,
    tiny_tokenizer,
)
from sinkwindow_lab import records
from sinkwindow_lab.inputs import models, tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.measure.perplexity import Score
from sinkwindow_lab.records import measured
from sinkwindow_lab.render.origins import doubts
from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.reports.tables import findings, plan
from sinkwindow_lab.ways.configurations import parse

if TYPE_CHECKING:
    from pathlib import Path

LACKING = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a model that lacks two weights, and one that lacks none."""
    path = tmp_path_factory.mktemp("doubts")
    save_tiny(path / "whole")
    weights = load_file(save_tiny(path / "lacking") / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name not in LACKING}
    save_file(kept, path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    (path / "text.txt").write_text(random_text(50), encoding="utf-8")
    return path


def test_random_weights_are_recorded(folder: Path) -> None:
    """All that the files lack, by name; tied weights are there under another one."""
    assert models.load_model(str(folder / "lacking")).record.missing_weights == LACKING
    assert models.load_model(str(folder / "whole")).record.missing_weights == []


@pytest.mark.parametrize("command", ["perplexity", "speed"])
def test_commands_show_what_is_doubtful(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, and in the JSON beside the numbers."""
    options = ("--prompt", 10**9, "--tokens", 3) if command == "speed" else ("--tokens", 10**9, "--window", 8)
    common = (command, "--model", folder / "lacking", "--corpus", folder / "text.txt", *options, "--json")
    out, err = succeeded(capsys, *common)
    found = json.loads(out)
    assert [f"warning: {one}" for one in found["warnings"]] == [
        line for line in err.splitlines() if line.startswith("warning: ")
    ]
    assert "lacks 2 weights in its files, which have random values" in found["warnings"][0]
    assert LACKING[0] in found["warnings"][0]
    assert "50 tokens of corpus 'text' were read, 1000000000 were requested" in found["warnings"][1]
    assert (found["text"]["tokens"], found["text"]["requested"]) == (50, 10**9)


def test_a_perplexity_above_guessing_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model is worse than one that guesses: there are 32 words."""
    common = ("perplexity", "--model", folder / "whole", "--corpus", folder / "text.txt", "--tokens", 50)
    out, err = succeeded(capsys, *common, "--config", "baseline", "--json")
    found = json.loads(out)
    assert found["result"]["PPL"] > 32
    assert [one[:4] for one in found["warnings"]] == ["PPL "]
    assert "of baseline on 'text' is above the size of the vocabulary, 32" in err


def test_only_what_is_doubtful_is_shown() -> None:
    """At the size of the vocabulary nothing is said, above it and for what is no number it is."""
    text = tokens.encode(Corpus("words", (random_text(9),), "test"), tiny_tokenizer(), tokens=9)
    for ppl, count in ((31.9, 0), (32.1, 1), (math.nan, 1), (math.inf, 1)):
        nll = torch.full((8,), math.log(ppl), dtype=torch.float64)
        score = Score(
            "baseline", text, 1, nll, dict.fromkeys(("seconds", "evictions", "kept_tokens", "cache_bytes"), 1.0)
        )
        assert len(doubts([loaded_tiny().record], [text.record()], score.measurements("a"))) == count


def test_each_model_is_compared_with_its_own_vocabulary() -> None:
    """Two models read one text: 32 words are too few for a PPL of 40, 100 are not."""
    text = tokens.encode(Corpus("words", (random_text(9),), "test"), tiny_tokenizer(), tokens=20)
    small = replace(text, model="small")
    vocabulary = small.record().tokenizer
    assert vocabulary is not None
    large = small.record().model_copy(
        update={"model": "large", "tokenizer": vocabulary.model_copy(update={"vocabulary": 100})}
    )
    scores = [one for part in ("small", "large") for one in measured(part, "words", "way", None, {"PPL": ("", [40.0])})]
    loaded = [loaded_tiny().record.model_copy(update={"name": name}) for name in ("small", "large")]
    for texts in ([small.record(), large], [large, small.record()]):
        *short, ppl = doubts(loaded, texts, scores)
        assert {one.split(" were read by ")[1].split(",")[0] for one in short} == {"'small'", "'large'"}
        assert ppl.startswith("PPL 40 of way on 'words' is above the size of the vocabulary, 32")


def test_losses_beyond_all_numbers_have_a_perplexity() -> None:
    """It is infinite, not an error after the measurement."""
    text = tokens.encode(Corpus("words", (random_text(3),), "test"), tiny_tokenizer(), tokens=3)
    assert Score("baseline", text, 1, torch.full((2,), 1e4, dtype=torch.float64), {}).perplexity == math.inf
    one = measured("along", "words", "baseline", 2, {"NLL of a bin": ("nat", [800.0])})
    page = records.Report(
        kind="tables",
        quick=True,
        plan={"along_bin": 1},
        machine=machine_record(),
        models=[loaded_tiny().record],
        configurations=[parse("baseline")],
        measurements=one,
        seconds=1.0,
    )
    frame = pd.DataFrame([{**one[0].model_dump(exclude={"samples"}), "value": 800.0}])
    assert "dense inf" in "".join(findings._along(page, frame))


def test_the_page_shows_it_below_what_ran(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the id of the token in front of each text; a page that is rendered again says the same."""
    monkeypatch.setattr(plan, "QUICK", TINY)
    common = ("tables", "--quick", "--only", "mistakes", "--bos", "add", "--out", tmp_path)
    _, err = succeeded(capsys, *common, "--model", folder / "lacking", "--corpus", folder / "text.txt")
    markdown = (tmp_path / "paper_tables.md").read_text(encoding="utf-8")
    head = markdown.partition("**Doubtful numbers:**")[2].partition("\n## ")[0]
    assert "lacks 2 weights" in head
    assert "above the size of the vocabulary, 32" in head
    assert err.count("warning: ") == head.count("\n- ")
    assert "| BOS | added in front of each text (token 0) |" in markdown
    report = read_report(tmp_path / "paper_tables.json")
    assert {one.bos_id for one in report.texts} == {0}
    succeeded(capsys, "render", tmp_path / "paper_tables.json")
    assert (tmp_path / "paper_tables.md").read_text(encoding="utf-8") == markdown
    assert "Doubtful numbers:" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_texts_have_no_token_before_them_unless_asked() -> None:
    """Then there is no id either."""
    bench = tiny_bench()
    assert bench.text(bench.corpora[0], 9).record().bos_id is None
    bench.bos = "add"
    assert bench.text(bench.corpora[0], 8).record().bos_id == 0
    assert tiny_model().config.vocab_size == 32
