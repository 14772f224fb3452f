"""Strided tensors drawn on a strip of constant size that moves along their common memory.

In: the footprints that ``conflicts`` could not separate by arithmetic. Out: the exact answer, for
any layout. It takes some tens of nanoseconds a byte, in a worker thread, and can be interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import boxes, order_of
from aiotorchio.overlap.extents import Extents, Footprint, Origin

__all__ = ["drawn_conflict", "drawn_filled"]

T = TypeVar("T")

# The length of the strip in units of memory; each takes 8 bytes on the strip.
_STRIP_UNITS = 2**20


def drawn_conflict(tensors: Sequence[tuple[T, Footprint, Origin]]) -> tuple[T, T] | None:
    """Answer ``conflicts.conflict`` for tensors with their keys."""
    strip = _Strip([each for _, each, _ in tensors])
    firsts = _firsts(*zip(*[(each, origin) for _, each, origin in tensors], strict=True))
    for position in strip.positions():
        near = [tensor for tensor in tensors if strip.near(position, tensor[1])]
        for n, (key, each, origin) in interruptible(enumerate(near if len(near) > 1 else ()), 10):
            for view, address, box in strip.views(position, each):
                ids = strip.ids(firsts[origin.kind], each, origin, box)
                differs = (view != 0) & (view != ids)
                if not bool(differs.any()):
                    view.copy_(ids)
                    continue
                index = differs.nonzero()[0].tolist()
                steps = zip(index, view.stride(), strict=True)
                address += sum(i * step for i, step in steps) * strip.unit
                own = _byte_at(each, origin, address)
                for other, its, source in near[:n]:
                    if _byte_at(its, source, address) not in (None, own):
                        return other, key
                raise AssertionError("the strip has an id for a byte of no tensor")
    return None


def drawn_filled(targets: Mapping[T, Footprint], others: Sequence[Footprint]) -> set[T]:
    """Answer ``conflicts.filled`` for targets with their keys."""
    left = dict(targets)
    strip = _Strip([*targets.values(), *others])
    for position in strip.positions():
        near = [(key, each) for key, each in left.items() if strip.near(position, each)]
        for each in interruptible(others if near else (), 10):
            if strip.near(position, each):
                for view, _, _ in strip.views(position, each, beyond=True):
                    view.fill_(1)
        for key, each in interruptible(near, 10):
            if not all(bool(view.all()) for view, _, _ in strip.views(position, each)):
                del left[key]
    return set(left)


class _Strip:
    """An id for each unit of a range of memory: 0 where nothing was drawn.

    Args:
        footprints: All tensors that will be drawn.

    Attributes:
        unit: Bytes of a unit. Elements begin and end at multiples of it, counted from the first.
        length: Bytes of memory that one position of the strip shows.
    """

    def __init__(self, footprints: Sequence[Footprint]) -> None:
        begin, end = min(each.start for each in footprints), max(each.end for each in footprints)
        unit = 0
        for each in interruptible(footprints, 100):
            steps = order_of(each.shape, each.stride).stride
            widths = (each.itemsize, *(step * each.itemsize for step in steps))
            unit = math.gcd(unit, each.start - begin, *widths)
        self._footprints, self.unit = footprints, unit
        self._margin = max(each.itemsize for each in footprints)
        self.length = min(_STRIP_UNITS * unit, end - begin)
        # An element can begin before the range, or end after it.
        self._units = torch.zeros((self.length + 3 * self._margin) // unit, dtype=torch.int64)

    def positions(self) -> Iterator[int]:
        """Yield the first address of each range with anything to draw; the strip is blank then."""
        extents = Extents((each.start, each.end, None) for each in self._footprints)
        for start, end in extents.ranges():
            for position in interruptible(range(start, end, self.length), 1):
                yield position
                self._units.zero_()

    def near(self, position: int, each: Footprint) -> bool:
        """Whether a tensor has bytes in a range, or directly next to it."""
        low, high = position - self._margin, position + self.length + self._margin
        return each.start < high and each.end > low

    def views(
        self, position: int, each: Footprint, *, beyond: bool = False
    ) -> Iterator[tuple[torch.Tensor, int, tuple[slice, ...]]]:
        """Yield the elements with bytes in a range, as boxes of units, with address and indices.

        Args:
            position: First address of the range.
            each: The tensor.
            beyond: Include elements that begin directly after the range.
        """
        order, base = order_of(each.shape, each.stride), position - self._margin
        low, high = base, position + self.length + (self._margin if beyond else 0)
        first, last = (
            order.before(max(-(-(address - each.start) // each.itemsize), 0))
            for address in (low, high)
        )
        width = each.itemsize // self.unit
        for box in boxes(order.shape, first, last):
            corner = sum(part.start * step for part, step in zip(box, order.stride, strict=True))
            address = each.start + corner * each.itemsize
            sizes = [part.stop - part.start for part in box]
            steps = [step * width for step in order.stride]
            at = (address - base) // self.unit
            yield self._units.as_strided([*sizes, width], [*steps, 1], at), address, box

    def ids(
        self, first: int, each: Footprint, origin: Origin, box: tuple[slice, ...]
    ) -> torch.Tensor:
        """Return the ids to draw for a box of elements: equal ids for equal origins.

        Args:
            first: The first id of the kind of origin.
            each: The tensor.
            origin: The origin of its elements.
            box: Indices, in the order of ``views``.
        """
        if origin.offset is None:
            return torch.tensor(first)
        found = torch.arange(0, each.itemsize, self.unit) + first + origin.offset * each.itemsize
        dims = order_of(each.shape, each.stride).dims
        for n, (dim, part) in enumerate(zip(dims, box, strict=True)):
            indices = torch.arange(part.start, part.stop) * (origin.stride[dim] * each.itemsize)
            found = found + indices.view(-1, *[1] * (len(dims) - n))
        return found


def _firsts(footprints: Iterable[Footprint], origins: Iterable[Origin]) -> dict[int, int]:
    """Return the first id of each kind of origin.

    The byte at position p of the origin gets the id first + p, and the ids of two kinds never meet.
    """
    lengths: dict[int, int] = {}
    for each, origin in zip(footprints, origins, strict=True):
        steps = (
            (size - 1) * step for size, step in zip(each.shape, origin.stride, strict=False) if size
        )
        length = ((origin.offset or 0) + sum(steps) + 1) * each.itemsize
        lengths[origin.kind] = max(lengths.get(origin.kind, 0), length)
    found, first = {}, 1
    for kind, length in lengths.items():
        found[kind] = first
        first += length
    return found


def _byte_at(each: Footprint, origin: Origin, address: int) -> object:
    """Return the origin of a byte of a tensor; None if the byte is not in the tensor."""
    order, left = order_of(each.shape, each.stride), address - each.start
    position = origin.offset or 0
    for dim, size, step in zip(order.dims, order.shape, order.stride, strict=True):
        index = min(max(left // (step * each.itemsize), 0), size - 1)
        left -= index * step * each.itemsize
        position += index * (origin.stride[dim] if origin.stride else 0)
    if not 0 <= left < each.itemsize:
        return None
    position = position * each.itemsize + left
    return origin.kind, None if origin.offset is None else position
