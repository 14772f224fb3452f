"""Which source or sink is chosen for each kind of stream, and which objects are refused."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio.abc
import pytest

from aiotorchio.streams._anyio import AnyioSink, AnyioSource
from aiotorchio.streams._asyncio import AsyncioSource
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.detect import (
    open_blocking_sink,
    open_blocking_source,
    open_sink,
    open_source,
    sink_type,
    source_type,
    stream_of_messages,
)
from aiotorchio.streams.duck_typed import ReadSource, WriteSink
from aiotorchio.streams.iterables import IterableSource
from aiotorchio.streams.sockets import SocketSink, SocketSource

pytestmark = pytest.mark.anyio


class Bytes(anyio.abc.ByteStream):
    async def receive(self, max_bytes: int = 65536) -> bytes:
        raise AssertionError

    async def send(self, item: bytes) -> None:
        raise AssertionError

    async def send_eof(self) -> None:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


class Items:
    def __aiter__(self) -> AsyncIterator[bytes]:
        raise AssertionError


class AsyncFile:
    async def read(self, size: int) -> bytes:
        raise AssertionError

    async def write(self, data: bytes) -> int:
        raise AssertionError


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_loads_from_what() -> None:
    assert isinstance(open_source(asyncio.StreamReader()), AsyncioSource)
    assert isinstance(open_source(Bytes()), AnyioSource)
    assert isinstance(open_sink(Bytes()), AnyioSink)
    with pytest.raises(AssertionError):
        open_source(Items())
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        assert isinstance(open_source(near), SocketSource)
        assert isinstance(open_sink(near), SocketSink)


async def test_an_async_iterator() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b""

    assert isinstance(open_source(pieces()), IterableSource)
    with pytest.raises(TypeError, match="cannot save to async_generator"):
        open_sink(pieces())


class Lines(Items):
    """Iterates over lines, as files do, and can do no more."""

    async def readline(self) -> bytes:
        raise AssertionError


class Parts(Lines):
    """Reads all of its bytes at once."""

    async def read(self, *, decode: bool = False) -> bytes:
        raise AssertionError


class BlockingLines(Lines):
    def read(self, size: int) -> bytes:
        raise AssertionError


class Reader(Lines):
    async def read(self, size: int = -1) -> bytes:
        raise AssertionError


class Writer:
    def write(self, data: bytes) -> None:
        raise AssertionError

    async def drain(self) -> None:
        raise AssertionError


class Response:
    """Writes as the responses of aiohttp do."""

    async def write(self, data: bytes) -> None:
        raise AssertionError

    async def drain(self) -> None:
        raise AssertionError


def test_the_methods_decide() -> None:
    assert source_type(Reader()) is source_type(AsyncFile()) is ReadSource
    assert sink_type(Writer()) is WriteSink
    # Nothing is iterated or read.
    assert source_type(Items()) is IterableSource
    reader = Reader()
    assert stream_of_messages(reader) is reader


@pytest.mark.parametrize("kind", [Lines, Parts, BlockingLines])
def test_iterables_of_lines(kind: type[Lines]) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__}, .* async iterable of its bytes"):
        stream_of_messages(kind())


class TrioStream(Items):
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise AssertionError


def test_streams_that_cannot_be() -> None:
    wrong = [Path("x"), "x", b"x", None, 5, io.BytesIO(), [b"x"], iter([b"x"]), object()]
    for stream in [*wrong, TrioStream(), Writer()]:
        with pytest.raises(TypeError, match=rf"cannot load from {type(stream).__name__}: .*\.load"):
            stream_of_messages(stream)
    for stream in [*wrong, Reader(), Response(), AsyncFile()]:
        with pytest.raises(TypeError, match=rf"cannot save to {type(stream).__name__}: .*\.save"):
            sink_type(stream)


def test_tls_sockets() -> None:
    context = ssl.create_default_context()
    with context.wrap_socket(socket.socket(), server_hostname="x") as tls:
        for choose in (source_type, sink_type):
            with pytest.raises(TypeError, match="TLS needs a stream of asyncio or anyio"):
                choose(tls)


def test_blocking_files() -> None:
    for file in (io.BytesIO(), io.BufferedRWPair(io.BytesIO(), io.BytesIO())):
        assert isinstance(open_blocking_source(file), BlockingStream)
        assert isinstance(open_blocking_sink(file), BlockingStream)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_no_blocking_file() -> None:
    wrong: list[Any] = [io.StringIO(), AsyncFile(), Bytes(), None, asyncio.StreamReader()]
    for file in wrong:
        with pytest.raises(TypeError, match=f"cannot load from {type(file).__name__}"):
            open_blocking_source(file)
        with pytest.raises(TypeError, match=f"cannot save to {type(file).__name__}"):
            open_blocking_sink(file)
