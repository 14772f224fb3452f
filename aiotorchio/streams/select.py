"""Which driver a stream gets, by its type."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterable
from typing import Any

from anyio.abc import ByteReceiveStream, ByteSendStream

from aiotorchio.streams._anyio import AnyioSink, AnyioSource
from aiotorchio.streams._asyncio import AsyncioSink, AsyncioSource
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.iterables import IterableSource
from aiotorchio.streams.sockets import SocketSink, SocketSource

__all__ = ["open_sink", "open_source"]


def open_source(stream: Any) -> Source:
    """The driver that loads from a stream.

    Raises:
        TypeError: Not a stream that can be loaded from.
        ValueError: A blocking socket.
    """
    if isinstance(stream, asyncio.StreamReader):
        return AsyncioSource(stream)
    if isinstance(stream, socket.socket):
        return SocketSource(stream)
    if isinstance(stream, ByteReceiveStream):
        return AnyioSource(stream)
    if isinstance(stream, AsyncIterable):
        return IterableSource(stream)
    raise TypeError(
        f"can't load from {type(stream).__name__}: an asyncio.StreamReader, an anyio byte stream, "
        "a non-blocking socket or an async iterable of bytes is needed (files: aiotorchio.load)"
    )


def open_sink(stream: Any) -> Sink:
    """The driver that saves to a stream.

    Raises:
        TypeError: Not a stream that can be saved to.
        ValueError: A blocking socket.
    """
    if isinstance(stream, asyncio.StreamWriter):
        return AsyncioSink(stream)
    if isinstance(stream, socket.socket):
        return SocketSink(stream)
    if isinstance(stream, ByteSendStream):
        return AnyioSink(stream)
    raise TypeError(
        f"can't save to {type(stream).__name__}: an asyncio.StreamWriter, an anyio byte stream or "
        "a non-blocking socket is needed (files: aiotorchio.save; HTTP bodies: iter_bytes)"
    )
