"""Errors and warnings for transformers releases outside the tested range."""

from __future__ import annotations

import warnings

import pytest
import transformers

from sinkwindow.model.versions import NEWEST_TESTED, check_transformers


def test_an_older_release_is_refused() -> None:
    """The message names both versions and the command to upgrade."""
    with pytest.raises(ImportError, match=r"needs transformers >= 4\.57\.6, found 4\.56\.2: pip install -U"):
        check_transformers("4.56.2")


def test_a_newer_release_warns() -> None:
    """The next minor release warns; a patch release of a tested one does not."""
    major, minor = NEWEST_TESTED.release[:2]
    with pytest.warns(UserWarning, match=f"newer than {NEWEST_TESTED}"):
        check_transformers(f"{major}.{minor + 1}.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers(f"{major}.{minor}.7")


def test_the_installed_release_is_in_the_range() -> None:
    """The tests run with a release of the tested range."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers(transformers.__version__)
