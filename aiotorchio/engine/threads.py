"""Worker threads for long tasks: the event loop goes on, and a cancellation ends the task."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

from aiotorchio.common.interrupt import Interrupt
from aiotorchio.errors import AiotorchioError
from aiotorchio.streams.base import asyncio_loop

__all__ = ["Task", "run_in_thread"]

T = TypeVar("T")
Task = Callable[[], Any]

_THREADS = (os.cpu_count() or 1) + 4
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiotorchio.limiter")
_executor: RunVar[ThreadPoolExecutor] = RunVar("aiotorchio.executor")


async def run_in_thread(task: Task, *, to_its_end: bool = False) -> Any:
    """Run a task in a worker thread, and return its result.

    The threads are not those of anyio: if all of them wait for messages, as handlers of web servers
    may, no message could go on. A cancellation interrupts the task (see ``interrupt``) and waits
    for its end, since the task may be writing to memory that the caller uses again as soon as this
    has raised. Closing the coroutine does the same, but cannot await: it blocks until the thread
    has ended the task. A task that has not begun, because all threads are busy, never begins.

    Args:
        task: Called without arguments.
        to_its_end: Whether the task runs to its end in spite of a cancellation. No scope ends the
            wait then; a native cancellation of asyncio is raised when the task has ended.
    """
    if to_its_end:
        with anyio.CancelScope(shield=True):
            result = await _in_thread(task, to_its_end=True)
        return result
    await anyio.lowlevel.checkpoint_if_cancelled()
    return await _in_thread(task, to_its_end=False)


async def _in_thread(task: Task, *, to_its_end: bool) -> Any:
    interrupt = Interrupt()
    loop = asyncio_loop()
    if loop is None:
        return await _on_trio(interrupt, task)
    return await _on_asyncio(interrupt, task, loop, to_its_end=to_its_end)


async def _on_asyncio(
    interrupt: Interrupt, task: Task, loop: asyncio.AbstractEventLoop, *, to_its_end: bool
) -> Any:
    executor = _of_this_run(_executor, lambda: ThreadPoolExecutor(_THREADS, "aiotorchio"))
    # A future, and no task: asyncio.run cancels all tasks at its end. Not run_in_executor: its
    # future keeps the result of the task until the next garbage collection.
    future = loop.create_future()
    # The error of a task whose result is dropped has no more use, and must not be logged.
    future.add_done_callback(_retrieve)
    job = executor.submit(_work, loop, future, copy_context(), interrupt, [task])
    try:
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            if to_its_end or interrupt.request():
                await _outlast(future)
            raise
        except BaseException:
            # The coroutine is being closed, or Ctrl-C was pressed: there is no waiting by await.
            if interrupt.request():
                concurrent.futures.wait([job])
            raise
        return future.result()
    finally:
        # An error that is raised here holds this frame, which must not hold the error: staged
        # tensors, and all else that its traceback reaches, would stay until the next garbage
        # collection.
        del future, job


def _run(interrupt: Interrupt, task: Task) -> Any:
    try:
        return interrupt.run(task)
    except AiotorchioError as error:
        # The frames of the error may hold large values of a peer, which are freed here, not in the
        # thread that drops the error.
        _clear_frames(error)
        raise


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def _on_trio(interrupt: Interrupt, task: Task) -> Any:
    ended = threading.Event()

    def run() -> Any:
        try:
            return _run(interrupt, task)
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
    except (GeneratorExit, KeyboardInterrupt):
        if interrupt.request():
            ended.wait()
        raise


def _work(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Any],
    context: Context,
    interrupt: Interrupt,
    tasks: list[Task],
) -> None:
    """Run the one task of a list, and report its result or error to a future.

    When the future is done, nothing in this thread refers to the task, its result or its error any
    more, so that the caller decides how long they live.
    """
    outcome: list[Any] = []
    report: Callable[[Any], None] = future.set_result
    try:
        outcome.append(context.run(_run, interrupt, tasks.pop()))
    except StopIteration as error:
        # A future refuses StopIteration, and would never be done. A generator converts it in the
        # same way.
        outcome.append(RuntimeError("a task in a worker thread raised StopIteration"))
        outcome[0].__cause__ = error
        report = future.set_exception
    except BaseException as error:
        # Any error, KeyboardInterrupt included, is raised by the call that waits for the task.
        outcome.append(error)
        report = future.set_exception
    loop.call_soon_threadsafe(_report, report, outcome)


def _report(report: Callable[[Any], None], outcome: list[Any]) -> None:
    report(outcome.pop())


def _of_this_run(variable: RunVar[T], make: Callable[[], T]) -> T:
    try:
        return variable.get()
    except LookupError:
        value = make()
        variable.set(value)
        return value


async def _outlast(future: asyncio.Future[Any]) -> None:
    """Wait for a future of asyncio in spite of cancellations."""
    # anyio shields from its own scopes only; native cancellations are outlasted.
    with anyio.CancelScope(shield=True):
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])


def _retrieve(future: asyncio.Future[Any]) -> None:
    future.exception()
