"""Checked counterparts of torch's functions that rebuild tensors from a pickle.

torch's take their arguments as they are: they resize storages, read beyond indices, set any
attribute. These have the same arguments, check them, and raise ``InvalidObjectError``,
``LimitExceeded`` or ``UnsafeObjectError``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from aiotorchio.errors import InvalidObjectError, LimitExceeded, UnsafeObjectError
from aiotorchio.graph import _torch
from aiotorchio.graph.attributes import set_attributes, tensor_class
from aiotorchio.graph.dtypes import DTYPE_NAMES
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.limits import Limits

__all__ = ["TensorMaker"]

_INT64_MAX = 2**63 - 1
# Elements in a byte; each row begins with a byte of its own.
_PER_BYTE = {torch.quint4x2: 2, torch.quint2x4: 4}
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


_PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
# Checking one part of a nested tensor takes as long as copying about this many bytes.
_NESTED_WORK = 64 * 2**10


class TensorMaker:
    """Makes the tensors of one load that have no row in the table.

    Args:
        limits: Bounds for what is made.
        map_location: For tensors that have a device and no storage.
    """

    def __init__(self, limits: Limits, map_location: Any) -> None:
        self._limits = limits
        self._map_location = map_location
        self._work_left = limits.total_nbytes
        self._distrusted: set[int] = set()

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """Trust no number in these: they may have others at any time."""
        # Those without memory are all at 0.
        self._distrusted = {each.data_ptr() for each in storages if each is not None} - {0}

    def strided(
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
        """A strided tensor: v2 has a storage of the dtype and maybe metadata, v3 an untyped one."""
        if isinstance(dtype_or_metadata, torch.dtype):
            dtype = dtype_or_metadata
        else:
            dtype, metadata = _storage_dtype(storage), dtype_or_metadata
        kind = DTYPES[DTYPE_NAMES[dtype]].kind
        if kind == "quantized":
            raise InvalidObjectError(f"a tensor of {dtype} without a scale")
        untyped = self._checked_view(storage, dtype, offset, size, stride)
        tensor = _torch.over_storage(untyped, dtype, offset, size, stride)
        if metadata is not None:
            if type(metadata) is not dict or not metadata.keys() <= {"conj", "neg"}:
                raise InvalidObjectError("a tensor with metadata other than conj and neg")
            if kind != "complex" and ("conj" in metadata or kind != "float"):
                raise InvalidObjectError(f"conjugate or negative view of {dtype}")
            _torch.set_view_bits(tensor, conjugate="conj" in metadata, negative="neg" in metadata)
        return tensor.requires_grad_(_bool(requires_grad))

    def meta(self, dtype: Any, size: Any, stride: Any, requires_grad: Any) -> torch.Tensor:
        """A tensor on ``meta``: a shape and no bytes."""
        _expect(dtype, torch.dtype)
        self._checked_span(dtype, size, stride, limit=_INT64_MAX)
        return torch.empty_strided(
            size, stride, dtype=dtype, device="meta", requires_grad=_bool(requires_grad)
        )

    def on_device(self, data: Any, dtype: Any, device: Any, requires_grad: Any) -> torch.Tensor:
        """A tensor on a device that has no storages; its numbers come from one on the CPU."""
        tensor = _part(data)
        if tensor.dtype is not _expect(dtype, torch.dtype):
            raise UnsafeObjectError(f"a device tensor of {dtype} from {tensor.dtype}")
        self._charge(tensor)
        # Never the tensor itself, which may be the caller's: what follows would change it.
        moved = tensor.detach().to(self.device(device))
        return moved.requires_grad_(_bool(requires_grad))

    def quantized(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        params: Any,
        requires_grad: Any,
        _hooks: Any,
    ) -> torch.Tensor:
        """A quantized tensor: integers, and what scales them."""
        dtype = _storage_dtype(storage)
        check = self._checked_rows if dtype in _PER_BYTE else self._checked_view
        untyped = check(storage, dtype, offset, size, stride)
        if DTYPES[DTYPE_NAMES[dtype]].kind != "quantized" or type(params) is not tuple:
            raise InvalidObjectError(f"a quantized tensor of {dtype}")
        # The scales are made for an empty tensor: the size is taken from the storage below.
        if len(params) == 3 and params[0] is torch.per_tensor_affine:
            _expect(params[1], float, int)
            # Beyond, torch makes a tensor that can't be used.
            if not -(2**31) <= _expect(params[2], int) < 2**31:
                raise InvalidObjectError(f"zero point {params[2]}")
            tensor = _torch.empty_affine_quantized(
                [0], scale=params[1], zero_point=params[2], dtype=dtype, device=untyped.device
            )
        elif len(params) == 4 and any(params[0] is known for known in _PER_CHANNEL):
            scales, zero_points, axis = params[1:]
            self._charge(scales)
            self._charge(zero_points)
            if not 0 <= _expect(axis, int) < len(size):
                raise InvalidObjectError(f"channel axis {axis} of {len(size)} dimensions")
            if scales.shape != (size[axis],) or zero_points.shape != (size[axis],):
                raise InvalidObjectError(
                    f"{scales.numel()} scales and {zero_points.numel()} zero points "
                    f"for {size[axis]} channels"
                )
            empty = [0 if n != axis else size[axis] for n in range(len(size))]
            tensor = _torch.empty_per_channel_quantized(
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

    def sparse(self, layout: Any, data: Any) -> torch.Tensor:
        """A sparse tensor of any layout."""
        _expect(data, tuple)
        if layout is torch.sparse_coo and len(data) in (3, 4):
            indices, values, size = data[:3]
            self._check_shape(size)
            self._charge(indices)
            _part(values)
            coalesced = _bool(data[3]) if len(data) == 4 else None
            return _torch.make_coo(indices, values, size, coalesced)
        if any(layout is known for known in _COMPRESSED) and len(data) == 4:
            compressed, plain, values, size = data
            self._check_shape(size)
            self._charge(compressed)
            self._charge(plain)
            _part(values)
            return _torch.make_compressed(compressed, plain, values, size, layout)
        raise InvalidObjectError(f"a sparse tensor of other parts than its layout has: {len(data)}")

    def nested(self, buffer: Any, sizes: Any, strides: Any, offsets: Any) -> torch.Tensor:
        """A nested tensor of the strided layout: many tensors in one buffer."""
        _part(buffer)
        for part in (sizes, strides, offsets):
            self._charge(part)
        if (
            buffer.dim() != 1
            # torch reads all four as if they were contiguous.
            or not all(part.is_contiguous() for part in (buffer, sizes, strides, offsets))
            or sizes.dim() != 2
            or strides.shape != sizes.shape
            or offsets.shape != sizes.shape[:1]
            or any(part.dtype != torch.int64 for part in (sizes, strides, offsets))
            or any(part.device.type != "cpu" for part in (sizes, strides, offsets))
        ):
            raise InvalidObjectError("a nested tensor whose parts do not fit together")
        # Each part of it is looked at in Python.
        self._work_left -= offsets.numel() * _NESTED_WORK
        self._check_work()
        elements = 0
        for offset, size, stride in zip(
            offsets.tolist(), sizes.tolist(), strides.tolist(), strict=True
        ):
            if offset < 0 or offset + self._checked_span(buffer.dtype, size, stride) > len(buffer):
                raise InvalidObjectError("a nested tensor beyond its buffer")
            elements += math.prod(size)
        if elements * buffer.dtype.itemsize > self._limits.dense_nbytes:
            raise LimitExceeded(f"a nested tensor of {elements} elements")
        return _torch.nested_view(buffer, sizes, strides, offsets)

    def wrapper(
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
        """A subclass without a storage; its parts follow as attributes."""
        kind = tensor_class(kind)
        _expect(dtype, torch.dtype)
        self._checked_span(dtype, size, stride, limit=_INT64_MAX)
        return _torch.make_wrapper_subclass(
            kind,
            size,
            strides=stride,
            dtype=dtype,
            storage_offset=_expect(offset, int),
            layout=layout,
            device=self.device(device),
            requires_grad=_bool(requires_grad),
        )

    def parameter(
        self, data: Any, requires_grad: Any, _hooks: Any, state: Any = None
    ) -> torch.Tensor:
        """A parameter of anything that is not a plain tensor, or with attributes."""
        parameter = torch.nn.Parameter(_expect(data, torch.Tensor), _bool(requires_grad))
        if state is not None:
            set_attributes(parameter, state)
        return parameter

    # Checks

    def device(self, device: Any) -> torch.device:
        """Where a tensor without a storage of its own goes: ``map_location``, as in torch."""
        _expect(device, str, torch.device)
        location = self._map_location
        if callable(location):
            raise InvalidObjectError(
                "a tensor without a storage of its own has nothing that a callable map_location "
                "could place; torch says: Callable map_location not supported with "
                "_rebuild_wrapper_subclass or _rebuild_device_tensor_from_numpy"
            )
        if isinstance(location, Mapping):
            return torch.device(location.get(str(device), device))
        if isinstance(location, str | torch.device):
            return torch.device(location)
        return torch.device(device)

    def _charge(self, tensor: Any) -> None:
        """Count what is read or copied to make a tensor: a pickle can make the same one often."""
        _part(tensor)
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InvalidObjectError(f"a part of a tensor of layout {tensor.layout}")
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > tensor.untyped_storage().nbytes():
            raise InvalidObjectError("a part of a tensor that is expanded")
        if nbytes and tensor.untyped_storage().data_ptr() in self._distrusted:
            raise InvalidObjectError(
                "a part of a tensor whose numbers are not received, or may change: those of a "
                "destination, or under torch.serialization.skip_data"
            )
        self._work_left -= nbytes
        self._check_work()

    def _check_work(self) -> None:
        if self._work_left < 0:
            raise LimitExceeded(
                f"tensors are made from more than {self._limits.total_nbytes} bytes"
            )

    def _check_shape(self, shape: Any) -> None:
        if not isinstance(shape, tuple | list) or any(type(n) is not int or n < 0 for n in shape):
            raise InvalidObjectError("a shape or stride that is no tuple of natural numbers")
        if len(shape) > self._limits.dims:
            raise LimitExceeded(f"{len(shape)} dimensions, {self._limits.dims} allowed")

    def _checked_span(
        self, dtype: torch.dtype, size: Any, stride: Any, *, limit: int | None = None
    ) -> int:
        """Elements from the first to the last of a view, both included."""
        limit = self._limits.dense_nbytes if limit is None else limit
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
        if span * dtype.itemsize > _INT64_MAX:
            raise InvalidObjectError(f"a tensor of {span * dtype.itemsize} bytes from end to end")
        return span

    def _checked_rows(
        self, storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.UntypedStorage:
        """Check a tensor whose elements are smaller than a byte."""
        untyped = _untyped(storage)
        self._checked_span(dtype, size, stride)
        # Of a view, torch's stride and offset would count a byte for each element.
        if _expect(offset, int) or tuple(stride) != torch.empty(size, device="meta").stride():
            raise InvalidObjectError(f"a view of a tensor of {dtype}")
        nbytes = math.prod(size[:-1]) * -(-size[-1] // _PER_BYTE[dtype]) if size else 1
        if nbytes > untyped.nbytes():
            raise InvalidObjectError(
                f"a tensor of {nbytes} bytes over a storage of {untyped.nbytes()}"
            )
        return untyped

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


def _part(value: Any) -> torch.Tensor:
    """A part that a tensor is made of; the methods of a subclass could tell anything about it."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) and not _torch.is_fake(value):
        raise InvalidObjectError(f"a part of a tensor that is a {type(value).__name__}")
    return cast(torch.Tensor, value)


def _bool(value: Any) -> bool:
    return bool(_expect(value, bool))


def _untyped(storage: Any) -> torch.UntypedStorage:
    if isinstance(storage, torch.TypedStorage):
        return _torch.untyped_storage_of(storage)
    untyped: torch.UntypedStorage = _expect(storage, torch.UntypedStorage)
    return untyped


def _storage_dtype(storage: Any) -> torch.dtype:
    typed: torch.TypedStorage = _expect(storage, torch.TypedStorage)
    return typed.dtype
