"""Loads that give tensors without their numbers.

``torch.load`` gives such tensors inside of ``torch.serialization.skip_data``, whose memory nobody
writes, and of a ``FakeTensorMode``, whose tensors have a shape, a device, and no memory.
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
    """What takes the place of storages that are not received.

    Attributes:
        fake_mode: Whose tensors are made; None: tensors with memory.
    """

    fake_mode: AbstractContextManager[Any] | None

    def storage(self, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        """One storage."""
        if self.fake_mode is None:
            return torch.UntypedStorage(nbytes, device=device)
        return fake_storage(nbytes, device)

    def building(self) -> AbstractContextManager[Any]:
        """To be held, in whatever thread, while tensors are made over such storages."""
        return contextlib.nullcontext() if self.fake_mode is None else self.fake_mode


def data_free() -> DataFree | None:
    """What this thread has asked for; None: tensors with their numbers."""
    mode = active_fake_mode()
    if mode is None and skipped_data() is None:
        return None
    return DataFree(mode)
