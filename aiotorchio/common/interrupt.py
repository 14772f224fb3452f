"""Interrupts: they end work in a worker thread soon after the cancellation of the call.

A thread cannot be cancelled from outside, and its memory is in use until it ends. So the waiting
call requests an interrupt (see ``engine/threads.py``), and every loop whose length a peer chooses
calls ``check_interrupt`` at least once in about a millisecond of work: it takes 0.1 us. Outside
``run_in_thread`` nothing requests an interrupt, and the check does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TypeVar

__all__ = ["Interrupt", "Interrupted", "check_interrupt", "interruptible"]

T = TypeVar("T")


class Interrupted(BaseException):
    """The call was cancelled; not an ``Exception``, so that ``except Exception`` lets it pass."""


class Interrupt:
    """The request to end one task, shared by the thread that runs it and the waiting call.

    Attributes:
        requested: Whether the task must end.
        begun: Whether the task has begun to run.
    """

    def __init__(self) -> None:
        self.requested = self.begun = False
        self._lock = threading.Lock()

    def request(self) -> bool:
        """Request the end of the task, or prevent its start; returns whether it has begun."""
        with self._lock:
            self.requested = True
            return self.begun

    def run(self, task: Callable[[], T]) -> T:
        """Run a task in this thread, with this interrupt.

        Raises:
            Interrupted: The interrupt was requested before the task had ended.
        """
        with self._lock:
            if self.requested:
                raise Interrupted
            self.begun = True
        before, _thread.interrupt = _thread.interrupt, self
        try:
            return task()
        finally:
            _thread.interrupt = before


class _Thread(threading.local):
    interrupt = Interrupt()


_thread = _Thread()


def check_interrupt(_: object = None) -> None:
    """End the task of this thread if an interrupt was requested.

    A class can use it as its ``__post_init__``.

    Raises:
        Interrupted: It was requested.
    """
    if _thread.interrupt.requested:
        raise Interrupted


def interruptible(items: Iterable[T], every: int = 1000) -> Iterator[T]:
    """Yield the items, with a check before each ``every`` of them."""
    # A generator here would be resumed for each item, which takes as long as some loop bodies.
    return chain.from_iterable(_batches(iter(items), every))


def _batches(items: Iterator[T], every: int) -> Iterator[Iterator[T]]:
    for item in items:
        check_interrupt()
        yield chain((item,), islice(items, every - 1))
