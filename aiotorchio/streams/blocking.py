"""Blocking files, pipes, sockets and ``BytesIO``."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Any

from aiotorchio.streams.base import Buffer, coalesce, connection_errors

__all__ = ["BlockingStream"]


class BlockingStream:
    """Reads and writes a blocking file or socket.

    Args:
        file: A socket, or a binary file with ``readinto`` or ``read``, or with ``write``.

    Attributes:
        in_message: As for a source. Only of sockets: the owner of a file can seek.
    """

    in_message = False

    def __init__(self, file: Any) -> None:
        self._file = file
        self._is_socket = isinstance(file, socket.socket)

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only if the file ended."""
        data = bytearray(size)
        received = self.fill([memoryview(data)])
        return bytes(data[:received])

    def fill(self, buffers: Sequence[memoryview]) -> int:
        """Write the next bytes into buffers; returns how many, fewer only if the file ended."""
        done = 0
        with connection_errors():
            for buffer in buffers:
                view = buffer
                while view:
                    count = self._read_into(view)
                    if not count:
                        return done
                    self.in_message = self._is_socket
                    view = view[count:]
                    done += count
        return done

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Write bytes."""
        self.in_message = self._is_socket
        with connection_errors():
            for piece in coalesce(buffers, 2**20):
                view = memoryview(piece)
                while view:
                    sent = self._file.send(view) if self._is_socket else self._file.write(view)
                    # Some files return nothing, and have written all.
                    view = view[len(view) if sent is None else sent :]

    def abort(self) -> None:
        """Break a connection, so that the peer does not wait for the rest."""
        if self._is_socket:
            with contextlib.suppress(OSError):
                self._file.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Nothing to give back: the file was used as it is."""

    def _read_into(self, view: memoryview) -> int:
        if self._is_socket:
            return int(self._file.recv_into(view))
        if hasattr(self._file, "readinto"):
            return int(self._file.readinto(view) or 0)
        data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)
