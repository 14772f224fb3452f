"""One incoming message, frame by frame: header, skeleton, chunks, end.

``load`` receives the whole object through it, ``iterate`` one tensor after the other. Each method
that is a generator yields requests to a driver, and returns when its frames were received and their
digests compared; the chunks of a message without checksums have none. An error has the entry and
the offset that the parser reached.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.opcodes import globals_of, is_blocked
from aiotorchio.common.gc_pause import release
from aiotorchio.engine.matching import LoadContext
from aiotorchio.engine.requests import Fill, Progress, Request, work
from aiotorchio.engine.threads import Task
from aiotorchio.engine.thresholds import INLINE_HEADER, INLINE_ROWS, INLINE_SKELETON
from aiotorchio.errors import AiotorchioError, LimitExceeded
from aiotorchio.limits import Limits
from aiotorchio.memory.host import scratch
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.table.names import TensorSpec, count_unnamed, specs_of
from aiotorchio.wire.header import Header
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.parser import (
    ChunkReceived,
    ChunkStarted,
    FillBuffers,
    HeaderReceived,
    MessageEnded,
    Parser,
    ReadBytes,
    SkeletonReceived,
    Step,
    Work,
)

__all__ = ["IncomingMessage"]

Event = TypeVar("Event")

# Freeing the rows of a header takes 4 ms a MiB.
_RELEASED_NBYTES, _RELEASED_ROWS = 2**20, 2000


class IncomingMessage:
    """One message; ``open`` comes first, then a load, an iteration, or ``skip``.

    Args:
        limits: The limits of the receiver.

    Attributes:
        opened: The header, once ``open`` has returned.
        untouched: Nothing after the header was received, or only the skeleton, which is kept.
        chunks_left: The number of chunks to come.
        skipped: ``skip`` has dropped the rest of the message, or is doing so.
        ended: The next byte of the stream belongs to the next message.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._parser = Parser(limits)
        self._steps = self._parser.parse()
        self.opened: HeaderReceived
        self._skeleton: SkeletonReceived | None = None
        self._specs: Mapping[str, TensorSpec] | AiotorchioError | None = None
        self._unnamed = 0
        self.untouched = True
        self.skipped = self.ended = False

    @property
    def header(self) -> Header:
        """The tables of the message."""
        return self.opened.header

    @property
    def layout(self) -> Layout:
        """The place of each storage and chunk in the payload."""
        return self.opened.layout

    def open(self) -> Generator[Request, Any, None]:
        """Receive the header."""
        with self.located():
            self.opened = yield from self._until(HeaderReceived)
        self.chunks_left = self.layout.chunks

    def release(self, *tables: list[Any] | dict[Any, Any]) -> Generator[Request, Any, None]:
        """Free the rows of a large header, and other tables as long, away from the event loop."""
        if self.is_large:
            yield Work(functools.partial(self._release, *tables), to_its_end=True)

    def free(self, *tables: list[Any] | dict[Any, Any]) -> Generator[Request, Any, None]:
        """Free tables as long as a large header away from the event loop, and keep its rows."""
        if self.is_large:
            yield Work(functools.partial(release, *tables), to_its_end=True)

    @property
    def is_large(self) -> bool:
        """Whether freeing tables as long as those of the header would block an event loop."""
        rows = max(len(self.header.tensors), len(self.header.storages))
        return self.opened.nbytes > _RELEASED_NBYTES or rows > _RELEASED_ROWS

    def _release(self, *tables: list[Any] | dict[Any, Any]) -> None:
        rows = self.header.tensors
        release(*tables)
        if self.opened.nbytes > _RELEASED_NBYTES:
            release(*[row.names for row in rows if len(row.names) > 1000])
        release(rows, self.header.storages)

    def describe(self) -> Generator[Request, Any, None]:
        """Prepare ``specs`` and ``unnamed`` of a large header in a worker thread."""
        if self.opened.nbytes > INLINE_HEADER:
            yield Work(self._describe)

    def _describe(self) -> None:
        self._unnamed = count_unnamed(self.header)
        try:
            self._specs = specs_of(self.header)
        except AiotorchioError as error:
            # Raised by ``specs`` only: the message can be loaded all the same.
            self._specs = error.with_traceback(None)

    @property
    def unnamed(self) -> int:
        """The number of rows without a name, as ``count_unnamed`` counts them."""
        if self._specs is None:
            self._describe()
        return self._unnamed

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of each tensor by name; raises as ``specs_of``."""
        if self._specs is None:
            self._describe()
        if isinstance(self._specs, AiotorchioError):
            # The frames of an earlier caller are dropped.
            raise self._specs.with_traceback(None)
        assert self._specs is not None
        return self._specs

    def decides_inline(self, context: LoadContext) -> bool:
        """Whether matching and placement are so short that they need no worker thread."""
        small = self.opened.nbytes <= INLINE_HEADER and context.steps <= INLINE_ROWS
        return small and not context.has_neighbours

    def skeleton(self) -> Generator[Request, Any, SkeletonReceived]:
        """Receive the skeleton, if it was not received before."""
        self.untouched = False
        skeleton = self._skeleton or (yield from self._until(SkeletonReceived))
        self._skeleton = None
        return skeleton

    def unsafe_globals(self, safe_globals: Sequence[Any]) -> Generator[Request, Any, list[str]]:
        """Receive the skeleton, and list the names in it that a load would refuse.

        The message keeps the skeleton, so that it can still be loaded.
        """
        with self.located():
            received = yield from self.skeleton()
            self.keep(received)
            names: list[str] = []
            if self.header.codec == "pickle":
                search = functools.partial(unsafe_globals, received, safe_globals)
                names = yield from work(search, inline=len(received.skeleton) <= INLINE_SKELETON)
            return names

    def keep(self, received: SkeletonReceived) -> None:
        """Put the skeleton back, so that another call can load the message."""
        self._skeleton, self.untouched = received, True

    def skip(self) -> Generator[Request, Any, None]:
        """Receive and verify the remaining bytes, and drop them."""
        with self.located():
            self.skipped = True
            if self.untouched:
                yield from self.skeleton()
            dropped: memoryview | None = None
            while self.chunks_left:
                started = yield from self._until(ChunkStarted)
                dropped = dropped or scratch(started.length)
                yield from self._until(ChunkReceived, answer=[dropped[: started.length]])
                self.chunks_left -= 1
            if not self.ended:
                yield from self.end()

    def receive_chunk(
        self, payload: IncomingPayload, progress: Progress | None, *, background: Task | None = None
    ) -> Generator[Request, Any, Task | None]:
        """Receive the next chunk.

        Args:
            payload: Gives the buffers.
            progress: Called with the bytes received so far.
            background: Runs in a worker thread while the chunk arrives.

        Returns:
            A function that copies the chunk from its staging buffer; None: no buffer.
        """
        started = yield from self._until(ChunkStarted)
        find = functools.partial(payload.buffers_for, started.offset, started.length)
        inline = payload.steps(started.offset, started.length) <= INLINE_ROWS
        try:
            found: tuple[list[memoryview], Task | None] = yield from work(find, inline=inline)
        except RuntimeError as error:
            # torch's allocator has no memory for the staging buffer of a chunk.
            raise MemoryError(str(error)) from error
        buffers, move = found
        # The tuple would keep the memory of the buffers alive.
        del found
        arrived = yield from self._until(ChunkReceived, answer=buffers, background=background)
        self.chunks_left -= 1
        if progress:
            progress(arrived.offset + arrived.length, self.layout.total)
        return move

    def end(self) -> Generator[Request, Any, None]:
        """Receive the end frame, and verify the digest of the message."""
        yield from self._until(MessageEnded)
        # The parser compares the digest of the end frame with that of these frames.
        for _ in self._steps:
            raise AssertionError("a step after the end")

    def _until(
        self, kind: type[Event], *, answer: Any = None, background: Task | None = None
    ) -> Generator[Request, Any, Event]:
        """Pass requests of the parser to the driver until the parser has this kind of event."""
        while True:
            step: Step = self._steps.send(answer)
            answer = None
            match step:
                case ReadBytes() | Work():
                    answer = yield step
                case FillBuffers(buffers):
                    answer = yield Fill(buffers, background=background)
                case HeaderReceived():
                    yield step
                case MessageEnded():
                    # An abort frame ends a message early, and the parser raises it next.
                    self.ended = True
                    yield step
            if isinstance(step, kind):
                return step

    @contextmanager
    def located(self) -> Iterator[None]:
        """Give errors without an entry or an offset those that the parser has reached."""
        try:
            yield
        except MemoryError as error:
            raise LimitExceeded(
                f"the message needs more memory than this process can get: {error}",
                entry=self._parser.entry,
                offset=self._parser.position,
            ) from error
        except AiotorchioError as error:
            if error.offset is None:
                error.offset = self._parser.position
            if error.entry is None:
                error.entry = self._parser.entry
            raise


def unsafe_globals(received: SkeletonReceived, safe_globals: Sequence[Any]) -> list[str]:
    """List the classes and functions of a pickle that are not allowed, in alphabetical order."""
    try:
        named = globals_of(received.skeleton)
    except AiotorchioError as error:
        error.entry = "skeleton"
        error.offset = received.offset + (error.offset or 0)
        raise
    allowed = Allowlist(safe_globals, Limits(), None).globals.keys()
    return sorted(path for path in named if path not in allowed or is_blocked(path))
