"""Strided views in the order of their addresses: the elements in a range of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Order", "Part", "boxes", "order_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a storage that are sent without the bytes between them.

    Attributes:
        at: First byte among the sent bytes of the storage.
        start: First byte in the storage.
        itemsize: Bytes of an element.
        shape: Elements in each dimension, from the widest stride to the narrowest.
        stride: Elements between neighbours in each dimension; addresses grow with the indices.
    """

    at: int
    start: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes that are sent."""
        return math.prod(self.shape) * self.itemsize

    @property
    def dense(self) -> bool:
        """Whether there are no bytes between the elements."""
        return order_of(self.shape, self.stride).dense


# A model has few layouts: a cached one takes 0.3 us, a new one 5.
@lru_cache(maxsize=4096)
def order_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> Order:
    """Return the ``Order`` of a layout; it is shared and must not be changed."""
    return Order(shape, stride)


class Order:
    """The elements of a strided view, in the order of their addresses.

    Args:
        shape: Elements in each dimension.
        stride: Elements between neighbours in each dimension.

    Attributes:
        dims: Dimensions of more than one element, from the widest stride to the narrowest; none
            if there are no elements.
        expanded: Dimensions of stride 0, in which all elements have one address.
        shape: Elements in each of ``dims``.
        stride: Stride of each of ``dims``.
        count: Distinct elements.
        extent: Elements of memory from the first to the last, both included.
        distinct: Whether all indices of ``dims`` have different addresses that grow with the
            indices. If not (windows of ``unfold``), no other attribute has a meaning.
    """

    __slots__ = ("count", "dims", "distinct", "expanded", "extent", "shape", "stride")

    def __init__(self, shape: Sequence[int], stride: Sequence[int]) -> None:
        empty = 0 in shape
        wide = [] if empty else [dim for dim, size in enumerate(shape) if size > 1]
        self.expanded = [dim for dim in wide if stride[dim] == 0]
        self.dims = sorted(
            (dim for dim in wide if stride[dim]), key=stride.__getitem__, reverse=True
        )
        self.shape = [shape[dim] for dim in self.dims]
        self.stride = [stride[dim] for dim in self.dims]
        self.count = 0 if empty else math.prod(self.shape)
        self.extent, self.distinct = self.count and 1, True
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            self.distinct = self.distinct and step >= self.extent
            self.extent += (size - 1) * step

    @property
    def dense(self) -> bool:
        """Whether the elements fill their extent, each once."""
        return self.distinct and not self.expanded and self.count == self.extent

    def before(self, address: int) -> int:
        """Count the distinct elements before an address, which counts elements from the first."""
        count, inner = 0, self.count
        for size, step in zip(self.shape, self.stride, strict=True):
            inner //= size
            whole = min(address // step, size)
            count += whole * inner
            if whole == size:
                return count
            address -= whole * step
        return count + (address > 0)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Cut a run of elements in row-major order into boxes, at most two for each dimension.

    Args:
        shape: Elements in each dimension.
        start: First element, counted in row-major order.
        stop: First element after the run.

    Yields:
        A slice for each dimension.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    first, before = divmod(start, inner)
    last, behind = divmod(stop, inner)
    if first == last:
        for box in boxes(shape[1:], before, behind):
            yield (slice(first, first + 1), *box)
        return
    if before:
        for box in boxes(shape[1:], before, inner):
            yield (slice(first, first + 1), *box)
        first += 1
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    for box in boxes(shape[1:], 0, behind):
        yield (slice(last, last + 1), *box)
