"""Modules as destinations: which of their tensors a message can be received into.

In: a module of the caller's. What its ``state_dict()`` shows of its own parameters and persistent
buffers is received into their memory. All else there (made for the occasion, gathered, packed,
extra state) is received as part of the object, and loaded by the submodule that it belongs to (see
``module_load``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from aiotorchio.common import torch_private
from aiotorchio.graph.module_survey import survey

__all__ = [
    "EXTRA_STATE",
    "UNKNOWN_MAX",
    "ModuleDestination",
    "beginnings",
    "has_memory",
    "other_views",
]

EXTRA_STATE = "_extra_state"
UNKNOWN_MAX = 10_000
"""Names that the destination lacks, and that are given to code of its own: each takes microseconds
on the event loop."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ENTRIES = frozenset({"_parameters", "_buffers", "_modules"})


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether it is a view of a storage, and nothing else.

    Subclasses without ``__torch_dispatch__`` are: parameters with attributes, for example.
    """
    if type(tensor) in _PLAIN:
        return tensor.layout is torch.strided and not tensor.is_nested
    return (
        type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not torch.nn.parameter.is_lazy(tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


class ModuleDestination:
    """A module somewhere in a destination.

    Args:
        path: Where it is; empty if it is the destination itself.
        module: To be looked through.

    Attributes:
        module: As given.
        prefix: The path, with a dot behind it if it is not empty.
        tensors: Parameters and persistent buffers by their name in ``state_dict()``: to be
            received into.
        others: The names of all else in ``state_dict()``, each with the path of its submodule.
        active: Paths of the submodules that have more to do in a load.
        only_tensors: No load has more to do than to fill ``tensors``.

    Raises:
        ValueError: An FSDP1 module, or entries whose owner is not to be told, with what to do
            instead.
    """

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self.module = module
        self.prefix = path + "." if path else ""
        found = survey(module)
        self._submodules, own = found.submodules, found.own
        if found.sharded is not None:
            raise ValueError(
                f"into has an FSDP1 module at {self.prefix + found.sharded!r}, whose state_dict() "
                "gathers shards: receive a dict and give it to torch.distributed.checkpoint."
                "state_dict.set_model_state_dict, or use fully_shard (FSDP2)"
            )
        self.tensors: dict[str, torch.Tensor] = {}
        others: list[str] = []
        places: dict[object, torch.Tensor] | None = None
        for name, value in module.state_dict(keep_vars=True).items():
            tensor = value if isinstance(value, torch.Tensor) and has_memory(value) else None
            if tensor is not None and id(tensor) not in own:
                # Some show another tensor over the same memory: detached, or made anew each time as
                # by ScriptModules.
                if places is None:
                    places = {_place(each): each for each in own.values() if has_memory(each)}
                tensor = places.get(_place(tensor)) if tensor.data_ptr() else None
            if tensor is not None:
                self.tensors[name] = tensor
            else:
                others.append(name)
        # A peer chooses the names that are looked up: of any length, with any number of dots.
        self._lengths = sorted(set(map(len, self._submodules)), reverse=True)
        self.others = {name: self.owner(name) for name in others}
        self._lengths_of_others = sorted(set(map(len, self.others)))
        self.active = set(self.others.values()) | found.active
        self._excuses, self._renames = found.excuses, found.renames
        self.only_tensors = not self.active and not found.norms
        if self.active:
            self._check_names()

    def _check_names(self) -> None:
        """Refuse a state dict that does not go by submodules: who would load its entries?"""
        for name in self.tensors:
            path = self.owner(name)
            key = name.removeprefix(path + "." if path else "")
            own = torch_private.persistent_tensors(self._submodules[path])
            if key not in own and not self.judges(name):
                raise ValueError(
                    f"state_dict() of {type(self.module).__name__} shows {self.prefix + name!r}, "
                    "which is no path of a submodule, and some have more to load than tensors: "
                    "receive into the module that it is taken from, or a dict"
                )

    def attributes(self) -> Iterator[Any]:
        """Everything that the submodules have and that is neither in ``state_dict()`` nor below."""
        for submodule in self._submodules.values():
            yield from torch_private.passing_buffers(submodule)
            yield from (value for key, value in vars(submodule).items() if key not in _ENTRIES)

    def submodule(self, path: str) -> torch.nn.Module:
        """By its path in the module."""
        return self._submodules[path]

    def owner(self, name: str) -> str:
        """The path of the submodule that an entry belongs to, going by its name."""
        found = (
            path
            for path in beginnings(name, self._lengths)
            if path in self._submodules and path != name
        )
        # A key can be empty.
        return next(found, "")

    def with_those_above(self, paths: Iterable[str]) -> set[str]:
        """Paths of submodules, and of all that these are in."""
        found: set[str] = set()
        for path in paths:
            while path not in found:
                found.add(path)
                path = self.owner(path) if path else ""
        return found

    def entry(self, name: str) -> str | None:
        """The entry of ``others`` that a tensor of the message is, or is a part of."""
        found = (each for each in beginnings(name, self._lengths_of_others) if each in self.others)
        return next(found, None)

    def loaded_by_torch(self, name: str) -> torch.Tensor | None:
        """The parameter or buffer behind an entry of ``others`` that torch's own code loads."""
        path = self.others[name]
        submodule = self._submodules[path]
        own = torch_private.persistent_tensors(submodule)
        return None if self.judges(name) else own.get(name.removeprefix(path + "." if path else ""))

    def needs(self, name: str) -> bool:
        """Whether torch's own code reports an entry of ``others`` that is not there."""
        if self._excuses or self.judges(name):
            return False
        path = self.others[name]
        if name.removeprefix(path + "." if path else "") == EXTRA_STATE:
            # As torch: what a class shows and does not take back is not missed.
            return torch_private.takes_extra_state(self.submodule(path))
        return self.loaded_by_torch(name) is not None

    def refuses(self, name: str) -> bool:
        """Whether torch's own code reports extra state that nobody takes."""
        return (
            name.rpartition(".")[2] == EXTRA_STATE
            and name not in self.others
            and not self._excuses
            and not self.judges(name)
        )

    def judges(self, name: str) -> bool:
        """Whether a submodule has code of its own for an entry that one side lacks.

        An old name, for example, which a hook renames.
        """
        # torch has not always counted the batches of a BatchNorm.
        counts = name.endswith("num_batches_tracked")
        if not counts and not self._renames:
            return False
        path = self.owner(name)
        if counts and torch_private.is_norm(self._submodules[path]):
            return True
        while not torch_private.renames(self._submodules[path]):
            if not path:
                return False
            path = self.owner(path)
        return True

    def refusal(self, name: str) -> str | None:
        """Why an entry of ``others`` cannot be given to its submodule; None if it can."""
        path = self.others[name]
        submodule = self._submodules[path]
        key = name.removeprefix(path + "." if path else "")
        if key in torch_private.persistent_tensors(submodule) or self.judges(name):
            return None
        if key == EXTRA_STATE and torch_private.takes_extra_state(submodule):
            return None
        return (
            f"state_dict() of {type(submodule).__name__} makes it, and nothing there loads it; "
            "leave it out with select, or receive a dict"
        )


def other_views(
    tensors: Iterable[torch.Tensor], modules: Iterable[ModuleDestination]
) -> list[torch.Tensor]:
    """Views of the memory of these tensors that they or their modules have as attributes.

    Quantized layers compute with such a view of their weight, for example. Found are attributes
    that are a tensor or have tensors in them (an item, or an attribute of an object).
    """
    own = {id(tensor): tensor for tensor in tensors if has_memory(tensor)}
    storages = {torch_private.storage_key(tensor.untyped_storage()) for tensor in own.values()}
    found: dict[int, torch.Tensor] = {}
    attributes = (value for tensor in own.values() for value in _values(tensor))
    for value in chain(attributes, *(module.attributes() for module in modules)):
        for each in [value] if isinstance(value, torch.Tensor) else _values(value):
            if (
                isinstance(each, torch.Tensor)
                and id(each) not in own
                and has_memory(each)
                and torch_private.storage_key(each.untyped_storage()) in storages
            ):
                found[id(each)] = each
    return list(found.values())


def _values(value: Any) -> Iterable[Any]:
    """The items of a container, or the attributes of an object."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, type | torch.nn.Module):
        return ()
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return attributes.values()


def beginnings(name: str, lengths: Iterable[int]) -> Iterator[str]:
    """Beginnings of a name that end at a dot or its end, of these lengths."""
    for length in lengths:
        if not length or length == len(name) or name[length : length + 1] == ".":
            yield name[:length]


def _place(tensor: torch.Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
