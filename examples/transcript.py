"""Follow a live transcript, and note down what it is about: `... | python examples/transcript.py --model ...`.

Text arrives in pieces of any length. Every `--every` tokens the model writes a note, on a branch of the cache that is
then dropped: the notes are not part of what the model has heard. Memory does not grow, however long the transcript is.
"""

import argparse
import codecs
import os
import sys
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkwindow import StreamingCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
parser.add_argument("--window", type=int, default=1020, help="most recent tokens to keep")
parser.add_argument("--every", type=int, default=500, help="tokens between two notes")
parser.add_argument("--note", default="\n\nIn short, the speaker says that", help="how a note begins")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model)
cache = StreamingCache(model, num_sinks=4, window=arguments.window, buffer=64)


def arriving() -> Iterator[torch.Tensor]:
    """Yield the tokens of whole words, `[1, tokens]`: half a word would be other tokens.

    Where there is no space for 200 characters, as in Chinese, words are not waited for.
    """
    decoder, text, piece = codecs.getincrementaldecoder("utf-8")("replace"), "", b"-"
    while piece:
        piece = os.read(sys.stdin.fileno(), 65536)
        text += decoder.decode(piece, final=not piece)
        end = max(text.rfind(" "), text.rfind("\n"), 0)
        end = len(text) if not piece or len(text) - end > 200 else end
        ids = tokenizer(text[:end], add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        text = text[end:]
        if ids.numel():
            yield ids


def note() -> str:
    """Return what the model makes of the transcript so far, which it then goes on hearing as if nothing had been."""
    branch = cache.snapshot()
    ids = tokenizer(arguments.note, add_special_tokens=False, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids[:, :1]).expand(1, cache.seen_tokens[0] + ids.shape[1])  # of all tokens, old and new
    output = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=40, do_sample=False)
    cache.restore(branch)
    return str(tokenizer.decode(output[0], skip_special_tokens=True)).strip()


left = arguments.every
for tokens in arriving():
    start = 0
    while start < tokens.shape[1]:
        piece = tokens[:, start : start + left]
        with torch.no_grad():
            model(input_ids=piece, cache=cache, logits_to_keep=1)
        start, left = start + piece.shape[1], left - piece.shape[1]
        if not left:
            left = arguments.every
            print(f"[{cache.seen_tokens[0]:,} tokens] {note()}", flush=True)
