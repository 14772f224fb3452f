"""The payload of a message that is sent: storages, cut into chunks."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from aiotorchio.memory.host import view_of
from aiotorchio.memory.staging import Copier, DeviceCopier, Slabs, bytes_of

__all__ = ["SMALL_STORAGE", "NeedsStaging", "OutgoingPayload", "needs_staging"]

# Storages below this size are sent and received together. Each on its own would cost a view
# (12 us, most of it garbage collection), a place in the system call and a call of the hash:
# copying 64 KiB takes 8 us.
SMALL_STORAGE = 64 * 2**10

_PADDING = memoryview(bytes(64))

NeedsStaging = Callable[[torch.device], bool]


def needs_staging(device: torch.device) -> bool:
    """Whether memory of this device is out of reach for sockets."""
    return device.type != "cpu"


class OutgoingPayload:
    """The chunks of a payload, as views of the storages themselves; small ones are gathered.

    Args:
        storages: In the order of the header.
        offsets: First byte of each in the payload.
        nbytes: Bytes of each in the payload; 0 for those on ``meta``.
        chunk_size: In bytes.
        copier: For storages on a device; the default fits the device.
        staged: Which devices need staging; tests stage the CPU.
    """

    def __init__(
        self,
        storages: Sequence[torch.UntypedStorage],
        offsets: Sequence[int],
        nbytes: Sequence[int],
        chunk_size: int,
        *,
        copier: Copier | None = None,
        staged: NeedsStaging = needs_staging,
    ) -> None:
        # Only storages with bytes: empty ones share their offset with the next one.
        rows = [n for n, size in enumerate(nbytes) if size]
        self._starts = [offsets[n] for n in rows]
        self._ends = [offsets[n] + nbytes[n] for n in rows]
        self._storages = [storages[n] for n in rows]
        devices = [storage.device for storage in self._storages]
        self._staged = [staged(device) for device in devices]
        self._small = [
            nbytes[n] < SMALL_STORAGE and not is_staged
            for n, is_staged in zip(rows, self._staged, strict=True)
        ]
        self.has_staged = any(self._staged)
        if self.has_staged:
            self._copier = copier or DeviceCopier()
            self._slabs = Slabs(chunk_size, self._copier)

    def chunk(self, start: int, length: int) -> list[memoryview]:
        """Views of ``length`` bytes from ``start``; from a device, they are copied first.

        Views of a slab hold until the chunk after the next is taken; all others hold for good.
        """
        views: list[memoryview] = []
        slab: tuple[torch.Tensor, memoryview] | None = None
        position, end = start, start + length
        index = max(bisect_right(self._starts, start) - 1, 0)
        while position < end:
            first, last = self._starts[index], min(self._ends[index], end)
            if position < first:
                views.append(_PADDING[: min(first, end) - position])
                position = min(first, end)
            elif position >= last:
                index += 1
            elif self._staged[index]:
                slab = slab or self._slabs.take()
                at = slice(position - start, last - start)
                source = bytes_of(self._checked(index))[position - first : last - first]
                self._copier.copy(slab[0][at], source)
                views.append(slab[1][at])
                position = last
            elif self._small[index]:
                views.append(self._gather(index, position, end))
                position += len(views[-1])
            else:
                views.append(view_of(self._checked(index))[position - first : last - first])
                position = last
        return views

    def _checked(self, index: int) -> torch.UntypedStorage:
        """A storage, which must still be as large as the header says."""
        storage, nbytes = self._storages[index], self._ends[index] - self._starts[index]
        if storage.nbytes() != nbytes:
            raise RuntimeError(
                f"a storage of {nbytes} bytes was resized to {storage.nbytes()} while it was sent"
            )
        return storage

    def _gather(self, index: int, start: int, end: int) -> memoryview:
        """Copy a run of small storages, and what aligns them, into one piece of memory."""
        stop = index
        while stop < len(self._starts) and self._small[stop] and self._starts[stop] < end:
            stop += 1
        length = min(self._ends[stop - 1], end) - start
        gathered = torch.UntypedStorage(length)
        view, address = view_of(gathered), gathered.data_ptr()
        position = start
        for n in range(index, stop):
            first, last = max(self._starts[n], start), min(self._ends[n], end)
            if position < first:
                view[position - start : first - start] = _PADDING[: first - position]
            source = self._checked(n).data_ptr() + first - self._starts[n]
            ctypes.memmove(address + first - start, source, last - first)
            position = last
        return view
