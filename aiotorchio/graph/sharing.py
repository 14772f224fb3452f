"""Targets that share memory, compared with the sharing among the message's tensors.

In: a header and the targets for its rows. Out: the duplicates, the misfits and the memory of the
targets. Duplicates are several tensors of the message for one target, whose names are tied: their
elements are compared as they arrive. All other targets may share memory only as the message's
tensors do; the rest are misfits.
``targets.match_targets`` calls it.
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

# The number of misfits to find: each can take as long as drawing all of the shared memory.
_SHOWN = 3


class Sharing(NamedTuple):
    """The memory that targets share.

    Attributes:
        duplicates: Names of one target for which the message has several tensors.
        misfits: Name of a target -> the reason why it cannot share memory as it does.
        extents: The memory of the targets, by device.
    """

    duplicates: list[list[str]]
    misfits: dict[str, str]
    extents: Mapping[torch.device, Extents[str]]


def shared(
    header: Header, row_of_name: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> Sharing:
    """Compare the memory that targets share with the storages that the message's tensors share.

    Args:
        header: The header of the message.
        row_of_name: The row of each name.
        tensors: The targets; each fits its row.
    """
    found = Sharing([], {}, extents_of(tensors))
    together = [keys for extents in found.extents.values() for keys in extents.together()]
    # The targets are sorted: of two that cannot share memory, the later one is the misfit.
    order = {name: n for n, name in enumerate(tensors)} if together else {}
    kinds: dict[object, int] = {}
    for keys in together:
        origins: dict[str, Origin] = {}
        for names in _grouped_by_memory(tensors, sorted(keys, key=order.__getitem__)):
            first = names[0]
            views = {view_of_row(header.tensors[row_of_name[name]]) for name in names}
            if len(views) > 1:
                found.duplicates.append(names)
                # Duplicates are compared with each other only.
                origins[first] = Origin(kinds.setdefault(("duplicates", first), len(kinds)))
            else:
                row = header.tensors[row_of_name[first]]
                kind = kinds.setdefault(_kind(row, tensors[first].dtype), len(kinds))
                origins[first] = Origin(kind, row.offset, row.stride)
        if len(origins) > 1:
            found.misfits.update(_conflicts(tensors, origins))
    return found


def _conflicts(
    tensors: Mapping[str, torch.Tensor], origins: dict[str, Origin]
) -> Iterator[tuple[str, str]]:
    """Yield targets that cannot be filled together with another one, up to a number, with reasons.

    Args:
        tensors: Targets by name.
        origins: The origins of targets that may share memory; those that are yielded are removed.
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
            f"shares memory with {shortened(first)} in the target, but not in the message, or not "
            f"in the same way{more}",
        )


def _grouped_by_memory(
    tensors: Mapping[str, torch.Tensor], names: Iterable[str]
) -> Iterable[list[str]]:
    """Return names in groups: each group has the names of one target."""
    groups: dict[object, list[str]] = {}
    for name in interruptible(names, 100):
        groups.setdefault((footprint(tensors[name]), tensors[name].dtype), []).append(name)
    return groups.values()


def view_of_row(row: TensorRow) -> object:
    """Return a value that is equal for rows with the same bytes of the message."""
    return row.storage, row.offset, row.shape, row.stride, row.dtype, row.flags & VIEW_BITS


def _kind(row: TensorRow, dtype: torch.dtype) -> object:
    """Return a value that is equal for targets that get their bytes from one storage in one way."""
    flags = row.flags & VIEW_BITS
    if torch_dtype(row.dtype) == dtype and not flags:
        # The bytes are copied without conversion, for any dtype.
        return (row.storage,)
    return row.storage, row.dtype, flags, dtype


def filled_by_others(
    missing: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> set[str]:
    """Return the names of missing tensors whose memory other tensors of the message fill.

    Args:
        missing: Targets for which the message has no tensor.
        tensors: Targets for which it has one.
    """
    found = set()
    for extents in extents_of({**tensors, **missing}).values():
        for names in extents.together():
            targets = {name: footprint(missing[name]) for name in names if name in missing}
            if targets and len(targets) < len(names):
                others = [footprint(tensors[name]) for name in names if name in tensors]
                found |= filled(targets, others)
    return found
