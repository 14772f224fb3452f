"""Memory for the payload of a message that is received.

In: the table of storages with their devices, and routes into existing tensors. Out: buffers for
each chunk, a function that copies the chunk on, and the storages at the end. A ``MismatchError``
means that the caller changed a target during the load, a ``MemoryError`` that memory is exhausted.

A byte of the payload goes into a new storage, straight into an existing tensor, or into a staging
buffer from which it is copied; or it is dropped. Small storages of the host that follow each other
share one block of memory, an arena. A chunk with parts of many small storages goes through a
staging buffer as a whole: this bounds the number of its buffers.

Bytes that go straight into an existing tensor are in it before the digest of their chunk is
compared, so a wrong chunk leaves that tensor damaged. (The tensors of a staged load are shadows.)
Bytes in a staging buffer are copied on only after the comparison. Without checksums, nothing is
compared.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.memory.device_copy import Copier, DeviceCopier, StagingBuffers, bytes_of
from aiotorchio.memory.host import HUGE_PAGE, copy_small, scratch, use_huge_pages, view_of
from aiotorchio.memory.outgoing import (
    SMALL_STORAGE,
    NeedsDeviceCopy,
    needs_device_copy,
)
from aiotorchio.memory.routes import Route

__all__ = ["IncomingPayload"]

# The most bytes of an arena, all of which one of its storages keeps alive after the others are
# freed.
ARENA_MAX = 4 * 2**20
# Storages begin at multiples of this; the padding between two of them is shorter.
_PADDING_MAX = 64
# The most storages and arenas of one chunk that each get a buffer. If there are more, the small
# ones go through a staging buffer: each buffer costs some microseconds on the event loop.
_BUFFERS_MAX = 256
# Indexing without the check that the storage is not on meta: 0.3 us instead of 0.8.
_slice_of: Callable[[torch.UntypedStorage, slice], torch.UntypedStorage]
_slice_of = super(torch.UntypedStorage, torch.UntypedStorage).__getitem__


@dataclass(slots=True)
class _Region:
    """A range of the payload that becomes one block of memory: one storage, or an arena of many."""

    start: int
    end: int
    device: torch.device
    rows: list[int]
    storage: torch.UntypedStorage | None = None
    view: memoryview | None = field(default=None, repr=False)
    # Whether huge pages were requested.
    advised: bool = False


class IncomingPayload:
    """Receives chunks in order; memory is allocated right before its first bytes arrive.

    Args:
        offsets: First byte of each storage in the payload.
        nbytes: Bytes of each storage in the payload; 0 on ``meta``.
        sizes: Size of each storage.
        devices: The device of each storage. For ``meta``, the bytes are dropped. None: no storage
            is made, and the bytes go into the targets of the routes.
        chunk_size: Bytes of a chunk.
        routes: The routes into existing tensors.
        copier: Copies to storages on a device; the default fits the device.
        needs_copy: Whether memory of a device needs device copies.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        nbytes: Sequence[int],
        sizes: Sequence[int],
        devices: Sequence[torch.device | None],
        chunk_size: int,
        routes: Iterable[Route] = (),
        *,
        copier: Copier | None = None,
        needs_copy: NeedsDeviceCopy = needs_device_copy,
    ) -> None:
        self._offsets, self._nbytes, self._sizes = offsets, nbytes, sizes
        self._devices = devices
        self._needs_device_copy = needs_copy
        self._chunk_size = chunk_size
        self._all_routes = list(routes)
        straight, self._upcoming = self._divide()
        self._upcoming_starts = [route.start for route in self._upcoming]
        self._begun = 0
        # Routes with bytes in the next chunk, and maybe in those after it.
        self._under_way: list[Route] = []
        # The work of the last mover, which never runs if the message ends early.
        self._moving: list[list[Any]] = []
        own = list(self._plan())
        self._region_of: list[_Region | None] = [None] * len(offsets)
        for region in interruptible(own):
            for row in region.rows:
                self._region_of[row] = region
        self._regions: list[_Region | Route] = sorted(
            [*own, *straight], key=lambda region: region.start
        )
        self._starts = [region.start for region in self._regions]
        self._dropped: memoryview | None = None
        self._copier = copier or DeviceCopier()
        self._staging_buffers = StagingBuffers(chunk_size, self._copier, incoming=True)

    def _divide(self) -> tuple[list[Route], list[Route]]:
        """Return the routes without a staging buffer, and those that copy from one."""
        same: dict[tuple[int, int], list[Route]] = {}
        for route in self._all_routes:
            same.setdefault((route.start, route.end), []).append(route)
        ordered: list[Route] = []
        for _, routes in sorted(same.items()):
            ordered += routes if len(routes) == 1 else {each.key: each for each in routes}.values()
        shared: set[int] = set()
        furthest: Route | None = None
        for route in interruptible(ordered):
            if furthest and route.start < furthest.end:
                shared |= {id(route), id(furthest)}
            if furthest is None or route.end > furthest.end:
                furthest = route
        straight: list[Route] = []
        others: list[Route] = []
        for route in interruptible(ordered):
            large = route.end - route.start >= SMALL_STORAGE
            on_host = not self._needs_device_copy(route.device)
            if route.is_contiguous and large and on_host and id(route) not in shared:
                straight.append(route)
            else:
                others.append(route)
        return straight, others

    def _routes_in(self, start: int, end: int) -> list[Route]:
        """Return the routes that copy from the staging buffer of a chunk; chunks come in order."""
        routes = [route for route in self._under_way if route.end > start]
        stop = bisect_left(self._upcoming_starts, end, self._begun)
        routes += self._upcoming[self._begun : stop]
        self._begun = stop
        self._under_way = routes
        return routes

    def _regions_in(self, start: int, end: int) -> tuple[int, int]:
        """Return the numbers of the first region in a range and of the first one after it."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        if first < len(self._regions) and self._regions[first].end <= start:
            first += 1
        return first, bisect_left(self._starts, end)

    def _plan(self) -> Iterator[_Region]:
        arena: _Region | None = None
        of_arenas = {
            device: device is not None and not self._needs_device_copy(device)
            for device in set(self._devices)
        }
        for row, (start, nbytes, device) in enumerate(
            interruptible(zip(self._offsets, self._nbytes, self._devices, strict=True))
        ):
            if not nbytes:
                continue
            end = start + nbytes
            small = nbytes < SMALL_STORAGE and of_arenas[device]
            if arena and small and arena.device == device and end - arena.start <= ARENA_MAX:
                arena.end = end
                arena.rows.append(row)
                continue
            if arena:
                yield arena
                arena = None
            if device is None:
                continue
            region = _Region(start, end, device, [row])
            if small:
                arena = region
            else:
                yield region
        if arena:
            yield arena

    @property
    def tables(self) -> list[list[Any]]:
        """The lists that may be as long as the tables of the header, for a release in parts."""
        rows: list[list[Any]] = [
            self._regions,
            self._starts,
            self._region_of,
            self._all_routes,
            self._upcoming,
        ]
        return [*rows, self._under_way, *self._moving]

    def steps(self, start: int, length: int) -> int:
        """Return how many storages, arenas and routes ``buffers_for`` has to process."""
        first, last = self._regions_in(start, start + length)
        upcoming = bisect_left(self._upcoming_starts, start + length, self._begun) - self._begun
        return last - first + len(self._under_way) + upcoming

    def buffers_for(
        self, start: int, length: int
    ) -> tuple[list[memoryview], Callable[[], None] | None]:
        """Return buffers for ``length`` bytes from ``start``, and a function that moves them on.

        Returns:
            The buffers, and the function; None if no byte goes through a staging buffer. Call it,
            in any thread, after the digest of the chunk was compared. It must return before the
            chunk after the next is taken.

        Raises:
            MemoryError: Memory is exhausted.
            MismatchError: A tensor of a route changed its shape or its memory.
        """
        end = start + length
        routes = self._routes_in(start, end)
        first, last = self._regions_in(start, end)
        regions = self._regions[first:last]
        scattered: list[_Region] = []
        if len(regions) > _BUFFERS_MAX:
            regions, scattered = self._small_apart(regions)
        buffer = self._staging_buffers.take() if routes or scattered else None
        views: list[memoryview] = []
        moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        position = start
        for region in regions:
            # Between regions are padding, and bytes that go through a staging buffer.
            if position < region.start:
                views.append(self._between(buffer, slice(position - start, region.start - start)))
                position = region.start
            stop = min(region.end, end)
            if isinstance(region, Route):
                views.append(region.checked_view(position, stop))
            elif region.device.type == "meta":
                views.append(self._dropped_view(position - start, stop - start))
            elif self._needs_device_copy(region.device):
                buffer = buffer or self._staging_buffers.take()
                view, move = self._staged_view(region, position, stop, buffer, start)
                views.append(view)
                moves.append(move)
            else:
                views.append(self._host_view(region, position, stop, start))
            position = stop
        if position < end:
            views.append(self._between(buffer, slice(position - start, end - start)))
        if buffer is None:
            return views, None
        return views, self._mover(buffer[0][:length], start, moves, scattered, routes)

    def _dropped_view(self, start: int, stop: int) -> memoryview:
        """Return memory for bytes that are dropped: a range of a chunk."""
        if self._dropped is None:
            self._dropped = scratch(self._chunk_size)
        return self._dropped[start:stop]

    def _staged_view(
        self,
        region: _Region,
        start: int,
        stop: int,
        buffer: tuple[torch.Tensor, memoryview],
        buffer_start: int,
    ) -> tuple[memoryview, tuple[torch.Tensor, torch.Tensor]]:
        """Return memory in a staging buffer for bytes of a storage on a device, and their copy."""
        at = slice(start - buffer_start, stop - buffer_start)
        storage = bytes_of(self._storage_of(region))
        return buffer[1][at], (storage[start - region.start : stop - region.start], buffer[0][at])

    def _host_view(self, region: _Region, start: int, stop: int, arrived: int) -> memoryview:
        """Return the memory itself of a range of a storage or an arena on the host."""
        if region.view is None:
            region.view = view_of(self._storage_of(region))
        # Requested only when as many bytes have arrived: the first byte in a page takes all of it.
        if arrived >= HUGE_PAGE and not region.advised:
            region.advised = True
            use_huge_pages(self._storage_of(region))
        return region.view[start - region.start : stop - region.start]

    def _between(self, buffer: tuple[torch.Tensor, memoryview] | None, at: slice) -> memoryview:
        """Return memory for bytes between regions: padding, or bytes for routes and scattering."""
        if buffer is not None:
            return buffer[1][at]
        if at.stop - at.start < _PADDING_MAX:
            return memoryview(bytearray(at.stop - at.start))
        return self._dropped_view(at.start, at.stop)

    def _mover(
        self,
        received: torch.Tensor,
        start: int,
        moves: list[tuple[torch.Tensor, torch.Tensor]],
        scattered: list[_Region],
        routes: list[Route],
    ) -> Callable[[], None]:
        """Make the function that copies a chunk from its staging buffer."""
        self._moving = [moves, scattered, routes]

        def move() -> None:
            for destination, source in moves:
                self._copier.copy(destination, source)
            for region in interruptible(scattered):
                self._scatter(region, received, start)
            for route in routes:
                check_interrupt()
                route.check()
                on_host = not self._needs_device_copy(route.device)
                route.take(received, start, None if on_host else self._copier)

        return move

    def _small_apart(
        self, regions: Sequence[_Region | Route]
    ) -> tuple[list[_Region | Route], list[_Region]]:
        """Divide regions into large ones and small ones, which go through a staging buffer."""
        large: list[_Region | Route] = []
        small: list[_Region] = []
        for region in interruptible(regions):
            if isinstance(region, Route) or region.end - region.start >= SMALL_STORAGE:
                large.append(region)
            elif region.device.type != "meta":
                small.append(region)
        return large, small

    def _scatter(self, region: _Region, buffer: torch.Tensor, buffer_start: int) -> None:
        """Copy the bytes of a small region from a staging buffer."""
        start, stop = max(region.start, buffer_start), min(region.end, buffer_start + len(buffer))
        storage = self._storage_of(region)
        if self._needs_device_copy(region.device):
            within = slice(start - region.start, stop - region.start)
            at = slice(start - buffer_start, stop - buffer_start)
            self._copier.copy(bytes_of(storage)[within], buffer[at])
        else:
            # Two slices and a copy_() would take ten times as long for a storage of 4 KiB.
            copy_small(
                storage.data_ptr() + start - region.start,
                buffer.data_ptr() + start - buffer_start,
                stop - start,
            )

    def check(self) -> None:
        """Check that every tensor of a route still has its shape and its memory.

        Raises:
            MismatchError: A tensor changed: bytes were received into its old memory.
        """
        for route in interruptible(self._all_routes):
            route.check()

    def storages(self) -> list[torch.UntypedStorage | None]:
        """Return the storage of each row, after all chunks; None for a row without one."""
        with gc_paused():
            return [self.storage(row) for row in interruptible(range(len(self._offsets)))]

    def storage(self, row: int) -> torch.UntypedStorage | None:
        """Return the storage of one row, after its bytes have arrived."""
        device, region = self._devices[row], self._region_of[row]
        if device is None:
            return None
        if region is None or region.device.type == "meta":
            return torch.UntypedStorage(self._sizes[row], device=device)
        whole = region.storage or self._storage_of(region)
        if len(region.rows) == 1:
            return whole
        at = self._offsets[row] - region.start
        # A separate storage object over the memory of the arena.
        return _slice_of(whole, slice(at, at + self._nbytes[row]))

    def release(self, row: int) -> None:
        """Drop the reference to the storage of a region, if this row is the last one in it."""
        region = self._region_of[row]
        if region is not None and row == region.rows[-1]:
            region.storage = region.view = None

    def _storage_of(self, region: _Region) -> torch.UntypedStorage:
        if region.storage is None:
            try:
                # Memory of the host is only reserved here: it takes room as bytes are written.
                region.storage = torch.UntypedStorage(
                    region.end - region.start, device=region.device
                )
            except RuntimeError as error:
                raise MemoryError(
                    f"{region.end - region.start} bytes could not be allocated on "
                    f"{region.device}: {error}"
                ) from error
        return region.storage
