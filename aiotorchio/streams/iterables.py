"""Source for any async iterable of bytes-like pieces, such as the body of an HTTP response."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence

import anyio.lowlevel

from aiotorchio.common.buffer import Buffer
from aiotorchio.streams.base import Cursor, Source, connection_errors
from aiotorchio.streams.identity import IdentityTable, is_referable

__all__ = ["IterableSource", "resumable"]

# Iterator -> the end of its last piece, which belongs to the next message. An iterable that starts
# again each time has no next message.
_left_over: IdentityTable[bytes | memoryview] = IdentityTable()

_NOTHING = memoryview(b"")
# Number of pieces, which may be small or empty, after which other tasks can run.
_TURN_PIECES = 64


class IterableSource(Source):
    """Receives bytes from an async iterable.

    Args:
        iterable: An iterable of bytes-like pieces of any size. A piece may change when the next one
            is requested.
    """

    def __init__(self, iterable: AsyncIterable[Buffer]) -> None:
        self._iterator = aiter(iterable)
        self._owned = self._iterator is not iterable
        self._resumes = not self._owned and is_referable(iterable)
        self._piece, self._pieces = _NOTHING, 0
        if self._resumes:
            self._piece = memoryview(_left_over.pop(iterable, b""))

    async def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and await self._more():
            data += self._take(size - len(data))
        return bytes(data)

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        # Let other tasks run, even if the iterator never waits.
        await anyio.lowlevel.checkpoint()
        cursor = Cursor(buffers)
        while cursor and await self._more():
            cursor.write(self._take(cursor.left))
        return cursor.done

    async def _more(self) -> bool:
        """Get a piece with bytes in it; returns False at the end."""
        while not self._piece:
            # Even an empty view would prevent a bytearray from changing its size.
            self._piece = _NOTHING
            self._pieces += 1
            if self._pieces % _TURN_PIECES == 0:
                await anyio.lowlevel.checkpoint()
            with connection_errors():
                try:
                    piece = await anext(self._iterator)
                except StopAsyncIteration:
                    return False
            self._piece = memoryview(self.checked_piece(piece))
        return True

    def _take(self, size: int) -> memoryview:
        part, self._piece = self._piece[:size], self._piece[size:]
        self.moved(len(part))
        return part

    async def aclose(self) -> None:
        if self._owned and hasattr(self._iterator, "aclose"):
            await self._iterator.aclose()

    def release(self) -> None:
        if self._resumes and self._piece:
            # A view of bytes is kept; other pieces may change when the next one is requested.
            kept = isinstance(self._piece.obj, bytes)
            _left_over[self._iterator] = self._piece if kept else bytes(self._piece)
        self._piece = _NOTHING


def resumable(iterable: AsyncIterable[Buffer]) -> AsyncIterator[Buffer]:
    """Return an iterator from which one message can be loaded after the other."""
    iterator = aiter(iterable)
    return iterator if is_referable(iterator) else _Resumable(iterator)


class _Resumable:
    """A proxy for an iterator without weak references, for the table of remaining bytes."""

    def __init__(self, iterator: AsyncIterator[Buffer]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> _Resumable:
        return self

    async def __anext__(self) -> Buffer:
        return await anext(self._iterator)
