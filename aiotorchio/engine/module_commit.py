"""The commit of targets that load more than bytes: modules, and composite tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from aiotorchio.common.interrupt import interruptible
from aiotorchio.engine.selection import Targets
from aiotorchio.errors import MismatchError
from aiotorchio.graph.module_load import ModuleLoad
from aiotorchio.graph.tensor_load import TensorLoad
from aiotorchio.memory.atomic import BufferSwap, Exchange

__all__ = ["WithModules", "with_modules"]


class WithModules:
    """The change of staged tensors, if there is one, and the loads of modules after it.

    Args:
        change: Changes the tensors that were not received in place.
        loads: One for each module that has something to load, and one for targets that are copied
            from whole tensors.
    """

    def __init__(
        self, change: Exchange | BufferSwap | None, loads: Sequence[ModuleLoad | TensorLoad]
    ) -> None:
        self._change, self._loads = change, loads
        self.needs_prepare = change is not None and change.needs_prepare
        self.is_instant = change is None or change.is_instant
        self.shadows = [] if change is None else change.shadows

    @property
    def tables(self) -> list[list[Any]]:
        """Tables of the change of the tensors."""
        return [] if self._change is None else self._change.tables

    def keep_state(self) -> None:
        """Keep the state of the modules, before the tensors change."""
        for load in self._loads:
            load.keep_state()

    def prepare(self) -> None:
        """Prepare the change of the tensors."""
        if self._change is not None:
            self._change.prepare()

    def apply(self) -> None:
        """Change the tensors."""
        if self._change is not None:
            self._change.apply()

    def finish(self) -> Iterator[None]:
        """Let the modules load the other entries."""
        for load in self._loads:
            yield from load.steps()

    def undo(self) -> None:
        """Change the tensors back."""
        if self._change is not None:
            self._change.undo()

    def restore(self) -> None:
        """Let the modules load the state that ``keep_state`` has kept, after ``undo``.

        Raises:
            MismatchError: Modules refuse their earlier state; the text names them all.
        """
        errors: list[MismatchError] = []
        for load in reversed(self._loads):
            try:
                load.restore()
            except MismatchError as error:
                errors.append(error)
        if errors:
            raise MismatchError("\n".join(map(str, errors))) from errors[0]


def with_modules(
    change: Exchange | BufferSwap | None,
    targets: Targets,
    received: Any,
    names: Iterable[str],
    selection: Container[str],
    composite_load: TensorLoad,
    *,
    staged: bool,
) -> Exchange | BufferSwap | WithModules | None:
    """Add the loads of modules and whole tensors to a change of tensors, if there are any.

    Args:
        change: The change of the tensors, if they are staged.
        targets: The targets.
        received: The object.
        names: Names of tensors that have their numbers: those of the message, and targets that
            other targets fill.
        selection: The names that count.
        composite_load: The load of the composite targets.
        staged: Whether all tensors are unchanged until the commit.

    Raises:
        MismatchError: The object does not fit the modules.
    """
    modules = [module for module in targets.modules if not module.only_tensors]
    loads: list[ModuleLoad | TensorLoad] = [composite_load]
    if modules:
        strict = targets.strict
        names = [name for name in interruptible(names) if name in selection]
        loads += [
            ModuleLoad(module, received, names, selection, strict=strict, staged=staged)
            for module in modules
        ]
    loads = [load for load in loads if load.has_steps]
    return WithModules(change, loads) if loads else change
