"""aiotorchio's methods of sending a state, each with the raw loop that sends the same bytes.

A raw loop is code that one writes by hand when the number of bytes is known: no names, no shapes,
no checks, and one piece of fresh memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import torch
import trustme
import uvloop
from common import Link, Method, State, bytes_of

import aiotorchio
from aiotorchio.memory.host import use_huge_pages

PIECE_SIZE = 2**18
# Over TLS, only the receiver can tell when all is sent: after a drain, asyncio's TLS still buffers
# bytes, and sends them only as long as the loop runs.
RECEIVED = b"!"

# A context manager that is open while a transfer runs on its event loop.
Beside = Callable[[], AbstractAsyncContextManager[Any]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Transfer = Callable[[], Any]
AsyncTransfer = Callable[[], Awaitable[Any]]


def views_of(state: State) -> list[memoryview]:
    return [bytes_of(tensor) for tensor in state.values()]


def size_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def some(count: int | None) -> int:
    """Yield buffers of as many bytes as were received, without end."""
    if not count:
        raise EOFError
    return count


def fresh(nbytes: int, huge: bool = False) -> memoryview:
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if huge:
        use_huge_pages(memory.untyped_storage())
    return bytes_of(memory)


def inside(method: Method, around: Callable[[], AbstractContextManager[Any]]) -> Method:
    """Wrap a method so that each of its transfers runs inside a context manager."""

    @contextlib.contextmanager
    def end(of: AbstractContextManager[Transfer]) -> Iterator[Transfer]:
        def transfer() -> Any:
            with around():
                return inner()

        with of as inner:
            yield transfer

    return Method(
        lambda state, link: end(method.send(state, link)), lambda link: end(method.receive(link))
    )


# On asyncio


@contextlib.contextmanager
def on_loop(
    end: AbstractAsyncContextManager[AsyncTransfer],
    uv: bool = False,
    beside: Beside = contextlib.nullcontext,
) -> Iterator[Transfer]:
    """One end of a method on asyncio's event loop, or on uvloop."""

    async def call(transfer: AsyncTransfer) -> Any:
        return await transfer()

    async def timed() -> Any:
        async with beside():
            return await transfer()

    loop_factory = uvloop.new_event_loop if uv else None
    with asyncio.Runner(loop_factory=loop_factory) as runner, contextlib.ExitStack() as stack:
        transfer = runner.run(call(end.__aenter__))
        stack.push(lambda *error: runner.run(call(functools.partial(end.__aexit__, *error))))
        yield lambda: runner.run(timed())


@contextlib.asynccontextmanager
async def connected(link: Link, family: int, tls: bool, *, serves: bool) -> AsyncIterator[Streams]:
    """Connect streams as ``open_connection`` and ``start_server`` do."""
    loop, sock = asyncio.get_running_loop(), link.socket(family)
    sock.setblocking(False)
    if serves and tls:
        authority = trustme.CA()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        authority.issue_cert("localhost").configure_cert(context)
        link.tell(authority.cert_pem.bytes().decode())
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=context)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    elif tls:
        context = ssl.create_default_context(cadata=link.hear())
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=context, server_hostname="localhost"
        )
    elif family == socket.AF_UNIX:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
    else:
        reader, writer = await asyncio.open_connection(sock=sock)
    yield reader, writer
    writer.close()
    # The peer may have closed first.
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def streams(
    *,
    family: int = socket.AF_INET,
    uv: bool = False,
    tls: bool = False,
    beside: Beside = contextlib.nullcontext,
    **options: Any,
) -> Method:
    """``save_to_stream`` with these options, and ``load_from_stream``."""

    @contextlib.asynccontextmanager
    async def send(state: State, link: Link) -> AsyncIterator[AsyncTransfer]:
        async with connected(link, family, tls, serves=False) as (reader, writer):

            async def transfer() -> None:
                await aiotorchio.save_to_stream(state, writer, **options)
                if tls:
                    await reader.readexactly(len(RECEIVED))

            yield transfer

    @contextlib.asynccontextmanager
    async def receive(link: Link) -> AsyncIterator[AsyncTransfer]:
        async with connected(link, family, tls, serves=True) as (reader, writer):

            async def transfer() -> Any:
                received = await aiotorchio.load_from_stream(reader)
                if tls:
                    writer.write(RECEIVED)
                return received

            yield transfer

    return Method(
        lambda state, link: on_loop(send(state, link), uv, beside),
        lambda link: on_loop(receive(link), uv, beside),
    )


def raw_sockets(
    *,
    family: int = socket.AF_INET,
    huge_pages: bool = False,
    uv: bool = False,
    beside: Beside = contextlib.nullcontext,
) -> Method:
    """``loop.sock_sendall`` of each tensor, ``loop.sock_recv_into`` fresh memory.

    ``huge_pages``: with the same advice to the system as aiotorchio gives for its memory.
    """

    @contextlib.asynccontextmanager
    async def send(state: State, link: Link) -> AsyncIterator[AsyncTransfer]:
        link.tell(size_of(state))
        loop = asyncio.get_running_loop()
        with link.socket(family) as sock:
            sock.setblocking(False)

            async def transfer() -> None:
                for view in views_of(state):
                    await loop.sock_sendall(sock, view)

            yield transfer

    @contextlib.asynccontextmanager
    async def receive(link: Link) -> AsyncIterator[AsyncTransfer]:
        size = link.hear()
        loop = asyncio.get_running_loop()
        with link.socket(family) as sock:
            sock.setblocking(False)

            async def transfer() -> None:
                view, done = fresh(size, huge_pages), 0
                while done < size:
                    done += some(await loop.sock_recv_into(sock, view[done:]))

            yield transfer

    return Method(
        lambda state, link: on_loop(send(state, link), uv, beside),
        lambda link: on_loop(receive(link), uv, beside),
    )


def raw_streams(*, tls: bool, huge_pages: bool = False) -> Method:
    """``write`` and ``drain`` of pieces, ``read`` and a copy into fresh memory."""

    @contextlib.asynccontextmanager
    async def send(state: State, link: Link) -> AsyncIterator[AsyncTransfer]:
        link.tell(size_of(state))
        async with connected(link, socket.AF_INET, tls, serves=False) as (reader, writer):

            async def transfer() -> None:
                for view in views_of(state):
                    for start in range(0, len(view), PIECE_SIZE):
                        writer.write(view[start : start + PIECE_SIZE])
                        await writer.drain()
                await reader.readexactly(len(RECEIVED))

            yield transfer

    @contextlib.asynccontextmanager
    async def receive(link: Link) -> AsyncIterator[AsyncTransfer]:
        size = link.hear()
        async with connected(link, socket.AF_INET, tls, serves=True) as (reader, writer):

            async def transfer() -> None:
                view, done = fresh(size, huge_pages), 0
                while done < size:
                    data = await reader.read(PIECE_SIZE)
                    some(len(data))
                    view[done : done + len(data)] = data
                    done += len(data)
                writer.write(RECEIVED)

            yield transfer

    return Method(
        lambda state, link: on_loop(send(state, link)), lambda link: on_loop(receive(link))
    )


# On trio


@contextlib.contextmanager
def on_trio(
    link: Link, transfer: Callable[[anyio.abc.SocketStream], Awaitable[Any]]
) -> Iterator[Transfer]:
    """One end of a method over anyio's TCP stream, on trio."""

    async def run() -> Any:
        async with await anyio.abc.SocketStream.from_socket(sock) as stream:
            return await transfer(stream)

    with link.socket() as sock:
        sock.setblocking(False)
        yield lambda: anyio.run(run, backend="trio")


def trio_streams(**options: Any) -> Method:
    """``iter_bytes`` -> ``stream.send``, ``load_from_stream`` of the stream."""

    def send(state: State, link: Link) -> AbstractContextManager[Transfer]:
        async def transfer(stream: anyio.abc.SocketStream) -> None:
            async for piece in aiotorchio.iter_bytes(state, **options):
                # anyio's sockets take any buffer.
                await stream.send(piece)  # type: ignore[arg-type]

        return on_trio(link, transfer)

    return Method(send, lambda link: on_trio(link, aiotorchio.load_from_stream))


def raw_trio(*, huge_pages: bool = False) -> Method:
    """``stream.send`` of pieces, ``stream.receive`` and a copy into fresh memory."""

    def send(state: State, link: Link) -> AbstractContextManager[Transfer]:
        link.tell(size_of(state))

        async def transfer(stream: anyio.abc.SocketStream) -> None:
            for view in views_of(state):
                for start in range(0, len(view), PIECE_SIZE):
                    # anyio's sockets take any buffer.
                    await stream.send(view[start : start + PIECE_SIZE])  # type: ignore[arg-type]

        return on_trio(link, transfer)

    def receive(link: Link) -> AbstractContextManager[Transfer]:
        size = link.hear()

        async def transfer(stream: anyio.abc.SocketStream) -> None:
            view, done = fresh(size, huge_pages), 0
            while done < size:
                data = await stream.receive(PIECE_SIZE)
                view[done : done + len(data)] = data
                done += len(data)

        return on_trio(link, transfer)

    return Method(send, receive)


# Blocking


def blocking_sockets(**options: Any) -> Method:
    """``save`` to a socket, ``load`` from it."""

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        with link.socket() as sock:
            yield lambda: aiotorchio.save(state, sock, **options)

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        with link.socket() as sock:
            yield lambda: aiotorchio.load(sock)

    return Method(send, receive)


def raw_blocking_sockets(*, huge_pages: bool = False) -> Method:
    """``sendall`` of each tensor, ``recv_into`` fresh memory."""

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        link.tell(size_of(state))
        with link.socket() as sock:

            def transfer() -> None:
                for view in views_of(state):
                    sock.sendall(view)

            yield transfer

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        size = link.hear()
        with link.socket() as sock:

            def transfer() -> None:
                view, done = fresh(size, huge_pages), 0
                while done < size:
                    done += some(sock.recv_into(view[done:]))

            yield transfer

    return Method(send, receive)


def by_file(
    write: Callable[[State, Path], object],
    read: Callable[[Path, int], Any],
    *,
    timed: str,
) -> Method:
    """Transfer through a file in memory; the write, or the read, is timed."""

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            path = Path(folder) / "state"
            if timed == "read":
                write(state, path)
            link.tell((path, size_of(state)))
            yield (lambda: write(state, path)) if timed == "write" else lambda: None
            link.meet()

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        path, size = link.hear()
        yield (lambda: read(path, size)) if timed == "read" else lambda: None
        link.meet()

    return Method(send, receive)


def files(*, timed: str) -> Method:
    """``save`` to a path, ``load`` from it."""
    return by_file(aiotorchio.save, lambda path, _: aiotorchio.load(path), timed=timed)


def raw_files(*, timed: str, huge_pages: bool = False) -> Method:
    """``write`` of each tensor, ``readinto`` fresh memory."""

    def write(state: State, path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for view in views_of(state):
                written = 0
                while written < len(view):
                    written += file.write(view[written:])

    def read(path: Path, size: int) -> None:
        with open(path, "rb", buffering=0) as file:
            view, done = fresh(size, huge_pages), 0
            while done < size:
                done += some(file.readinto(view[done:]))

    return by_file(write, read, timed=timed)
