"""Worker threads for messages are available while the process is busy with other work."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.engine import threads
from aiotorchio.engine.threads import run_in_thread
from tests.support.backends import ANYIO_BACKENDS, until
from tests.support.speed import patience

on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(ANYIO_BACKENDS[name], id=name) for name in ("asyncio", "uvloop")]
)


async def wait_in_a_thread(done: threading.Event) -> None:
    await anyio.to_thread.run_sync(done.wait)


@pytest.mark.anyio
async def test_messages_go_on_while_all_threads_of_anyio_wait_for_them() -> None:
    done = threading.Event()
    limiter = anyio.to_thread.current_default_thread_limiter()
    async with anyio.create_task_group() as group:
        for _ in range(int(limiter.total_tokens)):
            group.start_soon(wait_in_a_thread, done)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(patience(60)):
            await run_in_thread(done.set)


@pytest.mark.anyio
async def test_a_task_that_raises_stop_iteration() -> None:
    """A caller's predicate may raise it, and a future of asyncio cannot carry it."""
    with anyio.fail_after(patience(60)), pytest.raises((RuntimeError, StopIteration)):
        await run_in_thread(lambda: next(iter(())))


class Endless:
    """A task that only an interrupt ends."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        try:
            while True:
                check_interrupt()
        finally:
            self.ended.set()


@pytest.mark.anyio
@on_asyncio
async def test_a_coroutine_that_is_closed_waits_for_its_thread() -> None:
    """A dropped event loop closes its coroutines: the thread must not write to restored targets."""
    task = Endless()
    coroutine = run_in_thread(task)
    coroutine.send(None)
    await until(task.begun.is_set)
    coroutine.close()
    assert task.ended.is_set()


@pytest.mark.anyio
@on_asyncio
async def test_ctrl_c_waits_for_its_thread() -> None:
    task = Endless()
    coroutine = run_in_thread(task)
    coroutine.send(None)
    await until(task.begun.is_set)
    with pytest.raises(KeyboardInterrupt):
        coroutine.throw(KeyboardInterrupt)
    assert task.ended.is_set()


class AllThreadsBusy:
    """A block in which no worker thread is free."""

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self._open = threading.Event()
        self._count = 0
        self._group = anyio.create_task_group()

    def _hold(self) -> None:
        self._count += 1
        self._open.wait()

    async def __aenter__(self) -> None:
        await self._group.__aenter__()
        for _ in range(threads._THREADS):
            self._group.start_soon(run_in_thread, self._hold)
        await until(lambda: self._count == threads._THREADS)

    async def __aexit__(self, *error: Any) -> None:
        self._open.set()
        await self._group.__aexit__(*error)


@pytest.mark.anyio
async def test_a_cancellation_does_not_wait_for_a_free_thread() -> None:
    ran = threading.Event()
    with anyio.fail_after(patience(60)):
        async with AllThreadsBusy(), anyio.create_task_group() as group:
            group.start_soon(run_in_thread, ran.set)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        # It is after the task in the queue: when it has run, the task would have run, too.
        await run_in_thread(lambda: None)
    assert not ran.is_set()


@pytest.mark.anyio
@on_asyncio
async def test_a_native_cancellation_does_not_wait_for_a_free_thread() -> None:
    ran = threading.Event()
    complaints: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    async with AllThreadsBusy():
        task = asyncio.ensure_future(run_in_thread(ran.set))
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        await asyncio.wait([task])
    await run_in_thread(lambda: None)
    assert not ran.is_set() and task.cancelled() and not complaints


@pytest.mark.anyio
async def test_no_scope_ends_what_runs_to_its_end() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await run_in_thread(lambda: 7, to_its_end=True) == 7
        await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
