"""Memory for the payload of a message that arrives.

A byte of the payload goes to one of four places: into a storage that is made for it, straight into
a tensor that is there, into a slab from which it is copied on, or nowhere. A chunk that holds parts
of many small storages goes through a slab as a whole: the number of its buffers is bounded.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.memory.device_copy import Copier, DeviceCopier, Slabs, bytes_of
from aiotorchio.memory.host import HUGE_PAGE, copy_small, scratch, use_huge_pages, view_of
from aiotorchio.memory.outgoing import (
    SMALL_STORAGE,
    NeedsDeviceCopy,
    needs_device_copy,
)
from aiotorchio.memory.routes import Route

__all__ = ["IncomingPayload"]

# What is kept alive, at most, by one small storage that outlives its neighbours.
ARENA_MAX = 4 * 2**20
# Storages begin at multiples of this; less than it lies between two of them.
_PADDING_MAX = 64
# Storages and arenas that are received into one by one, of one chunk. Of more, the small ones go
# through a slab: each buffer costs some microseconds on the event loop.
_BUFFERS_MAX = 256
# What indexing does when it has made sure that the storage is not on meta: 0.3 us, not 0.8.
_slice_of: Callable[[torch.UntypedStorage, slice], torch.UntypedStorage]
_slice_of = super(torch.UntypedStorage, torch.UntypedStorage).__getitem__


@dataclass(slots=True)
class _Region:
    """A range of the payload that becomes one piece of memory: one storage, or an arena."""

    start: int
    end: int
    device: torch.device
    rows: list[int]
    storage: torch.UntypedStorage | None = None
    view: memoryview | None = field(default=None, repr=False)
    # Whether huge pages were asked for.
    advised: bool = False


class IncomingPayload:
    """Takes chunks in order; memory is made when the first bytes for it are about to arrive.

    Args:
        offsets: First byte of each storage in the payload.
        nbytes: Bytes of each in the payload; 0 for those on ``meta``.
        sizes: Size of each storage.
        devices: Where each goes. What goes to ``meta`` is received and dropped; None: there is no
            such storage here, its bytes go where the routes take them.
        chunk_size: In bytes.
        routes: What goes into tensors that are there.
        copier: For storages on a device; the default fits the device.
        staged: Which devices need staging; tests stage the CPU.
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
        staged: NeedsDeviceCopy = needs_device_copy,
    ) -> None:
        self._offsets, self._nbytes, self._sizes = offsets, nbytes, sizes
        self._devices = devices
        self._needs_staging = staged
        self._chunk_size = chunk_size
        self._all_routes = list(routes)
        straight, self._upcoming = self._divide()
        self._upcoming_starts = [route.start for route in self._upcoming]
        self._begun = 0
        # Routes with bytes in the chunk that comes next, and maybe behind it.
        self._under_way: list[Route] = []
        # What the chunk that was taken last is moved by, which is never done if no other follows.
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
        self._slabs = Slabs(chunk_size, self._copier, incoming=True)

    def _divide(self) -> tuple[list[Route], list[Route]]:
        """The routes whose bytes are received where they belong, and those that take from slabs."""
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
            on_host = not self._needs_staging(route.device)
            if route.is_contiguous and large and on_host and id(route) not in shared:
                straight.append(route)
            else:
                others.append(route)
        return straight, others

    def _routes_in(self, start: int, end: int) -> list[Route]:
        """The routes that take from the slab of a chunk; chunks come in order."""
        routes = [route for route in self._under_way if route.end > start]
        stop = bisect_left(self._upcoming_starts, end, self._begun)
        routes += self._upcoming[self._begun : stop]
        self._begun = stop
        self._under_way = routes
        return routes

    def _regions_in(self, start: int, end: int) -> tuple[int, int]:
        """Numbers of the first region with bytes in a range, and of the one after the last."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        if first < len(self._regions) and self._regions[first].end <= start:
            first += 1
        return first, bisect_left(self._starts, end)

    def _plan(self) -> Iterator[_Region]:
        arena: _Region | None = None
        of_arenas = {
            device: device is not None and not self._needs_staging(device)
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
        """What may be as long as the tables of the header; nothing else holds what is in them."""
        rows: list[list[Any]] = [
            self._regions,
            self._starts,
            self._region_of,
            self._all_routes,
            self._upcoming,
        ]
        return [*rows, self._under_way, *self._moving]

    def steps(self, start: int, length: int) -> int:
        """How many storages, arenas and routes ``chunk`` has to look at."""
        first, last = self._regions_in(start, start + length)
        upcoming = bisect_left(self._upcoming_starts, start + length, self._begun) - self._begun
        return last - first + len(self._under_way) + upcoming

    def chunk(self, start: int, length: int) -> tuple[list[memoryview], Callable[[], None] | None]:
        """Buffers for ``length`` bytes from ``start``, and what moves them on.

        Returns:
            The buffers, and a function to call when they are filled, in a worker thread if the
            caller likes: it must return before the chunk after the next is taken. None if the
            buffers are where the bytes belong.

        Raises:
            MemoryError: There is none left.
            MismatchError: A tensor of a route changed its shape or its memory.
        """
        end = start + length
        routes = self._routes_in(start, end)
        first, last = self._regions_in(start, end)
        regions = self._regions[first:last]
        scattered: list[_Region] = []
        if len(regions) > _BUFFERS_MAX:
            regions, scattered = self._small_apart(regions)
        slab = self._slabs.take() if routes or scattered else None
        views: list[memoryview] = []
        moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        position = start
        for region in regions:
            # Between regions is what aligns them, and what is taken from a slab.
            if position < region.start:
                views.append(self._between(slab, slice(position - start, region.start - start)))
                position = region.start
            stop = min(region.end, end)
            at = slice(position - start, stop - start)
            if isinstance(region, Route):
                region.check()
                views.append(region.view(position, stop))
            elif region.device.type == "meta":
                views.append(self._scratch()[at])
            elif self._needs_staging(region.device):
                slab = slab or self._slabs.take()
                within = slice(position - region.start, stop - region.start)
                moves.append((bytes_of(self._storage_of(region))[within], slab[0][at]))
                views.append(slab[1][at])
            else:
                view = self._view_of(region, start)
                views.append(view[position - region.start : stop - region.start])
            position = stop
        if position < end:
            views.append(self._between(slab, slice(position - start, end - start)))
        if slab is None:
            return views, None
        return views, self._mover(slab[0][:length], start, moves, scattered, routes)

    def _mover(
        self,
        filled: torch.Tensor,
        start: int,
        moves: list[tuple[torch.Tensor, torch.Tensor]],
        scattered: list[_Region],
        routes: list[Route],
    ) -> Callable[[], None]:
        """A function that moves a chunk on from its staging buffer."""
        self._moving = [moves, scattered, routes]

        def move() -> None:
            for destination, source in moves:
                self._copier.copy(destination, source)
            for region in interruptible(scattered):
                self._scatter(region, filled, start)
            for route in routes:
                check_interrupt()
                route.check()
                on_host = not self._needs_staging(route.device)
                route.take(filled, start, None if on_host else self._copier)

        return move

    def _small_apart(
        self, regions: Sequence[_Region | Route]
    ) -> tuple[list[_Region | Route], list[_Region]]:
        """Regions to be received into, and small ones, to be copied to from a slab."""
        large: list[_Region | Route] = []
        small: list[_Region] = []
        for region in interruptible(regions):
            if isinstance(region, Route) or region.end - region.start >= SMALL_STORAGE:
                large.append(region)
            elif region.device.type != "meta":
                small.append(region)
        return large, small

    def _scatter(self, region: _Region, slab: torch.Tensor, slab_start: int) -> None:
        """Copy what a slab holds of a small region."""
        start, stop = max(region.start, slab_start), min(region.end, slab_start + len(slab))
        storage = self._storage_of(region)
        if self._needs_staging(region.device):
            within = slice(start - region.start, stop - region.start)
            at = slice(start - slab_start, stop - slab_start)
            self._copier.copy(bytes_of(storage)[within], slab[at])
        else:
            # Two slices and a copy_() would take ten times as long for a storage of 4 KiB.
            copy_small(
                storage.data_ptr() + start - region.start,
                slab.data_ptr() + start - slab_start,
                stop - start,
            )

    def _between(self, slab: tuple[torch.Tensor, memoryview] | None, at: slice) -> memoryview:
        if slab is not None:
            return slab[1][at]
        if at.stop - at.start < _PADDING_MAX:
            return memoryview(bytearray(at.stop - at.start))
        return self._scratch()[at]

    def _scratch(self) -> memoryview:
        """Memory for what is dropped."""
        if self._dropped is None:
            self._dropped = scratch(self._chunk_size)
        return self._dropped

    def check(self) -> None:
        """Make sure that every tensor of a route still is where it was.

        Raises:
            MismatchError: One has another shape or other memory: the bytes went astray.
        """
        for route in interruptible(self._all_routes):
            route.check()

    def storages(self) -> list[torch.UntypedStorage | None]:
        """The storage of each row, when all chunks have arrived; None where there is none."""
        with gc_paused():
            return [self.storage(row) for row in interruptible(range(len(self._offsets)))]

    def storage(self, row: int) -> torch.UntypedStorage | None:
        """The storage of one row, when its bytes have arrived."""
        device, region = self._devices[row], self._region_of[row]
        if device is None:
            return None
        if region is None or region.device.type == "meta":
            return torch.UntypedStorage(self._sizes[row], device=device)
        whole = region.storage or self._storage_of(region)
        if len(region.rows) == 1:
            return whole
        at = self._offsets[row] - region.start
        # A storage of its own that shares the memory of the arena.
        return _slice_of(whole, slice(at, at + self._nbytes[row]))

    def release(self, row: int) -> None:
        """Forget the storage of a row, and those before it, which are with the caller now."""
        region = self._region_of[row]
        if region is not None and row == region.rows[-1]:
            region.storage = region.view = None

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

    def _view_of(self, region: _Region, arrived: int) -> memoryview:
        if region.view is None:
            region.view = view_of(self._storage_of(region))
        # Not before a huge page has arrived: the first byte in one takes all of its memory.
        if arrived >= HUGE_PAGE and not region.advised:
            region.advised = True
            use_huge_pages(self._storage_of(region))
        return region.view
