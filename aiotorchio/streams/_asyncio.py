"""Source and sink for ``asyncio.StreamReader`` and ``StreamWriter``, on asyncio and uvloop.

asyncio's transports copy received bytes, and bytes that they cannot send at once. For large tensors
over a plain socket (TCP, UNIX), the adapter bypasses the transport: when that has stopped reading,
or has nothing left to send, bytes go through a duplicate of its socket straight to and from memory.
Small frames, TLS and pipes go through the transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

import anyio.lowlevel

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import TruncatedError
from aiotorchio.streams.base import (
    Cursor,
    Sink,
    coalesce,
    connection_errors,
)
from aiotorchio.streams.duck_typed import ReadSource, abort_transport, implements
from aiotorchio.streams.sockets import SocketSink, SocketSource

__all__ = ["AsyncioSink", "AsyncioSource", "has_write_buffer"]

# Below this size, a copy costs less than bypassing the transport (about 50 us).
_DIRECT_MIN = 128 * 2**10
# struct linger: on, with zero seconds.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# The methods that the adapters need, and that transports of other authors may lack.
_PAUSED_BY = ("is_closing", "get_protocol", "pause_reading", "resume_reading")
_BUFFER_METHODS = (
    "is_closing",
    "get_write_buffer_size",
    "get_write_buffer_limits",
    "set_write_buffer_limits",
)
# Seconds between two checks whether the bypassed transport was closed.
_LOOK_EVERY = 0.1


class _Duplicate:
    """A duplicate of a transport's socket, which is shut down when the transport is closed.

    The caller may close the transport to stop a call that hangs. A transport notifies only its
    protocol, so the duplicate polls it.
    """

    def __init__(self, transport: Any, sock: socket.socket, direction: int) -> None:
        self._transport = transport
        self.socket = sock
        # One direction only: a closed transport still sends the bytes in its buffer.
        self._direction = direction
        self._look()

    def _look(self) -> None:
        if self._transport.is_closing():
            with contextlib.suppress(OSError):
                self.socket.shutdown(self._direction)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_LOOK_EVERY, self._look)

    def close(self) -> None:
        self._timer.cancel()
        self.socket.close()


def _duplicate(transport: Any, direction: int) -> _Duplicate | None:
    """Duplicate the socket of a transport; None where bytes must go through the transport."""
    if sys.platform == "win32" or transport.is_closing():
        return None
    sock = transport.get_extra_info("socket")
    if sock is None or transport.get_extra_info("ssl_object"):
        return None
    descriptor = os.dup(sock.fileno())
    try:
        duplicate = socket.socket(fileno=descriptor)
    except OSError:  # uvloop calls its pipes sockets
        os.close(descriptor)
        return None
    duplicate.setblocking(False)
    return _Duplicate(transport, duplicate, direction)


class AsyncioSource(ReadSource):
    """Receives bytes from an ``asyncio.StreamReader``.

    Args:
        reader: The reader, which is in its former state after ``release``.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        # No public attribute of a reader is its transport. Without a transport, bytes are copied.
        self._transport: Any = getattr(reader, "_transport", None)
        self._duplicate: _Duplicate | None = None
        self._direct: SocketSource | None = None
        # Bytes that the reader had buffered when the bypass of its transport began.
        self._buffered = memoryview(b"")

    async def read(self, size: int) -> bytes:
        # A small message needs ten short reads, of bytes that the reader has already.
        if not self._direct and 0 < size < _DIRECT_MIN:
            await anyio.lowlevel.checkpoint_if_cancelled()
            piece = bytes(await self._receive(size))
            if len(piece) == size or not piece:
                return piece
            return piece + await super().read(size - len(piece))
        return await super().read(size)

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        # anyio cannot cancel a task that bytes wake in every iteration of the loop: with a fast
        # peer on uvloop, a cancelled task would receive the whole message.
        await anyio.lowlevel.checkpoint_if_cancelled()
        cursor = Cursor(buffers)
        if not self._direct and cursor.size >= _DIRECT_MIN:
            await self._step_in()
        if not self._direct:
            return await self._fill_by_copy(cursor)
        buffered = self._buffered[: cursor.size]
        if buffered:
            self.moved(len(buffered))
            cursor.write(buffered)
            self._buffered = self._buffered[len(buffered) :]
        if cursor:
            self._direct.time_budget = self.time_budget
            await self._direct.fill_on(cursor)
        return cursor.done

    async def _step_in(self) -> None:
        """Stop the transport, take the bytes that the reader has, and go on with the socket."""
        duplicate = _duplicate(self._transport, socket.SHUT_RD) if self._is_fed_at_once() else None
        if duplicate is None:
            return
        try:
            # With an extra byte in the buffer, read() returns at once with all buffered bytes.
            self._reader.feed_data(b"\0")
        except AssertionError:
            # The reader has the end of the stream: the socket has no more bytes. Without assertions
            # nothing is raised, and the socket reports the end.
            duplicate.close()
            return
        self._duplicate, self._direct = duplicate, SocketSource(duplicate.socket)
        data = self.checked_piece(await self._reader.read(sys.maxsize))
        # This follows read(), which may resume the transport.
        self._transport.pause_reading()
        self._buffered = memoryview(data)[:-1]

    def _is_fed_at_once(self) -> bool:
        """Whether the transport passes bytes to the reader without a delay.

        The protocols of subprocesses pass them on one iteration of the loop later. Transports of
        other authors may lack the methods of a transport that can be paused.
        """
        return (
            implements(self._transport, *_PAUSED_BY)
            and isinstance(self._transport.get_protocol(), asyncio.StreamReaderProtocol)
            and self._reader.exception() is None
        )

    def abort(self) -> None:
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            # A reset: an end of the stream would not stop a sender that waits for room. (uvloop's
            # pipes and closed sockets have no such option.)
            with contextlib.suppress(OSError, ValueError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        abort_transport(self._transport)

    def release(self) -> None:
        if self._duplicate is None:
            return
        self._duplicate.close()
        self._duplicate = self._direct = None
        if not self._transport.is_closing():
            self._transport.resume_reading()
        if self._buffered:
            # A reader whose connection was lost meanwhile accepts no bytes.
            with contextlib.suppress(AssertionError):
                self._reader.feed_data(bytes(self._buffered))
            self._buffered = memoryview(b"")


def has_write_buffer(writer: asyncio.StreamWriter) -> bool:
    """Whether the transport of a writer says how much it has to send, as ``AsyncioSink`` needs."""
    return implements(writer.transport, *_BUFFER_METHODS)


class AsyncioSink(Sink):
    """Sends bytes to an ``asyncio.StreamWriter``.

    Args:
        writer: The writer, which is not closed.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._duplicate: _Duplicate | None = None
        self._direct: SocketSink | None = None
        self._limits: tuple[int, int] | None = None

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        if not self._direct and sum(map(len, buffers)) >= _DIRECT_MIN:
            await self._drain_all()
            transport = self._writer.transport
            empty = not transport.get_write_buffer_size()
            self._duplicate = _duplicate(transport, socket.SHUT_WR) if empty else None
            self._direct = SocketSink(self._duplicate.socket) if self._duplicate else None
        if self._direct:
            self._direct.time_budget = self.time_budget
            try:
                await self._direct.send(buffers)
            finally:
                self.in_message = self.in_message or self._direct.in_message
            return
        for piece in coalesce(buffers, self.piece_size):
            # If drain() does not wait, the loop does not notice a lost connection: the transport
            # silently drops all bytes. The sleep is before the write, so that a cancellation comes
            # between two pieces.
            await asyncio.sleep(0)
            await self._drain_all()
            with connection_errors(OSError):
                # From Python 3.12 on, transports keep the buffer instead of a copy.
                self._writer.write(piece)
            self.in_message = True
            await self._drain_all()
            self.moved(len(piece))

    async def _drain_all(self) -> None:
        """Wait until the transport has nothing left to send."""
        self._check_open()
        transport = self._writer.transport
        if self._limits is None:
            self._limits = transport.get_write_buffer_limits()
            # A TLS transport pauses the writer at its high-water mark, others above it: with a
            # mark of zero, a TLS transport would pause without bytes to send.
            high = 1 if transport.get_extra_info("ssl_object") else 0
            transport.set_write_buffer_limits(high=high, low=0)
        with connection_errors(OSError):
            await self._writer.drain()

    def _check_open(self) -> None:
        # A closed transport drops bytes; uvloop's raise RuntimeError.
        if self._writer.transport.is_closing():
            raise TruncatedError("the connection was closed")

    def abort(self) -> None:
        abort_transport(self._writer.transport)

    def release(self) -> None:
        super().release()
        if self._direct is not None:
            self._direct.release()
        if self._duplicate is not None:
            self._duplicate.close()
            self._duplicate = self._direct = None
        if self._limits is not None and not self._writer.transport.is_closing():
            low, high = self._limits
            self._writer.transport.set_write_buffer_limits(high=high, low=low)
        self._limits = None
