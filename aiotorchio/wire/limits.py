"""What a receiver accepts before it gives memory or time to a message."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

__all__ = ["Limits"]

MIB = 2**20


def _machine_memory() -> int:
    """Physical memory in bytes, or 2**63 - 1 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds for one message; what exceeds one raises ``LimitExceeded``.

    Args:
        header_nbytes: Size of the header in bytes.
        skeleton_nbytes: Size of the skeleton in bytes.
        chunk_nbytes: Size of one chunk in bytes.
        total_nbytes: Bytes of all storages together, and of any one tensor if it were made
            contiguous (an expanded tensor can claim far more than its storage holds).
            The default is the physical memory of the machine.
        entries: Number of storages, and number of tensors.
        depth: Nesting of containers in the object.
        dims: Dimensions of one tensor.

    Raises:
        TypeError: A limit that is not an int.
        ValueError: A negative limit.

    Example:
        >>> from aiotorchio import Limits
        >>> Limits(total_nbytes=2**30).total_nbytes
        1073741824
    """

    header_nbytes: int = 32 * MIB
    skeleton_nbytes: int = 32 * MIB
    chunk_nbytes: int = 64 * MIB
    total_nbytes: int = field(default_factory=_machine_memory)
    entries: int = 1_000_000
    depth: int = 256
    dims: int = 64

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{limit.name} is a whole number, not {value!r}")
            if value < 0:
                raise ValueError(f"{limit.name} is {value}: it must not be negative")
