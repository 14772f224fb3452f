"""The time budget and its deadlines, with a clock that the tests set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest
from anyio import CancelScope

from aiotorchio.errors import TransferTimeout
from aiotorchio.streams.base import Endpoint
from aiotorchio.streams.deadlines import TimeBudget


class Clock:
    def __init__(self) -> None:
        # A monotonic clock may start at any time.
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def load(
    clock: Clock, timeout: float | None = 10, least_rate: int = 100, **more: Any
) -> TimeBudget:
    return TimeBudget(clock, timeout, least_rate, "idle_timeout", **more)


def test_silence_uses_it_up(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    budget.moved(1)
    clock.now += 9.5
    assert budget.left() == pytest.approx(0.5)
    clock.now += 0.5
    assert budget.left() <= 0
    error = budget.error()
    assert str(error) == "no byte moved for 10.00 s (Limits.idle_timeout) (at byte 1)"
    assert isinstance(error, TransferTimeout)


def test_slow_bytes_and_silence_use_it_up_together(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    for seconds in (4, 6.01):
        budget.moved(1)
        clock.now += seconds
    assert budget.left() <= 0
    assert str(budget.error()) == (
        "no byte moved for 6.01 s (Limits.idle_timeout), and slow bytes before had used up the "
        "rest of 10 s (at byte 2)"
    )


def test_bytes_give_time_back(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    budget.moved(1)
    clock.now += 8
    budget.moved(300)
    assert budget.left() == pytest.approx(5)
    budget.moved(10_000_000)
    assert budget.left() == pytest.approx(10)


def test_slowness_uses_it_up_however_steady(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    moments = 0
    while budget.left() > 0:
        clock.now += 1
        budget.moved(50)
        moments += 1
    # The first byte starts the count. Each later second uses one second and gives half a second
    # back.
    assert moments == 20
    assert "fewer than 100 bytes a second moved (Limits.least_rate)" in str(budget.error())


@pytest.mark.parametrize("least_rate", [0, 100])
def test_no_bytes_are_no_sign_of_life(clock: Clock, least_rate: int) -> None:
    budget = load(clock, least_rate=least_rate, start_timeout=5)
    budget.begin()
    budget.moved(0)
    assert budget.left() == 5
    budget.moved(1)
    clock.now += 9
    budget.moved(0)
    assert budget.left() == pytest.approx(1)


@pytest.mark.parametrize(
    ("timeout", "least_rate", "size"),
    [(300, 1024, 256 * 2**10), (1, 100_000, 100_000), (1, 1, 4096), (None, 1, 256 * 2**10),
     (1, 0, 256 * 2**10)],
)  # fmt: skip
def test_pieces_that_the_slowest_peer_takes_in_time(
    clock: Clock, timeout: float | None, least_rate: int, size: int
) -> None:
    driver = Endpoint()
    assert driver.piece_size == 256 * 2**10
    driver.time_budget = load(clock, timeout, least_rate)
    assert driver.piece_size == size


def test_who_is_late_gets_nothing_back(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    budget.moved(1)
    clock.now += 11
    budget.moved(10_000)
    assert budget.left() <= 0


def test_who_keeps_the_rate_never_runs_out(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    for _ in range(1000):
        clock.now += 9
        budget.moved(900)
    assert budget.left() > 0


def test_any_rate_is_enough_if_none_is_asked_for(clock: Clock) -> None:
    budget = load(clock, least_rate=0)
    budget.begin()
    for _ in range(1000):
        budget.moved(1)
        clock.now += 9.9
    assert budget.left() == pytest.approx(0.1)


def test_what_the_peer_waits_for_does_not_count(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    budget.moved(1)
    clock.now += 4
    budget.end()
    clock.now += 1000
    budget.begin()
    clock.now += 5
    assert budget.left() == pytest.approx(1)


def test_a_message_may_begin_at_any_time(clock: Clock) -> None:
    budget = load(clock)
    budget.begin()
    clock.now += 10**6
    assert budget.left() == float("inf")


def test_a_message_that_does_not_begin(clock: Clock) -> None:
    budget = load(clock, start_timeout=3)
    budget.begin()
    clock.now += 2
    budget.end()
    clock.now += 100
    budget.begin()
    assert budget.left() == pytest.approx(1)
    clock.now += 1
    assert budget.left() <= 0
    error = budget.error()
    assert error.message == "no message began within 3 s (Limits.start_timeout)"
    assert error.offset == 0


def test_the_wait_for_the_start_is_not_held_against_the_peer(clock: Clock) -> None:
    budget = load(clock, start_timeout=100)
    budget.begin()
    clock.now += 99
    budget.moved(1)
    assert budget.left() == pytest.approx(10)


def test_a_header_has_its_own_end(clock: Clock) -> None:
    budget = load(clock, handshake_timeout=15)
    budget.begin()
    clock.now += 500
    budget.moved(1)
    for _ in range(3):
        clock.now += 4
        budget.moved(10_000)
    assert budget.left() == pytest.approx(3)
    clock.now += 3
    assert budget.left() <= 0
    assert "15 s after the first byte (Limits.handshake_timeout)" in str(budget.error())


def test_behind_the_header_it_has_none(clock: Clock) -> None:
    budget = load(clock, handshake_timeout=15)
    budget.begin()
    budget.moved(1)
    budget.handshake_over()
    for _ in range(100):
        clock.now += 4
        budget.moved(10_000)
    assert budget.left() == pytest.approx(10)


def test_without_a_timeout_it_is_endless(clock: Clock) -> None:
    budget = load(clock, timeout=None)
    budget.begin()
    for _ in range(10):
        budget.moved(1)
        clock.now += 10**6
    assert budget.left() == float("inf")


def test_a_save_has_no_start(clock: Clock) -> None:
    budget = TimeBudget(clock, 10, 100, "write_timeout", started=True)
    budget.begin()
    clock.now += 10
    assert budget.left() <= 0
    assert str(budget.error()) == "no byte moved for 10.00 s (Limits.write_timeout) (at byte 0)"


@pytest.mark.anyio
async def test_a_scope_is_told(clock: Clock) -> None:
    budget = load(clock, start_timeout=7)
    with anyio.CancelScope() as scope:
        budget.begin(scope)
        assert scope.deadline == clock.now + 7
        budget.moved(1)
        assert scope.deadline == clock.now + 10
        clock.now += 5
        budget.moved(100)
        assert scope.deadline == clock.now + 6
        budget.end()
        budget.moved(100)
        assert scope.deadline == clock.now + 6
        scope.deadline = float("inf")
        await anyio.lowlevel.checkpoint()


class Timers:
    """A timer on the given clock, with the interface of an asyncio event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.set: list[tuple[float, Callable[[], None]]] = []
        self.made = 0

    def call_at(self, when: float, callback: Callable[[], None]) -> Timers:
        assert not self.set, "more than one at a time"
        self.set = [(when, callback)]
        self.made += 1
        return self

    def cancel(self) -> None:
        self.set = []

    def go_off(self) -> None:
        ((self._clock.now, callback),) = self.set
        self.set = []
        callback()


@pytest.fixture
def timers(clock: Clock) -> Timers:
    return Timers(clock)


class Scope:
    """The used part of an anyio cancel scope."""

    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


def test_one_timer_is_enough_for_a_message_that_comes_in_time(clock: Clock, timers: Timers) -> None:
    budget = load(clock, call_at=timers.call_at)
    for _ in range(100):
        budget.begin(cast(CancelScope, Scope()))
        clock.now += 0.01
        budget.moved(1000)
        budget.end()
    assert timers.made == 1
    budget.close()
    assert not timers.set


def test_a_timer_that_is_early_looks_again(clock: Clock, timers: Timers) -> None:
    budget, scope = load(clock, call_at=timers.call_at), Scope()
    budget.begin(cast(CancelScope, scope))
    budget.moved(1)
    clock.now += 4
    budget.moved(10_000)
    timers.go_off()
    assert (scope.cancelled, timers.set[0][0]) == (0, clock.now + 4)
    timers.go_off()
    assert (scope.cancelled, budget.left()) == (1, 0)
    assert not timers.set


def test_a_timer_ends_no_wait_that_is_over(clock: Clock, timers: Timers) -> None:
    budget, scope = load(clock, call_at=timers.call_at), Scope()
    budget.begin(cast(CancelScope, scope))
    budget.moved(1)
    clock.now += 4
    budget.end()
    timers.go_off()
    assert (scope.cancelled, timers.set) == (0, [])
    # The next wait sets a timer again.
    budget.begin(cast(CancelScope, scope))
    assert timers.set[0][0] == clock.now + 6
    timers.go_off()
    assert (scope.cancelled, timers.set) == (1, [])


def test_a_timer_is_moved_if_patience_ends_sooner(clock: Clock, timers: Timers) -> None:
    more = {"start_timeout": 100, "handshake_timeout": 7}
    budget, scope = load(clock, call_at=timers.call_at, **more), Scope()
    budget.begin(cast(CancelScope, scope))
    assert timers.set[0][0] == clock.now + 100
    budget.moved(1)
    assert timers.set[0][0] == clock.now + 7
    budget.handshake_over()
    timers.go_off()
    assert (scope.cancelled, timers.set[0][0]) == (0, clock.now + 3)
