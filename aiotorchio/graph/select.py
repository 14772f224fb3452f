"""Which tensors of a message are wanted: names, shell patterns, or a predicate."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import translate
from itertools import islice
from typing import Any, NamedTuple

import torch

from aiotorchio.errors import LimitExceeded, MismatchError, ProtocolError
from aiotorchio.graph.names import key_text, utf8
from aiotorchio.interrupt import check_interrupt, interruptible

__all__ = ["Select", "revise", "selected"]

Select = str | Iterable[str] | Callable[[str], object]

_WILDCARDS = re.compile(r"[*?\[]")
# Names are sorted in parts, since sorting holds all other threads up: 10,000 take 3 ms.
_SORTED_AT_ONCE = 10_000
# Comparing a name with a pattern takes up to 20 ns a character, and holds all other threads up.
_COMPARED_MAX = 2**16


def selected(select: Select, names: Iterable[str]) -> set[str]:
    """The names that are selected.

    Args:
        select: A name or a pattern (``*``, ``?``, ``[...]``, as in ``fnmatch``, of which ``*``
            matches dots, too), several of them, or a function of a name.
        names: Those that there are.

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
        raise MismatchError(f"selected, but not in the message: {', '.join(map(repr, unmatched))}")
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
    """Replace tensors in the dicts, lists and tuples of an object; in place, if that can be.

    Args:
        obj: Just built, so that nobody else has it.
        names: Paths of the tensors that can be replaced.
        change: Gets a name, and the tensor there; returns what comes in its place, or None if it is
            to be left out. Only dicts can leave a tensor out.

    Returns:
        The object; another one if it is a tensor or a tuple.

    Raises:
        ProtocolError: Paths that are far longer, all in all, than the names.
        LimitExceeded: Nested deeper than Python can follow.
    """
    try:
        return _Revision(names, change).of(None, obj)
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
        # Containers that were met, and what became of them: as in ``walk``, the first path counts.
        self._met: dict[int, Any] = {}

    def of(self, path: _Path | None, value: Any) -> Any:
        """What comes in the place of a value; None for a tensor that is left out."""
        if isinstance(value, torch.Tensor):
            return self._tensor(path, value)
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) in self._met:
            return self._met[id(value)]
        check_interrupt()
        self._met[id(value)] = value
        if isinstance(value, tuple):
            self._met[id(value)] = self._tuple(path, value)
            return self._met[id(value)]
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in interruptible(list(items)):
            if not isinstance(item, torch.Tensor | dict | list | tuple):
                continue
            other = self.of(_Path.below(path, utf8(key_text(key))), item)
            if other is None and isinstance(value, dict):
                del value[key]
            elif other is not None and other is not item:
                value[key] = other
        return value

    def _tuple(self, path: _Path | None, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = []
        for key, item in enumerate(value):
            other = self.of(_Path.below(path, str(key)), item)
            items.append(item if other is None else other)
        if all(other is item for other, item in zip(items, value, strict=True)):
            return value
        # A named tuple takes its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _tensor(self, path: _Path | None, tensor: torch.Tensor) -> torch.Tensor | None:
        if (path.length if path else 0) not in self._lengths:
            return tensor
        name = path.joined() if path else ""
        self._allowance -= len(name)
        if self._allowance < 0:
            raise ProtocolError("tensors in other places than their names say", entry="skeleton")
        return self._change(name, tensor) if name in self._names else tensor


class _Path(NamedTuple):
    """The key of an item, and how to get to where it is."""

    above: _Path | None
    key: str
    length: int

    @classmethod
    def below(cls, above: _Path | None, key: str) -> _Path | None:
        """As in a name: no dot follows a path that is empty."""
        if above is None:
            return cls(None, key, len(key)) if key else None
        return cls(above, key, above.length + 1 + len(key))

    def joined(self) -> str:
        """With dots."""
        keys: list[str] = []
        path: _Path | None = self
        while path is not None:
            keys.append(path.key)
            path = path.above
        return ".".join(reversed(keys))
