"""Routes: ranges of the payload that go into existing tensors, chunk by chunk.

In: a strided view of a storage as the sender has it, and a tensor that may have another layout,
dtype or device. Out: the memory of that tensor, to receive into before the digest of a chunk is
compared; or the elements in it, copied from a staging buffer afterwards. ``IncomingPayload`` calls
the routes. A ``MismatchError`` means that the caller changed the tensor during the load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.common.strides import boxes, order_of
from aiotorchio.memory.device_copy import Copier
from aiotorchio.memory.host import copy_bytes, first_byte, view_of
from aiotorchio.memory.memory_state import has_state, memory_state, moved

__all__ = [
    "CARRIERS",
    "Comparison",
    "Route",
    "alias",
    "copy_elements",
    "same_elements",
]

# For each size, a dtype to copy numbers bit by bit: torch cannot copy some dtypes.
CARRIERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}

# Elements between two checks for an interrupt: some milliseconds.
_PART_ELEMENTS = 2**20


def alias(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    """Make a tensor without autograd history over the memory of a storage.

    It can be written to in any mode, even if the memory is that of a parameter or of a tensor of
    inference mode.

    Raises:
        ValueError: The tensor would reach beyond the storage, which torch would then resize.
    """
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes():
        raise ValueError(
            f"a tensor reaches byte {(last + 1) * dtype.itemsize}, beyond a storage of "
            f"{storage.nbytes()} bytes"
        )
    with torch.inference_mode(False):
        tensor = torch.empty((0,), dtype=dtype, device=storage.device)
        return tensor.set_(storage, offset, shape, stride)


class Route:
    """A copy from a range of the payload into one tensor.

    Args:
        storage_start: First byte, in the payload, of the storage that holds the source.
        source: The view as the sender has it: a tensor on ``meta`` with at least one element, and
            with distinct addresses (see ``Order.distinct``).
        tensor: The target: a tensor of the same shape, neither a conjugate nor a negative view,
            whose elements do not overlap.
        by_elements: Copy single elements, even where whole ranges could be copied.

    Attributes:
        start: First byte of the payload that the view shows.
        end: First byte of the payload after the view.
        is_contiguous: Whether the bytes have the same order in the tensor and in the payload.
    """

    # There may be 100,000 routes.
    __slots__ = (
        "_bytes",
        "_destination",
        "_first_byte",
        "_itemsize",
        "_memory_state",
        "_order",
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
        self._memory_state = memory_state(tensor)
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
        """The device of the tensor."""
        return self._tensor.device

    @property
    def key(self) -> object:
        """A key that is equal for routes with the same source and target: tied tensors."""
        source = self._source
        layout = (source.dtype, source.shape, source.stride(), source.is_conj(), source.is_neg())
        return self.start, layout, self._memory_state

    def check(self) -> None:
        """Check that the tensor has not changed.

        Raises:
            MismatchError: It has another shape, dtype or memory.
        """
        if not has_state(self._tensor, self._memory_state):
            raise moved()

    def checked_view(self, start: int, end: int) -> memoryview:
        """Return the memory for a range of the payload, in a contiguous target on the host.

        Raises:
            MismatchError: The tensor has changed; see ``check``.
        """
        self.check()
        if self._view is None:
            whole = view_of(self._storage)
            self._view = whole[self._first_byte : self._first_byte + self.end - self.start]
        return self._view[start - self.start : end - self.start]

    def take(self, buffer: torch.Tensor, buffer_start: int, copier: Copier | None) -> None:
        """Copy the bytes for this tensor from a staging buffer.

        Args:
            buffer: Bytes of the payload: a tensor on the host that begins at the first byte of
                its own storage.
            buffer_start: Offset of the first of them in the payload.
            copier: Copies to a tensor on a device; None for the host.
        """
        start = max(self.start, buffer_start)
        end = min(self.end, buffer_start + len(buffer))
        if not self.is_contiguous:
            self._take_elements(buffer, buffer_start, start, end, copier)
        elif copier is None:
            # Two slices and a copy_() would take ten times as long for a tensor of 4 KiB.
            copy_bytes(
                self._storage.data_ptr() + self._first_byte + start - self.start,
                buffer.data_ptr() + start - buffer_start,
                end - start,
            )
        else:
            if self._bytes is None:
                shape = (self.end - self.start,)
                self._bytes = alias(self._storage, torch.uint8, self._first_byte, shape, (1,))
            copier.copy(
                self._bytes[start - self.start : end - self.start],
                buffer[start - buffer_start : end - buffer_start],
            )

    def _take_elements(
        self, buffer: torch.Tensor, buffer_start: int, start: int, end: int, copier: Copier | None
    ) -> None:
        order, tensor = self._order, self._tensor
        # Chunks end at multiples of 64 bytes: no element is cut.
        first = order.before((start - self.start) // self._itemsize)
        last = order.before((end - self.start) // self._itemsize)
        expanded = [tensor.size(dim) for dim in order.expanded]
        for box in boxes(order.shape, first, last):
            corner = sum(part.start * step for part, step in zip(box, order.stride, strict=True))
            source = alias(
                buffer.untyped_storage(),
                self._source_dtype,
                (self.start - buffer_start) // self._itemsize + corner,
                [part.stop - part.start for part in box] + expanded,
                order.stride + [0] * len(expanded),
            )
            self._put(self._destination[box], _like(self._source, source), copier)

    def _put(self, destination: torch.Tensor, source: torch.Tensor, copier: Copier | None) -> None:
        _copy(destination, source, copier)


class Comparison(Route):
    """A comparison with the elements that an earlier route has copied into the same tensor.

    It copies nothing, and takes memory only to convert the elements of one chunk to another dtype
    or device.

    Args:
        storage_start: As for ``Route``.
        source: As for ``Route``; it begins after the end of the earlier route's source.
        tensor: As for ``Route``.
        differ: Makes the error for different elements.
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
        # A real copy, since torch converts in more than one way.
        copied = torch.empty(destination.shape, dtype=destination.dtype, device=destination.device)
        _copy(copied, source, copier)
        source = copied
    if torch.equal(_bits(destination), _bits(source)):
        return True
    if not converted or not (destination.is_floating_point() or destination.is_complex()):
        return False
    # The bits of a converted NaN depend on the neighbouring elements.
    one, two = (
        torch.view_as_real(each)
        if each.is_complex()
        else each.to(torch.promote_types(each.dtype, torch.float32))
        for each in (destination, source)
    )
    return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as integers."""
    storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
    carrier = CARRIERS[tensor.element_size()]
    if not carrier.is_complex:
        return alias(storage, carrier, offset, tensor.shape, tensor.stride())
    halves = [2 * step for step in tensor.stride()]
    return alias(storage, torch.int64, 2 * offset, (*tensor.shape, 2), (*halves, 1))


def copy_elements(destination: torch.Tensor, source: torch.Tensor, copier: Copier) -> None:
    """Copy into any tensor: a parameter and a tensor of inference mode, too."""
    for part, same_part in _in_parts(*_carried(destination, source)):
        check_interrupt()
        copier.copy(part, same_part)


def same_elements(destination: torch.Tensor, source: torch.Tensor, copier: Copier) -> bool:
    """Whether ``copy_elements`` would leave every bit unchanged."""
    for part, same_part in _in_parts(*_carried(destination, source)):
        check_interrupt()
        if not _is_same(part, same_part, copier):
            return False
    return True


def _carried(destination: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both without autograd history; without a conversion, as carriers of the same size."""
    same_numbers = (
        source.dtype == destination.dtype and not source.is_conj() and not source.is_neg()
    )
    if same_numbers:
        carrier = CARRIERS[source.element_size()]
        return _alias_of(destination, carrier), _alias_of(source, carrier)
    numbers = _like(source, _alias_of(source, source.dtype))
    return _alias_of(destination, destination.dtype), numbers


def _in_parts(one: torch.Tensor, two: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut two tensors of one shape into equal parts that are copied in some milliseconds."""
    if one.numel() <= _PART_ELEMENTS:
        yield one, two
        return
    # The cuts go along the longest dimension, with as many indices as fill a part.
    dim = max(range(one.dim()), key=one.size)
    width = max(_PART_ELEMENTS * one.size(dim) // one.numel(), 1)
    for pair in zip(one.split(width, dim), two.split(width, dim), strict=True):
        yield from _in_parts(*pair)


def _like(view: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Apply the conjugation and the negation of a view to stored numbers."""
    numbers = numbers.conj() if view.is_conj() else numbers
    return numbers.neg() if view.is_neg() else numbers


def _alias_of(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    offset = int(tensor.storage_offset())
    return alias(tensor.untyped_storage(), dtype, offset, tensor.shape, tensor.stride())
