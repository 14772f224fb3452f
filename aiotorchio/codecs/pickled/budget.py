"""The budget of a pickle: the memory, depth and time that its objects may still use.

``scan`` makes an ``AbstractValue`` for each object that the pickle would build, and charges its
cost to the ``Budget`` of the pickle. A ``LimitExceeded`` means that the budget is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiotorchio.errors import LimitExceeded
from aiotorchio.wire import bounds

__all__ = ["AbstractValue", "Budget", "too_many_colliders"]

# Memory that each byte of a pickle may take, in addition to the memory_floor of every pickle.
# Honest objects take about ten times their pickle: a dict of three tensors takes 232 bytes, and its
# pickle about 25.
_MEMORY_PER_BYTE = 16


@dataclass(slots=True)
class AbstractValue:
    """The cost of one object that the scan does not build; references to the object share it."""

    memory: int  # without its items
    depth: int = 0
    hash_steps: int = 1
    hash: int | None = None
    forgeable: bool = False  # whether the sender can choose the hash
    kind: str | None = None  # "list", "dict", or "reference": a tensor or storage
    items: Sequence[AbstractValue] | None = None  # of a tuple
    hashes: dict[int, int] | None = None  # of a dict: forgeable hash -> number of keys with it
    name: str | None = None  # path, if the object is a global
    proxy: str | None = None  # path of a global that the allowlist replaces, which it is or holds
    made_by: str | None = None  # path of the global whose call made it
    has_state: bool = False
    most_steps: int = 1  # of a list or dict: most hash_steps of one item
    unknown: int = 0  # of a dict: keys whose hash the scan does not know
    number: bool = False  # whether it is an int or float, whose hash the sender knows
    count: int = 0  # of a list or dict: number of its items so far
    wide: int = 0  # of a list or dict: items made of numbers that do not count from 0 on
    charged: bool = False  # whether the memory of this abstract value itself is charged

    @property
    def is_plain(self) -> bool:
        """Whether it is a number, a str, or None."""
        holds = self.depth or self.items is not None
        return not holds and not (self.kind or self.name or self.made_by)


def too_many_colliders(wide_keys: int) -> LimitExceeded:
    """Make the error for keys or members that may all collide."""
    return LimitExceeded(
        f"the dicts and sets of the object have more than {wide_keys} numbers as keys or members "
        "that are not 0, 1, 2 and so on (Limits.wide_keys)"
    )


class Budget:
    """The memory, depth and time that a pickle may still use.

    Args:
        nbytes: Size of the pickle.
        depth_limit: ``Limits.depth``.
        wide_keys: ``Limits.wide_keys``.
    """

    def __init__(self, nbytes: int, depth_limit: int, wide_keys: int) -> None:
        self._bounds = bounds.BOUNDS
        self._wide_keys = wide_keys
        self._probes_left = wide_keys**2
        self._memory_left = self._bounds.memory_floor + _MEMORY_PER_BYTE * nbytes
        self._hash_steps_left = self._bounds.hash_steps + nbytes
        self._compare_steps_left = self._bounds.compare_steps + nbytes
        self._unknown_hashes_left = self._bounds.unknown_hashes
        self._depth_limit = depth_limit

    def charge(self, memory: int) -> None:
        """Charge bytes of memory."""
        self._memory_left -= memory
        if self._memory_left < 0:
            raise LimitExceeded(
                f"the object would take more than {self._bounds.memory_floor} bytes of memory plus "
                f"{_MEMORY_PER_BYTE} for each byte of the skeleton"
            )

    def hash(self, key: AbstractValue) -> None:
        """Charge the time to hash an object once."""
        self._hash_steps_left -= key.hash_steps
        if self._hash_steps_left < 0:
            raise LimitExceeded(f"hashing the keys takes more than {self._bounds.hash_steps} steps")

    def find_places(self, wide: int, found: int = 0) -> None:
        """Charge the time to add keys that may collide: a table had ``found``, and has ``wide``."""
        self._probes_left -= wide**2 - found**2
        if self._probes_left < 0:
            raise too_many_colliders(self._wide_keys)

    def compare(self, steps: int) -> None:
        """Charge the time to compare keys that may have equal hashes and equal parts."""
        self._compare_steps_left -= steps
        if self._compare_steps_left < 0:
            raise LimitExceeded(
                f"comparing the keys takes more than {self._bounds.compare_steps} steps"
            )

    def compare_members(self, items: AbstractValue) -> None:
        """Charge the time to make a set of a list, with as many equal hashes as a set may have."""
        if items.most_steps > 1:
            self.compare(items.hash_steps * self._bounds.equal_hashes // 2)

    def nest(self, items: Sequence[AbstractValue]) -> int:
        """Return the depth of a container of these items, of which there must be at least one."""
        depth = 1 + max(item.depth for item in items)
        if depth > self._depth_limit:
            raise LimitExceeded(
                f"the object is nested deeper than {self._depth_limit} levels (Limits.depth)"
            )
        return depth

    def collide(self, key: AbstractValue, container: AbstractValue) -> None:
        """Charge the time to compare a key with the keys of a dict that may have its hash.

        hash(n) of an int is no secret: the sender can choose it, and that of a tuple of ints.
        """
        if key.hash is None:
            self._unknown_hashes_left -= 1
            container.unknown += 1
            self.compare(container.unknown * key.hash_steps)
        else:
            hashes = container.hashes = {} if container.hashes is None else container.hashes
            self.charge(96)
            hashes[key.hash] = hashes.get(key.hash, 0) + 1
            if hashes[key.hash] > self._bounds.equal_hashes:
                raise LimitExceeded(
                    f"a dict has more than {self._bounds.equal_hashes} keys with the same hash"
                )
            self.compare(hashes[key.hash] * key.hash_steps)
        if self._unknown_hashes_left < 0:
            raise LimitExceeded(
                f"the object has more than {self._bounds.unknown_hashes} keys that are not plain "
                "values"
            )
