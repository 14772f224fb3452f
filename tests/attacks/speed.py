"""How fast this machine is here and now: what bounds of time in tests are multiplied by."""

from __future__ import annotations

import time

__all__ = ["slowness"]

# Seconds of the work below on one free core of the machine that the bounds were chosen on.
_REFERENCE = 0.08
_ROUNDS, _NUMBERS = 20, 60_000


def slowness() -> float:
    """How many times as long as there a known amount of work takes here now; at least 1."""
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        sum(range(_NUMBERS))
        # Others who want the processor get it.
        time.sleep(0)
    return max(1.0, (time.perf_counter() - started) / _REFERENCE)
