"""What the arguments of the functions that rebuild tensors must be.

All of these raise ``InvalidObjectError``, or ``LimitExceeded``.
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
"""Elements in a byte; each row begins with a byte of its own."""


class Checks:
    """Looks at those of one load.

    Args:
        limits: Bounds for what is made.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._work_left = limits.total_nbytes
        self._sparse_nnz = 0
        self._distrusted: set[int] = set()

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """Trust no number in these, too: they may have others at any time."""
        # Those without memory are all at 0.
        self._distrusted |= {each.data_ptr() for each in storages if each is not None} - {0}

    def charge(self, tensor: Any) -> None:
        """Count what is read or copied to make a tensor: a pickle can make the same one often."""
        part(tensor)
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
        self.charge_work(nbytes)

    def charge_work(self, nbytes: int) -> None:
        """Count work that takes as long as copying so many bytes."""
        self._work_left -= nbytes
        if self._work_left < 0:
            raise LimitExceeded(f"tensors are made from more than {self.limits.total_nbytes} bytes")

    def charge_sparse(self, count: int) -> None:
        """Count indices of a sparse tensor, or parts of a nested one, before they are checked."""
        # A tensor without any takes time, too.
        self._sparse_nnz += max(count, 1)
        if self._sparse_nnz > self.limits.sparse_nnz:
            raise LimitExceeded(
                f"sparse and nested tensors of {self._sparse_nnz} indices and parts, "
                f"{self.limits.sparse_nnz} allowed (Limits.sparse_nnz)"
            )

    def check_shape(self, shape: Any) -> None:
        """Refuse what is no shape, or no stride."""
        if not isinstance(shape, tuple | list) or any(type(n) is not int or n < 0 for n in shape):
            raise InvalidObjectError("a shape or stride that is no tuple of natural numbers")
        if len(shape) > self.limits.dims:
            raise LimitExceeded(f"{len(shape)} dimensions, {self.limits.dims} allowed")

    def span(self, dtype: torch.dtype, size: Any, stride: Any, *, limit: int | None = None) -> int:
        """Elements from the first to the last of a view, both included."""
        limit = self.limits.dense_nbytes if limit is None else limit
        self.check_shape(size)
        self.check_shape(stride)
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

    def packed(
        self, storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.UntypedStorage:
        """The storage of a tensor whose elements are smaller than a byte, likewise."""
        untyped = untyped_storage(storage)
        self.span(dtype, size, stride)
        # Of a view, torch's stride and offset would count a byte for each element.
        if expect(offset, int) or tuple(stride) != torch.empty(size, device="meta").stride():
            raise InvalidObjectError(f"a view of a tensor of {dtype}")
        nbytes = math.prod(size[:-1]) * -(-size[-1] // PER_BYTE[dtype]) if size else 1
        if nbytes > untyped.nbytes():
            raise InvalidObjectError(
                f"a tensor of {nbytes} bytes over a storage of {untyped.nbytes()}"
            )
        return untyped

    def view(
        self, storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any
    ) -> torch.UntypedStorage:
        """The storage of a view that lies within it."""
        untyped = untyped_storage(storage)
        if expect(offset, int) < 0:
            raise InvalidObjectError(f"a tensor at offset {offset}")
        span = self.span(dtype, size, stride)
        if span and (offset + span) * dtype.itemsize > untyped.nbytes():
            raise InvalidObjectError(
                f"a tensor reaches byte {(offset + span) * dtype.itemsize} "
                f"of a storage of {untyped.nbytes()}"
            )
        return untyped


def expect(value: Any, *kinds: type) -> Any:
    """The value, if it is of one of these kinds."""
    if not isinstance(value, kinds):
        raise InvalidObjectError(
            f"{type(value).__name__} where {' or '.join(k.__name__ for k in kinds)} must be"
        )
    return value


def part(value: Any) -> torch.Tensor:
    """A part that a tensor is made of; the methods of a subclass could tell anything about it."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) and not torch_private.is_fake(value):
        raise InvalidObjectError(f"a part of a tensor that is a {type(value).__name__}")
    return cast(torch.Tensor, value)


def boolean(value: Any) -> bool:
    """The value, if it is True or False."""
    return bool(expect(value, bool))


def untyped_storage(storage: Any) -> torch.UntypedStorage:
    """The storage, or the untyped one in it."""
    if isinstance(storage, torch.TypedStorage):
        return torch_private.untyped_storage_of(storage)
    untyped: torch.UntypedStorage = expect(storage, torch.UntypedStorage)
    return untyped


def storage_dtype(storage: Any) -> torch.dtype:
    """What the numbers of a typed storage are."""
    typed: torch.TypedStorage = expect(storage, torch.TypedStorage)
    return typed.dtype
