"""Reports a broken shared fixture as one error, however many tests use it.

pytest keeps the exception of a fixture of a module or of the session, and raises it again in every
test. Thousands of cases that share one fixture would bury the error under its copies.
"""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["keep_first_error"]


def keep_first_error(fixturedef: pytest.FixtureDef[Any], error: Exception) -> None:
    """Skip the tests that use a broken fixture, except the first one.

    The first test has the error itself, with its traceback, so that the run fails.
    """
    if fixturedef.scope == "function" or fixturedef.cached_result is None:
        return
    lines = str(error).splitlines() or [""]
    reason = f"the fixture {fixturedef.argname!r} is broken, as an earlier test reports in full: "
    skip = pytest.skip.Exception(f"{reason}{type(error).__name__}: {lines[0][:200]}")
    fixturedef.cached_result = (None, fixturedef.cached_result[1], (skip, None))
