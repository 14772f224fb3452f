"""The backends with TLS, with contexts that the test chooses.

An end that has not failed closes TLS, and waits for the peer's close before it closes the
connection, as asyncio does: uvloop drops bytes that it has not decrypted when the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio
import anyio.abc
from anyio.streams.tls import TLSStream

from tests.support.backends import PATIENCE, AnyioEnd, AsyncioEnd, BlockingEnd, End, World
from tests.support.speed import patience

# Seconds for a peer to answer; it may be cut off.
_FAREWELL = patience(2)
# Errors of the close of TLS where the connection is gone.
_BROKEN = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)

__all__ = ["TLS_WORLDS", "Contexts", "tls_world"]


@dataclass(frozen=True)
class Contexts:
    """The contexts of both sides, and the server name that the client expects."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    host: str = "localhost"


class BlockingTLSEnd(BlockingEnd):
    async def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.source.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


@contextlib.asynccontextmanager
async def _asyncio_end(contexts: Contexts, sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    if serves:
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, sock, ssl=contexts.server, ssl_shutdown_timeout=_FAREWELL
        )
    else:
        transport, _ = await loop.create_connection(
            lambda: protocol,
            sock=sock,
            ssl=contexts.client,
            server_hostname=contexts.host,
            ssl_shutdown_timeout=_FAREWELL,
        )
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    try:
        yield AsyncioEnd(reader, writer)
    except BaseException:
        # For a cancellation, too: closing would wait for the peer.
        transport.abort()
        raise
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def _anyio_end(contexts: Contexts, sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    async with await anyio.abc.SocketStream.from_socket(sock) as plain:
        stream = await TLSStream.wrap(
            plain,
            server_side=serves,
            hostname=None if serves else contexts.host,
            ssl_context=contexts.server if serves else contexts.client,
        )
        yield AnyioEnd(stream)
        with contextlib.suppress(OSError, *_BROKEN), anyio.move_on_after(_FAREWELL):
            await stream.aclose()


@contextlib.asynccontextmanager
async def _blocking_end(
    contexts: Contexts, sock: socket.socket, serves: bool
) -> AsyncIterator[End]:
    sock.settimeout(PATIENCE)
    with (
        contexts.server.wrap_socket(sock, server_side=True)
        if serves
        else contexts.client.wrap_socket(sock, server_hostname=contexts.host)
    ) as wrapped:
        yield BlockingTLSEnd(wrapped)
        with contextlib.suppress(OSError, ValueError):
            wrapped.settimeout(_FAREWELL)
            wrapped.unwrap()


_OPENERS = {"streams": _asyncio_end, "anyio": _anyio_end, "blocking": _blocking_end}
TLS_WORLDS = [
    ("streams", "asyncio"),
    ("streams", "uvloop"),
    ("anyio", "asyncio"),
    ("anyio", "uvloop"),
    ("anyio", "trio"),
    ("blocking", "none"),
]


def tls_world(kind: str, loop: str, contexts: Contexts) -> World:
    """Return one of ``TLS_WORLDS``; the end that serves is the server."""
    return World(kind, "tls", loop, functools.partial(_OPENERS[kind], contexts))
