"""Streams of asyncio: buffered bytes, paused transports, aborts and broken connections.

Loads and saves on every backend are in ``test_matrix.py`` and in ``tests/api``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest
import torch
import uvloop

import aiotorchio
from aiotorchio.errors import StreamPoisoned, TruncatedError
from aiotorchio.streams import _asyncio
from aiotorchio.streams._asyncio import AsyncioSink, AsyncioSource
from tests.api.test_streams import LARGE, SMALL, encoded
from tests.support.backends import (
    AsyncioEnd,
    all_blocked,
    asyncio_end,
    both_ends,
    connected,
    soon,
    until,
)
from tests.support.corpus import assert_same
from tests.support.speed import patience

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend",
        [
            pytest.param(("asyncio", {}), id="asyncio"),
            pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
        ],
    ),
]

streams = pytest.mark.parametrize("kind", ["streams", "streams-tls"])
OWN = b"own bytes\n" * 30_000


@streams
async def test_what_the_writer_has_not_sent_yet_goes_first(kind: str) -> None:
    async with both_ends(kind) as (near, far), asyncio.TaskGroup() as group:
        near.sink.write(OWN)
        saving = group.create_task(near.save(LARGE))
        assert await far.receive(len(OWN)) == OWN
        assert_same(await far.load(), LARGE)
        await saving


@streams
@pytest.mark.parametrize("obj", [SMALL, LARGE], ids=["small", "large"])
async def test_the_writers_limits_are_restored(kind: str, obj: object) -> None:
    async with both_ends(kind) as (near, far), asyncio.TaskGroup() as group:
        group.create_task(far.load())
        transport = near.sink.transport
        transport.set_write_buffer_limits(high=5000, low=300)
        await near.save(obj)
        assert transport.get_write_buffer_limits() == (300, 5000)
        assert transport.get_write_buffer_size() == 0


@streams
async def test_the_user_goes_on_with_the_streams(kind: str) -> None:
    async with both_ends(kind) as (near, far), asyncio.TaskGroup() as group:

        async def push() -> None:
            for n in range(5):
                near.sink.write(b"before %d\n" % n)
                await near.save(LARGE)
                await near.save(SMALL)
                near.sink.write(b"after %d\n" % n)
                await near.sink.drain()

        group.create_task(push())
        for n in range(5):
            assert await far.source.readline() == b"before %d\n" % n
            assert_same(await far.load(), LARGE)
            assert_same(await far.load(), SMALL)
            assert await far.source.readline() == b"after %d\n" % n


@asynccontextmanager
async def filled(data: bytes, *, ends: bool = False) -> AsyncIterator[AsyncioEnd]:
    """A reader whose buffer holds as many of these bytes as fit."""
    near, far = connected("unix")

    def send() -> None:
        near.sendall(data)
        if ends:
            near.shutdown(socket.SHUT_WR)

    sending = asyncio.get_running_loop().run_in_executor(None, send)
    async with asyncio_end(far, True) as end:
        assert isinstance(end, AsyncioEnd)
        try:
            if len(data) < 2**16:
                await sending
            await all_blocked()
            if len(data) > 2**20:
                await until(lambda: not end.source._transport.is_reading())
            yield end
        finally:
            near.shutdown(socket.SHUT_RDWR)
            await asyncio.gather(sending, return_exceptions=True)
            near.close()


async def test_a_reader_whose_transport_was_paused_because_its_buffer_was_full() -> None:
    data = encoded(LARGE) + b"line\n" + encoded(SMALL)
    async with filled(data) as end:
        assert not end.source._transport.is_reading()
        assert_same(await end.load(), LARGE)
        assert end.source._transport.is_reading()
        assert await end.source.readline() == b"line\n"
        assert_same(await end.load(), SMALL)


# Large enough to be received directly from the socket, small enough to fit into the buffer with the
# following bytes.
DIRECT = torch.arange(17_000)


@pytest.mark.parametrize("optimised", [False, True])
async def test_a_reader_that_has_it_all_and_its_end(
    optimised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the usual limit, the reader pauses its transport before the transport sees the end.
    reader = asyncio.StreamReader(limit=2**20)
    sock, other = socket.socketpair()
    with other:
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: asyncio.StreamReaderProtocol(reader), sock=sock
        )
        other.shutdown(socket.SHUT_WR)
        # All bytes come from the buffer; only the end of the stream comes from the socket.
        reader.feed_data(encoded(DIRECT) + b"rest")
        await until(lambda: reader._eof)  # type: ignore[attr-defined]
        if optimised:
            # Python with -O removes the assertions of ``feed_data``; this is the rest of it.
            monkeypatch.setattr(reader, "feed_data", reader._buffer.extend)  # type: ignore[attr-defined]
        assert_same(await aiotorchio.load_from_stream(reader), DIRECT)
        assert await reader.read() == b"rest"
        with pytest.raises(TruncatedError, match="before a message began"):
            await aiotorchio.load_from_stream(reader)
        transport.close()


async def test_with_assertions_compiled_away() -> None:
    program = """
import asyncio, socket, torch, aiotorchio
async def main():
    near, far = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=far, limit=2**20)
    near.setblocking(False)
    big = {"w": torch.arange(300_000)}
    async with asyncio.TaskGroup() as group:
        group.create_task(aiotorchio.save_to_stream(big, near))
        first = await aiotorchio.load_from_stream(reader)
    await aiotorchio.save_to_stream({"w": torch.arange(17_000)}, near)
    near.shutdown(socket.SHUT_WR)
    while not reader._eof:
        await asyncio.sleep(0)
    second = await aiotorchio.load_from_stream(reader)
    writer.close()
    near.close()
    print(int(first["w"].sum()), int(second["w"].sum()), await reader.read())
asyncio.run(main())
"""
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-O", "-c", program],
        capture_output=True,
        timeout=patience(60),
    )
    assert run.stdout.split() == [b"44999850000", b"144491500", b"b''"], run.stderr


async def test_a_reader_without_a_transport_is_copied_from() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(encoded(LARGE) + b"rest")
    reader.feed_eof()
    assert_same(await aiotorchio.load_from_stream(reader), LARGE)
    assert await reader.read() == b"rest"


async def test_a_reader_with_an_exception() -> None:
    reader = asyncio.StreamReader()
    reader.set_exception(OSError("No route to host"))
    with pytest.raises(TruncatedError, match="No route"):
        await aiotorchio.load_from_stream(reader)
    source = AsyncioSource(reader)
    with pytest.raises(TruncatedError, match="No route"):
        await source.fill([memoryview(bytearray(2**20))])


async def test_what_the_buffer_had_more_than_the_message_goes_back() -> None:
    data = encoded(DIRECT) + b"line\n" + encoded(SMALL) + b"end"
    near, far = connected("unix")
    async with asyncio_end(far, True) as end:
        with near:
            end.source.feed_data(data)
            assert_same(await end.load(), DIRECT)
            assert await end.source.readline() == b"line\n"
            assert_same(await end.load(), SMALL)
            assert await end.receive(3) == b"end"


async def test_giving_back_to_a_reader_whose_connection_was_lost() -> None:
    near, far = connected("unix")
    with near:
        async with asyncio_end(far, True) as end:
            assert isinstance(end, AsyncioEnd)
            source = AsyncioSource(end.source)
            end.source.feed_data(bytes(2**18) + b"rest")
            assert await source.fill([memoryview(bytearray(2**18))]) == 2**18
            end.sink.transport.abort()
            await until(lambda: end.source._eof)
            source.release()
            assert await end.source.read() == b""


async def test_reads_beside_the_transport() -> None:
    near, far = connected("unix")
    with near:
        async with asyncio_end(far, True) as end:
            source = AsyncioSource(end.source)
            near.setblocking(False)
            near.send(bytes(100_000))
            end.source.feed_data(bytes(100_000))
            assert await source.fill([memoryview(bytearray(2**17))]) == 2**17
            assert await source.read(4) == bytes(4)
            near.send(b"xyz")
            near.shutdown(socket.SHUT_WR)
            rest = await source.read(2**20)
            assert rest == bytes(200_000 - 2**17 - 4) + b"xyz"
            source.release()
            source.release()
            assert await end.source.read() == b""


@streams
async def test_a_closed_writer(kind: str) -> None:
    async with both_ends(kind) as (near, far):
        near.sink.close()
        for obj in (SMALL, LARGE):
            with pytest.raises(TruncatedError, match="closed"):
                await near.save(obj)
        await near.sink.wait_closed()
        with pytest.raises(TruncatedError, match="closed"):
            await near.save(LARGE)
        with pytest.raises(TruncatedError):
            await far.load()


@streams
@pytest.mark.parametrize("obj", [SMALL, LARGE], ids=["small", "large"])
async def test_a_connection_that_breaks_before_the_transport_knows(kind: str, obj: object) -> None:
    async with both_ends(kind) as (near, far):
        descriptor = near.sink.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            duplicate.shutdown(socket.SHUT_WR)
        # The transport learns of the break on the next turn of the loop. A TLS transport may have
        # accepted a small message before, as a socket does after its peer closed, but accepts no
        # later bytes.
        unknown = kind == "streams-tls" and obj is SMALL
        with contextlib.nullcontext() if unknown else pytest.raises(TruncatedError):
            await near.save(obj)
        with pytest.raises((TruncatedError, StreamPoisoned)):
            await near.save(SMALL)
        with pytest.raises(TruncatedError):
            await far.load()


@streams
@pytest.mark.parametrize("size", [1, 2**20], ids=["by copy", "direct"])
async def test_an_abort_of_the_source_is_the_end_for_the_sender(kind: str, size: int) -> None:
    async with both_ends(kind) as (near, far), asyncio.TaskGroup() as group:

        async def push() -> None:
            with pytest.raises(TruncatedError):
                await near.save(torch.zeros(2**25, dtype=torch.uint8))

        sending = group.create_task(push())
        source = AsyncioSource(far.source)
        assert await source.fill([memoryview(bytearray(size))]) == size
        await all_blocked()
        assert not sending.done()
        source.abort()
        source.release()
        assert await soon(sending.done)
        assert far.sink.transport.is_closing()
        # The owner of the stream may already have closed it.
        source.abort()


async def test_an_abort_of_a_reader_without_a_transport() -> None:
    AsyncioSource(asyncio.StreamReader()).abort()


async def test_an_abort_of_a_pipe_closes_it() -> None:
    reading, writing = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0)
    )
    with os.fdopen(writing, "wb", 0) as sink, closing(transport):
        AsyncioSource(reader).abort()
        assert transport.is_closing()
        assert await reader.read() == b""
        with pytest.raises(BrokenPipeError):
            sink.write(b"x")


async def test_closing_the_writer_ends_a_load_beside_it() -> None:
    async with both_ends("streams") as (near, far):
        near.sink.write(encoded(LARGE)[:4_000_000])

        async def pull() -> None:
            with pytest.raises(TruncatedError):
                await far.load()

        async with asyncio.TaskGroup() as group:
            group.create_task(pull())
            await near.sink.drain()
            await all_blocked()
            far.sink.close()


def echo_back() -> list[str]:
    program = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"
    return [sys.executable, "-c", program]


async def test_the_pipes_of_a_process() -> None:
    process = await asyncio.create_subprocess_exec(
        *echo_back(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None

    async def push(sink: asyncio.StreamWriter) -> None:
        for obj in (LARGE, SMALL):
            await aiotorchio.save_to_stream(obj, sink)
        sink.close()

    async with asyncio.TaskGroup() as group:
        group.create_task(push(process.stdin))
        assert_same(await aiotorchio.load_from_stream(process.stdout), LARGE)
        assert_same(await aiotorchio.load_from_stream(process.stdout), SMALL)
        assert await process.stdout.read() == b""
    assert await process.wait() == 0
    await process.stdin.wait_closed()


async def test_unnamed_pipes() -> None:
    loop = asyncio.get_running_loop()
    reading, writing = os.pipe()
    reader = asyncio.StreamReader()
    source, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", 0)
    )
    sink, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(writing, "wb", 0)
    )
    writer = asyncio.StreamWriter(sink, protocol, None, loop)
    async with asyncio.TaskGroup() as group:
        group.create_task(aiotorchio.save_to_stream(LARGE, writer))
        assert_same(await aiotorchio.load_from_stream(reader), LARGE)
    sink.close()
    assert await reader.read() == b""
    source.close()
    await all_blocked()


class FakeTransport:
    def __init__(self, **info: Any) -> None:
        self.info = info

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        """Does nothing. The reader calls it when its buffer is full."""

    resume_reading = pause_reading

    def get_protocol(self) -> asyncio.BaseProtocol:
        return asyncio.streams.FlowControlMixin()

    def get_extra_info(self, name: str) -> Any:
        return self.info.get(name)


async def test_which_transports_step_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    sock, other = socket.socketpair()
    with sock, other, os.fdopen(os.open(os.devnull, os.O_RDONLY)) as file:
        for transport in (
            FakeTransport(),
            FakeTransport(socket=sock, ssl_object=object()),
            # A file that is not a socket, although the transport calls it one.
            FakeTransport(socket=file),
        ):
            assert _asyncio._duplicate(transport, socket.SHUT_RD) is None
        duplicate = _asyncio._duplicate(FakeTransport(socket=sock), socket.SHUT_RD)
        assert duplicate is not None
        duplicate.close()
        monkeypatch.setattr(sys, "platform", "win32")
        assert _asyncio._duplicate(FakeTransport(socket=sock), socket.SHUT_RD) is None


async def test_a_reader_that_is_fed_later_is_not_overtaken() -> None:
    sock, other = socket.socketpair()
    with sock, other:
        reader = asyncio.StreamReader()
        reader._transport = FakeTransport(socket=sock)  # type: ignore[attr-defined]
        other.send(b"what the transport read before comes first")
        # Feed on the next turn of the loop, as transports of subprocesses do.
        asyncio.get_running_loop().call_soon(reader.feed_data, encoded(LARGE))
        assert_same(await aiotorchio.load_from_stream(reader), LARGE)
        assert sock.recv(100) == b"what the transport read before comes first"


async def test_a_sink_that_was_not_used_gives_nothing_back() -> None:
    async with both_ends("streams") as (near, _):
        AsyncioSink(near.sink).release()
