"""Which tensors of a message count, and which of them have a target.

In: a ``LoadContext``, which is made in the caller's thread once the header has arrived. Out: a
``Match``, from which ``placement.place`` goes on. No byte of the payload was received yet, so a
``MismatchError`` leaves the message as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.common.gc_pause import release
from aiotorchio.common.interrupt import interruptible
from aiotorchio.engine.claims import has_neighbours
from aiotorchio.engine.duplicates import Duplicates
from aiotorchio.engine.fit import ObjectFit
from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.selection import Selection, Targets
from aiotorchio.errors import InvalidObjectError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.devices import DeviceMap
from aiotorchio.graph.modules import has_memory
from aiotorchio.graph.targets import MatchedTargets, match_targets
from aiotorchio.memory.device_copy import Copier, DeviceCopier
from aiotorchio.memory.memory_state import MemoryState, memory_state
from aiotorchio.overlap.extents import Extents
from aiotorchio.table.names import rows_by_name
from aiotorchio.wire.header import MIXED_UNITS, Header
from aiotorchio.wire.layout import Layout

__all__ = ["LoadContext", "Match", "match_names"]


@dataclass(frozen=True, slots=True)
class LoadContext:
    """The header of one message, and the options of the call that receives its tensors.

    Attributes:
        header: Valid.
        layout: Of the payload.
        options: Of the call.
        targets: The targets of the load; None: every tensor gets new memory.
        named_only: Drop tensors without a name, and storages that no tensor shows.
        devices: The device of each storage.
        copier: Moves bytes between a device and the host.
        foreign_byteorder: Whether the numbers of the message have the other byte order.
    """

    header: Header
    layout: Layout
    options: IterateOptions
    targets: Targets | None
    named_only: bool
    devices: DeviceMap
    copier: Copier
    foreign_byteorder: bool

    @classmethod
    def of(
        cls,
        header: Header,
        layout: Layout,
        options: IterateOptions,
        targets: Targets | None = None,
        *,
        named_only: bool = False,
    ) -> LoadContext:
        """Look up devices and streams in the caller's thread, where the current ones count.

        Raises:
            TypeError: ``map_location`` has another type.
            LimitExceeded: The header has more locations than any machine.
        """
        fake = options.data_free is not None and options.data_free.fake_mode is not None
        devices = DeviceMap(header, options.map_location, fake=fake)
        foreign = header.byteorder != sys.byteorder
        return cls(header, layout, options, targets, named_only, devices, DeviceCopier(), foreign)

    @property
    def steps(self) -> int:
        """Rows, names, targets, and comparisons of names: the length of the work to come."""
        header, names = self.header, 0
        rows = max(len(header.tensors), len(header.storages))
        select, targets = self.options.select, self.targets
        if select is not None or targets is not None:
            names = sum(len(row.names) for row in header.tensors)
            names += len(targets.tensors) if targets else 0
        patterns = len(select) if isinstance(select, tuple) else 1
        return max(rows, names * patterns)

    @property
    def has_neighbours(self) -> bool:
        """Whether targets may share memory, with each other or with those of another load.

        An exact answer can take long.
        """
        if self.targets is None:
            return False
        tensors = self.targets.tensors.items()
        return has_neighbours({name: each for name, each in tensors if has_memory(each)})


@dataclass(frozen=True, slots=True)
class Match:
    """The names of a message, compared with the selection and with the targets.

    Attributes:
        uses_names: Whether names matter; if not, ``row_of_name`` is empty.
        row_of_name: The row of each name.
        selection: The names that count.
        composites: Tensors of several rows that have names.
        targets: By name, those that have a tensor in the message.
        memory_states: The ``memory_state`` of each target, when it was compared.
        extents: The memory of the targets, by device.
        duplicates: Several tensors of the message for one target.
        fit: Compares the object with the targets; None without targets.
    """

    uses_names: bool
    row_of_name: dict[str, int]
    selection: Selection
    composites: Composites
    targets: dict[str, torch.Tensor]
    memory_states: dict[str, MemoryState]
    extents: Mapping[torch.device, Extents[str]]
    duplicates: Duplicates
    fit: ObjectFit | None

    @property
    def tables(self) -> list[list[Any] | dict[Any, Any]]:
        """Tables that may be as long as those of the header."""
        compared = [] if self.fit is None else self.fit.tables
        return [self.row_of_name, *self.composites.tables, *compared]


def match_names(context: LoadContext, composites: Composites | None = None) -> Match:
    """Compare the names of a message with the selection and the targets.

    Args:
        context: Of the load.
        composites: Tensors of several rows that have names; the selected ones are chosen.

    Raises:
        InvalidObjectError: A storage has numbers of several sizes in foreign byte order.
        MismatchError: The message does not fit ``into`` or ``select``.
    """
    _check_byteorder(context)
    row_of_name: dict[str, int] = {}
    if context.options.select is not None or context.targets is not None or context.named_only:
        row_of_name = rows_by_name(context.header.tensors)
    composites = composites or Composites.none()
    try:
        return _match(context, row_of_name, composites)
    except Exception:
        # The caller's thread may be an event loop, and the error would free them there.
        release(row_of_name, *composites.tables)
        raise


def _check_byteorder(context: LoadContext) -> None:
    if context.foreign_byteorder and any(
        row.unit == MIXED_UNITS for row in context.header.storages
    ):
        raise InvalidObjectError(
            f"a storage has numbers of several sizes in {context.header.byteorder}-endian byte "
            f"order, which cannot be converted for this {sys.byteorder}-endian machine",
            entry="header",
        )


def _match(context: LoadContext, row_of_name: dict[str, int], composites: Composites) -> Match:
    header, targets = context.header, context.targets
    names = [*row_of_name, *(targets.names if targets else ()), *composites.names]
    selection = Selection(context.options.select, names, composites.unknown_reason)
    composites.choose([name for name in interruptible(composites.names) if name in selection])
    if targets is not None and not selection.all:
        selection.add(targets.parts([*row_of_name, *composites.names], selection))
    found = MatchedTargets({}, [], {}, set())
    fit = None
    if targets is not None:
        found = match_targets(
            header,
            targets.tensors,
            targets.modules,
            composites=composites.names,
            selection=selection,
            all_selected=selection.all,
            strict=targets.strict,
            cast=targets.cast,
        )
        fit = ObjectFit(header, targets, selection, row_of_name, found)
    return Match(
        uses_names=context.named_only or targets is not None or not selection.all,
        row_of_name=row_of_name,
        selection=selection,
        composites=composites,
        targets=found.tensors,
        memory_states={name: memory_state(tensor) for name, tensor in found.tensors.items()},
        extents=found.extents,
        duplicates=Duplicates(header, context.layout, found.duplicates, row_of_name),
        fit=fit,
    )
