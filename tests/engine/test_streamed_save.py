"""Dicts whose tensors are made while they are sent: ``specs=`` of every save."""

from __future__ import annotations

import contextlib
import io
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any
from weakref import ref

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import torch

import aiotorchio
from aiotorchio import (
    RemoteAbort,
    StreamBusy,
    StreamPoisoned,
    StreamReader,
    StreamWriter,
    TensorSpec,
    TruncatedError,
)
from aiotorchio.table.torch_dtypes import DTYPE_NAMES
from aiotorchio.wire.dtypes import DTYPES
from tests.api.test_message import Tap, frame_ends
from tests.api.test_streams import SMALL, encoded, failing
from tests.support.backends import (
    IN_ONE_LOOP,
    PATIENCE,
    CancelledAt,
    End,
    all_blocked,
    both_ends,
    cancelled_at,
    connected,
    descriptors,
    until,
)
from tests.support.corpus import assert_same
from tests.support.frames import parse

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)

Tensors = dict[str, torch.Tensor]


def numbered(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Fill a new storage with distinct bytes in each element; not all dtypes can be filled."""
    tensor = torch.empty(shape, dtype=dtype)
    storage = tensor.untyped_storage()
    for n in range(storage.nbytes()):
        storage[n] = n % 2 if dtype is torch.bool else n % 251
    return tensor


PLAIN: Tensors = {
    "nothing": torch.empty(0, 3),
    "few": torch.arange(3),
    "many": torch.arange(30_000.0).reshape(100, 300),
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "layers.0.weight": torch.rand(40, 50),
    "half": torch.rand(7).to(torch.bfloat16),
    "last": torch.empty(2, 0),
}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in PLAIN.items()}


async def one_by_one(tensors: Tensors) -> AsyncIterator[tuple[str, torch.Tensor]]:
    for pair in tensors.items():
        await anyio.lowlevel.checkpoint()
        yield pair


WAYS: dict[str, Callable[[Tensors], Any]] = {
    "async generator": one_by_one,
    "generator": lambda tensors: (pair for pair in tensors.items()),
    "list": lambda tensors: list(tensors.items()),
    "mapping": dict,
}


async def loaded(reader: StreamReader) -> Tensors:
    state: Tensors = await reader.load()
    return state


async def iterated(reader: StreamReader) -> Tensors:
    async with reader.open() as message:
        return {name: tensor async for name, tensor in message}


async def in_place(reader: StreamReader) -> Tensors:
    destination = {name: torch.empty_like(tensor) for name, tensor in PLAIN.items()}
    await reader.load(into=destination)
    return destination


def to_bytes(pairs: Any, specs: Mapping[str, Any], **options: Any) -> bytes:
    return encoded(pairs, specs=specs, **options)


# ------------------------------------------------------------------------------ what arrives


@in_one_loop
async def test_every_way_to_make_tensors_and_to_receive_them(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            writer = StreamWriter(near.sink)
            for way in WAYS.values():
                for chunk_size in (4096, 2**17, 2**22):
                    await writer.save(way(PLAIN), specs=SPECS, chunk_size=chunk_size)
                    await near.save(SMALL)

        group.start_soon(push)
        reader = StreamReader(far.source)
        for _ in WAYS:
            for receive in (loaded, iterated, in_place):
                assert_same(await receive(reader), PLAIN)
                assert_same(await reader.load(), SMALL)


@pytest.mark.parametrize("way", WAYS)
async def test_iter_bytes(way: str) -> None:
    async with aclosing(
        aiotorchio.iter_bytes(WAYS[way](PLAIN), specs=SPECS, chunk_size=4096)
    ) as pieces:
        assert_same(await aiotorchio.load_from_stream(pieces), PLAIN)


def test_the_blocking_twin(tmp_path: Path) -> None:
    for way in ("generator", "list", "mapping"):
        aiotorchio.save(WAYS[way](PLAIN), tmp_path / "state", specs=SPECS)
        assert_same(aiotorchio.load(tmp_path / "state"), PLAIN)
        file = io.BytesIO(to_bytes(WAYS[way](PLAIN), SPECS, chunk_size=4096))
        assert_same(aiotorchio.load(file), PLAIN)


def test_tensors_as_specs() -> None:
    model = torch.nn.Linear(3, 4)
    with torch.device("meta"):
        shape = torch.nn.Linear(3, 4)
    plain = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for specs in (shape.state_dict(), model.state_dict(), dict(model.named_parameters())):
        data = to_bytes(model.named_parameters(), specs)
        assert_same(aiotorchio.load(io.BytesIO(data)), plain)


def test_names_of_another_kind_of_str() -> None:
    """numpy has such names: a dict of tensors must not need pickle for them."""

    class Name(str):
        pass

    file = io.BytesIO()
    assert aiotorchio.save([("a", A)], file, specs={Name("a"): A}).codec == "tree"
    file.seek(0)
    assert_same(aiotorchio.load(file, allow_pickle=False), {"a": A})


def test_all_dtypes() -> None:
    kinds = {dtype: DTYPES[name].kind for dtype, name in DTYPE_NAMES.items()}
    dtypes = [dtype for dtype, kind in kinds.items() if kind != "quantized"]
    assert len(dtypes) > 20
    tensors = {str(dtype): numbered(dtype, n % 5, 3) for n, dtype in enumerate(dtypes)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    assert_same(aiotorchio.load(io.BytesIO(to_bytes(tensors, specs))), tensors)


def odd_ones() -> Tensors:
    """Tensors that are not a row of elements in a separate storage."""
    base = torch.rand(60, 70)
    complex_base = torch.rand(30, 20, dtype=torch.complex64)
    return {
        "transposed": base.t(),
        "part": base[10:20, 5:50],
        "row": base[7],
        "every second": base[::2, 1::3],
        "expanded": torch.rand(3, 1).expand(3, 500),
        "conjugate": complex_base.conj(),
        "hermitian": complex_base.mH,
        "negative": complex_base.conj().imag,
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "with a graph": torch.rand(3, requires_grad=True) * 2,
        "parameter": torch.nn.Parameter(torch.rand(2, 3).t()),
        "scalar": base[3, 4],
        "no rows": base[:0],
        "no columns": base[:, :0],
    }


def test_odd_layouts_arrive_contiguous() -> None:
    tensors = odd_ones()
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    plain = {
        name: tensor.detach()
        .resolve_conj()
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    for chunk_size in (4096, 2**20):
        data = to_bytes(iter(tensors.items()), specs, chunk_size=chunk_size)
        # Only the elements of the tensor are sent, not its whole storage.
        assert_same(aiotorchio.load(io.BytesIO(data)), plain)


def test_a_part_of_a_storage_is_sent_alone() -> None:
    whole = torch.arange(1_000_000)
    data = to_bytes([("w", whole[500_000:500_100])], {"w": TensorSpec((100,), torch.int64)})
    assert len(data) < 2000
    assert_same(aiotorchio.load(io.BytesIO(data))["w"], torch.arange(500_000, 500_100))


SIZES = [0, 1, 63, 64, 65, 4031, 4032, 4095, 4096, 4097, 8192, 10_000, 70_000]


@pytest.mark.parametrize("chunk_size", [4096, 4160, 2**16, 2**22])
def test_any_sizes_make_the_payload_of_an_ordinary_save(chunk_size: int) -> None:
    for seed in range(15):
        draw = random.Random(seed)
        sizes = draw.choices(SIZES, k=draw.randrange(1, 12))
        tensors = {f"{n}": numbered(torch.uint8, size) for n, size in enumerate(sizes)}
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        for checksum in (True, False):
            options: dict[str, Any] = {"chunk_size": chunk_size, "checksum": checksum}
            ordinary = parse(encoded(tensors, **options))
            produced = parse(to_bytes(iter(tensors.items()), specs, **options))
            assert produced.payload == ordinary.payload
            assert produced.header.header.tensors == ordinary.header.header.tensors
            assert produced.header.header.storages == ordinary.header.header.storages


def test_modes_of_torch_change_nothing() -> None:
    specs = {name: TensorSpec((40,), torch.float32) for name in "ab"}

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        for name in specs:
            assert torch.is_inference_mode_enabled() == inference
            yield name, torch.ones(80)[::2]

    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            data = to_bytes(make(), specs)
        assert_same(aiotorchio.load(io.BytesIO(data)), {name: torch.ones(40) for name in specs})


def test_no_tensors_and_none_with_bytes() -> None:
    assert aiotorchio.load(io.BytesIO(to_bytes([], {}))) == {}
    empty = {"a": torch.empty(0), "b": torch.empty(3, 0)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in empty.items()}
    assert_same(aiotorchio.load(io.BytesIO(to_bytes(empty, specs))), empty)


def test_a_tensor_named_by_the_empty_text() -> None:
    data = to_bytes([("", torch.ones(2))], {"": TensorSpec((2,), torch.float32)})
    assert_same(aiotorchio.load(io.BytesIO(data)), {"": torch.ones(2)})


@in_one_loop
async def test_the_summary_and_progress(kind: str) -> None:
    figures: list[tuple[int, int]] = []
    summaries = []
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            summary = await near.save(
                one_by_one(PLAIN),
                specs=SPECS,
                chunk_size=2**16,
                metadata={"version": "1"},
                checksum=False,
                progress=lambda *n: figures.append(n),
            )
            summaries.append(summary)

        group.start_soon(push)
        async with StreamReader(far.source).open() as message:
            assert message.metadata == {"version": "1"} and not message.checksummed
            assert dict(message.tensors) == SPECS
            await message.skip()
    (summary,) = summaries
    assert summary.message_id == message.message_id
    assert summary.payload_nbytes == message.nbytes
    assert (summary.tensors, summary.storages, summary.chunks) == (7, 7, 2)
    assert summary.codec == "tree"
    same = to_bytes(PLAIN, SPECS, chunk_size=2**16, metadata={"version": "1"}, checksum=False)
    assert summary.nbytes == len(same)
    assert figures == [(2**16, message.nbytes), (message.nbytes, message.nbytes)]


def test_map_location_says_where_they_go() -> None:
    file = io.BytesIO(to_bytes(PLAIN, SPECS))
    state = aiotorchio.load(file, map_location={"cpu": "meta"})
    assert {tensor.device.type for tensor in state.values()} == {"meta"}


# ------------------------------------------------------------------------------ memory held


@in_one_loop
async def test_the_header_is_there_before_the_first_tensor_is_made(kind: str) -> None:
    opened = anyio.Event()

    async def make() -> AsyncIterator[tuple[str, torch.Tensor]]:
        # If the receiver did not have the header by now, both would wait for ever.
        with anyio.fail_after(PATIENCE):
            await opened.wait()
        for pair in PLAIN.items():
            yield pair

    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save(make(), specs=SPECS)

        group.start_soon(push)
        async with StreamReader(far.source).open() as message:
            assert dict(message.tensors) == SPECS
            opened.set()
            assert_same(await message.load(), PLAIN)


class Memory(bytearray):
    """Memory of a tensor that shows whether it still exists."""


class Maker:
    """Makes tensors, and counts how many earlier ones are alive at each."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.specs = {f"{n}": TensorSpec((nbytes,), torch.uint8) for n in range(count)}
        self.alive: list[int] = []
        self._made: list[ref[Memory]] = []

    def make(self, nbytes: int) -> torch.Tensor:
        self.alive.append(sum(memory() is not None for memory in self._made))
        memory = Memory(nbytes)
        self._made.append(ref(memory))
        return torch.frombuffer(memory, dtype=torch.uint8)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, spec in self.specs.items():
            yield name, self.make(*spec.shape)

    async def all(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        for name, spec in self.specs.items():
            await anyio.lowlevel.checkpoint()
            yield name, self.make(*spec.shape)


HELD = [
    (6, 2**20, 2**18),
    (6, 2**20, 2**20),
    (6, 2**20, 2**23),
    (40, 5000, 4096),
    (9, 10**6, 2**17),
]


@in_one_loop
async def test_no_tensor_is_held_when_the_next_is_made(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        makers = [Maker(count, nbytes) for count, nbytes, _ in HELD for _ in range(2)]
        sizes = [chunk_size for _, _, chunk_size in HELD]

        async def push() -> None:
            for n, maker in enumerate(makers):
                pairs: Any = maker.all() if n % 2 else iter(maker)
                await near.save(pairs, specs=maker.specs, chunk_size=sizes[n // 2])

        group.start_soon(push)
        for _ in makers:
            async with StreamReader(far.source).open():
                pass
    assert [maker.alive for maker in makers] == [[0] * len(maker.specs) for maker in makers]


@pytest.mark.parametrize(("count", "nbytes", "chunk_size"), HELD)
async def test_no_tensor_is_held_by_iter_bytes(count: int, nbytes: int, chunk_size: int) -> None:
    maker = Maker(count, nbytes)
    pieces = aiotorchio.iter_bytes(maker.all(), specs=maker.specs, chunk_size=chunk_size)
    async for piece in pieces:
        # Otherwise this loop holds it.
        del piece
    assert maker.alive == [0] * count


@pytest.mark.parametrize(("count", "nbytes", "chunk_size"), HELD)
def test_no_tensor_is_held_by_the_blocking_twin(count: int, nbytes: int, chunk_size: int) -> None:
    maker = Maker(count, nbytes)
    aiotorchio.save(iter(maker), io.BytesIO(), specs=maker.specs, chunk_size=chunk_size)
    assert maker.alive == [0] * count


async def test_pieces_outlive_what_follows_them() -> None:
    tensors = {f"{n}": torch.full((300_000,), n, dtype=torch.uint8) for n in range(12)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    for chunk_size in (4096, 2**18, 2**20, 2**22):
        pieces = aiotorchio.iter_bytes(one_by_one(tensors), specs=specs, chunk_size=chunk_size)
        # An HTTP library may queue the pieces.
        parts = [piece async for piece in pieces]
        assert all(memoryview(piece).readonly for piece in parts)
        assert_same(aiotorchio.load(io.BytesIO(b"".join(parts))), tensors)


async def test_a_tensor_is_asked_for_only_when_there_is_room_for_it() -> None:
    asked = 0

    async def make() -> AsyncIterator[tuple[str, torch.Tensor]]:
        nonlocal asked
        for name in specs:
            asked += 1
            yield name, torch.zeros(2**20, dtype=torch.uint8)

    specs = {f"{n}": TensorSpec((2**20,), torch.uint8) for n in range(20)}
    async with both_ends("socket") as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save(make(), specs=specs, chunk_size=2**16)

        group.start_soon(push)
        async with StreamReader(far.source).open() as message:
            await until(lambda: asked > 0)
            await all_blocked()
            assert asked == 1
            await message.skip()
    assert asked == 20


# ------------------------------------------------------------------------------ mistakes

A, B = torch.ones(2000), torch.zeros(3, 4)
TENSORS = {"a": A, "b": B}
TWO = {"a": TensorSpec((2000,), torch.float32), "b": TensorSpec((3, 4), torch.float32)}
QUANTIZED = torch.quantize_per_tensor(B, 0.1, 0, torch.qint8)
MISTAKES: dict[str, tuple[list[Any], type[Exception], str]] = {
    "another order": ([("b", B), ("a", A)], ValueError, "yields 'b' where specs has 'a'"),
    "another name": ([("a", A), ("c", B)], ValueError, "yields 'c' where specs has 'b'"),
    "another shape": ([("a", A), ("b", B.t())], ValueError, "'b' is TensorSpec.*4, 3"),
    "as many elements": ([("a", A), ("b", B.view(12))], ValueError, "'b' is TensorSpec"),
    "another dtype": ([("a", A), ("b", B.double())], ValueError, "'b' is TensorSpec.*float64"),
    "a quantized tensor": ([("a", A), ("b", QUANTIZED)], ValueError, "qint8"),
    "too few": ([("a", A)], ValueError, "ended before 'b'"),
    "none": ([], ValueError, "ended before 'a'"),
    "too many": ([("a", A), ("b", B), ("c", A)], ValueError, "more than the 2 tensors"),
    "not a pair": ([("a", A), B], TypeError, "pairs of name and tensor, not Tensor"),
    "not even a sequence": ([("a", A), None], TypeError, "pairs of name and tensor"),
    "three of them": ([("a", A, 1)], TypeError, "pairs of name and tensor, not tuple"),
    "not a tensor": ([("a", A), ("b", B.tolist())], TypeError, "'b' must be a tensor, not list"),
    "on meta": ([("a", A), ("b", B.to("meta"))], ValueError, "'b' is .* no bytes"),
    "sparse": ([("a", A), ("b", B.to_sparse())], ValueError, "'b' is .* no bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("chunk_size", [4096, 2**20])
async def test_a_mistake_reaches_the_receiver_and_the_stream_lives_on(
    mistake: str, chunk_size: int
) -> None:
    pairs, error, match = MISTAKES[mistake]
    async with both_ends("socket") as (near, far):
        for made in (pairs, iter(pairs)):
            with pytest.raises(error, match=match) as caught:
                await near.save(made, specs=TWO, chunk_size=chunk_size)
            await near.save(SMALL)
            with pytest.raises(RemoteAbort) as aborted:
                await far.load()
            assert f"{error.__name__}: {caught.value}" in str(aborted.value)
            assert_same(await far.load(), SMALL)


def test_a_mistake_in_the_blocking_twin(tmp_path: Path) -> None:
    for pairs, error, match in MISTAKES.values():
        with pytest.raises(error, match=match):
            aiotorchio.save(iter(pairs), tmp_path / "state", specs=TWO)
        assert not list(tmp_path.iterdir())


async def test_a_tensor_too_many_of_an_async_generator() -> None:
    async with both_ends("socket") as (near, far):
        async with aclosing(one_by_one({"a": A, "b": B, "c": B})) as made:  # type: ignore[type-var]
            with pytest.raises(ValueError, match="more than the 2 tensors"):
                await near.save(made, specs=TWO)
        with pytest.raises(RemoteAbort, match="more than the 2 tensors"):
            await far.load()


WRONG_SPECS: list[tuple[Any, Any, type[Exception], str]] = [
    ([], {"a": (3,)}, TypeError, "TensorSpec or tensor"),
    ([], {1: TWO["a"]}, TypeError, "TensorSpec or tensor"),
    ([], {"\ud800": TWO["a"]}, ValueError, "UTF-8"),
    ([], {"a": TensorSpec((2,), torch.qint8)}, ValueError, "qint8"),
    ([("a", QUANTIZED)], {"a": QUANTIZED}, ValueError, "qint8"),
    (5, TWO, TypeError, "not int"),
    (None, TWO, TypeError, "not NoneType"),
    (one_by_one, TWO, TypeError, "not function"),
]


@pytest.mark.parametrize(("obj", "specs", "error", "match"), WRONG_SPECS)
async def test_wrong_specs_leave_the_stream_untouched(
    obj: Any, specs: Any, error: type[Exception], match: str
) -> None:
    async with both_ends("socket") as (near, far):
        with pytest.raises(error, match=match):
            await near.save(obj, specs=specs)
        with pytest.raises(error, match=match):
            await anext(aiotorchio.iter_bytes(obj, specs=specs))
        file = io.BytesIO()
        with pytest.raises(error, match=match):
            aiotorchio.save(obj, file, specs=specs)
        assert file.getvalue() == b""
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


async def test_generators_need_specs() -> None:
    async with (
        both_ends("socket") as (near, far),
        aclosing(one_by_one(PLAIN)) as made,  # type: ignore[type-var]
    ):
        for generator in (made, (pair for pair in PLAIN.items())):
            with pytest.raises(TypeError, match="needs specs"):
                await near.save(generator)
            with pytest.raises(TypeError, match="needs specs"):
                await anext(aiotorchio.iter_bytes(generator))
            with pytest.raises(TypeError, match="needs specs"):
                aiotorchio.save(generator, io.BytesIO())
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


async def test_the_blocking_twin_takes_no_async_iterator() -> None:
    async with aclosing(one_by_one(PLAIN)) as made:  # type: ignore[type-var]
        file = io.BytesIO()
        with pytest.raises(TypeError, match="async"):
            aiotorchio.save(made, file, specs=SPECS)
    # The error was raised before the first byte.
    assert file.getvalue() == b""


# ------------------------------------------------------------------------------ errors


async def failing_after(count: int) -> AsyncIterator[tuple[str, torch.Tensor]]:
    for n in range(count):
        yield f"{n}", torch.full((2**16,), n, dtype=torch.uint8)
    raise ZeroDivisionError("no more today")


FIVE = {f"{n}": TensorSpec((2**16,), torch.uint8) for n in range(5)}


@in_one_loop
async def test_an_iterator_that_fails_tells_the_receiver_why(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for count in range(6):
                with pytest.raises(ZeroDivisionError):
                    await near.save(failing_after(count), specs=FIVE, chunk_size=2**15)
            await near.save(SMALL)

        group.start_soon(push)
        reader = StreamReader(far.source)
        for count in range(6):
            found = []
            async with reader.open() as message:
                with pytest.raises(RemoteAbort, match="ZeroDivisionError: no more today"):
                    async for name, tensor in message:
                        assert tensor.eq(int(name)).all()
                        found.append(name)
            # The complete tensors were yielded.
            assert found == list(FIVE)[:count]
        assert_same(await reader.load(), SMALL)


async def test_progress_that_fails_tells_the_receiver_why() -> None:
    async with both_ends("socket") as (near, far):
        for after in (4096, 8000):
            with pytest.raises(ZeroDivisionError):
                await near.save(TENSORS, specs=TWO, chunk_size=4096, progress=failing(after))
            with pytest.raises(RemoteAbort, match="in the middle"):
                await far.load()
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


async def test_iter_bytes_of_an_iterator_that_fails() -> None:
    parts: list[bytes] = []
    with pytest.raises(ZeroDivisionError):
        async for piece in aiotorchio.iter_bytes(failing_after(2), specs=FIVE):
            parts.append(bytes(piece))  # noqa: PERF401 - kept when it raises
    with pytest.raises(RemoteAbort, match="no more today"):
        aiotorchio.load(io.BytesIO(b"".join(parts)))


def test_a_blocking_iterator_that_fails_tells_the_receiver_why() -> None:
    def make() -> Iterator[tuple[str, torch.Tensor]]:
        yield "0", torch.zeros(2**16, dtype=torch.uint8)
        raise ZeroDivisionError("no more today")

    near, far = connected("unix")
    received: list[Any] = []

    def receive() -> None:
        for _ in range(2):
            try:
                received.append(aiotorchio.load(far))
            except RemoteAbort as error:
                received.append(error)

    with near, far:
        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        with pytest.raises(ZeroDivisionError):
            aiotorchio.save(make(), near, specs=FIVE)
        aiotorchio.save(SMALL, near)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert isinstance(received[0], RemoteAbort) and "no more today" in str(received[0])
    assert_same(received[1], SMALL)


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, GeneratorExit])
async def test_an_iterator_that_raises_what_others_end_with(error: type[BaseException]) -> None:
    class Odd:
        def __aiter__(self) -> Odd:
            return self

        async def __anext__(self) -> Any:
            raise error

    async with both_ends("socket") as (near, far):
        with pytest.raises(BaseException) as caught:
            await near.save(Odd(), specs=TWO)
        if issubclass(error, Exception):
            assert isinstance(caught.value, ValueError | RuntimeError)
            with pytest.raises(RemoteAbort):
                await far.load()
        else:
            with pytest.raises(StreamPoisoned):
                await near.save(SMALL)


async def test_an_iterator_that_uses_the_stream_itself() -> None:
    async with both_ends("socket") as (near, far):

        async def make() -> AsyncIterator[tuple[str, torch.Tensor]]:
            yield "a", A
            await near.save(SMALL)

        with pytest.raises(StreamBusy):
            await near.save(make(), specs=TWO)
        with pytest.raises(RemoteAbort, match="StreamBusy"):
            await far.load()
        await near.save(SMALL)
        assert_same(await far.load(), SMALL)


async def test_a_connection_that_is_lost_while_tensors_are_made() -> None:
    async with both_ends("socket") as (near, far):

        async def make() -> AsyncIterator[tuple[str, torch.Tensor]]:
            yield "a", A
            far.source.shutdown(socket.SHUT_RDWR)
            yield "b", B

        async with aclosing(make()) as made:  # type: ignore[type-var]
            with pytest.raises(TruncatedError):
                await near.save(made, specs=TWO, chunk_size=4096)
        with pytest.raises(StreamPoisoned):
            await near.save(SMALL)


# ------------------------------------------------------------------------------ cancellation


@in_one_loop
async def test_a_save_cancelled_while_a_tensor_is_made(kind: str) -> None:
    asked, ended = anyio.Event(), anyio.Event()

    async def make() -> AsyncIterator[tuple[str, torch.Tensor]]:
        yield "a", A
        try:
            asked.set()
            await anyio.sleep_forever()
        finally:
            ended.set()

    async with both_ends(kind) as (near, far):
        async with anyio.create_task_group() as group:

            async def push() -> None:
                await near.save(make(), specs=TWO, chunk_size=4096)

            group.start_soon(push)
            await asked.wait()
            group.cancel_scope.cancel()
        assert ended.is_set()
        with pytest.raises(StreamPoisoned, match="Cancelled"):
            await near.save(SMALL)
        with pytest.raises(TruncatedError):
            await far.load()


@in_one_loop
async def test_a_save_cancelled_anywhere(kind: str) -> None:
    tensors = {name: torch.full((2**16,), 1.0) for name in "ab"}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    outcomes, open_descriptors = [], []
    tasks = len(anyio.get_running_tasks())
    for count in range(1, 200):
        received: list[Any] = []

        async def pull(end: End, received: list[Any] = received) -> None:
            try:
                received.append(await end.load())
            except TruncatedError as error:
                received.append(error)

        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(pull, far)
            await all_blocked()
            made = one_by_one(tensors)
            save = near.save(made, specs=specs, chunk_size=2**17)
            try:
                await cancelled_at(count, save)
            except CancelledAt:
                try:
                    await near.save(tensors)
                    outcomes.append("clean")
                except StreamPoisoned as error:
                    assert "Cancelled" in str(error)
                    outcomes.append("poisoned")
            else:
                outcomes.append("done")
            await made.aclose()  # type: ignore[attr-defined]
        open_descriptors.append(len(descriptors()))
        assert len(anyio.get_running_tasks()) == tasks
        # A save that is cancelled after its last byte cannot know that it was the last.
        if outcomes[-1] != "poisoned" or not isinstance(received[0], TruncatedError):
            assert_same(received[0], tensors)
        if outcomes[-1] == "done":
            break
    assert outcomes == sorted(outcomes, key=["clean", "poisoned", "done"].index)
    assert outcomes[-1] == "done" and "poisoned" in outcomes
    assert max(open_descriptors[1:]) <= max(open_descriptors[0], open_descriptors[1])


async def test_iter_bytes_can_be_closed_at_any_time() -> None:
    for count in range(8):
        closed: list[bool] = []

        async def make(closed: list[bool] = closed) -> AsyncIterator[tuple[str, torch.Tensor]]:
            try:
                for pair in PLAIN.items():
                    yield pair
            finally:
                closed.append(True)

        async with aclosing(make()) as made:  # type: ignore[type-var]
            pieces = aiotorchio.iter_bytes(made, specs=SPECS, chunk_size=4096)
            for _ in range(count):
                await anext(pieces)
            await pieces.aclose()
            with contextlib.suppress(StopAsyncIteration):
                await anext(pieces)
                raise AssertionError("a closed generator goes on")


async def test_a_receiver_that_stalls_in_the_middle_of_a_made_message() -> None:
    data = to_bytes(PLAIN, SPECS, chunk_size=4096)
    for stop in frame_ends(data)[:-1]:
        tap = Tap(data, 1000, stop=stop)
        tap.resumed.set()
        waiting: Awaitable[Any] = StreamReader(tap).load()
        with pytest.raises(TruncatedError) as caught:
            await waiting
        assert caught.value.offset == stop
