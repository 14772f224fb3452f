"""Elements of a strided view in the order of their addresses, without what lies between them."""

from __future__ import annotations

import torch

from aiotorchio.common.strides import Part, boxes
from aiotorchio.memory.device_copy import Copier
from aiotorchio.memory.routes import CARRIERS, alias

__all__ = ["Gathered"]


class Gathered:
    """Copies ranges of such bytes out of a storage.

    Args:
        storage: Holds the elements.
        part: Which they are.
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
        """Copy a range.

        Args:
            destination: As many bytes, contiguous, on the host or the device of the storage.
            first: First byte of the range; no element is cut.
            last: Behind the last one.
            copier: Does it.
        """
        itemsize, dtype = self._part.itemsize, self._elements.dtype
        at = int(destination.storage_offset()) // itemsize
        for box in boxes(self._part.shape, first // itemsize, last // itemsize):
            source = self._elements[box]
            # A box is a run of elements, so it is contiguous where it goes.
            run = alias(destination.untyped_storage(), dtype, at, (source.numel(),), (1,))
            copier.copy(run.view(source.shape), source)
            at += source.numel()
