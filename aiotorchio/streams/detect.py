"""Selection of the source or sink for a stream, by the type of the stream.

In: the stream of a caller. Out: its adapter. A ``TypeError`` names the streams that would fit.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import socket
from collections.abc import AsyncIterable
from typing import Any

from anyio.abc import ByteReceiveStream, ByteSendStream

from aiotorchio.streams._anyio import AnyioSink, AnyioSource
from aiotorchio.streams._asyncio import AsyncioSink, AsyncioSource
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.blocking_sockets import open_blocking_socket
from aiotorchio.streams.iterables import IterableSource
from aiotorchio.streams.sockets import SocketSink, SocketSource

__all__ = ["open_blocking_sink", "open_blocking_source", "open_sink", "open_source"]


def open_source(stream: Any) -> Source:
    """Make the source for a stream.

    Raises:
        TypeError: A load cannot use the stream.
        ValueError: The socket is blocking or closed.
    """
    if isinstance(stream, asyncio.StreamReader):
        return AsyncioSource(stream)
    if isinstance(stream, socket.socket):
        return SocketSource(stream)
    if isinstance(stream, ByteReceiveStream):
        return AnyioSource(stream)
    # trio's streams are iterable, but would lose the bytes after a message.
    if isinstance(stream, AsyncIterable) and not hasattr(stream, "receive_some"):
        return IterableSource(stream)
    raise TypeError(
        f"cannot load from {type(stream).__name__}: an asyncio.StreamReader, an anyio byte stream, "
        "a non-blocking socket or an async iterable of bytes is needed (files: aiotorchio.load)"
    )


def open_sink(stream: Any) -> Sink:
    """Make the sink for a stream.

    Raises:
        TypeError: A save cannot use the stream.
        ValueError: The socket is blocking or closed.
    """
    if isinstance(stream, asyncio.StreamWriter):
        return AsyncioSink(stream)
    if isinstance(stream, socket.socket):
        return SocketSink(stream)
    if isinstance(stream, ByteSendStream):
        return AnyioSink(stream)
    raise TypeError(
        f"cannot save to {type(stream).__name__}: an asyncio.StreamWriter, an anyio byte stream or "
        "a non-blocking socket is needed (files: aiotorchio.save; HTTP bodies: iter_bytes)"
    )


def open_blocking_source(file: Any) -> BlockingStream:
    """Make the adapter to load from a blocking file or socket.

    Raises:
        TypeError: Neither a binary file nor a socket.
        ValueError: The socket is non-blocking.
    """
    if not _has(file, "recv_into", "readinto", "read"):
        raise TypeError(
            f"cannot load from {type(file).__name__}: a path, a binary file or a blocking socket "
            f"is needed (async streams: aiotorchio.load_from_stream)"
        )
    return _open_blocking(file)


def open_blocking_sink(file: Any) -> BlockingStream:
    """Make the adapter to save to a blocking file or socket.

    Raises:
        TypeError: Neither a binary file nor a socket.
        ValueError: The socket is non-blocking.
    """
    if not _has(file, "send", "write"):
        raise TypeError(
            f"cannot save to {type(file).__name__}: a path, a binary file or a blocking socket is "
            f"needed (async streams: aiotorchio.save_to_stream)"
        )
    return _open_blocking(file)


def _open_blocking(file: Any) -> BlockingStream:
    return open_blocking_socket(file) if isinstance(file, socket.socket) else BlockingStream(file)


def _has(file: Any, *methods: str) -> bool:
    """Whether a file has one of these methods as a blocking one for bytes."""
    if isinstance(file, io.TextIOBase | asyncio.StreamReader | asyncio.StreamWriter):
        return False
    # The first name is that of sockets.
    names = methods[:1] if isinstance(file, socket.socket) else methods[1:]
    found = [getattr(file, name, None) for name in names]
    found = [method for method in found if method is not None]
    return bool(found) and all(
        callable(method) and not inspect.iscoroutinefunction(method) for method in found
    )
