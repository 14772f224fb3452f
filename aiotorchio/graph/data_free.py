"""Data-free loads: tensors with shapes and dtypes, without numbers.

In: the modes of the calling thread. Inside ``torch.serialization.skip_data``, ``torch.load`` makes
tensors whose memory is never written; inside a ``FakeTensorMode``, it makes tensors with a shape
and a device, and without memory. Out: a ``DataFree``, which makes such storages for a load.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.common.torch_private import active_fake_mode, fake_storage, skipped_data

__all__ = ["DataFree", "data_free"]


@dataclass(frozen=True, slots=True)
class DataFree:
    """The maker of storages for a data-free load.

    Attributes:
        fake_mode: The mode whose fake tensors are made; None: tensors with memory.
    """

    fake_mode: AbstractContextManager[Any] | None

    def storage(self, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        """Return a storage of this size."""
        if self.fake_mode is None:
            return torch.UntypedStorage(nbytes, device=device)
        return fake_storage(nbytes, device)

    def building(self) -> AbstractContextManager[Any]:
        """Return the context, for any thread, in which tensors are made over such storages."""
        return contextlib.nullcontext() if self.fake_mode is None else self.fake_mode


def data_free() -> DataFree | None:
    """Return the data-free mode of this thread; None if tensors get their numbers."""
    mode = active_fake_mode()
    if mode is None and skipped_data() is None:
        return None
    return DataFree(mode)
