"""Calls of a pickle that are recorded, and made later or never.

In: the allowlist of a load. Out: proxies for functions that make tensors and for globals that the
caller trusts. A proxy returns a ``Call``, and ``calls_in`` finds the names of calls in the object.
``graph.composites`` uses this to make tensors of several rows one by one.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.table.containers import leaves_of

__all__ = [
    "CONTAINERS",
    "DICTS",
    "Call",
    "Proxy",
    "Reference",
    "Seals",
    "calls_in",
    "origin_of",
    "parts_of",
    "proxies",
]

DICTS = (dict, OrderedDict, Counter)
CONTAINERS = (list, tuple, set, frozenset, torch.Size, *DICTS)
_KINDS = frozenset(CONTAINERS)


class Reference:
    """A placeholder for the tensor of a row, or for a storage.

    Args:
        pid: The persistent id in the pickle.
        storage: The row of the storage that is needed.
    """

    __slots__ = ("pid", "storage")

    def __init__(self, pid: Any, storage: int) -> None:
        self.pid, self.storage = pid, storage


class Seals:
    """The contents of containers at the time when a call used them.

    A call that is made later must find the contents that it would have found in the pickle, since
    the scan has charged for these.
    """

    def __init__(self) -> None:
        # id() -> the container and its parts; () for a tuple, which cannot change.
        self._sealed: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def add(self, values: Iterable[Any]) -> None:
        """Remember the contents of these containers, and of all containers in them."""
        waiting = [value for value in values if type(value) in _KINDS]
        while waiting:
            check_interrupt()
            value = waiting.pop()
            if id(value) in self._sealed:
                continue
            parts = tuple(parts_of(value))
            self._sealed[id(value)] = (value, () if type(value) is tuple else parts)
            waiting += [part for part in parts if type(part) in _KINDS]

    def broken(self) -> bool:
        """Whether a container has changed since a call used it; forget all containers."""
        sealed = list(self._sealed.values())
        self._sealed.clear()
        return any(
            type(value) is not tuple and not _same(tuple(parts_of(value)), parts)
            for value, parts in interruptible(sealed, 100)
        )


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


class Call:
    """A recorded call, which is also the placeholder for its result.

    Attributes:
        function: The function or class that is called.
        args: The arguments; some can be a ``Call`` or a ``Reference``.
        new: Whether an instance is made with ``__new__`` alone.
        state: The state of the result in a tuple, or ().
    """

    __slots__ = ("_seals", "args", "function", "new", "state")

    def __init__(
        self, function: Any, args: tuple[Any, ...], seals: Seals | None, *, new: bool
    ) -> None:
        self.function, self.args, self.new = function, args, new
        self.state: tuple[Any, ...] = ()
        self._seals = seals
        self._seal(args)

    def __setstate__(self, state: Any) -> None:
        self.state = (state,)
        self._seal(self.state)

    def _seal(self, used: tuple[Any, ...]) -> None:
        if self._seals is not None:
            self._seals.add(used)


class Proxy(type):
    """The class of proxies for functions and classes; the unpickler takes a proxy for a class.

    Attributes:
        held: The function or class in a tuple, since a function alone would become a method.
        seals: The seals of all calls of a pickle.
    """

    held: tuple[Any]
    seals: Seals | None

    def __call__(cls, *args: Any) -> Any:
        """Record a call; for NEWOBJ the unpickler calls ``__new__`` of the proxy instead."""
        return Call(cls.held[0], args, cls.seals, new=False)


class _Base(metaclass=Proxy):
    held = (None,)
    seals = None

    def __new__(cls, *args: Any) -> Any:
        return Call(cls.held[0], args, cls.seals, new=True)


# The path of ``Call``, which no pickle can name, since a path has no line break.
_RESULT = "\n"


def proxies(allowlist: Allowlist, seals: Seals) -> dict[str, Any]:
    """Return the globals of an allowlist; those that make tensors or are trusted are proxies."""
    deferred = allowlist.deferred()
    allowed = {
        path: Proxy("_Base", (_Base,), {"held": (value,), "seals": seals})
        if path in deferred and callable(value) and not _is_container(value)
        else value
        for path, value in allowlist.globals.items()
    }
    # The unpickler gives a state only to classes that it knows: a call records it for its result.
    return allowed | {_RESULT: Call}


def _is_container(value: Any) -> bool:
    """Whether this is a dict class, whose instances the unpickler itself fills and completes."""
    return any(value is kind for kind in DICTS)


def parts_of(value: Any) -> Iterator[Any]:
    """Yield the parts of a call or a container."""
    if isinstance(value, Call):
        yield value.args
        yield from value.state
    elif isinstance(value, DICTS):
        yield getattr(value, "__dict__", None)
        for key, item in value.items():
            yield key
            yield item
    else:
        yield from value


def origin_of(call: Call) -> int | None:
    """Return the row of the tensor that a tensor with attributes is made of (see ``reduced``)."""
    args = call.args
    if len(args) == 4 and isinstance(args[0], Proxy) and type(args[2]) is tuple:
        args = args[2]
    first = args[0] if args else None
    return first.pid if isinstance(first, Reference) and type(first.pid) is int else None


def _is_made(key: Any) -> bool:
    """Whether a key is the result of a call, or has one in it: its text is not known yet."""
    waiting, seen = [key], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, Call | Reference | Proxy):
            return True
        if type(part) in (tuple, frozenset) and id(part) not in seen:
            check_interrupt()
            seen.add(id(part))
            waiting += part
    return False


def calls_in(obj: Any) -> Iterator[tuple[str, Call]]:
    """Yield the recorded calls in an object, each with every path to it, as in ``names.walk``.

    Calls below a key that is the result of a call have no name, since the key has no text yet.

    Raises:
        LimitExceeded: The paths together are too long: a long key can be part of many paths.
    """
    return leaves_of(obj, Call, unknown=_is_made)
