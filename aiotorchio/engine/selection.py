"""What the caller wants of a message: which tensors, where, and how."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.graph.modules import ModuleDestination
from aiotorchio.graph.select import Select, selected
from aiotorchio.graph.targets import examined, target_tensors
from aiotorchio.memory.atomic import BackMemory

__all__ = ["DoubleBuffer", "Into", "LoadTarget", "Selection"]


class DoubleBuffer:
    """Tensors with a second set of memory behind them, for loads that swap without copying.

    A load ``into`` it receives and verifies the whole message in the memory behind, and then lets
    every tensor show that memory: a few microseconds a tensor, whatever the size. What was shown
    before is the memory behind for the next message. The tensors stay the same objects, but their
    addresses change: views of them that are not in ``destination``, and what has recorded
    addresses (CUDA graphs, shared memory), keep the memory of before. Views that a tensor or module
    of ``destination`` has as an attribute follow. If a message has only parts of a storage, the
    swap copies the rest of that storage.

    Args:
        destination: A ``torch.nn.Module``, or a mapping from names to tensors; as ``into`` of
            ``load_from_stream``. It is looked through anew for each message.

    Raises:
        TypeError: Neither of them.

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
        """What is behind."""
        return self._memory


# The types of the option ``into``.
LoadTarget = Mapping[str, Any] | torch.nn.Module | DoubleBuffer


@dataclass(frozen=True, slots=True)
class Into:
    """Tensors to receive into, by name.

    Attributes:
        tensors: By name.
        modules: Those that some of the tensors are of.
        strict: Whether the message must have the same names.
        cast: Whether dtypes may differ.
        staged: Whether they change only when the message is whole.
        back: Memory to receive in first; None: that of one message.
    """

    tensors: dict[str, torch.Tensor]
    modules: list[ModuleDestination]
    strict: bool
    cast: bool
    staged: bool
    back: BackMemory | None

    @classmethod
    def of(cls, into: LoadTarget, *, strict: bool, cast: bool, staged: bool) -> Into:
        """Look through the value of the option ``into``.

        Raises:
            TypeError: Neither a mapping, nor a module, nor a ``DoubleBuffer``.
            ValueError: Two tensors of one name, or a module that cannot be received into.
        """
        back = into.memory if isinstance(into, DoubleBuffer) else None
        destination = into.destination if isinstance(into, DoubleBuffer) else into
        return cls(*examined(destination), strict, cast, staged, back)

    @property
    def names(self) -> Iterator[str]:
        """All that can be received into it."""
        yield from self.tensors
        for module in self.modules:
            for name in module.others:
                yield module.prefix + name

    def parts(self, names: Iterable[str], selection: Container[str]) -> Iterator[str]:
        """Those of the names that are in entries which are wanted: extra state is given whole."""
        modules = [module for module in self.modules if module.others]
        for name in interruptible(names) if modules else ():
            for module in modules:
                if name.startswith(module.prefix):
                    entry = module.entry(name.removeprefix(module.prefix))
                    if entry is not None and module.prefix + entry in selection:
                        yield name


class Selection:
    """Which names count.

    Args:
        select: As the caller gave it; None: all.
        names: All there are.
        others: Why there may be more; "" if there are not.
    """

    def __init__(self, select: Select | None, names: Iterable[str], others: str = "") -> None:
        self.all = select is None
        self._names = set() if select is None else selected(select, names, others)

    def add(self, names: Iterable[str]) -> None:
        """Let more names count."""
        self._names.update(names)

    def __contains__(self, name: object) -> bool:
        return self.all or name in self._names
