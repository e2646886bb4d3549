"""Chat with a model for days: `python examples/chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct`.

Ctrl-C stops an answer, Ctrl-D ends. Memory does not grow: the system prompt and the last `--window` tokens are kept,
and the rest is gone.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from sinkwindow import Chat

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="hub id or folder of a chat model")
parser.add_argument("--system", default="You are a helpful assistant.")
parser.add_argument("--window", type=int, default=1020, help="most recent tokens to keep")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model)
chat = Chat(model, tokenizer, arguments.system, window=arguments.window, buffer=64)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

while True:
    try:
        chat.ask(input("> "), streamer, max_new_tokens=200)
    except KeyboardInterrupt:  # the answer counts as far as it was said
        print("\n(stopped)")
    except EOFError:
        break

cache = chat.cache
print(f"\n{cache.seen_tokens[0]:,} tokens, {cache.num_evictions:,} evictions, {cache.nbytes / 1e6:.2f} MB of cache")
