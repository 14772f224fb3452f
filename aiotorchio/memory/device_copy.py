"""Copies between a device and the host through two staging buffers of host memory.

In: chunks with bytes on a device, or for a device. Out: views of host memory that a stream can send
or fill. The payloads of this package call it, in worker threads. An error comes from the device, or
from the allocation of memory.

Each chunk is copied while the chunk before it is on the wire. The host memory is that of two
chunks, for a model of any size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from aiotorchio.memory.host import view_of

__all__ = ["Copier", "DeviceCopier", "Here", "OnDevice", "StagingBuffers", "bytes_of"]


class Copier(Protocol):
    """Copies bytes between a device and staging buffers; tests replace it.

    Attributes:
        pins: Whether staging buffers are pinned: then they take all of their memory when they are
            made.
    """

    pins: bool

    def staging_buffer(self, nbytes: int) -> torch.UntypedStorage:
        """Allocate host memory from and to which the device copies at full speed."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, and return when they have arrived. May run in a worker thread."""


class Here:
    """Copies on the current stream of the thread, without waiting for the copies."""

    pins = False

    def staging_buffer(self, nbytes: int) -> torch.UntypedStorage:
        """Allocate memory of the host."""
        return torch.UntypedStorage(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy; on a device, queue the copy."""
        destination.copy_(source)


class DeviceCopier:
    """Copies on private streams, after the work that the caller's streams have queued.

    It must be created in the caller's thread: there, the current stream of a device is the one on
    which the sent tensors are computed and the received ones are used.

    Args:
        until_now: Copies wait for the work that is queued when the copier is created. Otherwise
            each copy waits for all work that is queued when the copy begins.
    """

    def __init__(self, *, until_now: bool = False) -> None:
        self._type, self._module = _accelerator_in_use()
        self._until_now = until_now
        self.pins = self._module is not None
        # Index of a device -> the events or streams that copies wait for.
        self._callers: dict[int, list[Any]] = {}
        self._streams: dict[int, Any] = {}
        self.note()

    def note(self) -> None:
        """Make copies wait for work queued so far on the current streams of this thread, too."""
        for index in _indices(self._module, in_use=self._until_now):
            stream = self._module.current_stream(index)
            awaited = stream.record_event() if self._until_now else stream
            self._callers.setdefault(index, []).append(awaited)

    def staging_buffer(self, nbytes: int) -> torch.UntypedStorage:
        """Allocate host memory; pinned if an accelerator is in use."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pins)
        return buffer.untyped_storage()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, and return when they have arrived.

        It waits for one stream only, except on a device that seemed unused.
        """
        device = source.device if destination.device.type == "cpu" else destination.device
        module = self._module
        if module is None or device.type != self._type:
            destination.copy_(source)
            return
        stream = self._streams.get(device.index)
        if stream is None:
            stream = self._streams[device.index] = module.Stream(device)
            if self._until_now and device.index not in self._callers:
                # The device seemed unused, so no event was recorded for the work queued there.
                module.synchronize(device)
        for awaited in self._callers.get(device.index, ()):
            wait = stream.wait_event if self._until_now else stream.wait_stream
            wait(awaited)
        if not self._until_now:
            # The allocator may return memory that the current stream of this thread still uses.
            stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            destination.copy_(source, non_blocking=True)
            done = stream.record_event()
        done.synchronize()


def _accelerator_in_use() -> tuple[str | None, Any]:
    """Return type and module (such as ``torch.cuda``) of the accelerator if it has streams."""
    # Before torch 2.7, a machine without an accelerator gets an error instead of None.
    if not torch.accelerator.is_available():
        return None, None
    accelerator: Any = torch.accelerator.current_accelerator()
    module = torch.get_device_module(accelerator)
    has_streams = all(hasattr(module, name) for name in ("Stream", "stream", "current_stream"))
    if not has_streams or not getattr(module, "is_initialized", module.is_available)():
        return None, None
    return accelerator.type, module


def _indices(module: Any, *, in_use: bool) -> Sequence[int]:
    """Return the indices of the devices on which work may be queued."""
    if module is None:
        return ()
    devices = range(module.device_count())
    statistics = getattr(module, "memory_stats_as_nested_dict", None)
    if statistics is None or not in_use:
        return devices
    # On a device that was never used, an event would create a context of hundreds of MiB.
    try:
        reserved = [statistics(index).get("reserved_bytes", {}).get("all", {}) for index in devices]
    except RuntimeError:  # the allocator keeps no statistics
        return devices
    return [index for index in devices if reserved[index].get("current")]


@dataclass(frozen=True, slots=True)
class OnDevice:
    """Bytes of a chunk that are on a device.

    Attributes:
        device: The device.
        nbytes: Number of bytes.
        copy: A function of a destination of ``nbytes`` bytes, on the host or that device, and of a
            copier.
    """

    device: torch.device
    nbytes: int
    copy: Callable[[torch.Tensor, Copier], None]


class StagingBuffers:
    """Two staging buffers that take turns: one is on the wire, one is being copied.

    Args:
        nbytes: Size of one staging buffer.
        copier: Allocates them.
        incoming: Whether a peer fills them. If the copier pins, the first two are ordinary memory,
            which takes only as much room as bytes arrive: until a chunk has arrived, its size is
            only a claim of the peer.
    """

    def __init__(self, nbytes: int, copier: Copier, *, incoming: bool = False) -> None:
        self._nbytes = nbytes
        self._makers = [copier.staging_buffer, copier.staging_buffer]
        if incoming and copier.pins:
            self._makers = [torch.UntypedStorage] * 2 + self._makers
        self._copier = copier
        self._staging_buffers: deque[tuple[torch.Tensor, memoryview]] = deque(maxlen=2)

    def take(self) -> tuple[torch.Tensor, memoryview]:
        """Return the older staging buffer, as a tensor of bytes and as a view of the same bytes."""
        if self._makers:
            storage = self._makers.pop(0)(self._nbytes)
            self._staging_buffers.append((bytes_of(storage), view_of(storage)))
        else:
            self._staging_buffers.rotate()
        return self._staging_buffers[-1]

    def stage(self, pieces: Sequence[memoryview | OnDevice]) -> list[memoryview]:
        """Return views of a chunk; bytes on a device are copied to a staging buffer first."""
        views: list[memoryview] = []
        buffer: tuple[torch.Tensor, memoryview] | None = None
        position = 0
        for piece in pieces:
            if isinstance(piece, memoryview):
                views.append(piece)
            else:
                buffer = buffer or self.take()
                at = slice(position, position + piece.nbytes)
                piece.copy(buffer[0][at], self._copier)
                views.append(buffer[1][at])
            position += len(views[-1])
        return views


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a storage as a tensor of its bytes, on its device."""
    # A worker thread cannot write to tensors of inference mode, in which the caller may be.
    with torch.inference_mode(False):
        tensor = torch.empty((0,), dtype=torch.uint8, device=storage.device)
        return tensor.set_(storage)
