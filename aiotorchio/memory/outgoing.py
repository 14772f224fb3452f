"""The payload of a message to send: storages, cut into chunks.

In: storages and their places in the payload. Out: views of one chunk after the other, for the
composer. A ``RuntimeError`` means that the caller resized a storage during the send.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch

from aiotorchio.common.strides import Part
from aiotorchio.memory.device_copy import (
    Copier,
    DeviceCopier,
    Here,
    OnDevice,
    StagingBuffers,
    bytes_of,
)
from aiotorchio.memory.gather import Gathered
from aiotorchio.memory.host import copy_small, view_of

__all__ = ["SMALL_STORAGE", "NeedsDeviceCopy", "OutgoingPayload", "needs_device_copy"]

# Storages below this size are sent and received together. A separate one would cost a view
# (12 us, most of it garbage collection), an entry in the system call and a call of the hash:
# copying 64 KiB takes 8 us.
SMALL_STORAGE = 64 * 2**10

# Up to 63 bytes align a storage, and up to 15 more the first part of one.
_PADDING = memoryview(bytes(128))

NeedsDeviceCopy = Callable[[torch.device], bool]


def needs_device_copy(device: torch.device) -> bool:
    """Whether sockets cannot access the memory of this device."""
    return device.type != "cpu"


class OutgoingPayload:
    """The chunks of a payload, as views of the storages; small neighbours are joined by a copy.

    Args:
        storages: The storages, in the order of the header.
        offsets: First byte of each storage in the payload.
        nbytes: Bytes of each storage in the payload; 0 on ``meta``.
        chunk_size: Bytes of a chunk.
        parts: The parts to send of a storage that is not sent whole, by number of the storage.
            Between two parts are less than 16 bytes of zeros, for alignment.
        copier: Copies storages from a device; the default fits the device.
        needs_copy: Whether memory of a device needs device copies.

    Attributes:
        has_device_copies: Whether any storage needs device copies.
        has_gathered: Whether strided elements have to be gathered, which takes microseconds a
            piece.
        small: Number of storages and parts that are small enough to be joined.
        borrows: Whether the last chunk has views of storages on the host.
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
        needs_copy: NeedsDeviceCopy = needs_device_copy,
    ) -> None:
        # A piece is a part of a storage, or a whole storage with bytes. (An empty storage has the
        # offset of the next one.)
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._storages: list[torch.UntypedStorage] = []
        self._sizes: list[int] = []  # of the storages
        self._firsts: list[int] = []  # bytes of the storages before the pieces
        self._gathered: dict[int, Gathered] = {}
        for row, size in enumerate(nbytes):
            if not size:
                continue
            storage = storages[row]
            if parts and row in parts:
                for part in parts[row]:
                    if not part.dense:
                        self._gathered[len(self._starts)] = Gathered(storage, part)
                    self._add(storage, storage.nbytes(), offsets[row] + part.at, part.nbytes)
                    self._firsts.append(part.start)
            else:
                self._add(storage, size, offsets[row], size)
                self._firsts.append(0)
        devices = [storage.device for storage in self._storages]
        needs = {device: needs_copy(device) for device in set(devices)}
        self._on_device = [needs[device] for device in devices]
        self._small = [
            end - start < SMALL_STORAGE and not on_device
            for start, end, on_device in zip(self._starts, self._ends, self._on_device, strict=True)
        ]
        for n in self._gathered:
            self._small[n] = False
        self.has_device_copies = any(self._on_device)
        self.has_gathered = bool(self._gathered)
        self.small = sum(self._small)
        self.borrows = False
        # Without a device, there are only views.
        self._staging_buffers = (
            StagingBuffers(chunk_size, copier or DeviceCopier()) if self.has_device_copies else None
        )

    def _add(self, storage: torch.UntypedStorage, size: int, start: int, nbytes: int) -> None:
        self._storages.append(storage)
        self._sizes.append(size)
        self._starts.append(start)
        self._ends.append(start + nbytes)

    def chunk_views(self, start: int, length: int) -> list[memoryview]:
        """Return views of ``length`` bytes from ``start``; bytes on a device are copied first.

        Views of a staging buffer are valid until the chunk after the next is taken, others always.

        Raises:
            RuntimeError: A storage was resized since this payload was made.
        """
        pieces = list(self.pieces(start, length))
        if self._staging_buffers is not None:
            return self._staging_buffers.stage(pieces)
        return cast(list[memoryview], pieces)

    def pieces(self, start: int, length: int) -> Iterator[memoryview | OnDevice]:
        """Yield the pieces of a chunk; bytes on a device are not copied."""
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
            elif self._on_device[index]:
                yield OnDevice(
                    self._storages[index].device,
                    last - position,
                    self._copy_of(index, position - first, last - first),
                )
            elif index in self._gathered:
                gathered = torch.UntypedStorage(last - position)
                self._copy_of(index, position - first, last - first)(bytes_of(gathered), Here())
                yield view_of(gathered)
            elif self._small[index]:
                joined = self._join_small(index, position, end)
                last = position + len(joined)
                yield joined
            else:
                self.borrows = True
                at = self._firsts[index] - first
                yield view_of(self._checked(index))[position + at : last + at]
            position = last

    def _copy_of(self, index: int, start: int, stop: int) -> Callable[[torch.Tensor, Copier], None]:
        """Make a function that copies a range of a piece."""
        storage, gathered, first = (
            self._checked(index),
            self._gathered.get(index),
            self._firsts[index],
        )

        def copy(destination: torch.Tensor, copier: Copier) -> None:
            if gathered is None:
                copier.copy(destination, bytes_of(storage)[first + start : first + stop])
            else:
                gathered.copy(destination, start, stop, copier)

        return copy

    def _checked(self, index: int) -> torch.UntypedStorage:
        """Return a storage, which must still have its original size."""
        storage, nbytes = self._storages[index], self._sizes[index]
        if storage.nbytes() != nbytes:
            raise RuntimeError(
                f"a storage of {nbytes} bytes was resized to {storage.nbytes()} bytes while it was "
                "sent; its size must not change during a save"
            )
        return storage

    def _join_small(self, index: int, start: int, end: int) -> memoryview:
        """Copy a run of small pieces, and the padding between them, into one block of memory."""
        stop = index
        while stop < len(self._starts) and self._small[stop] and self._starts[stop] < end:
            stop += 1
        length = min(self._ends[stop - 1], end) - start
        joined = torch.UntypedStorage(length)
        view, address = view_of(joined), joined.data_ptr()
        position = start
        # Local names are faster: a chunk of small storages takes thousands of turns.
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
