"""The persistent ids of the pickle codec: how a pickle refers to tensors and storages.

The id of a tensor is the number of its row. That of a storage is ``("storage", row, name)``, where
name is that of its dtype, or None if it is untyped. ``codec`` and ``graph.composites`` resolve ids.
A peer chooses them, so an error means that an id is not valid or that its row does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from aiotorchio.common.torch_private import typed_storage
from aiotorchio.errors import InvalidObjectError, MismatchError, ProtocolError
from aiotorchio.table.torch_dtypes import torch_dtype

__all__ = ["STORAGE", "checked_row", "resolver", "storage_for", "storage_reference"]

STORAGE = "storage"
"""The first item of the persistent id of a storage."""


def resolver(
    tensors: Sequence[Any], storages: Sequence[torch.UntypedStorage | None]
) -> Callable[[Any], Any]:
    """Return a function from persistent ids to these tensors and storages."""
    typed: dict[tuple[int, str], Any] = {}

    def resolve(reference: Any) -> Any:
        if type(reference) is int:
            return tensors[checked_row(reference, len(tensors), "tensor")]
        row, name = storage_reference(reference)
        storage = storages[checked_row(row, len(storages), "storage")]
        if storage is None:
            raise MismatchError(
                f"the object has storage {row} itself, not only tensors over it, so that its bytes "
                "cannot be left out or received into other tensors"
            )
        if name is None:
            return storage
        return typed.setdefault((row, name), storage_for(reference, storage))

    return resolve


def storage_reference(reference: Any) -> tuple[Any, str | None]:
    """Return the row, not yet checked, and the dtype name of the persistent id of a storage."""
    if type(reference) is not tuple or len(reference) != 3 or reference[0] != STORAGE:
        raise ProtocolError(
            "a persistent id of the pickle refers neither to a tensor nor to a storage"
        )
    _, row, name = reference
    if name is not None:
        torch_dtype(name)
    return row, name


def storage_for(reference: Any, storage: torch.UntypedStorage) -> Any:
    """Return the object for the id of a storage: the storage, or a typed storage over it."""
    row, name = storage_reference(reference)
    if name is None:
        return storage
    dtype = torch_dtype(name)
    if storage.nbytes() % dtype.itemsize:
        raise InvalidObjectError(
            f"storage {row} of {storage.nbytes()} bytes holds no whole number of {dtype}"
        )
    return typed_storage(storage, dtype)


def checked_row(row: Any, count: int, what: str) -> int:
    """Return a row of the tensors or storages (``what``), of which the message has ``count``."""
    if type(row) is not int or not 0 <= row < count:
        # Only an int is shown: the repr of a tuple of tuples can be endless.
        shown = row if type(row) is int else type(row).__name__
        raise ProtocolError(
            f"the skeleton refers to {what} row {shown}, but the message has {count} {what}s"
        )
    return row
