"""Copies of the elements of a strided view, without the bytes between them.

In: a storage and a ``Part`` of it. Out: ranges of the elements as contiguous bytes, in the order of
their addresses. ``OutgoingPayload`` calls it for storages of which it sends only parts.
"""

from __future__ import annotations

import torch

from aiotorchio.common.strides import Part, boxes
from aiotorchio.memory.device_copy import Copier
from aiotorchio.memory.routes import CARRIERS, alias

__all__ = ["Gathered"]


class Gathered:
    """Gathers the elements of a part of a storage.

    Args:
        storage: The storage that holds the elements.
        part: The elements to gather.
    """

    def __init__(self, storage: torch.UntypedStorage, part: Part) -> None:
        self._part = part
        self._elements = alias(
            storage,
            CARRIERS[part.itemsize],
            part.start // part.itemsize,
            part.shape,
            part.stride,
        )

    def copy(self, destination: torch.Tensor, first: int, last: int, copier: Copier) -> None:
        """Copy a range of the gathered bytes.

        Args:
            destination: ``last - first`` contiguous bytes, on the host or on the storage's device.
            first: First byte of the range; it begins and ends between two elements.
            last: First byte after the range.
            copier: Copies the bytes.
        """
        itemsize, dtype = self._part.itemsize, self._elements.dtype
        at = int(destination.storage_offset()) // itemsize
        for box in boxes(self._part.shape, first // itemsize, last // itemsize):
            source = self._elements[box]
            # A box is a run of elements, so it is contiguous in the destination.
            run = alias(destination.untyped_storage(), dtype, at, (source.numel(),), (1,))
            copier.copy(run.view(source.shape), source)
            at += source.numel()
