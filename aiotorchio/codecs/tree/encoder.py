"""Encoder of the tree codec: an object becomes a skeleton, and its tensors rows of the table.

``graph.flatten`` calls ``encode`` before it tries the pickle codec. ``NotATreeError`` means that
the object needs pickle: it has something that the tree codec does not know, such as a class, or
cannot keep, such as a list in two places.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from aiotorchio.codecs.tree.tags import INTEGER_MAX, INTEGER_MIN, PLAIN_TYPES, SIZE_MAX, Tag
from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import interruptible
from aiotorchio.table.state_metadata import without_mark
from aiotorchio.table.table import Table
from aiotorchio.table.torch_dtypes import DTYPE_NAMES

__all__ = ["NotATreeError", "encode"]

# Deeper objects need pickle. This is far below Python's recursion limit and above any state dict.
_ENCODE_DEPTH_MAX = 100


class NotATreeError(Exception):
    """The object needs the pickle codec.

    Args:
        what: The part of the object that the tree codec does not know.
        path: Path to this part, as in a name; "" for the object itself.
    """

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(f"{path.removesuffix('.')!r} is {what}" if path else what)


def encode(obj: object, table: Table) -> bytes:
    """Write the skeleton of an object, and add its tensors to the table.

    Args:
        obj: Any object.
        table: Receives the tensors; it must be discarded if this raises.

    Returns:
        The skeleton.

    Raises:
        NotATreeError: The object needs the pickle codec.
    """
    try:
        with gc_paused():
            return msgspec.msgpack.encode(_Encoder(table).node(obj, "", 0))
    except UnicodeEncodeError:
        raise NotATreeError("it has a text that UTF-8 cannot carry") from None


class _Encoder:
    def __init__(self, table: Table) -> None:
        self._table = table
        # Containers that were met, by id(): the caller's object keeps them alive.
        self._seen: set[int] = set()
        # Copies made here, kept alive since their ids are in ``_seen``.
        self._copies: list[Any] = []

    def node(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            if INTEGER_MIN <= value <= INTEGER_MAX:
                return value
            size = value.bit_length() // 8 + 1
            return (Tag.INTEGER, value.to_bytes(size, "little", signed=True))
        if isinstance(value, torch.Tensor):
            row = self._table.add_tensor(value, path)
            if row is None:
                raise NotATreeError(
                    f"a {kind.__name__} that is sparse, quantized or nested, of a subclass, or has "
                    "Python attributes",
                    path,
                )
            return (Tag.TENSOR, row)
        container = _CONTAINERS.get(kind)
        if container is not None:
            if depth == _ENCODE_DEPTH_MAX:
                raise NotATreeError(f"nested deeper than {depth} levels", path)
            self._enter(value, path)
            return container(self, value, path + "." if path else "", depth + 1)
        leaf = _LEAVES.get(kind)
        if leaf is None:
            raise NotATreeError(f"a {kind.__name__}", path)
        return leaf(value)

    def _enter(self, value: Any, path: str) -> None:
        """Refuse a container in two places: the receiver would get two containers."""
        if id(value) in self._seen:
            # One tuple of plain values works like two (the betas of an optimizer).
            if type(value) is tuple and all(type(item) in PLAIN_TYPES for item in value):
                return
            raise NotATreeError(f"a {type(value).__name__} that is in another place, too", path)
        self._seen.add(id(value))

    def sequence(self, value: Sequence[Any], tag: int, path: str, depth: int) -> Any:
        node = self.node
        return [
            tag,
            *[node(item, f"{path}{n}", depth) for n, item in interruptible(enumerate(value))],
        ]

    def members(self, value: set[Any], path: str, depth: int) -> Any:
        return [Tag.SET, *[self.node(item, path.removesuffix("."), depth) for item in value]]

    def pairs(self, value: dict[Any, Any], head: list[Any], path: str, depth: int) -> Any:
        node = self.node
        for key, item in interruptible(value.items()):
            if type(key) is not str and (
                type(key) is not int or not INTEGER_MIN <= key <= INTEGER_MAX
            ):
                raise NotATreeError(f"a dict with a {type(key).__name__} as key", path)
            head.append(key)
            head.append(node(item, f"{path}{key}", depth))
        return head

    def ordered(self, value: OrderedDict[Any, Any], path: str, depth: int) -> Any:
        # nn.Module.state_dict() stores versions in this attribute of the dict.
        attributes = vars(value)
        if attributes.keys() - {"_metadata"}:
            raise NotATreeError("an OrderedDict with attributes", path)
        has = "_metadata" in attributes
        metadata = []
        if has:
            versions = without_mark(attributes["_metadata"])
            self._copies.append(versions)
            metadata = [self.node(versions, "_metadata", depth)]
        return self.pairs(value, [Tag.ORDERED_DICT, metadata], path, depth)


_ATOMS = PLAIN_TYPES - {int}
_CONTAINERS: dict[type, Callable[[_Encoder, Any, str, int], Any]] = {
    list: lambda e, value, path, depth: e.sequence(value, Tag.LIST, path, depth),
    tuple: lambda e, value, path, depth: e.sequence(value, Tag.TUPLE, path, depth),
    dict: lambda e, value, path, depth: e.pairs(value, [Tag.DICT], path, depth),
    OrderedDict: lambda e, value, path, depth: e.ordered(value, path, depth),
    set: lambda e, value, path, depth: e.members(value, path, depth),
}


def _dtype_leaf(value: torch.dtype) -> Any:
    if value not in DTYPE_NAMES:
        raise NotATreeError(f"it has {value}, which has no name in the format")
    return (Tag.DTYPE, DTYPE_NAMES[value])


def _size_leaf(value: torch.Size) -> Any:
    if len(value) > SIZE_MAX:
        raise NotATreeError(f"a size of more than {SIZE_MAX} dimensions")
    return (Tag.SIZE, *value)


_LEAVES: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: (Tag.COMPLEX, value.real, value.imag),
    torch.Size: _size_leaf,
    torch.dtype: _dtype_leaf,
    torch.device: lambda value: (Tag.DEVICE, str(value)),
}
