"""Storages without what no tensor shows: what ``compact=True`` sends.

The largest view gives a lattice: its strides, from the widest to the narrowest. There, what a view
shows is a box, and views whose boxes do not meet have no element in common: they are packed
apart. Those that have are packed together, in the smallest box around theirs: its elements one
after the other, and every stride that among the packed elements. Views that no lattice holds
together (of other item sizes, the windows of ``unfold``) keep the bytes from the first to the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from aiotorchio.common.strides import Order, Part, order_of
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import META_LOCATION, StorageRow, TensorRow

__all__ = ["compact"]

# Views with overlapping ranges of bytes are compared pair by pair.
_COMPARED_MAX = 256


_Box = list[range]  # in each dimension of a lattice


@dataclass(slots=True)
class _View:
    """A tensor over a storage: its row, and the bytes from its first to its last."""

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
    whole: Iterable[int],
) -> tuple[dict[int, list[Part]], int]:
    """Change the rows to those of smaller storages.

    Args:
        tensors: Rows, changed in place: offsets, and strides.
        storages: Rows, changed in place: sizes.
        locations: Of the storages.
        whole: Storages that the object refers to itself; they stay as they are.

    Returns:
        The parts that are left of each storage that is smaller now, by number, and how many bytes
        are left out.
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
    for index in views.keys() - set(whole):
        storage = storages[index]
        if locations[storage.location] == META_LOCATION or storage.nbytes == _shown(views[index]):
            continue
        if any(view.end > storage.nbytes for view in views[index] if view.nbytes):
            # It was made smaller behind the back of a tensor. That is the receiver's to refuse.
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
    """Bytes that the first view shows, if it is dense: most storages have one, which shows all."""
    return views[0].nbytes if views[0].order.dense else -1


class _Fitted:
    """The views of one storage over what they show of it.

    Args:
        views: All there are.
        available: Bytes of the storage.

    Attributes:
        parts: What is left of the storage.
        nbytes: How much that is.
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
        # Numbers stay aligned to their size.
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
    """Views that may show some of the same bytes, from the first of them to the last."""
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
    """Views that go together.

    Attributes:
        views: All of them.
        lattice: What holds them together; None if nothing does.
        boxes: What each of them spans in it.
    """

    views: list[_View]
    lattice: _Lattice | None = None
    boxes: list[_Box] = field(default_factory=list)

    def packed(self, available: int) -> _Packed | None:
        """The smallest box around all, in a storage of so many bytes; None if there is none."""
        if self.lattice is None:
            return None
        spans = zip(*self.boxes, strict=True)
        box = [range(min(r.start for r in span), max(r.stop for r in span)) for span in spans]
        if not self.lattice.is_distinct(box):
            return None
        packed = _Packed(self.lattice, box)
        # A corner may be where the storage has nothing.
        return packed if packed.start >= 0 and packed.end <= available else None


class _Lattice:
    """Steps from the first element of one view, from the widest to the narrowest.

    Args:
        lead: The one whose strides they are.
        views: All that may be held by it.
    """

    def __init__(self, lead: _View, views: Sequence[_View]) -> None:
        self.start, self.itemsize = lead.start, lead.itemsize
        shape, stride = lead.order.shape, lead.order.stride
        # Two dimensions that lie like one are one.
        self.steps = [
            step
            for n, step in enumerate(stride)
            if n + 1 == len(stride) or step != shape[n + 1] * stride[n + 1]
        ]
        # What leads from each view to the others.
        distances = [(view.start - lead.start) // lead.itemsize for view in views]
        narrowest = math.gcd(*distances, *(n for view in views for n in view.order.stride))
        if narrowest and (not self.steps or narrowest < self.steps[-1]):
            self.steps.append(narrowest)

    def box(self, view: _View) -> _Box | None:
        """What a view spans; it may reach before and behind the leading one. None: it is no box."""
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
        """Whether each index in a box is another element: no dimension reaches into the outer."""
        reach = 0
        for n in reversed(range(1, len(box))):
            reach += box[n][-1] * self.steps[n]
            if reach >= self.steps[n - 1]:
                return False
        return True

    def index(self, address: int) -> list[int]:
        """Where an address is, in elements; only the first number may be negative."""
        index = []
        for step in self.steps:
            whole, address = divmod(address, step)
            index.append(whole)
        return index


def _components(group: list[_View]) -> list[_Component]:
    """Cut a group into what has no element in common: two blocks of columns of a matrix."""
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
        lattice: Where the box is.
        box: In that.

    Attributes:
        nbytes: All in all.
        start: First byte of the storage in the box.
        end: Behind the last one.
    """

    def __init__(self, lattice: _Lattice, box: _Box) -> None:
        self._lattice = lattice
        self._box = box
        self._steps: list[int] = []
        count = 1
        for span in reversed(box):
            self._steps.insert(0, count)
            count *= len(span)
        self.nbytes = count * lattice.itemsize
        self.start = self._address([span.start for span in box])
        self.end = self._address([span[-1] for span in box]) + lattice.itemsize

    def _address(self, index: Sequence[int]) -> int:
        steps = zip(index, self._lattice.steps, strict=True)
        return self._lattice.start + sum(n * step for n, step in steps) * self._lattice.itemsize

    def part(self, at: int) -> Part:
        """What to send, ``at`` so many bytes behind the beginning."""
        shape = tuple(len(span) for span in self._box)
        return Part(at, self.start, self._lattice.itemsize, shape, tuple(self._lattice.steps))

    def place(self, view: _View) -> tuple[int, tuple[int, ...]]:
        """Offset and stride of a view among the packed elements."""
        corner = self._lattice.index((view.start - self._lattice.start) // view.itemsize)
        offset = sum(
            (n - span.start) * step
            for n, span, step in zip(corner, self._box, self._steps, strict=True)
        )
        stride = list(view.row.stride)
        for dim in view.order.dims:
            index = self._lattice.index(stride[dim])
            stride[dim] = sum(n * step for n, step in zip(index, self._steps, strict=True))
        return offset, tuple(stride)
