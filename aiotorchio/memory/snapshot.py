"""A copy of a payload at one moment, so that the caller can change the tensors during the send.

In: an ``OutgoingPayload``. Out: its chunks, from a copy of the whole payload: bytes on the host are
copied on the host, bytes on a device on that device. Each chunk is freed after it was sent.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from aiotorchio.memory.device_copy import Copier, Here, OnDevice, StagingBuffers
from aiotorchio.memory.outgoing import OutgoingPayload

__all__ = ["SnapshotPayload"]

# The system gets this memory back when a chunk is freed; malloc would keep it. (MAP_POPULATE would
# take a third less time, but hold the interpreter's lock for all of it.)
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class SnapshotPayload:
    """The chunks of a copied payload; each can be taken once, in order.

    Args:
        payload: The payload, which is copied at once. Copies on a device are queued on its current
            stream.
        chunks: First byte and length of each chunk.
        chunk_size: Bytes of a chunk.
        copier: Makes the copier from devices to the host; called after all copies on devices were
            queued.

    Attributes:
        has_device_copies: Whether any bytes are on a device.
        has_gathered: False: elements were gathered when they were copied.
        small: 0: small storages were joined when they were copied.
        borrows: False: no chunk shows the caller's memory.
    """

    borrows = has_gathered = False
    small = 0

    def __init__(
        self,
        payload: OutgoingPayload,
        chunks: Iterable[tuple[int, int]],
        chunk_size: int,
        copier: Callable[[], Copier],
    ) -> None:
        self.has_device_copies = payload.has_device_copies
        self._chunks = deque(_copied(list(payload.pieces(*chunk))) for chunk in chunks)
        self._staging_buffers = StagingBuffers(chunk_size, copier())

    def chunk_views(self, start: int, length: int) -> list[memoryview]:
        """Return views of the next chunk, as ``OutgoingPayload.chunk_views`` does."""
        return self._staging_buffers.stage(self._chunks.popleft())


def _copied(pieces: Sequence[memoryview | OnDevice]) -> list[memoryview | OnDevice]:
    """Copy the pieces of a chunk into new memory."""
    on_host = sum(len(piece) for piece in pieces if isinstance(piece, memoryview))
    memory = memoryview(mmap.mmap(-1, on_host, **_PRIVATE) if on_host else bytearray())
    copies: list[memoryview | OnDevice] = []
    for piece in pieces:
        if isinstance(piece, memoryview):
            _move(memory, piece)
            copies.append(memory[: len(piece)])
            memory = memory[len(piece) :]
        else:
            copies.append(_held(piece))
    return copies


def _move(destination: memoryview, source: memoryview) -> None:
    """Copy bytes without stopping other threads, as assigning to a slice of a view would."""
    if source.readonly:  # padding
        destination[: len(source)] = source
    elif len(source):
        ctypes.memmove(_address(destination), _address(source), len(source))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _held(piece: OnDevice) -> OnDevice:
    held = torch.empty(piece.nbytes, dtype=torch.uint8, device=piece.device)
    piece.copy(held, Here())

    def copy(destination: torch.Tensor, copier: Copier) -> None:
        copier.copy(destination, held)

    return OnDevice(piece.device, piece.nbytes, copy)
