"""One look through the submodules of a module, however many they are.

In: a module. Out: its submodules, the tensors of its state dict, and which of them have more to do
in a load than to take tensors. ``modules`` makes a destination of it. A module can have ten
thousand submodules of few classes, and is looked through for each message: everything is found in
one pass, and what a class says is asked once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from aiotorchio.common import torch_private

__all__ = ["Survey", "survey"]


class _Kind(NamedTuple):
    """What the class of a module says."""

    sharded: bool
    norm: bool
    extra: bool
    renames: bool


class Survey(NamedTuple):
    """What is known about the submodules of a module, itself among them.

    Attributes:
        submodules: By path, one that is in several places at each.
        own: The tensors of its state dict, by id.
        active: Paths of those to which more happens in a load than that tensors are copied.
        renames: Whether one has code that looks at what it is to load.
        excuses: Whether one has code that hears of what is missing.
        norms: Whether one may count batches.
        sharded: The path of an FSDP1 module.
    """

    submodules: dict[str, torch.nn.Module]
    own: dict[int, torch.Tensor]
    active: set[str]
    renames: bool
    excuses: bool
    norms: bool
    sharded: str | None


def survey(module: torch.nn.Module) -> Survey:
    """Look through a module."""
    submodules: dict[str, torch.nn.Module] = {}
    own: dict[int, torch.Tensor] = {}
    active: set[str] = set()
    kinds: dict[type, _Kind] = {}
    renames = excuses = norms = False
    sharded: str | None = None
    waiting: list[tuple[str, torch.nn.Module]] = [("", module)]
    while waiting:
        path, each = waiting.pop()
        submodules[path] = each
        kind = kinds.get(type(each))
        if kind is None:
            kind = kinds[type(each)] = _Kind(
                torch_private.is_fsdp1(each),
                torch_private.is_norm(each),
                torch_private.takes_extra_state(each),
                torch_private.loads_by_code(each),
            )
        if kind.sharded and sharded is None:
            sharded = path
        norms = norms or kind.norm
        renaming = kind.renames or (
            torch_private.has_load_pre_hooks(each) and torch_private.renames(each)
        )
        renames = renames or renaming
        if torch_private.has_load_post_hooks(each):
            active.add(path)
            excuses = excuses or torch_private.excuses(each)
        if renaming or kind.extra:
            active.add(path)
        for parameter in torch_private.parameters_of(each):
            if parameter is not None:
                own[id(parameter)] = parameter
        if each._buffers:
            own.update((id(it), it) for it in torch_private.persistent_tensors(each).values())
        if each._modules:
            prefix = path + "." if path else ""
            waiting += [
                (prefix + name, child)
                for name, child in reversed(list(each._modules.items()))
                if child is not None
            ]
    return Survey(submodules, own, active, renames, excuses, norms, sharded)
