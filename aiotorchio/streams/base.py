"""What a driver has to do, and what several of them share."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import IncompleteRead

import anyio

from aiotorchio.errors import TransferTimeout, TruncatedError
from aiotorchio.streams.pace import Pace

__all__ = [
    "Buffer",
    "Driver",
    "Sink",
    "Source",
    "asyncio_loop",
    "break_connection",
    "coalesce",
    "connection_errors",
    "copy_into",
]

Buffer = bytes | bytearray | memoryview

# What a copying driver hands over at a time: large enough that a call costs little, small
# enough that little is buffered.
PIECE_SIZE, _PIECE_SIZE_MIN = 256 * 2**10, 4096


class Driver:
    """What sources and sinks have in common.

    Attributes:
        in_message: Bytes of a message were taken, or sent, and its last one was not: whoever stops
            here leaves the stream in the middle of a message. Set by the driver whenever it moves
            bytes, cleared by its user at the end of a message.
        pace: The patience with the peer; None is endless. Set by its user.
        failure: Why nothing more can be sent: nobody knows where in a frame the stream stands.
    """

    in_message = False
    failure: Exception | None = None
    pace: Pace | None = None

    @property
    def piece_size(self) -> int:
        """Bytes to hand over in one go: whoever is just fast enough must be seen to take them."""
        most = PIECE_SIZE if self.pace is None else min(self.pace.least_nbytes, PIECE_SIZE)
        return max(int(most), _PIECE_SIZE_MIN)

    def moved(self, count: int) -> None:
        """Note bytes that were taken, or sent."""
        self.in_message = True
        if self.pace is not None:
            self.pace.moved(count)


class Source(Driver, ABC):
    """Takes bytes off a stream: exactly those that are asked for, none beyond."""

    async def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only if the stream ended."""
        data = bytearray(size)
        received = await self.fill([memoryview(data)])
        return bytes(memoryview(data)[:received])

    @abstractmethod
    async def fill(self, buffers: Sequence[memoryview]) -> int:
        """Write the next bytes into buffers; returns how many, fewer only if the stream ended."""

    async def aclose(self) -> None:
        """Close what the driver has opened itself; the stream is not among it."""

    def abort(self) -> None:
        """Break the connection, without waiting, so that the sender stops."""

    def release(self) -> None:
        """Give the stream back to its owner, who may use it again."""


class Sink(Driver, ABC):
    """Puts bytes on a stream."""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send bytes; on return the memory of the buffers may be used for something else.

        After a call that failed, nobody knows where in a frame the stream stands: all others
        fail with the same error.
        """
        if self.failure is not None:
            raise self.failure
        try:
            await self._send(buffers)
        except Exception as error:
            self.failure = error
            raise

    @abstractmethod
    async def _send(self, buffers: Sequence[Buffer]) -> None:
        """Send bytes, and set ``in_message`` when the first of them may be on its way."""

    @abstractmethod
    def abort(self) -> None:
        """Break the connection, without waiting: the peer must not take half for whole."""

    def release(self) -> None:
        """Give the stream back to its owner, who may use it again."""
        # The traceback of an error leads back here, and to all that was being sent.
        self.failure = None


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The running loop of asyncio; None on trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# More than a socket holds (net.ipv4.tcp_rmem has 6 MiB), to take off it before it is shut.
HELD_MAX = 16 * 2**20


def break_connection(sock: socket.socket) -> None:
    """Shut a non-blocking socket that stays its owner's, so that the peer notices at once."""
    # First room is made: a sender who waits for it is only told there is none to come when it asks
    # again, maybe minutes later. What it sends into the room is answered by a reset.
    with contextlib.suppress(OSError):
        scratch, taken = bytearray(PIECE_SIZE), 0
        while taken < HELD_MAX and (count := sock.recv_into(scratch)):
            taken += count
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def connection_errors(broken: type[OSError] = ConnectionError) -> Iterator[None]:
    """What a peer or a network does to a connection, as an error of ours.

    Args:
        broken: What says that the connection broke; of sockets, every ``OSError`` does.

    Raises:
        TransferTimeout: The connection timed out.
        TruncatedError: The connection broke.
    """
    try:
        yield
    except TransferTimeout:
        # Ours, which is a TimeoutError, too.
        raise
    except TimeoutError as error:
        raise TransferTimeout(f"the connection timed out: {error}") from error
    except (
        broken,
        ssl.SSLError,
        IncompleteRead,
        anyio.BrokenResourceError,
        anyio.ClosedResourceError,
    ) as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise TruncatedError(f"the connection broke: {text}") from error


def coalesce(buffers: Sequence[Buffer], size: int = PIECE_SIZE) -> Iterator[Buffer]:
    """Buffers as pieces of about ``size`` bytes: small ones joined, large ones cut by views."""
    small = bytearray()
    for buffer in buffers:
        if len(small) + len(buffer) <= size:
            small += buffer
            continue
        if small:
            yield small
            small = bytearray()
        if len(buffer) < size:
            small += buffer
            continue
        view = memoryview(buffer)
        for start in range(0, len(view), size):
            yield view[start : start + size]
    if small:
        yield small


def copy_into(buffers: Sequence[memoryview], data: Buffer, start: int) -> None:
    """Copy data into a sequence of buffers, from the byte ``start`` of them all on."""
    view, position = memoryview(data), 0
    for buffer in buffers:
        end = position + len(buffer)
        if view and start < end:
            at = start - position
            count = min(len(view), len(buffer) - at)
            buffer[at : at + count] = view[:count]
            view, start = view[count:], start + count
        position = end
