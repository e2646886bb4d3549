"""A tiny random model with a tokenizer, hand-made records, and the command line, for the tests of the lab."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sinkwindow_lab import records
from sinkwindow_lab.cli import main
from sinkwindow_lab.errors import printable
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel, describe
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.reports.tables.plan import Experiment, Plan, Readings, sink_ways, size_ways
from sinkwindow_lab.store import Store
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WORDS = ("<s>", "<unk>", *(f"w{number}" for number in range(30)))

ORIGIN = {"code": "c", "model": "m"}  # in every key of a store


@functools.cache
def tiny_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Return a Llama with two layers, grouped heads and a vocabulary of 32 words."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,  # large: attention must matter, or every cache would pass
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    torch.nn.Module.to(model, dtype)
    return model


def tiny_tokenizer(template: str | None = None, words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, split at white space."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token="<s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        chat_template=template,
    )


def save_tiny(folder: Path) -> Path:
    """Save model and tokenizer in the format of `from_pretrained`; return the folder."""
    tiny_model(torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_with_code(folder: Path, code: str, *classes: str) -> Path:
    """Save the tiny model as one of another type, with code of its own for these classes; return the folder."""
    tiny_model(torch.float32).save_pretrained(folder)
    (folder / "own.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {name: ["own.A", "own.A"] if "Tokenizer" in name else "own.A" for name in classes}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# Every message begins with a word that says whose it is.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w27', 'user': 'w28', 'assistant': 'w29'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}w29 {% endif %}"
)


def save_chatty(folder: Path, template: str | None = CHAT_TEMPLATE, words: Sequence[str] = WORDS) -> Path:
    """Save the tiny model as one that chats; no token ends its answers."""
    save_tiny(folder)
    GenerationConfig().save_pretrained(folder)  # type: ignore[no-untyped-call]
    tiny_tokenizer(template, words).save_pretrained(folder)
    return folder


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids `[1, count]`."""
    return torch.randint(2, len(WORDS), (1, count), generator=torch.Generator().manual_seed(seed))


def random_text(count: int, seed: int = 0) -> str:
    """Return a text of `count` random words."""
    return " ".join(WORDS[index] for index in random_ids(count, seed)[0].tolist())


def text_of_lines(count: int) -> str:
    """Return `count` lines of five random words each."""
    words = random_text(5 * count).split()
    return "\n".join(" ".join(words[start : start + 5]) for start in range(0, len(words), 5))


def loaded_tiny() -> LoadedModel:
    """Return the tiny model in float64, as the lab loads a model."""
    return LoadedModel(tiny_model(), tiny_tokenizer(), describe(tiny_model(), "tiny", "test"))


def tiny_bench(store: Store | None = None) -> Bench:
    """Return a bench with the tiny model and one text."""
    return Bench(loaded_tiny(), [Corpus("words", (text_of_lines(60),), "test")], store=store or Store())


def listen(monkeypatch: pytest.MonkeyPatch, tell: Callable[..., object]) -> None:
    """Let a function know of every call of a session before it: the session, its tokens, and `last_only`."""
    feed = Session.feed

    def told(self: Session, ids: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
        tell(self, ids, last_only=last_only)
        return feed(self, ids, last_only=last_only)

    monkeypatch.setattr(Session, "feed", told)


TINY = Plan(
    experiments=(Experiment("experiment 1", 40, 12, 6), Experiment("experiment 2", 60, 12, 15)),
    speed_places=None,
    probes=2,
    recompute_tokens=4,
    mistakes=Readings(("baseline", "streaming_2_6_3", "stale_ranks_2_6_3", "call_2_6"), 50),
    sinks=Readings(sink_ways((0, 1, 4), 8), 40),
    sizes=Readings(size_ways((8, 16)), 60),
    along=Readings(("baseline", "streaming_4_12_0"), 121),
    along_bin=25,
    where=Readings(("streaming_4_12_0",), 60),
    places=(20, 40),
    step_cache=12,
    step_sizes=(8, 12),
    step_repeats=2,
    recompute_repeats=1,
    recall=("baseline", "streaming_4_12_0"),
    recall_seeds=(0, 1),
    recall_lines=(1, 3),
    quick=True,
)


def machine_record() -> records.MachineRecord:
    """Return the record of a machine whose checkout has local changes."""
    return records.MachineRecord(
        date="2026-01-02T03:04:05+00:00",
        cpu="a CPU",
        cores=2,
        memory_gb=8.0,
        gpu=None,
        system="a system",
        threads=1,
        python="3.11.0",
        packages={"torch": "2.13.0"},
        commit="abc123",
        dirty=True,
    )


# -- the command line -------------------------------------------------------------------------------------------------

ACTS = "\x1b[2J\u202e[red]"  # clears a terminal, turns the order of letters, colors what rich prints


def exit_status(*arguments: object) -> int:
    """Run a command; return its exit status."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return int(stop.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command; return exit status, standard output and standard error."""
    status = exit_status(*arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def succeeded(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Run a command that must succeed; return standard output and standard error."""
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    return out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail at once; return its one line."""
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), err
    assert printable(err.removesuffix("\n")) + "\n" == err
    assert len(err) < 1_100
    return err
