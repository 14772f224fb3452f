"""Worker threads for what takes long: the event loop goes on, and a cancellation waits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

from aiotorchio.streams.base import asyncio_loop

__all__ = ["Task", "run_in_thread"]

T = TypeVar("T")
Task = Callable[[], Any]

_THREADS = (os.cpu_count() or 1) + 4
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiotorchio.limiter")
_executor: RunVar[ThreadPoolExecutor] = RunVar("aiotorchio.executor")


async def run_in_thread(task: Task) -> Any:
    """Run a task in a worker thread, and return its result.

    Not in one of those that anyio has for all: if all of them wait for messages, as handlers of
    web servers may, no message could go on. A cancellation waits for the task, which may be
    writing to memory that the caller has back as soon as this returns.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    loop = asyncio_loop()
    with anyio.CancelScope(shield=True):
        if loop is None:
            limiter = _of_this_run(_limiter, lambda: anyio.CapacityLimiter(_THREADS))
            return await anyio.to_thread.run_sync(task, limiter=limiter)
        executor = _of_this_run(_executor, lambda: ThreadPoolExecutor(_THREADS, "aiotorchio"))
        # A future, and no task: whoever cancels all tasks, as asyncio.run does at its end, would
        # cancel a task in anyio's way, too. Not run_in_executor: its future keeps what the task
        # returned until the next garbage collection.
        future = loop.create_future()
        executor.submit(_work, loop, future, copy_context(), task)
        return await _outlast(future)


def _work(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], context: Context, task: Task
) -> None:
    try:
        loop.call_soon_threadsafe(future.set_result, context.run(task))
    except StopIteration as error:
        # A future refuses it, and would never be done: a generator would turn it into this, too.
        refused = RuntimeError("a task raised StopIteration")
        refused.__cause__ = error
        loop.call_soon_threadsafe(future.set_exception, refused)
        del refused
    except BaseException as error:
        # Whatever it is, for whoever waits: nobody else would see it in this thread.
        loop.call_soon_threadsafe(future.set_exception, error)
    finally:
        # See _outlast.
        del future, task


def _of_this_run(variable: RunVar[T], make: Callable[[], T]) -> T:
    try:
        return variable.get()
    except LookupError:
        value = make()
        variable.set(value)
        return value


async def _outlast(future: asyncio.Future[Any]) -> Any:
    """Wait for a future of asyncio, whatever happens; anyio shields from its own scopes only."""
    cancelled: asyncio.CancelledError | None = None
    try:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is None:
            return future.result()
        # Its error, if it has one, matters no more.
        future.exception()
        raise cancelled
    finally:
        # An error that is raised here holds this frame, which must not hold the error: what its
        # traceback reaches, such as staged tensors, would stay until the next garbage collection.
        del future, cancelled
