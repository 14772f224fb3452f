"""Storages without what no tensor shows: what ``compact=True`` sends.

Tensors that show some of the same elements go together. If one of them shows all that the others
show, its elements are packed, one after the other in the order of their addresses, and every stride
is that among the packed elements. If none does (a row and a column of a matrix, the windows of
``unfold``), the bytes from the first to the last stay together as they are.
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
        fitted = _Fitted(views[index])
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

    Attributes:
        parts: What is left of the storage.
        nbytes: How much that is.
    """

    def __init__(self, views: Sequence[_View]) -> None:
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

    def _fit(self, group: Sequence[_View]) -> None:
        start, end = group[0].start, max(view.end for view in group)
        # Numbers stay aligned to their size.
        size = max(view.itemsize for view in group)
        lead = max(group, key=lambda view: view.nbytes)
        packed = None if lead.nbytes == end - start else _packed(lead, group)
        if packed is None:
            at = self.nbytes + (start - self.nbytes) % size
            self.parts.append(Part(at, start, 1, (end - start,), (1,)))
            for view in group:
                offset = (view.start - start + at) // view.itemsize
                self._settled.append((view.row, offset, tuple(view.row.stride)))
        else:
            at = self.nbytes + -self.nbytes % size
            order = lead.order
            self.parts.append(
                Part(at, lead.start, lead.itemsize, tuple(order.shape), tuple(order.stride))
            )
            for view, (offset, stride) in zip(group, packed, strict=True):
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


def _components(group: list[_View]) -> list[list[_View]]:
    """Cut a group into what has no element in common: two blocks of columns of a matrix."""
    lead = max(group, key=lambda view: view.nbytes)
    if not 1 < len(group) <= _COMPARED_MAX or not lead.order.distinct:
        return [group]
    components: list[tuple[list[_View], list[list[range]]]] = []
    for view in group:
        box = _box(lead, view)
        if box is None:
            return [group]
        views, boxes, others = [view], [box], []
        for component in components:
            if any(_meet(box, other) for other in component[1]):
                views, boxes = component[0] + views, component[1] + boxes
            else:
                others.append(component)
        components = [*others, (views, boxes)]
    return [sorted(views, key=lambda view: view.start) for views, _ in components]


def _box(lead: _View, view: _View) -> list[range] | None:
    """What a view spans in each dimension of the leading one, before and behind that one, too."""
    distance, rest = divmod(view.start - lead.start, lead.itemsize)
    if rest or view.itemsize != lead.itemsize:
        return None
    corner = _index(lead.order, distance)
    spans = [_index(lead.order, view.row.stride[dim]) for dim in view.order.dims]
    if corner is None or None in spans:
        return None
    box = [range(n, n + 1) for n in corner]
    for dim, span in zip(view.order.dims, spans, strict=True):
        for n, distance in enumerate(span or ()):
            furthest = box[n][-1] + distance * (view.row.shape[dim] - 1)
            box[n] = range(box[n].start, furthest + 1)
    # An index says where an element is only if the inner dimensions do not reach into the outer.
    inner = 0
    for n in reversed(range(1, len(box))):
        inner += box[n][-1] * lead.order.stride[n]
        if inner >= lead.order.stride[n - 1]:
            return None
    return box


def _meet(one: Sequence[range], two: Sequence[range]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, two, strict=True))


def _packed(lead: _View, group: Sequence[_View]) -> list[tuple[int, tuple[int, ...]]] | None:
    """Offset and stride of each view among the packed elements of one that shows all of them.

    Returns:
        None if it does not show all of them, or not so that strides could say where they are.
    """
    if not lead.order.distinct or any(view.itemsize != lead.itemsize for view in group):
        return None
    steps = _contiguous(lead.order.shape)
    placed = []
    for view in group:
        place = _place(lead, view, steps)
        if place is None:
            return None
        placed.append(place)
    return placed


def _place(lead: _View, view: _View, steps: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    corner = _index(lead.order, (view.start - lead.start) // lead.itemsize)
    if corner is None:
        return None
    furthest, stride = list(corner), list(view.row.stride)
    for dim in view.order.dims:
        index = _index(lead.order, view.row.stride[dim])
        if index is None:
            return None
        stride[dim] = _dot(index, steps)
        for n, distance in enumerate(index):
            furthest[n] += distance * (view.row.shape[dim] - 1)
    if any(n >= size for n, size in zip(furthest, lead.order.shape, strict=True)):
        return None
    return _dot(corner, steps), tuple(stride)


def _index(order: Order, address: int) -> list[int] | None:
    """The index of the element at an address, counted in elements from the first; None: none."""
    index = []
    for step in order.stride:
        whole, address = divmod(address, step)
        index.append(whole)
    return None if address else index


def _contiguous(shape: Sequence[int]) -> list[int]:
    steps: list[int] = []
    step = 1
    for size in reversed(shape):
        steps.insert(0, step)
        step *= size
    return steps


def _dot(index: Sequence[int], steps: Sequence[int]) -> int:
    return sum(n * step for n, step in zip(index, steps, strict=True))
