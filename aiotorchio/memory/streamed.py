"""The payload of a message whose tensors are made while it is sent, one after the other."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from aiotorchio.memory.device_copy import Copier, Slabs
from aiotorchio.memory.host import first_byte, view_of
from aiotorchio.memory.outgoing import NeedsDeviceCopy, needs_device_copy
from aiotorchio.memory.routes import alias

__all__ = ["StreamedPayload"]


class StreamedPayload:
    """Chunks of tensors that come one by one, of which no more than one is held.

    Args:
        offsets: First byte of each tensor in the payload.
        nbytes: Bytes of each.
        chunk_size: In bytes.
        copier: For tensors on a device.
        staged: Which devices need staging; tests stage the CPU.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        nbytes: Sequence[int],
        chunk_size: int,
        *,
        copier: Copier,
        staged: NeedsDeviceCopy = needs_device_copy,
    ) -> None:
        self._offsets, self._nbytes = offsets, nbytes
        self._row = 0
        self._tensor: torch.Tensor | None = None
        self._copier = copier
        self._slabs = Slabs(chunk_size, copier)
        self._needs_staging = staged

    def chunk(self, start: int, length: int) -> Generator[None, torch.Tensor, list[memoryview]]:
        """The next chunk.

        Yields:
            Whenever it needs the next tensor; to be sent it, contiguous. Tensors without bytes
            are asked for, too, unless they are behind the last byte.

        Returns:
            Views, which hold until the chunk after the next is taken.
        """
        views: list[memoryview] = []
        slab, memory = self._slabs.take()
        position, gathered, end = start, start, start + length
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
            if self._needs_staging(self._tensor.device):
                self._copier.copy(
                    slab[position - start : following - start], _bytes_of(self._tensor)[part]
                )
            elif last < end:
                # A copy, so that this tensor is free before the next one is made.
                slab[position - start : following - start] = _bytes_of(self._tensor)[part]
            else:
                views += [memory[gathered - start : position - start]] * (gathered < position)
                views.append(_view_of(self._tensor)[part])
                gathered = following
            position = following
            if position == last:
                self._next()
        views += [memory[gathered - start : end - start]] * (gathered < end)
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
