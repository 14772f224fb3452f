"""Byte streams of anyio other than sockets, such as streams in memory.

Sockets are tested in ``test_matrix.py`` and in ``tests/api``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from anyio.abc import ByteReceiveStream, ByteSendStream
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.file import FileReadStream, FileWriteStream
from anyio.streams.stapled import StapledByteStream

import aiotorchio
from aiotorchio.errors import ProtocolError, StreamPoisoned, TransferTimeout, TruncatedError
from aiotorchio.streams._anyio import AnyioSink, AnyioSource
from tests.api.test_streams import CHUNKED, LARGE, SMALL, encoded
from tests.support.backends import all_blocked, both_ends, soon
from tests.support.corpus import assert_same

pytestmark = pytest.mark.anyio


class Memory(ByteReceiveStream, ByteSendStream):
    """A stream over bytes in memory: gives at most 1000 at a time, then ends or raises ``end``."""

    def __init__(self, data: bytes = b"", *, end: Exception | None = None) -> None:
        self.data, self.end = bytearray(data), end
        self.kinds: set[type] = set()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if not self.data:
            raise self.end or anyio.EndOfStream
        piece = bytes(self.data[: min(max_bytes, 1000)])
        del self.data[: len(piece)]
        return piece

    async def send(self, item: bytes) -> None:
        if self.end:
            raise self.end
        self.kinds.add(type(item))
        self.data += item

    async def aclose(self) -> None:
        raise AssertionError


async def test_streams_get_bytes_and_keep_what_follows() -> None:
    stream = Memory()
    for obj in (SMALL, LARGE):
        await aiotorchio.save_to_stream(obj, stream)
    stream.data += b"own"
    assert stream.kinds == {bytes}
    assert_same(await aiotorchio.load_from_stream(stream), SMALL)
    assert_same(await aiotorchio.load_from_stream(stream), LARGE)
    assert stream.data == b"own"


@pytest.mark.parametrize("error", [anyio.BrokenResourceError, anyio.ClosedResourceError])
async def test_broken_streams(error: type[Exception]) -> None:
    with pytest.raises(TruncatedError, match=error.__name__):
        await aiotorchio.load_from_stream(Memory(encoded(SMALL)[:100], end=error()))
    with pytest.raises(TruncatedError, match=error.__name__):
        await aiotorchio.save_to_stream(SMALL, Memory(end=error()))
    with pytest.raises(TransferTimeout):
        await aiotorchio.load_from_stream(Memory(end=TimeoutError()))


class Wrapped(Memory):
    """A stream whose ``receive`` gives what a function makes of the bytes."""

    def __init__(self, data: bytes, wrap: Callable[[bytes], Any]) -> None:
        super().__init__(data)
        self.wrap = wrap

    async def receive(self, max_bytes: int = 65536) -> Any:
        return self.wrap(await super().receive(max_bytes))


async def test_typed_and_empty_pieces() -> None:
    typed = Wrapped(encoded(LARGE), lambda data: np.frombuffer(data, "S1").reshape(1, -1))
    assert_same(await aiotorchio.load_from_stream(typed), LARGE)

    class Hesitant(Memory):
        empty = False

        async def receive(self, max_bytes: int = 65536) -> bytes:
            self.empty = not self.empty
            return b"" if self.empty else await super().receive(max_bytes)

    assert_same(await aiotorchio.load_from_stream(Hesitant(encoded(LARGE))), LARGE)


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (lambda data: data + b"x", "gave 9 bytes, but 8 were requested"),
        (lambda data: data.decode("latin1"), "str"),
        (lambda data: memoryview(data)[::2], "not contiguous"),
        (lambda data: None, "NoneType"),
    ],
)
async def test_pieces_that_cannot_be(wrap: Callable[[bytes], Any], text: str) -> None:
    stream = Wrapped(encoded(SMALL), wrap)
    with pytest.raises(ProtocolError, match=text) as caught:
        await aiotorchio.load_from_stream(stream)
    assert caught.value.offset == 0
    with pytest.raises(StreamPoisoned):
        await aiotorchio.load_from_stream(stream)


async def test_a_stream_that_gives_nothing_for_ever_meets_its_deadline() -> None:
    class Nothing(Memory):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            return b""

    limits = aiotorchio.Limits(start_timeout=0.01)
    with pytest.raises(TransferTimeout, match="start_timeout"):
        await aiotorchio.load_from_stream(Nothing(), limits=limits)


async def test_the_end_is_short() -> None:
    source = AnyioSource(Memory(b"abc"))
    states = []
    for size, data in ((0, b""), (5, b"abc")):
        assert await source.read(size) == data
        states.append(source.in_message)
    assert states == [False, True]
    assert await source.read(5) == b""


async def test_streams_without_a_socket_cannot_be_aborted() -> None:
    AnyioSink(Memory()).abort()
    AnyioSource(Memory()).abort()


@pytest.mark.parametrize(
    ("kind", "link"),
    [("anyio", "unix"), ("anyio", "tcp"), ("anyio-tls", "tls")],
)
async def test_an_abort_of_the_source_stops_a_sender_that_waits(kind: str, link: str) -> None:
    errors: list[Exception] = []
    async with both_ends(kind, link) as (near, far), anyio.create_task_group() as group:

        async def send() -> None:
            with pytest.raises(TruncatedError) as caught:
                await AnyioSink(near.sink).send([bytes(2**25)])
            errors.append(caught.value)

        group.start_soon(send)
        source = AnyioSource(far.source)
        assert await source.read(1) == b"\0"
        await all_blocked()
        source.abort()
        told = await soon(lambda: bool(errors))
        group.cancel_scope.cancel()
        assert told
        await anyio.aclose_forcefully(far.source)
        source.abort()


async def test_stapled_and_buffered_streams() -> None:
    memory = Memory()
    stream = StapledByteStream(memory, memory)
    await aiotorchio.save_to_stream(CHUNKED, stream, chunk_size=4096)
    memory.data += b"line\n"
    buffered = BufferedByteReceiveStream(stream)
    assert_same(await aiotorchio.load_from_stream(buffered), CHUNKED)
    assert await buffered.receive_until(b"\n", 100) == b"line"


async def test_files(tmp_path: Path) -> None:
    async with await FileWriteStream.from_path(tmp_path / "x") as sink:
        for obj in (LARGE, SMALL):
            await aiotorchio.save_to_stream(obj, sink)
    async with await FileReadStream.from_path(tmp_path / "x") as source:
        for obj in (LARGE, SMALL):
            assert_same(await aiotorchio.load_from_stream(source), obj)


async def test_the_pipes_of_a_process() -> None:
    program = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"
    async with await anyio.open_process([sys.executable, "-c", program]) as process:
        assert process.stdin is not None and process.stdout is not None
        async with anyio.create_task_group() as group:

            async def push(sink: ByteSendStream) -> None:
                for obj in (LARGE, SMALL):
                    await aiotorchio.save_to_stream(obj, sink)
                await sink.aclose()

            group.start_soon(push, process.stdin)
            assert_same(await aiotorchio.load_from_stream(process.stdout), LARGE)
            assert_same(await aiotorchio.load_from_stream(process.stdout), SMALL)
        assert await process.wait() == 0
