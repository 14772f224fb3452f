"""The persistent ids of the pickle codec: how a pickle refers to tensors and storages.

A tensor is the number of its row; a storage is ``("storage", row, dtype name or None)``, without a
name if it is untyped. A peer chooses them, so each is checked before its use.
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
    """What turns the persistent ids of this codec into tensors and storages."""
    typed: dict[tuple[int, str], Any] = {}

    def resolve(reference: Any) -> Any:
        if type(reference) is int:
            return tensors[checked_row(reference, len(tensors), "tensor")]
        row, name = storage_reference(reference)
        storage = storages[checked_row(row, len(storages), "storage")]
        if storage is None:
            raise MismatchError(
                f"the object has storage {row} itself, not only tensors over it: it can't be left "
                "out or received into other tensors"
            )
        if name is None:
            return storage
        return typed.setdefault((row, name), storage_for(reference, storage))

    return resolve


def storage_reference(reference: Any) -> tuple[Any, str | None]:
    """The number of the storage that a reference is to, unchecked, and the dtype of its numbers."""
    if type(reference) is not tuple or len(reference) != 3 or reference[0] != STORAGE:
        raise ProtocolError("a reference that is neither to a tensor nor to a storage")
    _, row, name = reference
    if name is not None:
        torch_dtype(name)
    return row, name


def storage_for(reference: Any, storage: torch.UntypedStorage) -> Any:
    """What a reference to a storage stands for: the storage, or a typed one over it."""
    row, name = storage_reference(reference)
    if name is None:
        return storage
    dtype = torch_dtype(name)
    if storage.nbytes() % dtype.itemsize:
        raise InvalidObjectError(f"storage {row} of {storage.nbytes()} bytes holds no {dtype}")
    return typed_storage(storage, dtype)


def checked_row(row: Any, count: int, what: str) -> int:
    """The number of a row, if there is one of that number."""
    if type(row) is not int or not 0 <= row < count:
        # Nothing but plain values in messages: the repr of a doubled tuple never ends.
        shown = row if type(row) is int else type(row).__name__
        raise ProtocolError(f"{what} {shown} of {count}")
    return row
