"""A route takes a strided view of a storage, while its bytes arrive, into a tensor that is there.

The tensor may have another layout, dtype or device. No more of it is in flight than one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.common.strides import boxes, order_of
from aiotorchio.errors import MismatchError
from aiotorchio.memory.device_copy import Copier
from aiotorchio.memory.host import copy_bytes, first_byte, view_of

__all__ = [
    "CARRIERS",
    "Comparison",
    "Route",
    "alias",
    "copy_elements",
    "memory_of",
    "moved",
    "placement_of",
    "same_elements",
]

# What copies numbers of each size as they are. Not all dtypes can be copied as themselves.
CARRIERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}

# A part of a copy that can be interrupted between two of them: some milliseconds.
_PART_ELEMENTS = 2**20


def alias(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    """A plain tensor over memory that a parameter or a tensor of inference mode may have, too.

    It has no history, so that it can be written to in any mode.

    Raises:
        ValueError: It would reach beyond the storage, which torch would resize for it.
    """
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes():
        raise ValueError(f"a tensor beyond a storage of {storage.nbytes()} bytes")
    with torch.inference_mode(False):
        tensor = torch.empty((0,), dtype=dtype, device=storage.device)
        return tensor.set_(storage, offset, shape, stride)


def placement_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that must stay the same while others write to the memory of a tensor."""
    storage = tensor.untyped_storage()
    memory = (storage.data_ptr(), storage.nbytes(), tensor.storage_offset())
    return (*memory, tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def memory_of(tensor: torch.Tensor) -> object:
    """Equal for tensors that are one: the same numbers in the same memory, under two names."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def moved() -> MismatchError:
    """The error of a destination that is not where it was."""
    return MismatchError(
        "a destination changed its shape or its memory while its message was received"
    )


class Route:
    """From a range of the payload into one tensor.

    Args:
        storage_start: First byte, in the payload, of the storage that holds the source.
        source: The view as it is at the sender: a tensor on ``meta`` with elements, each of them
            with an address of its own (see ``Order.distinct``).
        tensor: Of the same shape, neither a conjugate nor a negative view, of elements that do
            not overlap.
        by_elements: Take them from a slab one by one, wherever they could be copied as they lie.

    Attributes:
        start: First byte of the payload that the view shows.
        end: Behind the last one.
        plain: Whether the bytes lie in the tensor as they lie in the payload.
    """

    # There may be 100,000 of them.
    __slots__ = (
        "_bytes",
        "_destination",
        "_first_byte",
        "_itemsize",
        "_order",
        "_place",
        "_source",
        "_source_dtype",
        "_storage",
        "_tensor",
        "_view",
        "end",
        "is_contiguous",
        "start",
    )

    def __init__(
        self,
        storage_start: int,
        source: torch.Tensor,
        tensor: torch.Tensor,
        *,
        by_elements: bool = False,
    ) -> None:
        self._order = order = order_of(source.shape, source.stride())
        self._source = source
        self._itemsize = source.element_size()
        self.start = storage_start + first_byte(source)
        self.end = self.start + order.extent * self._itemsize
        self._tensor = tensor
        self._place = placement_of(tensor)
        self._storage = tensor.untyped_storage()
        same_numbers = source.dtype == tensor.dtype and not source.is_conj() and not source.is_neg()
        self.is_contiguous = (
            same_numbers
            and not by_elements
            and order.dense
            and [tensor.stride(dim) for dim in order.dims] == order.stride
        )
        self._first_byte = first_byte(tensor)
        self._view: memoryview | None = None
        self._bytes: torch.Tensor | None = None
        if self.is_contiguous:
            return
        carrier = CARRIERS[self._itemsize]
        self._source_dtype = carrier if same_numbers else source.dtype
        # Dimensions in the order of the addresses at the sender, so that a range of bytes is a
        # range of elements in row-major order.
        dims = [*order.dims, *order.expanded]
        self._destination = alias(
            self._storage,
            carrier if same_numbers else tensor.dtype,
            int(tensor.storage_offset()),
            [tensor.size(dim) for dim in dims],
            [tensor.stride(dim) for dim in dims],
        )

    @property
    def device(self) -> torch.device:
        """Of the tensor."""
        return self._tensor.device

    @property
    def key(self) -> object:
        """What is equal for two routes of which one is enough: tied parameters at both ends."""
        source = self._source
        layout = (source.dtype, source.shape, source.stride(), source.is_conj(), source.is_neg())
        return self.start, layout, self._place

    def check(self) -> None:
        """Make sure that the tensor still is where it was.

        Raises:
            MismatchError: It has another shape, dtype or memory.
        """
        if placement_of(self._tensor) != self._place:
            raise moved()

    def view(self, start: int, end: int) -> memoryview:
        """The memory of a plain tensor on the host for a range of the payload."""
        if self._view is None:
            whole = view_of(self._storage)
            self._view = whole[self._first_byte : self._first_byte + self.end - self.start]
        return self._view[start - self.start : end - self.start]

    def take(self, slab: torch.Tensor, slab_start: int, copier: Copier | None) -> None:
        """Copy what a slab holds for this tensor.

        Args:
            slab: Bytes of the payload, on the host, with a storage of their own.
            slab_start: The first of them.
            copier: For a tensor on a device; None for the host.
        """
        start = max(self.start, slab_start)
        end = min(self.end, slab_start + len(slab))
        if not self.is_contiguous:
            self._take_elements(slab, slab_start, start, end, copier)
        elif copier is None:
            # Two slices and a copy_() would take ten times as long for a tensor of 4 KiB.
            copy_bytes(
                self._storage.data_ptr() + self._first_byte + start - self.start,
                slab.data_ptr() + start - slab_start,
                end - start,
            )
        else:
            if self._bytes is None:
                shape = (self.end - self.start,)
                self._bytes = alias(self._storage, torch.uint8, self._first_byte, shape, (1,))
            copier.copy(
                self._bytes[start - self.start : end - self.start],
                slab[start - slab_start : end - slab_start],
            )

    def _take_elements(
        self, slab: torch.Tensor, slab_start: int, start: int, end: int, copier: Copier | None
    ) -> None:
        order, tensor = self._order, self._tensor
        # Chunks end at multiples of 64 bytes: no element is cut.
        first = order.before((start - self.start) // self._itemsize)
        last = order.before((end - self.start) // self._itemsize)
        expanded = [tensor.size(dim) for dim in order.expanded]
        for box in boxes(order.shape, first, last):
            corner = sum(part.start * step for part, step in zip(box, order.stride, strict=True))
            source = alias(
                slab.untyped_storage(),
                self._source_dtype,
                (self.start - slab_start) // self._itemsize + corner,
                [part.stop - part.start for part in box] + expanded,
                order.stride + [0] * len(expanded),
            )
            self._put(self._destination[box], _like(self._source, source), copier)

    def _put(self, destination: torch.Tensor, source: torch.Tensor, copier: Copier | None) -> None:
        _copy(destination, source, copier)


class Comparison(Route):
    """Compares elements with those that an earlier route has put into the same tensor.

    It copies nothing, and takes no memory, but for other dtypes and devices: then that of the
    elements of one chunk in the dtype of the tensor.

    Args:
        storage_start: As of a ``Route``.
        source: Likewise. It begins after the end of that of the earlier route.
        tensor: As of a ``Route``.
        differ: Makes the error for other elements.
    """

    __slots__ = ("_differ",)

    def __init__(
        self,
        storage_start: int,
        source: torch.Tensor,
        tensor: torch.Tensor,
        differ: Callable[[], Exception],
    ) -> None:
        super().__init__(storage_start, source, tensor, by_elements=True)
        self._differ = differ

    def _put(self, destination: torch.Tensor, source: torch.Tensor, copier: Copier | None) -> None:
        if not _is_same(destination, source, copier):
            raise self._differ()


def _copy(destination: torch.Tensor, source: torch.Tensor, copier: Copier | None) -> None:
    if copier is None:
        destination.copy_(source)
    else:
        copier.copy(destination, source)


def _is_same(destination: torch.Tensor, source: torch.Tensor, copier: Copier | None) -> bool:
    """Whether a copy of the source would change no bit of the destination."""
    converted = source.dtype != destination.dtype or source.is_conj() or source.is_neg()
    if converted or source.device != destination.device:
        # As the copy would do it: torch converts in more than one way.
        copied = torch.empty(destination.shape, dtype=destination.dtype, device=destination.device)
        _copy(copied, source, copier)
        source = copied
    if torch.equal(_bits(destination), _bits(source)):
        return True
    if not converted or not (destination.is_floating_point() or destination.is_complex()):
        return False
    # Where a conversion meets NaN, its bits depend on what lies next to it.
    one, two = (
        torch.view_as_real(each)
        if each.is_complex()
        else each.to(torch.promote_types(each.dtype, torch.float32))
        for each in (destination, source)
    )
    return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as integers, which are equal if their bits are."""
    storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
    carrier = CARRIERS[tensor.element_size()]
    if not carrier.is_complex:
        return alias(storage, carrier, offset, tensor.shape, tensor.stride())
    halves = [2 * step for step in tensor.stride()]
    return alias(storage, torch.int64, 2 * offset, (*tensor.shape, 2), (*halves, 1))


def copy_elements(destination: torch.Tensor, source: torch.Tensor, copier: Copier) -> None:
    """Copy into a tensor of the caller's, which may be a parameter, or of inference mode."""
    for part, same_part in _in_parts(*_carried(destination, source)):
        check_interrupt()
        copier.copy(part, same_part)


def same_elements(destination: torch.Tensor, source: torch.Tensor, copier: Copier) -> bool:
    """Whether ``copy_elements`` would change no bit."""
    for part, same_part in _in_parts(*_carried(destination, source)):
        check_interrupt()
        if not _is_same(part, same_part, copier):
            return False
    return True


def _carried(destination: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without history, and as numbers that can be copied as they are, if they stay so."""
    same_numbers = (
        source.dtype == destination.dtype and not source.is_conj() and not source.is_neg()
    )
    if same_numbers:
        carrier = CARRIERS[source.element_size()]
        return _alias_of(destination, carrier), _alias_of(source, carrier)
    numbers = _like(source, _alias_of(source, source.dtype))
    return _alias_of(destination, destination.dtype), numbers


def _in_parts(one: torch.Tensor, two: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors of one shape, cut alike into parts that are copied in some milliseconds."""
    if one.numel() <= _PART_ELEMENTS:
        yield one, two
        return
    # Of the widest dimension, as many at a time as make a part.
    dim = max(range(one.dim()), key=one.size)
    width = max(_PART_ELEMENTS * one.size(dim) // one.numel(), 1)
    for pair in zip(one.split(width, dim), two.split(width, dim), strict=True):
        yield from _in_parts(*pair)


def _like(view: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Stored numbers as a view means them: its conjugates, its negatives."""
    numbers = numbers.conj() if view.is_conj() else numbers
    return numbers.neg() if view.is_neg() else numbers


def _alias_of(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    offset = int(tensor.storage_offset())
    return alias(tensor.untyped_storage(), dtype, offset, tensor.shape, tensor.stride())
