"""The memory of a target, which must not change while a message is received.

In: a tensor of the caller. Out: where its numbers are now, for a comparison later. The caller may
resize or move a tensor during a load; the ``MismatchError`` of ``moved`` says so. ``engine`` and
``memory`` compare before they write.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from aiotorchio.errors import MismatchError

__all__ = ["MemoryState", "has_state", "memory_state", "moved", "tie_key"]

_new_tuple = tuple.__new__


class MemoryState(NamedTuple):
    """The properties of a tensor that must not change while bytes are written into it.

    Attributes:
        address: First byte of its storage.
        storage_nbytes: Bytes of its storage.
        offset: Elements of its storage before the first one of the tensor.
        device: The device.
        dtype: The dtype.
        shape: The shape.
        stride: The strides.
    """

    address: int
    storage_nbytes: int
    offset: int
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


def memory_state(tensor: torch.Tensor) -> MemoryState:
    """Return the memory of a tensor as it is now, for ``has_state`` later."""
    # A call of the class would take 0.3 us more.
    return _new_tuple(MemoryState, _state_of(tensor))


def has_state(tensor: torch.Tensor, state: MemoryState) -> bool:
    """Whether a tensor still has the memory that it had."""
    return _state_of(tensor) == state


def _state_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the fields of ``MemoryState``."""
    storage = tensor.untyped_storage()
    return (
        storage.data_ptr(),
        storage.nbytes(),
        tensor.storage_offset(),
        tensor.device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
    )


def tie_key(tensor: torch.Tensor) -> object:
    """Return a key that is equal for tied tensors: the same layout of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def moved() -> MismatchError:
    """Make the error for a target whose shape or memory has changed."""
    return MismatchError(
        "a target changed its shape or its memory while its message was received; do not resize, "
        "replace or convert the tensors of into during a load"
    )
