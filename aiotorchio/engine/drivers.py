"""The drivers, which answer the requests of a message (see ``requests``) until it returns.

``drive`` answers on an async stream, ``drive_blocking`` on a blocking one, and both return the
result of the message. ``drive_to_pieces`` yields the bytes of a save. All of them raise the error
of the message. The time budgets of loads and saves are made here, too: a driver begins a wait of
its stream's budget for each request to read or to send.
"""

from __future__ import annotations

import functools
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
)
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

from aiotorchio.engine.requests import END, Checkpoint, Fill, Next, Request, Send
from aiotorchio.engine.threads import Task, run_in_thread
from aiotorchio.limits import Limits
from aiotorchio.streams.base import Endpoint, Sink, Source, asyncio_loop, coalesce
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.deadlines import CallAt, TimeBudget
from aiotorchio.wire.parser import HeaderReceived, MessageEnded, ReadBytes, Work

__all__ = [
    "Turns",
    "drive",
    "drive_blocking",
    "drive_to_pieces",
    "load_time_budget",
    "save_time_budget",
]

T = TypeVar("T")

# How long a task works on the event loop before other tasks run: short compared with the 50 ms
# that a loop may be held, long compared with the 20 us that a checkpoint costs.
_TURN_SECONDS = 0.005
# How much a task yields to its consumer before other tasks run, without a look at the clock: bytes,
# and the bytes that each item counts for.
_TURN_NBYTES, _ITEM_NBYTES = 2**22, 2**16


Clock = Callable[[], float]


def load_time_budget(limits: Limits, clock: Clock | None = None) -> TimeBudget:
    """Make the time budget of the sender in a load; by default on the event loop's clock."""
    clock, call_at = _clock_of_the_loop() if clock is None else (clock, None)
    return TimeBudget(
        clock,
        limits.idle_timeout,
        limits.least_rate,
        "idle_timeout",
        call_at=call_at,
        start_timeout=limits.start_timeout,
        handshake_timeout=limits.handshake_timeout,
    )


def save_time_budget(limits: Limits, clock: Clock | None = None) -> TimeBudget:
    """Make the time budget of the receiver in a save; by default on the event loop's clock."""
    clock, call_at = _clock_of_the_loop() if clock is None else (clock, None)
    return TimeBudget(
        clock,
        limits.write_timeout,
        limits.least_rate,
        "write_timeout",
        call_at=call_at,
        started=True,
    )


def _clock_of_the_loop() -> tuple[Clock, CallAt | None]:
    """Return the clock of the event loop, and on asyncio the function that schedules a call."""
    loop = asyncio_loop()
    # anyio looks for its backend at each call.
    return (anyio.current_time, None) if loop is None else (loop.time, loop.call_at)


class Turns:
    """Lets other tasks run whenever a task has held the event loop for some milliseconds.

    A wait for bytes that are already in memory does not suspend the task, and neither does work on
    the loop: many of them in a row would hold the loop for as long as they last together.
    """

    def __init__(self) -> None:
        self._due = time.perf_counter() + _TURN_SECONDS
        self._nbytes = 0

    async def item(self, nbytes: int = 0) -> None:
        """Count an item that a consumer has taken, since the consumer may never suspend itself."""
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
                # After a cancellation, too: a caller that catches it gets the whole time again.
                self._due, self._nbytes = time.perf_counter() + _TURN_SECONDS, 0


async def drive(message: Generator[Request, Any, T], stream: Source | Sink) -> T:
    """Answer the requests of a message on an async stream, and return its result."""
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
                # A tensor of the caller's iterator must be free before the next one is made.
                del answer
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        message.close()


def _uncancellable(request: Request) -> bool:
    # After the last byte of a message, a cancellation would leave the stream poisoned.
    return isinstance(request, MessageEnded) or (isinstance(request, Work) and request.to_its_end)


async def _perform(request: Request, stream: Any) -> Any:
    match request:
        case ReadBytes(size):
            return await _within_time_budget(stream, stream.read, size)
        case Fill(buffers, background):
            fill = functools.partial(_within_time_budget, stream, stream.fill, buffers)
            filled, _ = await _with(background, fill)
            return filled
        case Send(buffers, background):
            send = functools.partial(_within_time_budget, stream, stream.send, buffers)
            _, result = await _with(background, send)
            return result
        case Work(task, to_its_end):
            return await run_in_thread(task, to_its_end=to_its_end)
        case Next(iterator):
            return await _next_item(iterator)
        case Checkpoint():
            pass
        case HeaderReceived():
            _header_received(stream)
        case MessageEnded():
            stream.in_message = False


async def _within_time_budget(
    stream: Endpoint, transfer: Callable[[Any], Awaitable[T]], argument: Any
) -> T:
    """Wait for the peer until its deadline."""
    time_budget = stream.time_budget
    if time_budget is None:
        return await transfer(argument)
    with anyio.CancelScope() as scope:
        time_budget.begin(scope)
        try:
            return await transfer(argument)
        finally:
            time_budget.end()
    # A frame may be half sent, so that no other may follow it, not even an abort frame.
    stream.failure = time_budget.error()
    raise stream.failure


def _header_received(stream: Endpoint) -> None:
    if stream.time_budget is not None:
        stream.time_budget.handshake_over()


async def _next_item(iterator: Iterator[Any] | AsyncIterator[Any]) -> Any:
    """Return the next item of an iterator of the caller, or ``END`` at its end."""
    if isinstance(iterator, AsyncIterator):
        return await anext(iterator, END)
    # Not in a worker thread: settings that the iterator changes (no_grad) hold in its thread only.
    return next(iterator, END)


async def _with(task: Task | None, transfer: Callable[[], Awaitable[Any]]) -> tuple[Any, Any]:
    """Run a task in a worker thread during a transfer, and return both results."""
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
            # The first error is raised: a broken connection matters more than a failed copy.
            errors.insert(0, error)
    try:
        if errors:
            raise errors[0]
        return transferred, result
    finally:
        errors.clear()


def drive_blocking(message: Generator[Request, Any, T], stream: BlockingStream) -> T:
    """Answer the requests of a message on a blocking stream, and return its result."""
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
            return _within_time_budget_blocking(stream, stream.read, size)
        case Fill(buffers, background):
            filled = _within_time_budget_blocking(stream, stream.fill, buffers)
            if background:
                background()
            return filled
        case Send(buffers, background):
            _within_time_budget_blocking(stream, stream.send, buffers)
            return background() if background else None
        case Work(task):
            return task()
        case Next(iterator):
            # No async iterator: save() has refused it.
            return next(iterator, END)  # type: ignore[arg-type]
        case Checkpoint():
            pass
        case HeaderReceived():
            _header_received(stream)
        case MessageEnded():
            stream.in_message = False


def _within_time_budget_blocking(
    stream: Endpoint, transfer: Callable[[Any], T], argument: Any
) -> T:
    if stream.time_budget is None:
        return transfer(argument)
    stream.time_budget.begin()
    try:
        return transfer(argument)
    finally:
        stream.time_budget.end()


async def drive_to_pieces(
    message: Generator[Request, Any, object],
) -> AsyncGenerator[bytes | memoryview, None]:
    """Answer the requests of a save without a stream, and yield its bytes, in pieces.

    A piece is a read-only view of the memory that ``Send`` names, or a copy if the buffers are
    transient or small.
    """
    # A consumer that never suspends could not be cancelled otherwise.
    turns = Turns()
    try:
        request = next(message)
        while True:
            await turns.item()
            if isinstance(request, Send):
                for piece in coalesce(request.buffers):
                    if isinstance(piece, memoryview) and not request.transient:
                        yield piece.toreadonly()
                    else:
                        yield bytes(piece)
                    await turns.item(len(piece))
                piece = b""
            try:
                answer = None
                match request:
                    case Send(background=task) if task:
                        answer = await run_in_thread(task)
                    case Work(task, to_its_end):
                        answer = await run_in_thread(task, to_its_end=to_its_end)
                    case Next(iterator):
                        answer = await _next_item(iterator)
            except Exception as error:
                request = message.throw(error)
            else:
                request = message.send(answer)
                # A tensor of the caller's iterator must be free before the next one is made.
                del answer
    except StopIteration:
        return
    finally:
        message.close()
