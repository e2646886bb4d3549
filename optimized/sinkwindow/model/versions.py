"""Which releases of transformers the tests run on, and what is said outside of them."""

from __future__ import annotations

import inspect
import warnings

from packaging.version import Version
from transformers import GenerationMixin, __version__

# What `generate` and `forward` call the cache: `cache` from transformers 5.24 on, `past_key_values` before.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

OLDEST = Version("5.21.0")  # before, tests fail: stock Gemma 2 to 5.20, chunked prompts on a filled cache to 5.16
NEWEST_TESTED = Version("5.24.0")


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


check_transformers(__version__)
