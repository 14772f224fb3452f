"""Every private name of ``torch.nn.Module`` that aiotorchio uses.

Checked with torch 2.6.0, 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

__all__ = [
    "children_of",
    "edits_missing",
    "has_buffers",
    "has_load_post_hooks",
    "has_load_pre_hooks",
    "is_fsdp1",
    "is_norm",
    "load_from_state_dict",
    "loads_by_code",
    "loads_extra_state",
    "parameters_of",
    "passing_buffers",
    "persistent_tensors",
    "reads_copies",
    "reads_state",
    "run_load_post_hooks",
]


def is_fsdp1(module: torch.nn.Module) -> bool:
    """Whether a module is a FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a normalization that may count batches."""
    return isinstance(module, torch.nn.modules.batchnorm._NormBase)


def children_of(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the submodules by name, a shared one under each of its names."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def has_buffers(module: torch.nn.Module) -> bool:
    """Whether a module has buffers of its own."""
    return bool(module._buffers)


def persistent_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of a module, without submodules."""
    buffers = {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return {k: p for k, p in module._parameters.items() if p is not None} | buffers


def passing_buffers(module: torch.nn.Module) -> list[torch.Tensor | None]:
    """Return the non-persistent buffers of a module, without submodules."""
    return [module._buffers[name] for name in module._non_persistent_buffers_set]


def reads_state(module: torch.nn.Module) -> bool:
    """Whether code other than torch's reads the state before a module loads it."""
    hooks = module._load_state_dict_pre_hooks
    return loads_by_code(module) or not all(map(_only_shards, hooks.values()))


def loads_by_code(module: torch.nn.Module) -> bool:
    """Whether the class of a module overrides how torch's classes load their state."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")


def _only_shards(hook: Any) -> bool:
    """Whether a hook is one of FSDP2, which reads no state."""
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith(
        "torch.distributed.fsdp._fully_shard"
    )


def edits_missing(module: torch.nn.Module) -> bool:
    """Whether code other than torch's gets the missing names after a load and may remove some."""
    return not all(map(_only_shards, module._load_state_dict_post_hooks.values()))


def reads_copies(module: torch.nn.Module) -> bool:
    """Whether a module may do more with a loaded tensor than copy it into its tensor."""
    return reads_state(module) or torch.__future__.get_swap_module_params_on_conversion()


def loads_extra_state(module: torch.nn.Module) -> bool:
    """Whether a module has extra state in addition to tensors."""
    return type(module).set_extra_state is not torch.nn.Module.set_extra_state


def load_from_state_dict(
    module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *found: list[str]
) -> None:
    """Load as load_state_dict does; ``found`` has lists for missing, unexpected and errors."""
    module._load_from_state_dict(state, prefix, metadata, True, *found)


def parameters_of(module: torch.nn.Module) -> Iterable[torch.nn.Parameter | None]:
    """Return the parameters of a module, without submodules."""
    return module._parameters.values()


def has_load_pre_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks that run before it loads its state."""
    return bool(module._load_state_dict_pre_hooks)


def has_load_post_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks that run after it has loaded its state."""
    return bool(module._load_state_dict_post_hooks)


def run_load_post_hooks(module: torch.nn.Module, *found: list[str]) -> None:
    """Run the hooks after a load; ``found`` has the lists of missing and unexpected names."""
    keys = torch.nn.modules.module._IncompatibleKeys(*found)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, keys)
