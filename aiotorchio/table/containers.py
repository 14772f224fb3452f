"""The containers whose items have names, and the further places of shared containers.

In: dicts, lists, tuples and other mappings. Out: their items, and every path to the tensors of a
container that is in several places. ``names.walk`` names tensors with it, and
``graph.select.revise`` finds the same paths in a received object. A ``LimitExceeded`` means that
the paths of a received object are too long in total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import LimitExceeded

__all__ = ["TEXT_MAX", "Path", "SharedContainers", "items_of", "key_text", "leaves_of", "utf8"]

T = TypeVar("T")

# A graph of containers can have any number of paths. These are the names and the characters that
# all further places of an object may have together; a header has no room for more.
_NAMES_MAX = 2**18
TEXT_MAX = 2**24

_NO_CONTAINERS = (str, bytes, int, float, complex, type(None))

# The length up to which keys that are not texts are shown.
_ITEMS_SHOWN, _LENGTH_SHOWN = 16, 1024


def items_of(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return the keys and items of a container; None for everything else.

    Containers are dicts, lists, tuples, other mappings, and ``torch.nn.ParameterDict``.
    """
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, list | tuple):
        return enumerate(value)
    if isinstance(value, Mapping | torch.nn.ParameterDict):
        return value.items()
    return None


def utf8(path: str) -> str:
    """Return a path as the header has it: without surrogates, which UTF-8 cannot encode."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()


def key_text(key: object) -> str:
    """Return the part of a path that stands for a key of a dict.

    A peer may have chosen the key: the text of a small key can be far longer than its pickle, and
    that of a tensor shows its numbers. The class name stands for such keys.
    """
    if isinstance(key, str) or _is_short(key):
        return str(key)
    if isinstance(key, tuple) and len(key) <= _ITEMS_SHOWN and all(map(_is_short, key)):
        return str(key)
    return type(key).__name__


def _is_short(key: object) -> bool:
    if isinstance(key, str | bytes):
        return len(key) <= _LENGTH_SHOWN
    if isinstance(key, int):
        return key.bit_length() <= _LENGTH_SHOWN
    return not isinstance(
        key, tuple | frozenset | torch.Tensor | torch.UntypedStorage | torch.TypedStorage
    )


class Path(NamedTuple):
    """The place of an item, as a linked list of keys."""

    above: Path | None
    key: str
    length: int

    @classmethod
    def below(cls, above: Path | None, key: str) -> Path | None:
        """Return the path of an item; as in a name, no dot follows an empty path."""
        if above is None:
            return cls(None, key, len(key)) if key else None
        return cls(above, key, above.length + 1 + len(key))

    def joined(self) -> str:
        """Return the path as text: the keys, joined by dots."""
        keys: list[str] = []
        path: Path | None = self
        while path is not None:
            keys.append(path.key)
            path = path.above
        return ".".join(reversed(keys))


class SharedContainers:
    """All paths to the tensors of containers that are in several places.

    Args:
        places: The path of each further place, and the container at it.
        leaves: Classes that count as tensors, such as modules that the caller opens.
    """

    def __init__(
        self,
        places: Iterable[tuple[Path | None, Any]],
        *,
        leaves: tuple[type, ...] = (torch.Tensor,),
    ) -> None:
        self._leaves = leaves
        self._places = list(places)
        # Container by id() -> position, key and value of each item; keeps the items alive.
        self._items: dict[int, list[tuple[int, str, Any]]] = {}
        # For each container, the number of paths to tensors in it, and their characters.
        self._count: dict[int, tuple[int, int]] = {}
        self._measure()

    def __iter__(self) -> Iterator[tuple[str, Any, int, Any]]:
        """Yield path, container, position and tensor; nothing if there are far too many paths.

        A container with one in it that contains itself has no further places: they would never end.
        """
        places = [
            (path, value, *self._count[id(value)])
            for path, value in self._places
            if self._count.get(id(value), (0, 0))[0]
        ]
        text = sum(
            (path.length + 1 if path else 0) * count + length for path, _, count, length in places
        )
        if sum(count for _, _, count, _ in places) > _NAMES_MAX or text > TEXT_MAX:
            return
        waiting: list[tuple[str, Any, int, Any]] = [
            (path.joined() if path else "", value, 0, None)
            for path, value, _, _ in reversed(places)
        ]
        while waiting:
            check_interrupt()
            path, value, position, holder = waiting.pop()
            if isinstance(value, self._leaves):
                yield path, holder, position, value
                continue
            prefix = path + "." if path else ""
            waiting += [
                (prefix + key, item, n, value) for n, key, item in reversed(self._items[id(value)])
            ]

    def _measure(self) -> None:
        """Count tensors, beginning with the containers that contain no others."""
        above: dict[int, list[int]] = {}
        unknown: dict[int, int] = {}
        waiting = [value for _, value in self._places]
        while waiting:
            value = waiting.pop()
            items = None if id(value) in self._items else items_of(value)
            if items is None:
                continue
            check_interrupt()
            found = self._items[id(value)] = []
            unknown[id(value)] = 0
            for n, (key, item) in enumerate(interruptible(items)):
                if isinstance(item, self._leaves):
                    found.append((n, utf8(key_text(key)), item))
                elif items_of(item) is not None:
                    found.append((n, utf8(key_text(key)), item))
                    above.setdefault(id(item), []).append(id(value))
                    unknown[id(value)] += 1
                    waiting.append(item)
        ready = [ident for ident, count in unknown.items() if not count]
        while ready:
            check_interrupt()
            ident = ready.pop()
            held = [
                (item, *((1, 0) if isinstance(item[2], self._leaves) else self._count[id(item[2])]))
                for item in self._items[ident]
            ]
            self._items[ident] = [item for item, count, _ in held if count]
            self._count[ident] = (
                sum(count for _, count, _ in held),
                sum((len(item[1]) + 1) * count + length for item, count, length in held),
            )
            for holder in above.get(ident, ()):
                unknown[holder] -= 1
                if not unknown[holder]:
                    ready.append(holder)


def leaves_of(
    obj: Any,
    kind: type[T],
    *,
    unknown: Callable[[Any], bool] = lambda _: False,
    text_max: int | None = None,
) -> Iterator[tuple[str, T]]:
    """Yield the items of one class in the containers of an object, with every path to them.

    Further places of containers come last. It differs from ``names.walk`` in that a path is joined
    only when it is yielded, since a peer may have made the object.

    Args:
        obj: An object of dicts, lists, tuples and other mappings.
        kind: The class of the items.
        unknown: Whether a key has no text, so that the items below it have no path. A single such
            key also drops all further places, which ``SharedContainers`` would name without
            leaving out the items below these keys.
        text_max: The limit for the characters of all paths together; by default ``TEXT_MAX``.

    Raises:
        LimitExceeded: The paths have more characters: one long key can be above many items.
    """
    text_max = TEXT_MAX if text_max is None else text_max
    seen: dict[int, Any] = {}
    further: list[tuple[Path | None, Any]] = []
    waiting: list[tuple[Path | None, Any]] = [(None, obj)]
    all_keys_known, length = True, 0
    while waiting:
        check_interrupt()
        path, value = waiting.pop()
        if isinstance(value, kind):
            length += path.length if path else 0
            if length > text_max:
                raise LimitExceeded(
                    f"the names of tensors have more than {text_max} characters in total",
                    entry="skeleton",
                )
            yield path.joined() if path else "", value
            continue
        items = items_of(value)
        if items is None:
            continue
        if id(value) in seen:
            further.append((path, value))
            continue
        # Some mappings make their items at each access: no id may be used again.
        seen[id(value)] = value
        below: list[tuple[Path | None, Any]] = []
        for key, item in interruptible(items):
            if isinstance(item, _NO_CONTAINERS):
                continue
            if unknown(key):
                all_keys_known = False
            else:
                below.append((Path.below(path, utf8(key_text(key))), item))
        waiting += reversed(below)
    # SharedContainers would give the text of an unknown key to the items below it.
    if all_keys_known:
        for name, _, _, leaf in SharedContainers(further, leaves=(kind,)):
            yield name, leaf
