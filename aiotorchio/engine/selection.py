"""The targets and the selection of a load: the options ``into`` and ``select``."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.errors import MismatchError
from aiotorchio.graph.module_rules import ModuleRules
from aiotorchio.graph.modules import ModuleTarget
from aiotorchio.graph.select import Select, selected
from aiotorchio.graph.targets import examined, target_tensors
from aiotorchio.memory.atomic import BackMemory
from aiotorchio.wire.header import shortened

__all__ = ["DoubleBuffer", "LoadTarget", "Selection", "Targets"]


class DoubleBuffer:
    """Tensors with a second set of memory, for loads that swap without copying.

    A load ``into`` it receives and verifies the whole message in the second memory, and then lets
    every tensor show that memory: a few microseconds a tensor, at any size. The memory that was
    shown before takes the next message. The tensors stay the same objects, but their addresses
    change: views of them that are not in ``destination``, and recorded addresses (CUDA graphs,
    shared memory), keep the previous memory. Views that a tensor or module of ``destination`` has
    as an attribute follow. If a message has only parts of a storage, the swap copies the rest of
    that storage.

    Args:
        destination: A ``torch.nn.Module``, or a mapping from names to tensors; as ``into`` of
            ``load_from_stream``. It is looked through anew for each message.

    Raises:
        TypeError: Neither a module nor a mapping.

    Example:
        >>> import io, torch, aiotorchio
        >>> file = io.BytesIO()
        >>> _ = aiotorchio.save({"weight": torch.ones(2)}, file), file.seek(0)
        >>> shown = torch.zeros(2)
        >>> buffers = aiotorchio.DoubleBuffer({"weight": shown})
        >>> _ = aiotorchio.load(file, into=buffers)
        >>> shown
        tensor([1., 1.])
    """

    def __init__(self, destination: Mapping[str, Any] | torch.nn.Module) -> None:
        target_tensors(destination)
        self.destination = destination
        self._memory = BackMemory()

    @property
    def memory(self) -> BackMemory:
        """The second set of memory."""
        return self._memory


# The types of the option ``into``.
LoadTarget = Mapping[str, Any] | torch.nn.Module | DoubleBuffer


@dataclass(frozen=True, slots=True)
class Targets:
    """Tensors to receive into, by name.

    Attributes:
        tensors: The tensors, by name.
        modules: The modules that have some of the tensors.
        strict: Whether the message must have the same names.
        cast: Whether dtypes may differ.
        staged: Whether the tensors change only when the message is whole.
        back: The second memory of a ``DoubleBuffer``; None for other targets.
    """

    tensors: dict[str, torch.Tensor]
    modules: list[ModuleTarget]
    strict: bool
    cast: bool
    staged: bool
    back: BackMemory | None

    @classmethod
    def of(cls, into: LoadTarget, *, strict: bool, cast: bool, staged: bool) -> Targets:
        """Look through the value of the option ``into``.

        Raises:
            TypeError: Neither a mapping, nor a module, nor a ``DoubleBuffer``.
            ValueError: Two tensors of one name, or a module that cannot be received into.
        """
        back = into.memory if isinstance(into, DoubleBuffer) else None
        value = into.destination if isinstance(into, DoubleBuffer) else into
        return cls(*examined(value), strict, cast, staged, back)

    @property
    def names(self) -> Iterator[str]:
        """The names of all tensors and other entries that can be received."""
        yield from self.tensors
        for module in self.modules:
            for name in module.other_entries:
                yield module.prefix + name

    def parts(self, names: Iterable[str], selection: Container[str]) -> Iterator[str]:
        """Yield names inside selected entries of modules: extra state is loaded as a whole.

        Raises:
            MismatchError: A name is selected, and not the entry that it is a part of.
        """
        modules = [module for module in self.modules if module.other_entries]
        rules = ModuleRules(modules)
        for name in interruptible(names) if modules else ():
            for module, key in rules.owners(name):
                entry = module.entry_of(key)
                if entry is None:
                    continue
                if module.prefix + entry in selection:
                    yield name
                elif name in selection:
                    raise MismatchError(
                        "a module loads this as a part of its entry "
                        f"{shortened(module.prefix + entry)!r}: select the whole entry",
                        entry=shortened(name),
                    )


class Selection:
    """The names that a load keeps.

    Args:
        select: The option; None: all names.
        names: All names that are known.
        unknown_reason: The reason why there may be more names; "" if there are none.

    Attributes:
        all: Whether all names are selected.
    """

    def __init__(
        self, select: Select | None, names: Iterable[str], unknown_reason: str = ""
    ) -> None:
        self.all = select is None
        self._names = set() if select is None else selected(select, names, unknown_reason)

    def add(self, names: Iterable[str]) -> None:
        """Select more names."""
        self._names.update(names)

    def __contains__(self, name: object) -> bool:
        return self.all or name in self._names
