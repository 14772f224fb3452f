"""Conversion of received storages from the foreign byte order.

In: a storage and the size of its numbers. Out: the same storage, in the byte order of this machine.
"""

from __future__ import annotations

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.memory.device_copy import bytes_of

__all__ = ["swap_bytes"]

# Bytes of the reversed copy that exists at a time.
_STEP = 2**20


def swap_bytes(storage: torch.UntypedStorage, unit: int) -> None:
    """Reverse the bytes of every number in a storage, in place.

    Args:
        storage: A storage on any device.
        unit: Bytes of a number; remaining bytes at the end do not change.
    """
    if unit == 1:
        return
    numbers = bytes_of(storage)[: storage.nbytes() // unit * unit].view(-1, unit)
    for part in interruptible(numbers.split(_STEP // unit), 1):
        part.copy_(part.flip(1))
