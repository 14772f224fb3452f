"""What a pickle may take of memory, depth and time, and what is left of it.

The memo and the stack of the scan hold one ``AbstractValue`` for each object; ``Budget`` has the
bounds for all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiotorchio.errors import LimitExceeded
from aiotorchio.wire import bounds

__all__ = ["AbstractValue", "Budget", "too_many_colliders"]

# Memory that each byte of a pickle may take, beyond what any pickle may take. Honest state
# takes about ten times its pickle: a dict of three tensors is 232 bytes, pickled about 25.
_MEMORY_PER_BYTE = 16


@dataclass(slots=True)
class AbstractValue:
    """What is known of one object; whatever refers to the object refers to its measure."""

    memory: int  # without that of the items
    depth: int = 0
    hash_steps: int = 1
    hash: int | None = None
    forgeable: bool = False  # whether the sender can choose the hash
    kind: str | None = None  # "list", "dict", or "reference" to a tensor or storage
    items: Sequence[AbstractValue] | None = None  # of a tuple
    hashes: dict[int, int] | None = None  # of a dict: how many keys have each forgeable hash
    name: str | None = None  # path, if the object is a global
    proxy: str | None = None  # path, if it is or holds a global that is not what it is called
    made_by: str | None = None  # path of the global whose call made it
    has_state: bool = False
    most_steps: int = 1  # of one item, in a list or dict
    unknown: int = 0  # keys of a dict whose hash is not known
    number: bool = False  # whether it is an int or a float, whose hash is known to the sender
    count: int = 0  # of a list or dict: its items so far
    wide: int = 0  # of them: numbers, and what is made of numbers, not counted from 0 on
    charged: bool = False  # whether memory was taken for the measure itself, which goes with it

    @property
    def is_plain(self) -> bool:
        """Whether it is a number, a text, or None."""
        holds = self.depth or self.items is not None
        return not holds and not (self.kind or self.name or self.made_by)


def too_many_colliders(wide_keys: int) -> LimitExceeded:
    """What there is to say of keys that may all collide."""
    return LimitExceeded(
        f"more than {wide_keys} numbers as keys or members that are not counted from 0 on "
        "(Limits.wide_keys)"
    )


class Budget:
    """What is left of the bounds.

    Args:
        nbytes: Size of the pickle.
        depth_limit: Nesting of containers to accept.
        wide_keys: As of ``Limits``.
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
        """Take memory."""
        self._memory_left -= memory
        if self._memory_left < 0:
            raise LimitExceeded(
                f"the objects take more than {self._bounds.memory_floor} bytes of memory and "
                f"{_MEMORY_PER_BYTE} for each byte of the skeleton"
            )

    def hash(self, key: AbstractValue) -> None:
        """Take the time to hash an object once."""
        self._hash_steps_left -= key.hash_steps
        if self._hash_steps_left < 0:
            raise LimitExceeded(f"hashing the keys takes more than {self._bounds.hash_steps} steps")

    def find_places(self, wide: int, found: int = 0) -> None:
        """Take the time to find places for keys, in a table that has some already."""
        self._probes_left -= wide**2 - found**2
        if self._probes_left < 0:
            raise too_many_colliders(self._wide_keys)

    def compare(self, steps: int) -> None:
        """Take the time to compare keys that may have equal hashes, and equal parts."""
        self._compare_steps_left -= steps
        if self._compare_steps_left < 0:
            raise LimitExceeded(
                f"comparing the keys takes more than {self._bounds.compare_steps} steps"
            )

    def compare_members(self, items: AbstractValue) -> None:
        """Take the time to make a set of a list: as many have one hash as a set may have."""
        if items.most_steps > 1:
            self.compare(items.hash_steps * self._bounds.equal_hashes // 2)

    def nest(self, items: Sequence[AbstractValue]) -> int:
        """The depth of what holds these items; there must be one."""
        depth = 1 + max(item.depth for item in items)
        if depth > self._depth_limit:
            raise LimitExceeded(f"nested deeper than {self._depth_limit} levels (Limits.depth)")
        return depth

    def collide(self, key: AbstractValue, container: AbstractValue) -> None:
        """Count a key among those with its hash.

        hash(n) of an int is known to all: the sender chooses it, and so that of a tuple of ints.
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
                    f"more than {self._bounds.equal_hashes} keys with the same hash"
                )
            self.compare(hashes[key.hash] * key.hash_steps)
        if self._unknown_hashes_left < 0:
            raise LimitExceeded(
                f"more than {self._bounds.unknown_hashes} keys that are not plain values"
            )
