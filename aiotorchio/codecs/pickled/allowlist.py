"""The allowlist: the globals that a pickle may name, and the checked functions that replace them.

In: the classes and functions that the caller trusts. Out: a dict from paths to objects, which the
scan and the unpickler use. The paths are those that torch allows, so that every object that torch
saves can be loaded; the objects are functions of the ``safe_*`` modules.
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
from aiotorchio.common.interrupt import interruptible
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
    """The globals that the pickle of one load may name.

    Args:
        safe_globals: Classes and functions that the caller trusts, or pairs of one and its path in
            the pickle.
        limits: Limits of the load.
        map_location: Devices of tensor subclasses that have a device and no storage.

    Attributes:
        globals: Path in the pickle -> the object that the pickle gets for it.
        stateful: Paths of the globals whose instances may be given a state.
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
        # In torch, any pickle may name these, and the offsets are not checked.
        checked = {_JAGGED: TypeName(JaggedTensor), REBUILD_JAGGED: nested.jagged}
        trusted |= {path: value for path, value in checked.items() if path in trusted}
        self.globals |= trusted
        self._trusted = list(trusted.values())
        self._trusted_paths = trusted
        self.stateful = {"collections.OrderedDict"}
        self.stateful |= {path for path, value in trusted.items() if _takes_state(value)}

    def trusted(self) -> Iterable[tuple[str, Any]]:
        """Return the paths of the globals that the caller trusts, with these globals."""
        return self._trusted_paths.items()

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """Refuse tensors that rely on values in these storages, or in those of earlier calls."""
        self._checks.distrust(storages)

    def deferred(self) -> frozenset[str]:
        """Return the paths of functions that make tensors, and of all that the caller trusts."""
        rebuilds = [path for path, value in self.globals.items() if self.makes_tensors(value)]
        return frozenset([*self._trusted_paths, *rebuilds])

    def may_make_tensors(self, pickle: bytes) -> bool:
        """Whether a pickle may call something that makes tensors, going by the names in it."""
        # A search of a large pickle takes milliseconds, during which no other thread runs.
        names = (path.rpartition(".")[2].encode() for path in interruptible(self.deferred(), 1))
        return any(name in pickle for name in names)

    def makes_tensors(self, function: Any) -> bool:
        """Whether a function is one of those that rebuild tensors."""
        jagged = self.globals.get(REBUILD_JAGGED)
        return any(function is other for other in (*self._rebuilds, jagged) if other is not None)

    def rebuild_functions(self) -> dict[tuple[str, str], Any]:
        """Return (module, name) of torch's rebuild functions -> checked functions, for full pickle.

        The functions that set attributes are not replaced: full pickle may set any attribute.
        """
        prefix = "torch._utils."
        return {("torch._tensor", "_rebuild_from_type_v2"): from_type} | {
            ("torch._utils", path.removeprefix(prefix)): value
            for path, value in self.globals.items()
            if path.startswith(prefix) and "_with_state" not in path
        }

    def guard_state(self, given: Mapping[str, bool]) -> None:
        """Make trusted functions check that their results may be given the state in the pickle.

        Such a function makes the arrays of numpy. The state of a tensor could give it any memory.

        Args:
            given: Path of a function -> whether the states of its results are attributes; the
                result of ``scan_pickle``.
        """
        for path, attributes in given.items():
            value = self.globals[path]
            if path in self._trusted_paths and not isinstance(value, type):
                self.globals[path] = _guarded(value, attributes)

    def check_result(self) -> None:
        """Refuse attributes of ordered dicts; called once the whole object is built."""
        self._dicts.check()

    def _subclass(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        """Make a tensor of another class, or with attributes."""
        # "in" would compare: an object that the sender put here could take forever.
        known = any(function is other for other in (*self._rebuilds, *self._trusted))
        if not known or type(args) is not tuple:
            raise UnsafeObjectError(
                f"the pickle rebuilds a tensor with a {type(function).__name__}, but it must be an "
                "allowed function with a tuple of arguments"
            )
        named = tensor_class(kind)
        tensor = as_kind(function(*args), named)
        if any(tensor is argument for argument in args):
            # The tensor may be an existing one, which must not get attributes.
            tensor = tensor.detach()
        if type(tensor) is not named:
            if type(tensor) is JaggedTensor or named is JaggedTensor:
                raise UnsafeObjectError(
                    f"the pickle rebuilds a {named.__name__} from a {type(tensor).__name__}"
                )
            tensor = tensor.as_subclass(named)
        if named is JaggedTensor:
            # The parts of the tensor were checked when it was made, and must not be replaced.
            if type(state) is not dict:
                raise UnsafeObjectError("the pickle gives a jagged tensor a state that is no dict")
            state = {key: state[key] for key in state if key not in JAGGED_PARTS}
        if named.__setstate__ is not torch.Tensor.__setstate__:
            tensor.__setstate__(state)
        else:
            set_attributes(tensor, state)
        return tensor


def _takes_state(trusted: Any) -> bool:
    """Whether a trusted global makes objects that may have a state, which tensors may not."""
    return (
        not isinstance(trusted, type)
        or not issubclass(trusted, torch.Tensor)
        or trusted.__setstate__ is not torch.Tensor.__setstate__
    )


def _guarded(function: Callable[..., Any], attributes: bool) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        made = function(*args)
        if isinstance(made, torch.Tensor):
            raise UnsafeObjectError(
                "the pickle gives a state to a tensor that a function made, which is not allowed"
            )
        if not attributes and not hasattr(made, "__setstate__"):
            raise UnsafeObjectError(
                f"the pickle gives a {type(made).__name__} a state that is no dict"
            )
        return made

    return checked


def paths_of(trusted: Iterable[Any]) -> dict[str, Any]:
    """Return path -> global of trusted globals, given as to ``torch``'s ``add_safe_globals``.

    Raises:
        TypeError: An entry is neither a global nor a pair of a global and its path.
    """
    paths = {}
    for entry in trusted:
        if isinstance(entry, tuple):
            if len(entry) != 2 or not isinstance(entry[1], str):
                raise TypeError(f"a tuple in safe_globals must be (global, path), not {entry!r}")
            paths[entry[1]] = entry[0]
        elif hasattr(entry, "__module__") and hasattr(entry, "__qualname__"):
            paths[f"{entry.__module__}.{entry.__qualname__}"] = entry
        else:
            raise TypeError(f"safe_globals must have classes and functions, not {entry!r}")
    return paths
