"""Calls of a pickle that are noted instead of carried out (see ``composite``).

In: the allowlist of a load. Out: stand-ins for what makes tensors and for what the caller trusts,
whose results are ``Call`` objects, and the names of those results in the containers around them.
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
    """Stands for the tensor of a row, or for a storage.

    Args:
        pid: What the pickle has: the number of a row, or what ``pickled`` writes for a storage.
        storage: The number of the storage that is needed.
    """

    __slots__ = ("pid", "storage")

    def __init__(self, pid: Any, storage: int) -> None:
        self.pid, self.storage = pid, storage


class Seals:
    """What was in containers when a call used them.

    A call that is carried out later must find what it would have found at its place in the pickle,
    which is what was charged for it.
    """

    def __init__(self) -> None:
        # By id: the container, and its parts; of a tuple, which cannot change, none.
        self._sealed: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def add(self, values: Iterable[Any]) -> None:
        """Remember what is in these, and in what they have."""
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
        """Whether a container has changed since a call used it; forgets all of them."""
        sealed = list(self._sealed.values())
        self._sealed.clear()
        return any(
            type(value) is not tuple and not _same(tuple(parts_of(value)), parts)
            for value, parts in interruptible(sealed, 100)
        )


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


class Call:
    """A call that is noted, and what it makes.

    Attributes:
        function: What is called.
        args: With the results of other calls, and references, where those are arguments.
        new: Whether an instance is made of a class without calling the class.
        state: In a tuple, if the result is given one.
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
    """The class of stand-ins for functions and classes, which are classes to the unpickler.

    Attributes:
        held: What one stands for, in a tuple: of a class, functions would be attributes.
        seals: Of all calls of a pickle.
    """

    held: tuple[Any]
    seals: Seals | None

    def __call__(cls, *args: Any) -> Any:
        """Note a call; to make an instance without one, ``__new__`` of the stand-in is called."""
        return Call(cls.held[0], args, cls.seals, new=False)


class _Base(metaclass=Proxy):
    held = (None,)
    seals = None

    def __new__(cls, *args: Any) -> Any:
        return Call(cls.held[0], args, cls.seals, new=True)


# No pickle can name this: a path has no line breaks.
_RESULT = "\n"


def proxies(allowlist: Allowlist, seals: Seals) -> dict[str, Any]:
    """What a pickle may name, with stand-ins for what makes tensors or is the caller's."""
    deferred = allowlist.deferred()
    allowed = {
        path: Proxy("_Base", (_Base,), {"held": (value,), "seals": seals})
        if path in deferred and callable(value) and not _is_container(value)
        else value
        for path, value in allowlist.globals.items()
    }
    # To be given a state, which a noted call takes for its result.
    return allowed | {_RESULT: Call}


def _is_container(value: Any) -> bool:
    """Whether an unpickler fills what this makes, and attributes are set to it, by itself."""
    return any(value is kind for kind in DICTS)


def parts_of(value: Any) -> Iterator[Any]:
    """What a call or a container is made of."""
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
    """The row of the tensor that a tensor with attributes is made of (see ``reduced``)."""
    args = call.args
    if len(args) == 4 and isinstance(args[0], Proxy) and type(args[2]) is tuple:
        args = args[2]
    first = args[0] if args else None
    return first.pid if isinstance(first, Reference) and type(first.pid) is int else None


def _is_made(key: Any) -> bool:
    """Whether a key is not there yet, so that nobody knows its text."""
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
    """The results of calls in containers, with every path to them, as ``names.walk`` has them.

    What is below a key that is a result itself has no name: the key has no text yet.

    Raises:
        LimitExceeded: Names that are far too long, all in all: a key can be above many of them.
    """
    return leaves_of(obj, Call, unknown=_is_made)
