"""Storages without what no tensor shows: what ``compact=True`` sends.

A view that leaves gaps gives a lattice: its strides, from the widest to the narrowest. There, what
a view shows is a box, and views whose boxes do not meet have no element in common: they are packed
apart. Those that have are packed together, in the smallest box around theirs: its elements one
after the other, and every stride that among the packed elements. Views that no lattice holds
together (of other item sizes, the windows of ``unfold``) keep the bytes from the first to the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from aiotorchio.strided import Order, Part, order_of
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
        box = component.around()
        packed = None if box is None else _Packed(component.lead, box)
        # A box around others may have a corner where the storage has nothing.
        if packed is None or packed.nbytes >= end - start or not packed.fits(self._available):
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
        lead: The one with the most elements; it gives the lattice.
        views: All of them.
        boxes: What each spans in the lattice; None if the lattice does not hold all of them.
    """

    lead: _View
    views: list[_View]
    boxes: list[_Box] | None

    def around(self) -> _Box | None:
        """The smallest box around all; None if there is none."""
        if self.boxes is None:
            return None
        spans = zip(*self.boxes, strict=True)
        box = [range(min(r.start for r in span), max(r.stop for r in span)) for span in spans]
        return box if _is_distinct(self.lead.order, box) else None


def _components(group: list[_View]) -> list[_Component]:
    """Cut a group into what has no element in common: two blocks of columns of a matrix."""
    lead = max(group, key=lambda view: view.nbytes)
    whole = _Component(lead, group, None)
    if len(group) > _COMPARED_MAX or not lead.order.distinct:
        return [whole]
    components: list[_Component] = []
    for view in group:
        box = _box(lead, view)
        if box is None:
            return [whole]
        merged = _Component(lead, [view], [box])
        apart = []
        for component in components:
            if any(_meet(box, other) for other in component.boxes or ()):
                merged.views += component.views
                merged.boxes = (merged.boxes or []) + (component.boxes or [])
            else:
                apart.append(component)
        components = [*apart, merged]
    return components


def _box(lead: _View, view: _View) -> _Box | None:
    """What a view spans in the lattice of another one; it may reach before and behind that."""
    distance, rest = divmod(view.start - lead.start, lead.itemsize)
    if rest or view.itemsize != lead.itemsize:
        return None
    corner = _index(lead.order, distance)
    steps = [_index(lead.order, view.row.stride[dim]) for dim in view.order.dims]
    if corner is None:
        return None
    stops = [n + 1 for n in corner]
    for dim, step in zip(view.order.dims, steps, strict=True):
        if step is None:
            return None
        for n, distance in enumerate(step):
            stops[n] += distance * (view.row.shape[dim] - 1)
    box = [range(start, stop) for start, stop in zip(corner, stops, strict=True)]
    return box if _is_distinct(lead.order, box) else None


def _is_distinct(lattice: Order, box: _Box) -> bool:
    """Whether each index in a box is another element: no dimension reaches into the outer one."""
    reach = 0
    for n in reversed(range(1, len(box))):
        reach += box[n][-1] * lattice.stride[n]
        if reach >= lattice.stride[n - 1]:
            return False
    return True


def _meet(one: _Box, two: _Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, two, strict=True))


def _index(lattice: Order, address: int) -> list[int] | None:
    """Where an address is in a lattice; only the first number may be negative. None: nowhere."""
    index = []
    for step in lattice.stride:
        whole, address = divmod(address, step)
        index.append(whole)
    return None if address else index


class _Packed:
    """The elements of a box, one after the other.

    Args:
        lead: Gives the lattice.
        box: In that.
    """

    def __init__(self, lead: _View, box: _Box) -> None:
        self._lead = lead
        self._box = box
        self._steps: list[int] = []
        count = 1
        for span in reversed(box):
            self._steps.insert(0, count)
            count *= len(span)
        self.nbytes = count * lead.itemsize
        self._first = self._address([span.start for span in box])

    def fits(self, available: int) -> bool:
        """Whether the whole box is in a storage of so many bytes."""
        last = self._address([span[-1] for span in self._box])
        return self._first >= 0 and last + self._lead.itemsize <= available

    def part(self, at: int) -> Part:
        """What to send, ``at`` so many bytes behind the beginning."""
        shape = tuple(len(span) for span in self._box)
        stride = tuple(self._lead.order.stride)
        return Part(at, self._first, self._lead.itemsize, shape, stride)

    def _address(self, index: Sequence[int]) -> int:
        """Byte of the storage where an element of the lattice is."""
        steps = zip(index, self._lead.order.stride, strict=True)
        return self._lead.start + sum(n * step for n, step in steps) * self._lead.itemsize

    def place(self, view: _View) -> tuple[int, tuple[int, ...]]:
        """Offset and stride of a view among the packed elements."""
        distance = (view.start - self._lead.start) // self._lead.itemsize
        corner = _index(self._lead.order, distance) or []
        offset = sum(
            (n - span.start) * step
            for n, span, step in zip(corner, self._box, self._steps, strict=True)
        )
        stride = list(view.row.stride)
        for dim in view.order.dims:
            index = _index(self._lead.order, stride[dim]) or []
            stride[dim] = sum(n * step for n, step in zip(index, self._steps, strict=True))
        return offset, tuple(stride)
