"""Where the bytes of a message go: decided from its header, before any of them is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.common.strides import order_of
from aiotorchio.common.torch_private import real_tensors
from aiotorchio.engine.claims import Claim, busy, has_neighbours, memory_at
from aiotorchio.engine.fit import ObjectFit
from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.module_commit import WithModules
from aiotorchio.engine.selection import Into, Selection
from aiotorchio.engine.ties import Ties, differ
from aiotorchio.errors import InvalidObjectError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.devices import DeviceMap
from aiotorchio.graph.modules import has_memory, other_views
from aiotorchio.graph.rebuild import build_tensor
from aiotorchio.graph.targets import Match, match
from aiotorchio.memory.atomic import BackMemory, BufferSwap, Exchange
from aiotorchio.memory.byteorder import swap_bytes
from aiotorchio.memory.device_copy import Copier, DeviceCopier
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.memory.routes import (
    Comparison,
    Route,
    copy_elements,
    memory_of,
    moved,
    placement_of,
    same_elements,
)
from aiotorchio.table.names import rows_by_name
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import META_LOCATION, MIXED_UNITS, Header
from aiotorchio.wire.layout import Layout

__all__ = ["Placement"]

_CPU = torch.device("cpu")
# How much longer the way over the elements of a tensor may be than the elements themselves. Each
# chunk on it costs microseconds, which a sender would let the receiver pay a million times.
_SPREAD_MAX = 16


@dataclass(slots=True)
class _Rows:
    """What becomes of the rows of one storage."""

    into: list[int] = field(default_factory=list)
    owned: bool = False
    left_out: bool = False


class Placement:
    """Where each storage of a message goes, and each tensor that has a place already.

    Args:
        header: Valid.
        layout: Of the header.
        options: What the caller wants.
        into: Tensors to receive into.
        named_only: Drop what has no name, and storages that no tensor shows.
        copier: For storages on a device; the default fits the device.
        incoming: In place of the default memory, for tests.

    Attributes:
        wanted: Which names count.
        composites: Tensors of several rows that have names.
        by_name: The destinations that the message has something for, by name.
        given: Rows whose tensor is there already: a destination, or one without bytes.
        commit: What changes the destinations, when all is received; None if nothing waits for it.
    """

    selection: Selection
    composites: Composites
    by_name: dict[str, torch.Tensor]
    prebuilt: dict[int, torch.Tensor]
    _number_of: dict[str, int]
    _found_at: dict[str, tuple[Any, ...]]
    _ties: Ties
    _storages: list[_Rows]
    _places: list[torch.device | None]

    def __init__(
        self,
        header: Header,
        layout: Layout,
        options: IterateOptions,
        into: Into | None = None,
        *,
        named_only: bool = False,
        copier: Copier | None = None,
        incoming: Callable[..., IncomingPayload] = IncomingPayload,
    ) -> None:
        self._header = header
        self._layout = layout
        self._options = options
        self._into = into
        self._named_only = named_only
        # In the caller's thread: "cuda" is the device that is current there, as is a stream.
        self._data_free = options.data_free
        fake = options.data_free is not None and options.data_free.fake_mode is not None
        self._devices = DeviceMap(header, options.map_location, fake=fake)
        self._copier = copier or DeviceCopier()
        self._incoming = incoming
        self._foreign_byteorder = header.byteorder != sys.byteorder
        # Row, destination, where that was, and the error if it is compared, not copied.
        self._deferred: list[tuple[int, torch.Tensor, object, Callable[[], Exception] | None]] = []
        self._number_of, self._storages, self._places = {}, [], []
        self.composites = Composites.none()
        self.commit: Exchange | BufferSwap | WithModules | None = None
        self._fit: ObjectFit | None = None
        self._claims: list[BackMemory | Claim] = []

    @property
    def steps(self) -> int:
        """How much there is to decide: rows, names and destinations, and comparisons of names."""
        header, names = self._header, 0
        rows = max(len(header.tensors), len(header.storages))
        select, into = self._options.select, self._into
        if select is not None or into is not None:
            names = sum(len(row.names) for row in header.tensors)
            names += len(into.tensors) if into else 0
        patterns = len(select) if isinstance(select, tuple) else 1
        return max(rows, names * patterns)

    @property
    def tables(self) -> list[list[Any] | dict[Any, Any]]:
        """What is as long as the tables of the header, as far as it was decided."""
        return [self._number_of, self._storages, self._places, *self.composites.tables]

    @property
    def finish_nbytes(self) -> int:
        """Bytes to be swapped, or copied to destinations, when all have arrived."""
        swapped = self._layout.total if self._foreign_byteorder else 0
        copied = sum(
            destination.numel() * destination.element_size()
            for _, destination, _, _ in self._deferred
        )
        return swapped + copied

    @property
    def by_name_only(self) -> bool:
        """Whether names of the header matter."""
        return self._named_only or self._into is not None or not self.selection.all

    def decide(self, composites: Composites | None = None) -> None:
        """Compare the message with what the caller has and wants; comes first.

        Args:
            composites: Tensors of several rows that have names; those wanted are chosen.

        Raises:
            InvalidObjectError: A location or a byte order that can't be had here.
            MismatchError: The message does not fit ``into`` or ``select``.
            RuntimeError: Another load is using the ``DoubleBuffer``, or receiving into a tensor.
        """
        rows = self._header.tensors
        if self._foreign_byteorder and any(
            row.unit == MIXED_UNITS for row in self._header.storages
        ):
            raise InvalidObjectError(
                f"a storage of numbers of several sizes can't be read on a "
                f"{sys.byteorder}-endian machine",
                entry="header",
            )
        select, into = self._options.select, self._into
        if select is None and into is None and not self._named_only:
            self._number_of = {}
        else:
            self._number_of = rows_by_name(rows)
        self.composites = composites or Composites.none()
        names = [*self._number_of, *(into.names if into else ()), *self.composites.names]
        self.selection = Selection(select, names, self.composites.refused)
        # A load makes all of them, and leaves out of the object what is not wanted.
        others = interruptible(self.composites.names) if self._named_only else ()
        self.composites.choose([name for name in others if name in self.selection])
        if into is not None and not self.selection.all:
            self.selection.add(into.parts(self._number_of, self.selection))
        matched = Match({}, [], {}, set())
        if into is not None:
            matched = match(
                self._header,
                into.tensors,
                into.modules,
                selection=self.selection,
                all_selected=self.selection.all,
                strict=into.strict,
                cast=into.cast,
            )
        self.by_name = matched.tensors
        self._ties = Ties(self._header, self._layout, matched.ties, self._number_of)
        if into is not None:
            self._fit = ObjectFit(
                self._header, into, self.selection, self._number_of, matched.filled
            )
        self.prebuilt = {}
        self._found_at = {name: placement_of(tensor) for name, tensor in self.by_name.items()}
        for name, tensor in self.by_name.items():
            self.prebuilt.setdefault(self._number_of[name], tensor)
        every = [_Rows(owned=True)] * len(self._header.storages)
        self._storages = self._all_rows() if self.by_name_only else every
        self._places = [self._place(index) for index in interruptible(range(len(self._storages)))]
        if matched.ties:
            self._ties.choose({n for n, place in enumerate(self._places) if place is not None})
        if into is not None:
            self._claim(into, matched)

    def _claim(self, into: Into, matched: Match) -> None:
        """Keep other loads away from the destinations until ``close``."""
        places = self._found_at
        if into.back is not None:
            into.back.claim()
            self._claims.append(into.back)
            # Whole storages are swapped.
            claim = Claim.of_storages(places)
        else:
            claim = Claim(matched.extents, lambda name: memory_at(places[name]))
        self._claims.append(claim)
        claim.make()
        # Before the claim, the swap of another load may have moved tensors to other memory.
        spans = (span for extents in matched.extents.values() for span in extents)
        for start, _, name in interruptible(spans):
            address, _, offset, _, dtype = places[name][:5]
            if not (start == address + offset * dtype.itemsize == self.by_name[name].data_ptr()):
                raise busy(name)

    @property
    def has_neighbours(self) -> bool:
        """Whether destinations may share memory, with each other or with those of another load.

        To find out exactly can take long.
        """
        if self._into is None:
            return False
        tensors = self._into.tensors.items()
        return has_neighbours({name: each for name, each in tensors if has_memory(each)})

    def _all_rows(self) -> list[_Rows]:
        storages = [_Rows(left_out=self._named_only) for _ in interruptible(self._header.storages)]
        for index, row in interruptible(enumerate(self._header.tensors)):
            storage = storages[row.storage]
            if index in self.prebuilt:
                storage.into.append(index)
            elif (row.names or self._named_only) and not any(
                name in self.selection for name in row.names
            ):
                storage.left_out = True
                if not self._named_only:
                    self.prebuilt[index] = self._on_meta(index)
            else:
                storage.owned = True
        for number in interruptible(self.composites.storages):
            storages[number].owned = True
        return storages

    def close(self) -> None:
        """The end of the message, with or without a commit."""
        while self._claims:
            self._claims.pop().release()

    def _place(self, index: int) -> torch.device | None:
        """Where a storage goes; None: it is not made."""
        rows = self._storages[index]
        if not rows.owned and (rows.into or rows.left_out):
            routed = not rows.into or self._can_be_routed(index, rows)
            return None if routed else _CPU
        device = self._devices.device(index)
        if self._data_free is not None:
            return torch.device(META_LOCATION)
        # What destinations are copied from must be there.
        return _CPU if rows.into and device.type == META_LOCATION else device

    def _can_be_routed(self, index: int, rows: _Rows) -> bool:
        """Whether bytes can go to the destinations while they arrive, in the order of the wire."""
        tensors = [self._header.tensors[row] for row in rows.into]
        orders = [order_of(row.shape, row.stride) for row in tensors]
        spans = sum(
            order.extent * DTYPES[row.dtype].itemsize
            for order, row in zip(orders, tensors, strict=True)
        )
        # Few elements over a long way would be looked for in many chunks, and so would many tensors
        # over the same way.
        return (
            not self._foreign_byteorder
            and index not in self._ties.mixed
            and spans <= _SPREAD_MAX * self._header.storages[index].nbytes
            and all(o.distinct and o.extent <= _SPREAD_MAX * o.count for o in orders)
        )

    def payload(self) -> IncomingPayload:
        """Memory for what is to be made, of which nothing is made yet; sets ``commit``."""
        filled = self._destinations()
        names_of_row: dict[int, list[str]] = {}
        for name in filled:
            names_of_row.setdefault(self._number_of[name], []).append(name)
        routes: list[Route] = []
        for index, rows in interruptible(enumerate(self._storages if filled else ())):
            start = self._layout.offsets[index]
            for row, name in ((n, name) for n in rows.into for name in names_of_row[n]):
                tensor, error = filled[name], self._error_if_other(name, filled)
                if self._places[index] is not None:
                    self._deferred.append((row, tensor, placement_of(tensor), error))
                elif tensor.numel() and error is None:
                    routes.append(Route(start, self._on_meta(row), tensor))
                elif tensor.numel() and error is not None:
                    routes.append(Comparison(start, self._on_meta(row), tensor, error))
        # What is compared, with what was copied.
        self._deferred.sort(key=lambda late: late[-1] is not None)
        return self._incoming(
            self._layout.offsets,
            self._layout.nbytes,
            [row.nbytes for row in self._header.storages],
            self._places,
            self._layout.chunk_size,
            routes,
            copier=self._copier,
        )

    def _destinations(self) -> dict[str, torch.Tensor]:
        """What is received into: the destinations by name, or what waits for them."""
        if self._into is None:
            return {}
        tensors = list(self.by_name.values())
        if [placement_of(tensor) for tensor in tensors] != list(self._found_at.values()):
            raise moved()
        if self._into.back is not None:
            everything = [each for each in self._into.tensors.values() if has_memory(each)]
            everything += other_views(everything, self._into.modules)
            self.commit = self._into.back.swap(everything, tensors, self._copier)
        elif self._into.staged:
            self.commit = Exchange(tensors, self._copier)
        filled = tensors if self.commit is None else self.commit.shadows
        return dict(zip(self.by_name, filled, strict=True))

    def _error_if_other(
        self, name: str, filled: dict[str, torch.Tensor]
    ) -> Callable[[], Exception] | None:
        """For a tensor that is compared with another one, and not copied: the error."""
        copied = self._ties.compared_with(name)
        if copied is None or memory_of(filled[copied]) != memory_of(filled[name]):
            return None
        return partial(differ, name, copied, staged=self.commit is not None)

    @property
    def rehearses(self) -> bool:
        """Whether the object decides what fits, not only the header."""
        return self._fit is not None and self._data_free is None and self._fit.rehearses

    def note_skeleton(self, skeleton: bytes) -> None:
        """See what may be in the object that has no row; see ``ObjectFit``."""
        if self._fit is not None:
            self._fit.note_skeleton(skeleton)

    def rehearse(self, obj: Any) -> None:
        """Compare the object with the destination before the first byte; see ``ObjectFit``."""
        if self._fit is not None:
            self._fit.rehearse(obj)

    def look(self, obj: Any) -> None:
        """Compare an object without tensors with the destination; see ``ObjectFit``."""
        if self._fit is not None:
            self._fit.look(obj)

    def check(self, obj: Any) -> None:
        """Compare what was built with the destination; see ``ObjectFit``."""
        if self._fit is not None:
            self._fit.check(obj, kept=self.commit is not None)

    def complete(self, obj: Any) -> None:
        """Let the commit give modules what else the object has for them."""
        if self._fit is not None and not isinstance(self.commit, WithModules):
            self.commit = self._fit.loads(self.commit, obj)

    def _on_meta(self, index: int) -> torch.Tensor:
        row = self._header.tensors[index]
        nbytes = self._header.storages[row.storage].nbytes
        return build_tensor(row, index, torch.UntypedStorage(nbytes, device=META_LOCATION))

    def put_in_order(self, storages: Sequence[torch.UntypedStorage | None]) -> None:
        """Put storages into the byte order of this machine."""
        if self._foreign_byteorder:
            for index, storage in interruptible(enumerate(storages)):
                self.put_one_in_order(index, storage)

    def put_one_in_order(self, index: int, storage: torch.UntypedStorage | None) -> None:
        """Put one storage into the byte order of this machine."""
        if self._foreign_byteorder and storage is not None and storage.device.type != META_LOCATION:
            swap_bytes(storage, self._header.storages[index].unit)

    def copy_deferred(self, storages: Sequence[torch.UntypedStorage | None]) -> None:
        """Copy what could not go to its destination while it arrived."""
        for index, destination, place, error in self._deferred:
            check_interrupt()
            if placement_of(destination) != place:
                raise moved()
            row = self._header.tensors[index]
            storage = storages[row.storage]
            if storage is None:
                raise AssertionError("a destination without a source")
            source = build_tensor(row, index, storage)
            with torch.no_grad():
                if error is None:
                    copy_elements(destination, source, self._copier)
                elif not same_elements(destination, source, self._copier):
                    raise error()

    @property
    def relocates(self) -> bool:
        """Whether storages do not stay where they were received."""
        return self._data_free is not None or self._devices.relocates

    def relocated(
        self, index: int, storage: torch.UntypedStorage | None
    ) -> torch.UntypedStorage | None:
        """A storage where ``map_location`` or a restorer of the caller's puts it."""
        if storage is None or (self._storages[index].into and not self._storages[index].owned):
            return storage
        if self._data_free is not None:
            device = self._devices.device(index)
            if device.type != META_LOCATION:
                storage = self._data_free.storage(storage.nbytes(), device)
        return self._devices.relocate(index, storage)

    def building(self) -> AbstractContextManager[Any]:
        """To be held while tensors are made over the relocated storages."""
        # Another task of this thread may be in a FakeTensorMode.
        return real_tensors() if self._data_free is None else self._data_free.building()

    def unreliable(
        self, storages: Iterable[torch.UntypedStorage | None]
    ) -> Iterable[torch.UntypedStorage | None]:
        """Those of the storages of the object whose numbers nothing may rely on."""
        writes_nothing = self._data_free is not None and self._data_free.fake_mode is None
        if writes_nothing:
            return storages
        return [tensor.untyped_storage() for tensor in self.by_name.values()]

    @property
    def revises(self) -> bool:
        """Whether the object needs more than the right tensor in the place of each row."""
        # In a pickle, a tensor can be made of that of its row: with attributes, for example.
        whole = self._fit is not None and bool(self._fit.whole)
        pickled = (bool(self.by_name) or whole) and self._header.codec == "pickle"
        return pickled or not self.selection.all or len(self.by_name) > len(self.prebuilt)

    @property
    def names(self) -> Collection[str]:
        """Those of the message."""
        names: Collection[str] = self._number_of.keys()
        if self._fit is not None:
            names = self._fit.names_with(names)
        others = self.composites.names.keys()
        return {*names, *others} if others else names

    def revision(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """What the caller has asked for in the place of a tensor of the object."""
        destination = None if self._fit is None else self._fit.take(name, tensor)
        if destination is not None:
            return destination
        return self.by_name.get(name, tensor) if name in self.selection else None
