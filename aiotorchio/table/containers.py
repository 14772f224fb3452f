"""The containers that tensors have names in, and the further places of those that are shared.

In: dicts, lists, tuples and other mappings. Out: their items, and every path to the tensors of a
container that is in several places. ``names.walk`` names tensors with it; ``select.revise`` finds
the same paths in the object that was received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import LimitExceeded

__all__ = ["TEXT_MAX", "Path", "SharedContainers", "items_of", "key_text", "leaves_of", "utf8"]

T = TypeVar("T")

# A graph of containers can have any number of paths. All further places of an object together: a
# header has no room for more.
_NAMES_MAX = 2**18
TEXT_MAX = 2**24

_NO_CONTAINERS = (str, bytes, int, float, complex, type(None))

# Of keys that are no texts.
_ITEMS_SHOWN, _LENGTH_SHOWN = 16, 1024


def items_of(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """The keys and items of a container; None for everything else.

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
    """A path as the header has it: keys of a dict can hold surrogates, which UTF-8 cannot."""
    return path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()


def key_text(key: object) -> str:
    """A key of a dict as a part of a path.

    A peer chooses the keys, too: the text of a small key can be far longer than its pickle, and
    that of a tensor shows its numbers.
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
    """The key of an item, and how to get to where it is."""

    above: Path | None
    key: str
    length: int

    @classmethod
    def below(cls, above: Path | None, key: str) -> Path | None:
        """As in a name: no dot follows a path that is empty."""
        if above is None:
            return cls(None, key, len(key)) if key else None
        return cls(above, key, above.length + 1 + len(key))

    def joined(self) -> str:
        """With dots."""
        keys: list[str] = []
        path: Path | None = self
        while path is not None:
            keys.append(path.key)
            path = path.above
        return ".".join(reversed(keys))


class SharedContainers:
    """All paths to the tensors of containers that were met again.

    Args:
        places: The path of each further place, and the container there.
        leaves: What counts as a tensor, such as modules that the caller opens.
    """

    def __init__(
        self,
        places: Iterable[tuple[Path | None, Any]],
        *,
        leaves: tuple[type, ...] = (torch.Tensor,),
    ) -> None:
        self._leaves = leaves
        self._places = list(places)
        # By id; what is in them lives as long as this.
        self._items: dict[int, list[tuple[int, str, Any]]] = {}
        # Tensors below each container, wherever they occur, and the length of the paths to them.
        self._count: dict[int, tuple[int, int]] = {}
        self._measure()

    def __iter__(self) -> Iterator[tuple[str, Any, int, Any]]:
        """Path, container, position and tensor; nothing if there are far too many of them.

        A container that has a way back to itself has no further places: they never end.
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
        """Count, beginning with the containers that have no others in them."""
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
    """What is of a kind in the containers of an object, with every path to it; further ones last.

    As ``names.walk``, for what a peer has made: no path is written out that is not given.

    Args:
        obj: Of dicts, lists, tuples and other mappings.
        kind: Of the leaves.
        unknown: Whether a key has no text, and what is below it no path.
        text_max: Characters of all paths together; by default ``TEXT_MAX``.

    Raises:
        LimitExceeded: They have more: one long key can be above many of them.
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
                    f"the names of tensors have more than {text_max} characters", entry="skeleton"
                )
            yield path.joined() if path else "", value
            continue
        items = items_of(value)
        if items is None:
            continue
        if id(value) in seen:
            further.append((path, value))
            continue
        # Some mappings make their items each time: an id must not come again.
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
    if all_keys_known:
        for name, _, _, leaf in SharedContainers(further, leaves=(kind,)):
            yield name, leaf
