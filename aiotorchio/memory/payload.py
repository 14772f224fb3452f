"""The payload as memory: the storages of a message, addressed as they lie on the wire.

``OutgoingPayload`` cuts storages into chunks, ``IncomingPayload`` makes storages for chunks.
Both see the payload as a sequence of *regions*; between regions there are only the zeros that
align them.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from aiotorchio.memory.host import view_of
from aiotorchio.memory.staging import Copier, DeviceCopier, Slabs, bytes_of

__all__ = ["IncomingPayload", "OutgoingPayload", "needs_staging"]

# Storages below this size are sent and received together. Each on its own would cost a view
# (12 us, most of it garbage collection), a place in the system call and a call of the hash:
# copying 64 KiB takes 8 us.
SMALL_STORAGE = 64 * 2**10
# What is kept alive, at most, by one small storage that outlives its neighbours.
ARENA_MAX = 4 * 2**20

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


@dataclass(slots=True)
class _Region:
    """A range of the payload that becomes one piece of memory: one storage, or an arena."""

    start: int
    end: int
    device: torch.device
    rows: list[int]
    storage: torch.UntypedStorage | None = None
    view: memoryview | None = field(default=None, repr=False)


class IncomingPayload:
    """Memory for the storages of a message, made when their first bytes are about to arrive.

    Args:
        offsets: First byte of each storage in the payload.
        nbytes: Bytes of each in the payload; 0 for those on ``meta``.
        sizes: Size of each storage.
        devices: Where each goes. What goes to ``meta`` is received and dropped.
        chunk_size: In bytes.
        copier: For storages on a device; the default fits the device.
        staged: Which devices need staging; tests stage the CPU.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        nbytes: Sequence[int],
        sizes: Sequence[int],
        devices: Sequence[torch.device],
        chunk_size: int,
        *,
        copier: Copier | None = None,
        staged: NeedsStaging = needs_staging,
    ) -> None:
        self._offsets, self._nbytes, self._sizes = offsets, nbytes, sizes
        self._devices = devices
        self._needs_staging = staged
        self._regions = list(self._plan())
        self._starts = [region.start for region in self._regions]
        self._chunk_size = chunk_size
        self._dropped: memoryview | None = None
        real = [region.device for region in self._regions if region.device.type != "meta"]
        if any(map(staged, real)):
            self._copier = copier or DeviceCopier()
            self._slabs = Slabs(chunk_size, self._copier)

    def _plan(self) -> Iterator[_Region]:
        arena: _Region | None = None
        for row, (start, nbytes) in enumerate(zip(self._offsets, self._nbytes, strict=True)):
            if not nbytes:
                continue
            device, end = self._devices[row], start + nbytes
            small = nbytes < SMALL_STORAGE and not self._needs_staging(device)
            if arena and small and arena.device == device and end - arena.start <= ARENA_MAX:
                arena.end = end
                arena.rows.append(row)
                continue
            if arena:
                yield arena
                arena = None
            region = _Region(start, end, device, [row])
            if small:
                arena = region
            else:
                yield region
        if arena:
            yield arena

    def chunk(self, start: int, length: int) -> tuple[list[memoryview], Callable[[], None] | None]:
        """Buffers for ``length`` bytes from ``start``, and what moves them on to a device.

        Returns:
            The buffers, and a function to call when they are filled, in a worker thread if the
            caller likes: it must return before the chunk after the next is taken. None if the
            buffers are where the bytes belong.

        Raises:
            MemoryError: There is none left.
        """
        views: list[memoryview] = []
        moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        slab: tuple[torch.Tensor, memoryview] | None = None
        position, end = start, start + length
        index = max(bisect_right(self._starts, start) - 1, 0)
        while position < end:
            region = self._regions[index]
            last = min(region.end, end)
            if position < region.start:
                gap = min(region.start, end) - position
                views.append(memoryview(bytearray(gap)))
                position += gap
            elif position >= last:
                index += 1
            elif region.device.type == "meta":
                self._dropped = self._dropped or memoryview(bytearray(self._chunk_size))
                views.append(self._dropped[position - start : last - start])
                position = last
            elif self._needs_staging(region.device):
                slab = slab or self._slabs.take()
                at = slice(position - start, last - start)
                within = slice(position - region.start, last - region.start)
                moves.append((bytes_of(self._storage_of(region))[within], slab[0][at]))
                views.append(slab[1][at])
                position = last
            else:
                view = self._view_of(region)
                views.append(view[position - region.start : last - region.start])
                position = last
        if not moves:
            return views, None

        def move() -> None:
            for destination, source in moves:
                self._copier.copy(destination, source)

        return views, move

    def storages(self) -> list[torch.UntypedStorage]:
        """One storage for each row, when all chunks have arrived."""
        made: list[torch.UntypedStorage | None] = [None] * len(self._offsets)
        for region in self._regions:
            if region.device.type == "meta":
                continue
            whole = self._storage_of(region)
            for row in region.rows:
                at = self._offsets[row] - region.start
                size = self._nbytes[row]
                # A slice is a storage of its own that shares the memory of the arena.
                alone = size == whole.nbytes()
                made[row] = whole if alone else whole[at : at + size]
        return [
            torch.UntypedStorage(self._sizes[row], device=self._devices[row])
            if storage is None
            else storage
            for row, storage in enumerate(made)
        ]

    def _storage_of(self, region: _Region) -> torch.UntypedStorage:
        if region.storage is None:
            try:
                # Memory of the host is only reserved here: it grows as bytes are written.
                region.storage = torch.UntypedStorage(
                    region.end - region.start, device=region.device
                )
            except RuntimeError as error:
                raise MemoryError(
                    f"no {region.end - region.start} bytes on {region.device}: {error}"
                ) from error
        return region.storage

    def _view_of(self, region: _Region) -> memoryview:
        if region.view is None:
            region.view = view_of(self._storage_of(region))
        return region.view
