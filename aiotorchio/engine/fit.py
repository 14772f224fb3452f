"""The comparison of an object with its targets, as far as the header does not decide it.

In: the object of a message, twice if possible: over tensors on ``meta``, before the first byte of
the payload, and as it was built. Out: a ``MismatchError``, or the commit, with the parts that
modules and composite targets load. ``matching`` decides the rest from the header.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from aiotorchio.codecs.pickled.codec import STORAGE
from aiotorchio.common.interrupt import interruptible
from aiotorchio.engine.module_commit import WithModules, with_modules
from aiotorchio.engine.selection import Selection, Targets
from aiotorchio.errors import MismatchError
from aiotorchio.graph.module_rules import ModuleRules
from aiotorchio.graph.strays import (
    does_not_fit,
    named_tensors,
    refuse_untargeted,
    refused_extra_states,
)
from aiotorchio.graph.targets import MatchedTargets
from aiotorchio.graph.tensor_load import TensorLoad, composite_misfit, is_composite_target
from aiotorchio.memory.atomic import BufferSwap, Exchange
from aiotorchio.wire.header import Header, shortened

__all__ = ["ObjectFit"]


class ObjectFit:
    """The targets that are received as a part of the object.

    Args:
        header: Of the message.
        targets: The targets.
        selection: The names that count.
        row_of_name: The row of each name of the header.
        found: The targets of rows.

    Attributes:
        composite_targets: Targets that are copied from a whole tensor of the object, by name.
        compares_object: Whether the object must be compared, too, and not only the header.
    """

    def __init__(
        self,
        header: Header,
        targets: Targets,
        selection: Selection,
        row_of_name: Mapping[str, int],
        found: MatchedTargets,
    ) -> None:
        self._targets, self._selection = targets, selection
        self._row_of_name, self._filled_by_others = row_of_name, found.filled_by_others
        self._row_targets = found.tensors
        self._pickled = header.codec == "pickle"
        self.composite_targets: dict[str, torch.Tensor] = {}
        # Targets without a row that receive bytes only.
        self._rowless: dict[str, torch.Tensor] = {}
        for name, tensor in interruptible(targets.tensors.items()) if self._pickled else ():
            if name in selection and name not in row_of_name:
                composite = is_composite_target(tensor)
                (self.composite_targets if composite else self._rowless)[name] = tensor
        # Tensors of the object for ``composite_targets``, and for the others.
        self._received: dict[str, torch.Tensor] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self.compares_object = bool(self.composite_targets) or any(
            module.other_entries for module in targets.modules
        )
        self._checked_on_meta = False

    @property
    def tables(self) -> list[dict[Any, Any]]:
        """Tables that may have an entry for each tensor of the object."""
        return [self._received, self._replaced]

    def note_skeleton(self, skeleton: bytes, may_have_composites: bool) -> None:
        """Note whether the object can have tensors, or storages, without a row."""
        if self._pickled and not self.compares_object:
            if self._targets.strict and self._selection.all:
                self.compares_object = may_have_composites or STORAGE.encode() in skeleton
            elif not self._targets.strict:
                self.compares_object = may_have_composites and bool(self._rowless)

    def check_on_meta(self, obj: Any) -> None:
        """Compare the object before the first byte.

        Args:
            obj: Over tensors on ``meta``.

        Raises:
            MismatchError: The object does not fit the targets.
        """
        self.refuse_extra_state(obj)
        named = self._check(obj, unchanged=True)
        received = {
            name: tensor for name, tensor in named.items() if name in self.composite_targets
        }
        # The commit is made for its MismatchError only, and is not used.
        self._make_commit(None, obj, received, unchanged=True, on_meta=True)
        self._checked_on_meta = True

    def refuse_extra_state(self, obj: Any, *, unchanged: bool = True) -> None:
        """Refuse extra state that no module loads.

        Args:
            obj: With anything in the place of its tensors.
            unchanged: Whether the targets are unchanged.

        Raises:
            MismatchError: The object has such extra state.
        """
        if not self._targets.strict:
            return
        found = refused_extra_states(self._targets.modules, obj)
        unexpected = [name for name in found if name in self._selection]
        if unexpected:
            raise does_not_fit(unexpected, unchanged=unchanged)

    def check_built(self, obj: Any, *, unchanged: bool) -> None:
        """Compare the object that was built, if ``check_on_meta`` has not done that.

        Args:
            obj: With its own tensors, before targets replace them.
            unchanged: Whether the targets are unchanged.

        Raises:
            MismatchError: The object has tensors without a target, or that do not fit theirs.
        """
        if self._checked_on_meta:
            return
        if self.compares_object:
            self._check(obj, unchanged=unchanged)
        if self._pickled:
            self.refuse_extra_state(obj, unchanged=unchanged)

    def _check(self, obj: Any, *, unchanged: bool) -> Mapping[str, torch.Tensor]:
        if not self._pickled:
            # The header knows all tensors, under their names.
            return {}
        named = named_tensors(obj)
        misfits = {
            name: composite_misfit(named[name], target)
            for name, target in interruptible(self._rowless.items())
            if name in named
        }
        if misfits:
            raise does_not_fit((), misfits=misfits, unchanged=unchanged)
        if self._targets.strict and self._selection.all:
            rules = ModuleRules(self._targets.modules)
            refuse_untargeted(
                obj, named, lambda name: self._has_target(name, rules), unchanged=unchanged
            )
        return named

    def _has_target(self, name: str, rules: ModuleRules) -> bool:
        return name in self._row_of_name or name in self.composite_targets or rules.may_load(name)

    def receive(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Note a tensor of the object, which the commit copies into its target if composite.

        Returns:
            The target that replaces the tensor in the object; None if it has none.

        Raises:
            MismatchError: Another tensor of the object has the same name.
        """
        target = self.composite_targets.get(name)
        received = self._replaced if target is None else self._received
        target = self._row_targets.get(name) if target is None else target
        if target is None or not self._pickled:
            return target
        if received.setdefault(name, tensor) is not tensor:
            raise MismatchError(
                "two tensors of the object have this name, and one target: load without into, or "
                "give them different names",
                entry=shortened(name),
            )
        return target

    def names_with(self, names: Collection[str]) -> Collection[str]:
        """Add the names of ``composite_targets`` to these names."""
        return {*names, *self.composite_targets} if self.composite_targets else names

    def make_commit(
        self, change: Exchange | BufferSwap | None, obj: Any
    ) -> Exchange | BufferSwap | WithModules | None:
        """Make the commit of the message.

        Args:
            change: The change of the tensors, if they are staged.
            obj: The object that was received.

        Raises:
            MismatchError: The object does not fit.
        """
        return self._make_commit(change, obj, self._received, unchanged=change is not None)

    def _make_commit(
        self,
        change: Exchange | BufferSwap | None,
        obj: Any,
        received: Mapping[str, torch.Tensor],
        *,
        unchanged: bool,
        on_meta: bool = False,
    ) -> Exchange | BufferSwap | WithModules | None:
        strict = self._targets.strict
        composite_load = TensorLoad(
            self.composite_targets, received, strict=strict, staged=unchanged, on_meta=on_meta
        )
        names = [*self._row_of_name, *self._filled_by_others]
        return with_modules(
            change, self._targets, obj, names, self._selection, composite_load, staged=unchanged
        )
