"""What a receiver accepts before it gives memory or time to a message."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Limits"]

MIB = 2**20
# Where Linux says what a container may take: of cgroups version 2, and of version 1.
_CONTAINER_MEMORY = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def _memory(container: Iterable[str]) -> int:
    """Bytes that this machine or its container can hold; 2**63 - 1 if neither tells."""
    known = [2**63 - 1]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in container:
        try:
            with open(path, encoding="ascii") as file:
                known.append(int(file.read()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(known)


@functools.cache
def _memory_here() -> int:
    return _memory(_CONTAINER_MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds for one message; what exceeds one raises ``LimitExceeded``.

    Those in seconds, and ``least_rate``, are about a peer that is slow or silent:
    ``TransferTimeout``. Only the time counts in which bytes are waited for, not that in which they
    are worked on or nobody asks for them. Silence and slowness have one account: it begins with
    ``idle_timeout`` seconds, waiting takes them away, and n bytes bring n / ``least_rate`` seconds
    back, never more than there were: with 1 and 100, a peer that sends 10 bytes each 0.8 seconds
    is given up after 1.1. Nothing interrupts the files and pipes of blocking calls. The handshake
    of TLS comes before all of this: ``ssl_handshake_timeout`` of asyncio, 60 seconds, bounds it.

    Args:
        header_nbytes: Size of the header in bytes. Reading it takes at most 16 MiB of memory and
            20 times its size; an honest one takes 10 times its size. What it describes is made of
            some 500 bytes a tensor and 260 a storage, beside their numbers.
        skeleton_nbytes: Size of the skeleton in bytes. Reading it, or building what it says, takes
            at most 64 MiB and 48 times its size.
        chunk_nbytes: Size of one chunk in bytes.
        total_nbytes: Bytes of all storages together. The default is what the machine holds:
            physical memory, or less if its container may take less.
        expanded_nbytes: Bytes of any one tensor if it were made contiguous: an expanded one can
            claim far more than its storage has. None is ``total_nbytes``. Tensors on ``meta``,
            which have no bytes at all, may claim any size.
        entries: Number of storages, and number of tensors.
        depth: Nesting of containers in the object.
        dims: Dimensions of one tensor.
        wide_keys: Numbers as keys of one dict, or members of one set, that do not count from 0 on.
            A sender can choose them so that finding a place for each takes as many steps as there
            are; of several containers, the squares add up. In a pickle, those count that are not
            below the number of keys so far.
        sparse_nnz: What must be checked number by number, of all tensors of one load together: the
            nnz of sparse COO tensors, compressed and plain indices of the layouts CSR, CSC, BSR and
            BSC, parts of nested tensors; at least 1 for each tensor. A pickle can make a tensor
            many times of the same bytes: it counts each time.
        start_timeout: Seconds until the first byte of a message. None, the default, waits as long
            as it takes: the next weights may take an hour. Whoever serves strangers sets it.
        handshake_timeout: Seconds from the first byte of a message until its header, the table of
            its tensors, is in.
        idle_timeout: Seconds that a load waits without a byte. None: for ever, however slowly
            bytes come.
        write_timeout: Seconds that a save waits without the peer's taking a byte. Streams of
            anyio, and those of asyncio over TLS, tell for pieces of 256 KiB only.
        least_rate: Bytes a second that move in the long run, in both directions; 0 for any.

    Raises:
        TypeError: A limit that is not a number of its kind.
        ValueError: A negative limit, or nan.

    Example:
        >>> from aiotorchio import Limits
        >>> Limits(total_nbytes=2**30, start_timeout=10).total_nbytes
        1073741824
    """

    header_nbytes: int = 32 * MIB
    skeleton_nbytes: int = 32 * MIB
    chunk_nbytes: int = 64 * MIB
    total_nbytes: int = field(default_factory=_memory_here)
    expanded_nbytes: int | None = None
    entries: int = 500_000
    depth: int = 256
    dims: int = 64
    wide_keys: int = 30_000
    sparse_nnz: int = 100_000_000
    start_timeout: float | None = None
    handshake_timeout: float | None = 60.0
    idle_timeout: float | None = 60.0
    write_timeout: float | None = 300.0
    least_rate: int = 1024

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name == "expanded_nbytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is a whole number, not {value!r}")
            _refuse_negative(name, value)
        for name in _SECONDS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} is a number of seconds or None, not {value!r}")
            _refuse_negative(name, value)

    @property
    def dense_nbytes(self) -> int:
        """``expanded_nbytes`` as a number: what it means if it is None."""
        return self.total_nbytes if self.expanded_nbytes is None else self.expanded_nbytes


_SECONDS = tuple(name for name in Limits.__annotations__ if name.endswith("_timeout"))
_COUNTS = tuple(name for name in Limits.__annotations__ if name not in _SECONDS)


def _refuse_negative(name: str, value: float) -> None:
    if value < 0 or value != value:  # nan
        raise ValueError(f"{name} is {value}: it must not be negative")
