"""The selection: names, shell patterns or a predicate, and the change of an object by name.

In: ``select``, and the names of a message, its composite tensors and the targets; or an object that
was just built. Out: the selected names; or the object, with tensors replaced or left out. A
``MismatchError`` means that a name or pattern has no match. ``engine.selection`` and
``engine.finish`` call it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from fnmatch import translate
from itertools import islice
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import LimitExceeded, MismatchError, ProtocolError
from aiotorchio.table.containers import Path, SharedContainers, items_of, key_text, utf8

__all__ = ["Select", "revise", "selected"]

Select = str | Iterable[str] | Callable[[str], object]

_WILDCARDS = re.compile(r"[*?\[]")
_CHANGING = (dict, MutableMapping, torch.nn.ParameterDict)
_CONTAINERS = (dict, list, tuple, Mapping, torch.nn.ParameterDict)
# Names are sorted in parts, since sorting holds up all other threads: 10,000 names take 3 ms.
_SORTED_AT_ONCE = 10_000
# The longest name that is compared with a pattern: a comparison takes up to 20 ns a character, and
# holds up all other threads.
_COMPARED_MAX = 2**16


def selected(select: Select, names: Iterable[str], unknown_reason: str = "") -> set[str]:
    """Return the selected names.

    Args:
        select: A name or a pattern (``*``, ``?`` and ``[...]`` as in ``fnmatch``; ``*`` matches
            dots as well), several of them, or a function of a name.
        names: The names of the message, of its composite tensors, and of the targets.
        unknown_reason: The reason why the names of composite tensors are unknown, for errors.

    Raises:
        MismatchError: A name or a pattern has no match.
        LimitExceeded: A name is too long to be compared with a pattern.
    """
    if callable(select):
        return {name for name in interruptible(names, 100) if select(name)}
    # A peer may send millions of names, so a pattern is compared only with the names that begin
    # with its text before the first wildcard.
    known = _Sorted(names)
    found: set[str] = set()
    unmatched = []
    for pattern in dict.fromkeys([select] if isinstance(select, str) else select):
        check_interrupt()
        # The pattern itself is tried first, since a name may have brackets.
        matches = {pattern} if pattern in known.names else known.matching(pattern)
        found |= matches
        if not matches:
            unmatched.append(pattern)
    if unmatched:
        unknown = (
            f" (the names of composite tensors are unknown: {unknown_reason})"
            if unknown_reason
            else ""
        )
        listed = ", ".join(map(repr, unmatched))
        raise MismatchError(f"selected, but not in the message{unknown}: {listed}")
    return found


class _Sorted:
    """Names, sorted in parts, for a quick search by their beginning."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(interruptible(names))
        self._parts: list[list[str]] = []

    def matching(self, pattern: str) -> set[str]:
        """Return the names that a shell pattern matches."""
        wildcard = _WILDCARDS.search(pattern)
        if wildcard is None:
            return set()
        if not self._parts:
            names = iter(self.names)
            while part := sorted(islice(names, _SORTED_AT_ONCE)):
                check_interrupt()
                self._parts.append(part)
        matches = re.compile(translate(pattern)).match
        candidates = self._beginning_with(pattern[: wildcard.start()])
        return set(filter(matches, map(_comparable, interruptible(candidates))))

    def _beginning_with(self, text: str) -> Iterator[str]:
        for part in self._parts:
            for index in range(bisect_left(part, text), len(part)):
                if not part[index].startswith(text):
                    break
                yield part[index]


def _comparable(name: str) -> str:
    if len(name) > _COMPARED_MAX:
        raise LimitExceeded(
            f"a tensor has a name of {len(name)} characters, and select compares patterns with "
            f"names of at most {_COMPARED_MAX}: pass whole names, or a function",
            entry="header",
        )
    return name


def revise(
    obj: Any, names: Collection[str], change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Any:
    """Replace tensors in the containers of an object; in place, where that is possible.

    A container in several places stays one container. A tensor in it is left out if ``change`` says
    so for all of its places; otherwise the first other answer counts.

    Args:
        obj: An object that was just built, and that no other code has.
        names: The paths of the tensors that can be replaced.
        change: Called with a name and the tensor there; returns the replacement, or None to leave
            the tensor out. Only dicts and other mutable mappings can leave a tensor out.

    Returns:
        The object; another one if it is a tensor or a tuple.

    Raises:
        ProtocolError: The paths in the object are far longer in total than the names.
        LimitExceeded: The object is nested deeper than Python's recursion limit allows.
    """
    try:
        return _Revision(names, change).apply(obj)
    except RecursionError:
        raise LimitExceeded(
            "the object is nested too deep for Python's recursion limit", entry="skeleton"
        ) from None


class _Revision:
    def __init__(
        self, names: Collection[str], change: Callable[[str, torch.Tensor], torch.Tensor | None]
    ) -> None:
        self._names, self._change = names, change
        # A pickle can have many tensors under a key of a megabyte. Paths are joined only where a
        # tensor is, and only as many characters as the names of the header allow.
        self._lengths = {len(name) for name in names}
        self._allowance = 2 * sum(map(len, names)) + 2**20
        # Container and position -> the replacement of a tensor. A selection can leave a tensor
        # out at one of its places and keep it at another.
        self._decided: dict[int, dict[int, torch.Tensor | None]] = {}
        # Some mappings make their items at each access: no id may be used again.
        self._seen: dict[int, Any] = {}
        # Container -> the container in the result.
        self._done: dict[int, Any] = {}

    def apply(self, obj: Any) -> Any:
        """Return the replacement of the object."""
        if isinstance(obj, torch.Tensor):
            name = self._name(None)
            return obj if name is None else self._change(name, obj)
        self._decide(obj)
        return self._applied(obj)

    def _decide(self, obj: Any) -> None:
        """Call ``change`` for each place of each tensor, in the order of ``walk``."""
        seen = self._seen
        further: list[tuple[Path | None, Any]] = []
        waiting: list[tuple[Path | None, Any]] = [(None, obj)]
        while waiting:
            path, value = waiting.pop()
            items = items_of(value)
            if items is None:
                continue
            if id(value) in seen:
                further.append((path, value))
                continue
            check_interrupt()
            seen[id(value)] = value
            below: list[tuple[Path | None, Any]] = []
            for n, (key, item) in interruptible(enumerate(items)):
                if isinstance(item, torch.Tensor):
                    name = self._name(Path.below(path, utf8(key_text(key))))
                    self._note(name, value, n, item)
                elif isinstance(item, _CONTAINERS):
                    below.append((Path.below(path, utf8(key_text(key))), item))
            waiting += reversed(below)
        if further:
            for name, value, n, tensor in SharedContainers(further):
                self._note(name if name in self._names else None, value, n, tensor)

    def _note(self, name: str | None, container: Any, position: int, tensor: torch.Tensor) -> None:
        """Record the replacement at a place; of several, the first that is a tensor counts."""
        if name is None:
            return
        decided = self._decided.setdefault(id(container), {})
        other = self._change(name, tensor)
        if decided.get(position) is None:
            decided[position] = other

    def _name(self, path: Path | None) -> str | None:
        if (path.length if path else 0) not in self._lengths:
            return None
        name = path.joined() if path else ""
        self._allowance -= len(name)
        if self._allowance < 0:
            raise ProtocolError(
                "the skeleton has tensors in other places than their names say", entry="skeleton"
            )
        return name if name in self._names else None

    def _applied(self, value: Any) -> Any:
        """Return the replacement of a container; any other value as it is."""
        items = items_of(value)
        if items is None:
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        check_interrupt()
        self._done[id(value)] = value
        decided = self._decided.get(id(value), {})
        if isinstance(value, tuple):
            self._done[id(value)] = self._tuple(value, decided)
            return self._done[id(value)]
        for n, (key, item) in interruptible(enumerate(list(items))):
            if isinstance(item, torch.Tensor):
                other = decided.get(n, item)
            elif isinstance(item, _CONTAINERS):
                other = self._applied(item)
            else:
                continue
            if other is None:
                _remove(value, key)
            elif other is not item:
                _replace(value, key, other)
        return value

    def _tuple(
        self, value: tuple[Any, ...], decided: dict[int, torch.Tensor | None]
    ) -> tuple[Any, ...]:
        items = []
        for n, item in enumerate(value):
            tensor = isinstance(item, torch.Tensor)
            other = decided.get(n, item) if tensor else self._applied(item)
            items.append(item if other is None else other)
        if all(other is item for other, item in zip(items, value, strict=True)):
            return value
        # The class of a named tuple takes the items as separate arguments.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _remove(container: Any, key: Any) -> None:
    """Remove an item; nothing happens in lists and immutable mappings, which cannot lose one."""
    if isinstance(container, ChainMap):
        for each in container.maps:
            each.pop(key, None)
    elif isinstance(container, _CHANGING):
        del container[key]


def _replace(container: Any, key: Any, item: Any) -> None:
    if isinstance(container, ChainMap):
        next(each for each in container.maps if key in each)[key] = item
    elif isinstance(container, (list, *_CHANGING)):
        container[key] = item
