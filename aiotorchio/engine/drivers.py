"""What a message waits for, and the two drivers that carry it out.

A message is a generator (see ``transfer``): it does everything but I/O and yields a request for
whatever takes time. ``drive`` answers on an async stream, ``drive_blocking`` on a blocking one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from aiotorchio.common.buffer import Buffer
from aiotorchio.engine.threads import Task, run_in_thread
from aiotorchio.limits import Limits
from aiotorchio.streams.base import Endpoint, Sink, Source, asyncio_loop
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.deadlines import CallAt, Deadline
from aiotorchio.wire.parser import HeaderReceived, MessageEnded, ReadBytes, Work

__all__ = [
    "END",
    "Checkpoint",
    "Fill",
    "Next",
    "Request",
    "Send",
    "Turns",
    "drive",
    "drive_blocking",
    "load_deadline",
    "next_item",
    "save_deadline",
]

T = TypeVar("T")

# How long a task works on the event loop before others have their turn: short beside the 50 ms
# that a loop may be held, long beside the 20 us that a turn costs.
_TURN_SECONDS = 0.005
# How much it hands out until then, with no clock: in bytes, and in bytes that stand for an item.
_TURN_NBYTES, _ITEM_NBYTES = 2**22, 2**16


@dataclass(frozen=True, slots=True)
class Send:
    """Asks to send buffers, and to run a task in the meantime; answer: the task's result.

    ``passing`` buffers are of use only until the answer: their memory takes other bytes then.
    """

    buffers: Sequence[Buffer]
    background: Task | None = None
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """Asks to fill buffers, and to run a task in the meantime; answer: bytes written."""

    buffers: Sequence[memoryview]
    background: Task | None = None


@dataclass(frozen=True, slots=True)
class Next:
    """Asks an iterator of the caller's, plain or async, for its next item; END behind the last."""

    iterator: Iterator[Any] | AsyncIterator[Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Says that the work that follows can wait: on an event loop, other tasks may run first."""


END = object()

Request = ReadBytes | Fill | Send | Work | Next | Checkpoint | HeaderReceived | MessageEnded
Clock = Callable[[], float]


def load_deadline(limits: Limits, clock: Clock | None = None) -> Deadline:
    """The patience of a load with its sender; by default by the clock of the event loop."""
    clock, call_at = _clock_of_the_loop() if clock is None else (clock, None)
    return Deadline(
        clock,
        limits.idle_timeout,
        limits.least_rate,
        "idle_timeout",
        call_at=call_at,
        start_timeout=limits.start_timeout,
        handshake_timeout=limits.handshake_timeout,
    )


def save_deadline(limits: Limits, clock: Clock | None = None) -> Deadline:
    """The patience of a save with its receiver; likewise."""
    clock, call_at = _clock_of_the_loop() if clock is None else (clock, None)
    return Deadline(
        clock,
        limits.write_timeout,
        limits.least_rate,
        "write_timeout",
        call_at=call_at,
        started=True,
    )


def _clock_of_the_loop() -> tuple[Clock, CallAt | None]:
    """What tells the time, and on asyncio, what calls at a time."""
    loop = asyncio_loop()
    # anyio looks for its backend at each call.
    return (anyio.current_time, None) if loop is None else (loop.time, loop.call_at)


class Turns:
    """Gives other tasks a turn whenever a task has held the event loop for some milliseconds.

    Waits that find their bytes at once do not suspend the task, and neither does work that is done
    on the loop: many of them in a row would hold it for as long as they last together.
    """

    def __init__(self) -> None:
        self._due = time.perf_counter() + _TURN_SECONDS
        self._nbytes = 0

    async def item(self, nbytes: int = 0) -> None:
        """Count an item that a consumer has taken; it may not wait for anything itself."""
        self._nbytes += nbytes + _ITEM_NBYTES
        if self._nbytes >= _TURN_NBYTES:
            self._due = 0.0
        await self.checkpoint()

    async def checkpoint(self) -> None:
        """Let other tasks run, and take a cancellation, if it is time."""
        if time.perf_counter() >= self._due:
            try:
                await anyio.lowlevel.checkpoint()
            finally:
                # After a cancellation, too: whoever goes on from there gets further.
                self._due, self._nbytes = time.perf_counter() + _TURN_SECONDS, 0


async def drive(message: Generator[Request, Any, T], stream: Source | Sink) -> T:
    """Carry out on an async stream what a message waits for; return what it returns."""
    turns = Turns()
    try:
        request = next(message)
        while True:
            if not _uncancellable(request):
                await turns.checkpoint()
            try:
                answer = await _perform(request, stream)
            except Exception as error:
                request = message.throw(error)
            else:
                request = message.send(answer)
                # A tensor of the caller's iterator is free when the next is asked for.
                del answer
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        message.close()


def _uncancellable(request: Request) -> bool:
    # Between the last byte of a message and its end no cancellation may come: the stream would be
    # taken for one that stands inside of the message.
    return isinstance(request, MessageEnded) or (isinstance(request, Work) and request.to_its_end)


async def _perform(request: Request, stream: Any) -> Any:
    match request:
        case ReadBytes(size):
            return await _with_deadline(stream, stream.read, size)
        case Fill(buffers, background):
            fill = functools.partial(_with_deadline, stream, stream.fill, buffers)
            filled, _ = await _with(background, fill)
            return filled
        case Send(buffers, background):
            send = functools.partial(_with_deadline, stream, stream.send, buffers)
            _, result = await _with(background, send)
            return result
        case Work(task, to_its_end):
            return await run_in_thread(task, to_its_end=to_its_end)
        case Next(iterator):
            return await next_item(iterator)
        case Checkpoint():
            pass
        case HeaderReceived():
            _header_received(stream)
        case MessageEnded():
            stream.in_message = False


async def _with_deadline(
    stream: Endpoint, transfer: Callable[[Any], Awaitable[T]], argument: Any
) -> T:
    """Wait for the peer, as long as its pace allows."""
    deadline = stream.deadline
    if deadline is None:
        return await transfer(argument)
    with anyio.CancelScope() as scope:
        deadline.begin(scope)
        try:
            return await transfer(argument)
        finally:
            deadline.end()
    # A frame may be half sent: nothing goes behind it, not even why.
    stream.failure = deadline.error()
    raise stream.failure


def _header_received(stream: Endpoint) -> None:
    if stream.deadline is not None:
        stream.deadline.handshake_over()


async def next_item(iterator: Iterator[Any] | AsyncIterator[Any]) -> Any:
    """The next item of an iterator of the caller's; END behind the last."""
    if isinstance(iterator, AsyncIterator):
        return await anext(iterator, END)
    # Here, not in a thread: what it sets for its thread (no_grad) must stay there.
    return next(iterator, END)


async def _with(task: Task | None, transfer: Callable[[], Awaitable[Any]]) -> tuple[Any, Any]:
    """Run a task in a worker thread while bytes are on the way; return both results."""
    if task is None:
        return await transfer(), None
    errors: list[Exception] = []
    transferred = result = None

    async def background() -> None:
        nonlocal result
        try:
            result = await run_in_thread(task)
        except Exception as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(background)
        try:
            transferred = await transfer()
        except Exception as error:
            # First in the list: a broken connection matters more than a failed copy.
            errors.insert(0, error)
    try:
        if errors:
            raise errors[0]
        return transferred, result
    finally:
        errors.clear()


def drive_blocking(message: Generator[Request, Any, T], stream: BlockingStream) -> T:
    """Carry out on a blocking stream what a message waits for; return what it returns."""
    try:
        request = next(message)
        while True:
            try:
                answer = _perform_blocking(request, stream)
            except Exception as error:
                request = message.throw(error)
            else:
                request = message.send(answer)
                del answer
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        message.close()


def _perform_blocking(request: Request, stream: BlockingStream) -> Any:
    match request:
        case ReadBytes(size):
            return _with_deadline_blocking(stream, stream.read, size)
        case Fill(buffers, background):
            filled = _with_deadline_blocking(stream, stream.fill, buffers)
            if background:
                background()
            return filled
        case Send(buffers, background):
            _with_deadline_blocking(stream, stream.send, buffers)
            return background() if background else None
        case Work(task):
            return task()
        case Next(iterator):
            # Not an async one: save() has refused it.
            return next(iterator, END)  # type: ignore[arg-type]
        case Checkpoint():
            pass
        case HeaderReceived():
            _header_received(stream)
        case MessageEnded():
            stream.in_message = False


def _with_deadline_blocking(stream: Endpoint, transfer: Callable[[Any], T], argument: Any) -> T:
    if stream.deadline is None:
        return transfer(argument)
    stream.deadline.begin()
    try:
        return transfer(argument)
    finally:
        stream.deadline.end()
