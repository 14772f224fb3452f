"""Blocking sockets, plain and of TLS, with deadlines that other threads do not notice."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from aiotorchio.streams.base import PIECE_SIZE, Buffer, coalesce
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.sockets import TURN_SIZE, Cursor

__all__ = ["open_blocking_socket"]

_Selector: Callable[[], selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)
# Whether a system can try a socket without making all of it non-blocking.
_TRIES = hasattr(socket, "MSG_DONTWAIT") and hasattr(socket.socket, "sendmsg")


def open_blocking_socket(sock: socket.socket) -> BlockingStream:
    """What reads and writes a blocking socket.

    Raises:
        ValueError: A non-blocking socket.
    """
    if not sock.getblocking():
        raise ValueError("the socket must be blocking: call setblocking(True) first")
    if isinstance(sock, ssl.SSLSocket) or not _TRIES:
        return _TimedSocket(sock)
    return _PlainSocket(sock)


class _BlockingSocket(BlockingStream):
    _broken = OSError

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._timeout = sock.gettimeout()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._file.shutdown(socket.SHUT_RDWR)

    def _patience(self) -> float:
        """Seconds until whoever is less patient gives up: the owner of the socket, or the pace."""
        left = math.inf if self.pace is None else self.pace.left()
        if left <= 0:
            assert self.pace is not None
            raise self.pace.error()
        return left if self._timeout is None else min(left, self._timeout)

    def _impatient(self) -> Exception:
        if self.pace is not None and self.pace.left() <= 0:
            return self.pace.error()
        return TimeoutError("timed out")


class _PlainSocket(_BlockingSocket):
    """Tries each call, and waits beside the socket until it is worth another one."""

    def _read_into(self, view: memoryview) -> int:
        return self._try(
            selectors.EVENT_READ,
            lambda: self._file.recv_into(view, 0, socket.MSG_DONTWAIT),
        )

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        cursor = Cursor(buffers)

        def attempt() -> int:
            return int(self._file.sendmsg(cursor.next(TURN_SIZE), [], socket.MSG_DONTWAIT))

        while cursor:
            self.in_message = True
            count = self._try(selectors.EVENT_WRITE, attempt)
            self.moved(count)
            cursor.advance(count)

    def _try(self, event: int, attempt: Callable[[], Any]) -> int:
        while True:
            # With a timeout of its own, a socket would wait in the attempt.
            if self._timeout is None:
                try:
                    return int(attempt())
                except BlockingIOError:
                    pass
            patience = self._patience()
            with _Selector() as selector:
                selector.register(self._file, event)
                ready = selector.select(None if patience == math.inf else patience)
            if not ready:
                raise self._impatient()
            if self._timeout is not None:
                return int(attempt())


class _TimedSocket(_BlockingSocket):
    """Sets the timeout of the socket: TLS waits inside of its calls. None use it in two threads."""

    def _read_into(self, view: memoryview) -> int:
        return self._timed(self._file.recv_into, view)

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        # Within a call to TLS nothing shows how much was sent.
        for piece in coalesce(buffers, PIECE_SIZE):
            view = memoryview(piece)
            while view:
                self.in_message = True
                count = self._timed(self._file.send, view)
                self.moved(count)
                view = view[count:]

    def release(self) -> None:
        super().release()
        with contextlib.suppress(OSError):
            self._file.settimeout(self._timeout)

    def _timed(self, call: Callable[..., Any], *args: Any) -> int:
        patience = self._patience()
        self._file.settimeout(None if patience == math.inf else patience)
        try:
            return int(call(*args))
        except TimeoutError:
            raise self._impatient() from None
