"""A weak table with the identity of objects as keys.

``WeakKeyDictionary`` calls ``__hash__`` and ``__eq__`` of its keys: it would mix up two streams
that compare equal, and raise for a tensor, which compares element by element.
"""

from __future__ import annotations

import functools
from typing import Any, Generic, TypeVar
from weakref import ref

__all__ = ["IdentityTable", "is_referable"]

V = TypeVar("V")


def is_referable(obj: Any) -> bool:
    """Whether an object can be weakly referenced, and so be a key of the table."""
    try:
        ref(obj)
    except TypeError:
        return False
    return True


class IdentityTable(Generic[V]):
    """Values for objects, hashable or not, for as long as the objects live.

    Several threads may use it at the same time, and an interrupt between any two lines leaves it
    consistent: each change is one operation of a dict with integers as keys. Setting a value for an
    object that cannot be weakly referenced raises a ``TypeError``.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Any], V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def setdefault(self, key: Any, value: V) -> V:
        """Return the value of an object, after setting it to ``value`` if it has none."""
        return self._entries.setdefault(id(key), (self._watched(key), value))[1]

    def __setitem__(self, key: Any, value: V) -> None:
        self._entries[id(key)] = (self._watched(key), value)

    def pop(self, key: Any, default: V) -> V:
        """Remove and return the value of an object."""
        entry = self._entries.pop(id(key), None)
        return default if entry is None else entry[1]

    def _watched(self, key: Any) -> ref[Any]:
        # The callback runs before the memory of the object, and with it its id, can be used again.
        # It is no Python function, in which an interrupt could come.
        return ref(key, functools.partial(self._entries.pop, id(key)))
