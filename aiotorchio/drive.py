"""What a message waits for, and the two drivers that carry it out.

A message is a generator (see ``transfer``): it does everything but I/O and yields a request for
whatever takes time. ``drive`` answers on an async stream, ``drive_blocking`` on a blocking one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from aiotorchio.streams.base import Buffer, Sink, Source
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.wire.parser import MessageEnded, ReadBytes, Work

__all__ = ["Fill", "Request", "Send", "Task", "drive", "drive_blocking", "run_in_thread"]

T = TypeVar("T")
Task = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Send:
    """Asks to send buffers, and to run a task in the meantime; answer: the task's result."""

    buffers: Sequence[Buffer]
    meanwhile: Task | None = None


@dataclass(frozen=True, slots=True)
class Fill:
    """Asks to fill buffers, and to run a task in the meantime; answer: bytes written."""

    buffers: Sequence[memoryview]
    meanwhile: Task | None = None


_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiotorchio.threads")


async def run_in_thread(task: Task) -> Any:
    """Run a task in a worker thread, and return its result.

    Not in one of those that anyio has for all: if all of them wait for messages, as handlers of
    web servers may, no message could go on.
    """
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter((os.cpu_count() or 1) + 4)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(task, limiter=limiter)


Request = ReadBytes | Fill | Send | Work | MessageEnded


async def drive(message: Generator[Request, Any, T], stream: Source | Sink) -> T:
    """Carry out on an async stream what a message waits for; return what it returns."""
    try:
        request = next(message)
        while True:
            try:
                answer = await _perform(request, stream)
            except Exception as error:
                request = message.throw(error)
            else:
                request = message.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        message.close()


async def _perform(request: Request, stream: Any) -> Any:
    match request:
        case ReadBytes(size):
            return await stream.read(size)
        case Fill(buffers, meanwhile):
            filled, _ = await _with(meanwhile, functools.partial(stream.fill, buffers))
            return filled
        case Send(buffers, meanwhile):
            _, result = await _with(meanwhile, functools.partial(stream.send, buffers))
            return result
        case Work(task):
            return await run_in_thread(task)
        case MessageEnded():
            stream.in_message = False


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
    if errors:
        raise errors[0]
    return transferred, result


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
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        message.close()


def _perform_blocking(request: Request, stream: BlockingStream) -> Any:
    match request:
        case ReadBytes(size):
            return stream.read(size)
        case Fill(buffers, meanwhile):
            filled = stream.fill(buffers)
            if meanwhile:
                meanwhile()
            return filled
        case Send(buffers, meanwhile):
            stream.send(buffers)
            return meanwhile() if meanwhile else None
        case Work(task):
            return task()
        case MessageEnded():
            stream.in_message = False
