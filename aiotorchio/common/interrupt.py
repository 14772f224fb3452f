"""Ends long work in a worker thread soon after the call that waits for it was cancelled.

A thread cannot be cancelled from outside, and its memory is in use until it ends. So the waiting
side requests an interrupt (see ``threads``), and every loop whose length a peer chooses calls
``check_interrupt``, once in about a millisecond of work or more often: it takes 0.1 us. Outside of
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
    """Nobody waits for the result any more; not an ``Exception``, so that nothing handles it."""


class Interrupt:
    """The request to end one task, shared by the thread that runs it and the one that waits.

    Attributes:
        requested: Whether the task must end.
        begun: Whether the task has begun to run.
    """

    def __init__(self) -> None:
        self.requested = self.begun = False
        self._lock = threading.Lock()

    def request(self) -> bool:
        """End the task, or keep it from beginning; returns whether it has begun."""
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
    """End the task of this thread if nobody waits for it any more.

    A class can use it as its ``__post_init__``.

    Raises:
        Interrupted: Nobody does.
    """
    if _thread.interrupt.requested:
        raise Interrupted


def interruptible(items: Iterable[T], every: int = 1000) -> Iterator[T]:
    """The same items, one after the other, with a check before each ``every`` of them."""
    # A generator would be resumed for each item, which takes as long as some of the loops.
    return chain.from_iterable(_batches(iter(items), every))


def _batches(items: Iterator[T], every: int) -> Iterator[Iterator[T]]:
    for item in items:
        check_interrupt()
        yield chain((item,), islice(items, every - 1))
