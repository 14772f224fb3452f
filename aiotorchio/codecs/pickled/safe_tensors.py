"""Checked replacements of torch's functions that rebuild tensors from a pickle.

In: the arguments of a call in a pickle, those of torch's function. Out: the tensor.
``allowlist`` names these functions. torch does not check the arguments: it resizes storages, reads
beyond indices, and sets any attribute. An ``InvalidObjectError`` means that the arguments
contradict each other, a ``LimitExceeded`` that the tensor takes too much, and an
``UnsafeObjectError`` that a pickle must not make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aiotorchio.codecs.pickled.checks import (
    PER_BYTE,
    Checks,
    boolean,
    expect,
    part,
    storage_dtype,
)
from aiotorchio.codecs.pickled.safe_attributes import set_attributes, tensor_class
from aiotorchio.common import torch_private
from aiotorchio.errors import InvalidObjectError, UnsafeObjectError
from aiotorchio.table.torch_dtypes import DTYPE_NAMES
from aiotorchio.wire.dtypes import DTYPES

__all__ = ["TensorMaker"]

_INT64_MAX = 2**63 - 1
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)


class TensorMaker:
    """Makes the tensors of one load that have no row in the table.

    Args:
        checks: The checks of the load.
        map_location: Devices of tensors that have a device and no storage.
    """

    def __init__(self, checks: Checks, map_location: Any) -> None:
        self._checks = checks
        self._map_location = map_location

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
        """Make a strided tensor: v2 has a typed storage and maybe metadata, v3 an untyped one."""
        if isinstance(dtype_or_metadata, torch.dtype):
            dtype = dtype_or_metadata
        else:
            dtype, metadata = storage_dtype(storage), dtype_or_metadata
        kind = DTYPES[DTYPE_NAMES[dtype]].kind
        if kind == "quantized":
            raise InvalidObjectError(f"a tensor of {dtype} without a scale cannot be rebuilt")
        untyped = self._checks.view(storage, dtype, offset, size, stride)
        tensor = torch_private.over_storage(untyped, dtype, offset, size, stride)
        if metadata is not None:
            if type(metadata) is not dict or not metadata.keys() <= {"conj", "neg"}:
                raise InvalidObjectError("a tensor has metadata other than conj and neg")
            if kind != "complex" and ("conj" in metadata or kind != "float"):
                raise InvalidObjectError(
                    f"a tensor is a conjugate or negative view of {dtype}, which has none"
                )
            torch_private.set_view_bits(
                tensor, conjugate="conj" in metadata, negative="neg" in metadata
            )
        return tensor.requires_grad_(boolean(requires_grad))

    def meta(self, dtype: Any, size: Any, stride: Any, requires_grad: Any) -> torch.Tensor:
        """Make a tensor on ``meta``, which has a shape and no bytes."""
        expect(dtype, torch.dtype)
        self._checks.extent(dtype, size, stride, limit=_INT64_MAX)
        return torch.empty_strided(
            size, stride, dtype=dtype, device="meta", requires_grad=boolean(requires_grad)
        )

    def on_device(self, data: Any, dtype: Any, device: Any, requires_grad: Any) -> torch.Tensor:
        """Make a tensor on a device without storages, with the numbers of a tensor on the CPU."""
        tensor = part(data)
        if tensor.dtype is not expect(dtype, torch.dtype):
            raise UnsafeObjectError(
                f"the pickle must make a device tensor from a tensor of {dtype}, not of "
                f"{tensor.dtype}"
            )
        self._checks.charge(tensor)
        # A copy or view: requires_grad_ must not change the tensor, which may be an existing one.
        moved = tensor.detach().to(self.device(device))
        return moved.requires_grad_(boolean(requires_grad))

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
        """Make a quantized tensor of integers, scales and zero points."""
        dtype = storage_dtype(storage)
        check = self._checks.packed if dtype in PER_BYTE else self._checks.view
        untyped = check(storage, dtype, offset, size, stride)
        if DTYPES[DTYPE_NAMES[dtype]].kind != "quantized" or type(params) is not tuple:
            raise InvalidObjectError(
                f"a quantized tensor of {dtype} needs a quantized dtype and a tuple of parameters"
            )
        # Made empty with its scales; set_ below gives it the storage and the size.
        if len(params) == 3 and params[0] is torch.per_tensor_affine:
            expect(params[1], float, int)
            # With a zero point beyond 32 bits, torch makes a tensor that cannot be used.
            if not -(2**31) <= expect(params[2], int) < 2**31:
                raise InvalidObjectError(
                    f"a quantized tensor has zero point {params[2]}, which is beyond 32 bits"
                )
            tensor = torch_private.empty_affine_quantized(
                [0], scale=params[1], zero_point=params[2], dtype=dtype, device=untyped.device
            )
        elif len(params) == 4 and any(params[0] is known for known in _PER_CHANNEL):
            scales, zero_points, axis = params[1:]
            self._checks.charge(scales)
            self._checks.charge(zero_points)
            if not 0 <= expect(axis, int) < len(size):
                raise InvalidObjectError(
                    f"a quantized tensor has channel axis {axis}, but {len(size)} dimensions"
                )
            if scales.shape != (size[axis],) or zero_points.shape != (size[axis],):
                raise InvalidObjectError(
                    f"a quantized tensor has {scales.numel()} scales and {zero_points.numel()} "
                    f"zero points for {size[axis]} channels"
                )
            empty = [0 if n != axis else size[axis] for n in range(len(size))]
            tensor = torch_private.empty_per_channel_quantized(
                empty,
                scales=scales,
                zero_points=zero_points,
                axis=axis,
                dtype=dtype,
                device=untyped.device,
            )
        else:
            raise InvalidObjectError("a quantized tensor without its scales cannot be rebuilt")
        tensor.set_(untyped, offset, size, stride)
        return tensor.requires_grad_(boolean(requires_grad))

    def sparse(self, layout: Any, data: Any) -> torch.Tensor:
        """Make a sparse tensor of any layout."""
        expect(data, tuple)
        if layout is torch.sparse_coo and len(data) in (3, 4):
            indices, values, size = data[:3]
            self._checks.check_shape(size)
            self._checks.charge(indices)
            self._checks.charge_sparse(indices.shape[-1] if indices.dim() else 0)
            part(values)
            coalesced = boolean(data[3]) if len(data) == 4 else None
            return torch_private.make_coo(indices, values, size, coalesced)
        if any(layout is known for known in _COMPRESSED) and len(data) == 4:
            compressed, plain, values, size = data
            self._checks.check_shape(size)
            self._checks.charge(compressed)
            self._checks.charge(plain)
            self._checks.charge_sparse(compressed.numel() + plain.numel())
            part(values)
            return torch_private.make_compressed(compressed, plain, values, size, layout)
        raise InvalidObjectError(
            f"a sparse tensor of {len(data)} parts has other parts than its layout needs"
        )

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
        """Make a tensor of a subclass without a storage; its parts are set as attributes later."""
        kind = tensor_class(kind)
        if issubclass(kind, torch_private.JaggedTensor):
            raise UnsafeObjectError(
                "the pickle makes a jagged tensor whose parts are set as attributes, which is not "
                "allowed"
            )
        expect(dtype, torch.dtype)
        self._checks.extent(dtype, size, stride, limit=_INT64_MAX)
        return torch_private.make_wrapper_subclass(
            kind,
            size,
            strides=stride,
            dtype=dtype,
            storage_offset=expect(offset, int),
            layout=layout,
            device=self.device(device),
            requires_grad=boolean(requires_grad),
        )

    def parameter(
        self, data: Any, requires_grad: Any, _hooks: Any, state: Any = None
    ) -> torch.Tensor:
        """Make a parameter of a tensor that is not plain, or with attributes."""
        parameter = torch.nn.Parameter(expect(data, torch.Tensor), boolean(requires_grad))
        if state is not None:
            set_attributes(parameter, state)
        return parameter

    def device(self, device: Any) -> torch.device:
        """Return the device of a tensor without a storage, by ``map_location`` as in torch."""
        expect(device, str, torch.device)
        location = self._map_location
        if callable(location):
            raise InvalidObjectError(
                "a callable map_location cannot place a tensor that has no storage itself; torch "
                "says: Callable map_location not supported with _rebuild_wrapper_subclass or "
                "_rebuild_device_tensor_from_numpy"
            )
        if isinstance(location, Mapping):
            return torch.device(location.get(str(device), device))
        if isinstance(location, str | torch.device):
            return torch.device(location)
        return torch.device(device)
