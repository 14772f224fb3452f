"""State on a device passes through two slabs; without a device, a copier of our own stands in."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.drive import Request, drive, drive_blocking
from aiotorchio.graph.flatten import flatten
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.memory.staging import DeviceCopier, Slabs, bytes_of
from aiotorchio.options import load_options
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.iterables import IterableSource
from aiotorchio.transfer.plan import Placement
from aiotorchio.transfer.receive import receive_message
from aiotorchio.transfer.send import prepare, send_message
from aiotorchio.wire.limits import Limits
from tests.memory.layouts import CopierOnCpu, staged

CHUNK = 4096
STATE = {"a": torch.arange(5000.0), "b": torch.ones(3), "c": torch.arange(20_000)}

cuda = pytest.mark.cuda
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def staged_outgoing(copier: Any) -> Callable[..., OutgoingPayload]:
    def make(*args: Any, **options: Any) -> OutgoingPayload:
        return OutgoingPayload(*args, **options | {"copier": copier, "staged": staged})

    return make


def staged_placement(copier: Any) -> Callable[..., Placement]:
    """Takes the CPU for a device."""
    incoming = functools.partial(IncomingPayload, staged=staged)
    return functools.partial(Placement, copier=copier, incoming=incoming)


def message_of(copier: Any) -> Generator[Request, Any, aiotorchio.Summary]:
    return send_message(
        lambda: prepare(
            flatten(STATE, chunk_size=CHUNK, metadata={}, producer="tests"),
            lambda: copier,
            outgoing=staged_outgoing(copier),
        ),
        inline=True,
        checksum=True,
    )


def sent(copier: Any) -> bytes:
    file = io.BytesIO()
    drive_blocking(message_of(copier), BlockingStream(file))
    return file.getvalue()


async def pieces(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def assert_state(loaded: Any) -> None:
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)


def test_sending_takes_two_slabs_of_one_chunk() -> None:
    copier = CopierOnCpu()
    assert_state(aiotorchio.load(io.BytesIO(sent(copier))))
    assert [slab.nbytes() for slab in copier.slabs] == [CHUNK, CHUNK]


def test_receiving_takes_two_slabs_of_one_chunk() -> None:
    copier = CopierOnCpu()
    message = receive_message(Limits(), load_options(), staged_placement(copier))
    loaded = drive_blocking(message, BlockingStream(io.BytesIO(sent(CopierOnCpu()))))
    assert_state(loaded.obj)
    assert [slab.nbytes() for slab in copier.slabs] == [CHUNK, CHUNK]


@pytest.mark.anyio
async def test_copies_run_in_worker_threads() -> None:
    class Watching(CopierOnCpu):
        def __init__(self) -> None:
            super().__init__()
            self.threads: set[int] = set()

        def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            self.threads.add(threading.get_ident())
            super().copy(destination, source)

    copier = Watching()
    message = receive_message(Limits(), load_options(), staged_placement(copier))
    async with aclosing(pieces(sent(CopierOnCpu()))) as body:
        assert_state((await drive(message, IterableSource(body))).obj)
    assert threading.get_ident() not in copier.threads


@pytest.mark.anyio
async def test_a_copy_that_fails_is_the_error_of_the_load() -> None:
    class Failing(CopierOnCpu):
        def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            raise RuntimeError("device lost")

    message = receive_message(Limits(), load_options(), staged_placement(Failing()))
    async with aclosing(pieces(sent(CopierOnCpu()))) as body:
        with pytest.raises(RuntimeError, match="device lost"):
            await drive(message, IterableSource(body))


def test_a_copy_that_fails_in_the_middle_aborts_the_message() -> None:
    class Failing(CopierOnCpu):
        def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            if self.copied > 3 * CHUNK:
                raise RuntimeError("device lost")
            super().copy(destination, source)

    file = io.BytesIO()
    message = message_of(Failing())
    with pytest.raises(RuntimeError, match="device lost"):
        drive_blocking(message, BlockingStream(file))
    with pytest.raises(aiotorchio.RemoteAbort, match="RuntimeError: device lost"):
        aiotorchio.load(io.BytesIO(file.getvalue()))


def test_slabs_take_turns() -> None:
    slabs = Slabs(64, CopierOnCpu())
    first, second, third, fourth = (slabs.take()[0].data_ptr() for _ in range(4))
    assert first == third != second == fourth


def test_the_copier_of_the_library_copies_on_the_cpu() -> None:
    copier = DeviceCopier()
    slab = copier.slab(8)
    copier.copy(bytes_of(slab), torch.arange(8, dtype=torch.uint8))
    assert bytes_of(slab).tolist() == list(range(8))


@cuda
@needs_cuda
def test_state_goes_from_device_to_device() -> None:
    state = {key: tensor.cuda() for key, tensor in STATE.items()}
    file = io.BytesIO()
    aiotorchio.save(state, file, chunk_size=CHUNK)
    file.seek(0)
    loaded = aiotorchio.load(file)
    assert all(loaded[key].device == state[key].device for key in state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    file.seek(0)
    assert_state(aiotorchio.load(file, map_location="cpu"))


@cuda
@needs_cuda
def test_what_the_current_stream_computes_is_sent() -> None:
    stream = torch.cuda.Stream()
    file = io.BytesIO()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(2**24, device="cuda")
        for _ in range(50):
            tensor += 1
        aiotorchio.save(tensor, file)
    file.seek(0)
    assert torch.equal(aiotorchio.load(file, map_location="cpu"), torch.full((2**24,), 50.0))


@cuda
@needs_cuda
def test_slabs_of_cuda_are_pinned() -> None:
    torch.cuda.init()
    copier = DeviceCopier()
    assert bytes_of(copier.slab(64)).is_pinned()


@pytest.mark.anyio
async def test_inference_mode_of_the_caller_does_not_matter() -> None:
    with torch.inference_mode():
        data = sent(CopierOnCpu())
        message = receive_message(Limits(), load_options(), staged_placement(CopierOnCpu()))
        async with aclosing(pieces(data)) as body:
            loaded = (await drive(message, IterableSource(body))).obj
    assert_state(loaded)
    assert not any(tensor.is_inference() for tensor in loaded.values())
