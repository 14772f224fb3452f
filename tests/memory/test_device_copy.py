"""Tensors on a device pass through two staging buffers.

Most tests use a copier that treats the CPU as a device; some need CUDA.
"""

from __future__ import annotations

import asyncio
import functools
import io
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, aclosing, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.engine import prepared_save
from aiotorchio.engine.drivers import drive, drive_blocking
from aiotorchio.engine.load import Loaded, receive_message
from aiotorchio.engine.load_options import LoadOptions
from aiotorchio.engine.prepared_save import PreparedSave, ReadyMessage
from aiotorchio.engine.requests import Request
from aiotorchio.engine.save_options import SaveOptions
from aiotorchio.engine.send import send_message
from aiotorchio.graph.flatten import flatten
from aiotorchio.limits import Limits
from aiotorchio.memory import device_copy
from aiotorchio.memory.device_copy import DeviceCopier, OnDevice, StagingBuffers, bytes_of
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.iterables import IterableSource
from tests.support.payload_layouts import CopierOnCpu, staged

CHUNK = 4096
STATE = {"a": torch.arange(5000.0), "b": torch.ones(3), "c": torch.arange(20_000)}

cuda = pytest.mark.cuda
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def staged_outgoing(copier: Any) -> Callable[..., OutgoingPayload]:
    def make(*args: Any, **options: Any) -> OutgoingPayload:
        return OutgoingPayload(*args, **options | {"copier": copier, "needs_copy": staged})

    return make


Receive = Callable[[Any], Generator[Request, Any, Loaded]]


@pytest.fixture
def receive(monkeypatch: pytest.MonkeyPatch) -> Receive:
    """A load that takes the CPU for a device, and uses a copier."""
    incoming = functools.partial(IncomingPayload, needs_copy=staged)
    monkeypatch.setattr("aiotorchio.engine.finish.IncomingPayload", incoming)

    def with_copier(copier: Any) -> Generator[Request, Any, Loaded]:
        monkeypatch.setattr("aiotorchio.engine.matching.DeviceCopier", lambda: copier)
        return receive_message(Limits(), LoadOptions())

    return with_copier


def message_of(copier: Any) -> Generator[Request, Any, aiotorchio.Summary]:
    class StagedSave(PreparedSave):
        def ready(self) -> ReadyMessage:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(prepared_save, "OutgoingPayload", staged_outgoing(copier))
                return super().ready()

    return send_message(StagedSave(STATE, SaveOptions(chunk_size=CHUNK)))


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


def test_receiving_takes_two_slabs_of_one_chunk(receive: Receive) -> None:
    copier = CopierOnCpu()
    message = receive(copier)
    loaded = drive_blocking(message, BlockingStream(io.BytesIO(sent(CopierOnCpu()))))
    assert_state(loaded.obj)
    assert [slab.nbytes() for slab in copier.slabs] == [CHUNK, CHUNK]


@pytest.mark.anyio
async def test_copies_run_in_worker_threads(receive: Receive) -> None:
    class Watching(CopierOnCpu):
        def __init__(self) -> None:
            super().__init__()
            self.threads: set[int] = set()

        def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            self.threads.add(threading.get_ident())
            super().copy(destination, source)

    copier = Watching()
    message = receive(copier)
    async with aclosing(pieces(sent(CopierOnCpu()))) as body:
        assert_state((await drive(message, IterableSource(body))).obj)
    assert threading.get_ident() not in copier.threads


@pytest.mark.anyio
async def test_a_copy_that_fails_is_the_error_of_the_load(receive: Receive) -> None:
    class Failing(CopierOnCpu):
        def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            raise RuntimeError("device lost")

    message = receive(Failing())
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
    slabs = StagingBuffers(64, CopierOnCpu())
    first, second, third, fourth = (slabs.take()[0].data_ptr() for _ in range(4))
    assert first == third != second == fourth


def test_pinned_slabs_come_when_bytes_have_arrived() -> None:
    """A peer could claim a large chunk, and pinned memory is allocated all at once."""
    copier = CopierOnCpu()
    copier.pins = True
    slabs = StagingBuffers(64, copier, incoming=True)
    first, second = (slabs.take()[0].data_ptr() for _ in range(2))
    assert not copier.slabs
    third, fourth, fifth = (slabs.take()[0].data_ptr() for _ in range(3))
    assert [slab.data_ptr() for slab in copier.slabs] == [third, fourth]
    assert fifth == third
    assert len({first, second}) == 2
    # What is sent is there.
    StagingBuffers(64, copier).take()
    assert len(copier.slabs) == 3


def test_the_copier_of_the_library_copies_on_the_cpu() -> None:
    copier = DeviceCopier()
    slab = copier.staging_buffer(8)
    copier.copy(bytes_of(slab), torch.arange(8, dtype=torch.uint8))
    assert bytes_of(slab).tolist() == list(range(8))


STREAMS: dict[str, Any] = {"Stream": 0, "stream": 0, "current_stream": 0}


class Accelerator:
    """A substitute for ``torch.cuda`` on the CPU: records the calls on its streams."""

    def __init__(self, used: tuple[int, ...] = (0,)) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.used = used
        self.Stream = functools.partial(AcceleratorStream, self)

    def device_count(self) -> int:
        return 2

    def memory_stats_as_nested_dict(self, index: int) -> dict[str, Any]:
        return {"reserved_bytes": {"all": {"current": 4096 * (index in self.used)}}}

    def current_stream(self, device: Any) -> AcceleratorStream:
        index = device.index if isinstance(device, torch.device) else device
        return AcceleratorStream(self, f"current {index}")

    def synchronize(self, device: torch.device) -> None:
        self.log.append(("synchronize", f"all of {device.index}"))

    def stream(self, stream: AcceleratorStream) -> AbstractContextManager[None]:
        self.log.append(("enter", stream.name))
        return nullcontext()


class AcceleratorStream:
    def __init__(self, module: Accelerator, name: Any) -> None:
        self.log = module.log
        self.name = name if isinstance(name, str) else "own"

    def record_event(self) -> AcceleratorEvent:
        self.log.append(("record", self.name))
        return AcceleratorEvent(self.log, self.name)

    def wait_event(self, event: AcceleratorEvent) -> None:
        self.log.append(("wait for event", self.name, event.name))

    def wait_stream(self, stream: AcceleratorStream) -> None:
        self.log.append(("wait for stream", self.name, stream.name))


class AcceleratorEvent:
    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(("synchronize", self.name))


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    module = Accelerator()
    monkeypatch.setattr(device_copy, "_accelerator_in_use", lambda: ("cpu", module))
    return module


def copy_something(copier: DeviceCopier) -> None:
    destination = torch.zeros(8, dtype=torch.uint8)
    copier.copy(destination, torch.arange(8, dtype=torch.uint8))
    assert destination.tolist() == list(range(8))


def test_a_save_waits_for_what_was_queued_when_it_was_called(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = DeviceCopier(until_now=True)
    # No event on the other device: it would create a context there.
    assert accelerator.log == [("record", "current 0")]
    # The index of a device of the CPU is None.
    copier._callers = {None: copier._callers[0]}  # type: ignore[dict-item]
    accelerator.log.clear()
    copy_something(copier)
    assert accelerator.log == [
        ("wait for event", "own", "current 0"),
        ("enter", "own"),
        ("record", "own"),
        ("synchronize", "own"),
    ]


def test_a_load_waits_for_what_is_queued_when_it_writes(accelerator: Accelerator) -> None:
    copier = DeviceCopier()
    assert accelerator.log == []
    copier._callers = {None: copier._callers[0]}  # type: ignore[dict-item]
    copy_something(copier)
    assert accelerator.log == [
        ("wait for stream", "own", "current 0"),
        ("wait for stream", "own", "current None"),
        ("enter", "own"),
        ("record", "own"),
        ("synchronize", "own"),
    ]


def test_a_snapshot_is_waited_for(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copier waits for the copies of the snapshot, so it is made after they are queued."""
    made: list[int] = []
    copied: list[int] = []

    class Watching(CopierOnCpu):
        def __init__(self) -> None:
            super().__init__()
            made.append(len(copied))

    class Payload(OutgoingPayload):
        def pieces(self, start: int, length: int) -> Iterator[memoryview | OnDevice]:
            copied.append(start)
            return super().pieces(start, length)

    payload = functools.partial(Payload, needs_copy=staged)
    monkeypatch.setattr(prepared_save, "OutgoingPayload", payload)
    flattened = flatten(STATE, chunk_size=CHUNK, metadata={}, producer="tests")
    ready = ReadyMessage.of_copies(flattened, Watching)
    assert made[-1] == len(copied) == ready.layout.chunks > 10


def test_no_device_needs_no_streams() -> None:
    if not torch.accelerator.is_available():
        assert device_copy._accelerator_in_use() == (None, None)
    assert device_copy._indices(None, in_use=True) == ()


def test_a_device_that_tells_nothing_about_its_memory_counts_as_used() -> None:
    class Silent:
        def device_count(self) -> int:
            return 3

    assert list(device_copy._indices(Silent(), in_use=True)) == [0, 1, 2]


def test_an_allocator_without_statistics() -> None:
    class Pluggable(Accelerator):
        def memory_stats_as_nested_dict(self, index: int) -> dict[str, Any]:
            raise RuntimeError("this allocator has no statistics")

    assert list(device_copy._indices(Pluggable(), in_use=True)) == [0, 1]


def test_a_device_that_did_not_look_used_is_waited_for_as_a_whole(accelerator: Accelerator) -> None:
    accelerator.used = ()
    copier = DeviceCopier(until_now=True)
    assert accelerator.log == []
    copy_something(copier)
    copy_something(copier)
    assert accelerator.log[0] == ("synchronize", "all of None")
    assert [entry[0] for entry in accelerator.log].count("synchronize") == 3


def test_what_is_queued_between_the_call_and_its_start_is_waited_for(
    accelerator: Accelerator,
) -> None:
    pieces = aiotorchio.iter_bytes(STATE)
    assert accelerator.log == [("record", "current 0")]

    async def start() -> None:
        async with aclosing(pieces):
            await anext(pieces)

    asyncio.run(start())
    assert accelerator.log == [("record", "current 0")] * 2


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (SimpleNamespace(is_available=lambda: 1, is_initialized=lambda: 1), False),
        (SimpleNamespace(**STREAMS, is_available=lambda: 1, is_initialized=bool), False),
        (SimpleNamespace(**STREAMS, is_available=lambda: 1, is_initialized=lambda: 1), True),
        (SimpleNamespace(**STREAMS, is_available=lambda: 1), True),
    ],
    ids=["without streams", "not in use", "in use", "always in use"],
)
def test_accelerators(module: Any, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    expected = ("xpu", module) if found else (None, None)
    assert device_copy._accelerator_in_use() == expected


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
@pytest.mark.parametrize("snapshot", [False, True])
def test_what_is_queued_before_the_call_is_sent_and_what_comes_later_is_not_waited_for(
    snapshot: bool,
) -> None:
    """The coroutine runs long after the call, when other work is queued on the stream."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(2**24, device="cuda")
        for _ in range(50):
            tensor += 1
        pieces = aiotorchio.iter_bytes(tensor, snapshot=snapshot)
        if snapshot:
            tensor += 1
        torch.cuda._sleep(2**31)
        queued = stream.record_event()

    async def everything() -> bytes:
        data = [bytes(piece) async for piece in pieces]
        assert not queued.query()
        return b"".join(data)

    loaded = aiotorchio.load(io.BytesIO(asyncio.run(everything())), map_location="cpu")
    assert torch.equal(loaded, torch.full((2**24,), 50.0))


@cuda
@needs_cuda
def test_a_snapshot_stays_on_its_device_and_is_freed_as_it_is_sent() -> None:
    tensor = torch.arange(2**24, device="cuda")
    file = io.BytesIO()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    left: list[int] = []
    aiotorchio.save(
        tensor,
        file,
        snapshot=True,
        progress=lambda done, total: left.append(torch.cuda.memory_allocated() - before),
    )
    size = tensor.nbytes
    assert size <= torch.cuda.max_memory_allocated() - before <= size + 2**20
    assert left == sorted(left, reverse=True)
    assert left[-1] <= 4 * 2**20


@cuda
@needs_cuda
def test_the_whole_device_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(*_: Any) -> None:
        raise AssertionError("the whole device was waited for")

    state = {key: tensor.cuda() for key, tensor in STATE.items()}
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(2**31)
        done = busy.record_event()
    file = io.BytesIO()
    aiotorchio.save(state, file, chunk_size=CHUNK)
    file.seek(0)
    loaded = aiotorchio.load(file)
    assert not done.query()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@cuda
@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_state_goes_from_one_device_to_the_other() -> None:
    state = {key: tensor.to("cuda:0") for key, tensor in STATE.items()}
    file = io.BytesIO()
    aiotorchio.save(state, file, chunk_size=CHUNK)
    for location in ("cuda:1", {"cuda:0": "cuda:1"}, torch.device("cuda", 1)):
        file.seek(0)
        loaded = aiotorchio.load(file, location)
        assert all(tensor.device == torch.device("cuda", 1) for tensor in loaded.values())
        assert all(torch.equal(loaded[key].cpu(), STATE[key]) for key in state)


@cuda
@needs_cuda
def test_state_on_a_device_crosses_a_socket_with_two_pinned_chunks_at_each_end() -> None:
    state = {"w": torch.arange(2**23, device="cuda"), "b": torch.ones(5, device="cuda")}

    async def main() -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await aiotorchio.save_to_stream(state, writer)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            loaded = await aiotorchio.load_from_stream(reader)
            writer.close()
        return loaded

    slabs: list[int] = []
    make = DeviceCopier.staging_buffer

    def counted(self: DeviceCopier, nbytes: int) -> torch.UntypedStorage:
        slabs.append(nbytes)
        return make(self, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceCopier, "staging_buffer", counted)
        loaded = asyncio.run(main())
    assert sorted(slabs) == [4 * 2**20] * 4
    assert all(loaded[key].device == state[key].device for key in state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@cuda
@needs_cuda
def test_a_compact_save_packs_what_is_on_a_device() -> None:
    whole = torch.arange(2**20, device="cuda").view(1024, 1024)
    file = io.BytesIO()
    summary = aiotorchio.save([whole[:, :10], whole[5]], file, compact=True, chunk_size=CHUNK)
    assert summary.left_out_nbytes > 0
    file.seek(0)
    column, row = aiotorchio.load(file)
    assert column.device == whole.device
    assert torch.equal(column, whole[:, :10]) and torch.equal(row, whole[5])


@cuda
@needs_cuda
def test_slabs_of_cuda_are_pinned() -> None:
    torch.cuda.init()
    copier = DeviceCopier()
    assert bytes_of(copier.staging_buffer(64)).is_pinned()


@pytest.mark.anyio
async def test_inference_mode_of_the_caller_does_not_matter(receive: Receive) -> None:
    with torch.inference_mode():
        data = sent(CopierOnCpu())
        message = receive(CopierOnCpu())
        async with aclosing(pieces(data)) as body:
            loaded = (await drive(message, IterableSource(body))).obj
    assert_state(loaded)
    assert not any(tensor.is_inference() for tensor in loaded.values())
