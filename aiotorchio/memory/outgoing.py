"""The payload of a message that is sent: storages, cut into chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch

from aiotorchio.common.strides import Part
from aiotorchio.memory.device_copy import Copier, DeviceCopier, Here, OnDevice, Slabs, bytes_of
from aiotorchio.memory.gather import Gathered
from aiotorchio.memory.host import copy_small, view_of

__all__ = ["SMALL_STORAGE", "NeedsDeviceCopy", "OutgoingPayload", "needs_device_copy"]

# Storages below this size are sent and received together. Each on its own would cost a view
# (12 us, most of it garbage collection), a place in the system call and a call of the hash:
# copying 64 KiB takes 8 us.
SMALL_STORAGE = 64 * 2**10

# Up to 63 bytes align a storage, and up to 15 more the first part of one.
_PADDING = memoryview(bytes(128))

NeedsDeviceCopy = Callable[[torch.device], bool]


def needs_device_copy(device: torch.device) -> bool:
    """Whether memory of this device is out of reach for sockets."""
    return device.type != "cpu"


class OutgoingPayload:
    """The chunks of a payload, as views of the storages themselves; small ones are gathered.

    Args:
        storages: In the order of the header.
        offsets: First byte of each in the payload.
        nbytes: Bytes of each in the payload; 0 for those on ``meta``.
        chunk_size: In bytes.
        parts: Storages of which only parts are sent, by number; what lies between their parts, to
            align them, is less than 16 bytes of zeros.
        copier: For storages on a device; the default fits the device.
        staged: Which devices need staging; tests stage the CPU.

    Attributes:
        has_staged: Whether any storage is on a device.
        has_packed: Whether elements have to be gathered, which takes microseconds a piece.
        small: How many storages and parts are small, so that they are gathered.
        borrows: Whether the chunk that was taken last shows the memory of storages on the host.
    """

    def __init__(
        self,
        storages: Sequence[torch.UntypedStorage],
        offsets: Sequence[int],
        nbytes: Sequence[int],
        chunk_size: int,
        *,
        parts: Mapping[int, Sequence[Part]] | None = None,
        copier: Copier | None = None,
        staged: NeedsDeviceCopy = needs_device_copy,
    ) -> None:
        # What is sent as a piece: a storage with bytes (empty ones share their offset with the
        # next one), or a part of one.
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._storages: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []  # of the storages
        self._firsts: list[int] = []  # bytes of the storages before the pieces
        self._packed: dict[int, Gathered] = {}
        for row, size in enumerate(nbytes):
            if not size:
                continue
            storage = storages[row]
            if parts and row in parts:
                for part in parts[row]:
                    if not part.dense:
                        self._packed[len(self._starts)] = Gathered(storage, part)
                    self._add(storage, storage.nbytes(), offsets[row] + part.at, part.nbytes)
                    self._firsts.append(part.start)
            else:
                self._add(storage, size, offsets[row], size)
                self._firsts.append(0)
        devices = [storage.device for storage in self._storages]
        needs = {device: staged(device) for device in set(devices)}
        self._staged = [needs[device] for device in devices]
        self._small = [
            end - start < SMALL_STORAGE and not is_staged
            for start, end, is_staged in zip(self._starts, self._ends, self._staged, strict=True)
        ]
        for n in self._packed:
            self._small[n] = False
        self.has_device_copies = any(self._staged)
        self.has_gathered = bool(self._packed)
        self.small = sum(self._small)
        self.borrows = False
        # Without a device there is nothing but views to stage.
        self._slabs = (
            Slabs(chunk_size, copier or DeviceCopier()) if self.has_device_copies else None
        )

    def _add(self, storage: torch.UntypedStorage, size: int, start: int, nbytes: int) -> None:
        self._storages.append(storage)
        self._sizes.append(size)
        self._starts.append(start)
        self._ends.append(start + nbytes)

    def chunk(self, start: int, length: int) -> list[memoryview]:
        """Views of ``length`` bytes from ``start``; from a device, they are copied first.

        Views of a slab hold until the chunk after the next is taken; all others hold for good.

        Raises:
            RuntimeError: A storage has another size than when it was announced.
        """
        pieces = list(self.pieces(start, length))
        if self._slabs is not None:
            return self._slabs.stage(pieces)
        return cast(list[memoryview], pieces)

    def pieces(self, start: int, length: int) -> Iterator[memoryview | OnDevice]:
        """Likewise, but bytes on a device are left there."""
        self.borrows = False
        position, end = start, start + length
        index = max(bisect_right(self._starts, start) - 1, 0)
        while position < end:
            first, last = self._starts[index], min(self._ends[index], end)
            if position < first:
                last = min(first, end)
                yield _PADDING[: last - position]
            elif position >= last:
                index += 1
                continue
            elif self._staged[index]:
                yield OnDevice(
                    self._storages[index].device,
                    last - position,
                    self._copy_of(index, position - first, last - first),
                )
            elif index in self._packed:
                gathered = torch.UntypedStorage(last - position)
                self._copy_of(index, position - first, last - first)(bytes_of(gathered), Here())
                yield view_of(gathered)
            elif self._small[index]:
                gathered_view = self._gather(index, position, end)
                last = position + len(gathered_view)
                yield gathered_view
            else:
                self.borrows = True
                at = self._firsts[index] - first
                yield view_of(self._checked(index))[position + at : last + at]
            position = last

    def _copy_of(self, index: int, start: int, stop: int) -> Callable[[torch.Tensor, Copier], None]:
        """What copies a range of a piece."""
        storage, packed, first = self._checked(index), self._packed.get(index), self._firsts[index]

        def copy(destination: torch.Tensor, copier: Copier) -> None:
            if packed is None:
                copier.copy(destination, bytes_of(storage)[first + start : first + stop])
            else:
                packed.copy(destination, start, stop, copier)

        return copy

    def _checked(self, index: int) -> torch.UntypedStorage:
        """A storage, which must still be as large as it was."""
        storage, nbytes = self._storages[index], self._sizes[index]
        if storage.nbytes() != nbytes:
            raise RuntimeError(
                f"a storage of {nbytes} bytes was resized to {storage.nbytes()} while it was sent"
            )
        return storage

    def _gather(self, index: int, start: int, end: int) -> memoryview:
        """Copy a run of small pieces, and what aligns them, into one piece of memory."""
        stop = index
        while stop < len(self._starts) and self._small[stop] and self._starts[stop] < end:
            stop += 1
        length = min(self._ends[stop - 1], end) - start
        gathered = torch.UntypedStorage(length)
        view, address = view_of(gathered), gathered.data_ptr()
        position = start
        # Looked up once: a chunk of small storages takes thousands of turns.
        starts, ends, firsts = self._starts, self._ends, self._firsts
        for n in range(index, stop):
            first, last = starts[n], ends[n]
            source = self._checked(n).data_ptr() + firsts[n]
            if first < start:
                source += start - first
                first = start
            elif position < first:
                view[position - start : first - start] = _PADDING[: first - position]
            position = last if last < end else end
            copy_small(address + first - start, source, position - first)
        return view
