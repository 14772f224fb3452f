"""What a pickle may say about the class of a tensor and the attributes of one.

A state could set anything: ``data`` would give a tensor other memory, ``__class__`` another class.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from aiotorchio.codecs.pickled.safe_builtins import is_dunder
from aiotorchio.common.torch_private import JAGGED_PARTS, PARAMETER_MARK, JaggedTensor
from aiotorchio.errors import UnsafeObjectError

__all__ = ["TypeName", "set_attributes", "tensor_class"]

_ABSENT = object()


class TypeName:
    """Stands for a class that may be named but neither called nor instantiated.

    torch puts the class of a tensor with attributes into the pickle. The class itself would be
    a way to memory that was never written: ``torch.Tensor(64)`` shows what was there before.
    """

    def __init__(self, kind: type[torch.Tensor]) -> None:
        self.kind = kind

    def __call__(self, *_: object) -> Any:
        """Refuse: a message may hold no uninitialised memory."""
        raise UnsafeObjectError(f"{self.kind.__name__} may be named, not called")


def set_attributes(tensor: torch.Tensor, state: Any) -> None:
    """Set attributes of a tensor that its class leaves to its instances."""
    parts = state if type(state) is tuple and len(state) == 2 else (state, None)
    for part in parts:
        for key, value in (part or {}).items():
            if type(key) is not str or is_dunder(key) or not _is_free(tensor, key):
                shown = key if type(key) is str else type(key)
                raise UnsafeObjectError(f"attribute {shown!r} of a {type(tensor).__name__}")
            setattr(tensor, key, value)


def _is_free(tensor: torch.Tensor, key: str) -> bool:
    kind = type(tensor)
    if key == PARAMETER_MARK and (kind is torch.Tensor or kind is torch.nn.Parameter):
        return False
    # Those of the jagged layout were checked when it was made.
    if key in JAGGED_PARTS and isinstance(tensor, JaggedTensor):
        return False
    found = next((vars(base)[key] for base in kind.__mro__ if key in vars(base)), _ABSENT)
    if found is _ABSENT:
        return True
    # Whoever trusts a class lets its instances hide defaults and methods, but not set anything
    # through a descriptor: "data" would give them other memory. (Some of torch's own classes are
    # trusted by nobody but torch.)
    if kind.__module__.split(".")[0] != "torch" and not hasattr(type(found), "__set__"):
        return True
    # A subclass says which attributes its instances have, even if Tensor has a method of that
    # name (the jagged layout has ``_values``).
    return any(
        key in vars(base).get("__slots__", ()) or key in inspect.get_annotations(base)
        for base in type(tensor).__mro__
        if not any(base is other for other in torch.nn.Parameter.__mro__)
    )


def tensor_class(kind: Any) -> type[torch.Tensor]:
    """The class that a pickle names for a tensor."""
    named = kind.kind if isinstance(kind, TypeName) else kind
    if not isinstance(named, type) or not issubclass(named, torch.Tensor):
        raise UnsafeObjectError("a tensor subclass that is none")
    return named
