"""Read a Markdown page as its reader would: run its code in order, word for word, in a folder of its own.

A tiny random model with a chat template stands in for the embedded one, so that pages take seconds: commands load it by
default, and `sinkwindow model --save FOLDER` writes it.
"""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lab_tiny import WORDS, exit_status, tiny_tokenizer
from sinkwindow.model.versions import CACHE_ARGUMENT
from sinkwindow_lab.inputs import defaults, models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

# What readers run around the examples; a test of the page says whether these commands can be right.
BY_HAND: Final = ("git", "nox", "pip", "python", "asv", "nvidia-smi")
CHAT: Final = (
    "{% for message in messages %}<s> {{ message.role }} {{ message.content }} <e> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and what follows it, its text, and its first line's number in the page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(one[1], one[2], text.count("\n", 0, one.start(2)) + 1) for one in fences]


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command of a shell block; comments are left out, continued lines are joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def save_stand_in(folder: Path) -> Path:
    """Save a tiny model and tokenizer that chat, in the format of `from_pretrained`; return the folder."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=None, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.chat_template = "<unk>", CHAT
    tokenizer.save_pretrained(folder)
    return folder


def run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run all Python and shell blocks of a page in a folder; return what Python has defined in the end.

    A failure names the page and the line.
    """
    stand_in = save_stand_in(folder / ".embedded")
    monkeypatch.setattr(models, "embedded_folder", lambda: (stand_in, "0" * 64))
    monkeypatch.setattr(defaults, "install", lambda: None)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # of an interactive command: its end, at once
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    runners: dict[str, Callable[[Block], None]] = {"python": _python(page, names), "sh": _shell(page)}
    for block in blocks(page):
        if block.language in runners:
            runners[block.language](block)
    return names


def _python(page: Path, names: dict[str, Any]) -> Callable[[Block], None]:
    def run_block(block: Block) -> None:
        source = block.text.replace("cache=cache", f"{CACHE_ARGUMENT}=cache")  # as this release of transformers has it
        exec(compile("\n" * (block.line - 1) + source, str(page), "exec"), names)  # noqa: S102

    return run_block


def _shell(page: Path) -> Callable[[Block], None]:
    def run_block(block: Block) -> None:
        for program, *arguments in commands(block):
            place = f"{page}, block at line {block.line}: {program}"
            if program == "sinkwindow":
                assert exit_status(*arguments) == 0, f"{place} {' '.join(arguments)}"
            else:
                assert program in BY_HAND, place

    return run_block
