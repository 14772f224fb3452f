"""The last step of a staged load: the destinations change, under a lock of the caller.

``carry_out`` does it for async streams, ``carry_out_blocking`` for blocking ones.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol

import anyio

from aiotorchio.threads import run_in_thread

__all__ = ["Commit", "carry_out", "carry_out_blocking"]


class Commit(Protocol):
    """A change of many tensors, all or none of it; see ``memory.staged``.

    Attributes:
        prepares: Whether ``prepare`` has anything to do.
        quick: Whether ``apply`` takes so little time that an event loop calls it in its thread.
    """

    prepares: bool
    quick: bool

    def prepare(self) -> None:
        """Do what takes long and what nobody sees; comes first."""

    def apply(self) -> None:
        """Make it."""

    def undo(self) -> None:
        """Take it back, as far as it was made."""


async def carry_out(commit: Commit, lock: AbstractAsyncContextManager[Any] | None) -> None:
    """Change the destinations of a message: all of them, or none if this raises.

    Args:
        commit: The change.
        lock: Held meanwhile.
    """
    async with contextlib.nullcontext() if lock is None else _held(lock):
        try:
            # To their end, even if they are cancelled: then what they did is undone.
            if commit.prepares:
                await run_in_thread(commit.prepare)
            await run_in_thread(commit.apply) if not commit.quick else commit.apply()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await run_in_thread(commit.undo) if not commit.quick else commit.undo()
            raise


@contextlib.asynccontextmanager
async def _held(lock: AbstractAsyncContextManager[Any]) -> AsyncIterator[None]:
    """Hold a lock of the caller's, whose release is not cancelled: all is done by then."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(lock)
        held = stack.pop_all()
    try:
        yield
    except BaseException:
        if not await held.__aexit__(*sys.exc_info()):
            raise
    else:
        with anyio.CancelScope(shield=True):
            await held.aclose()


def carry_out_blocking(commit: Commit, lock: AbstractContextManager[Any] | None) -> None:
    """Likewise, for the blocking twin."""
    with contextlib.nullcontext() if lock is None else lock:
        try:
            if commit.prepares:
                commit.prepare()
            commit.apply()
        except BaseException:
            commit.undo()
            raise
