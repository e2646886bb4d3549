"""What is measured on: configurations by name, corpora, tokens, models and shapes."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import random
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from lab_tiny import random_text, tiny_model, tiny_tokenizer
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import corpora, hub, models, tokens
from sinkwindow_lab.inputs.corpora import Corpus, load_corpus
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.ways.configurations import SHAPES, parse, parse_list, streaming

if TYPE_CHECKING:
    from pathlib import Path


def words(*texts: str) -> Corpus:
    """Return a corpus of these documents."""
    return Corpus("words", texts, "test", joiner=" ")


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
    assert found.record().model_dump() == vars(found)


def test_examples_are_names_of_their_kind() -> None:
    """What the command `configs` lists can be measured."""
    assert [parse(shape.example).kind for shape in SHAPES] == [shape.kind for shape in SHAPES]
    assert all(parse(shape.example).meaning == shape.meaning for shape in SHAPES)


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
    with pytest.raises(LabError, match=r"(sinks|window|buffer)=-?\d+ is too small: it must be [01] or more"):
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
        ("h.txt.gz", gzip.compress(b"w1"), "decompress it"),
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


@pytest.mark.parametrize("classes", [("AutoConfig", "AutoModelForCausalLM"), ("AutoTokenizer",)])
def test_code_of_a_model_is_refused(
    classes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with code of its own is an error of one line: it is not run, and nobody is asked whether to."""
    folder = tmp_path / "model"
    tiny_model(torch.float32).save_pretrained(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {name: ["own.A", "own.A"] if "Tokenizer" in name else "own.A" for name in classes}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
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
    with pytest.raises(LabError, match=r"'huge'.*tiny, medium"):
        random_model("huge")


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_encoding_starts_at_the_beginning_and_counts_bytes() -> None:
    """The ids are the first tokens of the text, and the bytes are those of all but the first token."""
    text = tokens.encode(words("w1 w2 w29 w3"), tiny_tokenizer(), tokens=3)
    assert text.ids.tolist() == [[3, 4, 31]]
    assert text.text_bytes == len(" w2 w29")


def test_bos_comes_once_and_only_when_asked_for() -> None:
    """With BOS the first word is a target too, in front of each document that is read apart."""
    text = tokens.encode(words("w1 w2 w3"), tiny_tokenizer(), tokens=3, bos="add")
    assert (text.ids.tolist(), text.text_bytes) == ([[0, 3, 4]], len("w1 w2"))
    assert 0 not in tokens.encode(words("w1 w2 w3"), tiny_tokenizer(), tokens=3).ids
    apart = tokens.encode(words("w1", "w2 w3"), tiny_tokenizer(), tokens=9, bos="add", documents="apart")
    assert (apart.ids.tolist(), apart.lengths) == ([[0, 3, 0, 4, 5]], (2, 3))


def test_documents_without_a_target_are_left_out() -> None:
    """Empty and one-token documents are skipped; the last document is cut at the limit."""
    text = tokens.encode(words("", "w1", "w2 w3", " ", "w4 w5 w6"), tiny_tokenizer(), tokens=4, documents="apart")
    assert text.lengths == (2, 2)
    assert text.targets.tolist() == [5, 7]
    assert text.text_bytes == len(" w3") + len(" w5")
    with pytest.raises(LabError, match="at least 2"):
        tokens.encode(words("w1", "w2"), tiny_tokenizer(), tokens=9, documents="apart")


@pytest.mark.parametrize(("text", "count", "message"), [("w1", 5, "at least 2"), ("w1 w2", 1, "use 2 or more")])
def test_too_little_text_is_an_error(text: str, count: int, message: str) -> None:
    """A perplexity needs a token and a target."""
    with pytest.raises(LabError, match=message):
        tokens.encode(words(text), tiny_tokenizer(), tokens=count)


def test_records_say_what_was_read() -> None:
    """Counts, digest and tokenizer are in the record; equal digests mean equal tokens."""
    text = tokens.encode(words("w1 w2", random_text(8)), tiny_tokenizer(), tokens=9, documents="apart")
    record = text.record()
    assert (record.corpus, record.tokens, record.targets, record.texts) == ("words", 9, 7, 2)
    assert (record.bos, record.documents, record.target_bytes) == ("none", "apart", text.text_bytes)
    assert record.tokenizer is not None
    assert (record.tokenizer.vocabulary, len(record.tokenizer.sha256)) == (32, 64)
    joined = tokens.encode(words("w1 w2", random_text(8)), tiny_tokenizer(), tokens=9)
    assert joined.record().sha256 == record.sha256
    assert tokens.encode(words(random_text(9)), tiny_tokenizer(), tokens=9).record().sha256 != record.sha256


class SlowTokenizer:
    """A tokenizer without offsets."""

    is_fast = False

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return the ids of the words."""
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return the words."""
        return " ".join(f"w{one}" for one in ids)

    def get_vocab(self) -> dict[str, int]:
        """Return no words."""
        return {}


def test_tokenizers_without_offsets_work_too() -> None:
    """The bytes are those of the decoded targets then."""
    text = tokens.encode(words("w1 w22 w3"), SlowTokenizer(), tokens=2)
    assert (text.ids.tolist(), text.text_bytes) == ([[1, 22]], len("w22"))


# -- prefixes ---------------------------------------------------------------------------------------------------------


def fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")  # type: ignore[no-untyped-call] # noqa: S106


def byte_pairs() -> PreTrainedTokenizerFast:
    """Return byte pairs inside words, as GPT-2 has them."""
    core = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([scrambled(seed) for seed in range(3)], trainer)
    return fast(core)


def across_words() -> PreTrainedTokenizerFast:
    """Return a vocabulary whose pieces contain spaces, so that a token depends on several words around it."""
    draw = random.Random(1)  # noqa: S311 - no secret
    pieces = ["".join(one) for length in range(1, 6) for one in itertools.product("ab \n", repeat=length)]
    scores = [(piece, -2.0 - draw.random() * (1 + len(piece))) for piece in pieces]
    return fast(Tokenizer(kinds.Unigram([("<unk>", -20.0), *scores], unk_id=0, byte_fallback=False)))


def long_words() -> PreTrainedTokenizerFast:
    """Return a vocabulary that knows a word of any length only as a whole: one letter more changes its first token."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "##a": 3, "##b": 4}
    core = Tokenizer(kinds.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=3_000))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(core)


TOKENIZERS = {"words": tiny_tokenizer, "BPE": byte_pairs, "across words": across_words, "long words": long_words}


def scrambled(seed: int) -> str:
    """Return words of any length, runs of spaces, and numbers."""
    draw = random.Random(seed)  # noqa: S311
    parts = [
        draw.choice(["a", "b", "ab", "ba a", "w1", str(draw.random()), "é漢字。", " \n"]) * draw.choice([1, 1, 1, 2, 9])
        for _ in range(4_000)
    ]
    return " ".join(parts[:2_000]) + "ab" * 3_000 + " ".join(parts[2_000:])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("guess", [1, 6])
def test_prefixes_give_the_ids_of_the_whole(name: str, guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the prefixes are cut, ids and bytes are those of one pass over the whole text."""
    monkeypatch.setattr(tokens, "CHARACTERS_PER_TOKEN", guess)
    tokenizer = TOKENIZERS[name]()
    for text in (scrambled(7), "ab" * 9_000, "w1 " + "x" * 9_000 + " w2", "w1" + " " * 9_000 + "w2", "ab " * 4_000):
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in whole["offset_mapping"]]
        for wanted in [*range(2, 60), 300, 999, 2_500, 100_000] if len(ends) > 1 else []:
            found = tokens.encode(words(text), tokenizer, tokens=wanted)
            assert found.ids[0].tolist() == whole["input_ids"][:wanted], (text[:20], wanted)
            assert found.text_bytes == len(text[ends[0] : ends[:wanted][-1]].encode())


def test_only_what_is_needed_of_a_long_text_is_tokenized() -> None:
    """The longest text that the tokenizer gets is a small multiple of what is wanted, also with long tokens."""
    tokenizer, longest = tiny_tokenizer(), []

    class Watched(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
            longest.append(len(text))
            return super().__call__(text, *arguments, **options)

    tokenizer.__class__ = Watched
    for word, bound in (("w1 ", 15_000), ("w1" + " " * 60, 300_000)):
        longest.clear()
        assert tokens.encode(words(word * (10_000_000 // len(word))), tokenizer, tokens=2_000).ids.shape == (1, 2_000)
        assert max(longest) < bound
