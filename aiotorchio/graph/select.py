"""Which tensors of a message are wanted: names, shell patterns, or a predicate."""

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
# Names are sorted in parts, since sorting holds all other threads up: 10,000 take 3 ms.
_SORTED_AT_ONCE = 10_000
# Comparing a name with a pattern takes up to 20 ns a character, and holds all other threads up.
_COMPARED_MAX = 2**16


def selected(select: Select, names: Iterable[str], others: str = "") -> set[str]:
    """The names that are selected.

    Args:
        select: A name or a pattern (``*``, ``?``, ``[...]``, as in ``fnmatch``, of which ``*``
            matches dots, too), several of them, or a function of a name.
        names: Those that there are.
        others: Why there may be more that are not known, for errors.

    Raises:
        MismatchError: A name or a pattern that none of them matches.
        LimitExceeded: A name that is too long to be compared with a pattern.
    """
    if callable(select):
        return {name for name in interruptible(names, 100) if select(name)}
    # A peer may send millions of names: of each pattern, only those are compared that begin as it
    # does.
    known = _Sorted(names)
    found: set[str] = set()
    unmatched = []
    for pattern in dict.fromkeys([select] if isinstance(select, str) else select):
        check_interrupt()
        # First as it stands: a name may have brackets.
        matches = {pattern} if pattern in known.names else known.matching(pattern)
        found |= matches
        if not matches:
            unmatched.append(pattern)
    if unmatched:
        unknown = f" (tensors of several parts are not known by name: {others})" if others else ""
        listed = ", ".join(map(repr, unmatched))
        raise MismatchError(f"selected, but not in the message{unknown}: {listed}")
    return found


class _Sorted:
    """Names, in an order in which those with one beginning are found quickly."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(interruptible(names))
        self._parts: list[list[str]] = []

    def matching(self, pattern: str) -> set[str]:
        """The names that a shell pattern matches."""
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
            f"a tensor has a name of {len(name)} characters, and patterns are compared with names "
            f"of up to {_COMPARED_MAX}",
            entry="header",
        )
    return name


def revise(
    obj: Any, names: Collection[str], change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Any:
    """Replace tensors in the containers of an object; in place, if that can be.

    One container that is in several places stays one. A tensor in it is left out if it is at all
    of its places; otherwise the first place at which it is not says what comes in its place.

    Args:
        obj: Just built, so that nobody else has it.
        names: Paths of the tensors that can be replaced.
        change: Gets a name, and the tensor there; returns what comes in its place, or None if it is
            to be left out. Only dicts and other mappings that can change leave a tensor out.

    Returns:
        The object; another one if it is a tensor or a tuple.

    Raises:
        ProtocolError: Paths that are far longer, all in all, than the names.
        LimitExceeded: Nested deeper than Python can follow.
    """
    try:
        return _Revision(names, change).whole(obj)
    except RecursionError:
        raise LimitExceeded("nested too deep", entry="skeleton") from None


class _Revision:
    def __init__(
        self, names: Collection[str], change: Callable[[str, torch.Tensor], torch.Tensor | None]
    ) -> None:
        self._names, self._change = names, change
        # A pickle can have many tensors under a key of a megabyte. Paths are joined only where
        # there are tensors, and for as long as the names of the header would give that many.
        self._lengths = {len(name) for name in names}
        self._allowance = 2 * sum(map(len, names)) + 2**20
        # Of each container, by the position of the tensor: what comes in its place. What one of
        # several places leaves out may be wanted at another one.
        self._decided: dict[int, dict[int, torch.Tensor | None]] = {}
        # Some mappings make their items each time: an id must not come again.
        self._seen: dict[int, Any] = {}
        # Containers that were met, and what became of them.
        self._done: dict[int, Any] = {}

    def whole(self, obj: Any) -> Any:
        """What comes in the place of the object."""
        if isinstance(obj, torch.Tensor):
            name = self._name(None)
            return obj if name is None else self._change(name, obj)
        self._decide(obj)
        return self._applied(obj)

    def _decide(self, obj: Any) -> None:
        """Ask for every place of every tensor, in the order of ``walk``."""
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
        """The first place counts at which the tensor is not left out."""
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
            raise ProtocolError("tensors in other places than their names say", entry="skeleton")
        return name if name in self._names else None

    def _applied(self, value: Any) -> Any:
        """What comes in the place of a container, or of anything else but a tensor."""
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
        # A named tuple takes its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _remove(container: Any, key: Any) -> None:
    """Leave an item out, where that can be: not of a list, nor of a mapping that can't change."""
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
