"""The backends that send and receive bytes, over real connected sockets.

A backend runs a script on one end of a connection, in the calling thread and on its own event loop,
so that two backends of different event loops can exchange messages. A script is a coroutine over an
``End``; the blocking backends run theirs without any event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import socket
import ssl
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import trustme
import uvloop
from anyio.streams.tls import TLSStream

import aiotorchio
from aiotorchio import Summary
from tests.support.speed import patience, slowdown

T = TypeVar("T")
Script = Callable[["End"], Coroutine[Any, Any, T]]

# A longer wait means that something hangs.
PATIENCE = patience(30)


class End(ABC):
    """One end of a connection, with the stream that the library gets."""

    def __init__(self, stream: Any, sink: Any = None) -> None:
        self.source = stream
        self.sink = stream if sink is None else sink

    async def save(self, obj: object, **options: Any) -> Summary:
        return await aiotorchio.save_to_stream(obj, self.sink, **options)

    async def load(self, **options: Any) -> Any:
        return await aiotorchio.load_from_stream(self.source, **options)

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send bytes outside a message."""

    @abstractmethod
    async def receive(self, size: int) -> bytes:
        """Receive exactly so many bytes outside a message."""


class AsyncioEnd(End):
    async def send(self, data: bytes) -> None:
        # Not drained: the next save finds them in the transport's buffer.
        self.sink.write(data)

    async def receive(self, size: int) -> bytes:
        data: bytes = await self.source.readexactly(size)
        return data


class AnyioEnd(End):
    async def send(self, data: bytes) -> None:
        await self.sink.send(data)

    async def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await self.source.receive(size - len(data))
        return data


class SocketEnd(End):
    async def send(self, data: bytes) -> None:
        while data:
            await anyio.wait_writable(self.sink)
            data = data[self.sink.send(data) :]

    async def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            await anyio.wait_readable(self.source)
            part = self.source.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


class IterableEnd(AnyioEnd):
    """Sends the buffers of ``iter_bytes``, receives from an async generator of random pieces."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        super().__init__(stream)
        self.pieces = self._pieces()
        self._left: list[bytes] = []

    async def _pieces(self) -> AsyncIterator[bytes]:
        sizes = random.Random(0)
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                data = await self.source.receive(sizes.choice([1, 7, 100, 5000, 300_000]))
                cut = sizes.randrange(len(data) + 1)
                yield data[:cut]
                yield data[cut:]

    async def save(self, obj: object, **options: Any) -> Summary:
        async with contextlib.aclosing(aiotorchio.iter_bytes(obj, **options)) as pieces:
            async for piece in pieces:
                await self.sink.send(bytes(piece))
        return Summary(0, 0, 0, 0, 0, "", "")

    async def load(self, **options: Any) -> Any:
        return await aiotorchio.load_from_stream(self.pieces, **options)

    async def receive(self, size: int) -> bytes:
        # The rest of a piece after a message is kept for the next load: it is not available here.
        raise NotImplementedError


class BlockingEnd(End):
    async def save(self, obj: object, **options: Any) -> Summary:
        return aiotorchio.save(obj, self.sink, **options)

    async def load(self, **options: Any) -> Any:
        return aiotorchio.load(self.source, **options)

    async def send(self, data: bytes) -> None:
        self.sink.sendall(data)

    async def receive(self, size: int) -> bytes:
        data: bytes = self.source.recv(size, socket.MSG_WAITALL)
        return data


class FileEnd(BlockingEnd):
    async def save(self, obj: object, **options: Any) -> Summary:
        summary = await super().save(obj, **options)
        self.sink.flush()
        return summary

    async def send(self, data: bytes) -> None:
        self.sink.write(data)
        self.sink.flush()

    async def receive(self, size: int) -> bytes:
        data: bytes = self.source.read(size)
        return data


# ------------------------------------------------------------------------------ opening ends

Opener = Callable[[socket.socket, bool], "contextlib.AbstractAsyncContextManager[End]"]


def _tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


SERVER_TLS, CLIENT_TLS = _tls_contexts()


@contextlib.asynccontextmanager
async def asyncio_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        yield AsyncioEnd(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def asyncio_tls_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    if serves:
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=SERVER_TLS)
    else:
        transport, _ = await loop.create_connection(
            lambda: protocol, sock=sock, ssl=CLIENT_TLS, server_hostname="localhost"
        )
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    try:
        yield AsyncioEnd(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def anyio_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    async with await _anyio_stream(sock) as stream:
        yield AnyioEnd(stream)


@contextlib.asynccontextmanager
async def anyio_tls_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    context = SERVER_TLS if serves else CLIENT_TLS
    stream = await TLSStream.wrap(
        await _anyio_stream(sock),
        server_side=serves,
        hostname=None if serves else "localhost",
        ssl_context=context,
        standard_compatible=False,
    )
    async with stream:
        yield AnyioEnd(stream)
        if not serves:
            # An end that closes before it has read the server's session tickets resets the
            # connection, and the bytes that it has sent are lost.
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                await stream.receive()


@contextlib.asynccontextmanager
async def socket_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    with sock:
        sock.setblocking(False)
        yield SocketEnd(sock)


@contextlib.asynccontextmanager
async def iterable_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    async with await _anyio_stream(sock) as stream:
        end = IterableEnd(stream)
        async with contextlib.aclosing(end.pieces):  # type: ignore[type-var]
            yield end


@contextlib.asynccontextmanager
async def blocking_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    with sock:
        sock.settimeout(PATIENCE)
        yield BlockingEnd(sock)


@contextlib.asynccontextmanager
async def file_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    sock.settimeout(None)
    with sock, sock.makefile("rb") as source, sock.makefile("wb") as sink:
        yield FileEnd(source, sink)


async def _anyio_stream(sock: socket.socket) -> anyio.abc.SocketStream:
    if sock.family == socket.AF_UNIX:
        return await anyio.abc.UNIXSocketStream.from_socket(sock)
    stream = await anyio.abc.SocketStream.from_socket(sock)
    # Streams from connect_tcp wait on asyncio for a receive before reading; do the same here.
    transport = getattr(stream, "_transport", None)
    if transport is not None:
        transport.pause_reading()
    return stream


# ------------------------------------------------------------------------------ backends

ANYIO_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"loop_factory": uvloop.new_event_loop}),
    "trio": ("trio", {}),
}


@dataclass(frozen=True)
class World:
    """A kind of stream on an event loop, or on none, over a kind of link."""

    kind: str
    link: str
    loop: str
    opener: Opener

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.loop}-{self.link}"

    def run(self, sock: socket.socket, serves: bool, script: Script[T]) -> T:
        """Run a script on one end of a connection."""

        async def main() -> T:
            async with self.opener(sock, serves) as end:
                return await script(end)

        async def impatient() -> T:
            with anyio.fail_after(PATIENCE):
                return await main()

        if self.loop == "none":
            return run_blocking(main())
        backend, options = ANYIO_BACKENDS[self.loop]
        return anyio.run(impatient, backend=backend, backend_options=options)


def run_blocking(script: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits."""
    try:
        script.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a blocking script has waited")


def _worlds(kind: str, loops: str, opener: Opener, links: str = "tcp unix") -> list[World]:
    return [World(kind, link, loop, opener) for link in links.split() for loop in loops.split()]


WORLDS = [
    *_worlds("streams", "asyncio uvloop", asyncio_end),
    *_worlds("streams", "asyncio uvloop", asyncio_tls_end, "tls"),
    *_worlds("anyio", "asyncio uvloop trio", anyio_end),
    *_worlds("anyio", "asyncio uvloop trio", anyio_tls_end, "tls"),
    *_worlds("socket", "asyncio uvloop trio", socket_end),
    *_worlds("iterable", "asyncio trio", iterable_end, "unix"),
    *_worlds("blocking", "none", blocking_end),
    *_worlds("file", "none", file_end, "unix"),
]


def connected(link: str) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection."""
    if link == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


def converse(near: World, near_script: Script[Any], far: World, far_script: Script[Any]) -> Any:
    """Run two backends at the ends of one connection; return the result of the far one."""
    assert near.link == far.link
    near_sock, far_sock = connected(near.link)
    errors: list[Exception] = []

    def run_near() -> None:
        try:
            near.run(near_sock, False, near_script)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run_near, name=near.name, daemon=True)
    thread.start()
    result = None
    try:
        result = far.run(far_sock, True, far_script)
    except Exception as error:
        errors.append(error)
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{near.name} hangs"
    if errors:
        raise ExceptionGroup(f"{near.name} or {far.name} failed", errors)
    return result


# ------------------------------------------------------------------------------ in one loop

KINDS: dict[str, tuple[Opener, str]] = {
    "streams": (asyncio_end, "unix"),
    "streams-tls": (asyncio_tls_end, "tls"),
    "anyio": (anyio_end, "tcp"),
    "anyio-tls": (anyio_tls_end, "tls"),
    "socket": (socket_end, "unix"),
}
# Parameters for tests that run on every loop with every kind of stream of that loop.
IN_ONE_LOOP = [
    pytest.param(backend, kind, id=f"{name}-{kind}")
    for name, backend in ANYIO_BACKENDS.items()
    for kind in KINDS
    if name != "trio" or not kind.startswith("streams")
]


@contextlib.asynccontextmanager
async def both_ends(kind: str, link: str | None = None) -> AsyncIterator[tuple[End, End]]:
    """Both ends of one connection, over its usual kind of link or another."""
    opener, usual = KINDS[kind]
    near_sock, far_sock = connected(link or usual)
    near, far = opener(near_sock, False), opener(far_sock, True)
    ends: dict[str, End] = {}

    async def open_near() -> None:
        ends["near"] = await near.__aenter__()

    # Opened in parallel: with TLS, each waits for the other.
    async with anyio.create_task_group() as group:
        group.start_soon(open_near)
        ends["far"] = await far.__aenter__()
    try:
        yield ends["near"], ends["far"]
    finally:
        with anyio.CancelScope(shield=True):
            await far.__aexit__(None, None, None)
            await near.__aexit__(None, None, None)


def descriptors() -> set[str]:
    """The open file descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


async def all_blocked() -> None:
    """Wait until every other task of this loop is waiting."""
    for _ in range(10):
        await anyio.wait_all_tasks_blocked()


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until a condition is true."""
    with anyio.fail_after(PATIENCE):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def soon(condition: Callable[[], bool]) -> bool:
    """Whether a condition becomes true before any timer can matter: TCP probes after 200 ms."""
    # Turns of the loop alone would be too few where worker threads wait for a busy machine.
    turns, deadline = 0, anyio.current_time() + 0.15 * slowdown()
    while turns < 1000 or anyio.current_time() < deadline:
        if condition():
            return True
        turns += 1
        await anyio.lowlevel.checkpoint()
    return False


def suppress_broken() -> contextlib.AbstractContextManager[None]:
    """Suppress the errors of a sender whose receiver gives up."""
    return contextlib.suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)


class CancelledAt(Exception):
    """A call was cancelled at the chosen wait."""


@types.coroutine
def _counted(
    coroutine: Coroutine[Any, Any, T], reached: Callable[[int], None]
) -> Generator[Any, Any, T]:
    count = 0
    resume = functools.partial(coroutine.send, None)
    while True:
        try:
            trap = resume()
        except StopIteration as stop:
            result: T = stop.value
            return result
        count += 1
        reached(count)
        try:
            resume = functools.partial(coroutine.send, (yield trap))
        except BaseException as error:
            resume = functools.partial(coroutine.throw, error)


async def cancelled_at(count: int, coroutine: Coroutine[Any, Any, T]) -> T:
    """Cancel a call when it waits for the n-th time.

    Raises:
        CancelledAt: It waited that often.
    """
    with anyio.CancelScope() as scope:
        return await _counted(
            coroutine, lambda reached: scope.cancel() if reached == count else None
        )
    raise CancelledAt
