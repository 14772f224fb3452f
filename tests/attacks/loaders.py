"""The calls that take a message off a stream, and streams of unexpected forms."""

from __future__ import annotations

import asyncio
import copy
import math
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import torch

import aiotorchio
from aiotorchio import Limits
from tests.attacks.cases import row_name
from tests.support.backends import End

__all__ = ["LOADERS", "WAITING_LOADERS", "dressed"]

Load = Callable[[], Awaitable[Any]]
# Gets the end of a connection, and the options of a case; its result takes the message.
Loader = Callable[[End, Limits, dict[str, Any]], Load]


# ------------------------------------------------------------------------------ loaders


def load(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    return lambda: end.load(limits=limits, **options)


def into(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    # The tensors are made here: before the measurement begins.
    into = destinations(**options.pop("into"))
    return lambda: end.load(limits=limits, into=into, **options)


def staged(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    return into(end, limits, options | {"staged": True})


def select(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    assert "select" in options
    return load(end, limits, options)


def relocate(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    return load(end, limits, options | {"map_location": lambda storage, location: storage})


def iterate(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    async def run() -> Any:
        async with aiotorchio.StreamReader(end.source).open(limits=limits) as message:
            return {name: tensor async for name, tensor in message.iterate(**options)}

    return run


def skip(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    async def run() -> None:
        async with aiotorchio.StreamReader(end.source).open(limits=limits):
            pass

    return run


def tensors(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    async def run() -> Any:
        reader = aiotorchio.StreamReader(end.source)
        async with reader.open(limits=limits, unread="abort") as message:
            return message.tensors

    return run


def unsafe_globals(end: End, limits: Limits, options: dict[str, Any]) -> Load:
    async def run() -> Any:
        async with aiotorchio.StreamReader(end.source).open(limits=limits) as message:
            return await message.get_unsafe_globals(**options)

    return run


LOADERS: dict[str, Loader] = {
    loader.__name__: loader
    for loader in (load, into, staged, select, relocate, iterate, skip, tensors, unsafe_globals)
}
# Loaders that blocking streams do not have.
WAITING_LOADERS = ("iterate", "skip", "tensors", "unsafe_globals")


def destinations(
    *,
    shape: list[int],
    dtype: str = "uint8",
    rows: int = 0,
    names: list[str] | None = None,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Make tensors to receive into, all of one shape, for so many rows or for these names."""
    wanted = names or list(map(row_name, range(rows)))
    size = math.prod(shape)
    # Not zeros: fresh memory would seem to grow at the first write.
    memory = torch.ones(len(wanted) * size, dtype=getattr(torch, dtype))
    made = [memory[n * size : (n + 1) * size].view(shape) for n in range(len(wanted))]
    return dict(zip(wanted, (each.t() for each in made) if transposed else made, strict=True))


# ------------------------------------------------------------------------------ streams


class Pieces:
    """An async iterator over the bytes of a stream, in small pieces or as they come."""

    def __init__(self, stream: Any, size: int = 0) -> None:
        self._stream = stream
        self._size = size
        self._rest = memoryview(b"")

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        if not self._rest:
            self._rest = memoryview(await received(self._stream))
        if not self._rest:
            raise StopAsyncIteration
        size = self._size or len(self._rest)
        piece, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return piece


async def received(stream: Any) -> bytes:
    """The bytes of a stream that can be read now; empty at its end."""
    if isinstance(stream, asyncio.StreamReader):
        return await stream.read(2**16)
    if isinstance(stream, socket.socket):
        await anyio.wait_readable(stream)
        return stream.recv(2**16)
    try:
        data: bytes = await stream.receive(2**16)
    except anyio.EndOfStream:
        return b""
    return data


def alike(stream: Any, *, hashable: bool = True) -> Any:
    """The same stream, which from now on equals all others of its class."""
    names: dict[str, Any] = {"__slots__": (), "__eq__": lambda self, other: True}
    names["__hash__"] = (lambda self: 0) if hashable else None
    stream.__class__ = type(type(stream).__name__, (type(stream),), names)
    return stream


DRESSES: dict[str, Callable[[Any], Any]] = {
    "": lambda stream: stream,
    # Far less than a header, more than a frame's head.
    "crumbs": lambda stream: Pieces(stream, 100),
    "equal": alike,
    "unhashable": lambda stream: alike(stream, hashable=False),
    "equal_pieces": lambda stream: alike(Pieces(stream)),
    "unhashable_pieces": lambda stream: alike(Pieces(stream), hashable=False),
}


def dressed(end: End, dress: str) -> End:
    """The form in which the library gets the end of a connection."""
    other = copy.copy(end)
    other.source = DRESSES[dress](end.source)
    return other
