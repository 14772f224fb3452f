"""A route takes a strided view of a storage, while its bytes arrive, into a tensor that is there.

The tensor may have another layout, dtype or device. No more of it is in flight than one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from aiotorchio.errors import MismatchError
from aiotorchio.interrupt import check_interrupt
from aiotorchio.memory.host import copy_bytes, first_byte, view_of
from aiotorchio.memory.staging import Copier
from aiotorchio.strided import boxes, order_of

__all__ = ["CARRIERS", "Route", "alias", "copy_elements", "moved", "place_of"]

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


def place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that must stay the same while others write to the memory of a tensor."""
    storage = tensor.untyped_storage()
    memory = (storage.data_ptr(), storage.nbytes(), tensor.storage_offset())
    return (*memory, tensor.device, tensor.dtype, tensor.shape, tensor.stride())


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
        "plain",
        "start",
    )

    def __init__(self, storage_start: int, source: torch.Tensor, tensor: torch.Tensor) -> None:
        self._order = order = order_of(source.shape, source.stride())
        self._source = source
        self._itemsize = source.element_size()
        self.start = storage_start + first_byte(source)
        self.end = self.start + order.extent * self._itemsize
        self._tensor = tensor
        self._place = place_of(tensor)
        self._storage = tensor.untyped_storage()
        same_numbers = source.dtype == tensor.dtype and not source.is_conj() and not source.is_neg()
        self.plain = (
            same_numbers
            and order.dense
            and [tensor.stride(dim) for dim in order.dims] == order.stride
        )
        self._first_byte = first_byte(tensor)
        self._view: memoryview | None = None
        self._bytes: torch.Tensor | None = None
        if self.plain:
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
        if place_of(self._tensor) != self._place:
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
        if not self.plain:
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
            source = _like(self._source, source)
            if copier is None:
                self._destination[box].copy_(source)
            else:
                copier.copy(self._destination[box], source)


def copy_elements(destination: torch.Tensor, source: torch.Tensor, copier: Copier) -> None:
    """Copy into a tensor of the caller's, which may be a parameter, or of inference mode."""
    same_numbers = (
        source.dtype == destination.dtype and not source.is_conj() and not source.is_neg()
    )
    if same_numbers:
        carrier = CARRIERS[source.element_size()]
        destination, numbers = _alias_of(destination, carrier), _alias_of(source, carrier)
    else:
        numbers = _like(source, _alias_of(source, source.dtype))
        destination = _alias_of(destination, destination.dtype)
    for part, same_part in _in_parts(destination, numbers):
        check_interrupt()
        copier.copy(part, same_part)


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
