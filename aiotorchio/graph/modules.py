"""Modules as targets: the tensors of a module that a message can be received into.

In: a module of the caller. Out: a ``ModuleTarget``. Parameters and persistent buffers that
``state_dict()`` shows are received into their memory. All its other entries (copies, gathered or
packed tensors, extra state) are received as part of the object, and loaded by the submodule that
owns them (see ``module_load``). A ``ValueError`` means that the module cannot be a target, and says
what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from aiotorchio.common import torch_private, torch_private_modules
from aiotorchio.graph.module_survey import survey

__all__ = [
    "EXTRA_STATE",
    "UNKNOWN_MAX",
    "ModuleTarget",
    "beginnings",
    "has_memory",
    "other_views",
]

EXTRA_STATE = "_extra_state"
UNKNOWN_MAX = 10_000
"""Names without a match in the module that its own code (pre-hooks, ``_load_from_state_dict``) may
judge. Each takes microseconds on the event loop."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ENTRIES = frozenset({"_parameters", "_buffers", "_modules"})


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a strided view of one storage.

    True on ``meta``, where storages have no bytes; for quantized tensors, although their scales are
    not in the storage; and for subclasses without ``__torch_dispatch__``, such as parameters with
    attributes. False for sparse, nested and lazy tensors, and other subclasses.
    """
    if type(tensor) in _PLAIN:
        return tensor.layout is torch.strided and not tensor.is_nested
    return (
        type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not torch.nn.parameter.is_lazy(tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


class ModuleTarget:
    """A module that is a target, or is in one.

    Args:
        path: The path of the module in the target; empty if it is the target itself.
        module: The module.

    Attributes:
        module: The module.
        prefix: The path with a dot after it; empty if the path is.
        tensors: Parameters and persistent buffers by their name in ``state_dict()``, which are
            received into.
        other_entries: The names of all other entries of ``state_dict()``, with the path of their
            submodule.
        active: Paths of the submodules that have more to load than ``tensors``.
        only_tensors: Whether every load is done when ``tensors`` are filled.

    Raises:
        ValueError: The module is sharded by FSDP1, or the owner of an entry is unknown.
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
        own_by_memory: dict[object, torch.Tensor] | None = None
        for name, value in module.state_dict(keep_vars=True).items():
            tensor = value if isinstance(value, torch.Tensor) and has_memory(value) else None
            if tensor is not None and id(tensor) not in own:
                # Some modules show another tensor over the same memory: a detached one, or, as
                # ScriptModules do, a new one for each call.
                if own_by_memory is None:
                    own_by_memory = {
                        _memory_of(each): each for each in own.values() if has_memory(each)
                    }
                tensor = own_by_memory.get(_memory_of(tensor)) if tensor.data_ptr() else None
            if tensor is not None:
                self.tensors[name] = tensor
            else:
                others.append(name)
        # A peer chooses the names to look up: of any length, with any number of dots.
        self._lengths = sorted(set(map(len, self._submodules)), reverse=True)
        self.other_entries = {name: self.owner(name) for name in others}
        self._entry_lengths = sorted(set(map(len, self.other_entries)))
        self.active = set(self.other_entries.values()) | found.active
        self._edits_missing, self._reads_state = found.edits_missing, found.reads_state
        self.only_tensors = not self.active and not found.norms
        if self.active:
            self._check_names()

    def _check_names(self) -> None:
        """Refuse a state dict whose names are not paths of submodules: none would load them."""
        for name in self.tensors:
            path = self.owner(name)
            key = name.removeprefix(path + "." if path else "")
            own = torch_private_modules.persistent_tensors(self._submodules[path])
            if key not in own and not self.code_decides(name):
                raise ValueError(
                    f"state_dict() of {type(self.module).__name__} shows {self.prefix + name!r}, "
                    "which is no path of a submodule, and a submodule has more to load than "
                    "tensors: receive into the submodule that has this tensor, or receive a dict"
                )

    def attributes(self) -> Iterator[Any]:
        """Yield the attributes of the submodules that are not entries or submodules."""
        for submodule in self._submodules.values():
            yield from torch_private_modules.passing_buffers(submodule)
            yield from (value for key, value in vars(submodule).items() if key not in _ENTRIES)

    def submodule(self, path: str) -> torch.nn.Module:
        """Return the submodule at a path."""
        return self._submodules[path]

    def owner(self, name: str) -> str:
        """Return the path of the submodule that owns an entry, going by its name."""
        found = (
            path
            for path in beginnings(name, self._lengths)
            if path in self._submodules and path != name
        )
        # The name of an entry can be empty.
        return next(found, "")

    def with_those_above(self, paths: Iterable[str]) -> set[str]:
        """Return paths of submodules, and those of the modules that contain them."""
        found: set[str] = set()
        for path in paths:
            while path not in found:
                found.add(path)
                path = self.owner(path) if path else ""
        return found

    def entry_of(self, name: str) -> str | None:
        """Return the one of ``other_entries`` that a tensor of the message is, or belongs to."""
        found = (
            each for each in beginnings(name, self._entry_lengths) if each in self.other_entries
        )
        return next(found, None)

    def loaded_by_torch(self, name: str) -> torch.Tensor | None:
        """Return the parameter or buffer of one of ``other_entries`` that torch's code loads."""
        path = self.other_entries[name]
        submodule = self._submodules[path]
        if self.code_decides(name):
            return None
        own = torch_private_modules.persistent_tensors(submodule)
        return own.get(name.removeprefix(path + "." if path else ""))

    def is_required(self, name: str) -> bool:
        """Whether torch's own code reports a missing entry of ``other_entries``."""
        if self._edits_missing or self.code_decides(name):
            return False
        path = self.other_entries[name]
        if name.removeprefix(path + "." if path else "") == EXTRA_STATE:
            # As in torch: extra state that a class shows and does not load may be missing.
            return torch_private_modules.loads_extra_state(self.submodule(path))
        return self.loaded_by_torch(name) is not None

    def refuses_extra_state(self, name: str) -> bool:
        """Whether torch's own code reports extra state that no submodule takes."""
        return (
            name.rpartition(".")[2] == EXTRA_STATE
            and name not in self.other_entries
            and not self._edits_missing
            and not self.code_decides(name)
        )

    def code_decides(self, name: str) -> bool:
        """Whether code of a submodule decides about an entry.

        The entry can be one that ``state_dict()`` shows, or one that a side lacks: a hook renames
        an entry with an old name, for example. True for ``num_batches_tracked`` of a norm, since
        early versions of torch did not count batches.
        """
        counts = name.endswith("num_batches_tracked")
        if not counts and not self._reads_state:
            return False
        path = self.owner(name)
        if counts and torch_private_modules.is_norm(self._submodules[path]):
            return True
        while not torch_private_modules.reads_state(self._submodules[path]):
            if not path:
                return False
            path = self.owner(path)
        return True

    def refusal(self, name: str) -> str | None:
        """Return the reason why an entry of ``other_entries`` cannot be loaded; None if it can."""
        path = self.other_entries[name]
        submodule = self._submodules[path]
        key = name.removeprefix(path + "." if path else "")
        if key in torch_private_modules.persistent_tensors(submodule) or self.code_decides(name):
            return None
        if key == EXTRA_STATE and torch_private_modules.loads_extra_state(submodule):
            return None
        return (
            f"state_dict() of {type(submodule).__name__} makes this entry, but nothing loads it: "
            "leave it out with select, or receive a dict"
        )


def other_views(
    tensors: Iterable[torch.Tensor], modules: Iterable[ModuleTarget]
) -> list[torch.Tensor]:
    """Return other views of the memory of these tensors, in attributes of them or their modules.

    A quantized layer computes with such a view of its weight, for example. The search covers
    attributes that are tensors, and those that contain tensors (as an item, or as an attribute).
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
    """Return the items of a container, or the values of an object's attributes."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, type | torch.nn.Module):
        return ()
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return attributes.values()


def beginnings(name: str, lengths: Iterable[int]) -> Iterator[str]:
    """Yield the beginnings of a name that have one of these lengths and end at a dot or its end."""
    for length in lengths:
        if not length or length == len(name) or name[length : length + 1] == ".":
            yield name[:length]


def _memory_of(tensor: torch.Tensor) -> object:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
