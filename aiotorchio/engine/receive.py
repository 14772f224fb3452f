"""Receiving one message: its header first, then as the caller likes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.codec import STORAGE
from aiotorchio.codecs.pickled.opcodes import globals_of, is_blocked
from aiotorchio.common.gc_pause import release
from aiotorchio.engine.composite_names import find_composites
from aiotorchio.engine.load_options import IterateOptions, LoadOptions
from aiotorchio.engine.module_commit import WithModules
from aiotorchio.engine.placement import Placement
from aiotorchio.engine.requests import Fill, Progress, Request, in_turns, work
from aiotorchio.engine.threads import Task
from aiotorchio.engine.thresholds import INLINE_HEADER, INLINE_NBYTES, INLINE_ROWS, INLINE_SKELETON
from aiotorchio.errors import AiotorchioError, LimitExceeded, MismatchError, UnsafeObjectError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.rebuild import Rebuilder, build_tensors
from aiotorchio.graph.select import revise
from aiotorchio.limits import Limits
from aiotorchio.memory.atomic import BufferSwap, Exchange, note_change
from aiotorchio.memory.host import scratch
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.table.names import TensorSpec, count_unnamed, specs_of
from aiotorchio.wire.header import META_LOCATION, Header
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

__all__ = ["IncomingMessage", "Loaded", "receive_message"]

Event = TypeVar("Event")

# Freeing the rows of a header takes 4 ms a MiB.
_RELEASED_NBYTES, _RELEASED_ROWS = 2**20, 2000


@dataclass(slots=True)
class Loaded:
    """An object that has arrived whole.

    Attributes:
        obj: The object.
        commit: What its tensors still wait for, if they are destinations of the caller's.
        close: To be called when the commit is carried out, or never will be.
    """

    obj: Any
    commit: Exchange | BufferSwap | WithModules | None
    close: Callable[[], None]


class IncomingMessage:
    """One message; ``open`` comes first, then one of ``load``, ``skip``, and ``tensors``.

    Each of them is a generator that yields what it waits for (``tensors``: see that module).

    Args:
        limits: What to accept.
        placement: In place of the default one, for tests.

    Attributes:
        opened: The header, when it is in.
        untouched: Nothing behind the header was asked for, or only the skeleton, which is kept.
        chunks_left: Those that were not received yet.
        skipped: What was not received before will not be given to anybody.
        ended: The stream stands behind the message.
    """

    def __init__(self, limits: Limits, placement: Callable[..., Placement] = Placement) -> None:
        self.limits = limits
        self._parser = Parser(limits)
        self._steps = self._parser.parse()
        self.placement = placement
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

    def load(self, options: LoadOptions) -> Generator[Request, Any, Loaded]:
        """Receive everything, and rebuild the object.

        A ``MismatchError`` that leaves the message ``untouched`` did no harm.
        """
        with self.located():
            place = self.placement(self.header, self.layout, options, options.target)
            inline = self.decides_inline(place)
            composites: Composites | None = None
            payload: IncomingPayload | None = None
            try:
                by_name = options.select is not None and options.into is None
                # What ``weights_only`` refuses may be loaded without it; only the load tells.
                if by_name and options.allow_pickle and options.weights_only:
                    composites = yield from self.composites(options, options.encoding)
                decide = functools.partial(place.decide, composites)
                yield from work(decide, inline=inline and composites is None)
                rebuilder = yield from self._rebuilder(options, place)
                payload = yield from work(place.payload, inline=inline)
                obj = yield from self._load(options, rebuilder, place, payload, inline=inline)
            except BaseException as error:
                place.close()
                if isinstance(error, Exception) and self.is_large:
                    staged = [] if place.commit is None else place.commit.tables
                    arrived = [] if payload is None else payload.tables
                    free = functools.partial(release, *place.tables, *staged, *arrived)
                    yield Work(free, to_its_end=True)
                raise
            return Loaded(obj, place.commit, place.close)

    def _load(
        self,
        options: LoadOptions,
        rebuilder: Rebuilder,
        place: Placement,
        payload: IncomingPayload,
        *,
        inline: bool,
    ) -> Generator[Request, Any, Any]:
        def note() -> None:
            if place.commit is None:
                note_change(place.by_name.values())

        yield from work(note, inline=inline)
        move: Task | None = None
        for _ in range(self.layout.chunks):
            move = yield from self.chunk(payload, options.progress, background=move)
        yield from self.end()
        if move is not None:
            yield Work(move)

        def gather() -> list[torch.UntypedStorage | None]:
            payload.check()
            # Again: who began to read them meanwhile has old and new numbers.
            note()
            storages = payload.storages()
            place.put_in_order(storages)
            place.copy_deferred(storages)
            return storages

        inline = inline and self._is_small(rebuilder)
        storages = yield from work(gather, inline=inline and place.finish_nbytes <= INLINE_NBYTES)
        if place.relocates:
            # Not in a worker thread: a callable map_location is the caller's code.
            storages = yield from in_turns(lambda item: place.relocated(*item), enumerate(storages))

        def build() -> Any:
            # Tensors made in inference mode could not be trained on, wherever they go.
            with torch.inference_mode(False), place.building():
                tensors = build_tensors(self.header, storages, place.prebuilt)
                obj = rebuilder.build(tensors, storages, place.unreliable(storages))
            place.check(obj)
            return revise(obj, place.names, place.revision) if place.revises else obj

        obj = yield from work(build, inline=inline)
        yield from work(functools.partial(place.complete, obj), inline=inline)
        yield from self.release(storages, *place.tables, *payload.tables)
        return obj

    def decides_inline(self, place: Placement) -> bool:
        """Whether it is quickly decided where everything goes, so that no thread is needed."""
        small = self.opened.nbytes <= INLINE_HEADER and place.steps <= INLINE_ROWS
        return small and not place.has_neighbours

    def _is_small(self, rebuilder: Rebuilder) -> bool:
        return (
            self.header.codec == "tree"
            # The first tensor there imports what takes half a second.
            and META_LOCATION not in self.header.locations
            and self.opened.nbytes <= INLINE_HEADER
            and max(len(self.header.tensors), len(self.header.storages)) <= INLINE_ROWS
            and rebuilder.nbytes <= INLINE_SKELETON
        )

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
            self._keep(received)
            names: list[str] = []
            if self.header.codec == "pickle":
                search = functools.partial(unsafe_globals, received, safe_globals)
                names = yield from work(search, inline=len(received.skeleton) <= INLINE_SKELETON)
            return names

    def composites(
        self, options: IterateOptions, encoding: str = "utf-8"
    ) -> Generator[Request, Any, Composites | None]:
        """Receive the skeleton, and find tensors of several rows in it; leaves all to be done."""
        if self.header.codec != "pickle":
            return None
        received = yield from self.skeleton()
        self._keep(received)
        skeleton = received.skeleton

        def may_have_some() -> bool:
            # What has no row of its own has rows without a name, or storages that are referred to.
            return STORAGE.encode() in skeleton or self.unnamed > 0

        small = self.opened.nbytes <= INLINE_HEADER and len(skeleton) <= INLINE_SKELETON
        if not (yield from work(may_have_some, inline=small)):
            return None
        found: Composites = yield from find_composites(
            self.header, received, options, self.limits, encoding=encoding
        )
        return found

    def _rebuilder(
        self, options: LoadOptions, place: Placement
    ) -> Generator[Request, Any, Rebuilder]:
        received = yield from self.skeleton()
        try:
            rebuilder = Rebuilder(
                received.skeleton,
                self.header.codec,
                allow_pickle=options.allow_pickle,
                weights_only=options.weights_only,
                pickle_module=options.pickle_module,
                encoding=options.encoding,
                safe_globals=options.allowed_globals,
                map_location=options.map_location,
                limits=self.limits,
                offset=received.offset,
            )

            def check() -> None:
                names = place.by_name_only
                rebuilder.check(self.header.tensors, names=names, look=place.look)
                place.note_skeleton(received.skeleton)

            yield from work(check, inline=self._is_small(rebuilder))
            if place.rehearses:
                # The first tensor on meta imports what takes half a second.
                yield Work(functools.partial(self._rehearse, rebuilder, place))
        except (MismatchError, UnsafeObjectError):
            self._keep(received)
            raise
        return rebuilder

    def _rehearse(self, rebuilder: Rebuilder, place: Placement) -> None:
        for obj in rebuilder.rehearse(self.header):
            place.rehearse(obj)

    def _keep(self, received: SkeletonReceived) -> None:
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


def receive_message(
    limits: Limits, options: LoadOptions, placement: Callable[..., Placement] = Placement
) -> Generator[Request, Any, Loaded]:
    """A message from its first byte to its last; arguments as of ``IncomingMessage``."""
    message = IncomingMessage(limits, placement)
    yield from message.open()
    try:
        return (yield from message.load(options))
    except Exception:
        yield from message.release()
        raise
