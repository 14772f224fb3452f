"""A single pass through the submodules of a module.

In: a module. Out: its submodules, parameters and persistent buffers, and the submodules that have
more to load than tensors. ``modules`` makes a target of it. A module can have ten thousand
submodules of few classes, and every message needs a survey: so there is one pass, and each class is
examined once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from aiotorchio.common import torch_private_modules

__all__ = ["Survey", "survey"]


class _Kind(NamedTuple):
    """The properties of a module class."""

    sharded: bool
    norm: bool
    extra: bool
    reads_state: bool


class Survey(NamedTuple):
    """The properties of a module and its submodules.

    Attributes:
        submodules: The submodules by path; one in several places has several paths. The module
            itself has the path "".
        own: Registered parameters and persistent buffers, by id; ``state_dict()`` may show other
            tensors for them.
        active: Paths of submodules with more to load than tensors.
        reads_state: Whether a submodule has code that reads the entries before they are loaded.
        edits_missing: Whether a submodule has code that gets the list of missing names.
        norms: Whether a submodule may count batches.
        sharded: The path of an FSDP1 module; None if there is none.
    """

    submodules: dict[str, torch.nn.Module]
    own: dict[int, torch.Tensor]
    active: set[str]
    reads_state: bool
    edits_missing: bool
    norms: bool
    sharded: str | None


def survey(module: torch.nn.Module) -> Survey:
    """Examine a module and all its submodules."""
    submodules: dict[str, torch.nn.Module] = {}
    own: dict[int, torch.Tensor] = {}
    active: set[str] = set()
    kinds: dict[type, _Kind] = {}
    reads_state = edits_missing = norms = False
    sharded: str | None = None
    waiting: list[tuple[str, torch.nn.Module]] = [("", module)]
    while waiting:
        path, each = waiting.pop()
        submodules[path] = each
        kind = kinds.get(type(each))
        if kind is None:
            kind = kinds[type(each)] = _Kind(
                torch_private_modules.is_fsdp1(each),
                torch_private_modules.is_norm(each),
                torch_private_modules.loads_extra_state(each),
                torch_private_modules.loads_by_code(each),
            )
        if kind.sharded and sharded is None:
            sharded = path
        norms = norms or kind.norm
        reads = kind.reads_state or (
            torch_private_modules.has_load_pre_hooks(each)
            and torch_private_modules.reads_state(each)
        )
        reads_state = reads_state or reads
        if torch_private_modules.has_load_post_hooks(each):
            active.add(path)
            edits_missing = edits_missing or torch_private_modules.edits_missing(each)
        if reads or kind.extra:
            active.add(path)
        for parameter in torch_private_modules.parameters_of(each):
            if parameter is not None:
                own[id(parameter)] = parameter
        if torch_private_modules.has_buffers(each):
            own.update(
                (id(it), it) for it in torch_private_modules.persistent_tensors(each).values()
            )
        prefix = path + "." if path else ""
        children = torch_private_modules.children_of(each)
        waiting += [(prefix + name, child) for name, child in reversed(children)]
    return Survey(submodules, own, active, reads_state, edits_missing, norms, sharded)
