"""The layout of the payload: the places of storages and chunks (SPEC.md section 4).

In: a header whose storages have valid locations. Out: offsets and lengths in bytes. Sender and
receiver compute the same layout. It raises no errors.
"""

from __future__ import annotations

from bisect import bisect_right

from aiotorchio.common.interrupt import interruptible
from aiotorchio.wire.header import ALIGNMENT, META_LOCATION, Header, describe

__all__ = ["Layout"]


class Layout:
    """The places of the storages in the payload, in their order, at multiples of 64 bytes.

    Attributes:
        offsets: First byte of each storage in the payload; without meaning if it has no bytes.
        nbytes: Bytes of each storage in the payload: its size, or 0 on ``meta``.
        total: Size of the payload in bytes.
    """

    def __init__(self, header: Header) -> None:
        self.offsets: list[int] = []
        self.nbytes: list[int] = []
        self.chunk_size = header.chunk_size
        self._tensors = header.tensors
        end = 0
        for row in interruptible(header.storages):
            start = -(-end // ALIGNMENT) * ALIGNMENT
            nbytes = 0 if header.locations[row.location] == META_LOCATION else row.nbytes
            self.offsets.append(start)
            self.nbytes.append(nbytes)
            # A storage without bytes takes no room, and gets no padding.
            end = start + nbytes if nbytes else end
        self.total = end

    @property
    def chunks(self) -> int:
        """The number of chunks of the payload."""
        return -(-self.total // self.chunk_size)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """Return first byte and length of one chunk."""
        start = index * self.chunk_size
        return start, min(self.chunk_size, self.total - start)

    def entry_at(self, offset: int) -> str:
        """Return, for an error, the storage at a byte of the payload, and its first tensor."""
        index = bisect_right(self.offsets, offset) - 1
        row = next((n for n, row in enumerate(self._tensors) if row.storage == index), None)
        if row is None:
            return f"storage {index}"
        return f"storage {index}, {describe(self._tensors[row], row)}"
