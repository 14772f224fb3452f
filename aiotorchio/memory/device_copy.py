"""Device <-> host through a few slabs of host memory, so that no copy of the model is made.

Memory of a device is never sent or received itself: each chunk goes through a slab, in a worker
thread, while the chunk before it is on the wire. With two slabs in turn that takes two chunks of
host memory, whatever the size of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from aiotorchio.memory.host import view_of

__all__ = ["Copier", "DeviceCopier", "Here", "OnDevice", "Slabs", "bytes_of"]


class Copier(Protocol):
    """Moves bytes between a device and slabs; tests put one of their own in its place.

    Attributes:
        pins: Whether slabs are pinned, so that all of their memory is taken when they are made.
    """

    pins: bool

    def slab(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory that the device copies from and to at full speed."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, and return when they have arrived. May run in a worker thread."""


class Here:
    """Copies on the current stream of its thread, and waits for nothing."""

    pins = False

    def slab(self, nbytes: int) -> torch.UntypedStorage:
        """Memory of the host."""
        return torch.UntypedStorage(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy, on a device when its turn has come."""
        destination.copy_(source)


class DeviceCopier:
    """Copies on streams of its own, behind what the caller's streams have queued.

    To be made in the caller's thread: there, the current stream of a device is the one on which
    the tensors to be sent are computed, and those received are used.

    Args:
        until_now: Wait for what is queued when this is made. Otherwise each copy waits for all
            that is queued when it is made.
    """

    def __init__(self, *, until_now: bool = False) -> None:
        self._type, self._module = _accelerator_in_use()
        self._until_now = until_now
        self.pins = self._module is not None
        # What the copies wait for: events, or streams.
        self._callers: dict[int, list[Any]] = {}
        self._streams: dict[int, Any] = {}
        self.note()

    def note(self) -> None:
        """Wait, too, for what the current streams of this thread have queued by now."""
        for index in _indices(self._module, in_use=self._until_now):
            stream = self._module.current_stream(index)
            awaited = stream.record_event() if self._until_now else stream
            self._callers.setdefault(index, []).append(awaited)

    def slab(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory; pinned if an accelerator is in use."""
        slab = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pins)
        return slab.untyped_storage()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes, and return when they have arrived.

        No more than one stream is waited for, but for a device that nobody seemed to use.
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
                # It did not look like one in use: nothing is known of what is queued there.
                module.synchronize(device)
        for awaited in self._callers.get(device.index, ()):
            wait = stream.wait_event if self._until_now else stream.wait_stream
            wait(awaited)
        if not self._until_now:
            # The allocator may hand out memory that the stream of the thread that it was made in
            # still uses.
            stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            destination.copy_(source, non_blocking=True)
            done = stream.record_event()
        done.synchronize()


def _accelerator_in_use() -> tuple[str | None, Any]:
    """Its type and its module, such as ``torch.cuda``; None if there are no streams to care for."""
    # Before torch 2.7, there is an error instead of None where there is no accelerator.
    if not torch.accelerator.is_available():
        return None, None
    accelerator: Any = torch.accelerator.current_accelerator()
    module = torch.get_device_module(accelerator)
    has_streams = all(hasattr(module, name) for name in ("Stream", "stream", "current_stream"))
    if not has_streams or not getattr(module, "is_initialized", module.is_available)():
        return None, None
    return accelerator.type, module


def _indices(module: Any, *, in_use: bool) -> Sequence[int]:
    """Devices on which something may be queued."""
    if module is None:
        return ()
    devices = range(module.device_count())
    statistics = getattr(module, "memory_stats_as_nested_dict", None)
    if statistics is None or not in_use:
        return devices
    # An event would make a context, of hundreds of MiB, on a device that was never used.
    try:
        reserved = [statistics(index).get("reserved_bytes", {}).get("all", {}) for index in devices]
    except RuntimeError:  # of an allocator that keeps no statistics
        return devices
    return [index for index in devices if reserved[index].get("current")]


@dataclass(frozen=True, slots=True)
class OnDevice:
    """Bytes of a chunk that are on a device.

    Attributes:
        device: Where.
        nbytes: How many.
        copy: Called with as many bytes of memory, on the host or that device, and a copier.
    """

    device: torch.device
    nbytes: int
    copy: Callable[[torch.Tensor, Copier], None]


class Slabs:
    """Two slabs in turn: one on the wire, one being copied.

    Args:
        nbytes: Size of one slab.
        copier: Makes them.
        incoming: A peer fills them. Where slabs are pinned, each is ordinary memory in its first
            turn, which takes no more room than bytes arrive in it: the size of a chunk is nothing
            but the claim of the peer until one has arrived.
    """

    def __init__(self, nbytes: int, copier: Copier, *, incoming: bool = False) -> None:
        self._nbytes = nbytes
        self._makers = [copier.slab, copier.slab]
        if incoming and copier.pins:
            self._makers = [torch.UntypedStorage] * 2 + self._makers
        self._copier = copier
        self._slabs: deque[tuple[torch.Tensor, memoryview]] = deque(maxlen=2)

    def take(self) -> tuple[torch.Tensor, memoryview]:
        """The slab that was taken longest ago, as a tensor of bytes and as a view of them."""
        if self._makers:
            storage = self._makers.pop(0)(self._nbytes)
            self._slabs.append((bytes_of(storage), view_of(storage)))
        else:
            self._slabs.rotate()
        return self._slabs[-1]

    def stage(self, pieces: Sequence[memoryview | OnDevice]) -> list[memoryview]:
        """Views of a chunk; what is on a device is copied to the next slab first."""
        views: list[memoryview] = []
        slab: tuple[torch.Tensor, memoryview] | None = None
        position = 0
        for piece in pieces:
            if isinstance(piece, memoryview):
                views.append(piece)
            else:
                slab = slab or self.take()
                at = slice(position, position + piece.nbytes)
                piece.copy(slab[0][at], self._copier)
                views.append(slab[1][at])
            position += len(views[-1])
        return views


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a tensor of its bytes, on its device."""
    # The caller may be in inference mode, whose tensors a worker thread could not write to.
    with torch.inference_mode(False):
        tensor = torch.empty((0,), dtype=torch.uint8, device=storage.device)
        return tensor.set_(storage)
