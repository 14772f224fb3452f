"""Blocking files, pipes, sockets and ``BytesIO``."""

from __future__ import annotations

import contextlib
import errno
import io
import socket
import ssl
from collections.abc import Sequence
from typing import Any

from aiotorchio.streams.base import Buffer, coalesce, connection_errors
from aiotorchio.streams.sockets import TURN_SIZE, Cursor

__all__ = ["BlockingStream"]


class BlockingStream:
    """Reads and writes a blocking file or socket.

    Args:
        file: A socket, or a binary file with ``readinto`` or ``read``, or with ``write``.

    Attributes:
        in_message: As for a source. Only of sockets and pipes: the owner of a file can seek.

    Raises:
        ValueError: A non-blocking socket.
    """

    in_message = False
    _failure: Exception | None = None

    def __init__(self, file: Any) -> None:
        self._file = file
        self._is_socket = isinstance(file, socket.socket)
        if self._is_socket and not file.getblocking():
            raise ValueError("the socket must be blocking: call setblocking(True) first")
        # Sockets of TLS refuse to send many buffers at once, and Windows has no such call.
        self._gathers = (
            self._is_socket and hasattr(file, "sendmsg") and not isinstance(file, ssl.SSLSocket)
        )
        self._seekable = bool(hasattr(file, "seekable") and file.seekable())

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only if the file ended."""
        data = bytearray(size)
        received = self.fill([memoryview(data)])
        return bytes(data[:received])

    def fill(self, buffers: Sequence[memoryview]) -> int:
        """Write the next bytes into buffers; returns how many, fewer only if the file ended."""
        done = 0
        with self._errors():
            for buffer in buffers:
                view = buffer
                while view:
                    count = self._read_into(view)
                    if not count:
                        return done
                    self.in_message = not self._seekable
                    view = view[count:]
                    done += count
        return done

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Write bytes; after a call that failed, all others fail alike, as those of a sink."""
        if self._failure is not None:
            raise self._failure
        try:
            with self._errors():
                self._gather(buffers) if self._gathers else self._write_all(buffers)
        except Exception as error:
            self._failure = error
            raise

    def _gather(self, buffers: Sequence[Buffer]) -> None:
        cursor = Cursor(buffers)
        while cursor:
            self.in_message = True
            cursor.advance(self._file.sendmsg(cursor.next(TURN_SIZE)))

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        for piece in coalesce(buffers, 2**20):
            view = memoryview(piece)
            while view:
                self.in_message = not self._seekable
                view = view[self._write(view) :]

    def abort(self) -> None:
        """Break a connection, so that the peer does not wait for the rest."""
        if self._is_socket:
            with contextlib.suppress(OSError):
                self._file.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Nothing to give back: the file was used as it is. For the rest see ``Sink``."""
        self._failure = None

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return connection_errors(OSError if self._is_socket else ConnectionError)

    def _read_into(self, view: memoryview) -> int:
        if self._is_socket:
            return int(self._file.recv_into(view))
        if hasattr(self._file, "readinto"):
            count = self._file.readinto(view)
            if count is None:
                raise _would_block()
            return int(count)
        data = self._file.read(len(view))
        if data is None:
            raise _would_block()
        view[: len(data)] = data
        return len(data)

    def _write(self, view: memoryview) -> int:
        if self._is_socket:
            return int(self._file.send(view))
        count = self._file.write(view)
        if count is not None:
            return int(count)
        if isinstance(self._file, io.RawIOBase):
            raise _would_block()
        # Some files return nothing, and have written all.
        return len(view)


def _would_block() -> OSError:
    return BlockingIOError(errno.EAGAIN, "the file must be blocking")
