"""The entries of a state dict that one module loads, as its submodules and their hooks read them.

In: the received entries, with a mark for each tensor that was received in place. Out: for each
submodule, a dict of the entries at and below it, whose tensors are copies: a hook may move them
from name to name, or keep them. ``module_load`` passes these dicts to the submodules.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.graph.modules import beginnings

__all__ = ["IN_PLACE", "NOTHING", "Entries", "StateDict", "find"]

IN_PLACE = object()
"""The mark for a tensor of the module that has its new numbers already."""

NOTHING = object()
"""The result for a name without a value."""


class StateDict(OrderedDict[str, Any]):
    """The state dict that a submodule loads.

    Args:
        entries: The entries; tensors that were received in place are ``IN_PLACE``.
        tensors: The tensors of the module, by name.
        copies: Whether a reader gets a copy of a tensor that was received in place. False for
            torch's own code, which does nothing if it gets the submodule's tensor.

    Attributes:
        touched: Names of the entries that were set or deleted.
    """

    def __init__(
        self,
        entries: Iterable[tuple[str, Any]],
        tensors: Mapping[str, torch.Tensor],
        *,
        copies: bool,
    ) -> None:
        super().__init__()
        self.touched: set[str] = set()
        self._copies = copies
        self._tensors = tensors
        for key, value in entries:
            super().__setitem__(key, value)

    def raw(self, key: str) -> Any:
        """Return the entry, or the mark for it."""
        return super().__getitem__(key)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is not IN_PLACE:
            return value
        tensor = self._tensors[key]
        with torch.no_grad():
            return tensor.detach().clone() if self._copies else tensor

    def __setitem__(self, key: str, value: Any) -> None:
        self.touched.add(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.touched.add(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry or the default, as a dict does."""
        try:
            return self[key]
        except KeyError:
            return default

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return an entry after adding the default if it is missing, as a dict does."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Remove and return an entry, as a dict does."""
        if key not in self and default:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        """Remove and return the last or the first entry, as an ``OrderedDict`` does."""
        key = next(reversed(self) if last else iter(self))
        return key, self.pop(key)

    def clear(self) -> None:
        """Remove all entries, as a dict does."""
        self.touched |= self.keys()
        super().clear()

    # The base class declares an instance of this class, but a copy has nothing to record.
    def copy(self) -> OrderedDict[str, Any]:  # type: ignore[override]
        """Return an ordinary ``OrderedDict`` of the entries."""
        return OrderedDict((key, self[key]) for key in self)

    def items(self) -> Any:
        """Return names with entries; each is read when the iteration reaches it."""
        return _Items(self)

    def values(self) -> Any:
        """Return the entries; each is read when the iteration reaches it."""
        return _Values(self)


class _Items:
    def __init__(self, state: StateDict) -> None:
        self._state = state

    def __len__(self) -> int:
        return len(self._state)

    def __iter__(self) -> Iterator[Any]:
        return ((key, self._state[key]) for key in self._state)


class _Values(_Items):
    def __iter__(self) -> Iterator[Any]:
        return (self._state[key] for key in self._state)


class Entries:
    """Entries, grouped by the submodules that own them.

    Args:
        entries: The entries by name.
        owner: Returns the path of the submodule that owns an entry.
    """

    def __init__(self, entries: Mapping[str, Any], owner: Callable[[str], str]) -> None:
        self._owner = owner
        self._of: dict[str, dict[str, Any]] = {}
        for key, value in interruptible(entries.items()):
            self._of.setdefault(owner(key), {})[key] = value
        self._paths = sorted(self._of)

    def below(self, path: str) -> Iterator[tuple[str, Any]]:
        """Yield the entries of a submodule, and of all submodules in it."""
        if not path:
            groups = self._paths
        else:
            # In ASCII, the slash follows the dot.
            first, last = (bisect_left(self._paths, path + letter) for letter in "./")
            groups = [path, *self._paths[first:last]]
        for group in groups:
            yield from self._of.get(group, {}).items()

    def take_over(self, path: str, state: StateDict) -> set[str]:
        """Apply the changes of a submodule's code; return the owners of the changed entries."""
        prefix = path + "." if path else ""
        owners = set()
        for key in state.touched:
            if not isinstance(key, str) or not key.startswith(prefix):
                continue
            owner = self._owner(key)
            owners.add(owner)
            group = self._of.setdefault(owner, {})
            group.pop(key, None)
            if key in state:
                group[key] = state.raw(key)
        self._paths = sorted(self._of)
        return owners


def find(value: Any, name: str, lengths: dict[int, list[int]]) -> Any:
    """Return the value at a path in nested dicts, lists and tuples; ``NOTHING`` if there is none.

    Args:
        value: The object.
        name: The path.
        lengths: The lengths of the keys of each dict, kept from call to call. A peer chooses keys
            and names, with any number of dots.
    """
    while name:
        if isinstance(value, list | tuple):
            index, _, name = name.partition(".")
            if not index.isdecimal() or len(index) > 9 or int(index) >= len(value):
                return NOTHING
            value = value[int(index)]
            continue
        if not isinstance(value, Mapping):
            return NOTHING
        if name in value:
            return value[name]
        if id(value) not in lengths:
            lengths[id(value)] = sorted({len(key) for key in value if isinstance(key, str)})
        found = beginnings(name, lengths[id(value)])
        key = next((each for each in found if each in value), None)
        if key is None:
            return NOTHING
        value, name = value[key], name[len(key) + 1 :]
    return value
