"""`generate` with a `StreamingCache` and the argument names of the `SinkCache` that transformers had before 5.0.

`model.generate(..., custom_generate=<this repository>, trust_remote_code=True, window_length=256, num_sink_tokens=4)`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkwindow import StreamingCache
from sinkwindow.model.versions import CACHE_ARGUMENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel, *, window_length: int = 256, num_sink_tokens: int = 4, buffer: int = 0, **kwargs: Any
) -> Any:
    """Generate with attention sinks and a sliding window.

    Args:
        model: The model whose `generate` was called.
        window_length: Number of tokens to keep, including the sinks, as in `SinkCache` [tokens].
        num_sink_tokens: How many of these are the first tokens, which are never evicted [tokens].
        buffer: By how many tokens the cache may exceed `window_length` before it evicts them at once [tokens].
        **kwargs: All other arguments of `generate`.

    Returns:
        The output of `generate`.

    Raises:
        ValueError: `window_length` does not exceed `num_sink_tokens`, or a cache is passed as well.
    """
    if window_length <= num_sink_tokens:
        raise ValueError(
            "window_length must exceed num_sink_tokens, since it includes the sinks, "
            f"got {window_length} and {num_sink_tokens}."
        )
    given = [name for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"{given[0]} must not be passed together with custom_generate, which creates its own StreamingCache. To "
            "use a cache in several calls, pass a StreamingCache to generate without custom_generate."
        )
    cache = StreamingCache(model, num_sink_tokens, window_length - num_sink_tokens, buffer)
    return model.generate(**{CACHE_ARGUMENT: cache}, **kwargs)
