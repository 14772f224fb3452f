"""The public functions and classes."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import Any, Unpack

from aiotorchio.drive import Send, Task, drive, drive_blocking, run_in_thread
from aiotorchio.graph.location import MapLocation
from aiotorchio.options import (
    DEFAULT_CHUNK_SIZE,
    LoadKeywords,
    SaveKeywords,
    load_options,
    outgoing_message,
)
from aiotorchio.streams.base import coalesce
from aiotorchio.streams.guard import exclusive
from aiotorchio.streams.iterables import resumable
from aiotorchio.streams.select import (
    open_blocking_sink,
    open_blocking_source,
    open_sink,
    open_source,
)
from aiotorchio.transfer import Progress, Summary, receive_message
from aiotorchio.wire.limits import Limits
from aiotorchio.wire.parser import Work

__all__ = [
    "StreamReader",
    "StreamWriter",
    "iter_bytes",
    "load",
    "load_from_stream",
    "save",
    "save_to_stream",
]


async def save_to_stream(
    obj: object,
    stream: Any,
    *,
    checksum: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> Summary:
    """Send an object as one message.

    Tensors go as they are: storages that several tensors share are sent once and shared again by
    the receiver, strides and unused parts of a storage are kept. No copy of a tensor is made
    beyond two chunks for those on a device. Do not change the tensors before this returns.

    Args:
        obj: Anything. State dicts and other plain containers need no pickle on either side.
        stream: An ``asyncio.StreamWriter``, an anyio byte stream, or a non-blocking
            ``socket.socket``. It stays open, behind the last byte of the message.
        checksum: Send an xxh3_64 digest with each chunk. Without it, damage to tensors goes
            unnoticed; structure and completeness are proven all the same.
        chunk_size: Bytes of a chunk: a multiple of 64, from 4096 on. Receivers accept up to
            ``Limits.chunk_nbytes``.
        metadata: Texts for the header of the message (SPEC.md section 5.1). No function of this
            version reads them yet.
        progress: Called as ``progress(done, total)`` with bytes of the payload, after each chunk.
        pickle_module: Has a ``Pickler``; used for what is not made of plain containers.
        pickle_protocol: Of that pickle. Receivers load only 2 with ``weights_only=True``.

    Returns:
        What was sent.

    Raises:
        TypeError: Not a stream that can be saved to, or an option of another type.
        ValueError: An option out of its range, or a blocking socket.
        TruncatedError: The peer closed the connection, or it broke.
        StreamBusy: Another save is using the stream.
        StreamPoisoned: An earlier save was stopped inside its message.
        Exception: What ``pickle_module`` raises for an object it cannot pickle; the stream is
            untouched then.

    The format is in SPEC.md.

    Example:
        >>> import asyncio, io, torch, aiotorchio
        >>> async def main():
        ...     async def serve(reader, writer):
        ...         await aiotorchio.save_to_stream({"w": torch.ones(2)}, writer)
        ...         writer.close()
        ...     server = await asyncio.start_server(serve, "127.0.0.1", 0)
        ...     reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        ...     state = await aiotorchio.load_from_stream(reader)
        ...     writer.close()
        ...     server.close()
        ...     return state
        >>> asyncio.run(main())
        {'w': tensor([1., 1.])}
    """
    with exclusive(stream, "save", open_sink) as sink:
        message = outgoing_message(
            obj,
            checksum=checksum,
            chunk_size=chunk_size,
            metadata=metadata,
            progress=progress,
            pickle_module=pickle_module,
            pickle_protocol=pickle_protocol,
        )
        return await drive(message, sink)


async def load_from_stream(
    stream: Any,
    *,
    map_location: MapLocation = None,
    weights_only: bool = True,
    allow_pickle: bool = True,
    safe_globals: Iterable[Any] = (),
    limits: Limits | None = None,
    progress: Progress | None = None,
    pickle_module: Any = None,
    encoding: str = "utf-8",
) -> Any:
    """Receive one message and rebuild its object.

    Takes exactly the bytes of the message off the stream. Every storage is received into the
    memory that it will have; host memory grows only as bytes arrive.

    Args:
        stream: An ``asyncio.StreamReader``, an anyio byte stream, a non-blocking
            ``socket.socket``, or an async iterable of bytes-like pieces (one that is its own
            iterator, such as an async generator, keeps what follows for the next load;
            ``StreamReader`` keeps it for all others).
        map_location: As in ``torch.load``: a device or its string for all tensors, a dict from
            locations at the sender to locations here, or a callable that gets every storage, on
            the CPU, with its location at the sender, and returns a storage or None. By default
            tensors go where they were at the sender.
        weights_only: Rebuild pickled objects from an allowlist only. **False runs whatever code
            the sender put into the message.**
        allow_pickle: False accepts only objects that were sent without pickle.
        safe_globals: Classes and functions that pickled objects may use in this call, beside
            those of ``torch.serialization.add_safe_globals``; or pairs of one and its path.
        limits: What to accept; the default is ``Limits()``.
        progress: Called as ``progress(done, total)`` with bytes of the payload, after each chunk.
        pickle_module: With ``weights_only=False``: has an ``Unpickler``.
        encoding: For the 8-bit strings in pickles of Python 2.

    Returns:
        The object.

    Raises:
        TypeError: Not a stream that can be loaded from, or an option of another type.
        ValueError: A blocking socket, or a ``pickle_module`` with ``weights_only=True``.
        ProtocolError: The bytes are not a message.
        TruncatedError: The stream ended or broke; also an ``EOFError``. Its ``offset`` is 0 if
            the stream ended before a message began.
        ChecksumError: The bytes are not those that were sent.
        LimitExceeded: The message asks for more than ``limits``.
        UnsafeObjectError: The object needs what is not allowed; also a
            ``pickle.UnpicklingError``.
        InvalidObjectError: The object contradicts itself, or needs a device that is not here.
        RemoteAbort: The sender gave up.
        StreamBusy: Another load is using the stream.
        StreamPoisoned: An earlier load was stopped inside its message.

    The format is in SPEC.md.

    Example:
        See ``save_to_stream``.
    """
    options = load_options(
        map_location=map_location,
        weights_only=weights_only,
        allow_pickle=allow_pickle,
        safe_globals=safe_globals,
        limits=limits,
        progress=progress,
        pickle_module=pickle_module,
        encoding=encoding,
    )
    with exclusive(stream, "load", open_source) as source:
        async with contextlib.aclosing(source):
            return await drive(receive_message(options), source)


class StreamWriter:
    """Saves many objects, one after the other, on one stream.

    Args:
        stream: As for ``save_to_stream``.

    Example:
        >>> import aiotorchio
        >>> async def push(states, stream):
        ...     writer = aiotorchio.StreamWriter(stream)
        ...     for state in states:
        ...         await writer.save(state)
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def save(self, obj: object, **options: Unpack[SaveKeywords]) -> Summary:
        """Send an object as the next message; arguments and errors as in ``save_to_stream``."""
        return await save_to_stream(obj, self._stream, **options)


class StreamReader:
    """Loads many objects, one after the other, from one stream.

    Args:
        stream: As for ``load_from_stream``; an async iterable is iterated once, from here on.

    Example:
        >>> import aiotorchio
        >>> async def pull(stream):
        ...     reader = aiotorchio.StreamReader(stream)
        ...     while True:
        ...         yield await reader.load()
    """

    def __init__(self, stream: Any) -> None:
        # anyio's byte streams are iterable too, and are their own iterators.
        self._stream = resumable(stream) if isinstance(stream, AsyncIterable) else stream

    async def load(self, **options: Unpack[LoadKeywords]) -> Any:
        """Receive the next object; arguments and errors as in ``load_from_stream``."""
        return await load_from_stream(self._stream, **options)


async def iter_bytes(
    obj: object, **options: Unpack[SaveKeywords]
) -> AsyncIterator[bytes | memoryview]:
    """The bytes of a message, for the body of an HTTP request or response.

    Args:
        obj: As in ``save_to_stream``.
        options: The keyword arguments of ``save_to_stream``.

    Yields:
        Pieces of up to 256 KiB. Those of tensors on the CPU are read-only views of the tensors
        themselves, not copies: use them before the tensors change.

    Raises:
        Exception: What ``save_to_stream`` raises before it sends.

    Example:
        >>> import asyncio, torch, aiotorchio
        >>> async def main():
        ...     return await aiotorchio.load_from_stream(aiotorchio.iter_bytes([torch.ones(2)]))
        >>> asyncio.run(main())
        [tensor([1., 1.])]
    """
    message = outgoing_message(obj, **options)
    with contextlib.closing(message), contextlib.suppress(StopIteration):
        request = next(message)
        while True:
            task: Task | None = None
            match request:
                case Send(buffers, task):
                    for piece in coalesce(buffers):
                        if task is None and isinstance(piece, memoryview):
                            yield piece.toreadonly()
                        else:
                            yield bytes(piece)
                case Work(task):
                    pass
            try:
                answer = await run_in_thread(task) if task else None
            except Exception as error:
                request = message.throw(error)
            else:
                request = message.send(answer)


def save(obj: object, file: Any, **options: Unpack[SaveKeywords]) -> Summary:
    """The blocking twin of ``save_to_stream``.

    Args:
        obj: As in ``save_to_stream``.
        file: A binary file, a pipe, a ``BytesIO``, a blocking ``socket.socket``, or a path, where
            a file that is there is replaced once the new one is whole.
        options: The keyword arguments of ``save_to_stream``.

    Returns:
        What was written.

    Raises:
        Exception: As ``save_to_stream``, and ``OSError`` of a file.

    Example:
        >>> import io, torch, aiotorchio
        >>> file = io.BytesIO()
        >>> aiotorchio.save({"w": torch.ones(2)}, file).tensors
        1
        >>> _ = file.seek(0)
        >>> aiotorchio.load(file)
        {'w': tensor([1., 1.])}
    """
    if isinstance(file, str | os.PathLike):
        # Under another name until it is whole: what was there before is not lost for half of it.
        unfinished = f"{os.fspath(file)}.part"
        try:
            with open(unfinished, "wb") as opened:
                summary = save(obj, opened, **options)
            os.replace(unfinished, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
            raise
        return summary
    with exclusive(file, "save", open_blocking_sink) as stream:
        return drive_blocking(outgoing_message(obj, **options), stream)


def load(file: Any, **options: Unpack[LoadKeywords]) -> Any:
    """The blocking twin of ``load_from_stream``.

    Args:
        file: A binary file, a pipe, a ``BytesIO``, a blocking ``socket.socket``, or a path.
        options: The keyword arguments of ``load_from_stream``.

    Returns:
        The object.

    Raises:
        Exception: As ``load_from_stream``, and ``OSError`` of a file.

    Example:
        See ``save``.
    """
    checked = load_options(**options)
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return load(opened, **options)
    with exclusive(file, "load", open_blocking_source) as stream:
        return drive_blocking(receive_message(checked), stream)
