"""Claims on the memory that loads of this process receive into: one load at a time for each byte.

A load claims the memory of its targets before its first payload byte, and releases it when the
message and its commit are over. Claims are compared by address, byte by byte, and not by object:
loads into disjoint parts of one storage do not disturb each other.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import order_of
from aiotorchio.memory.atomic import BackMemory
from aiotorchio.memory.memory_state import MemoryState
from aiotorchio.overlap.conflicts import conflict
from aiotorchio.overlap.extents import Extents, Footprint, Origin, extents_of, footprint
from aiotorchio.wire.header import shortened

__all__ = ["Claim", "HeldClaims", "claims", "has_neighbours"]

# All claims, in the order in which they were made. A dict is changed atomically, so no lock is
# needed, which a forked process could find held for ever. A claim whose release an interrupt
# prevents ends with the last reference to its load.
claims: dict[object, weakref.ref[Claim]] = {}

# The most pairs of a target and another load that are compared for a hint; each takes 1 us.
_COMPARED_MAX = 2000


class Claim:
    """The memory of one load.

    Args:
        extents: The extents of its targets, by device.
        footprint: Returns the memory of a target, by name, as it was when the load began.
    """

    def __init__(
        self,
        extents: Mapping[torch.device, Extents[str]],
        footprint: Callable[[str], Footprint],
    ) -> None:
        self._extents = extents
        self._footprint = footprint
        self._key = object()

    @classmethod
    def of_storages(cls, states: Mapping[str, MemoryState]) -> Claim:
        """Claim the whole storages of tensors, from their ``memory_state``."""
        by_device: dict[torch.device, list[tuple[int, int, str]]] = {}
        names = {(state.address, state.storage_nbytes): name for name, state in states.items()}
        for (address, nbytes), name in names.items():
            if nbytes:
                extent = (address, address + nbytes, name)
                by_device.setdefault(states[name].device, []).append(extent)
        extents = {device: Extents(found) for device, found in by_device.items()}
        return cls(extents, lambda name: _storage_at(states[name]))

    def make(self) -> None:
        """Claim the memory.

        Raises:
            RuntimeError: Another load is receiving into the same memory.
        """
        claims[self._key] = weakref.ref(self)
        try:
            for other in interruptible(self._others(earlier=True), 1):
                name = self._conflict(other)
                if name is not None:
                    raise _busy(name)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """End the claim; without effect if it has ended."""
        claims.pop(self._key, None)

    def _others(self, *, earlier: bool = False) -> Iterator[Claim]:
        """Yield other claims, or only earlier ones: of two loads that begin at once, one fails."""
        for key, reference in list(claims.items()):
            other = reference()
            if key is self._key:
                if earlier:
                    return
            elif other is None:
                claims.pop(key, None)
            else:
                yield other

    def is_near_another(self) -> bool:
        """Whether another load receives into memory between the first and last byte of a tensor."""
        return any(
            self._meets(other, device) for other in self._others() for device in self._extents
        )

    def _meets(self, other: Claim, device: torch.device) -> bool:
        if device not in other._extents:
            return False
        few, many = sorted((self._extents[device], other._extents[device]), key=len)
        return any(True for start, end, _ in interruptible(few) for _ in many.meeting(start, end))

    def _conflict(self, other: Claim) -> str | None:
        """Find a target that shares a byte with one of another load."""
        for device, extents in self._extents.items():
            if not self._meets(other, device):
                continue
            both = Extents(
                (start, end, (claim, name))
                for claim, each in ((self, extents), (other, other._extents[device]))
                for start, end, name in each
            )
            for keys in both.together():
                pair = conflict(
                    {key: key[0]._footprint(key[1]) for key in keys},
                    {key: Origin(int(key[0] is self)) for key in keys},
                )
                if pair is not None:
                    return next(name for claim, name in pair if claim is self)
        return None


def _busy(name: str) -> RuntimeError:
    """Make the error of a target that another load is receiving into."""
    return RuntimeError(f"another load is receiving into {shortened(name)!r}: wait until it ends")


class HeldClaims:
    """The claims of one load, from before its first payload byte until its commit is over."""

    def __init__(self) -> None:
        self._held: list[BackMemory | Claim] = []

    def claim(
        self,
        back: BackMemory | None,
        tensors: Mapping[str, torch.Tensor],
        memory_states: Mapping[str, MemoryState],
        extents: Mapping[torch.device, Extents[str]],
    ) -> None:
        """Keep other loads away from the targets until ``release``.

        Args:
            back: The second memory of a ``DoubleBuffer``.
            tensors: The targets, by name.
            memory_states: The ``memory_state`` of each.
            extents: Their memory, by device.

        Raises:
            RuntimeError: Another load is using the ``DoubleBuffer``, or receiving into a target;
                or a target got other memory while this load began.
        """
        if back is not None:
            back.claim()
            self._held.append(back)
            # Whole storages are swapped.
            claim = Claim.of_storages(memory_states)
        else:
            claim = Claim(extents, lambda name: _memory_at(memory_states[name]))
        self._held.append(claim)
        claim.make()
        # Before the claim, the swap of another load may have moved tensors to other memory.
        claimed = (extent for each in extents.values() for extent in each)
        for start, _, name in interruptible(claimed):
            state = memory_states[name]
            first = state.address + state.offset * state.dtype.itemsize
            if not start == first == tensors[name].data_ptr():
                raise RuntimeError(
                    f"{shortened(name)!r} got other memory while this load began, from another "
                    "load or from the caller: load again"
                )

    def release(self) -> None:
        """Let other loads receive into the targets; without effect if there is no claim."""
        while self._held:
            self._held.pop().release()


def has_neighbours(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors may share memory, with each other or with those of another load.

    An exact answer can take long. With many other loads to compare with, the answer is yes.
    """
    if len(claims) * len(tensors) > _COMPARED_MAX:
        return True
    plain = {name: each for name, each in tensors.items() if not each.is_meta}
    extents = extents_of(plain)
    if any(True for each in extents.values() for _ in each.together()):
        return True
    return Claim(extents, lambda name: footprint(plain[name])).is_near_another()


def _memory_at(state: MemoryState) -> Footprint:
    """Return the memory of a tensor."""
    itemsize = state.dtype.itemsize
    start = state.address + state.offset * itemsize
    end = start + order_of(state.shape, state.stride).extent * itemsize
    return Footprint(start, end, itemsize, state.shape, state.stride)


def _storage_at(state: MemoryState) -> Footprint:
    """Return the memory of the whole storage of a tensor."""
    nbytes = state.storage_nbytes
    return Footprint(state.address, state.address + nbytes, 1, (nbytes,), (1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=claims.clear)
