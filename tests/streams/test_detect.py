"""Which source or sink is chosen for each kind of stream, and which objects are refused."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator
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
)
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
