"""What a pickle may name without being trusted: checked counterparts of torch's rebuild functions.

torch's own list is the model: the same names, so that every object torch saves can be loaded.
Behind the names stand functions that check their arguments first, because torch's take them as
they are: they resize storages, read beyond indices, and set any attribute.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

from aiotorchio.errors import InvalidObjectError, LimitExceeded, UnsafeObjectError
from aiotorchio.graph import _torch
from aiotorchio.graph.dtypes import DTYPE_NAMES
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.limits import Limits

__all__ = ["Allowlist"]

_INT64_MAX = 2**63 - 1
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_QSCHEMES = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")


class _TypeName:
    """Stands for a class that may be named but neither called nor instantiated.

    torch puts the class of a tensor with attributes into the pickle. The class itself would be
    a way to memory that was never written: ``torch.Tensor(64)`` shows what was there before.
    """

    def __init__(self, kind: type[torch.Tensor]) -> None:
        self.kind = kind

    def __call__(self, *_: object) -> Any:
        raise UnsafeObjectError(f"{self.kind.__name__} may be named, not called")


class Allowlist:
    """The globals of one load.

    Args:
        safe_globals: Classes and functions that the caller trusts, or pairs of one and the path
            that stands for it in the pickle. What ``torch.serialization.add_safe_globals`` was
            told counts too.
        limits: Bounds for what is built.
        map_location: For tensor subclasses that have a device and no storage.

    Attributes:
        globals: Path in the pickle -> what stands for it.
        stateful: Paths of those whose instances may be given a state.
    """

    def __init__(self, safe_globals: Iterable[Any], limits: Limits, map_location: Any) -> None:
        self._limits = limits
        self._map_location = map_location
        self._dicts: list[Any] = []
        self.globals: dict[str, Any] = {
            "builtins.bytearray": _bytearray,
            "builtins.bytes": _bytes,
            "builtins.complex": complex,
            "builtins.frozenset": _frozenset,
            "builtins.set": _set,
            "_codecs.encode": _encode,
            "collections.Counter": self._counter,
            "collections.OrderedDict": self._ordered_dict,
            "torch.Size": torch.Size,
            "torch.Tensor": _TypeName(torch.Tensor),
            "torch.device": torch.device,
            "torch.nn.parameter.Parameter": _TypeName(torch.nn.Parameter),
            "torch.serialization._get_layout": torch.serialization._get_layout,
            "torch._tensor._rebuild_from_type_v2": self._rebuild_from_type,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": self._rebuild_device_tensor,
            "torch._utils._rebuild_meta_tensor_no_storage": self._rebuild_meta_tensor,
            "torch._utils._rebuild_nested_tensor": self._rebuild_nested_tensor,
            "torch._utils._rebuild_parameter": self._rebuild_parameter,
            "torch._utils._rebuild_parameter_with_state": self._rebuild_parameter,
            "torch._utils._rebuild_qtensor": self._rebuild_qtensor,
            "torch._utils._rebuild_sparse_tensor": self._rebuild_sparse_tensor,
            "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
            "torch._utils._rebuild_tensor_v3": self._rebuild_tensor,
            "torch._utils._rebuild_wrapper_subclass": self._rebuild_wrapper_subclass,
        }
        self._rebuilds = {value for path, value in self.globals.items() if "._rebuild_" in path}
        self.globals |= {str(dtype): dtype for dtype in DTYPE_NAMES}
        self.globals |= {f"torch.{name}": getattr(torch, name) for name in _QSCHEMES}
        trusted = _paths(torch.serialization.get_safe_globals()) | _paths(safe_globals)
        self.globals |= trusted
        self._trusted = list(trusted.values())
        self.stateful = frozenset(trusted) | {"collections.Counter", "collections.OrderedDict"}

    def rebuild_functions(self) -> dict[tuple[str, str], Any]:
        """(module, name) of torch's rebuild functions -> the checked ones, for full pickle.

        Those that set attributes stay torch's own: full pickle may set any.
        """
        prefix = "torch._utils."
        return {
            ("torch._utils", path.removeprefix(prefix)): value
            for path, value in self.globals.items()
            if path.startswith(prefix) and "_with_state" not in path
        }

    def check_result(self) -> None:
        """Refuse dicts whose attributes hide their methods; to be called when all is built."""
        for built in self._dicts:
            hidden = sorted(key for key in vars(built) if hasattr(type(built), str(key)))
            if hidden:
                raise InvalidObjectError(f"a dict whose attribute {hidden[0]!r} hides its own")

    def _ordered_dict(self, *args: Any) -> Any:
        return self._dict(OrderedDict, *args)

    def _counter(self, *args: Any) -> Any:
        return self._dict(Counter, *args)

    def _dict(self, kind: Any, items: Any = ()) -> Any:
        if type(items) not in (tuple, list, dict):
            raise UnsafeObjectError(f"{kind.__name__} from {type(items).__name__}")
        built = kind(items)
        self._dicts.append(built)
        return built

    # Tensors

    def _rebuild_tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        _hooks: Any,
        dtype_or_metadata: Any = None,
        metadata: Any = None,
    ) -> torch.Tensor:
        # v2: storage of the dtype, then maybe metadata. v3: untyped storage, dtype, metadata.
        if isinstance(dtype_or_metadata, torch.dtype):
            dtype = dtype_or_metadata
        else:
            dtype, metadata = _storage_dtype(storage), dtype_or_metadata
        untyped = self._checked_view(storage, dtype, offset, size, stride)
        tensor = torch.empty((0,), dtype=dtype, device=untyped.device)
        tensor.set_(untyped, offset, size, stride)
        if metadata is not None:
            if type(metadata) is not dict or not metadata.keys() <= {"conj", "neg"}:
                raise InvalidObjectError("a tensor with metadata other than conj and neg")
            _torch.set_view_bits(tensor, conjugate="conj" in metadata, negative="neg" in metadata)
        return tensor.requires_grad_(_bool(requires_grad))

    def _rebuild_meta_tensor(
        self, dtype: Any, size: Any, stride: Any, requires_grad: Any
    ) -> torch.Tensor:
        _expect(dtype, torch.dtype)
        self._checked_span(dtype, size, stride, limit=_INT64_MAX)
        return torch.empty_strided(
            size, stride, dtype=dtype, device="meta", requires_grad=_bool(requires_grad)
        )

    def _rebuild_device_tensor(
        self, data: Any, dtype: Any, device: Any, requires_grad: Any
    ) -> torch.Tensor:
        tensor: torch.Tensor = _expect(data, torch.Tensor)
        if tensor.dtype != dtype:
            raise InvalidObjectError(f"a device tensor of {dtype} from {tensor.dtype}")
        return tensor.to(self._device(device)).requires_grad_(_bool(requires_grad))

    def _rebuild_qtensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        params: Any,
        requires_grad: Any,
        _hooks: Any,
    ) -> torch.Tensor:
        dtype = _storage_dtype(storage)
        untyped = self._checked_view(storage, dtype, offset, size, stride)
        if DTYPES[DTYPE_NAMES[dtype]].kind != "quantized" or type(params) is not tuple:
            raise InvalidObjectError(f"a quantized tensor of {dtype}")
        # The scales are made for an empty tensor: the size is taken from the storage below.
        if len(params) == 3 and params[0] is torch.per_tensor_affine:
            _expect(params[1], float, int)
            _expect(params[2], int)
            tensor = torch._empty_affine_quantized(
                [0], scale=params[1], zero_point=params[2], dtype=dtype, device=untyped.device
            )
        elif len(params) == 4 and params[0] is not torch.per_tensor_affine:
            scales, zero_points, axis = params[1:]
            _expect(scales, torch.Tensor)
            _expect(zero_points, torch.Tensor)
            if not 0 <= _expect(axis, int) < len(size):
                raise InvalidObjectError(f"channel axis {axis} of {len(size)} dimensions")
            if scales.shape != (size[axis],) or zero_points.shape != (size[axis],):
                raise InvalidObjectError(
                    f"{scales.numel()} scales and {zero_points.numel()} zero points "
                    f"for {size[axis]} channels"
                )
            empty = [0 if n != axis else size[axis] for n in range(len(size))]
            tensor = torch._empty_per_channel_affine_quantized(
                empty,
                scales=scales,
                zero_points=zero_points,
                axis=axis,
                dtype=dtype,
                device=untyped.device,
            )
        else:
            raise InvalidObjectError("a quantized tensor without its scales")
        tensor.set_(untyped, offset, size, stride)
        return tensor.requires_grad_(_bool(requires_grad))

    def _rebuild_sparse_tensor(self, layout: Any, data: Any) -> torch.Tensor:
        _expect(data, tuple)
        if layout is torch.sparse_coo and len(data) in (3, 4):
            self._check_shape(data[2])
            return torch.sparse_coo_tensor(
                _expect(data[0], torch.Tensor),
                _expect(data[1], torch.Tensor),
                data[2],
                is_coalesced=_bool(data[3]) if len(data) == 4 else None,
                check_invariants=True,
            )
        if layout in _COMPRESSED and len(data) == 4:
            self._check_shape(data[3])
            return torch.sparse_compressed_tensor(
                _expect(data[0], torch.Tensor),
                _expect(data[1], torch.Tensor),
                _expect(data[2], torch.Tensor),
                data[3],
                layout=layout,
                check_invariants=True,
            )
        raise InvalidObjectError(f"a sparse tensor of layout {layout} from {len(data)} parts")

    def _rebuild_nested_tensor(
        self, buffer: Any, sizes: Any, strides: Any, offsets: Any
    ) -> torch.Tensor:
        for part in (buffer, sizes, strides, offsets):
            _expect(part, torch.Tensor)
        count = sizes.shape[0] if sizes.dim() == 2 else 0
        if (
            buffer.dim() != 1
            or strides.shape != sizes.shape
            or offsets.shape != (count,)
            or any(part.dtype != torch.int64 for part in (sizes, strides, offsets))
            or any(part.device.type != "cpu" for part in (sizes, strides, offsets))
        ):
            raise InvalidObjectError("a nested tensor whose parts do not fit together")
        for offset, size, stride in zip(
            offsets.tolist(), sizes.tolist(), strides.tolist(), strict=True
        ):
            if offset < 0 or offset + self._checked_span(buffer.dtype, size, stride) > len(buffer):
                raise InvalidObjectError("a nested tensor beyond its buffer")
        return _torch.nested_view(buffer, sizes, strides, offsets)

    def _rebuild_wrapper_subclass(
        self,
        kind: Any,
        dtype: Any,
        size: Any,
        stride: Any,
        offset: Any,
        layout: Any,
        device: Any,
        requires_grad: Any,
    ) -> torch.Tensor:
        if not isinstance(kind, type) or not issubclass(kind, torch.Tensor):
            raise UnsafeObjectError("a tensor subclass that is none")
        _expect(dtype, torch.dtype)
        self._checked_span(dtype, size, stride, limit=_INT64_MAX)
        return _torch.make_wrapper_subclass(
            kind,
            size,
            strides=stride,
            dtype=dtype,
            storage_offset=_expect(offset, int),
            layout=layout,
            device=self._device(device),
            requires_grad=_bool(requires_grad),
        )

    def _rebuild_parameter(
        self, data: Any, requires_grad: Any, _hooks: Any, state: Any = None
    ) -> torch.Tensor:
        parameter = torch.nn.Parameter(_expect(data, torch.Tensor), _bool(requires_grad))
        if state is not None:
            _set_attributes(parameter, state)
        return parameter

    def _rebuild_from_type(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        known = function in self._rebuilds or function in self._trusted
        if not known or type(args) is not tuple:
            raise UnsafeObjectError(f"rebuilding a tensor with {function!r}")
        named = kind.kind if isinstance(kind, _TypeName) else kind
        if not isinstance(named, type) or not issubclass(named, torch.Tensor):
            raise UnsafeObjectError("a tensor subclass that is none")
        tensor = function(*args)
        if type(tensor) is not named:
            tensor = tensor.as_subclass(named)
        if named.__setstate__ is not torch.Tensor.__setstate__:
            tensor.__setstate__(state)
        else:
            _set_attributes(tensor, state)
        return tensor

    # Checks

    def _device(self, device: Any) -> torch.device:
        """Where a tensor without a storage of its own goes: ``map_location``, as in torch."""
        location = self._map_location
        if isinstance(location, dict):
            return torch.device(location.get(str(device), device))
        if isinstance(location, str | torch.device):
            return torch.device(location)
        return torch.device(device)

    def _check_shape(self, shape: Any) -> None:
        if not isinstance(shape, tuple | list) or any(type(n) is not int or n < 0 for n in shape):
            raise InvalidObjectError("a shape or stride that is no tuple of natural numbers")
        if len(shape) > self._limits.dims:
            raise LimitExceeded(f"{len(shape)} dimensions, {self._limits.dims} allowed")

    def _checked_span(
        self, dtype: torch.dtype, size: Any, stride: Any, *, limit: int | None = None
    ) -> int:
        """Elements from the first to the last of a view, both included."""
        limit = self._limits.total_nbytes if limit is None else limit
        self._check_shape(size)
        self._check_shape(stride)
        if len(size) != len(stride):
            raise InvalidObjectError(f"{len(size)} dimensions and {len(stride)} strides")
        count = math.prod(size)
        if count == 0:
            return 0
        if count * dtype.itemsize > limit:
            raise LimitExceeded(f"{count * dtype.itemsize} bytes when contiguous, {limit} allowed")
        span: int = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        return span

    def _checked_view(
        self, storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.UntypedStorage:
        untyped = _untyped(storage)
        if _expect(offset, int) < 0:
            raise InvalidObjectError(f"a tensor at offset {offset}")
        span = self._checked_span(dtype, size, stride)
        if span and (offset + span) * dtype.itemsize > untyped.nbytes():
            raise InvalidObjectError(
                f"a tensor reaches byte {(offset + span) * dtype.itemsize} "
                f"of a storage of {untyped.nbytes()}"
            )
        return untyped


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise InvalidObjectError(
            f"{type(value).__name__} where {' or '.join(k.__name__ for k in kinds)} must be"
        )
    return value


def _bool(value: Any) -> bool:
    return bool(_expect(value, bool))


def _untyped(storage: Any) -> torch.UntypedStorage:
    if isinstance(storage, torch.TypedStorage):
        return _torch.untyped_storage_of(storage)
    untyped: torch.UntypedStorage = _expect(storage, torch.UntypedStorage)
    return untyped


def _storage_dtype(storage: Any) -> torch.dtype:
    if isinstance(storage, torch.UntypedStorage):
        return torch.uint8
    typed: torch.TypedStorage = _expect(storage, torch.TypedStorage)
    return typed.dtype


def _set_attributes(tensor: torch.Tensor, state: Any) -> None:
    """Attributes of a tensor: its own ones only, never those that its class has."""
    parts = state if type(state) is tuple and len(state) == 2 else (state, None)
    for part in parts:
        for key, value in (part or {}).items():
            if type(key) is not str or (hasattr(type(tensor), key) and not _is_slot(tensor, key)):
                raise UnsafeObjectError(f"attribute {key!r} of a {type(tensor).__name__}")
            setattr(tensor, key, value)


def _is_slot(tensor: torch.Tensor, key: str) -> bool:
    return any(key in vars(base).get("__slots__", ()) for base in type(tensor).__mro__)


def _paths(trusted: Iterable[Any]) -> dict[str, Any]:
    """Path of each global that someone trusts, as ``add_safe_globals`` takes them."""
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


# Builtins that protocol 2 calls


def _set(items: Any = ()) -> set[Any]:
    if type(items) is not list and items != ():
        raise UnsafeObjectError(f"a set from {type(items).__name__}")
    return set(items)


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _bytes(*args: Any) -> bytes:
    if args:
        raise UnsafeObjectError("bytes() with arguments")
    return b""


def _encode(text: Any, codec: Any) -> bytes:
    if type(text) is not str or codec not in ("latin1", "latin-1"):
        raise UnsafeObjectError(f"encoding {type(text).__name__} as {codec!r}")
    return text.encode("latin-1")


def _bytearray(*args: Any) -> bytearray:
    if not args:
        return bytearray()
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    return bytearray(_encode(*args))
