"""Memory and routes for the payload, and the steps that follow its last byte.

In: the ``Match`` and the ``Placement`` of a message. Out: an ``IncomingPayload``, which takes the
chunks, and a ``Finish``, whose steps follow in this order: byte order, deferred copies, relocation,
the object, the commit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.common.torch_private import real_tensors
from aiotorchio.engine.duplicates import differ
from aiotorchio.engine.matching import LoadContext, Match
from aiotorchio.engine.module_commit import WithModules
from aiotorchio.engine.placement import Placement, on_meta
from aiotorchio.graph.modules import has_memory, other_views
from aiotorchio.graph.rebuild import build_tensor
from aiotorchio.graph.select import revise
from aiotorchio.memory.atomic import BufferSwap, Exchange, note_change
from aiotorchio.memory.byteorder import swap_bytes
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.memory.memory_state import MemoryState, has_state, memory_state, moved, tie_key
from aiotorchio.memory.routes import Comparison, Route, copy_elements, same_elements
from aiotorchio.wire.header import META_LOCATION

__all__ = ["DeferredCopy", "Finish", "prepare"]


class DeferredCopy(NamedTuple):
    """A copy into a target after its whole storage has arrived.

    Attributes:
        row: The tensor of the message.
        target: The tensor that it is copied to.
        memory_state: The ``memory_state`` of the target, which must not change.
        error: Makes the error for different numbers, if the two are compared; None: a copy.
    """

    row: int
    target: torch.Tensor
    memory_state: MemoryState
    error: Callable[[], Exception] | None


@dataclass(frozen=True, slots=True)
class Finish:
    """The steps between the last byte of a payload and the object.

    Attributes:
        context: The context of the load.
        match: The names that count, and the targets.
        placement: The place of each storage.
        deferred: Copies, with comparisons at the end.
        change: The change of the targets, if they are staged; otherwise None.
    """

    context: LoadContext
    match: Match
    placement: Placement
    deferred: list[DeferredCopy]
    change: Exchange | BufferSwap | None

    @property
    def nbytes(self) -> int:
        """Bytes to convert from a foreign byte order, and bytes of deferred copies."""
        swapped = self.context.layout.total if self.context.foreign_byteorder else 0
        return swapped + sum(
            each.target.numel() * each.target.element_size() for each in self.deferred
        )

    def note_change(self) -> None:
        """Tell autograd that targets change while bytes arrive."""
        if self.change is None:
            note_change(self.match.targets.values())

    def put_in_order(self, storages: Sequence[torch.UntypedStorage | None]) -> None:
        """Put storages into the byte order of this machine."""
        if self.context.foreign_byteorder:
            for index, storage in interruptible(enumerate(storages)):
                self.put_one_in_order(index, storage)

    def put_one_in_order(self, index: int, storage: torch.UntypedStorage | None) -> None:
        """Put one storage into the byte order of this machine."""
        if not self.context.foreign_byteorder or storage is None:
            return
        if storage.device.type != META_LOCATION:
            swap_bytes(storage, self.context.header.storages[index].unit)

    def copy_deferred(self, storages: Sequence[torch.UntypedStorage | None]) -> None:
        """Make the deferred copies.

        Raises:
            MismatchError: A target was resized or moved meanwhile, or tied tensors differ.
        """
        rows, copier = self.context.header.tensors, self.context.copier
        for index, target, expected, error in self.deferred:
            check_interrupt()
            if not has_state(target, expected):
                raise moved()
            row = rows[index]
            storage = storages[row.storage]
            if storage is None:
                raise AssertionError("a deferred copy without its storage")
            source = build_tensor(row, index, storage)
            with torch.no_grad():
                if error is None:
                    copy_elements(target, source, copier)
                elif not same_elements(target, source, copier):
                    raise error()

    @property
    def relocates(self) -> bool:
        """Whether any storage moves after it was received."""
        return self.context.options.data_free is not None or self.context.devices.relocates

    def relocated(
        self, index: int, storage: torch.UntypedStorage | None
    ) -> torch.UntypedStorage | None:
        """Move a storage to where ``map_location``, or a restorer of the caller, puts it."""
        if storage is None:
            # Also the storage of tensors that need none, which has no row.
            return None
        rows = self.placement.storages[index]
        if rows.targeted and not rows.has_new_memory:
            return storage
        devices, data_free = self.context.devices, self.context.options.data_free
        if data_free is not None:
            device = devices.device(index)
            if device.type != META_LOCATION:
                storage = data_free.storage(storage.nbytes(), device)
        return devices.relocate(index, storage)

    def building(self) -> AbstractContextManager[Any]:
        """Make a context in which tensors over the relocated storages are built."""
        # Another task of this thread may be in a FakeTensorMode.
        data_free = self.context.options.data_free
        return real_tensors() if data_free is None else data_free.building()

    def unreliable(
        self, storages: Iterable[torch.UntypedStorage | None]
    ) -> Iterable[torch.UntypedStorage | None]:
        """Return the storages of the object whose numbers no check may rely on."""
        data_free = self.context.options.data_free
        if data_free is not None and data_free.fake_mode is None:
            return storages
        return [tensor.untyped_storage() for tensor in self.match.targets.values()]

    def revised(self, obj: Any) -> Any:
        """Put targets into the object, and leave out tensors that are not selected.

        Raises:
            MismatchError: The object does not fit the targets.
        """
        fit = self.match.fit
        if fit is not None:
            fit.check_built(obj, unchanged=self.change is not None)
        return revise(obj, self._names(), self._revision) if self._revises() else obj

    def _revises(self) -> bool:
        """Whether the object needs more than the right tensor in the place of each row."""
        match = self.match
        # In a pickle, a tensor can be made of the tensor of its row: with attributes, for example.
        composites = match.fit is not None and bool(match.fit.composite_targets)
        pickled = (bool(match.targets) or composites) and self.context.header.codec == "pickle"
        more = len(match.targets) > len(self.placement.prebuilt)
        return pickled or not match.selection.all or more

    def _names(self) -> Collection[str]:
        names: Collection[str] = self.match.row_of_name.keys()
        if self.match.fit is not None:
            names = self.match.fit.names_with(names)
        composites = self.match.composites.names.keys()
        return {*names, *composites} if composites else names

    def _revision(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor that replaces one of the object; None: it is left out."""
        match = self.match
        target = None if match.fit is None else match.fit.receive(name, tensor)
        if target is not None:
            return target
        return tensor if name in match.selection else None

    def commit(self, obj: Any) -> Exchange | BufferSwap | WithModules | None:
        """Make the commit: the change of the targets, and the rest that modules load.

        Raises:
            MismatchError: The object does not fit the modules.
        """
        fit = self.match.fit
        return self.change if fit is None else fit.make_commit(self.change, obj)


def prepare(
    context: LoadContext, match: Match, placement: Placement
) -> tuple[IncomingPayload, Finish]:
    """Make the memory of a payload, which is allocated as bytes arrive, and its routes.

    Raises:
        MismatchError: A target was resized or moved since it was compared.
    """
    change = _change(context, match)
    receivers = match.targets
    if change is not None:
        receivers = dict(zip(match.targets, change.shadows, strict=True))
    routes, deferred = _routes(context, match, placement, receivers, staged=change is not None)
    payload = IncomingPayload(
        context.layout.offsets,
        context.layout.nbytes,
        [row.nbytes for row in context.header.storages],
        placement.devices,
        context.layout.chunk_size,
        routes,
        copier=context.copier,
    )
    return payload, Finish(context, match, placement, deferred, change)


def _change(context: LoadContext, match: Match) -> Exchange | BufferSwap | None:
    """Make the change of staged targets; None if there are none."""
    targets = context.targets
    if targets is None:
        return None
    tensors = list(match.targets.values())
    if not all(map(has_state, tensors, match.memory_states.values())):
        raise moved()
    if targets.back is not None:
        everything = [each for each in targets.tensors.values() if has_memory(each)]
        everything += other_views(everything, targets.modules)
        return targets.back.swap(everything, tensors, context.copier)
    return Exchange(tensors, context.copier) if targets.staged else None


def _routes(
    context: LoadContext,
    match: Match,
    placement: Placement,
    receivers: dict[str, torch.Tensor],
    *,
    staged: bool,
) -> tuple[list[Route], list[DeferredCopy]]:
    """Divide the targets by when they are filled: while bytes arrive, or afterwards.

    Args:
        context: The context of the load.
        match: The targets.
        placement: Whether each storage is made.
        receivers: The targets, or their shadows, by name.
        staged: Whether ``receivers`` has shadows.
    """
    header, compared_with = context.header, placement.compared_with
    routes: list[Route] = []
    deferred: list[DeferredCopy] = []
    names_of_row: dict[int, list[str]] = {}
    for name in receivers:
        names_of_row.setdefault(match.row_of_name[name], []).append(name)
    for index, rows in interruptible(enumerate(placement.storages if receivers else ())):
        start = context.layout.offsets[index]
        is_made = placement.devices[index] is not None
        for row, name in ((n, name) for n in rows.targeted for name in names_of_row[n]):
            tensor, error = receivers[name], None
            copied = compared_with.get(name)
            if copied is not None and tie_key(receivers[copied]) == tie_key(tensor):
                error = partial(differ, name, copied, staged=staged)
            if is_made:
                deferred.append(DeferredCopy(row, tensor, memory_state(tensor), error))
            elif tensor.numel() and error is None:
                routes.append(Route(start, on_meta(header, row), tensor))
            elif tensor.numel() and error is not None:
                routes.append(Comparison(start, on_meta(header, row), tensor, error))
    # The copies come first, since comparisons compare with their results.
    deferred.sort(key=lambda each: each.error is not None)
    return routes, deferred
