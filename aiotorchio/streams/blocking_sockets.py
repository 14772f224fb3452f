"""Source and sink for blocking sockets, plain or TLS, with deadlines.

A call on a plain socket does not change the socket, so that other threads can use it meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from aiotorchio.common.buffer import Buffer
from aiotorchio.streams.base import HELD_MAX, PIECE_SIZE, Cursor, coalesce
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.sockets import TURN_SIZE

__all__ = ["one_call_at_a_time", "open_blocking_socket"]

T = TypeVar("T")

_Selector: Callable[[], selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)
# Whether single calls on a socket can be non-blocking.
_TRIES = hasattr(socket, "MSG_DONTWAIT") and hasattr(socket.socket, "sendmsg")
# Seconds: systems refuse a timeout of more than some weeks.
_WAIT_MAX = 86_400.0


def open_blocking_socket(sock: socket.socket) -> BlockingStream:
    """Make the adapter of a blocking socket.

    Raises:
        ValueError: A non-blocking socket.
    """
    if not sock.getblocking():
        raise ValueError("the socket must be blocking: call setblocking(True) first")
    return _TimedSocket(sock) if one_call_at_a_time(sock) else _PlainSocket(sock)


def one_call_at_a_time(stream: object) -> bool:
    """Whether a stream is a socket that only one call at a time can use, a save or a load.

    A call on it sets the timeout, which both directions share: TLS waits inside its calls.
    """
    return isinstance(stream, ssl.SSLSocket) or (isinstance(stream, socket.socket) and not _TRIES)


class _BlockingSocket(BlockingStream):
    _broken = OSError

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._timeout = sock.gettimeout()

    def abort(self) -> None:
        if _TRIES:
            # (A closed socket has no descriptor: ValueError.)
            with contextlib.suppress(OSError, ValueError):
                self._make_room()
        with contextlib.suppress(OSError):
            self._file.shutdown(socket.SHUT_RDWR)

    def _make_room(self) -> None:
        """Read bytes as ``break_connection`` does: from the descriptor, below TLS and timeouts."""
        descriptor, scratch, taken = self._file.fileno(), bytearray(PIECE_SIZE), 0
        with _Selector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while taken < HELD_MAX and selector.select(0):
                count = os.readv(descriptor, [scratch])
                if not count:
                    break
                taken += count

    def _wait(self, call: Callable[[float | None], T | None]) -> T:
        """Call with the seconds that it may wait, until it returns a result."""
        end = math.inf if self._timeout is None else time.monotonic() + self._timeout
        while True:
            left = math.inf if self.time_budget is None else self.time_budget.left()
            if self.time_budget is not None and left <= 0:
                raise self.time_budget.error()
            left = min(left, end - time.monotonic())
            if left <= 0:
                raise TimeoutError("timed out")
            result = call(None if left == math.inf else min(left, _WAIT_MAX))
            if result is not None:
                return result


class _PlainSocket(_BlockingSocket):
    """Makes non-blocking calls, and waits with a selector until the socket is ready."""

    def _read_into(self, view: memoryview) -> int:
        count = self._try(
            selectors.EVENT_READ,
            lambda: self._file.recv_into(view, 0, socket.MSG_DONTWAIT),
        )
        return self.checked_count(count, len(view), "recv_into()")

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        cursor = Cursor(buffers)

        def attempt() -> Any:
            return self._file.sendmsg(cursor.next(TURN_SIZE), [], socket.MSG_DONTWAIT)

        while cursor:
            self.in_message = True
            sent = self._try(selectors.EVENT_WRITE, attempt)
            count = self.checked_count(sent, cursor.left, "sendmsg()", least=1)
            self.moved(count)
            cursor.advance(count)

    def _try(self, event: int, attempt: Callable[[], Any]) -> Any:
        while True:
            # A socket with a timeout would wait in the attempt.
            if self._timeout is None:
                try:
                    return attempt()
                except BlockingIOError:
                    pass
            with _Selector() as selector:
                selector.register(self._file, event)
                # An empty list means that the time is over.
                self._wait(lambda seconds: selector.select(seconds) or None)
            if self._timeout is not None:
                return attempt()


class _TimedSocket(_BlockingSocket):
    """Sets the timeout of the socket; see ``one_call_at_a_time``."""

    def _read_into(self, view: memoryview) -> int:
        return self._timed(self._file.recv_into, view, "recv_into()")

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        # Inside a TLS call, the number of sent bytes is unknown.
        for piece in coalesce(buffers, self.piece_size):
            view = memoryview(piece)
            while view:
                self.in_message = True
                count = self._timed(self._file.send, view, "send()", least=1)
                self.moved(count)
                view = view[count:]

    def release(self) -> None:
        super().release()
        with contextlib.suppress(OSError):
            self._file.settimeout(self._timeout)

    def _timed(
        self, call: Callable[[memoryview], Any], view: memoryview, name: str, *, least: int = 0
    ) -> int:
        def attempt(seconds: float | None) -> int | None:
            self._file.settimeout(seconds)
            try:
                count = call(view)
            except TimeoutError:
                return None
            return self.checked_count(count, len(view), name, least=least)

        return self._wait(attempt)
