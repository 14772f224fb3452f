"""Checks of the arguments with which a pickle rebuilds tensors.

In: arguments that a peer chose. Out: the same arguments, checked, or a storage to view.
``safe_tensors`` and ``safe_nested`` call them. An ``InvalidObjectError`` means that the arguments
contradict each other, a ``LimitExceeded`` that the tensors take more than ``Limits`` allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch

from aiotorchio.common import torch_private
from aiotorchio.errors import InvalidObjectError, LimitExceeded
from aiotorchio.limits import Limits

__all__ = ["PER_BYTE", "Checks", "boolean", "expect", "part", "storage_dtype", "untyped_storage"]

_INT64_MAX = 2**63 - 1
PER_BYTE = {torch.quint4x2: 2, torch.quint2x4: 4}
"""Elements in a byte; each row of the tensor begins with a new byte."""


class Checks:
    """The checks of one load, and the work that its limits still allow.

    Args:
        limits: Limits of the load.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._work_left = limits.total_nbytes
        self._sparse_nnz = 0
        self._distrusted: set[int] = set()

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """Refuse parts that need numbers in these storages, since the numbers may change."""
        # Storages without memory all have the address 0.
        self._distrusted |= {each.data_ptr() for each in storages if each is not None} - {0}

    def charge(self, tensor: Any) -> None:
        """Count the bytes read to make a tensor from this one: a pickle can do it many times."""
        part(tensor)
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InvalidObjectError(
                f"a part of a tensor must be strided, not of layout {tensor.layout}"
            )
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > tensor.untyped_storage().nbytes():
            raise InvalidObjectError(
                f"a part of a tensor must not be expanded: it has {nbytes} bytes, but its storage "
                f"has {tensor.untyped_storage().nbytes()}"
            )
        if nbytes and tensor.untyped_storage().data_ptr() in self._distrusted:
            raise InvalidObjectError(
                "a part of a tensor, such as its indices, must have the numbers of the message, "
                "but is a target of into, or torch.serialization.skip_data left out its numbers"
            )
        self.charge_work(nbytes)

    def charge_work(self, nbytes: int) -> None:
        """Count work that takes as long as a copy of this many bytes."""
        self._work_left -= nbytes
        if self._work_left < 0:
            raise LimitExceeded(
                f"the tensors are made from more than {self.limits.total_nbytes} bytes "
                "(Limits.total_nbytes)"
            )

    def charge_sparse(self, count: int) -> None:
        """Count indices of a sparse tensor, or parts of a nested one, before they are checked."""
        # A tensor without indices or parts takes time, too.
        self._sparse_nnz += max(count, 1)
        if self._sparse_nnz > self.limits.sparse_nnz:
            raise LimitExceeded(
                f"sparse and nested tensors have {self._sparse_nnz} indices and parts, but at most "
                f"{self.limits.sparse_nnz} are allowed (Limits.sparse_nnz)"
            )

    def check_shape(self, shape: Any) -> None:
        """Refuse a value that is neither a shape nor a stride."""
        if not isinstance(shape, tuple | list) or any(type(n) is not int or n < 0 for n in shape):
            raise InvalidObjectError(
                "a shape or stride of a tensor must be a tuple of integers that are not negative"
            )
        if len(shape) > self.limits.dims:
            raise LimitExceeded(
                f"a tensor has {len(shape)} dimensions, but at most {self.limits.dims} are allowed "
                "(Limits.dims)"
            )

    def extent(
        self, dtype: torch.dtype, size: Any, stride: Any, *, limit: int | None = None
    ) -> int:
        """Return the number of elements from the first to the last of a view, both included."""
        limit = self.limits.dense_nbytes if limit is None else limit
        self.check_shape(size)
        self.check_shape(stride)
        if len(size) != len(stride):
            raise InvalidObjectError(
                f"a tensor has {len(size)} dimensions and {len(stride)} strides"
            )
        count = math.prod(size)
        if count == 0:
            return 0
        if count * dtype.itemsize > limit:
            raise LimitExceeded(
                f"a tensor has {count * dtype.itemsize} bytes when contiguous, but at most {limit} "
                "are allowed"
            )
        extent: int = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if extent * dtype.itemsize > _INT64_MAX:
            raise InvalidObjectError(
                f"a tensor has {extent * dtype.itemsize} bytes from end to end, but at most "
                f"{_INT64_MAX} are possible"
            )
        return extent

    def packed(
        self, storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.UntypedStorage:
        """Return the storage of a tensor within it whose elements are smaller than a byte."""
        untyped = untyped_storage(storage)
        self.extent(dtype, size, stride)
        # In a view, torch would count strides and offset as if each element had a byte.
        if expect(offset, int) or tuple(stride) != torch.empty(size, device="meta").stride():
            raise InvalidObjectError(
                f"a tensor of {dtype} must be contiguous and at offset 0 of its storage, not a view"
            )
        nbytes = math.prod(size[:-1]) * -(-size[-1] // PER_BYTE[dtype]) if size else 1
        if nbytes > untyped.nbytes():
            raise InvalidObjectError(
                f"a tensor takes {nbytes} bytes of a storage of {untyped.nbytes()} bytes"
            )
        return untyped

    def view(
        self, storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.UntypedStorage:
        """Return the storage of a view, which must lie within it."""
        untyped = untyped_storage(storage)
        if expect(offset, int) < 0:
            raise InvalidObjectError(
                f"the offset of a tensor in its storage must be 0 or more, not {offset}"
            )
        extent = self.extent(dtype, size, stride)
        if extent and (offset + extent) * dtype.itemsize > untyped.nbytes():
            raise InvalidObjectError(
                f"a tensor reaches byte {(offset + extent) * dtype.itemsize} "
                f"of a storage of {untyped.nbytes()} bytes"
            )
        return untyped


def expect(value: Any, *kinds: type) -> Any:
    """Return the value, which must be of one of these types."""
    if not isinstance(value, kinds):
        raise InvalidObjectError(
            f"an argument must be {' or '.join(k.__name__ for k in kinds)}, not "
            f"{type(value).__name__}"
        )
    return value


def part(value: Any) -> torch.Tensor:
    """Return a part of a tensor, which must not be of a subclass: its methods could do anything."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) and not torch_private.is_fake(value):
        raise InvalidObjectError(
            f"a part of a tensor must be a torch.Tensor, not a {type(value).__name__}"
        )
    return cast(torch.Tensor, value)


def boolean(value: Any) -> bool:
    """Return the value, which must be True or False."""
    return bool(expect(value, bool))


def untyped_storage(storage: Any) -> torch.UntypedStorage:
    """Return the storage, or the untyped storage of a typed one."""
    if isinstance(storage, torch.TypedStorage):
        return torch_private.untyped_storage_of(storage)
    untyped: torch.UntypedStorage = expect(storage, torch.UntypedStorage)
    return untyped


def storage_dtype(storage: Any) -> torch.dtype:
    """Return the dtype of a typed storage."""
    typed: torch.TypedStorage = expect(storage, torch.TypedStorage)
    return typed.dtype
