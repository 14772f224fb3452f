"""Tensors that can be made of a plain tensor: with attributes, or of a subclass with its memory.

In: the result of ``__reduce_ex__`` of a tensor. Out: the plain tensor over the same memory, which a
row describes, and a value to pickle that makes the tensor of it again. The pickle codec calls these
functions to save, ``graph`` and the allowlist to load.
"""

from __future__ import annotations

from typing import Any

import torch

from aiotorchio.common.torch_private import (
    REBUILD_FROM_TYPE,
    REBUILD_META,
    REBUILD_PARAMETER,
    REBUILD_STRIDED,
    is_fake,
    make_parameter,
    over_storage,
    set_view_bits,
    untyped_storage_of,
)

__all__ = ["as_kind", "from_type", "over_origin", "plain_origin", "without_class"]


def plain_origin(reduced: Any) -> torch.Tensor | None:
    """Return the ``torch.Tensor`` or parameter, without attributes, that a tensor is made of.

    Args:
        reduced: The result of ``__reduce_ex__`` of the tensor.

    Returns:
        A tensor or parameter over the same memory; None if the tensor is not made of one.
    """
    if type(reduced) is not tuple or len(reduced) != 2:
        return None
    function, args = reduced
    if function is REBUILD_FROM_TYPE and args[0] in (REBUILD_META, *REBUILD_STRIDED):
        with torch.inference_mode(False):
            made: torch.Tensor = (args[0] if args[0] is REBUILD_META else _strided)(*args[2])
        return made if type(made) is torch.Tensor else None
    if function in REBUILD_PARAMETER:
        return make_parameter(args[0], args[1]) if type(args[0]) is torch.Tensor else None
    return None


def _strided(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: bool,
    _hooks: Any,
    dtype_or_metadata: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    # torch's own v3 takes the storage that an unpickler makes, not the one that is pickled.
    if isinstance(dtype_or_metadata, torch.dtype):
        dtype = dtype_or_metadata
    else:
        dtype, metadata = storage.dtype, dtype_or_metadata
    typed = isinstance(storage, torch.TypedStorage)
    untyped = untyped_storage_of(storage) if typed else storage
    tensor = over_storage(untyped, dtype, offset, size, stride)
    if metadata:
        set_view_bits(tensor, conjugate="conj" in metadata, negative="neg" in metadata)
    return tensor.requires_grad_(requires_grad)


def over_origin(reduced: Any, origin: torch.Tensor) -> Any:
    """Return the value to pickle instead of ``reduced``, which makes the tensor of ``origin``."""
    function, args = reduced
    if function is not REBUILD_FROM_TYPE:
        return function, (origin, *args[1:])
    _, kind, _, state = args
    # Only this function of torch makes a tensor of a tensor with the same memory. Hooks are None.
    return function, (REBUILD_PARAMETER[0], kind, (origin, origin.requires_grad, None), state)


def without_class(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a plain one over its memory if its class may refuse operations."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or is_fake(tensor):
        return tensor
    offset, storage = int(tensor.storage_offset()), tensor.untyped_storage()
    return over_storage(storage, tensor.dtype, offset, tensor.shape, tensor.stride())


def as_kind(tensor: torch.Tensor, kind: Any) -> torch.Tensor:
    """Return a parameter as a plain leaf tensor, unless ``kind`` is a class of parameters."""
    if type(tensor) is not torch.nn.Parameter or issubclass(kind, torch.nn.Parameter):
        return tensor
    return tensor.detach().requires_grad_(tensor.requires_grad)


def from_type(function: Any, kind: Any, args: Any, state: Any) -> torch.Tensor:
    """Rebuild a tensor like torch's function of this name, as a leaf even where torch does not."""
    made: torch.Tensor = REBUILD_FROM_TYPE(
        lambda *args: as_kind(function(*args), kind), kind, args, state
    )
    return made
