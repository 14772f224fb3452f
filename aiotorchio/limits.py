"""The limits of a call: bounds on memory and time that one message may use.

The caller passes a ``Limits`` to a save or a load. A message that exceeds one causes a
``LimitExceeded``, a slow peer a ``TransferTimeout``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Limits", "checked_limits"]

MIB = 2**20
# Files with the memory limit of a container on Linux: of cgroups version 2, and of version 1.
_CONTAINER_MEMORY = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def _memory(container: Iterable[str]) -> int:
    """Return the memory of this machine or its container; 2**63 - 1 if both are unknown."""
    known = [2**63 - 1]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in container:
        try:
            with open(path, encoding="ascii") as file:
                known.append(int(file.read()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(known)


@functools.cache
def _memory_here() -> int:
    return _memory(_CONTAINER_MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds for one message; a message that exceeds one raises ``LimitExceeded``.

    The bounds in seconds, and ``least_rate``, raise ``TransferTimeout`` for a slow or silent peer.
    Only the time of waiting for the peer counts, not the time in which bytes are processed or not
    requested. Silence and slowness use one time budget: it begins with ``idle_timeout`` seconds,
    waiting uses it up, and n bytes restore n / ``least_rate`` seconds, up to ``idle_timeout``: with
    a timeout of 1 and a rate of 100, a load from a peer that sends 10 bytes each 0.8 seconds fails
    after 1.1. Nothing interrupts the files and pipes of blocking calls. The handshake of TLS comes
    before: ``ssl_handshake_timeout`` of asyncio, 60 seconds, bounds it.

    Args:
        header_nbytes: Size of the header in bytes. Reading it takes at most 16 MiB of memory plus
            20 times its size; an honest one takes 10 times its size. Each tensor that it describes
            takes some 500 bytes, and each storage 260, in addition to their numbers.
        skeleton_nbytes: Size of the skeleton in bytes. Reading it, or building its object, takes
            at most 64 MiB plus 48 times its size.
        chunk_nbytes: Size of one chunk in bytes.
        total_nbytes: Bytes of all storages together. The default is the physical memory of the
            machine, or the limit of its container if that is lower.
        expanded_nbytes: Bytes of any one tensor if it were contiguous: an expanded one can claim
            far more than its storage has. None means ``total_nbytes``. Tensors on ``meta``, which
            have no bytes, may claim any size.
        entries: Number of storages, and number of tensors.
        depth: Nesting of containers in the object.
        dims: Dimensions of one tensor.
        wide_keys: Numbers as keys of one dict, or members of one set, that are not 0, 1, 2 and so
            on. A sender can choose n keys so that inserting each takes up to n steps; for several
            containers, the squares add up. In a pickle, a key counts if it is above the number of
            keys before it.
        sparse_nnz: Numbers to check one by one, in all tensors of one load together: the nnz of
            sparse COO tensors, compressed and plain indices of the layouts CSR, CSC, BSR and BSC,
            parts of nested tensors; at least 1 for each tensor. A pickle can build many tensors
            from the same bytes: each one counts.
        start_timeout: Seconds until the first byte of a message. None, the default, waits without
            end: the next weights may take an hour. Set it in a server for unknown clients.
        handshake_timeout: Seconds from the first byte of a message until its header, the table of
            its tensors, is received.
        idle_timeout: Seconds that a load waits without a byte. None: without end, at any speed.
        write_timeout: Seconds that a save waits while the peer accepts no byte. For anyio streams
            and asyncio streams over TLS, it counts for pieces of 256 KiB.
        least_rate: Bytes a second that must move in the long run, in both directions; 0 for any.

    Raises:
        TypeError: A limit is not a number of its kind.
        ValueError: A limit is negative or nan.

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
                raise TypeError(f"{name} must be a whole number, not {value!r}")
            _refuse_negative(name, value)
        for name in _SECONDS:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
            _refuse_negative(name, value)

    @property
    def dense_nbytes(self) -> int:
        """``expanded_nbytes``, or ``total_nbytes`` if that is None."""
        return self.total_nbytes if self.expanded_nbytes is None else self.expanded_nbytes


_SECONDS = tuple(name for name in Limits.__annotations__ if name.endswith("_timeout"))
_COUNTS = tuple(name for name in Limits.__annotations__ if name not in _SECONDS)


def _refuse_negative(name: str, value: float) -> None:
    if value < 0 or value != value:  # nan
        raise ValueError(f"{name} must be 0 or more, not {value}")


def checked_limits(limits: Limits | None) -> Limits:
    """Return the limits of a call: the given ones, or the defaults.

    Raises:
        TypeError: ``limits`` is neither ``Limits`` nor None.
    """
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    return _default_limits() if limits is None else limits


# Cached, since every field is checked when they are made, and each call needs them.
_default_limits = functools.cache(Limits)
