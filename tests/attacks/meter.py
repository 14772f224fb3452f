"""What came of a case, and what it took: time, memory, turns of the event loop, and leavings."""

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
from tests.worlds import descriptors

__all__ = ["LAG_MAX", "STALL_MAX", "Meter", "Outcome", "surroundings"]

LAG_MAX, STALL_MAX = 0.05, 1.0


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        errors: How many messages were refused with each class of error; with none: empty.
        text: Of the last error.
        located: Whether all errors that can say where they were found do.
        after: See ``Case.after``.
        seconds: The longest that a call took.
        grown: Bytes that the peak of memory lies above what was taken before.
        lag: Seconds of processor time for which the event loop did not turn.
        stall: Seconds on the clock for which it did not.
        left: What the case left behind.
    """

    name: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    text: str = ""
    located: bool = True
    after: str = ""
    seconds: float = 0
    grown: int = 0
    lag: float = 0
    stall: float = 0
    left: str = ""

    def note(self, error: Exception | None, nbytes: int) -> None:
        name = type(error).__name__ if error else ""
        self.errors[name] = self.errors.get(name, 0) + 1
        self.text = str(error) if error else self.text
        if isinstance(error, aiotorchio.AiotorchioError):
            place = error.offset
            self.located &= error.entry is not None and place is not None and 0 <= place <= nbytes


_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


def peak_nbytes() -> int:
    """The most memory that was resident since the last ``reset_peak``."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    # What was freed is given back first: it would take part of the growth.
    gc.collect()
    _trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_nbytes()


class Meter:
    """Time, memory and lag of what runs inside of its block.

    The lag is processor time of this process between two beats of a task that sleeps for a
    millisecond: what a call of ours or of torch that does not let go of the interpreter takes.
    Time on the wall is that of whoever else uses the machine, too; a call that waits on the loop
    for the peer takes more of it than they do.
    """

    def __init__(self, outcome: Outcome, *, beats: bool) -> None:
        self._outcome = outcome
        self._beats = beats

    async def beat(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._beat_at = time.process_time(), time.monotonic()
        task_status.started()
        while True:
            await anyio.sleep(0.001)
            self._note_beat()

    def _note_beat(self) -> None:
        now = time.process_time(), time.monotonic()
        self._outcome.lag = max(self._outcome.lag, now[0] - self._beat_at[0])
        self._outcome.stall = max(self._outcome.stall, now[1] - self._beat_at[1])
        self._beat_at = now

    def __enter__(self) -> None:
        self._peak = reset_peak()
        self._started = time.monotonic()
        self._beat_at = time.process_time(), time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._started
        if self._beats:
            self._note_beat()
        outcome = self._outcome
        outcome.seconds = max(outcome.seconds, seconds)
        outcome.grown = max(outcome.grown, peak_nbytes() - self._peak)


def surroundings(loop: str) -> dict[str, Any]:
    """What a case may not change."""
    return {
        "descriptors": len(descriptors()),
        # Those of the library's pool stay; trio keeps idle ones for all who use it.
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
