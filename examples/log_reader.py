"""Mark unusual lines of a log: `tail -f log | python examples/log_reader.py --model HuggingFaceTB/SmolLM2-135M`.

Each line is shown with its perplexity (PPL) given the lines before it. It is marked with `!` if its logarithm is far
above its recent mean. Memory does not grow, however long the log is.
"""

import argparse
import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkwindow import StreamingCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="hub id or folder of a causal language model")
parser.add_argument("--window", type=int, default=1020, help="most recent tokens to keep")
parser.add_argument("--deviations", type=float, default=3.0, help="mark lines so many standard deviations above")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model)
cache = StreamingCache(model, num_sinks=4, window=arguments.window, buffer=64)


@torch.no_grad()
def read(ids: torch.Tensor) -> torch.Tensor:
    """Feed new tokens; return the log-probabilities of what follows each of them, `[tokens, vocabulary]`."""
    logits: torch.Tensor = model(input_ids=ids[None], cache=cache).logits[0]
    return logits.float().log_softmax(-1)


after = read(torch.tensor([tokenizer.bos_token_id or 0]))[-1:]  # the newest token
mean = deviation = lines = 0.0
sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a log may hold any bytes
for line in sys.stdin:
    loss, ids = 0.0, tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()
    for piece in ids.split(256) if len(ids) else ():  # bounds the memory of a long line's logits
        found = torch.cat([after, read(piece)])
        loss -= found[:-1].gather(1, piece[:, None]).sum().item()
        after = found[-1:]
    surprise = loss / max(1, len(ids))
    unusual = lines >= 10 and surprise > mean + arguments.deviations * deviation
    print(f"{'!' if unusual else ' '} {math.exp(surprise):10.1f}  {line.rstrip()}", flush=True)
    lines += 1
    share = max(1 / lines, 0.01)  # of a line in the running mean: of all lines at first, later of about 100
    deviation = math.sqrt((1 - share) * (deviation**2 + share * (surprise - mean) ** 2))
    mean += share * (surprise - mean)
