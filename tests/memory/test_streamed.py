"""Tensors that are made during the save (``specs=``): equal bytes, and one tensor at a time."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.memory.device_copy import bytes_of
from aiotorchio.memory.streamed import StreamedPayload
from tests.support.payload_layouts import (
    CopierOnCpu,
    CountingCopier,
    filled,
    joined,
    layout,
    staging,
)
from tests.support.tiers import examples


class Producer:
    """Makes tensors on request, and checks that the tensor before has been freed."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._last: list[weakref.ref[object]] = []
        self.made = 0

    def __call__(self) -> torch.Tensor:
        assert [each for each in self._last if each() is not None] == []
        storage = filled([0] * self.made + [self._sizes[self.made]])[-1]
        tensor = bytes_of(storage)
        self._last = [weakref.ref(tensor), weakref.ref(storage)]
        self.made += 1
        return tensor


def chunk_of(
    payload: StreamedPayload, make: Callable[[], torch.Tensor], start: int, length: int
) -> list[memoryview]:
    steps = payload.collect_views(start, length)
    try:
        next(steps)
        while True:
            steps.send(make())
    except StopIteration as stop:
        views: list[memoryview] = stop.value
        assert sum(map(len, views)) == length
        assert all(map(len, views))
        return views


def streamed(
    payload: StreamedPayload, make: Callable[[], torch.Tensor], end: int, chunk: int
) -> bytes:
    data = bytearray()
    for start in range(0, end, chunk):
        # Free the views before the next chunk is made, as a driver does after it sent them.
        data += b"".join(chunk_of(payload, make, start, min(chunk, end - start)))
    return bytes(data)


sizes_of_tensors = st.lists(
    st.integers(0, 200) | st.sampled_from([0, 0, 1, 63, 64, 65, 4096, 20_001]), max_size=12
)
chunk_sizes = st.sampled_from([64, 192, 4096, 20_032, 2**16])


@settings(max_examples=examples(200))
@given(sizes_of_tensors, chunk_sizes, st.booleans())
def test_any_tensors_are_sent_one_at_a_time(sizes: list[int], chunk: int, on_device: bool) -> None:
    offsets, end = layout(sizes)
    copier = CopierOnCpu()
    options = staging(copier) if on_device else {"copier": copier}
    payload = StreamedPayload(offsets, sizes, chunk, **options)
    producer = Producer(sizes)
    assert streamed(payload, producer, end, chunk) == joined(sizes, filled(sizes))
    # Empty tensors after the last byte are not requested.
    assert producer.made == max((n + 1 for n, size in enumerate(sizes) if size), default=0)
    assert len(copier.slabs) <= 2
    assert copier.copied == on_device * sum(sizes)


@settings(max_examples=examples(50))
@given(sizes_of_tensors, chunk_sizes)
def test_a_chunk_holds_while_the_next_one_is_made(sizes: list[int], chunk: int) -> None:
    offsets, end = layout(sizes)
    payload = StreamedPayload(offsets, sizes, chunk, copier=CountingCopier())
    storages = filled(sizes)
    tensors = map(bytes_of, storages)
    sent: list[bytes] = []
    before: list[memoryview] = []
    for start in range(0, end, chunk):
        views = chunk_of(payload, lambda: next(tensors), start, min(chunk, end - start))
        sent.append(b"".join(before))
        before = views
    assert b"".join([*sent, *before]) == joined(sizes, storages)


def test_any_contiguous_tensor_is_sent_as_its_bytes() -> None:
    with torch.inference_mode():
        inference = torch.arange(5)
    tensors = [
        torch.nn.Parameter(torch.randn(3, 5)),
        torch.randn(10, 10)[4:7],
        torch.randn(7, dtype=torch.complex64)[3],
        inference,
        torch.tensor(True),
        torch.zeros(0, 4),
        torch.randn(1000).to(torch.float8_e4m3fn)[1:],
    ]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    storages = [tensor.detach().clone().untyped_storage() for tensor in tensors]
    offsets, end = layout(sizes)
    for chunk in (64, 128, 4096):
        for inside in (False, True):
            given_out = iter(tensors)
            with torch.inference_mode(inside):
                payload = StreamedPayload(offsets, sizes, chunk, copier=CountingCopier())
                data = streamed(payload, functools.partial(next, given_out), end, chunk)
            assert data == joined(sizes, storages)


def test_large_tensors_are_sent_without_a_copy() -> None:
    payload = StreamedPayload([0, 64], [10, 1000], 256, copier=CountingCopier())
    small, large = torch.zeros(10, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8)
    tensors = iter([small, large])
    slab, view = chunk_of(payload, lambda: next(tensors), 0, 256)
    assert (len(slab), len(view)) == (64, 192)
    large[5] = 77
    assert view[5] == 77
    for start in (256, 512, 768, 1024):
        (view,) = chunk_of(payload, lambda: next(tensors), start, min(256, 1064 - start))
        large[start - 64] = 78
        assert view[0] == 78


def test_what_aligns_is_zero_whatever_was_sent_before() -> None:
    """The staging buffers are reused, so the padding must be cleared each time."""
    sizes = [1] * 40
    offsets, end = layout(sizes)
    payload = StreamedPayload(offsets, sizes, 128, copier=CountingCopier())
    data = streamed(payload, lambda: full()[:1], end, 128)
    assert data == (b"\xff" + bytes(63)) * 39 + b"\xff"


def full() -> torch.Tensor:
    return torch.full((128,), 255, dtype=torch.uint8)


def test_a_device_that_fails_stops_the_chunk() -> None:
    options = staging(CountingCopier(1))
    payload = StreamedPayload([0], [128], 128, **options)
    with pytest.raises(RuntimeError, match="device lost"):
        chunk_of(payload, full, 0, 128)


def test_the_last_tensor_is_not_kept() -> None:
    payload = StreamedPayload([0], [128], 64, copier=CountingCopier())
    tensor = full()
    gone = weakref.ref(tensor.untyped_storage())
    given_out = [tensor]
    del tensor
    chunk_of(payload, given_out.pop, 0, 64)
    gc.collect()
    assert gone() is not None
    chunk_of(payload, given_out.pop, 64, 64)
    gc.collect()
    assert gone() is None
