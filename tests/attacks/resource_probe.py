"""Measures the outcome of a case: time, memory, turns of the event loop, and leaks."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import torch
import trio
from torch import _utils

import aiotorchio
from aiotorchio.streams import guard
from aiotorchio.streams.base import asyncio_loop
from tests.support.backends import descriptors

__all__ = [
    "BUSY_MAX",
    "ENDING_MAX",
    "HELD_MAX",
    "STALL_MAX",
    "Outcome",
    "ResourceProbe",
    "surroundings",
]

# Seconds; all but the first are multiplied by ``Outcome.slowness``.
HELD_MAX, BUSY_MAX, STALL_MAX, ENDING_MAX = 0.05, 0.05, 1.0, 0.1
# Seconds between two beats: with a task that never waited, worker threads would wait for the
# interpreter's lock at each turn.
_BEAT_EVERY = 0.001


@dataclass
class Outcome:
    """The outcome of a case.

    Attributes:
        errors: How many messages were refused with each class of error; empty if none was.
        text: The text of the last error.
        located: Whether all errors that can have a location have one.
        after: See ``Case.after``.
        seconds: The longest call.
        grown: Bytes between the memory before and the peak.
        held: Seconds of processor time that the event loop's thread took between two turns.
        busy: Seconds of processor time that all threads took between two turns: one of them kept
            the interpreter from the loop, or the machine had no processor for it.
        stall: Seconds on the clock between two turns.
        ending: Seconds of processor time that all threads took from a cancellation to the end of
            the call.
        ending_stall: Seconds on the clock of the same.
        left: The leaks of the case.
        slowness: The slowness of the machine during the case; see ``tests.support.speed``.
    """

    name: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    text: str = ""
    located: bool = True
    after: str = ""
    seconds: float = 0
    grown: int = 0
    held: float = 0
    busy: float = 0
    stall: float = 0
    ending: float = 0
    ending_stall: float = 0
    left: str = ""
    slowness: float = 1

    @property
    def turns(self) -> bool:
        """Whether the event loop turned, and calls ended, as soon as they must."""
        return (
            self.held <= HELD_MAX
            and self.busy <= BUSY_MAX * self.slowness
            and self.stall <= STALL_MAX * self.slowness
            and self.ending <= ENDING_MAX * self.slowness
            and self.ending_stall <= STALL_MAX * self.slowness
        )

    def note(self, error: Exception | None, nbytes: int) -> None:
        name = type(error).__name__ if error else ""
        self.errors[name] = self.errors.get(name, 0) + 1
        self.text = str(error) if error else self.text
        if isinstance(error, aiotorchio.AiotorchioError):
            place = error.offset
            self.located &= error.entry is not None and place is not None and 0 <= place <= nbytes


_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


def peak_nbytes() -> int:
    """The peak of resident memory since the last ``reset_peak``."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    # Freed memory is returned to the system first: else it would hide a part of the growth.
    gc.collect()
    _trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_nbytes()


def _clocks() -> tuple[float, float, float]:
    return time.thread_time(), time.process_time(), time.monotonic()


class ResourceProbe:
    """Measures time, memory and turns of the event loop within its block.

    A task beats at the first turn of the loop in each millisecond. Between two beats, the processor
    time of its thread is the time for which the loop was held, and at most a millisecond of turns
    before: it does not depend on other processes on the machine. The processor time of all threads
    shows calls in worker threads that keep the interpreter to themselves; time on the clock shows
    calls that wait on the loop for the peer.
    """

    def __init__(self, outcome: Outcome, *, beats: bool) -> None:
        self._outcome = outcome
        self._beats = beats

    async def beat(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._beat_at = _clocks()
        task_status.started()
        while True:
            await anyio.sleep(_BEAT_EVERY)
            self._note_beat()

    def _note_beat(self) -> None:
        now, outcome = _clocks(), self._outcome
        held, busy, stall = (end - start for start, end in zip(self._beat_at, now, strict=True))
        outcome.held = max(outcome.held, held)
        outcome.busy = max(outcome.busy, busy)
        outcome.stall = max(outcome.stall, stall)
        self._beat_at = now

    def cancelled(self) -> None:
        """Note that a call was cancelled now."""
        self._cancelled_at = _clocks()

    def ended(self) -> None:
        """Note that the cancelled call has ended now."""
        outcome = self._outcome
        _, busy, stall = (
            end - start for start, end in zip(self._cancelled_at, _clocks(), strict=True)
        )
        outcome.ending = max(outcome.ending, busy)
        outcome.ending_stall = max(outcome.ending_stall, stall)

    def __enter__(self) -> None:
        self._peak = reset_peak()
        self._started = time.monotonic()
        self._beat_at = _clocks()

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._started
        if self._beats:
            self._note_beat()
        outcome = self._outcome
        outcome.seconds = max(outcome.seconds, seconds)
        outcome.grown = max(outcome.grown, peak_nbytes() - self._peak)


def surroundings(loop: str) -> dict[str, Any]:
    """The state of the process that a case may not change."""
    return {
        "descriptors": len(descriptors()),
        # Threads of aiotorchio's pool stay; trio keeps idle ones for all its users.
        "threads": sorted(
            thread.name
            for thread in threading.enumerate()
            if not thread.name.lower().startswith(("aiotorchio", "trio"))
        ),
        "tasks": 0 if loop == "none" else _tasks(),
        "streams": len(guard._states),
        "sparse tensors": len(_utils._sparse_tensors_to_validate),
        "sparse checks": torch.sparse.check_sparse_tensor_invariants.is_enabled(),
        "safe globals": list(map(str, torch.serialization.get_safe_globals())),
        "collector": [gc.isenabled(), *gc.get_threshold()],
    }


def _tasks() -> int:
    if asyncio_loop() is None:
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())
