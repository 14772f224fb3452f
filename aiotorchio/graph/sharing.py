"""Destinations that share memory, compared with what the message's tensors share.

``shared`` finds those that are one tensor under several names (ties): their numbers are compared as
they arrive. All others may share memory only in the way in which the message's tensors do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.overlap.conflicts import conflict, filled
from aiotorchio.overlap.extents import Extents, Origin, extents_of, footprint
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import CONJUGATE, NEGATIVE, Header, TensorRow, shortened

__all__ = ["VIEW_BITS", "Sharing", "filled_by_others", "shared", "view_of_row"]

VIEW_BITS = CONJUGATE | NEGATIVE

# Each can take as long as all of the memory that they share needs to be drawn.
_SHOWN = 3


class Sharing(NamedTuple):
    """What destinations share.

    Attributes:
        ties: Names of one tensor, for which the message has several.
        misfits: Why tensors cannot share memory as they do, by name.
        extents: Of the destinations, by device.
    """

    ties: list[list[str]]
    misfits: dict[str, str]
    extents: Mapping[torch.device, Extents[str]]


def shared(
    header: Header, numbers: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> Sharing:
    """Compare what destinations share with what the message's tensors do.

    Args:
        header: Of the message.
        numbers: The row of each name.
        tensors: The destinations, each fit for its row.
    """
    found = Sharing([], {}, extents_of(tensors))
    together = [keys for extents in found.extents.values() for keys in extents.together()]
    # In the order of the destination: what comes later does not fit what comes first.
    order = {name: n for n, name in enumerate(tensors)} if together else {}
    kinds: dict[object, int] = {}
    for keys in together:
        origins: dict[str, Origin] = {}
        for names in _places(tensors, sorted(keys, key=order.__getitem__)):
            first = names[0]
            views = {view_of_row(header.tensors[numbers[name]]) for name in names}
            if len(views) > 1:
                found.ties.append(names)
                # They are compared with each other, and with nothing else.
                origins[first] = Origin(kinds.setdefault(("tie", first), len(kinds)))
            else:
                row = header.tensors[numbers[first]]
                kind = kinds.setdefault(_kind(row, tensors[first].dtype), len(kinds))
                origins[first] = Origin(kind, row.offset, row.stride)
        if len(origins) > 1:
            found.misfits.update(_conflicts(tensors, origins))
    return found


def _conflicts(
    tensors: Mapping[str, torch.Tensor], origins: dict[str, Origin]
) -> Iterator[tuple[str, str]]:
    """Tensors that cannot be filled together with another one, up to a number, with the reason.

    Args:
        tensors: By name.
        origins: Those that may share memory; the ones that were found are taken out.
    """
    footprints = {name: footprint(tensors[name]) for name in origins}
    pair = conflict(footprints, origins)
    for count in range(_SHOWN):
        if pair is None:
            return
        first, second = pair
        del footprints[second], origins[second]
        pair = conflict(footprints, origins)
        more = " (and there are more like it)" if pair and count == _SHOWN - 1 else ""
        yield (
            second,
            f"shares memory with {shortened(first)} in the destination, but not in the message, "
            f"or in another way{more}",
        )


def _places(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> Iterable[list[str]]:
    """Names of one tensor each."""
    places: dict[object, list[str]] = {}
    for name in interruptible(names, 100):
        places.setdefault((footprint(tensors[name]), tensors[name].dtype), []).append(name)
    return places.values()


def view_of_row(row: TensorRow) -> object:
    """Equal for tensors with the same bytes of a message."""
    return row.storage, row.offset, row.shape, row.stride, row.dtype, row.flags & VIEW_BITS


def _kind(row: TensorRow, dtype: torch.dtype) -> object:
    """Equal for tensors that are made from bytes of one storage in one way."""
    flags = row.flags & VIEW_BITS
    if torch_dtype(row.dtype) == dtype and not flags:
        # A copy of the bytes, whatever they mean.
        return (row.storage,)
    return row.storage, row.dtype, flags, dtype


def filled_by_others(
    missing: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> set[str]:
    """Names that the message does not have, of memory that it fills all the same.

    Args:
        missing: Destinations for which there is nothing in the message.
        tensors: Those for which there is something.
    """
    found = set()
    for extents in extents_of({**tensors, **missing}).values():
        for names in extents.together():
            targets = {name: footprint(missing[name]) for name in names if name in missing}
            if targets and len(targets) < len(names):
                others = [footprint(tensors[name]) for name in names if name in tensors]
                found |= filled(targets, others)
    return found
