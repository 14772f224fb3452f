"""What sending and receiving have in common: a message as a generator.

It does everything but I/O: it yields what it waits for, and a driver (see ``drive``) carries it
out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from aiotorchio.drive import Request
from aiotorchio.threads import Task
from aiotorchio.wire.parser import Work

__all__ = ["INLINE_ROWS", "INLINE_SKELETON", "Progress", "work"]

Progress = Callable[[int, int], object]

# Up to this many tensors are built on the event loop: a thread takes 0.1 ms to get to work, and
# building takes 5 us a tensor.
INLINE_ROWS = 200
# Likewise for the bytes of a skeleton that is read there.
INLINE_SKELETON = 8 * 2**10


def work(task: Task, *, inline: bool) -> Generator[Request, Any, Any]:
    """Run a task here, or ask for a worker thread."""
    return task() if inline else (yield Work(task))
