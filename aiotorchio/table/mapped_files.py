"""Tensors and mappings of tensordict that are in files, and are sent with their numbers.

In: a ``MemoryMappedTensor``, which pickles itself as the name of its file or as a handle that no
other process has, or a ``TensorDict`` of such tensors. Out: a plain tensor over the same memory,
and the state of a copy in memory. This module does not import tensordict: a caller that has such an
object has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from aiotorchio.common.torch_private import over_storage

__all__ = ["is_mapped", "may_be_mapped", "plain_of", "without_files"]

# The attributes of a TensorDict in files, with their values in one in memory. It is locked because
# of the files, and a copy is not.
_NOTES = {"_is_memmap": False, "_memmap_prefix": None, "_is_locked": False}
# The metadata of an entry that is no tensor in such a TensorDict.
_NOTES_OF_ENTRY = frozenset({"memmap_prefix", "memmaped", "_share_non_tensor"})
_CLASSES = {"tensordict.base": "TensorDictBase", "tensordict.tensorclass": "NonTensorDataBase"}


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the pickle of a tensor would refer to a file instead of containing its numbers."""
    kind = _class_in("tensordict.memmap", "MemoryMappedTensor")
    return kind is not None and isinstance(tensor, kind)


def plain_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor over the memory of a mapped one; any other tensor as it is."""
    if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter or not is_mapped(tensor):
        return tensor
    if tensor.is_nested or tensor.layout is not torch.strided:
        return tensor.as_subclass(torch.Tensor)
    offset, storage = int(tensor.storage_offset()), tensor.untyped_storage()
    plain = over_storage(storage, tensor.dtype, offset, tensor.shape, tensor.stride())
    return plain.requires_grad_(tensor.requires_grad)


def may_be_mapped(obj: Any) -> bool:
    """Whether an object is a mapping of tensordict, or an entry of one that is not a tensor."""
    kinds = (_class_in(module, name) for module, name in _CLASSES.items())
    return any(kind is not None and isinstance(obj, kind) for kind in kinds)


def without_files(reduced: Any) -> Any:
    """Return the reduce value that pickles an object of tensordict as one in memory.

    Args:
        reduced: The reduce value of tensordict: a call or an instance, with a state. Anything else
            is returned as it is.
    """
    if type(reduced) is not tuple:
        return reduced
    make, args, *more = reduced
    if len(args) == 2 and type(args[1]) is dict:
        args = (args[0], _in_memory(args[1]))
    if more and type(more[0]) is dict:
        more[0] = _in_memory(more[0])
    return make, args, *more


def _in_memory(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the same object in memory."""
    if state.get("_is_memmap") or state.get("_memmap_prefix"):
        return {key: _NOTES.get(key, value) for key, value in state.items()}
    entry = state.get("non_tensordict")
    notes = entry.get("_metadata") if type(entry) is dict else None
    if type(entry) is not dict or type(notes) is not dict or not notes.keys() & _NOTES_OF_ENTRY:
        return state
    others = {key: value for key, value in notes.items() if key not in _NOTES_OF_ENTRY}
    return state | {"non_tensordict": entry | {"_metadata": others or None}}


def _class_in(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
