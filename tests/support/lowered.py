"""Bounds of the checks that are low enough for small inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from aiotorchio.wire import bounds
from aiotorchio.wire.bounds import Bounds

__all__ = ["lowered"]


@contextlib.contextmanager
def lowered(changes: Mapping[str, int]) -> Iterator[None]:
    """Let other bounds hold within the block, for all threads of this process."""
    before = bounds.BOUNDS
    bounds.BOUNDS = Bounds(**changes)
    try:
        yield
    finally:
        bounds.BOUNDS = before
