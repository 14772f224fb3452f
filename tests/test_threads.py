"""Worker threads are there for messages, whatever else the process is busy with."""

from __future__ import annotations

import threading

import anyio
import anyio.to_thread
import pytest

from aiotorchio.threads import run_in_thread
from tests.speed import patience


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
    """A predicate of the caller's may, and a future of asyncio cannot carry it."""
    with anyio.fail_after(patience(60)), pytest.raises((RuntimeError, StopIteration)):
        await run_in_thread(lambda: next(iter(())))
