"""Source and sink for non-blocking sockets on asyncio and trio, without copies.

``sendmsg`` and ``recvmsg_into`` take many buffers in one system call. On asyncio the socket is
registered once for a whole call, and each wake-up moves as many bytes as the kernel has or accepts:
to await each readiness separately costs a future and two system calls more.
"""

from __future__ import annotations

import asyncio
import socket
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

# Bytes that one wake-up moves before other tasks can run, in one or several system calls: a
# millisecond, in cached memory. Half of it costs a tenth of the speed of a single connection.
TURN_SIZE = 2 * 2**20


class SocketSource(Source):
    """Receives bytes from a non-blocking stream socket.

    Args:
        sock: A connected socket, which is not closed.
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
            """Receive the available bytes; True when the buffers are full or the stream ended."""
            stop = cursor.done + TURN_SIZE
            while cursor and cursor.done < stop:
                views = cursor.next(stop - cursor.done)
                try:
                    # recvmsg_into builds objects that recv_into does not need.
                    received = (
                        self._sock.recv_into(views[0])
                        if len(views) == 1
                        else self._sock.recvmsg_into(views)[0]
                    )
                except (BlockingIOError, InterruptedError):
                    return False
                if received == 0:
                    return True
                received = self.checked_count(received, cursor.left, "receiving")
                self.moved(received)
                cursor.advance(received)
            return not cursor

        with connection_errors(OSError):
            await _repeat(self._sock, step, writing=False)

    def abort(self) -> None:
        break_connection(self._sock)


class SocketSink(Sink):
    """Sends bytes to a non-blocking stream socket.

    Args:
        sock: A connected socket, which is not closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        _check(sock)
        self._sock = sock

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        cursor = Cursor(buffers)

        def step() -> bool:
            """Send as many bytes as the kernel accepts; True when all are sent."""
            stop = cursor.done + TURN_SIZE
            while cursor and cursor.done < stop:
                try:
                    sent = self._sock.sendmsg(cursor.next(stop - cursor.done))
                except (BlockingIOError, InterruptedError):
                    return False
                sent = self.checked_count(sent, cursor.left, "sendmsg()", least=1)
                self.moved(sent)
                cursor.advance(sent)
            return not cursor

        with connection_errors(OSError):
            await _repeat(self._sock, step, writing=True)

    def abort(self) -> None:
        break_connection(self._sock)


def _check(sock: socket.socket) -> None:
    if sock.type != socket.SOCK_STREAM:
        raise ValueError("the socket must be a stream socket (SOCK_STREAM)")
    if sock.fileno() < 0:
        raise ValueError("the socket is closed: an open one is needed")
    if sock.getblocking():
        raise ValueError("the socket must be non-blocking: call setblocking(False) first")


async def _repeat(sock: socket.socket, step: Callable[[], bool], *, writing: bool) -> None:
    """Call ``step`` whenever the socket is ready, until it returns True."""
    # Other tasks must run even if nothing has to wait. When writing, they run before the first
    # step: a cancellation then comes before all bytes are sent.
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
    # Errors are not in the future: this frame references it, and the traceback of an error
    # references the frame, so that the buffers would stay until the next garbage collection.
    errors: list[Exception] = []

    def ready() -> None:
        if finished.done():  # cancelled: no more bytes
            return
        try:
            done = step()
        except Exception as error:
            errors.append(error)
            done = True
        # Bytes can come so late that noting them cancels the waiting task.
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
