"""Serve requests that may run for days: `python examples/serve_streams.py --model HuggingFaceTB/SmolLM2-135M-Instruct`.

The server is that of `transformers serve --continuous-batching`, which speaks OpenAI's protocol, and needs
`pip install "transformers[serving]"`. Each request keeps its first and its last tokens: memory does not grow, however
many tokens a request asks for. Tokens are chosen as the model's generation_config has it; transformers ignores what a
request says of temperature and stop words. Ctrl-C ends the requests and the server.

No private name of transformers is used, but its modules `transformers.cli.serving` are not documented either: a release
after 5.24 may arrange them in another way.
"""

import asyncio
import contextlib
import socket
from typing import Annotated

import typer
import uvicorn
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from sinkwindow.continuous import StreamingBatchingManager


class Server(uvicorn.Server):
    """A server that ends the requests under way before it waits for their connections to close."""

    manager: StreamingBatchingManager

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop generating, then stop serving."""
        await asyncio.to_thread(self.manager.stop, hard_stop=True)
        await super().shutdown(sockets)


def main(
    model: Annotated[str, typer.Option(help="hub id or folder of a chat model")],
    num_sinks: Annotated[int, typer.Option(help="first tokens of a request to keep")] = 4,
    window: Annotated[int, typer.Option(help="most recent tokens of a request to keep")] = 1020,
    buffer: Annotated[int, typer.Option(help="how many more tokens to collect before an eviction")] = 64,
    streams: Annotated[int, typer.Option(help="requests computed at a time; others wait")] = 64,
    port: Annotated[int, typer.Option(help="where to listen, on this machine alone")] = 8000,
) -> None:
    """Serve a model; each request keeps sinks and a window."""
    models, state = ModelManager(force_model=model), GenerationState(continuous_batching=True)
    name = models.process_model_name(model)
    loaded, _ = models.load_model_and_processor(name)
    config = ContinuousBatchingConfig(max_requests_per_batch=streams)
    manager = StreamingBatchingManager(loaded, num_sinks, window, buffer, continuous_batching_config=config)
    app = build_server(
        models,
        ChatCompletionHandler(models, state),
        CompletionHandler(models, state),
        ResponseHandler(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        state,
    )
    server = Server(uvicorn.Config(app, port=port, timeout_graceful_shutdown=5))
    server.manager = manager
    with manager.serving(), contextlib.suppress(KeyboardInterrupt):
        # Now, not at the first request: from here on all requests go to our manager.
        state.get_manager(name, use_cb=True).init_cb(loaded, manager.generation_config)
        server.run()


typer.run(main)
