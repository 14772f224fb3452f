"""Every private name of ``torch.nn.Module`` that aiotorchio uses.

Checked with torch 2.6.0, 2.11.0 and 2.13.0. Whatever changes in another version changes here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

__all__ = [
    "excuses",
    "has_load_post_hooks",
    "has_load_pre_hooks",
    "is_fsdp1",
    "is_norm",
    "load_from_state_dict",
    "loads_by_code",
    "parameters_of",
    "passing_buffers",
    "persistent_tensors",
    "reads_copies",
    "renames",
    "run_load_post_hooks",
    "takes_extra_state",
]


def is_fsdp1(module: torch.nn.Module) -> bool:
    """Whether the module shards its parameters as FullyShardedDataParallel does."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether it is one of those that may count batches."""
    return isinstance(module, torch.nn.modules.batchnorm._NormBase)


def persistent_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a module itself keeps in its state dict."""
    buffers = {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return {k: p for k, p in module._parameters.items() if p is not None} | buffers


def passing_buffers(module: torch.nn.Module) -> list[torch.Tensor | None]:
    """What a module itself keeps in no state dict."""
    return [module._buffers[name] for name in module._non_persistent_buffers_set]


def renames(module: torch.nn.Module) -> bool:
    """Whether code that is not torch's looks at what the module is to load."""
    hooks = module._load_state_dict_pre_hooks
    return loads_by_code(module) or not all(map(_only_shards, hooks.values()))


def loads_by_code(module: torch.nn.Module) -> bool:
    """Whether the class of a module loads what it is given in another way than torch's classes."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")


def _only_shards(hook: Any) -> bool:
    """Whether a hook is one of FSDP2, which cares for its parameters and looks at no state."""
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith(
        "torch.distributed.fsdp._fully_shard"
    )


def excuses(module: torch.nn.Module) -> bool:
    """Whether code that is not torch's hears of what is missing, and may take it back."""
    return not all(map(_only_shards, module._load_state_dict_post_hooks.values()))


def reads_copies(module: torch.nn.Module) -> bool:
    """Whether a module may do more with a tensor that it is to load than copy it into its own."""
    return renames(module) or torch.__future__.get_swap_module_params_on_conversion()


def takes_extra_state(module: torch.nn.Module) -> bool:
    """Whether a module has more to keep than tensors."""
    return type(module).set_extra_state is not torch.nn.Module.set_extra_state


def load_from_state_dict(
    module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *found: list[str]
) -> None:
    """As load_state_dict does; ``found`` are missing, unexpected, errors."""
    module._load_from_state_dict(state, prefix, metadata, True, *found)


def parameters_of(module: torch.nn.Module) -> Iterable[torch.nn.Parameter | None]:
    """Those of a module itself."""
    return module._parameters.values()


def has_load_pre_hooks(module: torch.nn.Module) -> bool:
    """Whether something looks at what a module is to load."""
    return bool(module._load_state_dict_pre_hooks)


def has_load_post_hooks(module: torch.nn.Module) -> bool:
    """Whether something hears of what a module has loaded."""
    return bool(module._load_state_dict_post_hooks)


def run_load_post_hooks(module: torch.nn.Module, *found: list[str]) -> None:
    """What load_state_dict does when all below a module are loaded; as above, without errors."""
    keys = torch.nn.modules.module._IncompatibleKeys(*found)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, keys)
