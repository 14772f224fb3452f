"""The deadline for a peer, from a time budget that waiting uses up and bytes restore.

In: the limits, and the bytes that moved. Out: the seconds left, a cancelled scope when there are
none, and the ``TransferTimeout`` to raise. The drivers and the adapters call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from anyio import CancelScope

from aiotorchio.errors import TransferTimeout

__all__ = ["CallAt", "TimeBudget"]

CallAt = Callable[[float, Callable[[], None]], Any]


# Seconds, 30 years: timers of event loops overflow somewhere beyond.
_FOREVER = 10**9


class TimeBudget:
    """The time budget for the peer of one message, as ``Limits`` defines it.

    Only the time between ``begin`` and ``end`` counts, since the peer waits at other times.

    Args:
        clock: Returns the time in seconds.
        call_at: Calls a function at a time of this clock and returns a handle with ``cancel()``, as
            event loops of asyncio do. Without it, the deadline of the scope is moved, which needs
            a timer of asyncio for each piece; with it, most messages need one timer.
        timeout: The full time budget in seconds.
        least_rate: Each byte restores 1 / ``least_rate`` seconds; with 0, all of them.
        limit: Name of the field of ``Limits`` that ``timeout`` has.
        started: Whether the time budget counts from the beginning, as in a save.
        start_timeout: Seconds until the first byte, if it does not.
        handshake_timeout: Seconds from the first byte until ``handshake_over`` is called.

    Attributes:
        count: Bytes that moved.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        timeout: float | None,
        least_rate: int,
        limit: str,
        *,
        call_at: CallAt | None = None,
        started: bool = False,
        start_timeout: float | None = None,
        handshake_timeout: float | None = None,
    ) -> None:
        self._timeout = _seconds(timeout)
        self._seconds_per_byte = 1 / least_rate if least_rate else math.inf
        self._least_rate = least_rate
        self._limit = limit
        self._start_timeout = _seconds(start_timeout)
        self._handshake_timeout = _seconds(handshake_timeout)
        self._started = started
        # Seconds left until the first byte, and after it.
        self._start_left, self._left = self._start_timeout, self._timeout
        self._since = self._moved_at = 0.0
        self._handshake_end = math.inf
        self._clock = clock
        self._call_at = call_at
        self._timer: Any = None
        self._timer_at = math.inf
        self._scope: CancelScope | None = None
        self.count = 0

    @property
    def least_nbytes(self) -> float:
        """Bytes that move at the least rate before the time budget is used up."""
        return self._least_rate * self._timeout if self._least_rate else math.inf

    def begin(self, scope: CancelScope | None = None) -> None:
        """Begin to wait; the scope is cancelled at the deadline."""
        self._scope = scope
        self._since = self._moved_at = self._clock()
        self._set_deadline()

    def moved(self, count: int) -> None:
        """Note bytes that came from the peer or went to it."""
        if not count:
            return
        now = self._clock()
        if self._started:
            self._left -= now - self._since
        else:
            self._started = True
            self._handshake_end = now + self._handshake_timeout
        self.count += count
        self._since = now
        # After the deadline, bytes restore nothing: the next wait fails.
        if self._left > 0:
            self._left = min(self._left + count * self._seconds_per_byte, self._timeout)
            self._moved_at = now
        self._set_deadline()

    def end(self) -> None:
        """End the wait."""
        passed = self._clock() - self._since
        if self._started:
            self._left -= passed
        else:
            self._start_left -= passed
        self._scope = None

    def close(self) -> None:
        """Cancel the timer: the message is over."""
        self._set_timer(math.inf)

    def handshake_over(self) -> None:
        """Note that the header was received."""
        self._handshake_end = math.inf

    def left(self) -> float:
        """Return the seconds left; 0 or less after the deadline."""
        return self._deadline() - self._clock()

    def error(self) -> TransferTimeout:
        """Make the error for a missed deadline."""
        now = self._clock()
        idle = now - self._moved_at
        if not self._started:
            text = f"no message began within {self._start_timeout:g} s (Limits.start_timeout)"
        elif now >= self._handshake_end:
            text = (
                f"the header was not complete {self._handshake_timeout:g} s after the first byte "
                "(Limits.handshake_timeout)"
            )
        # Waits for slow bytes and the last wait, without a byte, have used up the time budget
        # together: the error names the longer of the two.
        elif idle >= self._timeout / 2:
            text = f"no byte moved for {idle:.2f} s (Limits.{self._limit})"
            if idle < 0.99 * self._timeout:
                text += f", and slow bytes before had used up the rest of {self._timeout:g} s"
        else:
            text = (
                f"fewer than {self._least_rate} bytes a second moved (Limits.least_rate), and "
                f"the time budget of {self._timeout:g} s is used up (Limits.{self._limit})"
            )
        return TransferTimeout(text, offset=self.count)

    def _deadline(self) -> float:
        if not self._started:
            return self._since + self._start_left
        return min(self._since + self._left, self._handshake_end)

    def _set_deadline(self) -> None:
        if self._scope is None:
            return
        deadline = self._deadline()
        if self._call_at is None:
            self._scope.deadline = deadline
        # A timer that fires too early is set again: most waits end long before it.
        elif deadline < self._timer_at:
            self._set_timer(deadline)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = None
        if self._call_at is not None and at < math.inf:
            self._timer = self._call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        """Cancel the scope if no time is left; otherwise set the timer again."""
        self._set_timer(math.inf)
        if self._scope is None:
            return
        if self.left() > 0:
            self._set_deadline()
        else:
            self._scope.cancel()


def _seconds(timeout: float | None) -> float:
    return math.inf if timeout is None or timeout > _FOREVER else timeout
