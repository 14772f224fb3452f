"""Source and sink for anyio byte streams on asyncio and trio: TCP, UNIX, TLS, processes, files."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketAttribute, SocketStream

from aiotorchio.common.buffer import Buffer
from aiotorchio.streams.base import (
    PIECE_SIZE,
    Cursor,
    Sink,
    Source,
    break_connection,
    coalesce,
    connection_errors,
)

__all__ = ["AnyioSink", "AnyioSource"]


class AnyioSource(Source):
    """Receives bytes from an anyio byte stream, which copies them once.

    Args:
        stream: The stream, which is not closed.
    """

    def __init__(self, stream: ByteReceiveStream) -> None:
        self._stream = stream

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        cursor = Cursor(buffers)
        while cursor:
            most = min(cursor.left, PIECE_SIZE)
            with connection_errors():
                try:
                    piece = await self._stream.receive(most)
                except anyio.EndOfStream:
                    break
            data = self.checked_piece(piece, most)
            if not data:
                # A stream of another author may give nothing again and again, without a wait.
                await anyio.lowlevel.checkpoint()
            self.moved(len(data))
            cursor.write(data)
        return cursor.done

    def abort(self) -> None:
        _shut(self._stream)


class AnyioSink(Sink):
    """Sends bytes to an anyio byte stream.

    Args:
        stream: The stream, which is not closed.
    """

    def __init__(self, stream: ByteSendStream) -> None:
        self._stream = stream
        # The socket streams of anyio accept any buffer; others promise to accept bytes only.
        self._takes_buffers = isinstance(stream, SocketStream)

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        # A send that is cancelled after this line does not report how much it has sent.
        self.in_message = True
        for piece in coalesce(buffers, self.piece_size):
            item: Any = piece if self._takes_buffers else bytes(piece)
            with connection_errors():
                await self._stream.send(item)
            self.moved(len(piece))

    def abort(self) -> None:
        _shut(self._stream)


def _shut(stream: ByteReceiveStream | ByteSendStream) -> None:
    # Closing an anyio stream needs an await; its socket, if any, can be shut down now. If the
    # caller has closed the stream, this fails in many ways, which do not matter.
    with contextlib.suppress(Exception):
        sock = stream.extra(SocketAttribute.raw_socket)
        # uvloop's sockets have no shutdown; a duplicate has.
        with socket.socket(fileno=os.dup(sock.fileno())) as duplicate:
            duplicate.setblocking(False)
            break_connection(duplicate)
