"""The payload of a message whose tensors are created one by one during the send.

In: the tensors, in the order of the header. Out: views of chunks. At most one tensor is held at a
time. The caller has checked the sizes of the tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from aiotorchio.memory.device_copy import Copier, StagingBuffers
from aiotorchio.memory.host import first_byte, view_of
from aiotorchio.memory.outgoing import NeedsDeviceCopy, needs_device_copy
from aiotorchio.memory.routes import alias

__all__ = ["StreamedPayload"]


class StreamedPayload:
    """The chunks of a payload of tensors that are sent into ``collect_views`` one by one.

    Args:
        offsets: First byte of each tensor in the payload.
        nbytes: Bytes of each tensor.
        chunk_size: Bytes of a chunk.
        copier: Copies tensors from a device.
        needs_copy: Whether memory of a device needs device copies.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        nbytes: Sequence[int],
        chunk_size: int,
        *,
        copier: Copier,
        needs_copy: NeedsDeviceCopy = needs_device_copy,
    ) -> None:
        self._offsets, self._nbytes = offsets, nbytes
        self._row = 0
        self._tensor: torch.Tensor | None = None
        self._copier = copier
        self._staging_buffers = StagingBuffers(chunk_size, copier)
        self._needs_device_copy = needs_copy

    def collect_views(
        self, start: int, length: int
    ) -> Generator[None, torch.Tensor, list[memoryview]]:
        """Make views of the next chunk.

        Yields:
            None, to receive the next tensor, which must be contiguous. That includes tensors
            without bytes, except those after the last byte of the payload.

        Returns:
            Views, which are valid until the chunk after the next is taken.
        """
        views: list[memoryview] = []
        buffer, memory = self._staging_buffers.take()
        position, taken_up_to, end = start, start, start + length
        while position < end:
            if self._tensor is None:
                self._tensor = yield
            first = self._offsets[self._row]
            last = first + self._nbytes[self._row]
            if first == last:
                self._next()
                continue
            if position < first:
                aligned = min(first, end)
                memory[position - start : aligned - start] = bytes(aligned - position)
                position = aligned
            if position == end:
                break
            part = slice(position - first, min(last, end) - first)
            following = first + part.stop
            if self._needs_device_copy(self._tensor.device):
                self._copier.copy(
                    buffer[position - start : following - start], _bytes_of(self._tensor)[part]
                )
            elif last < end:
                # A copy, so that this tensor is free before the next one is made.
                buffer[position - start : following - start] = _bytes_of(self._tensor)[part]
            else:
                views += [memory[taken_up_to - start : position - start]] * (taken_up_to < position)
                views.append(_view_of(self._tensor)[part])
                taken_up_to = following
            position = following
            if position == last:
                self._next()
        views += [memory[taken_up_to - start : end - start]] * (taken_up_to < end)
        return views

    def _next(self) -> None:
        self._tensor = None
        self._row += 1


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    nbytes = tensor.numel() * tensor.element_size()
    return alias(tensor.untyped_storage(), torch.uint8, first_byte(tensor), (nbytes,), (1,))


def _view_of(tensor: torch.Tensor) -> memoryview:
    start, nbytes = first_byte(tensor), tensor.numel() * tensor.element_size()
    return view_of(tensor.untyped_storage())[start : start + nbytes]
