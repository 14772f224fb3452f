"""The requests that a message yields to its driver, and the contract between the two.

A message is a generator that sends or receives one message without any I/O. It yields requests,
and a driver (``drivers``) answers each of them on an async stream, a blocking stream, or as pieces
of bytes. The generator's return value is the result of the call.

    request                                the driver ...; it sends back ...
    -------------------------------------  ---------------------------------------------------
    ReadBytes(size)                        reads from the stream; the bytes, fewer than
                                           ``size`` only at the end of the stream
    Fill(buffers, background)              receives into the buffers while it runs the task;
                                           the number of bytes, fewer only at the end
    Send(buffers, background, transient)   sends the buffers while it runs the task; the
                                           task's result
    Work(task, to_its_end)                 runs the task, on an event loop in a worker thread;
                                           the task's result
    Next(iterator)                         takes the next item; the item, or ``END``
    Checkpoint()                           lets other tasks of an event loop run; None
    HeaderReceived(...)                    ends the time limit of the header; None
    MessageEnded()                         notes that the stream is between messages; None

``ReadBytes``, ``Work``, ``HeaderReceived`` and ``MessageEnded`` come from the wire's parser, which
defines them. A blocking driver runs the background task after the transfer. ``drive_to_pieces`` has
no stream, so it can drive a save only.

Order: the driver answers a request before the message yields the next one. ``next`` gets the first.

Errors: an ``Exception`` of a request is thrown into the message at its ``yield``. The message
raises it, or another one, but may yield requests first: a save sends the frame that tells the
receiver why. If both the stream and a background task fail, the stream's error is thrown.

Cancellation: a cancellation, or any other ``BaseException``, is not thrown. The driver closes the
message, which must not yield any more. Two requests may not be cancelled: ``Work`` with
``to_its_end``, which frees long tables that would otherwise be freed on the event loop, and
``MessageEnded``, without which the stream would count as poisoned after its last byte.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aiotorchio.common.buffer import Buffer
from aiotorchio.engine.threads import Task
from aiotorchio.wire.parser import HeaderReceived, MessageEnded, ReadBytes, Work

__all__ = [
    "END",
    "Checkpoint",
    "Fill",
    "Next",
    "Progress",
    "Request",
    "Send",
    "in_turns",
    "work",
]

T = TypeVar("T")

# A callback of the caller, which a message calls itself, after each chunk: bytes of the payload
# that are done, and all of them.
Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Send:
    """Send buffers, and run a task at the same time; answer: the task's result.

    Attributes:
        buffers: The bytes to send, in order.
        background: The task; it may run in a worker thread.
        transient: Whether the buffers hold only until the answer: other bytes may then take their
            memory.
    """

    buffers: Sequence[Buffer]
    background: Task | None = None
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """Fill buffers with the next bytes, and run a task at the same time; answer: bytes written.

    Attributes:
        buffers: The memory to fill, in order.
        background: The task; it may run in a worker thread.
    """

    buffers: Sequence[memoryview]
    background: Task | None = None


@dataclass(frozen=True, slots=True)
class Next:
    """Take the next item of an iterator of the caller; answer: the item, or ``END`` at the end."""

    iterator: Iterator[Any] | AsyncIterator[Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Let other tasks of an event loop run, since the work that follows can wait; answer: None."""


END = object()

Request = ReadBytes | Fill | Send | Work | Next | Checkpoint | HeaderReceived | MessageEnded


def work(task: Task, *, inline: bool) -> Generator[Request, Any, Any]:
    """Run a task here, or request a worker thread for it."""
    return task() if inline else (yield Work(task))


def in_turns(change: Callable[[T], Any], items: Iterable[T]) -> Generator[Request, Any, list[Any]]:
    """Apply code of the caller to many items here, with checkpoints in between."""
    changed = []
    for item in items:
        changed.append(change(item))
        if not len(changed) % 16:
            yield Checkpoint()
    return changed
