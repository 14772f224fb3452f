"""The one junction: a message between wire, graph, memory and a stream.

``send_message`` and ``receive_message`` are generators that do everything but I/O: they yield
what they wait for, and a driver (see ``drive``) carries it out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from aiotorchio.drive import Fill, Request, Send, Task
from aiotorchio.errors import AiotorchioError, InvalidObjectError, LimitExceeded
from aiotorchio.graph.flatten import Flattened
from aiotorchio.graph.location import MapLocation, destinations, relocate
from aiotorchio.graph.rebuild import Rebuilder, build_tensors
from aiotorchio.memory.payload import IncomingPayload, OutgoingPayload
from aiotorchio.memory.staging import Copier, DeviceCopier
from aiotorchio.memory.swap import swap_bytes
from aiotorchio.streams.base import Buffer
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import META_LOCATION, MIXED_UNITS, Header, Layout
from aiotorchio.wire.limits import Limits
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

__all__ = ["LoadOptions", "Progress", "Summary", "receive_message", "send_message"]

Progress = Callable[[int, int], object]
Event = TypeVar("Event")

# Up to this size an object is built on the event loop: a thread takes 0.1 ms to get to work, and
# building takes 5 us a tensor and less for a byte of the skeleton.
_INLINE_ROWS = 200
_INLINE_SKELETON = 8 * 2**10


@dataclass(frozen=True, slots=True)
class Summary:
    """What a save has sent.

    Attributes:
        nbytes: Bytes on the wire, all in all.
        payload_nbytes: Bytes of the storages among them, with what aligns them.
        tensors: Distinct tensors.
        storages: Distinct storages.
        chunks: Chunks of the payload.
        codec: ``"tree"`` or ``"pickle"``: how the object around the tensors was written.
        message_id: 32 hexadecimal digits that this message shares with no other.
    """

    nbytes: int
    payload_nbytes: int
    tensors: int
    storages: int
    chunks: int
    codec: str
    message_id: str


def send_message(
    flatten: Callable[[], Flattened],
    *,
    inline: bool,
    checksum: bool,
    progress: Progress | None = None,
    outgoing: Callable[..., OutgoingPayload] = OutgoingPayload,
) -> Generator[Request, Any, Summary]:
    """Everything about sending one message but the sending.

    Args:
        flatten: Takes the object apart.
        inline: The object is so small that this need not happen in a worker thread.
        checksum: Whether chunks carry a digest.
        progress: Called with bytes done and bytes in total, after each chunk.
        outgoing: In place of the default one, for tests.

    Yields:
        What it waits for.

    Returns:
        What was sent.
    """
    # In the caller's thread: a copier reads which streams of the devices are current there.
    copier = DeviceCopier()

    def prepare() -> tuple[Header, Layout, Composer, OutgoingPayload, list[Buffer]]:
        flattened = flatten()
        header = flattened.header
        layout = Layout(header)
        composer = Composer(header, layout, checksum=checksum)
        payload = outgoing(
            flattened.storages, layout.offsets, layout.nbytes, layout.chunk_size, copier=copier
        )
        return header, layout, composer, payload, composer.opening(flattened.skeleton)

    header, layout, composer, payload, unsent = yield from _work(prepare, inline=inline)
    nbytes = 0

    def compose(index: int) -> list[Buffer]:
        """One chunk, and with the last one the end."""
        frame: list[Buffer] = composer.chunk(payload.chunk(*layout.chunk(index)))
        return frame + composer.end() if index == layout.chunks - 1 else frame

    if not layout.chunks:
        unsent += composer.end()
        yield Send(unsent)
        nbytes += _size(unsent)
    else:
        first = functools.partial(compose, 0)
        frame = yield from _work(first, inline=not payload.has_staged)
        for index in range(layout.chunks):
            buffers, unsent = unsent + frame, []
            upcoming = functools.partial(compose, index + 1) if index + 1 < layout.chunks else None
            try:
                if payload.has_staged or upcoming is None:
                    # The next chunk comes from its device while this one is on the wire.
                    frame = yield Send(buffers, meanwhile=upcoming)
                else:
                    yield Send(buffers)
                    frame = upcoming()
                nbytes += _size(buffers)
                if progress:
                    progress(sum(layout.chunk(index)), layout.total)
            except Exception as error:
                # The stream stands between two frames, so the receiver can be told, if it has
                # not got all. Had the stream itself failed, this would fail with the same error.
                reason = f"{type(error).__name__}: {error}"
                yield Send([] if upcoming is None else composer.abort(reason))
                yield MessageEnded()
                raise
    yield MessageEnded()
    return Summary(
        nbytes=nbytes,
        payload_nbytes=layout.total,
        tensors=len(header.tensors),
        storages=len(header.storages),
        chunks=layout.chunks,
        codec=header.codec,
        message_id=composer.message_id.hex(),
    )


def _size(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How the caller wants an object loaded; the names are those of ``load_from_stream``."""

    map_location: MapLocation
    weights_only: bool
    allow_pickle: bool
    safe_globals: Sequence[Any]
    limits: Limits
    progress: Progress | None
    pickle_module: Any
    encoding: str


class _Incoming:
    """Where the payload of a message goes, once its header is in."""

    def __init__(self, header: Header, layout: Layout, options: LoadOptions) -> None:
        self._swapped = header.byteorder != sys.byteorder
        if self._swapped and any(row.unit == MIXED_UNITS for row in header.storages):
            raise InvalidObjectError(
                f"a storage of numbers of several sizes can't be read on a "
                f"{sys.byteorder}-endian machine",
                entry="header",
            )
        self._header = header
        self._layout = layout
        self._map_location = options.map_location
        # In the caller's thread: "cuda" is the device that is current there.
        self._devices = destinations(header, options.map_location)
        self._copier: Copier = DeviceCopier()
        self._incoming: Callable[..., IncomingPayload] = IncomingPayload

    def payload(self) -> IncomingPayload:
        """Memory for the storages, of which nothing is made yet."""
        return self._incoming(
            self._layout.offsets,
            self._layout.nbytes,
            [row.nbytes for row in self._header.storages],
            self._devices,
            self._layout.chunk_size,
            copier=self._copier,
        )

    def ordered(self, storages: list[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """The storages in the byte order of this machine."""
        if self._swapped:
            for storage, row in zip(storages, self._header.storages, strict=True):
                if storage.device.type != META_LOCATION:
                    swap_bytes(storage, row.unit)
        return storages

    def relocated(self, storages: list[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
        """The storages where a callable ``map_location`` puts them."""
        if not callable(self._map_location):
            return storages
        rows, locations = self._header.storages, self._header.locations
        return [
            relocate(storage, locations[row.location], self._map_location)
            for storage, row in zip(storages, rows, strict=True)
        ]


def receive_message(
    options: LoadOptions, incoming: Callable[..., _Incoming] = _Incoming
) -> Generator[Request, Any, Any]:
    """Everything about receiving one message but the receiving.

    Args:
        options: What to accept, and where to put it.
        incoming: In place of the default one, for tests.

    Yields:
        What it waits for.

    Returns:
        The object.
    """
    parser = Parser(options.limits)
    try:
        return (yield from _receive(parser.parse(), options, incoming))
    except AiotorchioError as error:
        if error.offset is None:
            error.offset = parser.position
        raise


def _receive(
    steps: Generator[Step, Any, None], options: LoadOptions, incoming: Callable[..., _Incoming]
) -> Generator[Request, Any, Any]:
    opened = yield from _until(HeaderReceived, steps)
    header, layout = opened.header, opened.layout
    rows = max(len(header.tensors), len(header.storages))
    message = incoming(header, layout, options)
    payload = yield from _work(message.payload, inline=rows <= _INLINE_ROWS)

    received = yield from _until(SkeletonReceived, steps)
    rebuilder = Rebuilder(
        received.skeleton,
        header.codec,
        allow_pickle=options.allow_pickle,
        weights_only=options.weights_only,
        pickle_module=options.pickle_module,
        encoding=options.encoding,
        safe_globals=options.safe_globals,
        map_location=options.map_location,
        limits=options.limits,
        offset=received.offset,
    )
    small = (
        header.codec == "tree"
        and rows <= _INLINE_ROWS
        and len(received.skeleton) <= _INLINE_SKELETON
    )
    yield from _work(functools.partial(rebuilder.check, len(header.tensors)), inline=small)

    move: Task | None = None
    for _ in range(layout.chunks):
        started = yield from _until(ChunkStarted, steps)
        try:
            buffers, upcoming = payload.chunk(started.offset, started.length)
        except MemoryError as error:
            raise LimitExceeded(str(error), entry="payload") from error
        # The chunk before goes to its device while this one comes in.
        arrived = yield from _until(ChunkReceived, steps, answer=buffers, meanwhile=move)
        move = upcoming
        if options.progress:
            options.progress(arrived.offset + arrived.length, layout.total)
    yield from _until(MessageEnded, steps)
    # The parser has its last word: whether the end frame is that of these frames.
    for _ in steps:
        raise AssertionError("a step after the end")

    if move is not None:
        yield Work(move)

    def gather() -> list[torch.UntypedStorage]:
        return message.ordered(payload.storages())

    storages = yield from _work(gather, inline=small)
    # Not in a worker thread: a callable map_location is the caller's code.
    storages = message.relocated(storages)

    def build() -> Any:
        # Tensors made in inference mode could not be trained on, wherever they go.
        with torch.inference_mode(False):
            return rebuilder.build(build_tensors(header, storages), storages)

    return (yield from _work(build, inline=small))


def _until(
    kind: type[Event],
    steps: Generator[Step, Any, None],
    *,
    answer: Any = None,
    meanwhile: Task | None = None,
) -> Generator[Request, Any, Event]:
    """Pass the parser's requests on to the driver until it has this kind of event."""
    while True:
        step = steps.send(answer)
        answer = None
        match step:
            case ReadBytes() | Work():
                answer = yield step
            case FillBuffers(buffers):
                answer = yield Fill(buffers, meanwhile=meanwhile)
            case MessageEnded():
                # Before its time, too: after an abort, which the parser raises next.
                yield step
        if isinstance(step, kind):
            return step


def _work(task: Task, *, inline: bool) -> Generator[Request, Any, Any]:
    return task() if inline else (yield Work(task))
