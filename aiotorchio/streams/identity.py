"""A table of what is known of objects of the user, each told apart by its identity.

``WeakKeyDictionary`` calls their ``__hash__`` and ``__eq__``: two streams that compare equal would
be one, and a tensor, which compares element by element, would raise.
"""

from __future__ import annotations

import functools
from typing import Any, Generic, TypeVar
from weakref import ref

__all__ = ["IdentityTable"]

V = TypeVar("V")


class IdentityTable(Generic[V]):
    """Values of objects, hashable or not, as long as these live.

    Threads may use it at the same time, and an interrupt between any two lines leaves it whole:
    each change is one operation of a dict with integers as keys. Setting a value of an object that
    cannot be weakly referenced is a ``TypeError``.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Any], V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def setdefault(self, key: Any, value: V) -> V:
        """The value of an object, which is the given one if it has none."""
        return self._entries.setdefault(id(key), (self._watched(key), value))[1]

    def __setitem__(self, key: Any, value: V) -> None:
        self._entries[id(key)] = (self._watched(key), value)

    def pop(self, key: Any, default: V) -> V:
        """Take the value of an object out of the table."""
        entry = self._entries.pop(id(key), None)
        return default if entry is None else entry[1]

    def _watched(self, key: Any) -> ref[Any]:
        # The callback runs before the memory of the object, and with it its id, can be used again.
        # It is not a function of Python, in which an interrupt could come.
        return ref(key, functools.partial(self._entries.pop, id(key)))
