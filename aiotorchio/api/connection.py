"""Many messages, one after the other, on one stream."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from typing import Any, get_args

import torch

from aiotorchio.api.message import Message, Unread
from aiotorchio.api.streams import load_from_stream, save_to_stream
from aiotorchio.engine.drivers import drive, load_time_budget
from aiotorchio.engine.receive import IncomingMessage
from aiotorchio.engine.requests import Progress
from aiotorchio.engine.save_options import DEFAULT_CHUNK_SIZE
from aiotorchio.engine.selection import LoadTarget
from aiotorchio.engine.summary import Summary
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select
from aiotorchio.limits import Limits, checked_limits
from aiotorchio.streams.detect import open_source, sink_type, stream_of_messages
from aiotorchio.streams.guard import exclusive
from aiotorchio.table.names import TensorSpec

__all__ = ["StreamReader", "StreamWriter"]


class StreamWriter:
    """Saves many objects, one after the other, on one stream.

    Args:
        stream: As for ``save_to_stream``.

    Raises:
        TypeError: A save cannot use the stream.

    Example:
        >>> import aiotorchio
        >>> async def push(states, stream):
        ...     writer = aiotorchio.StreamWriter(stream)
        ...     for state in states:
        ...         await writer.save(state)
    """

    def __init__(self, stream: Any) -> None:
        sink_type(stream)
        self._stream = stream

    def save(
        self,
        obj: object,
        *,
        checksum: bool = True,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        metadata: Mapping[str, str] | None = None,
        specs: Mapping[str, TensorSpec | torch.Tensor] | None = None,
        snapshot: bool = False,
        compact: bool = False,
        allow_pickle: bool = True,
        limits: Limits | None = None,
        progress: Progress | None = None,
        pickle_module: Any = pickle,
        pickle_protocol: int = 2,
    ) -> Coroutine[Any, Any, Summary]:
        """Send an object as the next message; arguments and errors as in ``save_to_stream``."""
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return save_to_stream(stream=self._stream, **arguments)


class StreamReader:
    """Loads many objects, one after the other, from one stream.

    Args:
        stream: As for ``load_from_stream``; an async iterable is iterated once, from here on.

    Raises:
        TypeError: A load cannot use the stream.

    Example:
        >>> import aiotorchio
        >>> async def pull(stream):
        ...     reader = aiotorchio.StreamReader(stream)
        ...     while True:
        ...         yield await reader.load()
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream_of_messages(stream)

    def load(
        self,
        *,
        map_location: MapLocation = None,
        weights_only: bool | None = True,
        allow_pickle: bool = True,
        safe_globals: Iterable[Any] = (),
        limits: Limits | None = None,
        into: LoadTarget | None = None,
        strict: bool = True,
        cast: bool = False,
        staged: bool = False,
        lock: Any = None,
        select: Select | None = None,
        progress: Progress | None = None,
        pickle_module: Any = None,
        encoding: str = "utf-8",
    ) -> Coroutine[Any, Any, Any]:
        """Receive the next object; arguments and errors as in ``load_from_stream``."""
        arguments = {name: value for name, value in locals().items() if name != "self"}
        return load_from_stream(self._stream, **arguments)

    @contextlib.asynccontextmanager
    async def open(
        self, *, limits: Limits | None = None, unread: Unread = "skip"
    ) -> AsyncIterator[Message]:
        """Receive the header of the next message, and leave the rest to the caller.

        Args:
            limits: Upper bounds for the message; the default is ``Limits()``.
            unread: The end of a message that is left unread: ``"skip"`` receives and drops
                it, in the memory of a chunk, so that the next one can be read; ``"abort"`` breaks
                the connection, so that the sender stops. If an error leads out of the ``async
                with``, nothing is skipped: the stream is poisoned, unless the message was read.

        Yields:
            The message, to be read inside the ``async with``.

        Raises:
            ValueError: ``unread`` is neither of the two.
            Exception: As ``load_from_stream``.

        Example:
            >>> async def follow(stream, model, version=0):
            ...     reader = aiotorchio.StreamReader(stream)
            ...     while True:
            ...         async with reader.open() as message:
            ...             if int(message.metadata["version"]) > version:
            ...                 await message.load(into=model, staged=True)
        """
        if not isinstance(unread, str) or unread not in get_args(Unread):
            raise ValueError(f"unread must be 'skip' or 'abort', not {unread!r}")
        checked = checked_limits(limits)
        incoming = IncomingMessage(checked)
        with exclusive(self._stream, "load", open_source) as source:
            source.time_budget = load_time_budget(checked)
            async with contextlib.aclosing(source):
                await drive(incoming.open(), source)
                await drive(incoming.describe(), source)
                message = Message(incoming, source)
                try:
                    yield message
                except BaseException as error:
                    await message.close(unread, failed=True)
                    if isinstance(error, Exception):
                        await drive(incoming.release(), source)
                    raise
                await message.close(unread, failed=False)
                await drive(incoming.release(), source)
