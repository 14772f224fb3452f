"""``Message``: a message whose header has arrived, and whose payload is still in the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import torch

from aiotorchio.engine.commit import apply_commit
from aiotorchio.engine.drivers import Turns, drive
from aiotorchio.engine.iterate import TensorStream
from aiotorchio.engine.load import load_message
from aiotorchio.engine.load_options import (
    IterateOptions,
    LoadOptions,
    check_lock,
    trusted,
)
from aiotorchio.engine.receive import IncomingMessage
from aiotorchio.engine.requests import Progress, Request
from aiotorchio.engine.selection import LoadTarget
from aiotorchio.errors import StreamBusy, StreamPoisoned
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select
from aiotorchio.streams.base import Source
from aiotorchio.table.names import TensorSpec

__all__ = ["Message", "Unread"]

T = TypeVar("T")
Unread = Literal["skip", "abort"]


class Message:
    """A message whose header has arrived, as ``StreamReader.open`` yields it.

    The rest of it can be read once: by ``load``, by iterating over its tensors, or by ``skip``.
    Until then, it stays in the stream.

    Attributes:
        metadata: The texts that the sender has added.
        nbytes: Bytes of the payload: of all storages, with their padding.
        checksummed: Whether each chunk carries a checksum. Without, damage to tensors goes
            unnoticed.
        codec: ``"tree"``, or ``"pickle"`` if the object around the tensors is pickled.
        producer: Name and versions of the software that sent it, as that software says.
        message_id: 32 hexadecimal digits, as in the sender's ``Summary``.

    Example:
        >>> import asyncio, torch, aiotorchio
        >>> async def main():
        ...     state = {"w": torch.ones(2), "b": torch.zeros(3)}
        ...     reader = aiotorchio.StreamReader(
        ...         aiotorchio.iter_bytes(state, metadata={"version": "7"})
        ...     )
        ...     async with reader.open() as message:
        ...         print(message.metadata, message.nbytes, list(message.tensors))
        ...         async for name, tensor in message:
        ...             print(name, tensor)
        >>> asyncio.run(main())
        {'version': '7'} 76 ['w', 'b']
        w tensor([1., 1.])
        b tensor([0., 0., 0.])
    """

    def __init__(self, incoming: IncomingMessage, source: Source) -> None:
        self._incoming = incoming
        self._source = source
        self._token = anyio.lowlevel.current_token()
        self._running: anyio.CancelScope | None = None
        self._idle = anyio.Event()
        self._idle.set()
        self._closed = self._poisoned = False
        header = incoming.opened.header
        self.metadata: Mapping[str, str] = MappingProxyType(dict(header.metadata))
        self.nbytes = incoming.opened.layout.total
        self.checksummed = incoming.opened.checksum
        self.codec: str = header.codec
        self.producer = header.producer
        self.message_id = incoming.opened.message_id.hex()

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of each tensor by name, in the order of the wire.

        Names are paths: keys of dicts and other mappings and positions in lists and tuples, joined
        by dots, as in a nested state dict. A tensor that is in several places has several names,
        also where one dict is in several places. A tensor that has Python attributes, or is of a
        subclass with separate memory, comes without them where it is received by name. Sparse,
        quantized and nested tensors, DTensors and wrapper subclasses are missing here: the header
        has only their parts, which ``unnamed`` counts. Iteration and ``select`` know them by name.

        Raises:
            MismatchError: Two tensors have the same name (``{"a": {"b": x}, "a.b": y}``).
            ProtocolError: A dtype that the installed torch does not have.
        """
        return MappingProxyType(self._incoming.specs)

    @property
    def unnamed(self) -> int:
        """The number of rows of the header that have no name.

        They are parts of composite tensors, such as sparse ones, which iteration yields as one
        tensor each, or they are in attributes of objects, which only ``load`` rebuilds.
        """
        return self._incoming.unnamed

    async def load(
        self,
        *,
        map_location: MapLocation = None,
        weights_only: bool | None = True,
        allow_pickle: bool = True,
        safe_globals: Iterable[Any] = (),
        into: LoadTarget | None = None,
        strict: bool = True,
        cast: bool = False,
        staged: bool = False,
        lock: Any = None,
        select: Select | None = None,
        progress: Progress | None = None,
        pickle_module: Any = None,
        encoding: str = "utf-8",
    ) -> Any:
        """Receive everything, and return the object.

        A ``MismatchError`` about names, shapes or dtypes comes before anything is read: the message
        can still be loaded, iterated over, or skipped.

        All arguments are those of ``load_from_stream``; ``limits`` are those of ``open``.

        Returns:
            The object, as from ``load_from_stream``.

        Raises:
            RuntimeError: The message was read already, or its ``async with`` was left.
            Exception: As ``load_from_stream``.
        """
        options = LoadOptions.of_call(locals())
        check_lock(lock, "async")
        self.check(untouched=True)
        loaded = await self.drive(load_message(self._incoming, options))
        try:
            if loaded.commit is not None:
                await apply_commit(loaded.commit, lock)
        finally:
            loaded.close()
        return loaded.obj

    async def get_unsafe_globals(self, *, safe_globals: Iterable[Any] = ()) -> list[str]:
        """List the names that a load would refuse, as ``torch.serialization`` does of a checkpoint.

        The object is received without its tensors, and nothing of it is built; the message can
        still be loaded, iterated over, or skipped.

        Args:
            safe_globals: As in ``load_from_stream``: classes and functions that are trusted.

        Returns:
            Paths of the classes and functions that the object needs and that would be refused
            unless they are in ``safe_globals``; none of an object that was sent without pickle.

        Raises:
            RuntimeError: The message was read already, or its ``async with`` was left.
            UnsafeObjectError: A pickle that only ``weights_only=False`` can load, since it was
                written with another protocol than 2.
            Exception: As ``load_from_stream``.
        """
        checked = trusted(safe_globals)
        self.check(untouched=True)
        return await self.drive(self._incoming.unsafe_globals(checked))

    async def skip(self) -> None:
        """Receive the rest of the message, in the memory of one chunk, and drop it.

        Raises:
            RuntimeError: The ``async with`` of the message was left.
            Exception: As ``load_from_stream``: dropped bytes are verified, too.
        """
        self.check(untouched=False)
        await self.drive(self._incoming.skip())

    def __aiter__(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Iterate as ``iterate`` does, without options."""
        return self.iterate()

    def iterate(
        self,
        *,
        map_location: MapLocation = None,
        select: Select | None = None,
        progress: Progress | None = None,
        safe_globals: Iterable[Any] = (),
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Receive one tensor after the other.

        Each comes as soon as the chunk with its last byte was verified. The sender waits while the
        consumer does not take the next one. The message keeps only a chunk, small tensors that
        arrived with others, up to 4 MiB, and the parts of a composite tensor (a sparse one, for
        example) until the last of them has arrived. (A loop variable keeps its tensor until the
        next one has arrived: ``del`` it if two of them are too much.)

        Args:
            map_location: As in ``load_from_stream``.
            select: As in ``load_from_stream``.
            progress: As in ``load_from_stream``.
            safe_globals: As in ``load_from_stream``.

        Returns:
            Yields names with their tensors, in the order of the wire; a tensor with several names
            under each of them. Leaving the loop early does no harm.

        Raises:
            MismatchError: A tensor without a name, if there is no ``select``; two tensors of one
                name; a selection that the message does not have. Nothing was read.
            RuntimeError: The message was read already, or its ``async with`` was left.
            Exception: As ``load_from_stream``. Tensors that were yielded before are intact, if the
                message has checksums.
        """
        return _Tensors(self, self._incoming, IterateOptions.of_call(locals()))

    def tensors_sync(
        self,
        *,
        map_location: MapLocation = None,
        select: Select | None = None,
        progress: Progress | None = None,
        safe_globals: Iterable[Any] = (),
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate for a blocking consumer in a worker thread, such as a loader of a model.

        While it waits for the next one, the event loop receives.

        Args:
            map_location: As in ``load_from_stream``.
            select: As in ``load_from_stream``.
            progress: As in ``load_from_stream``.
            safe_globals: As in ``load_from_stream``.

        Yields:
            Names with their tensors, as ``iterate`` does.

        Raises:
            RuntimeError: Used in the thread of the event loop.
            Exception: As ``iterate``.

        Example:
            >>> async def receive(reader, model):
            ...     async with reader.open() as message:
            ...         await asyncio.to_thread(model.load_weights, message.tensors_sync())
        """
        tensors = self.iterate(
            map_location=map_location, select=select, progress=progress, safe_globals=safe_globals
        )

        # Not as a result: futures on the way here would keep it until the next garbage collection.
        arrived: list[tuple[str, torch.Tensor]] = []

        async def following() -> None:
            async for item in tensors:
                arrived.append(item)
                return

        while True:
            if _has_event_loop():
                raise RuntimeError(
                    "tensors_sync waits for the event loop, so it cannot be used in its thread: "
                    "iterate over the message with async for"
                )
            try:
                # Without a token, a thread of anyio is woken when its task is cancelled.
                anyio.from_thread.run(following)
            except anyio.NoEventLoopError:
                anyio.from_thread.run(following, token=self._token)
            if not arrived:
                return
            yield arrived.pop()

    def check(self, *, untouched: bool) -> None:
        """Refuse a call that the state of the message does not allow.

        Args:
            untouched: Whether the call needs the whole message.
        """
        if self._closed:
            raise RuntimeError(
                "the async with of this message was left: it can only be read inside"
            )
        if self._running is not None:
            raise StreamBusy("another call is reading this message: wait until it ends")
        if self._poisoned:
            raise StreamPoisoned(
                "an earlier call stopped inside this message, so the rest of it cannot be read"
            )
        if untouched and not self._incoming.untouched:
            raise RuntimeError("this message was read already: a message can be read once")

    async def drive(self, message: Generator[Request, Any, T]) -> T:
        """Drive a part of the message; ``check`` comes before."""
        self._idle = anyio.Event()
        self._poisoned = True
        try:
            with anyio.CancelScope() as self._running:
                result = await drive(message, self._source)
                self._poisoned = False
                return result
        except BaseException:
            # A call that was refused, or cancelled early, has read nothing.
            self._poisoned = not self._incoming.untouched
            raise
        finally:
            self._running = None
            self._idle.set()
        raise RuntimeError("the async with of this message was left")

    async def close(self, unread: Unread, *, failed: bool) -> None:
        """Leave the message, as ``StreamReader.open`` does at its end.

        Args:
            unread: Whether remaining bytes are skipped, or the connection is broken.
            failed: Whether an error leads out of the ``async with``. Then nothing is skipped.
        """
        self._closed = True
        if self._running is not None:
            # A consumer in a thread goes on after the task that waited for it was cancelled.
            self._running.cancel()
            with anyio.CancelScope(shield=True):
                await self._idle.wait()
        if not self._source.in_message:
            return
        if unread == "abort":
            self._source.abort()
        elif not failed and not self._poisoned:
            await drive(self._incoming.skip(), self._source)


class _Tensors:
    """The iterator of ``Message.iterate``. It is no generator, which would have to be closed."""

    def __init__(
        self, message: Message, incoming: IncomingMessage, options: IterateOptions
    ) -> None:
        self._message = message
        self._incoming = incoming
        self._options = options
        self._stream: TensorStream | None = None
        self._ready: deque[tuple[str, torch.Tensor]] = deque()
        self._turns = Turns()

    def __aiter__(self) -> _Tensors:
        return self

    async def __anext__(self) -> tuple[str, torch.Tensor]:
        # Before a tensor is taken out: a cancellation loses none.
        await self._turns.item()
        if not self._ready:
            self._message.check(untouched=self._stream is None)
            if self._stream is None:
                self._stream = TensorStream(self._incoming, self._options)
            self._ready += await self._message.drive(self._stream.more())
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()


def _has_event_loop() -> bool:
    try:
        anyio.lowlevel.current_token()
    except RuntimeError:
        return False
    return True
