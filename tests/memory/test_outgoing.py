"""Random storages are sent in chunks of random sizes, and received equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.memory.host import view_of
from aiotorchio.memory.outgoing import SMALL_STORAGE as SMALL
from aiotorchio.memory.outgoing import OutgoingPayload
from tests.support.payload_layouts import (
    CHUNK,
    CopierOnCpu,
    bytes_at,
    filled,
    incoming_for,
    joined,
    layout,
    received,
    staging,
)
from tests.support.tiers import examples


def sent(outgoing: OutgoingPayload, end: int, chunk: int) -> bytes:
    pieces = []
    for start in range(0, end, chunk):
        views = outgoing.chunk_views(start, min(chunk, end - start))
        pieces.append(b"".join(views))
        assert len(pieces[-1]) == min(chunk, end - start)
    return b"".join(pieces)


@settings(max_examples=examples(60))
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
    # Bound the number of chunks: thousands find no more than hundreds.
    chunk = chunk if sum(sizes) < 200 * chunk else 4096
    storages = filled(sizes)
    offsets, end = layout(sizes)
    copier = CopierOnCpu() if on_device else None
    outgoing = OutgoingPayload(storages, offsets, sizes, chunk, **staging(copier))
    assert outgoing.has_device_copies == (on_device and any(sizes))
    data = sent(outgoing, end, chunk)
    assert data == joined(sizes, storages)
    copier = CopierOnCpu() if on_device else None
    incoming = received(incoming_for(sizes, chunk, **staging(copier)), data, chunk)
    arrived = [bytes_at(incoming, row) for row in range(len(sizes))]
    assert arrived == [bytes(view_of(storage)) for storage in storages]
    if copier is not None:
        assert copier.copied == sum(sizes)
        assert len(copier.slabs) <= 2


def test_large_storages_are_sent_without_a_copy() -> None:
    storage = torch.UntypedStorage(SMALL)
    outgoing = OutgoingPayload([storage], [0], [SMALL], SMALL)
    (view,) = outgoing.chunk_views(0, SMALL)
    view[5] = 77
    assert storage[5] == 77


def test_small_storages_are_sent_as_one_buffer() -> None:
    sizes = [100] * 30
    outgoing = OutgoingPayload(filled(sizes), layout(sizes)[0], sizes, 2**20)
    assert len(outgoing.chunk_views(0, layout(sizes)[1])) == 1


def test_what_is_sent_holds_when_later_chunks_are_taken() -> None:
    sizes = [1000] * 20
    storages = filled(sizes)
    offsets, end = layout(sizes)
    outgoing = OutgoingPayload(storages, offsets, sizes, CHUNK)
    views = [view for start in range(0, end, CHUNK) for view in
             outgoing.chunk_views(start, min(CHUNK, end - start))]  # fmt: skip
    assert b"".join(views) == joined(sizes, storages)


@pytest.mark.parametrize("size", [100, 2 * SMALL])
def test_a_storage_that_is_resized_while_it_is_sent_is_noticed(size: int) -> None:
    storage = torch.UntypedStorage(size)
    outgoing = OutgoingPayload([storage], [0], [size], CHUNK)
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=f"of {size} bytes was resized to 0"):
        outgoing.chunk_views(0, min(size, CHUNK))
