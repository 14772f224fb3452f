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

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import TransferTimeout, TruncatedError
from aiotorchio.streams.deadlines import Deadline

__all__ = [
    "Cursor",
    "Endpoint",
    "Sink",
    "Source",
    "asyncio_loop",
    "break_connection",
    "coalesce",
    "connection_errors",
]

# What a copying driver hands over at a time: large enough that a call costs little, small
# enough that little is buffered.
PIECE_SIZE, _PIECE_SIZE_MIN = 256 * 2**10, 4096
# The most buffers that Linux and macOS take in one call (IOV_MAX).
_BUFFERS_MAX = 1024


class Endpoint:
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
    deadline: Deadline | None = None

    @property
    def piece_size(self) -> int:
        """Bytes to hand over in one go: whoever is just fast enough must be seen to take them."""
        most = PIECE_SIZE if self.deadline is None else min(self.deadline.least_nbytes, PIECE_SIZE)
        return max(int(most), _PIECE_SIZE_MIN)

    def moved(self, count: int) -> None:
        """Note bytes that were taken, or sent."""
        if not count:
            return
        self.in_message = True
        if self.deadline is not None:
            self.deadline.moved(count)


class Source(Endpoint, ABC):
    """Takes bytes off a stream: exactly those that are asked for, none beyond."""

    async def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only if the stream ended.

        Memory grows as bytes arrive: their number is nothing but the claim of a peer.
        """
        pieces: list[memoryview] = []
        while size:
            piece = memoryview(bytearray(min(size, PIECE_SIZE)))
            received = await self.fill([piece])
            pieces.append(piece[:received])
            if received < len(piece):
                break
            size -= received
        return b"".join(pieces)

    @abstractmethod
    async def fill(self, buffers: Sequence[memoryview]) -> int:
        """Write the next bytes into buffers; returns how many, fewer only if the stream ended."""

    async def aclose(self) -> None:
        """Close what the driver has opened itself; the stream is not among it."""

    def abort(self) -> None:
        """Break the connection, without waiting, so that the sender stops."""

    def release(self) -> None:
        """Give the stream back to its owner, who may use it again."""


class Sink(Endpoint, ABC):
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


class Cursor:
    """A sequence of buffers, and how far it has been filled or sent.

    Each step costs as much as the buffers that it passes, however many there are before and after
    them.

    Attributes:
        size: Bytes of all buffers.
        done: Bytes that were filled or sent.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._buffers = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self.size = sum(map(len, self._buffers))
        self._index = 0
        self.done = 0

    def __bool__(self) -> bool:
        return self._index < len(self._buffers)

    @property
    def left(self) -> int:
        """Bytes that are not worked off yet."""
        return self.size - self.done

    def next(self, most: int) -> list[memoryview]:
        """The buffers that come next, with no more than ``most`` bytes."""
        views = self._buffers[self._index : self._index + _BUFFERS_MAX]
        for n, view in enumerate(views):
            if len(view) >= most:
                return [*views[:n], view[:most]]
            most -= len(view)
        return views

    def advance(self, count: int) -> None:
        """Note bytes that were filled or sent."""
        self.done += count
        while count:
            buffer = self._buffers[self._index]
            if count < len(buffer):
                self._buffers[self._index] = buffer[count:]
                return
            count -= len(buffer)
            self._index += 1

    def write(self, data: Buffer) -> None:
        """Copy bytes to where the next ones belong; no more than are left."""
        view = memoryview(data)
        self.done += len(view)
        while view:
            buffer = self._buffers[self._index]
            if len(view) < len(buffer):
                buffer[: len(view)] = view
                self._buffers[self._index] = buffer[len(view) :]
                return
            buffer[:] = view[: len(buffer)]
            view = view[len(buffer) :]
            self._index += 1
