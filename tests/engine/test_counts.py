"""Counts on which speed rests: copies, system calls, work for each tensor, waiting bytes.

Benchmarks measure times; these tests show growth of the counts.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import socket
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aiotorchio
from aiotorchio.streams.base import PIECE_SIZE
from tests.support.backends import IN_ONE_LOOP, AsyncioEnd, all_blocked, both_ends

MIB = 2**20
# Four and a half chunks, each with parts of several storages.
LARGE = {f"layer.{n}": torch.full((3 * MIB // 4,), float(n)) for n in range(6)}
LARGE_NBYTES = 18 * MIB


def message(obj: object) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file)
    return file.getvalue()


# ---------------------------------------------------------------- copies, and system calls


class Tireless(socket.socket):
    """A fake socket that sends and receives all bytes of a call at once, and counts the calls.

    Attributes:
        calls: The system calls of a real socket.
        addresses: Address and size of each writable buffer.
        data: The bytes to receive.
    """

    def __init__(self, data: bytes = b"") -> None:
        near, self._far = socket.socketpair()
        super().__init__(near.family, near.type, fileno=near.detach())
        self.setblocking(False)
        # Event loops find the socket ready to read.
        self._far.send(b"!")
        self.calls = 0
        self.addresses: list[tuple[int, int]] = []
        self.data = memoryview(data)

    def close(self) -> None:
        super().close()
        self._far.close()

    def _note(self, buffer: Any) -> None:
        view = memoryview(buffer)
        if not view.readonly:
            first = ctypes.c_char.from_buffer(view)
            self.addresses.append((ctypes.addressof(first), len(view)))

    def sendmsg(self, buffers: Any, *_: Any) -> int:
        self.calls += 1
        for buffer in buffers:
            self._note(buffer)
        return sum(map(len, buffers))

    def recv_into(self, buffer: Any, *_: Any) -> int:
        taken: int = self.recvmsg_into([buffer])[0]
        return taken

    def recvmsg_into(self, buffers: Any, *_: Any) -> Any:
        self.calls += 1
        taken = 0
        for buffer in buffers:
            self._note(buffer)
            count = min(len(buffer), len(self.data))
            buffer[:count] = self.data[:count]
            self.data = self.data[count:]
            taken += count
        return taken, [], 0, None


def bytes_within(state: dict[str, torch.Tensor], addresses: Sequence[tuple[int, int]]) -> int:
    """Count the bytes that were in the memory of the tensors themselves."""
    ranges = [(tensor.data_ptr(), tensor.nbytes) for tensor in state.values()]
    return sum(
        size
        for start, size in addresses
        if any(first <= start and start + size <= first + nbytes for first, nbytes in ranges)
    )


@pytest.mark.anyio
async def test_sockets_send_from_the_tensors_themselves() -> None:
    with Tireless() as sock:
        await aiotorchio.save_to_stream(LARGE, sock)
        assert bytes_within(LARGE, sock.addresses) == LARGE_NBYTES
        # The head of each chunk, and two turns; the last of them carries the next head, too.
        assert sock.calls <= 5 * 3 + 2


@pytest.mark.anyio
async def test_sockets_receive_into_the_tensors_themselves() -> None:
    with Tireless(message(LARGE)) as sock:
        state = await aiotorchio.load_from_stream(sock)
        assert bytes_within(state, sock.addresses) == LARGE_NBYTES
        # Magic, preface, two heads and their bodies, and the end; then the chunks as in a save.
        assert sock.calls <= 8 + 5 * 3
        assert all(torch.equal(state[name], LARGE[name]) for name in LARGE)


@pytest.mark.anyio
async def test_small_tensors_take_no_more_system_calls() -> None:
    small = {f"layer.{n}": torch.full((1024,), float(n)) for n in range(2048)}
    with Tireless() as sock:
        await aiotorchio.save_to_stream(small, sock)
        assert sock.calls <= 2 * 3 + 2
    with Tireless(message(small)) as sock:
        assert len(await aiotorchio.load_from_stream(sock)) == len(small)
        assert sock.calls <= 10 + 2 * 3


def test_blocking_sockets_send_from_and_receive_into_the_tensors_themselves() -> None:
    class Blocking(Tireless):
        def getblocking(self) -> bool:
            return True

        def gettimeout(self) -> None:
            return None

        def send(self, data: Any, *_: Any) -> int:
            return self.sendmsg([data])

    with Blocking() as sock:
        aiotorchio.save(LARGE, sock)
        assert bytes_within(LARGE, sock.addresses) == LARGE_NBYTES
    with Blocking(message(LARGE)) as sock:
        state = aiotorchio.load(sock)
        assert bytes_within(state, sock.addresses) == LARGE_NBYTES


# Bytes of a message of 18 MiB that may wait. Transports read 256 KiB at a time, and TLS has
# internal buffers; anyio reads all bytes from a transport that uvloop delivers in one turn.
HELD_MAX = {"streams": MIB, "socket": MIB // 4, "streams-tls": 3 * MIB}


@pytest.mark.anyio
@pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)
async def test_bytes_of_python_hold_pieces_only(kind: str) -> None:
    """The memory of tensors is torch's: Python's memory shows copies on the way, at both ends."""
    async with both_ends(kind) as (near, far):
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            async with anyio.create_task_group() as group:
                group.start_soon(near.save, LARGE)
                state = await far.load()
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most - before <= HELD_MAX.get(kind, LARGE_NBYTES // 2)
    assert all(torch.equal(state[name], LARGE[name]) for name in LARGE)


# ---------------------------------------------------------------- bytes that wait


@pytest.mark.parametrize("kind", ["streams", "streams-tls"])
def test_a_transport_is_given_no_more_than_a_piece(kind: str) -> None:
    """A peer that reads nothing fills only the system's buffers."""

    async def main() -> int:
        async with both_ends(kind) as (near, far):
            assert isinstance(near, AsyncioEnd) and isinstance(far, AsyncioEnd)
            far.source._transport.pause_reading()
            saving = asyncio.ensure_future(near.save(LARGE))
            await all_blocked()
            assert not saving.done()
            waiting: int = near.sink.transport.get_write_buffer_size()
            saving.cancel()
            await asyncio.wait([saving])
            return waiting

    assert asyncio.run(main()) <= 2 * PIECE_SIZE


@pytest.mark.parametrize("kind", ["streams", "streams-tls"])
def test_a_reader_buffers_no_more_than_its_limit(kind: str) -> None:
    """Bytes that were not requested yet stay at the sender."""

    async def main() -> int:
        async with both_ends(kind) as (near, far):
            assert isinstance(far, AsyncioEnd)
            saving = asyncio.ensure_future(near.save(LARGE))
            reader = aiotorchio.StreamReader(far.source)
            async with reader.open() as opened:
                await all_blocked()
                assert not saving.done()
                waiting = len(far.source._buffer)
                assert opened.nbytes == LARGE_NBYTES
                await opened.load()
            await saving
            return waiting

    # A transport stops at twice the limit, which is 64 KiB, plus its last read.
    assert asyncio.run(main()) <= 2 * 2**16 + PIECE_SIZE


# ---------------------------------------------------------------- work for each tensor


def many(count: int) -> dict[str, torch.Tensor]:
    return {f"layer.{n}": torch.full((16,), float(n)) for n in range(count)}


class Counted(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))


def test_operations_of_torch_for_each_tensor() -> None:
    state = many(100)
    with Counted() as saving:
        data = message(state)
    assert saving.operations == 0
    with Counted() as loading:
        aiotorchio.load(io.BytesIO(data))
    # Each tensor is made, and put over its storage; one more operation makes their prototype.
    assert loading.operations <= 2 * len(state) + 1


def calls(work: Callable[[], object]) -> int:
    """Count calls of functions, in Python and in C."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    work()  # work that is done once
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def calls_for_each(work: Callable[[dict[str, torch.Tensor]], Callable[[], object]]) -> float:
    few, more = many(1000), many(3000)
    return (calls(work(more)) - calls(work(few))) / (len(more) - len(few))


def test_calls_for_each_tensor_that_is_saved() -> None:
    # 42 were counted, on Python 3.11.
    assert calls_for_each(lambda state: lambda: message(state)) <= 45


def test_calls_for_each_tensor_that_is_loaded() -> None:
    def load(state: dict[str, torch.Tensor]) -> Callable[[], object]:
        data = message(state)
        return lambda: aiotorchio.load(io.BytesIO(data))

    # 35 were counted, on Python 3.11.
    assert calls_for_each(load) <= 38


def test_blocks_of_memory_for_each_tensor_that_is_loaded() -> None:
    def blocks(count: int) -> int:
        data = message(many(count))
        before = sys.getallocatedblocks()
        state = aiotorchio.load(io.BytesIO(data))
        made = sys.getallocatedblocks() - before
        assert len(state) == count
        return made

    blocks(10)
    # The name, the tensor, and its storage.
    assert (blocks(3000) - blocks(1000)) / 2000 <= 4


def test_nothing_is_kept_of_a_state_that_was_saved() -> None:
    state = many(1000)
    message(state)
    before = sys.getallocatedblocks()
    message(state)
    assert sys.getallocatedblocks() - before < 100
