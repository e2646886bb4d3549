"""What differs between releases of transformers, and what is said outside of the range that the tests run on.

Everything that depends on a release is a fact of this table, with the release that it begins with; no other module
asks which release is installed. A model family that a release gets wrong is named in ``EXACT_SINCE``.
"""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version

OLDEST = Version("4.57.6")  # before, attention masks are made elsewhere, and caches have no layers
NEWEST_TESTED = Version("5.24.0")
INSTALLED = Version(transformers.__version__)


def since(release: str) -> bool:
    """Return whether the installed transformers is this release, one of its pre-releases, or a later one."""
    return INSTALLED.release >= Version(release).release


# What `generate` and `forward` call the cache.
CACHE_ARGUMENT = "cache" if since("5.24") else "past_key_values"
# What a configuration calls the parameters of RoPE.
ROPE_PARAMETERS = "rope_parameters" if since("5.0") else "rope_scaling"
# `crop` takes minus the columns to remove; before, it takes the length that is left.
CROP_REMOVES = since("5.14")
# Masks count a call's columns from `get_query_offset()`; before, from `get_seq_length()` or `cache_position`, which
# therefore say, inside a call, how many columns the cache hands over.
ASKS_QUERY_OFFSET = since("5.14")
# Decoders take the columns of a call as `cache_position`, without which they ask the cache in the middle of a graph.
TAKES_CACHE_POSITION = not since("5.4")
# Checkpointed layers in training mode are given the cache where no gradient is wanted (of the releases tried).
RECOMPUTES_FOR_GRADIENTS_ONLY = since("5.24")
# Models keep states of layers on the cache; before, each family in a way of its own.
STATES_ARE_KNOWN = since("5.24")
# `generate` takes the new tokens of a text alone, with a mask of all columns; before, it needs the whole text.
TAKES_NEW_TOKENS_ALONE = since("5.3")
# `generate` runs drafts and chunks of a prompt behind what a cache holds already, given the new tokens alone.
CONTINUES_IN_PARTS = since("5.21")
# Continuous batching has allocators for its paged cache, of which ours is one (``continuous.py``).
BATCHES_CONTINUOUSLY = since("5.24")

# Families that stock code gets wrong in earlier releases: the first that is right, and what is wrong before.
BYPASSES = "before, it bypasses AttentionInterface"
UNPROVED = "before, its experts do not compute in float64, so no test proves it exact"
DROPS = "before, its generate leaves the cache out beyond original_max_position_embeddings"
EXACT_SINCE = {
    "codegen": ("5.24", BYPASSES),
    "dbrx": ("5.20", "before, no test compares it with the reference"),
    "dots1": ("5.0", UNPROVED),
    "ernie4_5_moe": ("5.0", UNPROVED),
    "gemma3_text": ("5.0", "before, its rotary modules do not tell which layers they serve"),
    "gemma3n_text": ("5.6", "before, layers that share keys hand them on beside the cache"),
    "glm4_moe": ("5.0", UNPROVED),
    "gptj": ("5.24", BYPASSES),
    "jetmoe": ("5.0", BYPASSES),
    "ministral3": ("5.4", "before, it scales queries by their column, not by their position"),
    "modernbert-decoder": ("5.0", "before, generate gives other tokens than the reference"),
    "nemotron": ("5.13", BYPASSES),
    "olmoe": ("5.0", BYPASSES),
    "persimmon": ("5.2", "before, it makes masks of its own, which do not fit"),
    "phi3, longrope": ("5.4", DROPS),
    "phimoe": ("5.0", BYPASSES),
    "phimoe, longrope": ("5.4", DROPS),
    "qwen2_moe": ("5.0", BYPASSES),
    "stablelm": ("5.2", "before, it bypasses AttentionInterface, or makes masks of its own, which do not fit"),
}

IMAGE_TEXT = ("5.24", "before, no test compares image-text models with the reference (give its text model a cache)")


def too_old(model_type: str, *, is_image_text: bool = False) -> str:
    """Return why the installed transformers is too old for a family; empty if it is not."""
    release, why = IMAGE_TEXT if is_image_text else EXACT_SINCE.get(model_type, ("0", ""))
    if since(release):
        return ""
    needed = f"model_type {model_type!r} needs transformers {release}, you have {INSTALLED}"
    return f"{needed}: {why}. Use pip install -U transformers."


def check_transformers(version: str) -> None:
    """Warn when the installed transformers is newer than the tested range, and refuse an older one.

    Args:
        version: ``transformers.__version__``.

    Raises:
        ImportError: It is older than what the cache is written against.

    Warns:
        UserWarning: It is newer, by more than a patch, than the newest that the tests have run on.
    """
    found = Version(version)
    if found < OLDEST:
        raise ImportError(
            f"sinkwindow needs transformers >= {OLDEST}, found {version}: pip install -U 'transformers>={OLDEST}'."
        )
    if found.release[:2] > NEWEST_TESTED.release[:2]:
        warnings.warn(
            f"transformers {version} is newer than {NEWEST_TESTED}, the newest that sinkwindow is tested on; if "
            f"results look wrong, pip install 'transformers<={NEWEST_TESTED}' and compare.",
            UserWarning,
            stacklevel=2,
        )


check_transformers(transformers.__version__)
