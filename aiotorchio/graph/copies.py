"""Copies of a flattened object, which later changes of the object do not reach.

In: a ``Flattened``. Out: another one over copies of its storages, converted to a dtype or moved to
a device if the caller passes one. Whole storages are copied, so that tensors go on sharing memory.
A ``RuntimeError`` means that torch has counted a change of a tensor during the copy.
``engine.snapshot`` calls it.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.torch_private import location_tags, over_storage
from aiotorchio.graph.flatten import Flattened
from aiotorchio.table.torch_dtypes import DTYPE_NAMES, torch_dtype
from aiotorchio.table.versions import Versions
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import META_LOCATION, StorageRow

__all__ = ["copied"]


def copied(
    flattened: Flattened, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Flattened:
    """Copy the storages of an object.

    Args:
        flattened: The parts of the object, with whole storages.
        dtype: The dtype to which floating-point storages are converted, if only tensors with names
            show them, all in one dtype. None: no storage is converted.
        device: The device of the copies; storages on ``meta`` stay there. None: the device of each
            storage.

    Returns:
        The parts with the copies.

    Raises:
        RuntimeError: A tensor was changed during the copy.
    """
    header = flattened.header
    floats = {} if dtype is None else _floats(flattened)
    storages: list[torch.UntypedStorage] = []
    rows: list[StorageRow] = []
    locations: dict[str, int] = {}
    tag, _ = location_tags()
    for index, storage in interruptible(enumerate(flattened.storages), 10):
        row = header.storages[index]
        unit, location = row.unit, header.locations[row.location]
        if location != META_LOCATION:
            source = floats.get(index)
            if source is not None and dtype is not None:
                storage = _copy(storage, source, dtype, device)
                unit = DTYPES[DTYPE_NAMES[dtype]].unit
            else:
                storage = _copy(storage, torch.uint8, torch.uint8, device)
            location = tag(storage) if device is not None else location
        storages.append(storage)
        location_index = locations.setdefault(location, len(locations))
        rows.append(StorageRow(storage.nbytes(), unit, location_index))
    flattened.versions.check("while it was copied: no other thread may change it during the copy")
    tensors = [
        row
        if row.storage not in floats or dtype is None
        else msgspec.structs.replace(row, dtype=DTYPE_NAMES[dtype])
        for row in header.tensors
    ]
    header = msgspec.structs.replace(
        header, locations=list(locations), storages=rows, tensors=tensors
    )
    return replace(flattened, header=header, storages=storages, versions=Versions())


def _floats(flattened: Flattened) -> dict[int, torch.dtype]:
    """Return the dtype of each floating-point storage that only named tensors of one dtype show."""
    found: dict[int, torch.dtype] = {}
    header = flattened.header
    kept = set(flattened.direct_storages)
    kept |= {
        index
        for index, storage in enumerate(header.storages)
        if header.locations[storage.location] == META_LOCATION
    }
    for row in header.tensors:
        dtype = torch_dtype(row.dtype)
        if found.setdefault(row.storage, dtype) != dtype or not row.names:
            kept.add(row.storage)
    return {
        index: dtype
        for index, dtype in found.items()
        if dtype.is_floating_point and index not in kept and _converts(dtype)
    }


def _converts(dtype: torch.dtype) -> bool:
    """Whether torch converts from a dtype: not from all that have several numbers in a byte."""
    try:
        torch.empty(1, dtype=dtype).to(torch.float32)
    except (NotImplementedError, RuntimeError):
        # torch 2.13 raises the first for float4_e2m1fn_x2; other versions may raise the second.
        return False
    return True


def _copy(
    storage: torch.UntypedStorage,
    source: torch.dtype,
    dtype: torch.dtype,
    device: torch.device | None,
) -> torch.UntypedStorage:
    count = storage.nbytes() // source.itemsize
    numbers = over_storage(storage, source, 0, (count,), (1,))
    return numbers.to(device, dtype, copy=True).untyped_storage()
