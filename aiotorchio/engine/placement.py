"""The place of each storage of a message: new memory on a device, targets, or none.

In: the ``Match`` of a message. Out: a ``Placement``, from which ``finish.prepare`` makes memory and
routes. Nothing is allocated here, and no byte of the payload was received yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import order_of
from aiotorchio.engine.matching import LoadContext, Match
from aiotorchio.graph.rebuild import build_tensor
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import META_LOCATION, Header

__all__ = ["Placement", "StorageRows", "on_meta", "place"]

_CPU = torch.device("cpu")
# How much longer the extent of a tensor may be than its elements. Each chunk of an extent costs
# the receiver microseconds, and a sender could cause a million of them.
_SPREAD_MAX = 16


@dataclass(slots=True)
class StorageRows:
    """The tensors that show one storage, divided into those with a target and others.

    Attributes:
        targeted: Rows that have a target.
        has_new_memory: Whether any tensor shows memory of the message.
        left_out: Whether any tensor is not selected.
    """

    targeted: list[int] = field(default_factory=list)
    has_new_memory: bool = False
    left_out: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of each storage.

    Attributes:
        devices: The device of each storage; None: it is not made, since its bytes go into targets
            while they arrive, or are dropped.
        storages: The tensors of each storage.
        prebuilt: Rows whose tensor needs no storage: targets, and tensors that are not selected.
        compared_with: Name of a tensor that is compared -> name of the tensor of the same target
            that is copied.
    """

    devices: list[torch.device | None]
    storages: list[StorageRows]
    prebuilt: dict[int, torch.Tensor]
    compared_with: Mapping[str, str]

    @property
    def tables(self) -> list[list[Any] | dict[Any, Any]]:
        """Tables that are as long as those of the header."""
        return [self.devices, self.storages]


def place(context: LoadContext, match: Match) -> Placement:
    """Choose a place for each storage.

    Raises:
        InvalidObjectError: A location that this machine does not have.
    """
    prebuilt: dict[int, torch.Tensor] = {}
    for name, tensor in match.targets.items():
        prebuilt.setdefault(match.row_of_name[name], tensor)
    if match.uses_names:
        storages = _storage_rows(context, match, prebuilt)
    else:
        storages = [StorageRows(has_new_memory=True)] * len(context.header.storages)
    devices = [
        _device(context, match.duplicates.mixed, index, rows)
        for index, rows in interruptible(enumerate(storages))
    ]
    return Placement(devices, storages, prebuilt, match.duplicates.choose(devices))


def on_meta(header: Header, index: int) -> torch.Tensor:
    """Make the tensor of a row on ``meta``, without memory."""
    row = header.tensors[index]
    nbytes = header.storages[row.storage].nbytes
    return build_tensor(row, index, torch.UntypedStorage(nbytes, device=META_LOCATION))


def _storage_rows(
    context: LoadContext, match: Match, prebuilt: dict[int, torch.Tensor]
) -> list[StorageRows]:
    header, selection, named_only = context.header, match.selection, context.named_only
    storages = [StorageRows(left_out=named_only) for _ in interruptible(header.storages)]
    for index, row in interruptible(enumerate(header.tensors)):
        storage = storages[row.storage]
        if index in prebuilt:
            storage.targeted.append(index)
        elif (
            (row.names or named_only)
            and index not in match.composites.rows
            and not any(name in selection for name in row.names)
        ):
            storage.left_out = True
            if not named_only:
                prebuilt[index] = on_meta(header, index)
        else:
            storage.has_new_memory = True
    for number in interruptible(match.composites.storages):
        storages[number].has_new_memory = True
    return storages


def _device(
    context: LoadContext, mixed: set[int], index: int, rows: StorageRows
) -> torch.device | None:
    """Return the device where a storage is made; None: it is not made."""
    if not rows.has_new_memory and (rows.targeted or rows.left_out):
        routed = not rows.targeted or (index not in mixed and _can_be_routed(context, index, rows))
        return None if routed else _CPU
    device = context.devices.device(index)
    if context.options.data_free is not None:
        return torch.device(META_LOCATION)
    # Targets are copied from it, so it needs memory.
    return _CPU if rows.targeted and device.type == META_LOCATION else device


def _can_be_routed(context: LoadContext, index: int, rows: StorageRows) -> bool:
    """Whether bytes can go into the targets while they arrive, in the order of the wire."""
    header = context.header
    tensors = [header.tensors[row] for row in rows.targeted]
    orders = [order_of(row.shape, row.stride) for row in tensors]
    total = sum(
        order.extent * DTYPES[row.dtype].itemsize
        for order, row in zip(orders, tensors, strict=True)
    )
    # A few elements in a long extent would be looked for in many chunks, and so would many tensors
    # in the same extent.
    return (
        not context.foreign_byteorder
        and total <= _SPREAD_MAX * header.storages[index].nbytes
        and all(o.distinct and o.extent <= _SPREAD_MAX * o.count for o in orders)
    )
