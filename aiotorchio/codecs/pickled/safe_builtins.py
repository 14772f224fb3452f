"""Checked replacements of the builtins that a pickle calls to make plain objects.

In: the arguments of a call in a pickle. Out: the object. ``allowlist`` names these functions. Each
accepts only the arguments that Python's pickle writes: builtins also accept sizes and any iterable,
and ``encode`` any encoding, at a cost that the size of the pickle does not bound. An
``UnsafeObjectError`` means other arguments, an ``InvalidObjectError`` invalid values.
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
from aiotorchio.wire.header import shortened

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
    """Makes the ordered dicts of one load, and checks their attributes at the end."""

    def __init__(self) -> None:
        self._made: list[OrderedDict[Any, Any]] = []

    def make(self, *args: Any) -> OrderedDict[Any, Any]:
        """Make an empty OrderedDict; the unpickler adds the items later."""
        if args:
            raise UnsafeObjectError(
                "the pickle must call OrderedDict() without arguments, and add its items later"
            )
        made: OrderedDict[Any, Any] = OrderedDict()
        self._made.append(made)
        return made

    def check(self) -> None:
        """Refuse attributes that hide methods; called once the whole object is built."""
        for made in self._made:
            for key in vars(made):
                if type(key) is not str:
                    raise InvalidObjectError(
                        f"an OrderedDict has an attribute named by {type(key).__name__}, not str"
                    )
                if hasattr(OrderedDict, key) or is_dunder(key):
                    raise InvalidObjectError(
                        f"the pickle sets attribute {shortened(key)!r} of an OrderedDict, which is "
                        "not allowed"
                    )
            drop_mark(vars(made).get("_metadata"))


def make_counter(items: Any = None) -> Counter[Any]:
    """Make a ``Counter`` from a dict, as pickle writes it."""
    if items is not None and type(items) is not dict:
        raise UnsafeObjectError(
            f"the pickle must make a Counter from a dict, not from {type(items).__name__}"
        )
    return Counter(items)


def is_dunder(name: str) -> bool:
    """Whether a name is reserved by Python: ``__array_interface__`` could refer to any memory."""
    return name.startswith("__") and name.endswith("__")


def check_hashes(items: Collection[Any]) -> None:
    """Refuse many items with the same hash: a set of n of them takes n * n steps."""
    most = bounds.BOUNDS.equal_hashes
    if len(items) - len(set(map(hash, items))) < most:
        return
    # A count takes more memory, and honest objects hardly ever need it.
    if max(Counter(map(hash, items)).values()) > most:
        raise LimitExceeded(f"a set has more than {most} items with the same hash")


def make_set(items: Any = ()) -> set[Any]:
    """Make a set from a list, as pickle writes it."""
    is_empty_tuple = type(items) is tuple and not items
    if type(items) is not list and not is_empty_tuple:
        raise UnsafeObjectError(
            f"the pickle must make a set from a list, not from {type(items).__name__}"
        )
    check_hashes(items)
    return set(items)


def make_frozenset(items: Any = ()) -> frozenset[Any]:
    """Make a frozenset from a list, as pickle writes it."""
    return frozenset(make_set(items))


def make_size(items: Any = ()) -> torch.Size:
    """Make a ``torch.Size`` from a tuple."""
    if type(items) is not tuple:
        raise UnsafeObjectError(
            f"the pickle must make a Size from a tuple, not from {type(items).__name__}"
        )
    if any(type(item) is int and not -(2**63) <= item < 2**63 for item in items):
        raise InvalidObjectError("a torch.Size has a dimension beyond 64 bits")
    return torch.Size(items)


def make_complex(*args: Any) -> complex:
    """Make a complex number from its two parts."""
    if len(args) != 2 or any(type(part) not in (int, float) for part in args):
        raise InvalidObjectError("the pickle must make a complex number from its two parts")
    return complex(*args)


def make_device(*args: Any) -> torch.device:
    """Make a ``torch.device`` from its type, and its index if it has one."""
    kind, index = (*args, None)[:2] if args else (None, None)
    if type(kind) is not str or len(args) > 2 or (index is not None and type(index) is not int):
        raise UnsafeObjectError("the pickle must make a device from its type and index")
    device = torch.device(*args)
    # torch keeps eight bits of an index: 300 would become 44.
    named = kind if index is None else f"{kind}:{index}"
    if str(device) != named:
        raise InvalidObjectError(f"torch reads device {shortened(named)!r} as {device}")
    return device


def make_layout(name: Any) -> torch.layout:
    """Return a ``torch.layout`` by its name."""
    if type(name) is not str:
        raise UnsafeObjectError(
            f"the pickle must name a layout by a str, not by {type(name).__name__}"
        )
    return get_layout(name)


def make_bytes(*args: Any) -> bytes:
    """Return empty bytes; a pickle makes other bytes with ``encode``."""
    if args:
        raise UnsafeObjectError(
            "the pickle must make bytes with _codecs.encode, not with arguments of bytes()"
        )
    return b""


def encode(*args: Any) -> bytes:
    """Make bytes from the characters of a str, as protocol 2 writes them."""
    if [type(each) for each in args] != [str, str] or args[1] not in ("latin1", "latin-1"):
        raise UnsafeObjectError("the pickle must make bytes from a str, in latin-1")
    text: str = args[0]
    return text.encode("latin-1")


def make_bytearray(*args: Any) -> bytearray:
    """Make a bytearray from bytes, or from the arguments of ``encode``."""
    if not args:
        return bytearray()
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    return bytearray(encode(*args))
