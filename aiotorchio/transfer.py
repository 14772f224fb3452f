"""The one junction: a message between wire, graph, memory and a stream.

``send_message`` and ``receive_message`` are generators that do everything but I/O: they yield
what they wait for. The two drivers at the end of this module carry it out, ``drive`` on an async
stream and ``drive_blocking`` on a blocking one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import torch

from aiotorchio.errors import AiotorchioError, InvalidObjectError, LimitExceeded
from aiotorchio.graph.flatten import Flattened
from aiotorchio.graph.location import MapLocation, destinations, relocate
from aiotorchio.graph.rebuild import Rebuilder, build_tensors
from aiotorchio.memory.payload import IncomingPayload, OutgoingPayload
from aiotorchio.memory.swap import swap_bytes
from aiotorchio.streams.base import Buffer, Sink, Source
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import MIXED_UNITS, Header, Layout
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
)

__all__ = [
    "LoadOptions",
    "Progress",
    "Summary",
    "drive",
    "drive_blocking",
    "receive_message",
    "send_message",
]

T = TypeVar("T")
Progress = Callable[[int, int], object]
Task = Callable[[], Any]

# Up to this size an object is built where it is: a thread takes 0.1 ms to get to work, and
# building takes 5 us a tensor and less for a byte of the skeleton.
_INLINE_TENSORS = 200
_INLINE_SKELETON = 8 * 2**10


@dataclass(frozen=True, slots=True)
class Send:
    """Asks to send buffers, and to run a task in the meantime; answer: the task's result."""

    buffers: Sequence[Buffer]
    meanwhile: Task | None = None


@dataclass(frozen=True, slots=True)
class Fill:
    """Asks to fill buffers, and to run a task in the meantime; answer: bytes written."""

    buffers: Sequence[memoryview]
    meanwhile: Task | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Asks to run a task away from the event loop; answer: its result."""

    task: Task


Request = ReadBytes | Fill | Send | Work | MessageEnded


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
    flattened: Flattened,
    *,
    checksum: bool,
    progress: Progress | None = None,
    payload: OutgoingPayload | None = None,
) -> Generator[Request, Any, Summary]:
    """Everything about sending one message but the sending.

    Args:
        flattened: The object.
        checksum: Whether chunks carry a digest.
        progress: Called with bytes done and bytes in total, after each chunk.
        payload: In place of the default one, for tests.

    Yields:
        What it waits for.

    Returns:
        What was sent.
    """
    header = flattened.header
    layout = Layout(header)
    composer = Composer(header, layout, checksum=checksum)
    if payload is None:
        payload = OutgoingPayload(
            flattened.storages, layout.offsets, layout.nbytes, layout.chunk_size
        )
    nbytes = 0

    def compose(index: int) -> list[Buffer]:
        """One chunk, and with the last one the end."""
        frame = composer.chunk(payload.chunk(*layout.chunk(index)))
        return frame + composer.end() if index == layout.chunks - 1 else frame

    unsent = composer.opening(flattened.skeleton)
    if not layout.chunks:
        unsent += composer.end()
        yield Send(unsent)
        nbytes += _size(unsent)
    else:
        frame = (yield Work(functools.partial(compose, 0))) if payload.has_staged else compose(0)
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
            except AiotorchioError:
                raise
            except Exception as error:
                # The stream stands between two frames: the receiver can be told.
                if upcoming is not None:
                    yield Send(composer.abort(f"{type(error).__name__}: {error}"))
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
    """What is known of a message once its header is in."""

    def __init__(self, header: Header, layout: Layout, options: LoadOptions) -> None:
        swapped = header.byteorder != sys.byteorder
        if swapped and any(row.unit == MIXED_UNITS for row in header.storages):
            raise InvalidObjectError(
                f"a storage of numbers of several sizes can't be read on a "
                f"{sys.byteorder}-endian machine",
                entry="header",
            )
        self.header = header
        self._swapped = swapped
        self._map_location = options.map_location
        self.total = layout.total
        self.payload = IncomingPayload(
            layout.offsets,
            layout.nbytes,
            [row.nbytes for row in header.storages],
            destinations(header, options.map_location),
            layout.chunk_size,
        )

    def storages(self) -> list[torch.UntypedStorage]:
        """The storages with their bytes, in their final places."""
        storages = self.payload.storages()
        rows, locations = self.header.storages, self.header.locations
        if self._swapped:
            for storage, row in zip(storages, rows, strict=True):
                swap_bytes(storage, row.unit)
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
    steps = Parser(options.limits).parse()
    message: Any = None
    rebuilder: Any = None
    move: Task | None = None
    upcoming: Task | None = None
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            break
        answer = None
        match step:
            case ReadBytes() | MessageEnded():
                answer = yield step
            case FillBuffers(buffers):
                # The chunk before goes to its device while this one comes in.
                answer = yield Fill(buffers, meanwhile=move)
                move = None
            case ChunkStarted(offset, length):
                try:
                    answer, upcoming = message.payload.chunk(offset, length)
                except MemoryError as error:
                    raise LimitExceeded(str(error), entry="payload") from error
            case ChunkReceived(offset, length):
                move = upcoming
                if options.progress:
                    options.progress(offset + length, message.total)
            case HeaderReceived(header, layout):
                message = incoming(header, layout, options)
            case SkeletonReceived(skeleton, offset):
                rebuilder = Rebuilder(
                    skeleton,
                    message.header.codec,
                    allow_pickle=options.allow_pickle,
                    weights_only=options.weights_only,
                    pickle_module=options.pickle_module,
                    encoding=options.encoding,
                    safe_globals=options.safe_globals,
                    map_location=options.map_location,
                    limits=options.limits,
                    offset=offset,
                )
                rows = len(message.header.tensors)
                small = (
                    rows <= _INLINE_TENSORS
                    and len(skeleton) <= _INLINE_SKELETON
                    and message.header.codec == "tree"
                )
                yield from _work(functools.partial(rebuilder.check, rows), small)
    if move is not None:
        yield Work(move)
    # In the caller's thread: a callable map_location is the caller's code.
    storages = message.storages()

    def build() -> Any:
        # Tensors made in inference mode could not be trained on, wherever they go.
        with torch.inference_mode(False):
            return rebuilder.build(build_tensors(message.header, storages), storages)

    return (yield from _work(build, small))


def _work(task: Task, inline: bool) -> Generator[Request, Any, Any]:
    return task() if inline else (yield Work(task))


async def drive(steps: Generator[Request, Any, T], stream: Source | Sink) -> T:
    """Carry out on an async stream what a message waits for; return what it returns."""
    try:
        request = next(steps)
        while True:
            try:
                answer = await _perform(request, stream)
            except Exception as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


async def _perform(request: Request, stream: Any) -> Any:
    match request:
        case ReadBytes(size):
            return await stream.read(size)
        case Fill(buffers, meanwhile):
            filled, _ = await _with(meanwhile, functools.partial(stream.fill, buffers))
            return filled
        case Send(buffers, meanwhile):
            _, result = await _with(meanwhile, functools.partial(stream.send, buffers))
            return result
        case Work(task):
            return await anyio.to_thread.run_sync(task)
        case MessageEnded():
            stream.in_message = False


async def _with(task: Task | None, transfer: Callable[[], Awaitable[Any]]) -> tuple[Any, Any]:
    """Run a task in a worker thread while bytes are on the way; return both results."""
    if task is None:
        return await transfer(), None
    errors: list[Exception] = []
    result = transferred = None

    async def background() -> None:
        nonlocal result
        try:
            result = await anyio.to_thread.run_sync(task)
        except Exception as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(background)
        try:
            transferred = await transfer()
        except Exception as error:
            # First in the list: a broken connection matters more than a failed copy.
            errors.insert(0, error)
    if errors:
        raise errors[0]
    return transferred, result


def drive_blocking(steps: Generator[Request, Any, T], stream: BlockingStream) -> T:
    """Carry out on a blocking stream what a message waits for; return what it returns."""
    try:
        request = next(steps)
        while True:
            try:
                answer = _perform_blocking(request, stream)
            except Exception as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


def _perform_blocking(request: Request, stream: BlockingStream) -> Any:
    match request:
        case ReadBytes(size):
            return stream.read(size)
        case Fill(buffers, meanwhile):
            filled = stream.fill(buffers)
            if meanwhile:
                meanwhile()
            return filled
        case Send(buffers, meanwhile):
            stream.send(buffers)
            return meanwhile() if meanwhile else None
        case Work(task):
            return task()
        case MessageEnded():
            stream.in_message = False
