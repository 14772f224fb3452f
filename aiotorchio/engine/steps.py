"""What sending and receiving have in common: a message as a generator.

It does everything but I/O: it yields what it waits for, and a driver (see ``drive``) carries it
out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from aiotorchio.engine.drivers import Checkpoint, Request
from aiotorchio.engine.threads import Task
from aiotorchio.wire.parser import Work

__all__ = [
    "INLINE_HEADER",
    "INLINE_NBYTES",
    "INLINE_ROWS",
    "INLINE_SKELETON",
    "Progress",
    "in_turns",
    "work",
]

T = TypeVar("T")

Progress = Callable[[int, int], object]

# Up to this many tensors are built on the event loop: a thread takes 0.1 ms to get to work, and
# building takes 5 us a tensor.
INLINE_ROWS = 200
# Likewise for the bytes of a skeleton, and those of a header: a row may have any number of names.
INLINE_SKELETON, INLINE_HEADER = 8 * 2**10, 32 * 2**10
# Likewise for bytes that are swapped or copied: 1 MiB takes up to 8 ms.
INLINE_NBYTES = 256 * 2**10


def work(task: Task, *, inline: bool) -> Generator[Request, Any, Any]:
    """Run a task here, or ask for a worker thread."""
    return task() if inline else (yield Work(task))


def in_turns(change: Callable[[T], Any], items: Iterable[T]) -> Generator[Request, Any, list[Any]]:
    """Apply the caller's code to many items here, with other tasks in between."""
    changed = []
    for item in items:
        changed.append(change(item))
        if not len(changed) % 16:
            yield Checkpoint()
    return changed
