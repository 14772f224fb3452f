"""Source and sink for streams of other libraries that have the methods of asyncio's.

In: an object with ``async read(size)``, or one with ``write`` and ``async drain``, chosen by these
methods and not by its class: readers of aiohttp and asyncssh, files of aiofiles, anyio and trio,
uploads of Starlette; writers of asyncssh and QUIC. Out: its adapter. ``read(size)`` gives at most
``size`` bytes, so that bytes after a message stay in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import anyio.lowlevel

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import TruncatedError
from aiotorchio.streams.base import PIECE_SIZE, Cursor, Sink, Source, coalesce, connection_errors
from aiotorchio.streams.identity import is_referable

__all__ = [
    "ReadSource",
    "WriteSink",
    "abort_transport",
    "can_read",
    "can_write",
    "guardable",
    "implements",
]


class ReadSource(Source):
    """Receives bytes through ``read``, which gives no bytes at the end of the stream.

    Args:
        reader: An object with ``async read(size)``; it is not closed.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        await anyio.lowlevel.checkpoint_if_cancelled()
        return await self._fill_by_copy(Cursor(buffers))

    async def _fill_by_copy(self, cursor: Cursor) -> int:
        while cursor and (data := await self._receive(cursor.left)):
            cursor.write(data)
        return cursor.done

    async def _receive(self, most: int) -> bytes | memoryview:
        most = min(most, PIECE_SIZE)
        with connection_errors(OSError):
            piece = await self._reader.read(most)
        data = self.checked_piece(piece, most)
        self.moved(len(data))
        return data


class WriteSink(Sink):
    """Sends copies of bytes through ``write``, and waits in ``drain`` while the stream is full.

    A peer that does not read is noticed only where ``drain`` waits for it.

    Args:
        writer: An object with ``write(data)`` and ``async drain()``; it is not closed.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        for piece in coalesce(buffers, self.piece_size):
            # Other tasks run, and a cancellation comes, between two pieces, even if drain() does
            # not wait.
            await anyio.lowlevel.checkpoint()
            if self._is_closing():
                raise TruncatedError("the connection was closed")
            with connection_errors(OSError):
                # A copy: the stream may keep it.
                self._writer.write(bytes(piece))
                self.in_message = True
                await self._writer.drain()
            self.moved(len(piece))

    def _is_closing(self) -> bool:
        # Other authors leave the method out, or inherit asyncio's, which only raises the latter.
        with contextlib.suppress(AttributeError, NotImplementedError):
            return bool(self._writer.is_closing())
        return False

    def abort(self) -> None:
        abort_transport(getattr(self._writer, "transport", self._writer))


def can_read(stream: Any) -> bool:
    """Whether a stream has ``async read(size)``."""
    read = getattr(stream, "read", None)
    if not inspect.iscoroutinefunction(read):
        return False
    try:
        inspect.signature(read).bind(1)
    except TypeError:  # such as a read() of all the bytes
        return False
    return True


def can_write(stream: Any) -> bool:
    """Whether a stream has ``write`` and ``async drain``."""
    write, drain = getattr(stream, "write", None), getattr(stream, "drain", None)
    return (
        callable(write)
        and not inspect.iscoroutinefunction(write)
        and inspect.iscoroutinefunction(drain)
    )


def guardable(reader: Any) -> Any:
    """Return a reader that can be poisoned: itself, or a proxy if it has no weak references."""
    return reader if is_referable(reader) else _Proxy(reader)


class _Proxy:
    def __init__(self, reader: Any) -> None:
        self.read = reader.read


def implements(transport: Any, *names: str) -> bool:
    """Whether a transport has methods; those of asyncio's base classes only raise an error."""
    for name in names:
        method = getattr(transport, name, None)
        abstract = getattr(asyncio.Transport, name)
        if method is None or getattr(method, "__func__", None) is abstract:
            return False
    return True


def abort_transport(transport: Any) -> None:
    """Abort a transport, or close one without an abort, such as those of pipes."""
    try:
        transport.abort()
    except (AttributeError, NotImplementedError):  # left out, or asyncio's, which only raises it
        transport.close()
