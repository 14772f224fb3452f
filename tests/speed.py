"""How slow this machine is right now, so that tests know when something hangs.

The fixed number of seconds after which nothing takes that long is another one on each machine, and
on a machine that is busy. Deadlines of the harness are ``patience`` of the seconds that would be
generous on a machine that is as fast as the reference and has nothing else to do.

Only a test that hangs waits for such a deadline, so that it may be long.
"""

from __future__ import annotations

import time

__all__ = ["patience", "slowdown"]

# Seconds that the work below takes on the reference, one core of a server of 2023.
_REFERENCE = 0.025
_ROUNDS = 500_000
# The load of a machine changes: a deadline allows for so much more than there is when it is set.
_MARGIN = 4
_SLOWDOWN_MAX = 20
# Seconds for which a measurement holds.
_HOLDS = 10

_measured: tuple[float, float] | None = None


def slowdown() -> float:
    """How many times as long as on an idle reference work takes at present; at least 1.

    It is the time on the wall that counts: that of a machine that is busy with other processes, or
    of a thread that waits for others, passes as that of a slow one.
    """
    global _measured
    if _measured is None or time.monotonic() - _measured[0] > _HOLDS:
        began = time.monotonic()
        _work()
        now = time.monotonic()
        _measured = now, min(max((now - began) / _REFERENCE, 1.0), _SLOWDOWN_MAX)
    return _measured[1]


def patience(seconds: float) -> float:
    """The seconds after which it is certain that something hangs.

    Args:
        seconds: Those after which it would be certain on an idle reference.
    """
    # To the millisecond: sockets give back the same number as their timeout.
    return round(seconds * _MARGIN * slowdown(), 3)


def _work() -> int:
    total = 0
    for number in range(_ROUNDS):
        total += number
    return total
