"""Checked counterparts of the builtins that a pickle calls to make plain objects.

Each takes what pickle itself passes to it, and nothing else: the builtins take sizes, and anything
that can be walked over, at a cost that the size of the pickle does not bound. So do other codecs
than latin-1.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Any

import torch

from aiotorchio.common.torch_private import get_layout
from aiotorchio.errors import InvalidObjectError, LimitExceeded, UnsafeObjectError
from aiotorchio.table.state_metadata import drop_mark
from aiotorchio.wire import bounds

__all__ = [
    "OrderedDicts",
    "check_hashes",
    "encode",
    "make_bytearray",
    "make_bytes",
    "make_device",
    "make_frozenset",
    "make_layout",
    "make_set",
    "make_size",
]


class OrderedDicts:
    """Makes those of one load, and remembers them: they can have attributes of their own."""

    def __init__(self) -> None:
        self._made: list[OrderedDict[Any, Any]] = []

    def make(self, *args: Any) -> OrderedDict[Any, Any]:
        """An empty one; pickle adds the items later."""
        if args:
            raise UnsafeObjectError("OrderedDict() with arguments")
        made: OrderedDict[Any, Any] = OrderedDict()
        self._made.append(made)
        return made

    def check(self) -> None:
        """Refuse attributes that pass for methods; to be called when all is built."""
        for made in self._made:
            for key in vars(made):
                if type(key) is not str:
                    raise InvalidObjectError(f"an attribute named by {type(key).__name__}")
                if hasattr(OrderedDict, key) or is_dunder(key):
                    raise InvalidObjectError(f"attribute {key!r} of an OrderedDict")
            drop_mark(vars(made).get("_metadata"))


def make_counter(items: Any = None) -> Counter[Any]:
    """A ``Counter`` from the dict that pickle makes of it."""
    if items is not None and type(items) is not dict:
        raise UnsafeObjectError(f"a Counter from {type(items).__name__}")
    return Counter(items)


def is_dunder(name: str) -> bool:
    """Whether a name is one of Python's own: ``__array_interface__`` can point anywhere."""
    return name.startswith("__") and name.endswith("__")


def check_hashes(items: Collection[Any]) -> None:
    """Refuse many items with the same hash: a set of them takes the square of their number."""
    most = bounds.BOUNDS.equal_hashes
    if len(items) - len(set(map(hash, items))) < most:
        return
    # Counting takes more memory, and is needed for what is hardly ever honest.
    if max(Counter(map(hash, items)).values()) > most:
        raise LimitExceeded(f"more than {most} items with the same hash")


def make_set(items: Any = ()) -> set[Any]:
    """A set from the list that pickle makes of it."""
    is_empty_tuple = type(items) is tuple and not items
    if type(items) is not list and not is_empty_tuple:
        raise UnsafeObjectError(f"a set from {type(items).__name__}")
    check_hashes(items)
    return set(items)


def make_frozenset(items: Any = ()) -> frozenset[Any]:
    """Likewise."""
    return frozenset(make_set(items))


def make_size(items: Any = ()) -> torch.Size:
    """A ``torch.Size`` from a tuple."""
    if type(items) is not tuple:
        raise UnsafeObjectError(f"a Size from {type(items).__name__}")
    if any(type(item) is int and not -(2**63) <= item < 2**63 for item in items):
        raise InvalidObjectError("a Size beyond 64 bits")
    return torch.Size(items)


def make_complex(*args: Any) -> complex:
    """A complex number from its two parts."""
    if len(args) != 2 or any(type(part) not in (int, float) for part in args):
        raise InvalidObjectError("a complex number from anything but its two parts")
    return complex(*args)


def make_device(*args: Any) -> torch.device:
    """A ``torch.device`` from what it is pickled as: its type, and its index if it has one."""
    kind, index = (*args, None)[:2] if args else (None, None)
    if type(kind) is not str or len(args) > 2 or (index is not None and type(index) is not int):
        raise UnsafeObjectError("a device from anything but its type and index")
    device = torch.device(*args)
    # torch keeps eight bits of an index: 300 would become 44.
    if str(device) != (kind if index is None else f"{kind}:{index}"):
        raise InvalidObjectError(f"device {(kind, index)} is {device} to torch")
    return device


def make_layout(name: Any) -> torch.layout:
    """A ``torch.layout`` by its name."""
    if type(name) is not str:
        raise UnsafeObjectError(f"a layout from {type(name).__name__}")
    return get_layout(name)


def make_bytes(*args: Any) -> bytes:
    """Empty bytes; others are made with ``encode``."""
    if args:
        raise UnsafeObjectError("bytes() with arguments")
    return b""


def encode(*args: Any) -> bytes:
    """Bytes, as protocol 2 has them: the characters of a str."""
    if [type(each) for each in args] != [str, str] or args[1] not in ("latin1", "latin-1"):
        raise UnsafeObjectError("bytes made of anything but a str in latin-1")
    text: str = args[0]
    return text.encode("latin-1")


def make_bytearray(*args: Any) -> bytearray:
    """A bytearray from bytes, or from what ``encode`` takes."""
    if not args:
        return bytearray()
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    return bytearray(encode(*args))
