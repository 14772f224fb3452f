"""How slow this machine is right now, so that tests know when something hangs.

The fixed number of seconds after which nothing takes that long is another one on each machine, and
on a machine that is busy. Deadlines of the harness are ``patience`` of the seconds that would be
generous on a machine that is as fast as the reference and has nothing else to do. Only a test that
hangs waits for such a deadline, so that it may be long. Bounds that a test measures against are
multiplied by ``slowdown`` itself.
"""

from __future__ import annotations

import time

__all__ = ["patience", "slowdown"]

# Seconds that the work below takes on the reference, one free core of a server of 2023.
_REFERENCE = 0.08
_ROUNDS, _NUMBERS = 20, 60_000
# The load of a machine changes: a deadline allows for so much more than there is when it is set.
_MARGIN = 8
_SLOWDOWN_MAX = 20
# Seconds for which a measurement holds.
_HOLDS = 10

_measured: tuple[float, float] | None = None


def slowdown(*, again: bool = False) -> float:
    """How many times as long as on an idle reference work takes at present; at least 1.

    It is the time on the wall that counts: that of a machine that is busy with other processes, or
    of a thread that waits for others, passes as that of a slow one.

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
    """The seconds after which it is certain that something hangs.

    Args:
        seconds: Those after which it would be certain on an idle reference.
    """
    # To the millisecond: sockets give back the same number as their timeout.
    return round(seconds * _MARGIN * slowdown(), 3)


def _work() -> None:
    for _ in range(_ROUNDS):
        sum(range(_NUMBERS))
        # Other processes that want the processor get it.
        time.sleep(0)
