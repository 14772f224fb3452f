"""The base classes of all sources and sinks, and code that several of them use.

In: buffers to fill or to send. Out: the bytes moved, and the number of them. The drivers in engine/
call the adapters. A ``TruncatedError`` means that the connection broke, a ``TransferTimeout`` that
it timed out, a ``ProtocolError`` that the stream gave something else than the requested bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import socket
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import IncompleteRead
from typing import Any

import anyio
import anyio.lowlevel

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import ProtocolError, TransferTimeout, TruncatedError
from aiotorchio.streams.deadlines import TimeBudget

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

# Bytes that a copying adapter passes on at a time: large enough that a call costs little, small
# enough that little is buffered.
PIECE_SIZE, _PIECE_SIZE_MIN = 256 * 2**10, 4096
# The most buffers that Linux and macOS take in one call (IOV_MAX).
_BUFFERS_MAX = 1024


class Endpoint:
    """The common state of sources and sinks.

    Attributes:
        in_message: Whether the stream is inside a message: a call that stops now poisons it. The
            adapter sets it when it moves bytes, its driver clears it at the end of a message.
        time_budget: The time budget of the peer; None if there is none. The public function sets
            it, the driver begins and ends its waits.
        failure: The error of a failed send, after which nothing more can be sent.
        count: Bytes that moved.
    """

    in_message = False
    count = 0
    failure: Exception | None = None
    time_budget: TimeBudget | None = None

    @property
    def piece_size(self) -> int:
        """Bytes to pass on at a time: few enough that a peer at the least rate is seen to move."""
        budget = self.time_budget
        most = PIECE_SIZE if budget is None else min(budget.least_nbytes, PIECE_SIZE)
        return max(int(most), _PIECE_SIZE_MIN)

    def moved(self, count: int) -> None:
        """Note bytes that were received or sent."""
        if not count:
            return
        self.in_message = True
        self.count += count
        if self.time_budget is not None:
            self.time_budget.moved(count)

    def checked_piece(self, piece: Any, most: int | None = None) -> bytes | memoryview:
        """Return the flat bytes of a piece that a stream gave.

        Every source that receives pieces of other code calls it: a peer may have sent a text frame,
        and a stream may give arrays, or more than ``most`` bytes, which were requested.

        Raises:
            ProtocolError: The piece is no contiguous bytes-like object, or is too long.
        """
        # The type of nearly all pieces, which needs no copy and no look at its layout.
        data = piece if type(piece) is bytes else self._flat(piece)
        if most is not None and len(data) > most:
            raise self.misfit(f"the stream gave {len(data)} bytes, but {most} were requested")
        return data

    def checked_count(self, count: Any, most: int, call: str, *, least: int = 0) -> int:
        """Return the number of bytes that a call on a stream says it has moved.

        Raises:
            ProtocolError: It is not a number from ``least`` to ``most``.
        """
        if type(count) is not int:
            try:
                count = operator.index(count)
            except TypeError:
                found = f"an object of type {type(count).__name__}"
                raise self.misfit(
                    f"{call} returned {found}, but must return the number of bytes"
                ) from None
        if not least <= count <= most:
            raise self.misfit(
                f"{call} returned {count}, but must return a number from {least} to {most}"
            )
        return int(count)

    def misfit(self, text: str) -> ProtocolError:
        """Make the error for a stream that does not do what its interface says, and poison it."""
        self.in_message = True
        return ProtocolError(text, offset=self.count)

    def _flat(self, piece: Any) -> bytes | memoryview:
        name = type(piece).__name__
        if isinstance(piece, str):
            raise self.misfit(
                f"the stream gave text ({name}), but bytes are needed: send binary frames, and "
                "open files and channels without an encoding"
            )
        try:
            view = memoryview(piece)
        except (TypeError, ValueError, BufferError):
            raise self.misfit(
                f"the stream gave an object of type {name}, but bytes are needed: load from an "
                "async iterable of the bytes in its items"
            ) from None
        if not view.nbytes:
            return b""
        if not view.c_contiguous:
            raise self.misfit(
                f"the stream gave an object of type {name} whose bytes are not contiguous: copy "
                "it first"
            )
        try:
            return view.cast("B")
        except (TypeError, ValueError):
            # memoryview casts native formats only: no structs and no foreign byte order.
            return view.tobytes()


class Source(Endpoint, ABC):
    """Receives exactly the requested bytes from a stream, and none after them."""

    async def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes; fewer only if the stream ended.

        Memory grows as bytes arrive: ``size`` is only a claim of the peer.
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
        """Close everything that the adapter has opened; not the stream."""

    def abort(self) -> None:
        """Break the connection, without waiting, so that the sender stops."""

    def release(self) -> None:
        """Restore the stream, so that the caller can use it again."""


class Sink(Endpoint, ABC):
    """Sends bytes to a stream."""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send bytes; after the return the memory of the buffers may be used again.

        After a failed call, the position of the stream in the frame is unknown: all later calls
        raise the same error.
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
        """Send bytes, and set ``in_message`` before the first of them may be sent."""

    @abstractmethod
    def abort(self) -> None:
        """Break the connection, without waiting, so that the peer sees that the message is cut."""

    def release(self) -> None:
        """Restore the stream, so that the caller can use it again."""
        # The traceback of the error references this object and the buffers of the send.
        self.failure = None


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop of asyncio that runs the current task; None on trio.

    trio can run as a guest of asyncio: a loop of asyncio is then running in the tasks of trio, too.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    # anyio's look at the current task takes ten times as long.
    if "trio" in sys.modules and anyio.lowlevel.current_token().native_token is not loop:
        return None
    return loop


# The most bytes to read off a socket before its shutdown; it holds less (tcp_rmem has 6 MiB).
HELD_MAX = 16 * 2**20


def break_connection(sock: socket.socket) -> None:
    """Shut down a non-blocking socket without closing it, so that the peer notices at once."""
    # First, bytes are read to make room. A sender that waits for room would notice the shutdown
    # only at its next probe, maybe minutes later; bytes that it sends into the room cause a reset.
    with contextlib.suppress(OSError):
        scratch, taken = bytearray(PIECE_SIZE), 0
        while taken < HELD_MAX and (count := sock.recv_into(scratch)):
            taken += count
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def connection_errors(broken: type[OSError] = ConnectionError) -> Iterator[None]:
    """Convert errors of a connection to errors of aiotorchio.

    Args:
        broken: The error that means that the connection broke; for sockets, every ``OSError``.

    Raises:
        TransferTimeout: The connection timed out.
        TruncatedError: The connection broke.
    """
    try:
        yield
    except TransferTimeout:
        # TransferTimeout is a subclass of TimeoutError.
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
    """Yield pieces of about ``size`` bytes: small buffers are joined, large ones cut into views."""
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
    """A position in a sequence of buffers that are filled or sent.

    The cost of a step depends only on the number of buffers that it passes.

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
        """The remaining bytes."""
        return self.size - self.done

    def next(self, most: int) -> list[memoryview]:
        """Return the next buffers, with at most ``most`` bytes."""
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
        """Copy bytes, at most ``left``, into the next buffers."""
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
