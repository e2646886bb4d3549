"""Other processes that the tests of saving start: `python tests/saving_child.py WHAT FOLDER`.

* `go-on` loads a cache, feeds it and saves the logits.
* `killed` chats, saves after each turn, is killed at any moment, keeps what is there then, and goes on from it.
* `full-disk` may write no more than half of the file that is there, and prints the error that `save` raises.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors.torch import save_file

from sinkwindow import StreamingCache
from strategies import ModelSpec, Rule, call, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPEC: Final = ModelSpec(kv_heads=2, head_dim=16, max_positions=512)
RULE: Final = Rule(4, 200, 20)
TURN: Final = 3  # tokens
KILLED: Final = 20  # processes


def go_on(folder: Path) -> None:
    """Save the logits of 20 tokens behind a saved text of two rows."""
    model = ModelSpec().model()
    cache = StreamingCache.load(folder / "chat", model)
    save_file({"logits": call(model, cache, tokens(7, 2, 20)).contiguous()}, folder / "logits")


def killed(folder: Path) -> None:
    """Let children chat, and kill one after the other."""
    model, dice = SPEC.model(), random.Random(0)  # noqa: S311 - not a secret
    chat(model, folder / "chat", turns=1)
    for number in range(KILLED):
        before = (folder / "chat").stat().st_ino
        child = os.fork()
        if not child:
            try:
                chat(model, folder / "chat", turns=10**6)
            finally:
                os._exit(1)
        while (folder / "chat").stat().st_ino == before:  # on a busy machine the first turn may take a while
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError("A child ended by itself.")
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            raise RuntimeError("A child ended by itself.")
        shutil.copy(folder / "chat", folder / f"after-{number}")


def chat(model: PreTrainedModel, path: Path, turns: int) -> None:
    """Go on from a file, if there is one."""
    cache = StreamingCache.load(path, model) if path.exists() else RULE.cache(model)
    begun = cache.seen_tokens[0] // TURN
    for turn in range(begun, begun + turns):
        call(model, cache, tokens(turn, 1, TURN))
        cache.save(path)


def full_disk(folder: Path) -> None:
    """Save to a disk that is full in the middle of the file."""
    model, path = SPEC.model(), folder / "chat"
    cache = StreamingCache.load(path, model)
    call(model, cache, tokens(0, 1, TURN))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2,) * 2)
    try:
        cache.save(path)
    except OSError as error:
        sys.stdout.write(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"go-on": go_on, "killed": killed, "full-disk": full_disk}[sys.argv[1]](Path(sys.argv[2]))
