"""Device <-> host through a few slabs of host memory, so that no copy of the model is made.

Memory of a device is never sent or received itself: each chunk goes through a slab, in a worker
thread, while the chunk before it is on the wire. With two slabs in turn that takes two chunks of
host memory, whatever the size of the model.
"""

from __future__ import annotations

from typing import Protocol

import torch

from aiotorchio.memory.host import view_of

__all__ = ["Copier", "DeviceCopier", "Slabs", "bytes_of"]


class Copier(Protocol):
    """Moves bytes between a device and slabs; tests put one of their own in its place."""

    def slab(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory that the device copies from and to at full speed."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, and return when they have arrived. May run in a worker thread."""


class DeviceCopier:
    """Copies on streams of its own, behind what the caller's streams have queued so far.

    To be made in the caller's thread: there, the current stream of a device is the one on which
    the tensors to be sent were computed.
    """

    def __init__(self) -> None:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        self._callers_streams = {device: torch.cuda.current_stream(device) for device in devices}
        self._streams: dict[int, torch.cuda.Stream] = {}

    def slab(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory; pinned if CUDA is in use."""
        slab = torch.empty(
            nbytes, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_initialized()
        )
        return slab.untyped_storage()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, and return when they have arrived; no more than one stream is waited for."""
        device = source.device if destination.device.type == "cpu" else destination.device
        if device.type != "cuda":
            destination.copy_(source)
            return
        stream = self._streams.get(device.index)
        if stream is None:
            stream = self._streams[device.index] = torch.cuda.Stream(device)
        # The allocator may hand out memory that the caller's stream still uses, or the one of the
        # thread that it was made in.
        stream.wait_stream(torch.cuda.current_stream(device))
        if device.index in self._callers_streams:
            stream.wait_stream(self._callers_streams[device.index])
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)
            done = stream.record_event()
        done.synchronize()


class Slabs:
    """Two slabs in turn: one on the wire, one being copied.

    Args:
        nbytes: Size of one slab.
        copier: Makes them.
    """

    def __init__(self, nbytes: int, copier: Copier) -> None:
        self._nbytes = nbytes
        self._copier = copier
        self._slabs: list[tuple[torch.Tensor, memoryview]] = []
        self._turn = 0

    def take(self) -> tuple[torch.Tensor, memoryview]:
        """The slab that was taken longest ago, as a tensor of bytes and as a view of them."""
        if len(self._slabs) < 2:
            storage = self._copier.slab(self._nbytes)
            self._slabs.append((bytes_of(storage), view_of(storage)))
            return self._slabs[-1]
        self._turn = 1 - self._turn
        return self._slabs[1 - self._turn]


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a tensor of its bytes, on its device."""
    # The caller may be in inference mode, whose tensors a worker thread could not write to.
    with torch.inference_mode(False):
        tensor = torch.empty((0,), dtype=torch.uint8, device=storage.device)
        return tensor.set_(storage)
