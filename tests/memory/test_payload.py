"""Storages to chunks to storages: whatever their sizes, wherever the chunks end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.memory import payload
from aiotorchio.memory.host import view_of
from aiotorchio.memory.payload import IncomingPayload, OutgoingPayload

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = payload.SMALL_STORAGE
CHUNK = 4096


def filled(sizes: Sequence[int]) -> list[torch.UntypedStorage]:
    storages = []
    for n, size in enumerate(sizes):
        storage = torch.UntypedStorage(size)
        view_of(storage)[:] = bytes((n + at) % 251 for at in range(size))
        storages.append(storage)
    return storages


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets at multiples of 64, and the size of the whole."""
    offsets, end = [], 0
    for size in sizes:
        start = -(-end // 64) * 64
        offsets.append(start)
        end = start + size if size else end
    return offsets, end


def joined(sizes: Sequence[int], storages: Sequence[torch.UntypedStorage]) -> bytes:
    """The payload as SPEC.md section 4.1 describes it, made in the simplest way."""
    offsets, end = layout(sizes)
    data = bytearray(end)
    for offset, storage in zip(offsets, storages, strict=True):
        if storage.nbytes():
            data[offset : offset + storage.nbytes()] = view_of(storage)
    return bytes(data)


def sent(outgoing: OutgoingPayload, end: int, chunk: int) -> bytes:
    pieces = []
    for start in range(0, end, chunk):
        views = outgoing.chunk(start, min(chunk, end - start))
        pieces.append(b"".join(views))
        assert len(pieces[-1]) == min(chunk, end - start)
    return b"".join(pieces)


def received(incoming: IncomingPayload, data: bytes, chunk: int) -> list[bytes]:
    for start in range(0, len(data), chunk):
        views, move = incoming.chunk(start, min(chunk, len(data) - start))
        position = start
        for view in views:
            view[:] = data[position : position + len(view)]
            position += len(view)
        assert position == min(start + chunk, len(data))
        if move:
            move()
    return [bytes(view_of(storage)) for storage in incoming.storages()]


def incoming_for(sizes: Sequence[int], chunk: int, **options: Any) -> IncomingPayload:
    offsets, _ = layout(sizes)
    return IncomingPayload(offsets, sizes, sizes, [CPU] * len(sizes), chunk, **options)


class CopierOnCpu:
    """Stands for a device: counts its slabs, and refuses to copy from slab to slab."""

    def __init__(self) -> None:
        self.slabs: list[torch.UntypedStorage] = []
        self.copied = 0

    def slab(self, nbytes: int) -> torch.UntypedStorage:
        self.slabs.append(torch.UntypedStorage(nbytes))
        return self.slabs[-1]

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert destination.shape == source.shape
        assert destination.dtype == source.dtype == torch.uint8
        addresses = {slab.data_ptr() for slab in self.slabs}
        ends = [
            tensor.untyped_storage().data_ptr() in addresses for tensor in (destination, source)
        ]
        assert sum(ends) == 1
        destination.copy_(source)
        self.copied += len(source)


def staged(_: torch.device) -> bool:
    return True


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(
            st.integers(0, 200),
            st.sampled_from([0, 63, 64, 65, 4096, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL]),
        ),
        max_size=12,
    ),
    chunk=st.sampled_from([64, 4096, 100_032, 2**20]),
    on_device=st.booleans(),
)
def test_any_storages_arrive_as_they_were(sizes: list[int], chunk: int, on_device: bool) -> None:
    storages = filled(sizes)
    offsets, end = layout(sizes)
    options: dict[str, Any] = {}
    if on_device:
        options = {"copier": CopierOnCpu(), "staged": staged}
    outgoing = OutgoingPayload(storages, offsets, sizes, chunk, **options)
    assert outgoing.has_staged == (on_device and any(sizes))
    data = sent(outgoing, end, chunk)
    assert data == joined(sizes, storages)
    if on_device:
        options = {"copier": CopierOnCpu(), "staged": staged}
    arrived = received(incoming_for(sizes, chunk, **options), data, chunk)
    assert arrived == [bytes(view_of(storage)) for storage in storages]
    if on_device:
        assert options["copier"].copied == sum(sizes)
        assert len(options["copier"].slabs) <= 2


def test_large_storages_are_sent_without_a_copy() -> None:
    storage = torch.UntypedStorage(SMALL)
    outgoing = OutgoingPayload([storage], [0], [SMALL], SMALL)
    (view,) = outgoing.chunk(0, SMALL)
    view[5] = 77
    assert storage[5] == 77


def test_small_storages_are_sent_as_one_buffer() -> None:
    sizes = [100] * 30
    outgoing = OutgoingPayload(filled(sizes), layout(sizes)[0], sizes, 2**20)
    assert len(outgoing.chunk(0, layout(sizes)[1])) == 1


def test_what_is_sent_holds_when_later_chunks_are_taken() -> None:
    sizes = [1000] * 20
    storages = filled(sizes)
    offsets, end = layout(sizes)
    outgoing = OutgoingPayload(storages, offsets, sizes, CHUNK)
    views = [view for start in range(0, end, CHUNK) for view in
             outgoing.chunk(start, min(CHUNK, end - start))]  # fmt: skip
    assert b"".join(views) == joined(sizes, storages)


def test_memory_comes_with_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real: Callable[..., torch.UntypedStorage] = torch.UntypedStorage

    def counting(nbytes: int, **options: Any) -> torch.UntypedStorage:
        made.append(nbytes)
        return real(nbytes, **options)

    sizes = [SMALL, 2**50, SMALL]
    incoming = incoming_for(sizes, CHUNK)
    monkeypatch.setattr(torch, "UntypedStorage", counting)
    assert made == []
    incoming.chunk(0, CHUNK)
    incoming.chunk(CHUNK, CHUNK)
    assert made == [SMALL]


def test_no_memory_is_a_memory_error() -> None:
    incoming = incoming_for([2**62], CHUNK)
    with pytest.raises(MemoryError, match=str(2**62)):
        incoming.chunk(0, CHUNK)


def test_small_storages_share_an_arena_and_large_ones_do_not() -> None:
    sizes = [100, 200, 2 * SMALL, 300]
    data = joined(sizes, filled(sizes))
    incoming = incoming_for(sizes, 2**20)
    received(incoming, data, 2**20)
    first, second, large, last = incoming.storages()
    assert second.data_ptr() - first.data_ptr() == 128
    assert [storage.nbytes() for storage in (first, second, large, last)] == sizes
    assert large.resizable()
    assert not first.resizable()
    # Alone in its arena, a small storage is that arena.
    assert last.resizable()


def test_an_arena_keeps_little_alive() -> None:
    sizes = [SMALL - 64] * 200
    incoming = incoming_for(sizes, 2**20)
    data = joined(sizes, filled(sizes))
    received(incoming, data, 2**20)
    storages = incoming.storages()
    spans: list[list[int]] = []
    for storage in storages:
        start = storage.data_ptr()
        if not spans or start != spans[-1][1]:
            spans.append([start, start])
        spans[-1][1] = start + storage.nbytes()
    assert all(end - start <= payload.ARENA_MAX + 64 * len(sizes) for start, end in spans)


def test_what_goes_to_meta_is_dropped() -> None:
    sizes = [5000, 100, 5000]
    storages = filled(sizes)
    data = joined(sizes, storages)
    offsets, _ = layout(sizes)
    incoming = IncomingPayload(offsets, sizes, sizes, [META, CPU, META], CHUNK)
    for start in range(0, len(data), CHUNK):
        length = min(CHUNK, len(data) - start)
        views, move = incoming.chunk(start, length)
        assert move is None
        position = start
        for view in views:
            view[:] = data[position : position + len(view)]
            position += len(view)
        # Nothing of a chunk may be written over by the rest of it: it is verified as a whole.
        assert b"".join(views) == data[start : start + length]
    first, kept, last = incoming.storages()
    assert (first.device, last.device) == (META, META)
    assert [first.nbytes(), last.nbytes()] == [5000, 5000]
    assert bytes(view_of(kept)) == bytes(view_of(storages[1]))


def test_storages_without_bytes_have_their_size_and_place() -> None:
    incoming = IncomingPayload([0, 0], [0, 0], [0, 2**40], [CPU, META], CHUNK)
    empty, meta = incoming.storages()
    assert (empty.nbytes(), empty.device) == (0, CPU)
    assert (meta.nbytes(), meta.device) == (2**40, META)


@pytest.mark.parametrize("size", [100, 2 * SMALL])
def test_a_storage_that_is_resized_while_it_is_sent_is_noticed(size: int) -> None:
    storage = torch.UntypedStorage(size)
    outgoing = OutgoingPayload([storage], [0], [size], CHUNK)
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=f"of {size} bytes was resized to 0"):
        outgoing.chunk(0, min(size, CHUNK))
