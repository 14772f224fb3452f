"""Gathered elements of any view, compared with the contiguous tensor that torch makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.common.strides import Part, order_of
from aiotorchio.memory.device_copy import Here, bytes_of
from aiotorchio.memory.gather import Gathered
from aiotorchio.memory.host import view_of
from aiotorchio.memory.outgoing import SMALL_STORAGE as SMALL
from aiotorchio.memory.outgoing import OutgoingPayload
from tests.support.payload_layouts import CopierOnCpu, View, raw, shapes, staging, views
from tests.support.tiers import examples

DTYPES = [torch.uint8, torch.int16, torch.float32, torch.int64, torch.complex128]


def part_of(view: View, itemsize: int, at: int = 0) -> Part:
    order = order_of(view.shape, view.stride)
    return Part(at, view.offset * itemsize, itemsize, tuple(order.shape), tuple(order.stride))


def contiguous(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements in the order of their addresses."""
    order = order_of(tuple(tensor.shape), tensor.stride())
    base = tensor[tuple(slice(None) if n in order.dims else 0 for n in range(tensor.dim()))]
    left = sorted(order.dims)
    moved = base.permute([left.index(dim) for dim in order.dims])
    return bytes(raw(moved).flatten().tolist())


@settings(max_examples=examples(150))
@given(
    data=st.data(),
    view=shapes.flatmap(lambda shape: views(shape)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_range(data: st.DataObject, view: View, dtype: torch.dtype) -> None:
    tensor = view.random(dtype)
    part = part_of(view, dtype.itemsize)
    packed, expected = Gathered(tensor.untyped_storage(), part), contiguous(tensor)
    assert part.nbytes == len(expected)
    cut = st.sampled_from([*range(0, len(expected), 64), len(expected)])
    first, last = sorted((data.draw(cut), data.draw(cut)))
    # The part begins after other bytes, as in a staging buffer.
    before = 64 * data.draw(st.integers(0, 2))
    memory = torch.full((before + last - first + 64,), 0xEE, dtype=torch.uint8)
    packed.copy(memory[before : before + last - first], first, last, Here())
    assert bytes(memory[:before].tolist()) == b"\xee" * before
    assert bytes(memory[before:-64].tolist()) == expected[first:last]
    assert bytes(memory[-64:].tolist()) == b"\xee" * 64


@pytest.mark.parametrize("requires_grad", [False, True])
def test_in_any_mode(requires_grad: bool) -> None:
    tensor = torch.rand(30, 40, requires_grad=requires_grad)
    with torch.inference_mode():
        packed = Gathered(tensor.untyped_storage(), Part(0, 8, 4, (30, 3), (40, 1)))
        memory = torch.UntypedStorage(360)
        packed.copy(bytes_of(memory), 0, 360, Here())
    assert bytes(view_of(memory)) == bytes(raw(tensor.detach()[:, 2:5]).flatten().tolist())
    assert tensor._version == 0


def test_beyond_the_storage() -> None:
    with pytest.raises(ValueError, match="beyond a storage of 400 bytes"):
        Gathered(torch.UntypedStorage(400), Part(0, 8, 4, (11, 3), (10, 1)))


# ------------------------------------------------------------------------------ in a payload


def sent(payload: OutgoingPayload, end: int, chunk: int) -> bytes:
    data = bytearray()
    for start in range(0, end, chunk):
        views = payload.chunk_views(start, min(chunk, end - start))
        assert sum(map(len, views)) == min(chunk, end - start)
        data += b"".join(views)
    return bytes(data)


@settings(max_examples=examples(60))
@given(
    rows=st.sampled_from([1, 2, 7, 100, 1000]),
    blocks=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    itemsize=st.sampled_from([1, 2, 4, 8, 16]),
    chunk=st.sampled_from([64, 4096, 2**17]),
    on_device=st.booleans(),
)
def test_parts_of_a_storage_between_others(
    rows: int, blocks: list[int], itemsize: int, chunk: int, on_device: bool
) -> None:
    """Blocks of columns of one matrix, between two small storages."""
    chunk = 4096 if rows * sum(blocks) * itemsize > 200 * chunk else chunk
    columns = 2 * sum(blocks)
    matrix = torch.randint(256, (rows, columns * itemsize), dtype=torch.uint8)
    other = torch.arange(100, dtype=torch.uint8)
    parts, expected, at, column = [], [], 0, 0
    for width in blocks:
        part = Part(at, column * itemsize, itemsize, (rows, width), (columns, 1))
        parts.append(part)
        block = matrix[:, column * itemsize : (column + width) * itemsize]
        expected.append(bytes(block.flatten().tolist()))
        at += part.nbytes
        column += 2 * width
    sizes = [100, at, 100]
    offsets = [0, 128, 128 + -(-at // 64) * 64]
    copier = CopierOnCpu() if on_device else None
    options: dict[str, Any] = staging(copier)
    payload = OutgoingPayload(
        [storage.untyped_storage() for storage in (other, matrix, other)],
        offsets,
        sizes,
        chunk,
        parts={1: parts},
        **options,
    )
    data = sent(payload, offsets[2] + 100, chunk)
    small = bytes(range(100))
    middle = b"".join(expected).ljust(offsets[2] - 128, b"\0")
    assert data == small.ljust(128, b"\0") + middle + small
    if copier is not None:
        assert len(copier.slabs) <= 2
        assert copier.copied == at + 200


@pytest.mark.parametrize("gap", [1, 15])
@pytest.mark.parametrize("size", [100, 2 * SMALL])
def test_zeros_between_parts(gap: int, size: int) -> None:
    storage = torch.full((2 * size,), 0xEE, dtype=torch.uint8)
    storage[:size] = 1
    parts = [Part(gap, 0, 1, (size - 10,), (1,)), Part(size + 2 * gap, 5, 1, (size - 5,), (1,))]
    payload = OutgoingPayload(
        [storage.untyped_storage()], [0], [2 * size + 2 * gap - 5], 2**20, parts={0: parts}
    )
    data = sent(payload, 2 * size + 2 * gap - 5, 2**20)
    zeros = b"\0" * (10 + gap)
    assert data == b"\0" * gap + b"\1" * (size - 10) + zeros + b"\1" * (size - 5)


def test_packed_bytes_are_nobody_elses() -> None:
    matrix = torch.zeros(1000, 200)
    part = Part(0, 0, 4, (1000, 100), (200, 1))
    payload = OutgoingPayload(
        [matrix.untyped_storage()], [0], [part.nbytes], 2**20, parts={0: [part]}
    )
    (view,) = payload.chunk_views(0, part.nbytes)
    assert not payload.borrows
    matrix.fill_(1)
    assert not any(view)


def test_dense_parts_are_sent_without_a_copy() -> None:
    matrix = torch.zeros(1000, 200, dtype=torch.uint8)
    part = Part(0, 400, 1, (500, 200), (200, 1))
    assert part.dense
    payload = OutgoingPayload(
        [matrix.untyped_storage()], [0], [part.nbytes], 2**20, parts={0: [part]}
    )
    (view,) = payload.chunk_views(0, part.nbytes)
    assert payload.borrows
    matrix[2, 0] = 77
    assert view[0] == 77


@pytest.mark.parametrize("dense", [False, True])
def test_a_storage_that_is_resized(dense: bool) -> None:
    matrix = torch.zeros(1000, 200, dtype=torch.uint8)
    part = Part(0, 0, 1, (1000, 200 - (not dense)), (200, 1))
    payload = OutgoingPayload(
        [matrix.untyped_storage()], [0], [part.nbytes], 4096, parts={0: [part]}
    )
    payload.chunk_views(0, 4096)
    matrix.untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match="of 200000 bytes was resized to 100"):
        payload.chunk_views(4096, 4096)
