"""Receiving one message: its header first, then as the caller likes."""

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
    """One message; ``open`` comes first, then one of ``load``, ``skip``, and ``tensors``.

    Each of them is a generator that yields what it waits for (``tensors``: see that module).

    Args:
        limits: What to accept.

    Attributes:
        opened: The header, when it is in.
        untouched: Nothing behind the header was asked for, or only the skeleton, which is kept.
        chunks_left: Those that were not received yet.
        skipped: What was not received before will not be given to anybody.
        ended: The stream stands behind the message.
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
        """Of the message."""
        return self.opened.header

    @property
    def layout(self) -> Layout:
        """Of its payload."""
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
        """Whether freeing what is as long as the tables of the header would hold an event loop."""
        rows = max(len(self.header.tensors), len(self.header.storages))
        return self.opened.nbytes > _RELEASED_NBYTES or rows > _RELEASED_ROWS

    def _release(self, *tables: list[Any] | dict[Any, Any]) -> None:
        rows = self.header.tensors
        release(*tables)
        if self.opened.nbytes > _RELEASED_NBYTES:
            release(*[row.names for row in rows if len(row.names) > 1000])
        release(rows, self.header.storages)

    def describe(self) -> Generator[Request, Any, None]:
        """Prepare ``specs`` for a header that is so large that this takes long."""
        if self.opened.nbytes > INLINE_HEADER:
            yield Work(self._describe)

    def _describe(self) -> None:
        self._unnamed = count_unnamed(self.header)
        try:
            self._specs = specs_of(self.header)
        except AiotorchioError as error:
            # For whoever asks for it: the message can be loaded all the same.
            self._specs = error.with_traceback(None)

    @property
    def unnamed(self) -> int:
        """How many tensors have no name."""
        if self._specs is None:
            self._describe()
        return self._unnamed

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of each tensor by name; raises as ``specs_of``."""
        if self._specs is None:
            self._describe()
        if isinstance(self._specs, AiotorchioError):
            # Not with the frames of whoever asked before.
            raise self._specs.with_traceback(None)
        assert self._specs is not None
        return self._specs

    def decides_inline(self, context: LoadContext) -> bool:
        """Whether it is quickly decided where everything goes, so that no thread is needed."""
        small = self.opened.nbytes <= INLINE_HEADER and context.steps <= INLINE_ROWS
        return small and not context.has_neighbours

    def skeleton(self) -> Generator[Request, Any, SkeletonReceived]:
        """Receive the skeleton, if it was not received before."""
        self.untouched = False
        skeleton = self._skeleton or (yield from self._until(SkeletonReceived))
        self._skeleton = None
        return skeleton

    def unsafe_globals(self, safe_globals: Sequence[Any]) -> Generator[Request, Any, list[str]]:
        """Receive the skeleton, and say what in it would be refused; leaves all to be done."""
        with self.located():
            received = yield from self.skeleton()
            self.keep(received)
            names: list[str] = []
            if self.header.codec == "pickle":
                search = functools.partial(unsafe_globals, received, safe_globals)
                names = yield from work(search, inline=len(received.skeleton) <= INLINE_SKELETON)
            return names

    def keep(self, received: SkeletonReceived) -> None:
        """Nothing was done with the skeleton: another call may do more."""
        self._skeleton, self.untouched = received, True

    def skip(self) -> Generator[Request, Any, None]:
        """Receive what is left, and drop it; it is verified all the same."""
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

    def chunk(
        self, payload: IncomingPayload, progress: Progress | None, *, background: Task | None = None
    ) -> Generator[Request, Any, Task | None]:
        """Receive the next chunk; returns what moves it on."""
        started = yield from self._until(ChunkStarted)
        find = functools.partial(payload.chunk, started.offset, started.length)
        inline = payload.steps(started.offset, started.length) <= INLINE_ROWS
        try:
            found: tuple[list[memoryview], Task | None] = yield from work(find, inline=inline)
        except RuntimeError as error:
            # Of torch's allocator, for the slab of a chunk.
            raise MemoryError(str(error)) from error
        # The chunk before goes to its device while this one comes in.
        buffers, move = found
        # It would keep the memory of its buffers alive.
        del found
        arrived = yield from self._until(ChunkReceived, answer=buffers, background=background)
        self.chunks_left -= 1
        if progress:
            progress(arrived.offset + arrived.length, self.layout.total)
        return move

    def end(self) -> Generator[Request, Any, None]:
        """Receive the end, and verify that all before it was whole."""
        yield from self._until(MessageEnded)
        # The parser has its last word: whether the end frame is that of these frames.
        for _ in self._steps:
            raise AssertionError("a step after the end")

    def _until(
        self, kind: type[Event], *, answer: Any = None, background: Task | None = None
    ) -> Generator[Request, Any, Event]:
        """Pass the parser's requests on to the driver until it has this kind of event."""
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
                    # Before its time, too: after an abort, which the parser raises next.
                    self.ended = True
                    yield step
            if isinstance(step, kind):
                return step

    @contextmanager
    def located(self) -> Iterator[None]:
        """Give errors the place that was reached, if they have none."""
        try:
            yield
        except MemoryError as error:
            raise LimitExceeded(
                f"no memory for what the message needs: {error}",
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
    """What a pickle names that only trust would let through, in alphabetical order."""
    try:
        named = globals_of(received.skeleton)
    except AiotorchioError as error:
        error.entry = "skeleton"
        error.offset = received.offset + (error.offset or 0)
        raise
    allowed = Allowlist(safe_globals, Limits(), None).globals.keys()
    return sorted(path for path in named if path not in allowed or is_blocked(path))
