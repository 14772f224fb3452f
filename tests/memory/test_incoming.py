"""Where arriving bytes go: storages, arenas, targets, or nowhere.

Random storages and chunk sizes are received; the bytes are compared with the sent ones.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import tracemalloc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.errors import MismatchError
from aiotorchio.memory import incoming as incoming_module
from aiotorchio.memory.host import view_of
from aiotorchio.memory.incoming import ARENA_MAX, IncomingPayload
from aiotorchio.memory.outgoing import SMALL_STORAGE as SMALL
from aiotorchio.memory.routes import Route
from tests.support.payload_layouts import (
    CHUNK,
    CPU,
    META,
    CopierOnCpu,
    View,
    bytes_at,
    bytes_of_storage,
    filled,
    incoming_for,
    joined,
    layout,
    received,
    staging,
    storages_made,
    with_elements_of,
)
from tests.support.tiers import examples


def present(storage: torch.UntypedStorage | None) -> torch.UntypedStorage:
    assert storage is not None
    return storage


# Storages


def test_memory_comes_with_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    made = storages_made(monkeypatch)
    incoming = incoming_for([SMALL, 2**50, SMALL], CHUNK)
    assert made == []
    incoming.buffers_for(0, CHUNK)
    incoming.buffers_for(CHUNK, CHUNK)
    assert [storage.nbytes() for storage in made] == [SMALL]


def test_no_memory_is_a_memory_error() -> None:
    incoming = incoming_for([2**62], CHUNK)
    with pytest.raises(MemoryError, match=str(2**62)):
        incoming.buffers_for(0, CHUNK)


def test_small_storages_share_an_arena_and_large_ones_do_not() -> None:
    sizes = [100, 200, 2 * SMALL, 300]
    incoming = received(incoming_for(sizes, 2**20), joined(sizes, filled(sizes)), 2**20)
    first, second, large, last = map(present, incoming.storages())
    assert second.data_ptr() - first.data_ptr() == 128
    assert [storage.nbytes() for storage in (first, second, large, last)] == sizes
    assert large.resizable()
    assert not first.resizable()
    # A small storage that is alone in its arena is the whole arena.
    assert last.resizable()


def test_an_arena_keeps_little_alive() -> None:
    sizes = [SMALL - 64] * 200
    incoming = received(incoming_for(sizes, 2**20), joined(sizes, filled(sizes)), 2**20)
    spans: list[list[int]] = []
    for storage in map(present, incoming.storages()):
        start = storage.data_ptr()
        if not spans or start != spans[-1][1]:
            spans.append([start, start])
        spans[-1][1] = start + storage.nbytes()
    assert all(end - start <= ARENA_MAX + 64 * len(sizes) for start, end in spans)


def test_a_chunk_of_many_small_storages_has_few_buffers() -> None:
    """Each buffer takes time on the event loop, so their number must not grow with the storages."""
    # Every second storage is dropped, so that no two kept ones share an arena.
    sizes = [64] * 1000 + [2 * SMALL] + [64] * 1000
    devices = [CPU if n % 2 == 0 else None for n in range(len(sizes))]
    storages = filled(sizes)
    incoming = incoming_for(sizes, 2**20, devices=devices)
    assert incoming.steps(0, 2**20) > 1000
    views, _ = incoming.buffers_for(0, layout(sizes)[1])
    # The large storage, and one staging buffer before and after it.
    assert [len(view) for view in views] == [64_000, 2 * SMALL, 64_000]
    incoming = incoming_for(sizes, 2**20, devices=devices)
    received(incoming, joined(sizes, storages), 2**20)
    for arrived, storage, device in zip(incoming.storages(), storages, devices, strict=True):
        assert (arrived is None) == (device is None)
        if arrived is not None:
            assert bytes(view_of(arrived)) == bytes(view_of(storage))


def test_huge_pages_are_asked_for_when_one_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one byte from a peer would take 2 MiB."""
    monkeypatch.setattr(incoming_module, "HUGE_PAGE", 2**21)
    asked: list[int] = []
    monkeypatch.setattr(
        incoming_module, "use_huge_pages", lambda storage: asked.append(storage.nbytes())
    )
    sizes = [2**23, 2**22]
    incoming = incoming_for(sizes, 2**20)
    for start in range(0, sum(sizes), 2**20):
        incoming.buffers_for(start, 2**20)
        assert asked == [2**23] * (start >= 2**21) + [2**22] * (start >= 2**23)


def test_what_goes_to_meta_is_dropped() -> None:
    sizes = [5000, 100, 5000]
    storages = filled(sizes)
    incoming = incoming_for(sizes, CHUNK, devices=[META, CPU, META])
    received(incoming, joined(sizes, storages), CHUNK)
    first, kept, last = map(present, incoming.storages())
    assert (first.device, last.device) == (META, META)
    assert [first.nbytes(), last.nbytes()] == [5000, 5000]
    assert bytes(view_of(kept)) == bytes(view_of(storages[1]))


def test_storages_without_bytes_have_their_size_and_place() -> None:
    incoming = IncomingPayload([0, 0], [0, 0], [0, 2**40], [CPU, META], CHUNK)
    empty, meta = map(present, incoming.storages())
    assert (empty.nbytes(), empty.device) == (0, CPU)
    assert (meta.nbytes(), meta.device) == (2**40, META)


def test_what_is_let_go_is_kept_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [100, 0, 200, 2 * SMALL, 300]
    storages = filled(sizes)
    made = storages_made(monkeypatch)
    incoming = received(incoming_for(sizes, 2**20), joined(sizes, storages), 2**20)
    arena, large, last = map(weakref.ref, made)
    made.clear()

    def alive() -> list[bool]:
        gc.collect()
        return [storage() is not None for storage in (arena, large, last)]

    first, second = present(incoming.storage(0)), present(incoming.storage(2))
    incoming.release(0)
    incoming.release(1)
    assert alive() == [True, True, True]
    incoming.release(2)
    incoming.release(3)
    assert alive() == [True, False, True]
    # A slice of an arena keeps the whole arena alive.
    del second
    assert alive() == [True, False, True]
    assert bytes(view_of(first)) == bytes(view_of(storages[0]))
    del first
    assert alive() == [False, False, True]


def test_storages_are_taken_and_let_go_while_others_arrive() -> None:
    sizes = [100, 3 * CHUNK, 0, 200, 300, SMALL, CHUNK]
    storages = filled(sizes)
    data = joined(sizes, storages)
    offsets, _ = layout(sizes)
    incoming = incoming_for(sizes, CHUNK)
    waiting = list(range(len(sizes)))
    for start in range(0, len(data), CHUNK):
        part = data[start : start + CHUNK]
        views, move = incoming.buffers_for(start, len(part))
        assert move is None
        for view in views:
            view[:], part = part[: len(view)], part[len(view) :]
        while waiting and offsets[waiting[0]] + sizes[waiting[0]] <= start + CHUNK:
            row = waiting.pop(0)
            assert bytes_at(incoming, row) == bytes(view_of(storages[row]))
            incoming.release(row)
    assert waiting == []


def test_padding_takes_no_memory() -> None:
    """Between two large storages lie at most 63 bytes of padding, for any size of chunk."""
    sizes = [SMALL + 1, SMALL]
    incoming = incoming_for(sizes, 2**26)
    tracemalloc.start()
    try:
        views, _ = incoming.buffers_for(0, layout(sizes)[1])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(view) for view in views] == [SMALL + 1, 63, SMALL]
    assert peak < 2**20


# Storages and existing tensors


@dataclass(frozen=True)
class Row:
    """One storage of a message, and where its bytes go."""

    size: int
    goes: str
    views: tuple[tuple[View, View], ...] = ()


def lines_of(size: int) -> st.SearchStrategy[View]:
    """A view of every n-th byte between two bytes of a storage."""

    def line(start: int, length: int, step: int) -> View:
        count = -(-min(length, size - start) // step)
        return View((count,), (step,), start, size - start - (count - 1) * step - 1)

    starts = st.integers(0, size - 1) | st.just(0)
    lengths = st.integers(1, size) | st.just(size)
    return st.builds(line, starts, lengths, st.sampled_from([1, 1, 1, 2, 3]))


@st.composite
def rows(draw: Callable[[Any], Any]) -> Row:
    sizes = st.integers(0, 200) | st.sampled_from([4096, SMALL, SMALL + 65, 3 * SMALL])
    size = draw(sizes)
    goes = draw(st.sampled_from(["cpu", "cpu", "nowhere", "meta", "routed", "routed"]))
    if goes != "routed" or size == 0:
        return Row(size, goes)
    pairs = []
    for source in draw(st.lists(lines_of(size), min_size=1, max_size=3)):
        stride = draw(st.sampled_from([(1,), (1,), (2,)]))
        pairs.append((source, View(source.shape, stride, draw(st.integers(0, 5)), 3)))
    return Row(size, goes, tuple(pairs))


@settings(max_examples=examples(150))
@given(
    st.lists(rows(), max_size=8),
    st.sampled_from([64, 4096, 100_032, 2**20]),
    st.booleans(),
    st.sampled_from([0, 2, 256]),
    st.randoms(use_true_random=False),
)
def test_each_byte_goes_where_it_belongs(
    message: list[Row], chunk: int, on_device: bool, buffers_max: int, random: Any
) -> None:
    sizes = [row.size for row in message]
    # Bound the number of chunks: thousands find no more than hundreds.
    chunk = chunk if sum(sizes) < 200 * chunk else 4096
    storages = filled(sizes)
    offsets, _ = layout(sizes)
    devices = {"cpu": CPU, "meta": META}
    routes, expected = [], []
    for offset, storage, row in zip(offsets, storages, message, strict=True):
        for source, destination in row.views:
            tensor = destination.random(torch.uint8)
            there = with_elements_of(tensor, source.over(storage, torch.uint8))
            expected.append((tensor, there))
            routes.append(Route(offset, source.on_meta(torch.uint8), tensor))
    random.shuffle(routes)
    copier = CopierOnCpu() if on_device else None
    incoming = incoming_for(
        sizes,
        chunk,
        devices=[devices.get(row.goes) for row in message],
        routes=routes,
        **staging(copier),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incoming_module, "_BUFFERS_MAX", buffers_max)
        received(incoming, joined(sizes, storages), chunk)
    incoming.check()
    assert all(bytes_of_storage(tensor) == there for tensor, there in expected)
    for arrived, storage, row in zip(incoming.storages(), storages, message, strict=True):
        assert (arrived is None) == (row.goes not in devices)
        if arrived is not None:
            assert (arrived.device, arrived.nbytes()) == (devices[row.goes], storage.nbytes())
        if arrived is not None and row.goes == "cpu":
            assert bytes(view_of(arrived)) == bytes(view_of(storage))
    if copier is not None:
        assert len(copier.slabs) <= 2


def line(count: int, offset: int = 0, step: int = 1) -> View:
    return View((count,), (step,), offset)


def route_to(tensor: torch.Tensor, source: View, storage_start: int = 0) -> Route:
    return Route(storage_start, source.on_meta(tensor.dtype), tensor)


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_large_tensors_are_received_where_they_are() -> None:
    sizes = [100, 3 * SMALL]
    (_, start), end = layout(sizes)
    tensor = torch.zeros(4 * SMALL, dtype=torch.uint8)[64 : 64 + 3 * SMALL]
    copier = CopierOnCpu()
    routes = [route_to(tensor, line(3 * SMALL), start)]
    incoming = incoming_for(sizes, SMALL, devices=[CPU, None], routes=routes, copier=copier)
    found = []
    for position in range(0, end, SMALL):
        views, move = incoming.buffers_for(position, min(SMALL, end - position))
        assert move is None
        found += [(address_of(view), len(view)) for view in views]
    # One storage, padding, and then the tensor, cut at the ends of chunks.
    cuts = [start, SMALL, 2 * SMALL, 3 * SMALL, end]
    pieces = itertools.pairwise(cuts)
    assert found[2:] == [(tensor.data_ptr() + at - start, to - at) for at, to in pieces]
    assert copier.slabs == []


@pytest.mark.parametrize(
    ("views", "nbytes"),
    [
        ([line(SMALL - 1)], SMALL - 1),
        ([line(SMALL, step=2)], 2 * SMALL),
        ([line(2 * SMALL), line(2 * SMALL)], 2 * SMALL),
        ([line(2 * SMALL), line(SMALL, 100)], 2 * SMALL),
        ([line(2 * SMALL), line(SMALL, SMALL - 1)], 2 * SMALL),
        # The last tensor overlaps with the first, which is not its neighbour.
        ([line(2 * SMALL), line(9, 5), line(SMALL, 2 * SMALL - 1)], 3 * SMALL),
    ],
    ids=["small", "with gaps", "twice", "one within the other", "overlapping", "in a chain"],
)
def test_other_tensors_are_received_through_slabs(views: list[View], nbytes: int) -> None:
    tensors = [torch.zeros(view.shape, dtype=torch.uint8) for view in views]
    routes = [route_to(tensor, view) for tensor, view in zip(tensors, views, strict=True)]
    copier = CopierOnCpu()
    incoming = incoming_for([nbytes], CHUNK, devices=[None], routes=routes, copier=copier)
    (storage,) = filled([nbytes])
    received(incoming, bytes(view_of(storage)), CHUNK)
    assert [slab.nbytes() for slab in copier.slabs] == [CHUNK, CHUNK]
    for tensor, view in zip(tensors, views, strict=True):
        assert torch.equal(tensor, view.over(storage, torch.uint8))


def test_an_arena_does_not_reach_over_what_goes_elsewhere() -> None:
    sizes = [100] * 5
    storages = filled(sizes)
    offsets, _ = layout(sizes)
    tensor = torch.zeros(100, dtype=torch.uint8)
    incoming = incoming_for(
        sizes,
        CHUNK,
        devices=[CPU, None, CPU, None, CPU],
        routes=[route_to(tensor, line(100), offsets[1])],
    )
    received(incoming, joined(sizes, storages), CHUNK)
    assert bytes_of_storage(tensor) == bytes(view_of(storages[1]))
    assert [n for n, storage in enumerate(incoming.storages()) if storage is None] == [1, 3]
    # Otherwise the memory of a dropped storage would stay alive in a shared arena.
    assert all(present(incoming.storage(row)).resizable() for row in (0, 2, 4))


def test_large_tensors_side_by_side_are_received_where_they_are() -> None:
    tensors = [torch.zeros(SMALL, dtype=torch.uint8) for _ in range(2)]
    routes = [route_to(tensor, line(SMALL, n * SMALL)) for n, tensor in enumerate(tensors)]
    incoming = incoming_for([2 * SMALL], 2 * SMALL, devices=[None], routes=routes)
    views, move = incoming.buffers_for(0, 2 * SMALL)
    assert move is None
    assert [address_of(view) for view in views] == [tensor.data_ptr() for tensor in tensors]


def test_tied_at_both_ends_is_received_once() -> None:
    tensor = torch.zeros(SMALL, dtype=torch.uint8)
    routes = [route_to(each, line(SMALL)) for each in (tensor, tensor, tensor.view(-1))]
    incoming = incoming_for([SMALL], CHUNK, devices=[None], routes=routes)
    views, move = incoming.buffers_for(0, CHUNK)
    assert move is None
    assert [address_of(view) for view in views] == [tensor.data_ptr()]
    copier = CopierOnCpu()
    options = {"devices": [None], "routes": routes, **staging(copier)}
    received(incoming_for([SMALL], CHUNK, **options), bytes(SMALL), CHUNK)
    assert copier.copied == SMALL


def test_a_chunk_that_waits_to_be_moved_is_not_overwritten() -> None:
    """Each chunk is moved only after the next one has arrived."""
    tensor = torch.zeros(5 * CHUNK // 2, dtype=torch.int16)
    data = bytes(view_of(filled([5 * CHUNK])[0]))
    routes = [route_to(tensor, line(len(tensor)))]
    incoming = incoming_for([5 * CHUNK], CHUNK, devices=[None], routes=routes, **staging(None))
    waiting: Callable[[], None] | None = None
    for start in range(0, len(data), CHUNK):
        (view,), move = incoming.buffers_for(start, CHUNK)
        view[:] = data[start : start + CHUNK]
        if waiting:
            waiting()
        waiting = move
    assert waiting is not None
    waiting()
    assert bytes_of_storage(tensor) == data


@pytest.mark.parametrize("count", [100, 2 * SMALL], ids=["small", "large"])
def test_a_tensor_that_changes_its_memory_is_noticed(count: int) -> None:
    tensor = torch.zeros(count, dtype=torch.uint8)
    before = tensor.detach()
    routes = [route_to(tensor, line(count))]
    incoming = incoming_for([count], CHUNK, devices=[None], routes=routes)
    incoming.check()
    tensor.data = torch.zeros(count, dtype=torch.uint8)
    with pytest.raises(MismatchError, match="changed its shape or its memory"):
        received(incoming, b"\1" * count, CHUNK)
    assert not tensor.any()
    assert not before.any()
    with pytest.raises(MismatchError):
        incoming.check()


def test_a_tensor_that_changes_its_memory_before_it_is_moved_is_noticed() -> None:
    tensor = torch.zeros(100, dtype=torch.uint8)
    incoming = incoming_for([100], CHUNK, devices=[None], routes=[route_to(tensor, line(100))])
    (view,), move = incoming.buffers_for(0, 100)
    view[:] = b"\1" * 100
    tensor.resize_(50)
    assert move is not None
    with pytest.raises(MismatchError):
        move()
    assert not tensor.any()


def test_a_message_keeps_neither_views_nor_tensors() -> None:
    tensor = torch.zeros(2 * SMALL, dtype=torch.uint8)
    routes = [route_to(tensor, line(2 * SMALL))]
    incoming = incoming_for([2 * SMALL], CHUNK, devices=[None], routes=routes)
    received(incoming, bytes(2 * SMALL), CHUNK)
    gone = weakref.ref(tensor.untyped_storage())
    del tensor, routes, incoming
    gc.collect()
    assert gone() is None
