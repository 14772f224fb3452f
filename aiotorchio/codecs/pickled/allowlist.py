"""What a pickle may name without being trusted, and what stands behind each name.

torch's own list is the model: the same names, so that every object torch saves can be loaded.
Behind them stand the checked functions of ``plain`` and ``tensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from aiotorchio.codecs.pickled import safe_builtins
from aiotorchio.codecs.pickled.checks import Checks
from aiotorchio.codecs.pickled.reduced import as_kind, from_type
from aiotorchio.codecs.pickled.safe_attributes import TypeName, set_attributes, tensor_class
from aiotorchio.codecs.pickled.safe_nested import NestedMaker
from aiotorchio.codecs.pickled.safe_tensors import TensorMaker
from aiotorchio.common.torch_private import JAGGED_PARTS, REBUILD_JAGGED, JaggedTensor
from aiotorchio.errors import UnsafeObjectError
from aiotorchio.limits import Limits
from aiotorchio.table.torch_dtypes import DTYPE_NAMES

__all__ = ["Allowlist", "paths_of"]

_QSCHEMES = (
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)


_JAGGED = f"{JaggedTensor.__module__}.{JaggedTensor.__qualname__}"


class Allowlist:
    """The globals of one load.

    Args:
        safe_globals: Classes and functions that the caller trusts, or pairs of one and the path
            that stands for it in the pickle.
        limits: Bounds for what is built.
        map_location: For tensor subclasses that have a device and no storage.

    Attributes:
        globals: Path in the pickle -> what stands for it.
        stateful: Paths of those whose instances may be given a state.
    """

    def __init__(self, safe_globals: Iterable[Any], limits: Limits, map_location: Any) -> None:
        dicts = self._dicts = safe_builtins.OrderedDicts()
        checks = self._checks = Checks(limits)
        tensors, nested = TensorMaker(checks, map_location), NestedMaker(checks)
        self.globals: dict[str, Any] = {
            "builtins.bytearray": safe_builtins.make_bytearray,
            "builtins.bytes": safe_builtins.make_bytes,
            "builtins.complex": safe_builtins.make_complex,
            "builtins.frozenset": safe_builtins.make_frozenset,
            "builtins.set": safe_builtins.make_set,
            "_codecs.encode": safe_builtins.encode,
            "collections.Counter": safe_builtins.make_counter,
            "collections.OrderedDict": dicts.make,
            "torch.Size": safe_builtins.make_size,
            "torch.Tensor": TypeName(torch.Tensor),
            "torch.device": safe_builtins.make_device,
            "torch.nn.parameter.Parameter": TypeName(torch.nn.Parameter),
            "torch.serialization._get_layout": safe_builtins.make_layout,
            "torch._tensor._rebuild_from_type_v2": self._subclass,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": tensors.on_device,
            "torch._utils._rebuild_meta_tensor_no_storage": tensors.meta,
            "torch._utils._rebuild_nested_tensor": nested.strided,
            "torch._utils._rebuild_parameter": tensors.parameter,
            "torch._utils._rebuild_parameter_with_state": tensors.parameter,
            "torch._utils._rebuild_qtensor": tensors.quantized,
            "torch._utils._rebuild_sparse_tensor": tensors.sparse,
            "torch._utils._rebuild_tensor_v2": tensors.strided,
            "torch._utils._rebuild_tensor_v3": tensors.strided,
            "torch._utils._rebuild_wrapper_subclass": tensors.wrapper,
        }
        self._rebuilds = [value for path, value in self.globals.items() if "._rebuild_" in path]
        self.globals |= {str(dtype): dtype for dtype in DTYPE_NAMES}
        self.globals |= {f"torch.{name}": getattr(torch, name) for name in _QSCHEMES}
        trusted = paths_of(safe_globals)
        # torch lets anyone name these, and does not look at the offsets.
        checked = {_JAGGED: TypeName(JaggedTensor), REBUILD_JAGGED: nested.jagged}
        trusted |= {path: value for path, value in checked.items() if path in trusted}
        self.globals |= trusted
        self._trusted = list(trusted.values())
        self._trusted_paths = trusted
        self.stateful = {"collections.OrderedDict"}
        self.stateful |= {path for path, value in trusted.items() if _takes_state(value)}

    def trusted(self) -> Iterable[tuple[str, Any]]:
        """Paths in the pickle, and what the caller trusts under them."""
        return self._trusted_paths.items()

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """Make nothing that relies on the numbers in these storages, or others named before."""
        self._checks.distrust(storages)

    def deferred(self) -> frozenset[str]:
        """Paths of what makes tensors, and of what the caller trusts."""
        rebuilds = [path for path, value in self.globals.items() if self.makes_tensors(value)]
        return frozenset([*self._trusted_paths, *rebuilds])

    def makes_tensors(self, function: Any) -> bool:
        """Whether it is one of the functions that rebuild tensors."""
        jagged = self.globals.get(REBUILD_JAGGED)
        return any(function is other for other in (*self._rebuilds, jagged) if other is not None)

    def rebuild_functions(self) -> dict[tuple[str, str], Any]:
        """(module, name) of torch's rebuild functions -> the checked ones, for full pickle.

        Those that set attributes stay torch's own: full pickle may set any.
        """
        prefix = "torch._utils."
        return {("torch._tensor", "_rebuild_from_type_v2"): from_type} | {
            ("torch._utils", path.removeprefix(prefix)): value
            for path, value in self.globals.items()
            if path.startswith(prefix) and "_with_state" not in path
        }

    def guard_state(self, given: Mapping[str, bool]) -> None:
        """Let trusted functions, whose results are given a state, return only what may take it.

        numpy's arrays are made like this. A tensor would be pointed anywhere by its state.

        Args:
            given: Paths of functions, and whether those states are attributes; see ``scan_pickle``.
        """
        for path, attributes in given.items():
            value = self.globals[path]
            if path in self._trusted_paths and not isinstance(value, type):
                self.globals[path] = _guarded(value, attributes)

    def check_result(self) -> None:
        """Refuse what can be judged only when all is built."""
        self._dicts.check()

    def _subclass(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor of another class, or with attributes."""
        # Not "in": what the sender put here can take forever to hash.
        known = any(function is other for other in (*self._rebuilds, *self._trusted))
        if not known or type(args) is not tuple:
            raise UnsafeObjectError(f"rebuilding a tensor with a {type(function).__name__}")
        named = tensor_class(kind)
        tensor = as_kind(function(*args), named)
        if any(tensor is argument for argument in args):
            # It may be the caller's, who has not asked for attributes.
            tensor = tensor.detach()
        if type(tensor) is not named:
            if type(tensor) is JaggedTensor or named is JaggedTensor:
                raise UnsafeObjectError(f"a {type(tensor).__name__} as a {named.__name__}")
            tensor = tensor.as_subclass(named)
        if named is JaggedTensor:
            # It has its parts already, which were checked.
            if type(state) is not dict:
                raise UnsafeObjectError("a state for a jagged tensor that is no dict")
            state = {key: state[key] for key in state if key not in JAGGED_PARTS}
        if named.__setstate__ is not torch.Tensor.__setstate__:
            tensor.__setstate__(state)
        else:
            set_attributes(tensor, state)
        return tensor


def _takes_state(trusted: Any) -> bool:
    """Whether what it makes may be given a state: no tensors, whose state points anywhere."""
    return (
        not isinstance(trusted, type)
        or not issubclass(trusted, torch.Tensor)
        or trusted.__setstate__ is not torch.Tensor.__setstate__
    )


def _guarded(function: Callable[..., Any], attributes: bool) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        made = function(*args)
        if isinstance(made, torch.Tensor):
            raise UnsafeObjectError("a state for a tensor: it takes none")
        if not attributes and not hasattr(made, "__setstate__"):
            raise UnsafeObjectError(f"a state for a {type(made).__name__} that is no dict")
        return made

    return checked


def paths_of(trusted: Iterable[Any]) -> dict[str, Any]:
    """Path -> global that someone trusts, as ``add_safe_globals`` takes them.

    Raises:
        TypeError: Neither a global nor a pair of one and its path.
    """
    paths = {}
    for entry in trusted:
        if isinstance(entry, tuple):
            if len(entry) != 2 or not isinstance(entry[1], str):
                raise TypeError(f"safe_globals takes globals or (global, path), not {entry!r}")
            paths[entry[1]] = entry[0]
        elif hasattr(entry, "__module__") and hasattr(entry, "__qualname__"):
            paths[f"{entry.__module__}.{entry.__qualname__}"] = entry
        else:
            raise TypeError(f"safe_globals takes classes and functions, not {entry!r}")
    return paths
