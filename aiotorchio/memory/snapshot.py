"""The payload of a message as it was at one moment, while its owner goes on changing it.

A copy of the whole, chunk by chunk: of the host on the host, of a device on that device. Each chunk
is free again when it was sent.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch

from aiotorchio.memory.device_copy import Copier, Here, OnDevice, Slabs
from aiotorchio.memory.outgoing import OutgoingPayload

__all__ = ["SnapshotPayload"]

# malloc would keep chunks that were freed; these go back to the system. (MAP_POPULATE would take a
# third less time, and hold the interpreter's lock for all of it.)
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class SnapshotPayload:
    """Chunks of a payload, each to be taken once, in order.

    Args:
        payload: What is copied, here and now. Copies on a device are queued on its current stream.
        chunks: First byte and length of each chunk.
        chunk_size: In bytes.
        copier: Makes what takes the copies from their devices, when all of them are queued.

    Attributes:
        has_staged: As of the payload.
        has_packed: Not any more.
        small: None: they were gathered when they were copied.
        borrows: Never: nobody changes what is sent.
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
        self._slabs = Slabs(chunk_size, copier())

    def chunk(self, start: int, length: int) -> list[memoryview]:
        """Views of the next chunk, as ``OutgoingPayload.chunk`` gives them."""
        return self._slabs.stage(self._chunks.popleft())


def _copied(pieces: Sequence[memoryview | OnDevice]) -> list[memoryview | OnDevice]:
    """The pieces of a chunk in memory of their own."""
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
    """Copy bytes, while other threads go on: a slice of a memoryview would stop them."""
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
