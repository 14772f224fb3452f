"""Streams of other authors with the methods of asyncio's: readers, writers, transports, files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import trio

import aiotorchio
from aiotorchio.errors import ProtocolError, StreamPoisoned, TransferTimeout, TruncatedError
from aiotorchio.streams.duck_typed import (
    ReadSource,
    WriteSink,
    abort_transport,
    can_read,
    can_write,
    implements,
)
from tests.api.test_streams import CHUNKED, LARGE, SMALL, encoded
from tests.support.corpus import assert_same

pytestmark = pytest.mark.anyio


class Reader:
    """A reader as of aiohttp: iterates over lines, and cannot be weakly referenced."""

    __slots__ = ("data", "error", "wrap")

    def __init__(self, data: bytes, wrap: Callable[[bytes], Any] = bytes) -> None:
        self.data, self.wrap = data, wrap
        self.error: Exception | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise AssertionError("lines")

    async def readline(self) -> bytes:
        line, end, self.data = self.data.partition(b"\n")
        return line + end

    async def read(self, n: int = -1) -> Any:
        if self.error is not None and not self.data:
            raise self.error
        part, self.data = self.data[: min(n, 1000)], self.data[min(n, 1000) :]
        return self.wrap(part)


class WeakReader(Reader):
    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("kind", [Reader, WeakReader])
@pytest.mark.parametrize("wrap", [bytes, bytearray, lambda data: np.frombuffer(data, "S1")])
async def test_messages_one_after_the_other(kind: type[Reader], wrap: Any) -> None:
    stream = kind(encoded(SMALL) + b"line\n" + encoded(LARGE) + encoded(SMALL) + b"rest", wrap)
    assert_same(await aiotorchio.load_from_stream(stream), SMALL)
    assert await stream.readline() == b"line\n"
    reader = aiotorchio.StreamReader(stream)
    assert_same(await reader.load(), LARGE)
    async with reader.open() as message:
        assert_same(await message.load(), SMALL)
    assert stream.data == b"rest"


async def test_a_reader_stays_poisoned() -> None:
    reader = aiotorchio.StreamReader(Reader(b"no message, but longer than a preface"))
    with pytest.raises(ProtocolError):
        await reader.load()
    with pytest.raises(StreamPoisoned):
        await reader.load()


async def test_the_end_and_errors() -> None:
    assert await ReadSource(Reader(b"abc")).read(5) == b"abc"
    with pytest.raises(TruncatedError, match="before a message began"):
        await aiotorchio.load_from_stream(Reader(b""))
    for error, kind in (
        (ConnectionResetError("x"), TruncatedError),
        (OSError("x"), TruncatedError),
        (TimeoutError("x"), TransferTimeout),
        (ZeroDivisionError("x"), ZeroDivisionError),
    ):
        stream = Reader(encoded(SMALL)[:50])
        stream.error = error
        with pytest.raises(kind, match="x"):
            await aiotorchio.load_from_stream(stream)


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (lambda data: bytes(2**18 + 1), r"gave 262145 bytes, but \d+ were requested"),
        (lambda data: data.decode("latin1"), r"text \(str\)"),
        (lambda data: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("obj", [SMALL, LARGE], ids=["small", "large"])
async def test_pieces_that_cannot_be(obj: object, wrap: Callable[[bytes], Any], text: str) -> None:
    data = encoded(obj)
    good = len(data) // 2

    def late(part: bytes) -> Any:
        return wrap(part) if len(stream.data) < len(data) - good else part

    stream = WeakReader(data, late)
    with pytest.raises(ProtocolError, match=text) as caught:
        await aiotorchio.load_from_stream(stream)
    assert 0 < (caught.value.offset or 0) <= good
    with pytest.raises(StreamPoisoned):
        await aiotorchio.load_from_stream(stream)


async def test_files_of_anyio(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(CHUNKED) + encoded(SMALL) + b"rest")
    async with await anyio.open_file(tmp_path / "x", "rb") as file:
        assert_same(await aiotorchio.load_from_stream(file), CHUNKED)
        assert_same(await aiotorchio.load_from_stream(file), SMALL)
        assert await file.read() == b"rest"
    (tmp_path / "x").write_text("text")
    async with await anyio.open_file(tmp_path / "x") as text:
        with pytest.raises(ProtocolError, match="without an encoding"):
            await aiotorchio.load_from_stream(text)


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_files_of_trio(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(SMALL) + b"rest")
    async with await trio.open_file(tmp_path / "x", "rb") as file:
        assert_same(await aiotorchio.load_from_stream(file), SMALL)
        assert await file.read() == b"rest"


class Transport(asyncio.Transport):
    """A transport as of QUIC: it has the methods that it must have, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.data: list[bytes] = []
        self.closing = False

    def write(self, data: Any) -> None:
        assert type(data) is bytes
        self.data.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True


asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])


def writer_on(transport: Any) -> asyncio.StreamWriter:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    return asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())


@asyncio_only
async def test_a_transport_without_the_optional_methods() -> None:
    transport = Transport()
    writer = writer_on(transport)
    for obj in (LARGE, SMALL):
        await aiotorchio.save_to_stream(obj, writer)
    stream = Reader(b"".join(transport.data))
    assert_same(await aiotorchio.load_from_stream(stream), LARGE)
    assert_same(await aiotorchio.load_from_stream(stream), SMALL)
    writer.close()
    with pytest.raises(TruncatedError, match="closed"):
        await aiotorchio.save_to_stream(SMALL, writer)


@asyncio_only
async def test_a_reader_of_a_transport_without_the_optional_methods() -> None:
    # asyncio forgets a transport that cannot be paused when the buffer is full.
    reader = asyncio.StreamReader(limit=2**30)
    transport = Transport()
    reader.set_transport(transport)
    reader.feed_data(encoded(LARGE) + encoded(SMALL) + b"rest")
    reader.feed_eof()
    assert_same(await aiotorchio.load_from_stream(reader), LARGE)
    assert_same(await aiotorchio.load_from_stream(reader), SMALL)
    with pytest.raises(ProtocolError, match="rest"):
        await aiotorchio.load_from_stream(reader)
    assert transport.closing


class Writer:
    """A writer as of asyncssh, that is full after each write."""

    def __init__(self) -> None:
        self.data, self.closed, self.error = b"", False, None
        self.full = False

    error: Exception | None

    def write(self, data: bytes) -> None:
        assert type(data) is bytes and not self.full
        self.data += data
        self.full = True

    async def drain(self) -> None:
        if self.error is not None:
            raise self.error
        self.full = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def test_writers() -> None:
    writer = Writer()
    aiotorchio.StreamWriter(writer)
    for obj in (CHUNKED, SMALL):
        await aiotorchio.save_to_stream(obj, writer, chunk_size=4096)
    stream = Reader(writer.data)
    assert_same(await aiotorchio.load_from_stream(stream), CHUNKED)
    assert_same(await aiotorchio.load_from_stream(stream), SMALL)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BrokenPipeError("x"), TruncatedError),
        (TimeoutError("x"), TransferTimeout),
        (ZeroDivisionError("x"), ZeroDivisionError),
    ],
)
async def test_a_failed_drain_poisons_and_closes_the_writer(
    error: Exception, kind: type[Exception]
) -> None:
    writer = Writer()
    writer.error = error
    with pytest.raises(kind, match="x"):
        await aiotorchio.save_to_stream(SMALL, writer)
    assert writer.closed
    with pytest.raises(StreamPoisoned):
        await aiotorchio.save_to_stream(SMALL, writer)


async def test_a_writer_that_stays_full_meets_its_deadline() -> None:
    class Full(Writer):
        async def drain(self) -> None:
            await anyio.sleep_forever()

    writer = Full()
    limits = aiotorchio.Limits(write_timeout=0.01)
    with pytest.raises(TransferTimeout, match="write_timeout"):
        await aiotorchio.save_to_stream(SMALL, writer, limits=limits)
    assert writer.closed


async def test_a_cancellation_comes_between_two_pieces() -> None:
    with anyio.CancelScope() as scope:

        class Cancelling(Writer):
            def write(self, data: bytes) -> None:
                super().write(data)
                scope.cancel()

        writer = Cancelling()
        await WriteSink(writer).send([bytes(2**22)])
    assert scope.cancelled_caught
    assert 0 < len(writer.data) < 2**22


async def test_a_closed_writer() -> None:
    writer = Writer()
    writer.close()
    with pytest.raises(TruncatedError, match="closed"):
        await aiotorchio.save_to_stream(SMALL, writer)
    assert not writer.data


def test_the_methods_that_count() -> None:
    class ReadAll:
        async def read(self) -> bytes:
            raise AssertionError

    class ReadNow:
        def read(self, size: int) -> bytes:
            raise AssertionError

    assert can_read(Reader(b""))
    assert not can_read(ReadAll()) and not can_read(ReadNow()) and not can_read(None)
    assert can_write(Writer())
    assert not can_write(Reader(b"")) and not can_write(None)


def test_methods_of_transports() -> None:
    class Delegating:
        def __getattr__(self, name: str) -> Any:
            return getattr(Transport(), name)

    for transport in (Transport(), Delegating()):
        assert implements(transport, "is_closing", "write")
        assert not implements(transport, "is_closing", "get_write_buffer_size")
    assert not implements(None, "is_closing")


def test_transports_that_can_only_be_closed() -> None:
    transport = Transport()
    abort_transport(transport)
    assert transport.closing
    writer = Writer()
    abort_transport(writer)
    assert writer.closed
