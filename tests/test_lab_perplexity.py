"""Exact perplexity: the same losses however the text is split, each target once, in bounded memory."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open

from lab_tiny import loaded_tiny, random_ids, random_text, save_tiny, tiny_model, tiny_tokenizer
from sinkwindow_lab.cli import main
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import corpora, pieces, tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.measure import methods, perplexity
from sinkwindow_lab.progress import Silent
from sinkwindow_lab.records import PerplexityRecord
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_lab.ways.sessions import Session, open_session

if TYPE_CHECKING:
    from pathlib import Path

EXACT = ("streaming_2_6_0", "streaming_2_6_3", "streaming_0_8_0", "window_0_8", "baseline", "recompute_8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and a text."""
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    (path / "long.txt").write_text(random_text(300), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command; return exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def words(*texts: str) -> Corpus:
    """Return a corpus of these documents."""
    return Corpus("words", texts, "test", joiner=" ")


# -- the same losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("block", [2, 7, 64])
def test_blocks_give_the_losses_of_single_tokens(name: str, block: int) -> None:
    """They are equal for each target, across many evictions, with a buffer and without."""
    text = tokens.encode(words(random_text(120)), tiny_tokenizer(), tokens=120)
    found = methods.score(parse(name), loaded_tiny(), text, methods.methods("both"), block=block, reporter=Silent())
    assert found.largest_difference is not None
    assert found.largest_difference < 1e-9
    assert found.speed_ratio is not None
    assert found.found["token"].record.block == 1
    assert found.main.record.block == block


def test_streaming_is_dense_until_the_first_eviction() -> None:
    """Nothing is lost while everything fits: S + W + B + 1 tokens are seen before the first eviction."""
    ids = random_ids(60)
    dense, streaming = (
        perplexity.token_losses(open_session(parse(name), tiny_model()), ids, block=16)
        for name in ("baseline", "streaming_2_30_9")
    )
    assert (dense - streaming)[:42].abs().max() < 1e-5
    assert (dense - streaming)[42:].abs().max() > 1e-3


def test_unequal_texts_are_weighted_by_their_targets() -> None:
    """PPL is exp(total loss / targets): texts of 2 and of 31 tokens have different weights."""
    text = tokens.encode(words("w1 w2", random_text(31)), tiny_tokenizer(), tokens=100, documents="apart")
    found = perplexity.measure(parse("baseline"), tiny_model(), text)
    parts = [perplexity.token_losses(open_session(parse("baseline"), tiny_model()), one) for one in text.texts]
    assert [len(one) for one in parts] == [1, 30]
    total = sum(float(one.sum()) for one in parts)
    assert found.record.perplexity == pytest.approx(math.exp(total / 31), rel=1e-12)
    means = sum(math.exp(float(one.mean())) for one in parts) / 2
    assert abs(found.record.perplexity - means) > 1e-3


# -- documents --------------------------------------------------------------------------------------------------------


def test_documents_apart_start_afresh() -> None:
    """Each document has a new cache, so its score does not depend on its place; evictions are added up."""
    one = random_text(40)
    text = tokens.encode(words(one, one), tiny_tokenizer(), tokens=1000, documents="apart")
    found = perplexity.measure(parse("streaming_2_6_3"), tiny_model(), text, block=7)
    assert torch.equal(found.nll[:39], found.nll[39:])
    assert (found.record.documents, found.record.scored_texts, found.record.targets) == ("apart", 2, 78)
    assert found.record.evictions == 2 * 7
    joined = tokens.encode(words(one, one), tiny_tokenizer(), tokens=1000)
    assert perplexity.measure(parse("baseline"), tiny_model(), joined).record.targets == 79


def test_documents_without_a_target_are_left_out() -> None:
    """Empty and one-token documents are skipped; the last document is cut at the limit."""
    text = tokens.encode(words("", "w1", "w2 w3", " ", "w4 w5 w6"), tiny_tokenizer(), tokens=4, documents="apart")
    assert text.lengths == (2, 2)
    assert text.targets.tolist() == [5, 7]
    assert text.text_bytes == len(" w3") + len(" w5")
    with pytest.raises(LabError, match="at least 2"):
        tokens.encode(words("w1", "w2"), tiny_tokenizer(), tokens=9, documents="apart")


def test_bos_is_in_front_of_each_document_apart() -> None:
    """With BOS a document of one token has a target."""
    text = tokens.encode(words("w1", "w2 w3"), tiny_tokenizer(), tokens=9, bos="add", documents="apart")
    assert text.ids.tolist() == [[0, 3, 0, 4, 5]]
    assert text.lengths == (2, 3)


def test_records_say_what_was_scored() -> None:
    """The tokenizer is in the record, which is unchanged by its JSON."""
    text = tokens.encode(words(random_text(20)), tiny_tokenizer(), tokens=20)
    record = perplexity.measure(parse("baseline"), tiny_model(), text).record
    assert record.tokenizer is not None
    assert (record.tokenizer.vocabulary, len(record.tokenizer.sha256)) == (32, 64)
    assert PerplexityRecord.model_validate_json(record.model_dump_json()) == record


# -- bounded memory ---------------------------------------------------------------------------------------------------


class NarrowSession(Session):
    """A session that records its longest call and predicts all words with equal probability."""

    def __init__(self, value: float = 0.0) -> None:
        self.longest, self._value = 0, value

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert not last_only
        self.longest = max(self.longest, ids.shape[1])
        return torch.full((1, ids.shape[1], 32), self._value)

    @property
    def kept_tokens(self) -> int:
        """Return 0, since nothing is kept."""
        return 0


def test_logits_are_never_more_than_a_block() -> None:
    """A million tokens are fed in calls of a block, and only a float64 per target is returned."""
    session = NarrowSession()
    losses = perplexity.token_losses(session, torch.zeros((1, 1_000_001), dtype=torch.long), block=4096)
    assert session.longest == 4096
    assert losses.untyped_storage().nbytes() == 8 * 1_000_000
    assert float(losses.mean()) == pytest.approx(math.log(32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_an_error(value: float) -> None:
    """The error names the target and what to try; there is never a perplexity of NaN."""
    with pytest.raises(LabError, match=r"target 0 is nan.*float32"):
        perplexity.token_losses(NarrowSession(value), random_ids(9), block=4)


@pytest.mark.parametrize("wanted", [10, 999, 5_000, 100_000])
def test_pieces_give_the_ids_of_the_whole(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces of a long text, cut in the middle of words, give the ids and ends of one pass."""
    monkeypatch.setattr(pieces, "PIECE", 3_000)
    monkeypatch.setattr(pieces, "OVERLAP", 700)
    text = random_text(6_000)
    found = pieces.encode_start(tiny_tokenizer(), text, wanted)
    whole = tiny_tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found.ids.tolist() == whole["input_ids"][:wanted]
    assert found.ends is not None
    assert found.ends.tolist() == [end for _, end in whole["offset_mapping"][:wanted]]


def test_a_text_whose_pieces_do_not_join_is_tokenized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """If two pieces never agree there is no place to join them."""
    monkeypatch.setattr(pieces, "PIECE", 3_000)
    monkeypatch.setattr(pieces, "OVERLAP", 700)
    text = "w1 " + "x" * 9_000 + " w2"
    assert pieces.encode_start(tiny_tokenizer(), text, 3_000).ids.tolist() == [3, 1, 4]


class SlowTokenizer:
    """A tokenizer without offsets."""

    is_fast = False

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return the ids of the words."""
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return the words."""
        return " ".join(f"w{one}" for one in ids)


def test_tokenizers_without_offsets_work_too() -> None:
    """The bytes are those of the decoded targets then."""
    found = pieces.encode_start(SlowTokenizer(), "w1 w22 w3", 2)
    assert (found.ids.tolist(), found.ends) == ([1, 22], None)
    assert tokens._target_bytes(SlowTokenizer(), "w1 w22 w3", found, with_first=False) == 3


# -- files ------------------------------------------------------------------------------------------------------------


def test_jsonl_and_parquet_have_a_document_per_row(tmp_path: Path) -> None:
    """Lines may be objects with a text, plain strings, or empty; parquet rows without a text are left out."""
    lines = [json.dumps({"text": "w1 w2", "id": 7}), "", json.dumps("w3")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = pa.table({"text": ["w1 w2", None, "w3"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert corpora.load_corpus(str(tmp_path / name)).documents == ("w1 w2", "w3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"text"', "line 2 is not JSON"),
        ("b.jsonl", b'{"body": "w1"}', "no string in a field 'text'"),
        ("c.jsonl", b'"\xff"', "not UTF-8"),
        ("d.jsonl", b"\n", "is empty"),
        ("e.parquet", b"no parquet", "not a parquet file"),
    ],
)
def test_broken_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """The error says what is wrong, and in which line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=message):
        corpora.load_corpus(str(tmp_path / name))


@pytest.mark.parametrize(("table", "message"), [({"body": ["w1"]}, "only body"), ({"text": [1]}, "not hold strings")])
def test_parquet_needs_a_column_of_text(table: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    """The error names the columns that there are."""
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(LabError, match=message):
        corpora.load_corpus(str(tmp_path / "a.parquet"))


def test_wikitext_rows_become_articles() -> None:
    """A title starts an article, the title of a section does not; the text as a whole is unchanged."""
    rows = ("", " = First = \n", "", " w1 \n", " = = Part = = \n", " w2 \n", " = Second = \n", " w3 \n")
    articles = corpora._articles(rows, corpora.TITLE)
    assert len(articles) == 2
    assert articles[1].startswith(" = Second = ")
    assert "\n\n".join(articles) == "\n\n".join(rows)
    assert corpora._articles(rows, None) == rows


# -- the command ------------------------------------------------------------------------------------------------------


def test_both_methods_print_the_same_and_their_ratio(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has the same digits of PPL for both, and how much faster blocks are."""
    options = ("--tokens", 200, "--sinks", 2, "--window", 30, "--buffer", 5, "--method", "both")
    status, out, err = run(capsys, "perplexity", "--model", folder, "--corpus", folder / "long.txt", *options)
    assert status == 0, err
    single, blocks, ratio = out.splitlines()
    assert single.split()[:2] == blocks.split()[:2]
    assert "1 tok/call" in single
    assert "times as fast" in ratio


def test_losses_are_saved_with_what_they_are(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has a float64 per target for each method, the targets, and the records as JSON in its metadata."""
    options = (
        "--tokens",
        80,
        "--config",
        "streaming_2_6_3",
        "--method",
        "both",
        "--save-nll",
        tmp_path / "a.safetensors",
    )
    status, out, err = run(capsys, "perplexity", "--model", folder, "--corpus", folder / "long.txt", *options, "--json")
    assert status == 0, err
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        losses = {name: file.get_tensor(name) for name in ("nll_token", "nll_blocks")}
        assert file.get_tensor("targets").shape == (79,)
        assert file.get_tensor("lengths").tolist() == [80]
        head = json.loads(file.metadata()["records"])
    assert (losses["nll_token"] - losses["nll_blocks"]).abs().max() < 1e-4
    assert head == json.loads(out)
    assert float(losses["nll_blocks"].mean()) == pytest.approx(head["result"]["mean_nll"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "fast"), "token, blocks or both"),
        (("--documents", "some"), "concat or apart"),
        (("--save-nll", "/nowhere/a.safetensors"), "--save-nll"),
    ],
)
def test_bad_options_are_one_line(
    options: tuple[str, str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before a model is loaded."""
    status, out, err = run(capsys, "perplexity", "--corpus", folder / "long.txt", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
