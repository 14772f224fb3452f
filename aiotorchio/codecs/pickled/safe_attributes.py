"""Checks of the class and the attributes that a pickle gives to a tensor.

In: a tensor, with a class or a state that a peer chose. ``allowlist`` and ``safe_tensors`` call
these functions. An ``UnsafeObjectError`` means that the class is not one of tensors, or that an
attribute must not be set: ``data`` would give a tensor other memory, ``__class__`` another class.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from aiotorchio.codecs.pickled.safe_builtins import is_dunder
from aiotorchio.common.torch_private import JAGGED_PARTS, PARAMETER_MARK, JaggedTensor
from aiotorchio.errors import UnsafeObjectError
from aiotorchio.wire.header import shortened

__all__ = ["TypeName", "set_attributes", "tensor_class"]

_ABSENT = object()


class TypeName:
    """A placeholder for a class that a pickle may name, but neither call nor instantiate.

    torch puts the class of a tensor with attributes into the pickle. A call of the class itself
    would show memory that was never written: ``torch.Tensor(64)`` has the bytes of earlier objects.
    """

    def __init__(self, kind: type[torch.Tensor]) -> None:
        self.kind = kind

    def __call__(self, *_: object) -> Any:
        """Refuse the call, which would show uninitialised memory."""
        raise UnsafeObjectError(f"a pickle must not call {self.kind.__name__}, only name it")


def set_attributes(tensor: torch.Tensor, state: Any) -> None:
    """Set attributes of a tensor; refuse any that its class does not leave to its instances."""
    parts = state if type(state) is tuple and len(state) == 2 else (state, None)
    for part in parts:
        for key, value in (part or {}).items():
            if type(key) is not str or is_dunder(key) or not _is_free(tensor, key):
                shown = shortened(key) if type(key) is str else type(key)
                raise UnsafeObjectError(
                    f"the pickle sets attribute {shown!r} of a {type(tensor).__name__}, which is "
                    "not allowed"
                )
            setattr(tensor, key, value)


def _is_free(tensor: torch.Tensor, key: str) -> bool:
    kind = type(tensor)
    if key == PARAMETER_MARK and (kind is torch.Tensor or kind is torch.nn.Parameter):
        return False
    # The parts of a jagged tensor were checked when it was made.
    if key in JAGGED_PARTS and isinstance(tensor, JaggedTensor):
        return False
    found = next((vars(base)[key] for base in kind.__mro__ if key in vars(base)), _ABSENT)
    if found is _ABSENT:
        return True
    # Instances of a trusted class may hide defaults and methods, but must not set anything through
    # a descriptor: "data" would give them other memory. Classes of torch may be trusted by torch
    # alone, not by the caller.
    if kind.__module__.split(".")[0] != "torch" and not hasattr(type(found), "__set__"):
        return True
    # A subclass declares attributes of its instances, even if Tensor has a method of this name
    # (the jagged layout has ``_values``).
    return any(
        key in vars(base).get("__slots__", ()) or key in inspect.get_annotations(base)
        for base in type(tensor).__mro__
        if not any(base is other for other in torch.nn.Parameter.__mro__)
    )


def tensor_class(kind: Any) -> type[torch.Tensor]:
    """Return the class that a pickle names for a tensor."""
    named = kind.kind if isinstance(kind, TypeName) else kind
    if not isinstance(named, type) or not issubclass(named, torch.Tensor):
        raise UnsafeObjectError(
            f"the class of a tensor in the pickle must be a tensor class, not a "
            f"{type(named).__name__}"
        )
    return named
