"""Messages that are opened first: properties of the header, and every call that reads the rest."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import tracemalloc
from collections import ChainMap, OrderedDict, UserDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, get_args
from weakref import ref

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

import aiotorchio
from aiotorchio import (
    AiotorchioError,
    ChecksumError,
    LimitExceeded,
    Limits,
    Message,
    MismatchError,
    ProtocolError,
    RemoteAbort,
    StreamBusy,
    StreamPoisoned,
    StreamReader,
    TensorSpec,
    TruncatedError,
    UnsafeObjectError,
)
from aiotorchio.api.message import Unread
from aiotorchio.common.gc_pause import release
from aiotorchio.engine import receive
from aiotorchio.memory.byteorder import swap_bytes
from aiotorchio.memory.host import scratch
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.table.names import walk
from aiotorchio.wire.frames import END, FRAME_HEAD_SIZE, PREFACE_SIZE, FrameHead
from tests.api.test_streams import CHUNKED, LARGE, PICKLED, SMALL, cancellable, encoded, failing
from tests.support import craft
from tests.support.backends import (
    ANYIO_BACKENDS,
    IN_ONE_LOOP,
    PATIENCE,
    CancelledAt,
    End,
    all_blocked,
    both_ends,
    cancelled_at,
    descriptors,
    soon,
    suppress_broken,
    until,
)
from tests.support.corpus import Tagged, assert_same
from tests.support.frames import frame, parse
from tests.support.speed import patience

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)

# Like IN_ONE_LOOP, over every kind of link.
OVER_ALL_LINKS = [
    pytest.param(*world.values, link, id=f"{world.id}-{link}")
    for world in IN_ONE_LOOP
    for link in (["tls"] if str(world.values[1]).endswith("tls") else ["tcp", "unix"])
]


class Tap:
    """Yields the bytes of a stream in small pieces, and counts them.

    Args:
        data: The stream.
        size: The size of a piece.
        stop: The offset at which the stream stalls; it ends there once ``resumed`` is set.
    """

    def __init__(self, data: bytes, size: int = 1, stop: int | None = None) -> None:
        self.data, self.size = data, size
        self.stop = len(data) if stop is None else stop
        self.taken = 0
        self.stalled, self.resumed = anyio.Event(), anyio.Event()

    def __aiter__(self) -> Tap:
        return self

    async def __anext__(self) -> bytes:
        piece = self.data[self.taken : min(self.taken + self.size, self.stop)]
        if not piece and self.stop < len(self.data):
            self.stalled.set()
            await self.resumed.wait()
        if not piece:
            raise StopAsyncIteration
        self.taken += len(piece)
        return piece


def frame_ends(data: bytes) -> list[int]:
    """The offsets after the header, the skeleton, every chunk and the end of each message."""
    ends, position = [], 0
    while position < len(data):
        if data[position : position + 8] == data[:8]:
            position += PREFACE_SIZE
        head = FrameHead.decode(data[position : position + FRAME_HEAD_SIZE])
        position += FRAME_HEAD_SIZE + head.length
        ends.append(position)
    return ends


def opened(data: bytes, *more: bytes) -> AbstractAsyncContextManager[Message]:
    """A message that has arrived as a whole, with others after it."""
    return StreamReader(Tap(b"".join([data, *more]), 1000)).open()


async def all_of(message: Message, **options: Any) -> dict[str, torch.Tensor]:
    """Collect every tensor of an iteration, each name once."""
    found: dict[str, torch.Tensor] = {}
    async for name, tensor in message.iterate(**options):
        assert name not in found
        found[name] = tensor
    return found


def mixed_state() -> dict[str, Any]:
    """A state of tensors of all kinds that have names, in their order on the wire."""
    whole, tied = torch.arange(600), torch.nn.Parameter(torch.rand(2, 2))
    return {
        "nothing": torch.empty(0, 3),
        "few": torch.arange(3),
        "views": {"head": whole[:10], "tail": whole[10:].view(59, 10).t()},
        "many": torch.arange(20_000.0),
        "tied": [tied, tied],
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "half": (torch.rand(7).to(torch.bfloat16), torch.rand(3000).half()),
        "conj": torch.rand(5, dtype=torch.complex64).conj(),
        "text": "no tensor",
        "more": [torch.full((n * 700,), n, dtype=torch.uint8) for n in range(9)],
        "last": torch.empty(2, 0),
    }


# Two tensors have the name "a.b".
AMBIGUOUS = {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(3)}
SPARSE = {"w": torch.ones(2), "sparse": torch.eye(2).to_sparse()}
ONE_EACH = {name: torch.full((4096,), n, dtype=torch.uint8) for n, name in enumerate("abcde")}


# ------------------------------------------------------------------------------ the header


@in_one_loop
async def test_what_the_header_says(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        summaries = []

        async def push() -> None:
            summary = await near.save(CHUNKED, metadata={"version": "7", "": ""}, checksum=False)
            summaries.append(summary)
            summaries.append(await near.save(PICKLED))

        group.start_soon(push)
        reader = StreamReader(far.source)
        async with reader.open() as message:
            assert message.metadata == {"version": "7", "": ""}
            assert message.nbytes == 40_000
            assert message.tensors == {"w": TensorSpec((5000,), torch.int64)}
            assert message.unnamed == 0
            assert not message.checksummed
            assert message.codec == "tree"
            assert message.producer.startswith("aiotorchio/")
            assert torch.__version__ in message.producer
            assert_same(await message.load(), CHUNKED)
            # The message is still readable.
            assert list(message.tensors) == ["w"]
        async with reader.open() as other:
            assert other.metadata == {}
            assert other.checksummed and other.codec == "pickle"
        await until(lambda: len(summaries) == 2)
        assert [message.message_id, other.message_id] == [each.message_id for each in summaries]
        with pytest.raises(TypeError):
            message.metadata["version"] = "8"  # type: ignore[index]
        with pytest.raises(TypeError):
            message.tensors["w"] = TensorSpec((), torch.int64)  # type: ignore[index]


TIED = torch.ones(2)
ORDERED = OrderedDict(w=torch.ones(2))
ORDERED._metadata = {"n": torch.ones(3)}  # type: ignore[attr-defined]
NAMES: list[tuple[Any, list[str], int]] = [
    (torch.ones(2), [""], 0),
    ({}, [], 0),
    ("text", [], 0),
    ({"a": {"b": [torch.ones(1), {"c": torch.ones(2)}]}}, ["a.b.0", "a.b.1.c"], 0),
    ((torch.ones(1), [torch.ones(2)]), ["0", "1.0"], 0),
    ({0: torch.ones(1), -1: torch.ones(2)}, ["0", "-1"], 0),
    ({"a": TIED, "b": torch.ones(3), "c": [TIED]}, ["a", "c.0", "b"], 0),
    (ORDERED, ["_metadata.n", "w"], 0),
    (SPARSE, ["w"], 2),
    ([[TIED], torch.nn.Linear(2, 2)], ["0.0"], 2),
]


@pytest.mark.parametrize(("obj", "names", "unnamed"), NAMES)
async def test_names(obj: Any, names: list[str], unnamed: int) -> None:
    async with opened(encoded(obj)) as message:
        assert list(message.tensors) == names
        assert message.unnamed == unnamed
        # ``walk`` ignores the attribute of an ordered dict.
        for path, tensor in walk(obj):
            assert message.tensors.get(path, TensorSpec.of(tensor)) == TensorSpec.of(tensor)


async def test_the_order_of_tensors_is_that_in_which_they_come() -> None:
    whole = torch.arange(10)
    obj = {"a": whole[:5], "b": torch.ones(2), "c": whole[5:]}
    async with opened(encoded(obj)) as message:
        assert list(message.tensors) == list(await all_of(message))


async def test_names_that_two_tensors_have() -> None:
    async with opened(encoded(AMBIGUOUS)) as message:
        with pytest.raises(MismatchError, match="same name"):
            _ = message.tensors
        assert message.unnamed == 0
        for act in (
            lambda: message.load(select="a.b"),
            lambda: message.load(into={"a.b": torch.ones(2)}),
            lambda: all_of(message, select="a.b"),
            lambda: all_of(message),
        ):
            with pytest.raises(MismatchError, match="same name"):
                await act()
        assert_same(await message.load(), AMBIGUOUS)


async def test_a_dtype_that_this_torch_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiotorchio.table import names

    def fails(name: str) -> torch.dtype:
        raise ProtocolError(f"no {name}")

    async with opened(encoded(SMALL)) as message:
        monkeypatch.setattr(names, "torch_dtype", fails)
        with pytest.raises(ProtocolError, match="no int64"):
            _ = message.tensors


async def test_a_header_beyond_the_limits() -> None:
    reader = StreamReader(Tap(encoded(CHUNKED)))
    with pytest.raises(LimitExceeded, match="total_nbytes"):
        async with reader.open(limits=Limits(total_nbytes=1000)):
            raise AssertionError("opened")
    with pytest.raises(StreamPoisoned, match="LimitExceeded"):
        await reader.load()


async def test_a_damaged_header_poisons_and_no_header_does_not() -> None:
    data = bytearray(encoded(SMALL))
    data[60] ^= 1
    reader = StreamReader(Tap(bytes(data)))
    with pytest.raises(ChecksumError):
        async with reader.open():
            raise AssertionError("opened")
    with pytest.raises(StreamPoisoned, match="ChecksumError"):
        async with reader.open():
            raise AssertionError("opened")
    ended = StreamReader(Tap(b""))
    for _ in range(2):
        with pytest.raises(TruncatedError) as caught:
            async with ended.open():
                raise AssertionError("opened")
        assert caught.value.offset == 0


@pytest.mark.parametrize("unread", ["Skip", "", None, True])
async def test_wrong_values_of_unread(unread: Any) -> None:
    tap = Tap(encoded(SMALL))
    with pytest.raises(ValueError, match="'skip' or 'abort'"):
        async with StreamReader(tap).open(unread=unread):
            raise AssertionError("opened")
    with pytest.raises(TypeError, match="limits"):
        async with StreamReader(tap).open(limits=5):  # type: ignore[arg-type]
            raise AssertionError("opened")
    assert tap.taken == 0
    assert_same(await StreamReader(tap).load(), SMALL)


# ------------------------------------------------------------------------------ reading in order


async def test_nothing_is_taken_before_it_is_asked_for() -> None:
    tap = Tap(encoded(CHUNKED, chunk_size=4096) + encoded(SMALL))
    ends = frame_ends(tap.data)
    reader = StreamReader(tap)
    async with reader.open() as message:
        assert tap.taken == ends[0]
        assert message.nbytes and message.tensors and not message.unnamed
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        with pytest.raises(MismatchError):
            await message.load(select="x")
        assert tap.taken == ends[0]
        await message.load()
        assert tap.taken == ends[12]
    assert tap.taken == ends[12]
    async with reader.open() as message:
        assert tap.taken == ends[13]
        await message.skip()
        assert tap.taken == ends[-1]


BIG = {f"{n}": torch.full((2**20,), n, dtype=torch.uint8) for n in range(20)}


@in_one_loop
async def test_a_message_that_is_not_read_stops_its_sender(kind: str) -> None:
    done = 0

    def progress(now: int, total: int) -> None:
        nonlocal done
        done = now

    async def settled() -> int:
        before = -1
        while done != before:
            before = done
            await all_blocked()
        return done

    # Buffers of TCP grow as the receiver reads.
    async with both_ends(kind, "unix") as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save(BIG, chunk_size=2**20, progress=progress)

        group.start_soon(push)
        async with StreamReader(far.source).open() as message:
            assert await settled() <= 2**20
            tensors = message.iterate()
            for n in range(4):
                name, tensor = await anext(tensors)
                assert_same({name: tensor}, {f"{n}": BIG[f"{n}"]})
                assert await settled() <= (n + 2) * 2**20
            assert [name async for name, _ in tensors] == list(BIG)[4:]
    assert done == message.nbytes


async def test_skipping_takes_the_memory_of_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(torch.zeros(2**22, dtype=torch.uint8), chunk_size=2**16)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("memory for tensors that nobody wants")

    monkeypatch.setattr(IncomingPayload, "__init__", refuse)
    made: list[int] = []

    def noted(nbytes: int) -> memoryview:
        made.append(nbytes)
        return scratch(nbytes)

    monkeypatch.setattr(receive, "scratch", noted)
    for by_hand in (True, False):
        made.clear()
        tap = Tap(data, 1000)
        tracemalloc.start()
        try:
            async with StreamReader(tap).open() as message:
                if by_hand:
                    await message.skip()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert tap.taken == len(data)
        assert made == [2**16]
        assert peak < 4 * 2**16


# ------------------------------------------------------------------------------ leaving a message


@in_one_loop
async def test_what_is_left_unread_is_skipped(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        messages = [CHUNKED, LARGE, {}, PICKLED, SMALL]

        async def push() -> None:
            for obj in messages:
                await near.save(obj, chunk_size=2**18)

        group.start_soon(push)
        reader = StreamReader(far.source)
        for _ in messages[:-1]:
            async with reader.open():
                pass
        assert_same(await reader.load(), SMALL)


async def test_a_receiver_that_refuses_old_versions() -> None:
    async with both_ends("socket") as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for version in (1, 2, 2, 1, 3):
                state = {"w": torch.full((5000,), version)}
                await near.save(state, metadata={"version": f"{version}"}, chunk_size=4096)

        group.start_soon(push)
        reader, model, taken = StreamReader(far.source), {"w": torch.zeros(5000).long()}, [0]
        for _ in range(5):
            async with reader.open() as message:
                version = int(message.metadata["version"])
                if version > taken[-1]:
                    await message.load(into=model, staged=True, lock=anyio.Lock())
                    taken.append(version)
            assert model["w"].eq(taken[-1]).all()
        assert taken == [0, 1, 2, 3]


@asynccontextmanager
async def sender_that_stops(near: End) -> AsyncIterator[None]:
    """A save of more than connections buffer, which fails while the receiver's end is open."""
    errors: list[Exception] = []

    async def push() -> None:
        with pytest.raises(TruncatedError) as caught:
            await near.save(BIG, chunk_size=2**20)
        errors.append(caught.value)

    async with anyio.create_task_group() as group:
        group.start_soon(push)
        yield
        # It must notice at once, not when TCP next probes for room: that may take minutes.
        told = await soon(lambda: bool(errors))
        group.cancel_scope.cancel()
    assert told


@pytest.mark.parametrize(("anyio_backend", "kind", "link"), OVER_ALL_LINKS)
async def test_an_abort_stops_the_sender_at_once(kind: str, link: str) -> None:
    async with both_ends(kind, link) as (near, far), sender_that_stops(near):
        reader = StreamReader(far.source)
        async with reader.open(unread="abort") as message:
            # The sender has filled the sockets, and waits.
            await all_blocked()
            assert message.tensors
        with pytest.raises(StreamPoisoned, match="before the end of the message"):
            await reader.load()


@in_one_loop
async def test_an_abort_after_a_part(kind: str) -> None:
    async with both_ends(kind) as (near, far), sender_that_stops(near):
        async with StreamReader(far.source).open(unread="abort") as message:
            assert (await anext(message.iterate()))[0] == "0"
        with pytest.raises(StreamPoisoned, match="before the end of the message"):
            await far.load()


@in_one_loop
async def test_an_abort_after_an_error(kind: str) -> None:
    async with both_ends(kind) as (near, far), sender_that_stops(near):
        with pytest.raises(ZeroDivisionError):
            async with StreamReader(far.source).open(unread="abort"):
                raise ZeroDivisionError
        with pytest.raises(StreamPoisoned, match="ZeroDivisionError"):
            await far.load()


async def test_an_abort_of_a_stream_without_a_connection() -> None:
    tap = Tap(encoded(CHUNKED) + encoded(SMALL))
    reader = StreamReader(tap)
    async with reader.open(unread="abort") as message:
        assert message.tensors
    assert tap.taken == frame_ends(tap.data)[0]
    with pytest.raises(StreamPoisoned, match="before the end of the message"):
        await reader.load()


@in_one_loop
async def test_what_was_read_is_not_aborted(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for _ in range(4):
                await near.save(CHUNKED, chunk_size=4096)

        group.start_soon(push)
        reader = StreamReader(far.source)
        async with reader.open(unread="abort") as message:
            assert_same(await message.load(), CHUNKED)
        async with reader.open(unread="abort") as message:
            assert_same(await all_of(message), CHUNKED)
        async with reader.open(unread="abort") as message:
            await message.skip()
        with pytest.raises(ZeroDivisionError):
            async with reader.open(unread="abort") as message:
                await message.load()
                raise ZeroDivisionError


@pytest.mark.parametrize("unread", ["skip", "abort"])
@pytest.mark.parametrize("part", [0, 1])
async def test_an_error_in_the_block_poisons_and_waits_for_nothing(unread: Any, part: int) -> None:
    data = encoded(ONE_EACH, chunk_size=4096) + encoded(SMALL)
    tap = Tap(data, stop=frame_ends(data)[1 + part])
    reader = StreamReader(tap)
    with anyio.fail_after(PATIENCE), pytest.raises(ZeroDivisionError):
        async with reader.open(unread=unread) as message:
            tensors = message.iterate()
            for _ in range(part):
                await anext(tensors)
            raise ZeroDivisionError("why")
    assert tap.taken == frame_ends(data)[part * 2]
    assert not tap.stalled.is_set()
    with pytest.raises(StreamPoisoned, match="ZeroDivisionError: why"):
        await reader.load()


class CancelledWhileFreed:
    """A scope that is cancelled when the rows of a header are about to be freed, in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scope = anyio.CancelScope()
        self._token = anyio.lowlevel.current_token()
        monkeypatch.setattr(receive, "release", self._cancel)
        monkeypatch.setattr(receive, "_RELEASED_NBYTES", 0)

    def _cancel(self, *tables: Any) -> None:
        anyio.from_thread.run_sync(self.scope.cancel, token=self._token)
        release(*tables)


async def test_an_error_in_the_block_is_not_lost_to_a_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed, caught = CancelledWhileFreed(monkeypatch), None
    with freed.scope:
        try:
            async with opened(encoded(SMALL)):
                raise ZeroDivisionError
        except ZeroDivisionError as error:
            caught = error
    assert caught is not None and freed.scope.cancel_called


@pytest.mark.parametrize("way", ["at once", "opened"])
async def test_what_is_wrong_with_a_message_is_not_lost_to_a_cancellation(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed, caught = CancelledWhileFreed(monkeypatch), None
    into = {"no such tensor": torch.zeros(3)}
    with freed.scope:
        try:
            if way == "at once":
                await aiotorchio.load_from_stream(Tap(encoded(SMALL), 1000), into=into)
            else:
                async with opened(encoded(SMALL)) as message:
                    await message.load(into=into)
        except MismatchError as error:
            caught = error
    assert caught is not None and freed.scope.cancel_called


async def test_an_error_behind_the_end_of_the_message_poisons_nothing() -> None:
    reader = StreamReader(Tap(encoded(CHUNKED) + encoded(SMALL)))
    with pytest.raises(ZeroDivisionError):
        async with reader.open() as message:
            await message.load()
            raise ZeroDivisionError
    assert_same(await reader.load(), SMALL)


async def test_damage_is_found_while_skipping_too() -> None:
    data = bytearray(encoded(CHUNKED, chunk_size=4096))
    data[20_000] ^= 1
    reader = StreamReader(Tap(bytes(data), 1000))
    with pytest.raises(ChecksumError):
        async with reader.open():
            pass
    with pytest.raises(StreamPoisoned, match="ChecksumError"):
        await reader.load()


async def test_a_message_that_ends_while_it_is_skipped() -> None:
    data = encoded(CHUNKED, chunk_size=4096)
    reader = StreamReader(Tap(data[:20_000], 1000))
    with pytest.raises(TruncatedError) as caught:
        async with reader.open():
            pass
    assert caught.value.offset == 20_000


@in_one_loop
async def test_a_sender_that_gives_up_in_an_open_message(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for _ in range(4):
                with pytest.raises(ZeroDivisionError):
                    await near.save(CHUNKED, chunk_size=4096, progress=failing(8192))
            await near.save(SMALL)

        group.start_soon(push)
        reader = StreamReader(far.source)
        async with reader.open() as message:
            with pytest.raises(RemoteAbort, match="in the middle"):
                await message.load()
            with pytest.raises((RuntimeError, AiotorchioError)):
                await message.skip()
        async with reader.open(unread="abort") as message:
            with pytest.raises(RemoteAbort, match="in the middle"):
                await all_of(message)
        with pytest.raises(RemoteAbort, match="in the middle"):
            async with reader.open():
                pass  # the message is skipped, and the skip finds the abort
        with pytest.raises(RemoteAbort, match="in the middle"):
            async with reader.open() as message:
                await message.skip()
        assert_same(await reader.load(), SMALL)


@pytest.mark.parametrize("took", [0, 1, 3])
async def test_skipping_by_hand(took: int) -> None:
    tap = Tap(encoded(ONE_EACH, chunk_size=4096) + encoded(SMALL))
    reader = StreamReader(tap)
    async with reader.open() as message:
        tensors = message.iterate()
        for _ in range(took):
            await anext(tensors)
        await message.skip()
        assert tap.taken == frame_ends(tap.data)[7]
        await message.skip()
        with pytest.raises(RuntimeError, match="read already"):
            await message.load()
        # Code that goes on after a skip gets no uninitialized memory.
        if took:
            with pytest.raises((RuntimeError, StopAsyncIteration)):
                await anext(tensors)
    assert_same(await reader.load(), SMALL)


async def test_a_skip_after_the_end() -> None:
    async with opened(encoded(CHUNKED)) as message:
        await message.load()
        await message.skip()


async def test_who_breaks_out_of_an_iteration_can_read_the_next_message() -> None:
    reader = StreamReader(Tap(encoded(ONE_EACH, chunk_size=4096) + encoded(SMALL), 1000))
    async with reader.open() as message:
        async for name, tensor in message:
            assert_same(tensor, ONE_EACH[name])
            if name == "b":
                break
    gc.collect()
    assert_same(await reader.load(), SMALL)


@pytest.mark.parametrize("first", ["load", "skip", "iterate"])
async def test_a_message_is_read_once(first: str) -> None:
    async with opened(encoded(SMALL)) as message:
        await ACTS[first](message)
        for second in (message.load, lambda: all_of(message), lambda: anext(aiter(message))):
            with pytest.raises(RuntimeError, match="read already"):
                await second()
        with pytest.raises(RuntimeError, match="read already"):
            await anyio.to_thread.run_sync(list, message.tensors_sync())


async def test_nothing_can_be_read_behind_the_block() -> None:
    reader = StreamReader(Tap(encoded(ONE_EACH, chunk_size=4096) + encoded(SMALL), 1000))
    async with reader.open() as untouched:
        pass
    assert list(untouched.tensors) == list(ONE_EACH)
    assert_same(await reader.load(), SMALL)
    reader = StreamReader(Tap(encoded(ONE_EACH, chunk_size=4096) + encoded(SMALL), 1000))
    async with reader.open() as message:
        tensors = message.iterate()
        await anext(tensors)
    for each in (untouched, message):
        for act in ACTS.values():
            with pytest.raises(RuntimeError, match=r"was left|read already"):
                await act(each)
        with pytest.raises(RuntimeError, match=r"was left|read already"):
            await anyio.to_thread.run_sync(list, each.tensors_sync())
    with pytest.raises(RuntimeError, match="was left"):
        await anext(tensors)
    assert_same(await reader.load(), SMALL)


ACTS: dict[str, Callable[[Message], Coroutine[Any, Any, Any]]] = {
    "load": Message.load,
    "skip": Message.skip,
    "iterate": all_of,
}


@pytest.mark.parametrize("first", ACTS)
async def test_one_call_at_a_time_reads_a_message(first: str) -> None:
    tap = Tap(encoded(CHUNKED, chunk_size=4096), stop=10_000)
    reader = StreamReader(tap)
    async with reader.open() as message, anyio.create_task_group() as group:
        group.start_soon(ACTS[first], message)
        await tap.stalled.wait()
        for second in ACTS.values():
            with pytest.raises(StreamBusy, match="reading this message"):
                await second(message)
        with pytest.raises(StreamBusy, match="another load"):
            await reader.load()
        group.cancel_scope.cancel()


async def test_a_message_that_is_left_while_another_task_reads_it() -> None:
    data = encoded(CHUNKED, chunk_size=4096) + encoded(SMALL)
    for unread in get_args(Unread):
        for stop in (10_000, frame_ends(data)[3]):
            tap = Tap(data, stop=stop)
            reader = StreamReader(tap)
            async with (
                anyio.create_task_group() as group,
                reader.open(unread=unread) as message,
            ):

                async def pull(message: Message = message) -> None:
                    with pytest.raises(RuntimeError, match="was left"):
                        await message.load()

                group.start_soon(pull)
                await tap.stalled.wait()
            with pytest.raises(StreamPoisoned):
                await reader.load()


async def test_nothing_more_comes_of_a_message_that_broke() -> None:
    data = encoded(ONE_EACH, chunk_size=4096)
    damaged = bytearray(data)
    damaged[frame_ends(data)[3] - 1] ^= 1

    async def broken(message: Message) -> None:
        with pytest.raises(ChecksumError):
            await all_of(message)

    async def stopped(message: Message) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(message.load)
            await all_blocked()
            group.cancel_scope.cancel()

    for act, tap in (
        (broken, Tap(bytes(damaged), 1000)),
        (stopped, Tap(data, stop=10_000)),
        (stopped, Tap(data, stop=frame_ends(data)[3])),
    ):
        reader = StreamReader(tap)
        async with reader.open() as message:
            await act(message)
            # The error is no ``StopIteration``, and does not look like the end of the message.
            with pytest.raises((RuntimeError, AiotorchioError)) as caught:
                await message.skip()
            assert "StopIteration" not in str(caught.value)
            with pytest.raises((RuntimeError, AiotorchioError)):
                await message.load()
            with pytest.raises((RuntimeError, AiotorchioError)):
                await all_of(message)
        with pytest.raises(StreamPoisoned):
            await reader.load()


async def test_what_does_not_fit_leaves_the_message_readable() -> None:
    destination = {"w": torch.zeros(3).long()}
    reader = StreamReader(Tap(encoded(CHUNKED) + encoded(SPARSE) + encoded(SMALL), 1000))
    async with reader.open() as message:
        acts: list[Callable[[], Awaitable[Any]]] = [
            lambda: message.load(into=destination),
            lambda: message.load(into=destination, staged=True, cast=True),
            lambda: message.load(into=aiotorchio.DoubleBuffer(destination)),
            lambda: message.load(select="x"),
            lambda: all_of(message, select=["w", "x"]),
            lambda: anyio.to_thread.run_sync(list, message.tensors_sync(select="x")),
        ]
        for act in acts:
            with pytest.raises(MismatchError):
                await act()
        with pytest.raises(aiotorchio.InvalidObjectError, match="location"):
            await message.load(map_location="cuda:99")
        with pytest.raises(TypeError, match="select"):
            await message.load(select=5)  # type: ignore[arg-type]
        assert_same(await message.load(), CHUNKED)
    assert_same(destination["w"], torch.zeros(3).long())
    async with reader.open() as message:
        with pytest.raises(MismatchError, match="'x'"):
            await all_of(message, select="x")
        assert_same(await message.load(), SPARSE)
    assert_same(await reader.load(), SMALL)


async def test_a_message_that_does_not_fit_is_skipped_like_any_other() -> None:
    reader = StreamReader(Tap(encoded(CHUNKED) + encoded(SMALL), 1000))
    async with reader.open() as message:
        with pytest.raises(MismatchError):
            await message.load(into={})
    assert_same(await reader.load(), SMALL)


async def test_the_options_of_a_load_hold_for_an_open_message() -> None:
    async with opened(encoded(CHUNKED)) as message:
        state = await message.load(map_location="meta")
        assert state["w"].device.type == "meta"
    reader = StreamReader(Tap(encoded(PICKLED) + encoded(SMALL), 1000))
    async with reader.open() as message:
        with pytest.raises(UnsafeObjectError, match="allow_pickle"):
            await message.load(allow_pickle=False)
        # The message is unused: the caller can load it with other options.
        assert_same(await message.load(), PICKLED)
    assert_same(await reader.load(), SMALL)
    async with opened(encoded(SMALL)) as message:
        with pytest.raises(TypeError, match="limits"):
            await message.load(limits=Limits())  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="into"):
            await message.load(staged=True)


class Unknown:
    """A class on no allowlist."""

    def __init__(self) -> None:
        self.weight = torch.arange(100_000)


@in_one_loop
async def test_a_message_that_was_refused_can_be_loaded_with_other_options(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for obj in (Unknown(), Unknown(), SMALL):
                await near.save(obj)

        group.start_soon(push)
        reader = StreamReader(far.source)
        for trusted in (True, False):
            async with reader.open() as message:
                with pytest.raises(UnsafeObjectError, match="Unknown"):
                    await message.load()
                assert await message.get_unsafe_globals() == ["tests.api.test_message.Unknown"]
                with pytest.raises(UnsafeObjectError, match="allow_pickle"):
                    await message.load(allow_pickle=False)
                if trusted:
                    loaded = await message.load(safe_globals=[Unknown])
                    assert_same(loaded.weight, Unknown().weight)
        assert_same(await reader.load(), SMALL)


# ------------------------------------------------------------------------------ iteration


@in_one_loop
async def test_every_tensor_comes_once_under_each_name(kind: str) -> None:
    state = mixed_state()
    expected = dict(walk(state))
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for chunk_size in (4096, 4096 + 64, 2**17, 2**22):
                await near.save(state, chunk_size=chunk_size)

        group.start_soon(push)
        reader = StreamReader(far.source)
        for _ in range(4):
            figures: list[tuple[int, int]] = []
            async with reader.open() as message:
                found = await all_of(message, progress=lambda *n, to=figures: to.append(n))
                assert list(found) == list(message.tensors) == list(expected)
                assert figures[-1] == (message.nbytes, message.nbytes)
            # The tensors share memory as before.
            assert_same(found, expected)


async def test_more_tensors_at_once_than_the_event_loop_builds() -> None:
    state = {f"{n}": torch.full((n % 40,), n) for n in range(1500)}
    async with opened(encoded(state)) as message:
        assert_same(await all_of(message), state)


async def test_a_tensor_comes_as_soon_as_its_chunk_is_in_and_not_later() -> None:
    tap = Tap(encoded(mixed_state(), chunk_size=4096))
    ends, header = frame_ends(tap.data), parse(tap.data).header
    expected: dict[str, int] = {}
    last = 0
    for row in header.header.tensors:
        if nbytes := header.layout.nbytes[row.storage]:
            last = -(-(header.layout.offsets[row.storage] + nbytes) // 4096)
        expected |= dict.fromkeys(row.names, ends[1 + last])
    came = {}
    async with StreamReader(tap).open() as message:
        async for name, _ in message:
            came[name] = tap.taken
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            assert tap.taken == came[name]
        assert tap.taken == len(tap.data)
    assert came == expected
    assert came["nothing"] == ends[1]


async def test_what_was_given_out_is_not_kept() -> None:
    state = {f"{n}": torch.full((2**20,), n, dtype=torch.uint8) for n in range(4)}
    for chunk_size in (2**16, 2**20, 2**22):
        assert not await anything_is_kept(encoded(state, chunk_size=chunk_size))


async def test_what_a_worker_thread_has_built_is_not_kept() -> None:
    state = {f"{n}": torch.full((2**16,), n, dtype=torch.uint8) for n in range(210)}
    assert not await anything_is_kept(encoded(state, chunk_size=2**24))


async def anything_is_kept(data: bytes) -> bool:
    """Whether the memory of any tensor lives on when the consumer has dropped it."""
    async with StreamReader(Tap(data, 2**20)).open() as message:
        async for _, tensor in message:
            memory = ref(tensor.untyped_storage())
            del tensor
            if await lives_on(memory):
                return True
    return False


async def lives_on(memory: ref[torch.UntypedStorage]) -> bool:
    # A worker thread, or trio itself, may keep a result for another turn.
    with anyio.move_on_after(patience(1)):
        await until(lambda: memory() is None)
    return memory() is not None


async def test_small_tensors_share_memory() -> None:
    state = {f"{n}": torch.full((100,), n, dtype=torch.uint8) for n in range(10)}
    async with opened(encoded(state)) as message:
        found = await all_of(message)
    addresses = [tensor.data_ptr() for tensor in found.values()]
    assert addresses == [addresses[0] + 128 * n for n in range(10)]
    found["3"].fill_(9)
    assert found["4"].eq(4).all() and found["2"].eq(2).all()
    with pytest.raises(RuntimeError, match="not resizable"):
        found["3"].resize_(1000)


SELECTIONS: list[tuple[Any, list[str]]] = [
    ("few", ["few"]),
    (["last", "few"], ["few", "last"]),
    ("views.*", ["views.head", "views.tail"]),
    (["tied.1"], ["tied.1"]),
    (lambda name: name.startswith("more."), [f"more.{n}" for n in range(9)]),
    (lambda name: False, []),
    ("*", list(dict(walk(mixed_state())))),
]


@pytest.mark.parametrize(("select", "names"), SELECTIONS)
async def test_selected_tensors(select: Any, names: list[str]) -> None:
    state = mixed_state()
    async with opened(encoded(state, chunk_size=4096), encoded(SMALL)) as message:
        found = await all_of(message, select=select)
    assert list(found) == names
    assert_same(found, {name: tensor for name, tensor in walk(state) if name in names})


async def test_tensors_that_are_not_selected_take_no_memory() -> None:
    state = {f"{n}": torch.full((2**20,), n, dtype=torch.uint8) for n in range(4)}
    data = encoded(state, chunk_size=2**16)
    made: list[int] = []
    storage_of = IncomingPayload._storage_of
    with pytest.MonkeyPatch.context() as patch:

        def noting(self: IncomingPayload, region: Any) -> torch.UntypedStorage:
            made.extend([] if region.storage else region.rows)
            return storage_of(self, region)

        patch.setattr(IncomingPayload, "_storage_of", noting)
        async with opened(data) as message:
            assert list(await all_of(message, select="2")) == ["2"]
    assert made == [2]


async def test_tensors_without_names_are_left_out_if_asked_for() -> None:
    obj = [[TIED], torch.nn.Linear(2, 2)]
    async with opened(encoded(obj)) as message:
        assert message.codec == "pickle" and message.unnamed == 2
        found = await all_of(message, select="*")
    assert_same(found, {"0.0": TIED})


def tensors_with_attributes() -> dict[str, Any]:
    state: dict[str, Any] = {"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2))}
    for tensor in state.values():
        tensor.was_cloned = True
    return state | {"tagged": torch.ones(4).as_subclass(Tagged), "mean": torch.zeros(2)}


async def test_tensors_with_attributes_have_names() -> None:
    state = tensors_with_attributes()
    async with opened(encoded(state)) as message:
        assert message.unnamed == 0
        assert message.tensors == {name: TensorSpec.of(each) for name, each in state.items()}
        found = await all_of(message)
    assert type(found["a"]) is type(found["tagged"]) is torch.Tensor
    assert type(found["b"]) is torch.nn.Parameter and found["b"].requires_grad
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].as_subclass(torch.Tensor)) for name in state)


async def test_names_in_mappings_that_are_not_dicts() -> None:
    """Names go through any mapping, even one whose class would not be built."""
    state = {"user": UserDict({"w": torch.ones(2)}), "chain": ChainMap({"a": [torch.zeros(3)]})}
    async with opened(encoded(state)) as message:
        assert message.tensors.keys() == {"user.w", "chain.a.0"} and not message.unnamed
        assert_same(await all_of(message), dict(walk(state)))


QUANTIZED = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
UNNAMED: list[tuple[Any, int]] = [
    ({"storage": torch.ones(2).untyped_storage()}, 1),
    ({"module": torch.nn.Linear(2, 2), "w": torch.ones(2)}, 2),
]


@pytest.mark.parametrize(("obj", "count"), UNNAMED)
async def test_what_has_no_name_never_ends_an_iteration_in_silence(obj: Any, count: int) -> None:
    async with opened(encoded(obj)) as message:
        assert message.unnamed == count
        with pytest.raises(MismatchError, match=f"{count} tensors or .* have no name"):
            await all_of(message)
        with pytest.raises(MismatchError, match="no name"):
            await anyio.to_thread.run_sync(list, message.tensors_sync())
        found = await all_of(message, select=lambda name: True)
        assert list(found) == [name for name in obj if name == "w"]


async def test_a_destination_of_what_has_no_name_is_not_called_missing() -> None:
    obj, into = {"q": QUANTIZED, "w": torch.ones(2)}, {"q": torch.zeros(3), "w": torch.zeros(2)}
    async with opened(encoded(obj)) as message:
        with pytest.raises(MismatchError, match="no tensor of this name: q") as caught:
            await message.load(into=into)
        assert "1 tensors or parts of tensors in the message have no name" in str(caught.value)
        assert "not in the message" not in str(caught.value)
        assert (await message.load())["q"].is_quantized


async def test_map_location() -> None:
    state = mixed_state()
    data, meta = encoded(state, chunk_size=4096), torch.device("meta")
    for map_location in ("meta", meta, {"cpu": "meta"}):
        async with opened(data) as message:
            found = await all_of(message, map_location=map_location)
        assert list(found) == list(dict(walk(state)))
        assert all(tensor.device == meta for tensor in found.values())
        assert found["views.tail"].stride() == (1, 10)
    for nowhere in ({"cuda:0": "meta"}, "cpu", lambda storage, tag: None):
        async with opened(data) as message:
            assert_same(await all_of(message, map_location=nowhere), dict(walk(state)))


async def test_a_function_as_map_location() -> None:
    state, seen = {"a": torch.arange(2048), "b": torch.ones(3)}, []

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        seen.append((storage.nbytes(), tag))
        return torch.UntypedStorage(bytes(storage.nbytes()))

    async with opened(encoded(state, chunk_size=4096)) as message:
        tensors = message.iterate(map_location=place)
        assert_same((await anext(tensors))[1], torch.zeros(2048).long())
        # Storages are placed one after the other, as they arrive.
        assert seen == [(16384, "cpu")]
        assert_same([tensor async for _, tensor in tensors], [torch.zeros(3)])
    assert seen == [(16384, "cpu"), (12, "cpu")]

    def fails(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        raise ZeroDivisionError

    reader = StreamReader(Tap(encoded(state), 1000))
    async with reader.open() as message:
        with pytest.raises(ZeroDivisionError):
            await all_of(message, map_location=fails)
    with pytest.raises(StreamPoisoned):
        await reader.load()


async def test_tensors_on_meta_stay_there() -> None:
    state = {"m": torch.empty(2**40, device="meta"), "w": torch.ones(2)}
    limits = Limits(total_nbytes=2**50)
    async with StreamReader(Tap(encoded(state), 1000)).open(limits=limits) as message:
        assert message.nbytes == 8
        assert message.tensors["m"].nbytes == 2**42
        assert_same(await all_of(message), state)


async def test_numbers_in_the_byte_order_of_the_sender() -> None:
    tensors = [torch.arange(1000), torch.tensor([1.5, -2.0]), torch.rand(3, dtype=torch.complex64)]
    shown, other = [*tensors, tensors[0][1::2]], "big" if sys.byteorder == "little" else "little"

    def foreign(header: Any) -> None:
        header.byteorder = other

    data = craft.message(b"", "pickle", shown, foreign)
    async with opened(data) as message:
        found = await all_of(message)
    for tensor in tensors:
        swap_bytes(tensor.untyped_storage(), 8 if tensor.dtype == torch.int64 else 4)
    assert_same([found[f"{n}"] for n in range(4)], shown)


async def test_a_pickle_is_not_looked_at() -> None:
    tensors = [torch.arange(2), torch.ones(3)]
    hostile = craft.pickled(craft.call("os", "getpid"))
    for skeleton in (hostile, b"garbage", b""):
        data = craft.message(skeleton, "pickle", tensors)
        async with opened(data) as message:
            assert message.codec == "pickle"
            assert_same(await all_of(message), {"0": tensors[0], "1": tensors[1]})
        async with opened(data) as message:
            assert_same(await all_of(message, select="1"), {"1": tensors[1]})


async def test_iterating_over_a_damaged_tree_fails_before_the_payload() -> None:
    data = craft.message(b"garbage", "tree", [torch.arange(2)])
    tap = Tap(data)
    async with StreamReader(tap).open() as message:
        with pytest.raises(ProtocolError, match="not one MessagePack value"):
            await all_of(message)
        assert tap.taken == frame_ends(data)[1]


LIES = {
    "swapped": [["b", "c"], ["a"]],
    "missing": [["a"], ["b"]],
    "foreign": [["a", "x"], ["b"]],
    "one too many": [["a", "c", "x"], ["b"]],
    "repeated": [["a", "a"], ["b"]],
    "twice more": [["a", "c"], ["b", "b"]],
}
USES: dict[str, Callable[[Message, torch.Tensor], Awaitable[Any]]] = {
    "iterate": lambda message, _: all_of(message),
    "iterate over some": lambda message, _: all_of(message, select=lambda name: name == "b"),
    "select": lambda message, _: message.load(select=lambda name: name == "b"),
    "into": lambda message, b: message.load(into={"b": b}, strict=False),
    "staged": lambda message, b: message.load(into={"b": b}, strict=False, staged=True),
    "in a thread": lambda message, _: anyio.to_thread.run_sync(list, message.tensors_sync()),
}


def lying(names: list[list[str]]) -> tuple[dict[str, torch.Tensor], bytes]:
    a, b = torch.full((3000,), 1), torch.full((3000,), 2)
    obj = {"a": a, "b": b, "c": a}
    parts = craft.flattened(obj)
    assert [row.names for row in parts.header.tensors] == [["a", "c"], ["b"]]
    for row, lie in zip(parts.header.tensors, names, strict=True):
        row.names[:] = lie
    return obj, craft.compose(parts)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("lie", LIES)
async def test_a_header_that_lies_about_names_is_found_out_before_the_payload(
    lie: str, use: str
) -> None:
    _, data = lying(LIES[lie])
    tap, destination = Tap(data), torch.zeros(3000).long()
    reader = StreamReader(tap)
    async with reader.open() as message:
        with pytest.raises(ProtocolError, match=r"name") as caught:
            await USES[use](message, destination)
        assert tap.taken == frame_ends(data)[1]
        # The skeleton contradicts the header.
        assert caught.value.offset == frame_ends(data)[0] + FRAME_HEAD_SIZE
    assert_same(destination, torch.zeros(3000).long())
    with pytest.raises(StreamPoisoned):
        await reader.load()


@pytest.mark.parametrize("lie", LIES)
async def test_who_does_not_go_by_names_ignores_them(lie: str) -> None:
    obj, data = lying(LIES[lie])
    async with opened(data) as message:
        assert_same(await message.load(), obj)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("codec", ["tree", "pickle"])
async def test_one_name_for_two_tensors_in_a_forged_header(use: str, codec: str) -> None:
    parts = craft.flattened({"a": torch.full((3000,), 1), "b": torch.full((3000,), 2)})
    parts.header.tensors[0].names[:] = ["b"]
    parts.header.codec = codec  # type: ignore[assignment]
    destination = torch.zeros(3000).long()
    async with opened(craft.compose(parts)) as message:
        with pytest.raises(MismatchError, match="same name"):
            await USES[use](message, destination)
        await message.skip()
    assert_same(destination, torch.zeros(3000).long())


@pytest.mark.parametrize("chunk", [0, 1, 3, 4])
async def test_damage_in_a_chunk(chunk: int) -> None:
    data = bytearray(encoded(ONE_EACH, chunk_size=4096))
    data[frame_ends(bytes(data))[2 + chunk] - 100] ^= 1
    found: dict[str, torch.Tensor] = {}
    reader = StreamReader(Tap(bytes(data), 1000))
    async with reader.open() as message:
        with pytest.raises(ChecksumError, match=f"chunk {chunk}"):
            async for pair in message:
                found |= [pair]
    # The tensors before it are intact.
    assert_same(found, {name: ONE_EACH[name] for name in list(ONE_EACH)[:chunk]})
    with pytest.raises(StreamPoisoned):
        await reader.load()


async def test_a_damaged_end_is_found_behind_the_last_tensor() -> None:
    data = encoded(ONE_EACH, chunk_size=4096)
    damaged = bytearray(data)
    damaged[-1] ^= 1
    # An end frame that is intact, but belongs to other frames.
    identity, start = parse(data).header.message_id, frame_ends(data)[-2]
    foreign = data[:start] + frame(identity, END, bytes(8), number=5, offset=5 * 4096)
    for wrong, lives_on in ((bytes(damaged), False), (foreign, True)):
        reader = StreamReader(Tap(wrong + encoded(SMALL), 1000))
        found: dict[str, torch.Tensor] = {}
        async with reader.open() as message:
            with pytest.raises(ChecksumError):
                async for pair in message:
                    found |= [pair]
        assert_same(found, ONE_EACH)
        if lives_on:
            assert_same(await reader.load(), SMALL)
        else:
            with pytest.raises(StreamPoisoned):
                await reader.load()


async def test_cut_at_every_byte() -> None:
    data = encoded({"w": torch.arange(2), "b": torch.ones(1)})
    for cut in range(len(data)):
        found = []
        with pytest.raises(TruncatedError) as caught:
            async with StreamReader(Tap(data[:cut], 50)).open() as message:
                async for name, _ in message:
                    found.append(name)
        assert caught.value.offset == cut
        assert found == (["w", "b"] if cut >= frame_ends(data)[2] else [])


async def pull(source: Any, expected: dict[str, torch.Tensor]) -> None:
    async with StreamReader(source).open() as message:
        assert_same(await all_of(message), expected)


@in_one_loop
async def test_an_iteration_cancelled_anywhere(kind: str) -> None:
    obj = cancellable(kind)
    data = encoded(obj, chunk_size=2**20 if "tls" in kind else 2**18)
    cuts = [0, 10, *(end - back for end in frame_ends(data) for back in (5, 0))]
    outcomes, open_descriptors = [], []
    tasks = len(anyio.get_running_tasks())
    for count in range(1, 1000):
        hurry = anyio.Event()

        async def push(end: End, hurry: anyio.Event = hurry) -> None:
            for start, stop in itertools.pairwise(cuts):
                for _ in range(10):
                    if not hurry.is_set():
                        await anyio.lowlevel.checkpoint()
                with suppress_broken():
                    await end.send(data[start:stop])

        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(push, near)
            try:
                await cancelled_at(count, pull(far.source, obj))
            except CancelledAt:
                hurry.set()
                try:
                    await pull(far.source, obj)
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
    assert outcomes == sorted(outcomes, key=["clean", "poisoned", "done"].index)
    assert set(outcomes) == {"clean", "poisoned", "done"}
    assert max(open_descriptors[1:]) <= max(open_descriptors[0], open_descriptors[1])


@in_one_loop
async def test_leaving_cancelled_while_the_rest_is_skipped(kind: str) -> None:
    data = encoded(CHUNKED, chunk_size=4096)
    async with both_ends(kind) as (near, far):
        await near.send(data[:10_000])
        async with anyio.create_task_group() as group:

            async def leave() -> None:
                async with StreamReader(far.source).open():
                    pass

            group.start_soon(leave)
            await all_blocked()
            group.cancel_scope.cancel()
        with pytest.raises(StreamPoisoned, match="Cancelled"):
            await far.load()


# ------------------------------------------------------------------------------ worker threads

Run = Callable[..., Coroutine[Any, Any, Any]]
THREADS = [
    pytest.param(backend, run, id=f"{name}-{label}")
    for name, backend in ANYIO_BACKENDS.items()
    for label, run in (("anyio", anyio.to_thread.run_sync), ("asyncio", asyncio.to_thread))
    if (name, label) != ("trio", "asyncio")
]
in_threads = pytest.mark.parametrize(("anyio_backend", "run"), THREADS)


class Consumer:
    """The blocking loader of a model, in a thread."""

    def __init__(self, message: Message, **options: Any) -> None:
        self.tensors = message.tensors_sync(**options)
        self.found: dict[str, torch.Tensor] = {}
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.found |= self.tensors
        except BaseException as error:
            self.error = error
            raise


@in_threads
async def test_tensors_for_a_blocking_consumer(run: Run) -> None:
    state = mixed_state()
    reader = StreamReader(Tap(encoded(state, chunk_size=4096) * 2 + encoded(SMALL), 1000))
    async with reader.open() as message:
        await run(consumer := Consumer(message))
        assert_same(consumer.found, dict(walk(state)))
    async with reader.open() as message:
        await run(consumer := Consumer(message, select="tied.*", map_location="meta"))
        assert {name: t.device.type for name, t in consumer.found.items()} == {
            "tied.0": "meta",
            "tied.1": "meta",
        }
    assert_same(await reader.load(), SMALL)


@in_threads
async def test_the_event_loop_goes_on_while_a_thread_waits(run: Run) -> None:
    async with both_ends("socket") as (near, far), anyio.create_task_group() as group:
        data = encoded(ONE_EACH, chunk_size=4096)
        await near.send(data[:10_000])
        async with StreamReader(far.source).open() as message:
            consumer = Consumer(message)
            group.start_soon(run, consumer)
            await until(lambda: len(consumer.found) == 0 and message._running is not None)
            # Both ends run on this loop: it must go on to send the rest.
            await near.send(data[10_000:])
            await until(lambda: message._incoming.ended)
        assert_same(consumer.found, ONE_EACH)


@in_threads
async def test_errors_come_out_in_the_thread(run: Run) -> None:
    data = bytearray(encoded(ONE_EACH, chunk_size=4096))
    damaged = bytearray(data)
    damaged[frame_ends(bytes(data))[4] - 1] ^= 1
    for bad, error, count in (
        (damaged, ChecksumError, 2),
        (data[: frame_ends(bytes(data))[3] - 1], TruncatedError, 1),
    ):
        async with opened(bytes(bad)) as message:
            seen: list[str] = []

            def consume(message: Message = message, seen: list[str] = seen) -> None:
                for name, _ in message.tensors_sync():
                    seen.append(name)

            with pytest.raises(error):
                await run(consume)
            assert len(seen) == count
    async with opened(encoded(SMALL)) as message:
        with pytest.raises(MismatchError):
            await run(Consumer(message, select="x"))
        assert_same(await message.load(), SMALL)


async def test_the_thread_of_the_event_loop_cannot_wait_for_it() -> None:
    async with opened(encoded(SMALL)) as message:
        with pytest.raises(RuntimeError, match="in its thread"):
            next(message.tensors_sync())
        tensors = message.tensors_sync()
        await anyio.to_thread.run_sync(next, tensors)
        with pytest.raises(RuntimeError, match="in its thread"):
            next(tensors)


@in_threads
async def test_a_thread_that_stops_early(run: Run) -> None:
    reader = StreamReader(Tap(encoded(ONE_EACH, chunk_size=4096) + encoded(SMALL), 1000))

    def consume(message: Message) -> None:
        for name, tensor in message.tensors_sync():
            assert_same(tensor, ONE_EACH[name])
            if name == "b":
                return

    async with reader.open() as message:
        await run(consume, message)
    gc.collect()
    assert_same(await reader.load(), SMALL)


@in_threads
async def test_a_thread_whose_message_was_left(run: Run) -> None:
    async with opened(encoded(ONE_EACH, chunk_size=4096)) as message:
        tensors = message.tensors_sync()
        await run(next, tensors)
    with pytest.raises(RuntimeError, match="was left"):
        await run(next, tensors)


@in_threads
async def test_what_a_thread_gave_away_is_not_kept(run: Run) -> None:
    state = {f"{n}": torch.full((2**18,), n, dtype=torch.uint8) for n in range(4)}
    token = anyio.lowlevel.current_token()

    def anything_is_kept(message: Message) -> bool:
        for _, tensor in message.tensors_sync():
            memory = ref(tensor.untyped_storage())
            del tensor
            if anyio.from_thread.run(lives_on, memory, token=token):
                return True
        return False

    async with opened(encoded(state, chunk_size=2**16)) as message:
        assert not await run(anything_is_kept, message)


class Stalled:
    """A task that waits for a thread, which waits for bytes that never arrive."""

    def __init__(self, run: Run) -> None:
        data = encoded(ONE_EACH, chunk_size=4096)
        self.tap = Tap(data, 100, stop=frame_ends(data)[3] + 100)
        self.reader = StreamReader(self.tap)
        self.left = anyio.Event()
        self.consumer: Consumer
        self._run = run

    async def work(self) -> None:
        try:
            async with self.reader.open() as message:
                self.consumer = Consumer(message)
                await self._run(self.consumer)
        finally:
            self.left.set()

    async def error(self) -> BaseException | None:
        """The error of the thread after the end of the task."""
        with anyio.move_on_after(PATIENCE / 6):
            await until(lambda: self.left.is_set() and self.consumer.error is not None)
        # If the thread has no error by now, only the end of its bytes can end it.
        self.tap.resumed.set()
        await until(lambda: self.consumer.error is not None)
        return self.consumer.error


@in_threads
async def test_a_cancelled_task_is_not_held_up_by_its_thread(run: Run) -> None:
    stalled, scope = Stalled(run), anyio.CancelScope()

    async def work() -> None:
        with scope:
            await stalled.work()

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await stalled.tap.stalled.wait()
        scope.cancel()
        error = await stalled.error()
    assert scope.cancelled_caught
    assert not isinstance(error, AiotorchioError)
    with pytest.raises(StreamPoisoned):
        await stalled.reader.load()


@pytest.mark.parametrize(
    ("anyio_backend", "run"), [case for case in THREADS if case.id != "trio-anyio"]
)
async def test_a_task_cancelled_by_asyncio_is_not_held_up_by_its_thread(run: Run) -> None:
    stalled = Stalled(run)
    task = asyncio.create_task(stalled.work())
    await stalled.tap.stalled.wait()
    task.cancel()
    error = await stalled.error()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(error, RuntimeError) and "was left" in str(error)
    with pytest.raises(StreamPoisoned):
        await stalled.reader.load()


async def generated(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_a_message_of_an_async_generator() -> None:
    async with aclosing(generated(encoded(CHUNKED) + encoded(SMALL))) as pieces:  # type: ignore[type-var]
        reader = StreamReader(pieces)
        async with reader.open() as message:
            assert_same(await all_of(message), CHUNKED)
        assert_same(await reader.load(), SMALL)
