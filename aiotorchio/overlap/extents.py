"""The extents of tensors in memory, as numbers, and the search for extents that meet.

In: plain strided tensors, or ranges of addresses. Out: their addresses, and which of them meet. All
functions read shapes, strides and addresses only, and raise nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import order_of

__all__ = [
    "Extents",
    "Footprint",
    "Origin",
    "extents_of",
    "footprint",
    "runs_of",
]

T = TypeVar("T")


class Footprint(NamedTuple):
    """The memory of a tensor in which no two elements share a byte (``Order.distinct``).

    ``start`` is the address of the first byte, ``end`` the one after the last.
    """

    start: int
    end: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Origin(NamedTuple):
    """The source of the elements of a tensor that is filled by copies.

    Attributes:
        kind: Equal for elements that are copied from one storage in one way.
        offset: Position of the first element, in elements; None if only ``kind`` matters.
        stride: The distance between positions, in each dimension.
    """

    kind: int
    offset: int | None = None
    stride: tuple[int, ...] = ()


def footprint(tensor: torch.Tensor) -> Footprint:
    """Return the memory of a plain strided tensor."""
    shape, stride, itemsize = tensor.shape, tensor.stride(), tensor.element_size()
    start = tensor.data_ptr()
    return Footprint(start, start + extent_of(tensor), itemsize, shape, stride)


def extent_of(tensor: torch.Tensor) -> int:
    """Return the number of bytes from the first element of a strided tensor to its last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    return order_of(tensor.shape, tensor.stride()).extent * tensor.element_size()


class Extents(Generic[T]):
    """Ranges of memory on one device, in the order of their addresses.

    Args:
        ranges: First address, the one after the last, and the key of each range.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, T]]) -> None:
        ordered = sorted(ranges, key=_ends)
        self._starts = [start for start, _, _ in ordered]
        self._ends = [end for _, end, _ in ordered]
        self._keys = [key for _, _, key in ordered]
        # The furthest end so far. These are lists of numbers, which the garbage collector skips.
        self._reached = list(accumulate(self._ends, max))

    def __iter__(self) -> Iterator[tuple[int, int, T]]:
        return zip(self._starts, self._ends, self._keys, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def _clusters(self) -> Iterator[tuple[int, int]]:
        first = 0
        for n, reached in interruptible(enumerate(self._reached, 1)):
            if n == len(self._starts) or self._starts[n] >= reached:
                yield first, n
                first = n

    def together(self) -> Iterator[list[T]]:
        """Yield the keys of ranges that meet, directly or through others, in groups of several."""
        for first, last in self._clusters():
            if last - first > 1:
                yield self._keys[first:last]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the memory that they cover: first address, and the one after the last."""
        for first, last in self._clusters():
            yield self._starts[first], self._reached[last - 1]

    def meeting(self, start: int, end: int) -> Iterator[T]:
        """Yield the keys of ranges with an address in this one, from the last to the first."""
        n = bisect_left(self._starts, end)
        while n and self._reached[n - 1] > start:
            n -= 1
            if self._ends[n] > start:
                yield self._keys[n]


def _ends(extent: tuple[int, int, object]) -> tuple[int, int]:
    return extent[:2]


def extents_of(tensors: Mapping[str, torch.Tensor]) -> dict[torch.device, Extents[str]]:
    """Return the extents of plain strided tensors, by device, but none without elements."""
    by_device: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, tensor in interruptible(tensors.items()):
        nbytes = extent_of(tensor)
        if nbytes:
            start = tensor.data_ptr()
            by_device.setdefault(tensor.device, []).append((start, start + nbytes, name))
    return {device: Extents(found) for device, found in by_device.items()}


def runs_of(each: Footprint) -> tuple[tuple[int, int], ...]:
    """Return count and step in bytes of each dimension, widest first; the last one has step 1."""
    order = order_of(each.shape, each.stride)
    found = [(each.itemsize, 1)]
    for size, step in zip(reversed(order.shape), reversed(order.stride), strict=True):
        count, width = found[-1]
        if step * each.itemsize == count * width:
            found[-1] = (size * count, width)
        else:
            found.append((size, step * each.itemsize))
    return tuple(reversed(found))
