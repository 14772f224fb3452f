"""``asyncio.StreamReader`` and ``StreamWriter``, on asyncio's own loops and on uvloop.

asyncio's transports copy what they receive and what they cannot send at once. So for the bytes
of large tensors, a transport over a plain socket (TCP, UNIX) steps aside: it stops reading, or
has sent all it had, and the bytes go through a duplicate of its socket straight from and to
their memory. Small frames, TLS and pipes go through the transport itself.
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
    PIECE_SIZE,
    Cursor,
    Sink,
    Source,
    coalesce,
    connection_errors,
)
from aiotorchio.streams.sockets import SocketSink, SocketSource

__all__ = ["AsyncioSink", "AsyncioSource"]

# Below this, a copy costs less than the transport's stepping aside (about 50 us).
_DIRECT_MIN = 128 * 2**10
# To linger for no time at all (struct linger).
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# How often to look whether the transport that stepped aside was closed, in seconds.
_LOOK_EVERY = 0.1


class _Duplicate:
    """A second handle on a transport's socket, which ends when the transport is closed.

    Its owner may close the transport to stop a call that hangs. A transport tells only its
    protocol, so the duplicate has to look.
    """

    def __init__(self, transport: Any, sock: socket.socket, direction: int) -> None:
        self._transport = transport
        self.socket = sock
        # Not both: a transport that is closed still sends what it was given before.
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
    """None where bytes must go through the transport."""
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


class AsyncioSource(Source):
    """Takes bytes off an ``asyncio.StreamReader``.

    Args:
        reader: Stays the caller's, and is back as it was after ``release``.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        # asyncio has no public way from a reader to its transport. Without one, bytes are copied.
        self._transport: Any = getattr(reader, "_transport", None)
        self._duplicate: _Duplicate | None = None
        self._direct: SocketSource | None = None
        # What the reader had buffered when its transport stepped aside.
        self._buffered = memoryview(b"")

    async def read(self, size: int) -> bytes:
        # A small message has ten of these, which the reader holds already.
        if not self._direct and 0 < size < _DIRECT_MIN:
            await anyio.lowlevel.checkpoint_if_cancelled()
            piece = await self._receive(size)
            if len(piece) == size or not piece:
                return piece
            return piece + await super().read(size - len(piece))
        return await super().read(size)

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        # Of a task that is woken by bytes in every turn of the loop, anyio does not find the moment
        # to cancel it: a fast peer on uvloop would keep it going to the end.
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
            self._direct.deadline = self.deadline
            await self._direct.fill_on(cursor)
        return cursor.done

    async def _fill_by_copy(self, cursor: Cursor) -> int:
        while cursor and (data := await self._receive(cursor.left)):
            cursor.write(data)
        return cursor.done

    async def _receive(self, most: int) -> bytes:
        with connection_errors(OSError):
            data = await self._reader.read(min(most, PIECE_SIZE))
        self.moved(len(data))
        return data

    async def _step_in(self) -> None:
        """Stop the transport, take what the reader has, and go on with the socket."""
        duplicate = _duplicate(self._transport, socket.SHUT_RD) if self._is_fed_at_once() else None
        if duplicate is None:
            return
        try:
            # With a byte of ours in it, read() returns at once with all that is buffered.
            self._reader.feed_data(b"\0")
        except AssertionError:
            # The end is in the buffer already: nothing to take from the socket. Without
            # assertions nothing is raised, and the socket says that it has ended.
            duplicate.close()
            return
        self._duplicate, self._direct = duplicate, SocketSource(duplicate.socket)
        data = await self._reader.read(sys.maxsize)
        # Not before: read() may set the transport reading again.
        self._transport.pause_reading()
        self._buffered = memoryview(data)[:-1]

    def _is_fed_at_once(self) -> bool:
        """Whether nothing can be on its way from the transport to the reader.

        The protocols of subprocesses hand data on one turn of the loop later.
        """
        return (
            self._transport is not None
            and isinstance(self._transport.get_protocol(), asyncio.StreamReaderProtocol)
            and self._reader.exception() is None
        )

    def abort(self) -> None:
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            # A reset: an end alone would not stop a sender who waits for room. (uvloop's pipes have
            # no such option, and what is closed has none either.)
            with contextlib.suppress(OSError, ValueError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        try:
            self._transport.abort()
        except (AttributeError, NotImplementedError):  # transports of pipes
            self._transport.close()

    def release(self) -> None:
        if self._duplicate is None:
            return
        self._duplicate.close()
        self._duplicate = self._direct = None
        if not self._transport.is_closing():
            self._transport.resume_reading()
        if self._buffered:
            # A reader whose connection was lost in the meantime takes nothing back.
            with contextlib.suppress(AssertionError):
                self._reader.feed_data(bytes(self._buffered))
            self._buffered = memoryview(b"")


class AsyncioSink(Sink):
    """Puts bytes on an ``asyncio.StreamWriter``.

    Args:
        writer: Stays the caller's.
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
            self._direct.deadline = self.deadline
            try:
                await self._direct.send(buffers)
            finally:
                self.in_message = self.in_message or self._direct.in_message
            return
        for piece in coalesce(buffers, self.piece_size):
            # drain() need not wait, and then the loop would not find out that the connection is
            # lost: the transport drops all that it is given, and says nothing. Before the write,
            # so that a cancellation comes while the stream is whole.
            await asyncio.sleep(0)
            await self._drain_all()
            with connection_errors(OSError):
                # From Python 3.12 on transports keep what they are given instead of a copy.
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
            # A TLS transport stops the writer at its high mark, others above it: with a mark of
            # zero, TLS would stop with nothing to send.
            high = 1 if transport.get_extra_info("ssl_object") else 0
            transport.set_write_buffer_limits(high=high, low=0)
        with connection_errors(OSError):
            await self._writer.drain()

    def _check_open(self) -> None:
        # What a closed transport is given it drops; uvloop's raise RuntimeError.
        if self._writer.transport.is_closing():
            raise TruncatedError("the connection was closed")

    def abort(self) -> None:
        self._writer.transport.abort()

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
