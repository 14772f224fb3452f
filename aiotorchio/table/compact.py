"""Storages without the gaps between their tensors, for ``compact=True``.

In: the rows of an object. Out: the same rows over smaller storages, and the ranges to send.
``graph.flatten`` calls it.

The strides of the largest view of a storage, from the widest to the narrowest, are a lattice. In
it, a view is a box, and views whose boxes do not meet have no element in common: they are packed
separately. Views whose boxes meet are packed together, as the smallest box around theirs: its
elements one after the other, with new strides. Views that are no boxes in the lattice (other item
sizes, the windows of ``unfold``) keep all bytes from the first to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from aiotorchio.common.strides import Order, Part, order_of
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import META_LOCATION, StorageRow, TensorRow

__all__ = ["compact"]

# The number of views with overlapping ranges of bytes up to which each pair is compared.
_COMPARED_MAX = 256


_Box = list[range]  # a range for each dimension of a lattice


@dataclass(slots=True)
class _View:
    """A tensor over a storage: its row, and its bytes, from the first to the one after the last."""

    row: TensorRow
    itemsize: int
    order: Order
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.order.count * self.itemsize


def compact(
    tensors: Sequence[TensorRow],
    storages: Sequence[StorageRow],
    locations: Sequence[str],
    direct_storages: Iterable[int],
) -> tuple[dict[int, list[Part]], int]:
    """Change the rows to rows of smaller storages.

    Args:
        tensors: Tensor rows; their offsets and strides are changed in place.
        storages: Storage rows; their sizes are changed in place.
        locations: The location tags of the header.
        direct_storages: Storages that the object refers to directly; they stay as they are.

    Returns:
        The ranges to send of each smaller storage, by number, and the number of bytes left out.
    """
    views: dict[int, list[_View]] = {}
    for row in tensors:
        itemsize = DTYPES[row.dtype].itemsize
        order = order_of(tuple(row.shape), tuple(row.stride))
        start = row.offset * itemsize
        end = start + order.extent * itemsize
        views.setdefault(row.storage, []).append(_View(row, itemsize, order, start, end))
    parts: dict[int, list[Part]] = {}
    left_out = 0
    for index in views.keys() - set(direct_storages):
        storage = storages[index]
        if locations[storage.location] == META_LOCATION or storage.nbytes == _shown(views[index]):
            continue
        if any(view.end > storage.nbytes for view in views[index] if view.nbytes):
            # The storage was resized below a tensor. The receiver refuses such a row.
            continue
        fitted = _Fitted(views[index], storage.nbytes)
        if fitted.nbytes >= storage.nbytes:
            continue
        fitted.settle()
        parts[index] = fitted.parts
        left_out += storage.nbytes - fitted.nbytes
        storage.nbytes = fitted.nbytes
    return parts, left_out


def _shown(views: Sequence[_View]) -> int:
    """Return the bytes of the first view, if it is dense: in most storages, it shows all bytes."""
    return views[0].nbytes if views[0].order.dense else -1


class _Fitted:
    """The views of one storage, fitted to a smaller storage.

    Args:
        views: All views of the storage.
        available: Bytes of the storage.

    Attributes:
        parts: The ranges of the storage that remain.
        nbytes: The size of the smaller storage.
    """

    def __init__(self, views: Sequence[_View], available: int) -> None:
        self._available = available
        self.parts: list[Part] = []
        self.nbytes = 0
        self._settled: list[tuple[TensorRow, int, tuple[int, ...]]] = []
        for view in views:
            if not view.nbytes:
                self._settled.append((view.row, 0, tuple(view.row.stride)))
        for group in _groups(view for view in views if view.nbytes):
            for component in _components(group):
                self._fit(component)

    def settle(self) -> None:
        """Change the rows."""
        for row, offset, stride in self._settled:
            row.offset, row.stride = offset, stride

    def _fit(self, component: _Component) -> None:
        views = component.views
        start, end = min(view.start for view in views), max(view.end for view in views)
        # Elements stay aligned to their size.
        size = max(view.itemsize for view in views)
        packed = component.packed(self._available)
        if packed is None or packed.nbytes >= end - start:
            at = self.nbytes + (start - self.nbytes) % size
            self.parts.append(Part(at, start, 1, (end - start,), (1,)))
            for view in views:
                offset = (view.start - start + at) // view.itemsize
                self._settled.append((view.row, offset, tuple(view.row.stride)))
        else:
            at = self.nbytes + -self.nbytes % size
            self.parts.append(packed.part(at))
            for view in views:
                offset, stride = packed.place(view)
                self._settled.append((view.row, at // size + offset, stride))
        self.nbytes = at + self.parts[-1].nbytes


def _groups(views: Iterable[_View]) -> Iterator[list[_View]]:
    """Yield views whose ranges of bytes meet, in groups, in the order of their addresses."""
    group: list[_View] = []
    end = 0
    for view in sorted(views, key=lambda view: view.start):
        if group and view.start >= end:
            yield group
            group, end = [], 0
        group.append(view)
        end = max(end, view.end)
    if group:
        yield group


@dataclass(slots=True)
class _Component:
    """Views that are packed together.

    Attributes:
        views: The views.
        lattice: The lattice in which all of them are boxes; None if there is none.
        boxes: The box of each view.
    """

    views: list[_View]
    lattice: _Lattice | None = None
    boxes: list[_Box] = field(default_factory=list)

    def packed(self, available: int) -> _Packed | None:
        """Return the smallest box around all boxes, packed; None if the storage lacks a part."""
        if self.lattice is None:
            return None
        sides = zip(*self.boxes, strict=True)
        box = [range(min(r.start for r in side), max(r.stop for r in side)) for side in sides]
        if not self.lattice.is_distinct(box):
            return None
        packed = _Packed(self.lattice, box)
        # A corner may be outside the storage.
        return packed if packed.start >= 0 and packed.end <= available else None


class _Lattice:
    """Strides, counted from the first element of one view, from the widest to the narrowest.

    Args:
        lead: The view whose strides they are.
        views: All views that may be boxes in it.
    """

    def __init__(self, lead: _View, views: Sequence[_View]) -> None:
        self.start, self.itemsize = lead.start, lead.itemsize
        shape, stride = lead.order.shape, lead.order.stride
        # Two dimensions that are contiguous with each other count as one.
        self.steps = [
            step
            for n, step in enumerate(stride)
            if n + 1 == len(stride) or step != shape[n + 1] * stride[n + 1]
        ]
        # The distances between the views can need a narrower step.
        distances = [(view.start - lead.start) // lead.itemsize for view in views]
        narrowest = math.gcd(*distances, *(n for view in views for n in view.order.stride))
        if narrowest and (not self.steps or narrowest < self.steps[-1]):
            self.steps.append(narrowest)

    def box(self, view: _View) -> _Box | None:
        """Return the box of a view, which may reach beyond the lead; None if the view is no box."""
        if view.itemsize != self.itemsize or (view.start - self.start) % self.itemsize:
            return None
        corner = self.index((view.start - self.start) // self.itemsize)
        stops = [n + 1 for n in corner]
        for dim in view.order.dims:
            for n, distance in enumerate(self.index(view.row.stride[dim])):
                stops[n] += distance * (view.row.shape[dim] - 1)
        box = [range(start, stop) for start, stop in zip(corner, stops, strict=True)]
        return box if self.is_distinct(box) else None

    def is_distinct(self, box: _Box) -> bool:
        """Whether all indices in a box are different elements: no dimension reaches the next."""
        reach = 0
        for n in reversed(range(1, len(box))):
            reach += box[n][-1] * self.steps[n]
            if reach >= self.steps[n - 1]:
                return False
        return True

    def index(self, address: int) -> list[int]:
        """Return the index of an address, in elements; only its first number may be negative."""
        index = []
        for step in self.steps:
            whole, address = divmod(address, step)
            index.append(whole)
        return index


def _components(group: list[_View]) -> list[_Component]:
    """Cut a group into components without common elements, such as blocks of columns."""
    lead = max(group, key=lambda view: (view.order.distinct, view.nbytes))
    if len(group) > _COMPARED_MAX or not lead.order.distinct:
        return [_Component(group)]
    lattice = _Lattice(lead, group)
    components: list[_Component] = []
    for view in group:
        box = lattice.box(view)
        if box is None:
            return [_Component(group)]
        merged = _Component([view], lattice, [box])
        apart = []
        for component in components:
            if any(_meet(box, other) for other in component.boxes):
                merged.views += component.views
                merged.boxes += component.boxes
            else:
                apart.append(component)
        components = [*apart, merged]
    return components


def _meet(one: _Box, two: _Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, two, strict=True))


class _Packed:
    """The elements of a box, one after the other.

    Args:
        lattice: The lattice of the box.
        box: The box.

    Attributes:
        nbytes: The size of all elements.
        start: The first byte of the box in the storage.
        end: The byte after its last one.
    """

    def __init__(self, lattice: _Lattice, box: _Box) -> None:
        self._lattice = lattice
        self._box = box
        self._steps: list[int] = []
        count = 1
        for side in reversed(box):
            self._steps.insert(0, count)
            count *= len(side)
        self.nbytes = count * lattice.itemsize
        self.start = self._address([side.start for side in box])
        self.end = self._address([side[-1] for side in box]) + lattice.itemsize

    def _address(self, index: Sequence[int]) -> int:
        steps = zip(index, self._lattice.steps, strict=True)
        return self._lattice.start + sum(n * step for n, step in steps) * self._lattice.itemsize

    def part(self, at: int) -> Part:
        """Return the range to send, for byte ``at`` of the smaller storage."""
        shape = tuple(len(side) for side in self._box)
        return Part(at, self.start, self._lattice.itemsize, shape, tuple(self._lattice.steps))

    def place(self, view: _View) -> tuple[int, tuple[int, ...]]:
        """Return the offset and stride of a view among the packed elements."""
        corner = self._lattice.index((view.start - self._lattice.start) // view.itemsize)
        offset = sum(
            (n - side.start) * step
            for n, side, step in zip(corner, self._box, self._steps, strict=True)
        )
        stride = list(view.row.stride)
        for dim in view.order.dims:
            index = self._lattice.index(stride[dim])
            stride[dim] = sum(n * step for n, step in zip(index, self._steps, strict=True))
        return offset, tuple(stride)
