"""Selection of the source or sink for a stream, by the type or the methods of the stream.

In: the stream of a caller. Out: its adapter. A ``TypeError`` names the streams that would fit.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import socket
import ssl
from collections.abc import AsyncIterable, Callable
from typing import Any

from anyio.abc import ByteReceiveStream, ByteSendStream

from aiotorchio.streams._anyio import AnyioSink, AnyioSource
from aiotorchio.streams._asyncio import AsyncioSink, AsyncioSource, has_write_buffer
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.blocking_sockets import open_blocking_socket
from aiotorchio.streams.duck_typed import ReadSource, WriteSink, can_read, can_write, guardable
from aiotorchio.streams.iterables import IterableSource, resumable
from aiotorchio.streams.sockets import SocketSink, SocketSource

__all__ = [
    "open_blocking_sink",
    "open_blocking_source",
    "open_sink",
    "open_source",
    "sink_type",
    "source_type",
    "stream_of_messages",
]


def open_source(stream: Any) -> Source:
    """Make the source for a stream.

    Raises:
        TypeError: A load cannot use the stream.
        ValueError: The socket is blocking or closed.
    """
    return source_type(stream)(stream)


def open_sink(stream: Any) -> Sink:
    """Make the sink for a stream.

    Raises:
        TypeError: A save cannot use the stream.
        ValueError: The socket is blocking or closed.
    """
    return sink_type(stream)(stream)


def source_type(stream: Any) -> Callable[[Any], Source]:
    """Choose the class of the source for a stream, which is not touched.

    Raises:
        TypeError: A load cannot use the stream.
    """
    if isinstance(stream, asyncio.StreamReader):
        return AsyncioSource
    if _is_socket(stream):
        return SocketSource
    if isinstance(stream, ByteReceiveStream):
        return AnyioSource
    if can_read(stream):
        return ReadSource
    name = type(stream).__name__
    # trio's streams are iterable, but would lose the bytes after a message.
    if isinstance(stream, AsyncIterable) and not hasattr(stream, "receive_some"):
        # Files iterate over lines, and a message may have no line end at all.
        if hasattr(stream, "readline"):
            raise TypeError(
                f"cannot load from {name}, which has `readline`, but no `async read(size)`: an "
                "async iterable of its bytes in pieces is needed"
            )
        return IterableSource
    raise TypeError(
        f"cannot load from {name}: an asyncio.StreamReader, an anyio byte stream, a non-blocking "
        "socket, an async iterable of bytes or an object with `async read(size)` is needed "
        "(files: aiotorchio.load)"
    )


def sink_type(stream: Any) -> Callable[[Any], Sink]:
    """Choose the class of the sink for a stream, which is not touched.

    Raises:
        TypeError: A save cannot use the stream.
    """
    if isinstance(stream, asyncio.StreamWriter) and has_write_buffer(stream):
        return AsyncioSink
    if _is_socket(stream):
        return SocketSink
    if isinstance(stream, ByteSendStream):
        return AnyioSink
    if can_write(stream):
        return WriteSink
    raise TypeError(
        f"cannot save to {type(stream).__name__}: an asyncio.StreamWriter, an anyio byte stream, a "
        "non-blocking socket or an object with `write(data)` and `async drain()` is needed "
        "(files: aiotorchio.save; HTTP bodies: iter_bytes)"
    )


def _is_socket(stream: Any) -> bool:
    if isinstance(stream, ssl.SSLSocket):
        raise TypeError("TLS needs a stream of asyncio or anyio, not an ssl.SSLSocket")
    return isinstance(stream, socket.socket)


def stream_of_messages(stream: Any) -> Any:
    """Return a stream from which loads take one message after the other.

    Raises:
        TypeError: A load cannot use the stream.
    """
    chosen = source_type(stream)
    if chosen is IterableSource:
        return resumable(stream)
    return guardable(stream) if chosen is ReadSource else stream


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
