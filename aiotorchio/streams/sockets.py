"""Non-blocking sockets, on asyncio and trio: bytes go from and to the buffers themselves.

``sendmsg`` and ``recvmsg_into`` take many buffers in one system call. On asyncio the socket is
watched once for a whole call, and each wake-up moves as much as the kernel takes: awaiting each
readiness on its own costs a future and two system calls more.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence

import anyio
import anyio.lowlevel

from aiotorchio.common.buffer import Buffer
from aiotorchio.streams.base import (
    Cursor,
    Sink,
    Source,
    asyncio_loop,
    break_connection,
    connection_errors,
)

__all__ = ["TURN_SIZE", "SocketSink", "SocketSource"]

# What one wake-up moves before other tasks get their turn, in one system call or in several: a
# millisecond, in memory that is warm. Half of it costs a tenth of the speed of a single connection.
TURN_SIZE = 2 * 2**20


class SocketSource(Source):
    """Takes bytes off a non-blocking stream socket.

    Args:
        sock: Connected; stays the caller's.
    """

    def __init__(self, sock: socket.socket) -> None:
        _check(sock)
        self._sock = sock

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        cursor = Cursor(buffers)
        await self.fill_on(cursor)
        return cursor.done

    async def fill_on(self, cursor: Cursor) -> None:
        """Go on filling buffers, until they are full or the stream ends."""

        def step() -> bool:
            """Receive what the kernel has; True when the buffers are full or the stream ended."""
            stop = cursor.done + TURN_SIZE
            while cursor and cursor.done < stop:
                views = cursor.next(stop - cursor.done)
                try:
                    # recvmsg_into builds what recv_into does not need.
                    received = (
                        self._sock.recv_into(views[0])
                        if len(views) == 1
                        else self._sock.recvmsg_into(views)[0]
                    )
                except (BlockingIOError, InterruptedError):
                    return False
                if received == 0:
                    return True
                self.moved(received)
                cursor.advance(received)
            return not cursor

        with connection_errors(OSError):
            await _repeat(self._sock, step, writing=False)

    def abort(self) -> None:
        break_connection(self._sock)


class SocketSink(Sink):
    """Puts bytes on a non-blocking stream socket.

    Args:
        sock: Connected; stays the caller's.
    """

    def __init__(self, sock: socket.socket) -> None:
        _check(sock)
        self._sock = sock

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        cursor = Cursor(buffers)

        def step() -> bool:
            """Send what the kernel takes; True when all is sent."""
            stop = cursor.done + TURN_SIZE
            while cursor and cursor.done < stop:
                try:
                    sent = self._sock.sendmsg(cursor.next(stop - cursor.done))
                except (BlockingIOError, InterruptedError):
                    return False
                self.moved(sent)
                cursor.advance(sent)
            return not cursor

        with connection_errors(OSError):
            await _repeat(self._sock, step, writing=True)

    def abort(self) -> None:
        break_connection(self._sock)


def _check(sock: socket.socket) -> None:
    if isinstance(sock, ssl.SSLSocket):
        raise TypeError("TLS needs a stream of asyncio or anyio, not an ssl.SSLSocket")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError("a stream socket is needed")
    if sock.fileno() < 0:
        raise ValueError("the socket is closed")
    if sock.getblocking():
        raise ValueError("the socket must be non-blocking: call setblocking(False) first")


async def _repeat(sock: socket.socket, step: Callable[[], bool], *, writing: bool) -> None:
    """Call ``step`` whenever the socket is ready, until it says that it is done."""
    # Other tasks must have a turn even if nothing needs to be waited for. When writing, before: a
    # cancellation then comes while something is still missing, not when all is sent.
    if writing:
        await anyio.lowlevel.checkpoint()
    if step():
        if not writing:
            await anyio.lowlevel.checkpoint()
        return
    loop = asyncio_loop()
    if loop is None:  # trio
        wait = anyio.wait_writable if writing else anyio.wait_readable
        done = False
        while not done:
            await wait(sock)
            done = step()
        return
    finished: asyncio.Future[None] = loop.create_future()
    # Not in the future, which this frame holds: an error's traceback holds the frame, and all that
    # is being sent would stay until the next garbage collection.
    errors: list[Exception] = []

    def ready() -> None:
        if finished.done():  # cancelled: not a byte more
            return
        try:
            done = step()
        except Exception as error:
            errors.append(error)
            done = True
        # Bytes can come so late that noting them cancels whoever waits.
        if done and not finished.done():
            finished.set_result(None)
            stop(descriptor)

    start, stop = (
        (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    )
    descriptor = sock.fileno()
    start(descriptor, ready)
    try:
        await finished
        if errors:
            raise errors.pop()
    finally:
        stop(descriptor)
