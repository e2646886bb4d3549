"""lm-evaluation-harness: scores and answers are those of single tokens, tasks work offline, results become a table."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import __main__ as lm_eval_main
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lab_tiny import WORDS, exit_status, loaded_tiny, random_text, refused, save_tiny, tiny_model, tiny_tokenizer
from sinkwindow_lab.errors import LabError, explain
from sinkwindow_lab.evaluation import model as streaming
from sinkwindow_lab.evaluation import run
from sinkwindow_lab.evaluation.model import StreamingLM
from sinkwindow_lab.evaluation.tasks import texts
from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.reports.evaluation import page
from sinkwindow_lab.reports.output import read_report
from sinkwindow_lab.ways.configurations import open_session, parse
from strategies import budget

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
EXACT: Final = 1e-9
END: Final = "w0"  # the token after which the tiny model's generation ends
sizes = st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3))
# The seed of a text, the tokens of its context and of its continuation: equal seeds make requests that overlap.
asked = st.tuples(st.integers(0, 1), st.integers(0, 25), st.integers(1, 8))


def language_model(size: tuple[int, int, int], batch_size: int = 1, **options: Any) -> StreamingLM:
    """Return the tiny model in float64 as lm-eval sees it."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = END
    return StreamingLM(tiny_model(), *size, tokenizer=tokenizer, batch_size=batch_size, **options)


def instances(method: str, requests: list[tuple[Any, ...]]) -> list[Instance]:
    """Return requests as lm-eval makes them."""
    return [Instance(method, {}, one, index) for index, one in enumerate(requests)]


def single_tokens(size: tuple[int, int, int], context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Feed tokens one at a time; return the continuation's log-likelihood, and whether it is greedy."""
    score, greedy = 0.0, True
    with open_session(parse("streaming_{}_{}_{}".format(*size)), tiny_model()) as session:
        for place, (token, target) in enumerate(zip(ids := context + continuation, ids[1:], strict=False), start=1):
            logits = session.feed(torch.tensor([[token]]))[0, -1]
            if place >= len(context):
                score += float(logits.log_softmax(-1)[target])
                greedy = greedy and int(logits.argmax()) == target
    return score, greedy


def greedy_words(size: tuple[int, int, int], context: list[int], count: int) -> list[str]:
    """Generate up to `count` words, one token at a time, and stop at the end token."""
    made: list[str] = []
    with open_session(parse("streaming_{}_{}_{}".format(*size)), tiny_model()) as session:
        *before, token = context
        for one in before:
            session.feed(torch.tensor([[one]]))
        while len(made) < count and END not in made:
            token = int(session.feed(torch.tensor([[token]])).argmax())
            made.append(WORDS[token])
    return [word for word in made if word not in (END, "<unk>", "<s>")]  # special tokens are not shown


def check(lm: StreamingLM, size: tuple[int, int, int], requests: list[tuple[str, str]]) -> None:
    """Compare the scores of requests with those of single tokens."""
    found = lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    assert len(found) == len(requests)
    for (context, continuation), (score, greedy) in zip(requests, found, strict=True):
        ids = lm.tok_encode(context) or [lm.prefix_token_id]
        expected = single_tokens(size, ids, lm.tok_encode(continuation))
        assert (abs(score - expected[0]) < EXACT, greedy) == (True, expected[1])


# -- scores -----------------------------------------------------------------------------------------------------------


@budget(0.4)
@given(size=sizes, requests=st.lists(asked, min_size=1, max_size=6), batch=st.integers(1, 4), block=st.integers(1, 9))
def test_scores_are_those_of_single_tokens(
    size: tuple[int, int, int], requests: list[tuple[int, int, int]], batch: int, block: int
) -> None:
    """In batches of unequal lengths, with contexts longer than the cache or empty, and where requests share tokens."""
    drawn = []
    for seed, context, continuation in requests:
        words = random_text(context + continuation, seed).split()
        drawn.append((" ".join(words[:context]), " " + " ".join(words[context:])))
    with mock.patch.object(streaming, "BLOCK", block):
        check(language_model(size, batch), size, drawn)


@pytest.mark.parametrize("batch", [1, 3])
def test_long_requests_are_scored_whole(batch: int) -> None:
    """Texts longer than the positions of the model, 512, and than one call; each document is one stream."""
    size = (2, 6, 3)
    lm = language_model(size, batch)
    check(lm, size, [(random_text(600, 1), f" {random_text(300, 2)}"), (random_text(70, 3), " w1"), ("", "w5 w6")])
    documents = [random_text(count, count) for count in (30, 700, 0, 300, 1)]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(one,) for one in documents]))
    for text, score in zip(documents, found, strict=True):
        assert abs(score - single_tokens(size, [lm.prefix_token_id], lm.tok_encode(text))[0]) < EXACT


def test_a_greedy_continuation_is_known() -> None:
    """The answer says that greedy decoding gives a continuation, and denies it for another one."""
    size = (1, 5, 2)
    lm, text = language_model(size, 4), random_text(40)
    greedy = greedy_words(size, lm.tok_encode(text), 3)
    requests = [(text, f" {' '.join(greedy)}"), (text, f" {' '.join([*greedy[:2], 'w7'])}"), (text, f" {greedy[0]}")]
    found = lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    assert [answer for _, answer in found] == [True, greedy[2] == "w7", True]
    check(lm, size, requests)


def test_requests_that_share_their_tokens_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four answers of one token to one question read its text once."""
    lm = language_model((2, 6, 3))
    read = mock.Mock(wraps=lm._model_call)
    monkeypatch.setattr(lm, "_model_call", read)
    check(lm, (2, 6, 3), [("w3 w4 w5", f" w{number}") for number in range(6, 10)])
    assert read.call_count == 1


def test_logits_are_never_there_for_a_whole_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded: a call gives logits of at most `BLOCK` columns, and of a context only the last ones."""
    lm = language_model((2, 6, 3))
    read = mock.Mock(wraps=lm._model_call)
    monkeypatch.setattr(lm, "_model_call", read)
    check(lm, (2, 6, 3), [(random_text(600), " w1 w2")])
    assert [(call.args[0].shape[1], call.kwargs["last"]) for call in read.call_args_list] == [
        (256, 1),
        (256, 1),
        (89, 2),
    ]


def test_each_answer_goes_to_the_cache_of_lm_eval() -> None:
    """`--use_cache` stores every request with its own answer."""
    lm = language_model((2, 6, 3), 2)
    stored: dict[tuple[str, str], tuple[float, bool]] = {}
    lm.cache_hook = mock.Mock(add_partial=lambda _, words, answer: stored.update({words: answer}))
    requests = [("w1 w2", " w3"), ("w1 w2", " w4"), ("w1", " w2 w3"), ("w5", " w6")]
    found = lm.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    assert stored == dict(zip(requests, found, strict=True))


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_answers_are_those_of_greedy_decoding(batch: int) -> None:
    """In left-padded batches, after contexts longer than the cache and than the positions of the model."""
    size = (2, 6, 3)
    lm = language_model(size, batch)
    contexts = [random_text(count, count) for count in (5, 700, 60, 1, 40)]
    requests = [(one, {"until": [], "max_gen_toks": 30}) for one in contexts]
    found = lm.generate_until(instances("generate_until", requests), disable_tqdm=True)
    expected = [greedy_words(size, lm.tok_encode(one), 30) for one in contexts]
    assert [answer.split() for answer in found] == expected
    assert max(map(len, expected)) > sum(size)


def test_answers_end_where_the_task_says() -> None:
    """The first stop string ends an answer, and is not part of it."""
    size = (2, 6, 3)
    lm, text = language_model(size, 2), random_text(700, 700)
    words = greedy_words(size, lm.tok_encode(text), 12)
    stop = next(word for word in words[3:] if word not in words[:3] and words.count(word) == 1)
    requests = [(text, {"until": [f" {stop} "], "max_gen_toks": 12}), (text, {"until": [], "max_gen_toks": 4})]
    found = lm.generate_until(instances("generate_until", requests), disable_tqdm=True)
    assert found[0].split() == words[: words.index(stop)]
    assert 0 < len(found[1].split()) <= 4


# -- arguments --------------------------------------------------------------------------------------------------------


def test_lm_eval_makes_it_from_model_args(tmp_path: Path) -> None:
    """The words after `--model_args` are the arguments of the cache."""
    words = f"pretrained={save_tiny(tmp_path)},num_sinks=3,window=7,buffer=2,dtype=float64"
    lm = get_model("sinkwindow").create_from_arg_string(words, {"device": "cpu", "batch_size": 2})
    assert isinstance(lm, StreamingLM)
    assert (lm._cache.retention.num_sinks, lm._cache.retention.window, lm._cache.retention.buffer) == (3, 7, 2)
    assert (lm.batch_size, lm.model.dtype) == (2, torch.float64)
    assert lm.max_length > 10**9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 512}, "max_length and truncation"),
        ({"truncation": True}, "max_length and truncation"),
        ({"batch_size": "auto:4"}, "batch_size='auto:4'"),
        ({"window": 0}, "window"),
        ({"num_sinks": "four"}, "num_sinks"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    """An argument that has no meaning, or a wrong size, is named."""
    with pytest.raises((TypeError, ValueError), match=words):
        StreamingLM(tiny_model(), tokenizer=tiny_tokenizer(), **options)


def test_the_module_is_the_command_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m sinkwindow_lab.evaluation` runs lm-eval's command line when the model is known."""
    models: list[type] = []
    monkeypatch.setattr(lm_eval_main, "cli_evaluate", lambda: models.append(get_model("sinkwindow")))
    runpy.run_module("sinkwindow_lab.evaluation", run_name="__main__")
    assert models == [StreamingLM]


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_questions_can_be_answered_from_their_text() -> None:
    """Of four different numbers the text names the right one alone, so many lines before the question."""
    for row in texts.questions(lines_back=3, documents=5)["test"]:
        before, _, fact = row["context"].rpartition("\n")
        right = row["choices"][row["answer"]]
        assert len(set(row["choices"])) == len(row["choices"]) == texts.CHOICES
        assert before.split("\n")[-4] == f"{fact} {right}."
        assert [number for number in row["choices"] if f"is {number}." in before] == [right]


def test_pieces_are_spread_over_the_text() -> None:
    """They are parts of the embedded text, as long as asked, and do not overlap."""
    text = load_corpus("python-docs").text
    rows = texts.pieces("python-docs", documents=3, characters=50, version=1.0)["test"]
    places = [text.index(row["text"]) for row in rows]
    assert [len(row["text"]) for row in rows] == [50] * 3
    assert places[0] == 0
    assert places[2] > places[1] + 50 > len(text) // 4


def test_rolling_task_counts_every_token_and_byte() -> None:
    """lm-eval's bits per byte are those of one stream, fed token by token."""
    report = run.evaluate(loaded_tiny(), [parse("streaming_2_6_3")], ["sinkwindow_python_docs"], limit=1)
    text = texts.pieces("python-docs")["test"][0]["text"]
    ids = tiny_tokenizer().encode(text)
    score, _ = single_tokens((2, 6, 3), [0], ids)
    (found,) = [one.median for one in report.measurements if one.metric == "bits_per_byte"]
    assert found == pytest.approx(-score / torch.tensor(2.0).log().item() / len(text.encode()))


# -- tables -----------------------------------------------------------------------------------------------------------


def test_evaluate_compares_configurations_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row per configuration and a table per task; the page can be written again from its JSON, without lm-eval."""
    folder, out = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    names = ("--configs", "baseline,streaming_2_6_3,window_0_8", "--limit", 2, "--batch-size", 3, "--out", out)
    assert exit_status("evaluate", "--model", folder, "--tasks", "sinkwindow_recall_near", *names) == 0
    written = (out / "lm_eval.md").read_text(encoding="utf-8")
    assert written in capsys.readouterr().out
    report = read_report(out / "lm_eval.json")
    values = {(one.configuration, one.metric): one.median for one in report.measurements if "recall" in one.subject}
    ways = ("baseline", "streaming_2_6_3", "window_0_8")
    assert set(values) == {(way, metric) for way in ways for metric in ("acc", "acc standard error", "documents")}
    heading, _, rows = written.partition("\n## sinkwindow_recall_near, 2 document(s)\n\n")
    assert "the first 2 documents" in heading
    for way, row in zip(ways, rows.splitlines()[2:], strict=False):
        assert row == f"| {way} | {values[way, 'acc']:.4f} ± {values[way, 'acc standard error']:.4f} |"
    monkeypatch.setitem(run.__dict__, "lm_evaluate", None)
    assert exit_status("render", out / "lm_eval.json", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "lm_eval.md").read_text(encoding="utf-8") == written == page(report).markdown


FEW_SHOT = """\
import random
from datasets import Dataset

def documents(**_):
    rows = [{"question": f"w{number}", "choices": ["w1", "w2", "w3"]} for number in range(20)]
    return {"test": Dataset.from_list(rows), "train": Dataset.from_list(rows)}

def shuffled(rows):
    return rows.map(lambda row: {"choices": random.sample(row["choices"], 3)}, load_from_cache_file=False)
"""
FEW_SHOT_TASK = """\
task: few_shot
custom_dataset: !function few_shot.documents
process_docs: !function few_shot.shuffled
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 3
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def test_all_configurations_and_runs_are_asked_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples that a task draws and choices that it shuffles do not depend on what ran before."""
    (tmp_path / "few_shot.py").write_text(FEW_SHOT, encoding="utf-8")
    (tmp_path / "few_shot.yaml").write_text(FEW_SHOT_TASK, encoding="utf-8")
    monkeypatch.setattr(run, "TASKS", tmp_path)
    asked: list[list[tuple[str, str]]] = []
    right = HFLM.loglikelihood

    def spy(self: Any, requests: list[Instance], **more: Any) -> list[tuple[float, bool]]:
        asked.append([one.args for one in requests])
        found: list[tuple[float, bool]] = right(self, requests, **more)
        return found

    monkeypatch.setattr(HFLM, "loglikelihood", spy)
    ways = [parse(name) for name in ("baseline", "streaming_2_6_3", "window_0_8")]
    for rows in (ways, ways[1:]):
        run.evaluate(loaded_tiny(), rows, ["few_shot"], limit=4)
    assert len(asked[0]) == 12
    assert asked[0][0][0].count("\n\n") == 3  # examples before the question
    assert asked == asked[:1] * 5


def test_results_of_filters_keep_their_names() -> None:
    """Numbers alone are taken, with the filter where there is one."""
    metrics = {
        "alias": "a task",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact_match,strict": 1,
        "exact_match_stderr,strict": 0.25,
    }
    assert run.figures(metrics) == {
        "acc": ("", [0.5]),
        "exact_match (strict)": ("", [1.0]),
        "exact_match (strict) standard error": ("", [0.25]),
    }


def test_unknown_tasks_and_configurations_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that cannot be loaded names those that work offline; other kinds of memory are refused."""
    # lm-eval's own tasks, of which there are thousands, are not searched here.
    monkeypatch.setattr(run, "TaskManager", lambda **_: TaskManager(include_path=run.TASKS, include_defaults=False))
    with pytest.raises(LabError, match=r"--tasks nonsense cannot be loaded .*sinkwindow_shakespeare"):
        run.load_tasks(["nonsense"])
    with pytest.raises(LabError, match=r"'static_2_6_3' cannot be evaluated"):
        run.language_model(loaded_tiny(), parse("static_2_6_3"), 1)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--tasks", " , ", "--tasks ' , ' names no task"), ("--limit", "0", "--limit=0 must be 1 or more")],
)
def test_nothing_to_evaluate_is_refused(
    option: str, value: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before a report is written over another one."""
    assert refused(capsys, "evaluate", option, value, "--out", tmp_path).startswith(f"error: {words}")
    assert list(tmp_path.iterdir()) == []


def test_without_lm_eval_the_extra_is_named() -> None:
    """One line names what to install, another extra than for the rest of the lab."""
    assert "pip install 'sinkwindow[eval]'" in str(explain(ModuleNotFoundError("", name="lm_eval.api")))
    assert "pip install 'sinkwindow[lab]'" in str(explain(ModuleNotFoundError("", name="gguf")))


def test_the_page_shows_one_run() -> None:
    """The tables of docs/lm-eval.md are those of the report beside it, whose page its JSON gives."""
    results = DOCS / "results"
    written = (results / "lm_eval.md").read_text(encoding="utf-8")
    assert page(read_report(results / "lm_eval.json")).markdown == written
    shown = (DOCS / "lm-eval.md").read_text(encoding="utf-8").partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert [line for line in rows if line not in written] == []
