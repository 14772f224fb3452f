"""Worker threads for what takes long: the event loop goes on, and a cancellation ends the work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

from aiotorchio.interrupt import Interrupt
from aiotorchio.streams.base import asyncio_loop

__all__ = ["Task", "run_in_thread"]

T = TypeVar("T")
Task = Callable[[], Any]

_THREADS = (os.cpu_count() or 1) + 4
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiotorchio.limiter")
_executor: RunVar[ThreadPoolExecutor] = RunVar("aiotorchio.executor")


async def run_in_thread(task: Task, *, to_its_end: bool = False) -> Any:
    """Run a task in a worker thread, and return its result.

    Not in one of anyio's threads: if all of them wait for messages, as handlers of web servers may,
    no message could go on. A cancellation interrupts the task (see ``interrupt``) and waits for its
    end: it may be writing to memory that the caller uses again as soon as this has raised.

    Args:
        task: What to run.
        to_its_end: Whether the task is run, and not interrupted, whatever is cancelled after this
            was called.
    """
    if not to_its_end:
        await anyio.lowlevel.checkpoint_if_cancelled()
    loop = asyncio_loop()
    interrupt = Interrupt()
    if loop is None:
        with anyio.CancelScope(shield=to_its_end):
            return await _run_on_trio(interrupt, task)
    executor = _of_this_run(_executor, lambda: ThreadPoolExecutor(_THREADS, "aiotorchio"))
    # A future, and no task: whoever cancels all tasks, as asyncio.run does at its end, would
    # cancel it, too. Not run_in_executor: its future keeps what the task returned until the
    # next garbage collection.
    future = loop.create_future()
    executor.submit(_work, loop, future, copy_context(), interrupt, task)
    try:
        await asyncio.wait([future])
        return future.result()
    except asyncio.CancelledError:
        if not to_its_end:
            interrupt.request()
        # anyio shields from its own scopes only; the rest of them is outlasted.
        with anyio.CancelScope(shield=True):
            await _outlast(future)
        raise
    finally:
        # An error that is raised here holds this frame, which must not hold the error: what its
        # traceback reaches, such as staged tensors, would stay until the next garbage collection.
        del future


async def _run_on_trio(interrupt: Interrupt, task: Task) -> Any:
    ended = threading.Event()

    def run() -> Any:
        try:
            return interrupt.run(task)
        finally:
            ended.set()

    limiter = _of_this_run(_limiter, lambda: anyio.CapacityLimiter(_THREADS))
    try:
        return await anyio.to_thread.run_sync(run, limiter=limiter, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        if interrupt.request():
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(ended.wait, limiter=anyio.CapacityLimiter(1))
        raise


def _work(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Any],
    context: Context,
    interrupt: Interrupt,
    task: Task,
) -> None:
    try:
        loop.call_soon_threadsafe(future.set_result, context.run(interrupt.run, task))
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
        # See run_in_thread.
        del future, task


def _of_this_run(variable: RunVar[T], make: Callable[[], T]) -> T:
    try:
        return variable.get()
    except LookupError:
        value = make()
        variable.set(value)
        return value


async def _outlast(future: asyncio.Future[Any]) -> None:
    """Wait for a future of asyncio, whatever else is cancelled meanwhile."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    # The error of a task whose result is dropped matters no more, and must not be logged.
    future.exception()
