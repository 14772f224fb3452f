"""Source and sink for blocking files, pipes and ``BytesIO``, and the base class for sockets.

In: buffers to fill or to send. Out: the number of bytes moved. The blocking driver calls it. A
``TruncatedError`` means that the connection broke, a ``TransferTimeout`` that the peer was slow, a
``ProtocolError`` that the file gave something else than the requested bytes.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from typing import Any

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import ProtocolError
from aiotorchio.streams.base import PIECE_SIZE, Endpoint, coalesce, connection_errors

__all__ = ["BlockingStream"]


class BlockingStream(Endpoint):
    """Reads and writes a blocking file.

    The deadline is checked only after a call returned: nothing interrupts a file.

    Args:
        file: A file with ``readinto`` or ``read``, or ``write``, for bytes.
    """

    # The errors that mean that the connection broke.
    _broken: type[OSError] = ConnectionError

    def __init__(self, file: Any) -> None:
        self._file = file
        self._seekable = bool(hasattr(file, "seekable") and file.seekable())
        # readinto1 returns the available bytes, so that the deadline sees the speed of the peer.
        # (An inherited readinto1 needs a read1, which the class may lack.)
        in_parts = (
            not self._seekable
            and isinstance(file, io.BufferedIOBase)
            and type(file).read1 is not io.BufferedIOBase.read1
        )
        self._into = file.readinto1 if in_parts else getattr(file, "readinto", None)

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, as a source does; fewer only if the file ended."""
        pieces: list[memoryview] = []
        while size:
            piece = memoryview(bytearray(min(size, PIECE_SIZE)))
            received = self.fill([piece])
            pieces.append(piece[:received])
            if received < len(piece):
                break
            size -= received
        return b"".join(pieces)

    def fill(self, buffers: Sequence[memoryview]) -> int:
        """Write the next bytes into buffers; returns how many, fewer only if the file ended."""
        done = 0
        with connection_errors(self._broken):
            for buffer in buffers:
                view = buffer
                while view:
                    count = self._take(view)
                    if not count:
                        return done
                    self.moved(count)
                    view = view[count:]
                    done += count
        return done

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Write bytes; after a failed call, all later calls raise the same error, as in a sink."""
        if self.failure is not None:
            raise self.failure
        try:
            with connection_errors(self._broken):
                self._write_all(buffers)
        except Exception as error:
            self.failure = error
            raise

    def moved(self, count: int) -> None:
        """Note bytes that were received or sent."""
        # In a seekable file, the caller can find the next message, and there is no peer.
        if self._seekable:
            self.count += count
            return
        super().moved(count)
        if self.time_budget is not None and self.time_budget.left() <= 0:
            raise self.time_budget.error()

    def misfit(self, text: str) -> ProtocolError:
        """Make the error for a file that does not do what its interface says."""
        error = super().misfit(text)
        self.in_message = not self._seekable
        return error

    def abort(self) -> None:
        """Break a connection, so that the peer does not wait for remaining bytes."""

    def release(self) -> None:
        """Restore the file; see ``Sink.release``."""
        self.failure = None

    def _take(self, view: memoryview) -> int:
        # Set before the read: after an interrupt in it, the position in the file is unknown.
        before, self.in_message = self.in_message, not self._seekable
        try:
            count = self._read_into(view)
        except OSError:  # a TransferTimeout, too
            self.in_message = before
            raise
        if not count:
            self.in_message = before
        return count

    def _read_into(self, view: memoryview) -> int:
        if self._into is not None:
            count = self._into(view)
            if count is None:
                raise _would_block()
            return self.checked_count(count, len(view), "readinto()")
        piece = self._file.read(len(view))
        if piece is None:
            raise _would_block()
        data = self.checked_piece(piece, len(view))
        view[: len(data)] = data
        return len(data)

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        for piece in coalesce(buffers, 2**20):
            view = memoryview(piece)
            while view:
                self.in_message = not self._seekable
                count = self._write(view)
                self.moved(count)
                view = view[count:]

    def _write(self, view: memoryview) -> int:
        count = self._file.write(view)
        if count is not None:
            # A blocking file that writes nothing, without an error, would be called for ever.
            return self.checked_count(count, len(view), "write()", least=1)
        if isinstance(self._file, io.RawIOBase):
            raise _would_block()
        # Some files write all bytes and return None.
        return len(view)


def _would_block() -> OSError:
    return BlockingIOError(errno.EAGAIN, "the file must be blocking, not non-blocking")
