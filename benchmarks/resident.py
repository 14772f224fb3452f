"""Measures resident memory over time, while a state is transferred."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from common import MIB, Method, PeakMemory
from methods import inside

PERIOD = 0.01


@contextlib.contextmanager
def _sampled(notes: dict[str, Any]) -> Iterator[None]:
    start, before = time.perf_counter(), PeakMemory.resident()
    samples: list[list[float]] = []
    over = threading.Event()

    def sample() -> None:
        above = (PeakMemory.resident() - before) / MIB
        samples.append([round(time.perf_counter() - start, 4), round(above, 2)])

    def watch() -> None:
        sample()
        while not over.wait(PERIOD):
            sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sample()
        notes["resident"] = samples


def watched(make: Callable[[], Method], notes: dict[str, Any]) -> Method:
    """Wrap a method; note [seconds, MiB above before] every ten milliseconds, in a thread."""
    return inside(make(), lambda: _sampled(notes))
