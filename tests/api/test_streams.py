"""The public functions over real connections: many messages, full duplex, cancellation, errors."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import pickle
import socket
import struct
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
import torch

import aiotorchio
from aiotorchio import (
    RemoteAbort,
    StreamBusy,
    StreamPoisoned,
    StreamReader,
    StreamWriter,
    TransferTimeout,
    TruncatedError,
)
from tests.support.backends import (
    IN_ONE_LOOP,
    PATIENCE,
    WORLDS,
    CancelledAt,
    End,
    World,
    all_blocked,
    both_ends,
    cancelled_at,
    connected,
    converse,
    descriptors,
    suppress_broken,
)
from tests.support.corpus import assert_same

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)

SMALL = {"w": torch.arange(3)}
CHUNKED = {"w": torch.arange(5000)}
DIRECT = {"w": torch.arange(40_000)}
LARGE = {"w": torch.arange(1_000_000), "b": torch.ones(3)}
PICKLED = [SHARED := [torch.ones(2)], SHARED]


def encoded(obj: object, **options: Any) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------ one after another


def mixed(count: int) -> list[tuple[object, dict[str, Any]]]:
    kinds: list[tuple[object, dict[str, Any]]] = [
        (SMALL, {}),
        (CHUNKED, {"chunk_size": 4096}),
        (PICKLED, {}),
        (DIRECT, {}),
        ({}, {}),
        (DIRECT, {"chunk_size": 2**17, "checksum": False}),
    ]
    every = [kinds[n % len(kinds)] for n in range(count)]
    every[:: max(count // 10, 1)] = [(LARGE, {})] * len(every[:: max(count // 10, 1)])
    return every


@pytest.mark.parametrize("world", WORLDS, ids=[world.name for world in WORLDS])
def test_many_messages_follow_each_other_with_the_users_bytes_between(world: World) -> None:
    thorough = world.name in ("streams-asyncio-tcp", "streams-uvloop-unix", "anyio-trio-tcp")
    messages = mixed(1000 if thorough else 120)
    talks = world.kind != "iterable"

    async def send(end: End) -> None:
        for n, (obj, options) in enumerate(messages):
            await end.save(obj, **options)
            if talks:
                await end.send(b"%06d\n" % n * (1 + n % 7 * 500))

    async def receive(end: End) -> None:
        for n, (obj, _) in enumerate(messages):
            assert_same(await end.load(), obj)
            if talks:
                own = b"%06d\n" % n * (1 + n % 7 * 500)
                assert await end.receive(len(own)) == own

    converse(world, send, world, receive)


@in_one_loop
async def test_both_directions_at_once(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push(end: End) -> None:
            for obj, options in mixed(24):
                await end.save(obj, **options)

        async def pull(end: End) -> None:
            for obj, _ in mixed(24):
                assert_same(await end.load(), obj)

        for end in (near, far):
            group.start_soon(push, end)
            group.start_soon(pull, end)


@in_one_loop
async def test_writer_and_reader_carry_one_message_after_the_other(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        writer, reader = StreamWriter(near.sink), StreamReader(far.source)

        async def push() -> None:
            for obj, options in mixed(12):
                await writer.save(obj, **options)

        group.start_soon(push)
        for obj, _ in mixed(12):
            assert_same(await reader.load(), obj)


@in_one_loop
async def test_the_summary_counts_the_real_bytes(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        received = b""

        async def take() -> None:
            nonlocal received
            received = await far.receive(len(encoded(LARGE, chunk_size=2**20)))

        group.start_soon(take)
        summary = await near.save(LARGE, chunk_size=2**20)
    assert summary.nbytes == len(received)
    assert summary.payload_nbytes == 8_000_000 + 12
    assert (summary.tensors, summary.storages, summary.chunks) == (2, 2, 8)
    assert summary.codec == "tree" and len(bytes.fromhex(summary.message_id)) == 16
    assert_same(aiotorchio.load(io.BytesIO(received)), LARGE)


@in_one_loop
async def test_progress_tells_bytes_done_and_in_total(kind: str) -> None:
    sent: list[tuple[int, int]] = []
    received: list[tuple[int, int]] = []
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save(
                CHUNKED, chunk_size=16384, progress=lambda *figures: sent.append(figures)
            )

        group.start_soon(push)
        await far.load(progress=lambda *figures: received.append(figures))
    assert sent == received == [(16384, 40000), (32768, 40000), (40000, 40000)]


@in_one_loop
async def test_a_receiver_that_stops_stops_the_sender(kind: str) -> None:
    big = torch.zeros(48 * 2**20, dtype=torch.uint8)
    done = 0

    def progress(now: int, total: int) -> None:
        nonlocal done
        done = now

    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save(big, chunk_size=2**20, progress=progress)

        group.start_soon(push)
        before = -1
        while done != before:
            before = done
            await all_blocked()
        assert done <= 16 * 2**20
        assert_same(await far.load(), big)
    assert done == len(big)


@in_one_loop
async def test_one_call_at_a_time(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        group.start_soon(far.load)
        await all_blocked()
        with pytest.raises(StreamBusy, match="another load"):
            await far.load()
        big = torch.zeros(32 * 2**20, dtype=torch.uint8)
        async with anyio.create_task_group() as inner:
            inner.start_soon(far.save, big)
            await all_blocked()
            with pytest.raises(StreamBusy, match="another save"):
                await far.save(SMALL)
            assert_same(await near.load(), big)
        await near.save(SMALL)


# ------------------------------------------------------------------------------ cancellation


# More than sockets buffer, in few steps.
MEDIUM = {"w": torch.arange(150_000), "b": torch.ones(3)}


def cancellable(kind: str) -> dict[str, torch.Tensor]:
    # TLS runs over TCP, which buffers more.
    return {"w": torch.arange(1_000_000)} if kind == "streams-tls" else MEDIUM


@in_one_loop
async def test_a_save_cancelled_anywhere(kind: str) -> None:
    outcomes, open_descriptors, obj = [], [], cancellable(kind)
    tasks = len(anyio.get_running_tasks())
    for count in range(1, 1000):
        received: list[Any] = []

        async def pull(end: End, received: list[Any] = received) -> None:
            try:
                received.append(await end.load())
            except TruncatedError as error:
                received.append(error)

        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(pull, far)
            await all_blocked()
            try:
                await cancelled_at(count, near.save(obj, chunk_size=2**18))
            except CancelledAt:
                outcomes.append(await after_cancelled_save(kind, near, obj))
            else:
                outcomes.append("done")
        open_descriptors.append(len(descriptors()))
        assert len(anyio.get_running_tasks()) == tasks
        if outcomes[-1] == "poisoned":
            assert isinstance(received[0], TruncatedError)
        else:
            assert_same(received[0], obj)
        if outcomes[-1] == "done":
            break
    assert outcomes[-1] == "done" and "poisoned" in outcomes
    assert max(open_descriptors[1:]) <= max(open_descriptors[0], open_descriptors[1])


async def after_cancelled_save(kind: str, near: End, obj: object) -> str:
    try:
        await near.save(obj)
    except StreamPoisoned as error:
        assert "Cancelled" in str(error)
        if kind.startswith("streams"):
            assert near.sink.transport.is_closing()
        return "poisoned"
    return "clean"


@in_one_loop
async def test_a_load_cancelled_anywhere(kind: str) -> None:
    message = encoded(MEDIUM, chunk_size=2**18)
    cuts = [0, 10, 16, 100, 100_000, 400_000, 900_000, len(message)]
    outcomes, open_descriptors = [], []
    tasks = len(anyio.get_running_tasks())
    for count in range(1, 1000):
        hurry = anyio.Event()

        async def push(end: End, hurry: anyio.Event = hurry) -> None:
            for start, stop in itertools.pairwise(cuts):
                for _ in range(20):
                    if not hurry.is_set():
                        await anyio.lowlevel.checkpoint()
                with suppress_broken():
                    await end.send(message[start:stop])

        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(push, near)
            try:
                assert_same(await cancelled_at(count, far.load()), MEDIUM)
            except CancelledAt:
                hurry.set()
                try:
                    assert_same(await far.load(), MEDIUM)
                    outcomes.append("clean")
                except StreamPoisoned as error:
                    assert "Cancelled" in str(error)
                    outcomes.append("poisoned")
            else:
                outcomes.append("done")
            group.cancel_scope.cancel()
        open_descriptors.append(len(descriptors()))
        assert len(anyio.get_running_tasks()) == tasks
        if outcomes[-1] == "done":
            break
    # First the load waits for the first byte, later it has some bytes.
    assert outcomes == sorted(outcomes, key=["clean", "poisoned", "done"].index)
    assert set(outcomes) == {"clean", "poisoned", "done"}
    assert max(open_descriptors[1:]) <= max(open_descriptors[0], open_descriptors[1])


@in_one_loop
async def test_a_load_cancelled_before_its_first_byte_leaves_the_stream_usable(kind: str) -> None:
    async with both_ends(kind) as (near, far):
        async with anyio.create_task_group() as group:
            group.start_soon(far.load)
            await all_blocked()
            group.cancel_scope.cancel()
        async with anyio.create_task_group() as group:
            group.start_soon(near.save, DIRECT)
            assert_same(await far.load(), DIRECT)


@in_one_loop
async def test_a_save_cancelled_before_its_first_byte_leaves_the_stream_usable(kind: str) -> None:
    async with both_ends(kind) as (near, far):
        if kind == "socket":
            # If the socket had room, the bytes would be sent before the first wait.
            fill(near.sink)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await near.save(SMALL)
        if kind == "socket":
            drain(far.source)
        assert scope.cancelled_caught
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


def fill(sock: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(bytes(2**16))


def drain(sock: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        while True:
            sock.recv(2**16)


async def test_cancellation_in_streams_that_only_stall() -> None:
    message = encoded(CHUNKED, chunk_size=4096)
    for count in range(1, 500):
        source = Pieces(message, 1000)
        try:
            assert_same(await cancelled_at(count, aiotorchio.load_from_stream(source)), CHUNKED)
        except CancelledAt:
            if source.taken:
                with pytest.raises(StreamPoisoned, match="Cancelled"):
                    await aiotorchio.load_from_stream(source)
            else:
                assert_same(await aiotorchio.load_from_stream(source), CHUNKED)
        else:
            break
    else:
        raise AssertionError("never done")
    assert count > 40


class Pieces(anyio.abc.ByteReceiveStream):
    """Yields bytes from memory; waits before every piece."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size, self.taken = data, size, 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        piece = self.data[self.taken :][: min(max_bytes, self.size)]
        self.taken += len(piece)
        if not piece:
            raise anyio.EndOfStream
        return piece

    async def aclose(self) -> None:
        raise AssertionError("the stream is its owner's to close")


# ------------------------------------------------------------------------------ lost connections

CUT = encoded({"w": torch.arange(2), "text": "x"})


def cuts() -> range:
    return range(len(CUT))


async def _fails(stream: Any, cut: int) -> None:
    with pytest.raises(TruncatedError) as caught:
        await aiotorchio.load_from_stream(stream)
    assert isinstance(caught.value, EOFError)
    assert caught.value.offset == cut


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cut_at_every_byte_for_a_stream_reader() -> None:
    for cut in cuts():
        reader = asyncio.StreamReader()
        reader.feed_data(CUT[:cut])
        reader.feed_eof()
        await _fails(reader, cut)


async def test_cut_at_every_byte_for_anyio_and_iterables() -> None:
    async def pieces(cut: int) -> AsyncIterator[bytes]:
        yield CUT[: cut // 2]
        yield CUT[cut // 2 : cut]

    for cut in cuts():
        await _fails(Pieces(CUT[:cut], 50), cut)
        await _fails(pieces(cut), cut)


async def test_cut_at_every_byte_for_sockets() -> None:
    for cut in cuts():
        near, far = connected("unix")
        with near, far:
            near.send(CUT[:cut])
            near.close()
            far.setblocking(False)
            await _fails(far, cut)


def test_cut_at_every_byte_for_files_and_blocking_sockets() -> None:
    for cut in cuts():
        near, far = connected("unix")
        with near, far:
            near.send(CUT[:cut])
            near.close()
            for file in (io.BytesIO(CUT[:cut]), far):
                with pytest.raises(TruncatedError) as caught:
                    aiotorchio.load(file)
                assert caught.value.offset == cut


def reset(sock: Any) -> None:
    """Make closing the socket reset the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("world", [w for w in WORLDS if w.link == "tcp"], ids=lambda w: w.name)
def test_a_reset_connection_is_a_truncated_message_for_both_sides(world: World) -> None:
    connected_to_it = threading.Event()

    async def send(end: End) -> None:
        connected_to_it.set()
        with pytest.raises(TruncatedError):
            await end.save(torch.zeros(64 * 2**20, dtype=torch.uint8))
        with pytest.raises((StreamPoisoned, TruncatedError)):
            await end.save(SMALL)

    async def receive(end: End) -> None:
        connected_to_it.set()
        with pytest.raises(TruncatedError):
            await end.load()
        with pytest.raises(StreamPoisoned):
            await end.load()

    message = encoded(LARGE)
    for script, sends in ((send, False), (receive, True)):
        near, far = connected("tcp")

        def other(near: socket.socket = near, sends: bool = sends) -> None:
            with near:
                assert connected_to_it.wait(PATIENCE)
                if sends:
                    near.sendall(message[:200_000])
                else:
                    near.recv(100_000, socket.MSG_WAITALL)
                reset(near)

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        world.run(far, True, script)
        thread.join(PATIENCE)
        connected_to_it.clear()


# A closed descriptor wakes no waiting call: sockets are shut down instead.
@pytest.mark.parametrize(
    ("anyio_backend", "kind"), [world for world in IN_ONE_LOOP if world.values[1] != "socket"]
)
async def test_an_owner_who_closes_its_end_ends_the_calls_on_it(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        group.start_soon(expect_truncation, near.save, torch.zeros(2**25))
        await all_blocked()
        group.start_soon(expect_truncation, near.load)
        await far.send(encoded(LARGE)[:1_000_000])
        await all_blocked()
        if kind.startswith("streams"):
            near.sink.transport.abort()
        else:
            await anyio.aclose_forcefully(near.sink)


async def expect_truncation(call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(TruncatedError):
        await call(*args)


async def test_a_socket_that_is_shut_down_ends_the_calls_on_it() -> None:
    async with both_ends("socket") as (near, _), anyio.create_task_group() as group:
        group.start_soon(expect_truncation, near.save, torch.zeros(2**25))
        group.start_soon(expect_truncation, near.load)
        await all_blocked()
        near.sink.shutdown(socket.SHUT_RDWR)


def test_a_blocking_socket_with_a_timeout() -> None:
    near, far = connected("unix")
    with near, far:
        near.settimeout(0.01)
        with pytest.raises(TransferTimeout) as caught:
            aiotorchio.load(near)
        assert isinstance(caught.value, TimeoutError)
        # No byte was read: the stream is as before.
        aiotorchio.save(SMALL, far)
        assert_same(aiotorchio.load(near), SMALL)
        with pytest.raises(TransferTimeout):
            aiotorchio.save(torch.zeros(2**23), near)
        with pytest.raises(StreamPoisoned):
            aiotorchio.save(SMALL, near)
        with pytest.raises(TruncatedError):
            aiotorchio.load(far)


# ------------------------------------------------------------------------------ a failing sender


def failing(after: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise ZeroDivisionError("in the middle")

    return progress


@in_one_loop
@pytest.mark.parametrize("obj", [CHUNKED, LARGE], ids=["copied", "direct"])
async def test_a_sender_that_fails_between_chunks_tells_the_receiver(
    kind: str, obj: object
) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            options: dict[str, Any] = {"chunk_size": 2**12 if obj is CHUNKED else 2**19}
            with pytest.raises(ZeroDivisionError):
                await near.save(obj, progress=failing(8192), **options)
            # After the last chunk the receiver has the whole message, and need not learn of the
            # error.
            with pytest.raises(ZeroDivisionError):
                await near.save(obj, progress=failing(40_000), chunk_size=2**24)
            await near.save(obj, **options)

        group.start_soon(push)
        with pytest.raises(RemoteAbort, match="ZeroDivisionError: in the middle"):
            await far.load()
        assert_same(await far.load(), obj)
        assert_same(await far.load(), obj)


def test_a_blocking_sender_that_fails_tells_the_receiver() -> None:
    near, far = connected("unix")
    with near, far:
        with pytest.raises(ZeroDivisionError):
            aiotorchio.save(CHUNKED, near, chunk_size=4096, progress=failing(8192))
        aiotorchio.save(SMALL, near)
        with pytest.raises(RemoteAbort, match="in the middle"):
            aiotorchio.load(far)
        assert_same(aiotorchio.load(far), SMALL)


async def test_iter_bytes_of_a_sender_that_fails() -> None:
    parts: list[bytes] = []
    with pytest.raises(ZeroDivisionError):
        async for piece in aiotorchio.iter_bytes(CHUNKED, chunk_size=4096, progress=failing(8192)):
            parts.append(bytes(piece))  # noqa: PERF401
    with pytest.raises(RemoteAbort, match="in the middle"):
        aiotorchio.load(io.BytesIO(b"".join(parts)))


class FailingCopier:
    """A copier of a device whose third copy fails."""

    pins = False

    def __init__(self) -> None:
        self.copies = 0

    def staging_buffer(self, nbytes: int) -> torch.UntypedStorage:
        return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.copies += 1
        if self.copies == 3:
            raise RuntimeError("the device is gone")
        destination.copy_(source)


@pytest.fixture
def failing_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiotorchio.engine import prepared_save
    from aiotorchio.memory.outgoing import OutgoingPayload

    def staged(*args: Any, **options: Any) -> OutgoingPayload:
        device = {"copier": FailingCopier(), "needs_copy": lambda device: True}
        return OutgoingPayload(*args, **options | device)

    monkeypatch.setattr(prepared_save, "OutgoingPayload", staged)


@in_one_loop
@pytest.mark.usefixtures("failing_device")
async def test_a_device_that_fails_while_bytes_are_on_the_wire(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            with pytest.raises(RuntimeError, match="the device is gone"):
                await near.save(LARGE, chunk_size=2**20)
            await near.send(b"and on")

        group.start_soon(push)
        with pytest.raises(RemoteAbort, match="the device is gone"):
            await far.load()
        assert await far.receive(6) == b"and on"


@pytest.mark.usefixtures("failing_device")
async def test_iter_bytes_of_a_device_that_fails() -> None:
    parts: list[bytes | memoryview] = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        async for piece in aiotorchio.iter_bytes(LARGE, chunk_size=2**20):
            parts.append(piece)  # noqa: PERF401
    assert all(isinstance(piece, bytes) for piece in parts)
    with pytest.raises(RemoteAbort, match="the device is gone"):
        aiotorchio.load(io.BytesIO(b"".join(parts)))


class BadStream(anyio.abc.ByteSendStream):
    """Fails with errors that are not those of a connection."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def send(self, item: bytes) -> None:
        if self.sent:
            raise ZeroDivisionError
        self.sent.append(item)

    async def aclose(self) -> None:
        raise AssertionError("the stream is its owner's to close")


async def test_a_stream_that_fails_gets_nothing_more() -> None:
    stream = BadStream()
    with pytest.raises(ZeroDivisionError):
        await aiotorchio.save_to_stream(CHUNKED, stream, chunk_size=4096)
    assert len(stream.sent) == 1
    with pytest.raises(StreamPoisoned, match="ZeroDivisionError"):
        await aiotorchio.save_to_stream(SMALL, stream)


# ------------------------------------------------------------------------------ options

WRONG_SAVE_OPTIONS = [
    ({"checksum": 1}, TypeError, "checksum"),
    ({"checksum": None}, TypeError, "checksum"),
    ({"chunk_size": 4096.0}, TypeError, "chunk_size"),
    ({"chunk_size": True}, TypeError, "chunk_size"),
    ({"chunk_size": 4095}, ValueError, "chunk_size"),
    ({"chunk_size": 5000}, ValueError, "chunk_size"),
    ({"metadata": {"a": 1}}, TypeError, "metadata"),
    ({"metadata": "version"}, TypeError, "metadata must be a mapping of str to str"),
    ({"metadata": {1: "a"}}, TypeError, "metadata"),
]
WRONG_LOAD_OPTIONS = [
    ({"pickle_module": pickle}, ValueError, "pickle_module"),
    ({"limits": 5}, TypeError, "limits"),
]


@pytest.mark.parametrize(("options", "error", "match"), WRONG_SAVE_OPTIONS)
async def test_wrong_options_of_a_save(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    async with both_ends("socket") as (near, far):
        with pytest.raises(error, match=match):
            await near.save(SMALL, **options)
        with pytest.raises(error, match=match):
            await anext(aiotorchio.iter_bytes(SMALL, **options))
        with pytest.raises(error, match=match):
            aiotorchio.save(SMALL, io.BytesIO(), **options)
        # No byte was sent.
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


@pytest.mark.parametrize(("options", "error", "match"), WRONG_LOAD_OPTIONS)
async def test_wrong_options_of_a_load(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    async with both_ends("socket") as (near, far):
        await near.save(SMALL)
        with pytest.raises(error, match=match):
            await far.load(**options)
        with pytest.raises(error, match=match):
            aiotorchio.load(io.BytesIO(), **options)
        assert_same(await far.load(), SMALL)


async def test_pickles_can_be_refused_and_the_stream_is_poisoned() -> None:
    async with both_ends("socket") as (near, far):
        await near.save(PICKLED)
        await near.save(SMALL)
        with pytest.raises(aiotorchio.UnsafeObjectError):
            await far.load(allow_pickle=False)
        with pytest.raises(StreamPoisoned, match="UnsafeObjectError"):
            await far.load()


async def test_pickle_modules_of_the_callers() -> None:
    class Module:
        Pickler = pickle._Pickler
        Unpickler = pickle._Unpickler

    async with both_ends("socket") as (near, far):
        await near.save(PICKLED, pickle_module=Module, pickle_protocol=4)
        assert_same(await far.load(weights_only=False, pickle_module=Module), PICKLED)


async def test_an_object_that_cannot_be_pickled_leaves_the_stream_untouched() -> None:
    async with both_ends("socket") as (near, far):
        with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
            await near.save(lambda: None)
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


# ------------------------------------------------------------------------------ kinds of streams


@pytest.mark.parametrize("stream", [None, b"", [], io.BytesIO(), "path", object()])
async def test_what_is_no_stream(stream: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot save to .*iter_bytes"):
        await aiotorchio.save_to_stream(SMALL, stream)
    with pytest.raises(TypeError, match=r"cannot load from .*aiotorchio\.load"):
        await aiotorchio.load_from_stream(stream)


async def test_blocking_sockets_are_for_the_blocking_twins() -> None:
    near, far = connected("unix")
    with near, far:
        with pytest.raises(ValueError, match="non-blocking"):
            await aiotorchio.save_to_stream(SMALL, near)
        with pytest.raises(ValueError, match="non-blocking"):
            await aiotorchio.load_from_stream(near)
        near.setblocking(False)
        with pytest.raises(ValueError, match="must be blocking"):
            aiotorchio.save(SMALL, near)
        with pytest.raises(ValueError, match="must be blocking"):
            aiotorchio.load(near)


async def test_text_files_and_async_streams_are_not_for_the_blocking_twins() -> None:
    pieces = Pieces(b"", 1)
    for file in (io.StringIO(), None, 5, pieces):
        with pytest.raises(TypeError, match="save_to_stream"):
            aiotorchio.save(SMALL, file)
        with pytest.raises(TypeError, match="load_from_stream"):
            aiotorchio.load(file)


def test_a_file_is_left_behind_its_message() -> None:
    file = io.BytesIO()
    aiotorchio.save(SMALL, file)
    file.write(b"own bytes")
    aiotorchio.save(PICKLED, file)
    file.seek(0)
    assert_same(aiotorchio.load(file), SMALL)
    assert file.read(9) == b"own bytes"
    assert_same(aiotorchio.load(file), PICKLED)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    path = kind(tmp_path / "message")
    assert aiotorchio.save(SMALL, path).nbytes == (tmp_path / "message").stat().st_size
    assert_same(aiotorchio.load(path), SMALL)
    with pytest.raises(FileNotFoundError):
        aiotorchio.load(kind(tmp_path / "none"))


def test_a_file_is_not_poisoned() -> None:
    file = io.BytesIO(encoded(PICKLED))
    with pytest.raises(aiotorchio.UnsafeObjectError):
        aiotorchio.load(file, allow_pickle=False)
    file.seek(0)
    assert_same(aiotorchio.load(file), PICKLED)


def test_a_load_that_fails_ends_both_directions_of_a_socket() -> None:
    near, far = connected("unix")
    with near, far:
        aiotorchio.save(PICKLED, near)
        with pytest.raises(aiotorchio.UnsafeObjectError):
            aiotorchio.load(far, allow_pickle=False)
        with pytest.raises(StreamPoisoned, match=r"earlier load stopped .*\(UnsafeObjectError"):
            aiotorchio.save("refused", far)
        with pytest.raises(aiotorchio.TruncatedError):
            aiotorchio.load(near)


# ------------------------------------------------------------------------------ iter_bytes


async def test_pieces_are_small_read_only_and_outlive_the_tensors() -> None:
    obj = {"w": torch.arange(300_000), "b": torch.ones(5)}
    message_size = len(encoded(obj))
    parts = [piece async for piece in aiotorchio.iter_bytes(obj)]
    expected = {name: tensor.clone() for name, tensor in obj.items()}
    obj.clear()
    gc.collect()
    torch.zeros(300_000)
    assert all(0 < len(piece) <= 256 * 2**10 for piece in parts)
    assert all(memoryview(piece).readonly for piece in parts)
    assert any(isinstance(piece, memoryview) for piece in parts)
    assert sum(map(len, parts)) == message_size
    assert_same(aiotorchio.load(io.BytesIO(b"".join(parts))), expected)


async def test_pieces_are_views_not_copies() -> None:
    tensor = torch.zeros(1_000_000)
    views = [p async for p in aiotorchio.iter_bytes(tensor) if isinstance(p, memoryview)]
    tensor.fill_(1)
    assert sum(map(len, views)) == 4_000_000
    assert all(bytes(view[:4]) == struct.pack("f", 1) for view in views)


async def test_a_generator_of_pieces_closes_at_any_time() -> None:
    unused = aiotorchio.iter_bytes(LARGE)
    await unused.aclose()
    del unused
    never_started = aiotorchio.iter_bytes(LARGE)
    del never_started
    pieces = aiotorchio.iter_bytes(LARGE)
    await anext(pieces)
    await anext(pieces)
    await pieces.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(pieces)


# ------------------------------------------------------------------------------ iterables


def sliced(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


async def test_what_follows_on_a_generator_stays_for_the_next_load() -> None:
    data = encoded(SMALL) + encoded(CHUNKED) + encoded(PICKLED)
    for size in (1, 7, 100, len(data)):

        async def pieces(size: int = size) -> AsyncIterator[bytes]:
            for piece in sliced(data, size):
                yield piece

        stream = pieces()
        for obj in (SMALL, CHUNKED, PICKLED):
            assert_same(await aiotorchio.load_from_stream(stream), obj)
        with pytest.raises(TruncatedError, match="before a message began"):
            await aiotorchio.load_from_stream(stream)


class Body:
    """An HTTP body of some libraries: each iterator goes on where the last one stopped."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def __aiter__(self) -> Slotted:
        return Slotted(self)


class Slotted:
    """An iterator that cannot be weakly referenced."""

    __slots__ = ("body",)

    def __init__(self, body: Body) -> None:
        self.body = body

    def __aiter__(self) -> Slotted:
        return self

    async def __anext__(self) -> bytes:
        if not self.body.pieces:
            raise StopAsyncIteration
        return self.body.pieces.pop(0)


async def test_a_reader_over_an_iterable_that_is_not_its_own_iterator() -> None:
    data = encoded(SMALL) + encoded(CHUNKED) + encoded(PICKLED)
    for size in (7, len(data)):
        for stream in (Body(sliced(data, size)), aiter(Body(sliced(data, size)))):
            reader = StreamReader(stream)
            for obj in (SMALL, CHUNKED, PICKLED):
                assert_same(await reader.load(), obj)


def test_a_reader_or_a_writer_of_no_stream() -> None:
    for stream in (Path("x"), "x", io.BytesIO(), None):
        with pytest.raises(TypeError, match=r"cannot load from \w+: .*files: aiotorchio\.load"):
            StreamReader(stream)
        with pytest.raises(TypeError, match=r"cannot save to \w+: .*files: aiotorchio\.save"):
            StreamWriter(stream)


async def test_an_iterator_that_cannot_be_weakly_referenced() -> None:
    assert_same(await aiotorchio.load_from_stream(aiter(Body([encoded(SMALL)]))), SMALL)


async def test_an_iterable_that_starts_anew_each_time() -> None:
    class Stored:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield encoded(SMALL) + b"what follows"

    stored = Stored()
    for _ in range(2):
        assert_same(await aiotorchio.load_from_stream(stored), SMALL)


async def test_pieces_that_reuse_one_buffer() -> None:
    async def pieces() -> AsyncGenerator[bytearray, None]:
        buffer = bytearray()
        for piece in sliced(encoded(CHUNKED) + encoded(SMALL), 13):
            buffer[:] = piece  # fails while a view of it exists
            yield buffer
            buffer[:] = bytes(len(buffer))
            buffer.clear()

    async with aclosing(pieces()) as stream:
        assert_same(await aiotorchio.load_from_stream(stream), CHUNKED)
        assert_same(await aiotorchio.load_from_stream(stream), SMALL)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    aiotorchio.save({"a": 1}, path)
    with pytest.raises(ValueError, match="chunk_size"):
        aiotorchio.save({"a": 2}, path, chunk_size=1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        aiotorchio.save({"a": lambda: None}, path)
    assert aiotorchio.load(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("save_to_stream", (SMALL, None)),
        ("iter_bytes", (SMALL,)),
        ("save", (SMALL, io.BytesIO())),
        ("load", (io.BytesIO(),)),
    ],
)
def test_arguments_that_there_are_not(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'mmap'"):
        getattr(aiotorchio, name)(*arguments, mmap=True)


async def test_a_save_that_is_never_awaited_is_warned_of_by_its_name() -> None:
    near, far = connected("unix")
    with near, far, pytest.warns(RuntimeWarning, match="save_to_stream' was never awaited"):
        coroutine = aiotorchio.save_to_stream(SMALL, near)
        del coroutine
        gc.collect()
