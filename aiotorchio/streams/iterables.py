"""Any async iterable of bytes-like pieces, such as the body of an HTTP response."""

from __future__ import annotations

from collections.abc import AsyncIterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from aiotorchio.streams.base import Buffer, Source, connection_errors, copy_into

__all__ = ["IterableSource"]

# An iterator can't take back the end of a piece that belongs to the next message, so it waits
# here. Iterables that start anew each time have no next message.
_left_over: WeakKeyDictionary[Any, memoryview] = WeakKeyDictionary()


class IterableSource(Source):
    """Takes bytes off an async iterable.

    Args:
        iterable: Of bytes-like pieces of any size.
    """

    def __init__(self, iterable: AsyncIterable[Buffer]) -> None:
        self._iterator = aiter(iterable)
        self._resumes = self._iterator is iterable
        self._piece = memoryview(b"")
        if self._resumes:
            self._piece = _left_over.pop(iterable, self._piece)

    async def read(self, size: int) -> bytes:
        parts: list[memoryview] = []
        while size and await self._more():
            parts.append(self._take(size))
            size -= len(parts[-1])
        return b"".join(parts)

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        size, done = sum(map(len, buffers)), 0
        while done < size and await self._more():
            part = self._take(size - done)
            copy_into(buffers, part, done)
            done += len(part)
        return done

    async def _more(self) -> bool:
        """Have a piece with bytes in it; False at the end."""
        while not self._piece:
            with connection_errors():
                try:
                    piece = await anext(self._iterator)
                except StopAsyncIteration:
                    return False
            self._piece = memoryview(piece).cast("B")
        return True

    def _take(self, size: int) -> memoryview:
        self.in_message = True
        part, self._piece = self._piece[:size], self._piece[size:]
        return part

    def release(self) -> None:
        if self._resumes and self._piece:
            _left_over[self._iterator] = self._piece
