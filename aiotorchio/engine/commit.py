"""The last step of a load: targets change, under a lock of the caller if they are staged.

Async and blocking loads call it when all of a message has arrived and the stream was released. If
it returns, the change is complete. Any error of the change or the lock, a cancellation and an
interrupt lead to ``Commit.undo`` and ``Commit.restore``, and the call raises:

- In a staged load, no target has changed: tensors, and the other entries of modules, are as before.
- Other loads have a commit for composite targets and for entries that modules load
  (``WithModules``). Only these are as before. All other targets were overwritten before the
  commit, and keep the new numbers.

If entries or composite targets cannot be restored, a ``MismatchError`` names them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import anyio
import anyio.lowlevel

from aiotorchio.common.gc_pause import release
from aiotorchio.engine.threads import run_in_thread

__all__ = ["Commit", "apply_commit", "apply_commit_blocking"]

# Tensors that an event loop frees in its thread.
_FREED_AT_ONCE = 1000


class Commit(Protocol):
    """The change that remains when a message has arrived; see ``atomic`` and ``module_commit``.

    Attributes:
        needs_prepare: Whether ``prepare`` has anything to do.
        is_instant: Whether ``apply`` takes so little time that an event loop calls it in its
            thread.
    """

    needs_prepare: bool
    is_instant: bool

    @property
    def tables(self) -> list[list[Any]]:
        """Lists that have no more use once the change is made, or undone."""

    def keep_state(self) -> None:
        """Keep the state that ``restore`` needs; called first, in the caller's thread."""

    def prepare(self) -> None:
        """Do the part that takes long and changes no target."""

    def apply(self) -> None:
        """Change the targets."""

    def finish(self) -> Iterator[None]:
        """Complete the change with code of the caller, step by step, in the caller's thread."""

    def undo(self) -> None:
        """Undo the change, as far as it was made; called at any time, and again if it fails."""

    def restore(self) -> None:
        """Undo the effects of ``finish``; called after ``undo``, in the caller's thread."""


async def apply_commit(commit: Commit, lock: AbstractAsyncContextManager[Any] | None) -> None:
    """Make the change; if this raises, the change was undone, as the head of this module says.

    An error of the lock's release, or a native cancellation during it, comes after the change:
    then it is undone without the lock.

    Args:
        commit: The change.
        lock: Held during the change.
    """
    failure: BaseException | None = None
    try:
        async with contextlib.nullcontext() if lock is None else _Lock(lock):
            try:
                commit.keep_state()
                # If a step is interrupted, the changes made by then are undone.
                if commit.needs_prepare:
                    await run_in_thread(commit.prepare)
                await run_in_thread(commit.apply) if not commit.is_instant else commit.apply()
                for _ in commit.finish():
                    await anyio.lowlevel.checkpoint()
            except BaseException as error:
                failure = error
                await _undo(commit)
                raise
        if failure is not None:
            # The lock swallowed the error.
            raise failure
    except BaseException:
        await _undo(commit)
        _free(commit)
        raise
    finally:
        # The traceback of the error holds this frame, and with it the staged tensors.
        failure = None
    _free(commit)


def _free(commit: Commit) -> None:
    """Free the rest of a change in a thread: 20,000 tensors take a tenth of a second.

    The call does not wait for it, since a cancellation would be raised although the change was
    made.
    """
    if max(map(len, commit.tables), default=0) > _FREED_AT_ONCE:
        thread = threading.Thread(target=release, args=commit.tables, name="aiotorchio_free")
        try:
            thread.start()
        except RuntimeError:
            # No more threads can be started. The change is made, so nothing may be raised.
            release(*commit.tables)


class _Lock:
    """A lock whose release no scope cancels, once the change is complete."""

    def __init__(self, lock: AbstractAsyncContextManager[Any]) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        # ``async with`` looks methods up in the class, too.
        await type(self._lock).__aenter__(self._lock)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        leave = type(self._lock).__aexit__
        if kind is not None:
            return await leave(self._lock, kind, error, traceback)
        with anyio.CancelScope(shield=True):
            await leave(self._lock, kind, error, traceback)
        return None


async def _undo(commit: Commit) -> None:
    """Undo a change, even if this task is cancelled again; without effect if it is undone."""
    # A coroutine that is being closed must not wait.
    if commit.is_instant or isinstance(sys.exception(), GeneratorExit):
        commit.undo()
        commit.restore()
        return
    try:
        await run_in_thread(commit.undo, to_its_end=True)
    finally:
        # This has an effect only if the thread could not be started, or did not undo everything.
        commit.undo()
        # This runs here only: modules load their earlier entries in the caller's thread.
        commit.restore()


def apply_commit_blocking(commit: Commit, lock: AbstractContextManager[Any] | None) -> None:
    """Change the targets of a message, as ``apply_commit`` does, for blocking loads."""
    failure: BaseException | None = None
    try:
        with contextlib.nullcontext() if lock is None else lock:
            try:
                commit.keep_state()
                if commit.needs_prepare:
                    commit.prepare()
                commit.apply()
                for _ in commit.finish():
                    pass
            except BaseException as error:
                failure = error
                _undo_blocking(commit)
                raise
        if failure is not None:
            # The lock swallowed the error.
            raise failure
    except BaseException:
        _undo_blocking(commit)
        raise
    finally:
        # The traceback of the error holds this frame, and with it the staged tensors.
        failure = None


def _undo_blocking(commit: Commit) -> None:
    """Undo a change, even if another interrupt comes; without effect if it is undone."""
    try:
        commit.undo()
        commit.restore()
    except KeyboardInterrupt:
        _undo_blocking(commit)
        raise
