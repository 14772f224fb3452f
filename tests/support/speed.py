"""Measures how slow this machine is right now, so that tests can tell when something hangs.

The number of seconds after which something certainly hangs depends on the machine and its load.
Deadlines of the harness are ``patience(seconds)``, with the generous number of seconds for an idle
machine that is as fast as the reference. Only a test that hangs waits for such a deadline, so that
it may be long. Bounds that a test measures against are multiplied by ``slowdown`` itself.
"""

from __future__ import annotations

import math
import time

__all__ = ["patience", "slowdown"]

# Seconds that the work below takes on the reference, one free core of a server of 2023.
_REFERENCE = 0.08
_ROUNDS, _NUMBERS = 20, 60_000
# The load of a machine changes: a deadline allows for a load that is so many times higher later.
_MARGIN = 8
_SLOWDOWN_MAX = 20
# Seconds for which a measurement is valid.
_HOLDS = 10

_measured: tuple[float, float] | None = None


def slowdown(*, again: bool = False) -> float:
    """Measure how many times as long as on an idle reference work takes at present; at least 1.

    The time on the clock counts: on a machine that is busy with other processes, or in a thread
    that waits for others, it is as long as on a slow machine.

    Args:
        again: Measure now, however recent the last measurement is.
    """
    global _measured
    if again or _measured is None or time.monotonic() - _measured[0] > _HOLDS:
        began = time.monotonic()
        _work()
        now = time.monotonic()
        _measured = now, min(max((now - began) / _REFERENCE, 1.0), _SLOWDOWN_MAX)
    return _measured[1]


def patience(seconds: float) -> float:
    """Return the seconds after which something certainly hangs.

    Args:
        seconds: The number of seconds on an idle reference.
    """
    # Whole eighths have no rounding error in binary: sockets, which round their timeout up to
    # nanoseconds, return the same number.
    return math.ceil(seconds * _MARGIN * slowdown() * 8) / 8


def _work() -> None:
    for _ in range(_ROUNDS):
        sum(range(_NUMBERS))
        # Other processes that need the processor get it.
        time.sleep(0)
