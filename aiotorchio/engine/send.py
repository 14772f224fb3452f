"""Sending one message: an object that is there, or tensors that are made while they are sent."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.common.buffer import Buffer
from aiotorchio.common.torch_private import real_tensors
from aiotorchio.engine.requests import END, Next, Progress, Request, Send, work
from aiotorchio.engine.thresholds import INLINE_ROWS
from aiotorchio.errors import AiotorchioError
from aiotorchio.graph.flatten import Flattened
from aiotorchio.graph.modules import has_memory
from aiotorchio.memory.device_copy import Copier, DeviceCopier, Here
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.memory.snapshot import SnapshotPayload
from aiotorchio.memory.streamed import StreamedPayload
from aiotorchio.table.names import TensorSpec
from aiotorchio.table.versions import Versions
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import Header
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.parser import MessageEnded

__all__ = ["Prepared", "Summary", "prepare", "send_message", "send_streamed"]

_CHANGED = "while it was sent: pass snapshot=True to send the state as it is when the call is made"


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
        left_out_nbytes: Bytes of the storages that were not sent, since no tensor shows them
            (``compact=True``).
    """

    nbytes: int
    payload_nbytes: int
    tensors: int
    storages: int
    chunks: int
    codec: str
    message_id: str
    left_out_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """An object that is ready to be sent, once.

    Attributes:
        flattened: Its parts.
        layout: Of the payload.
        payload: What its chunks are taken from.
        watched: Whether somebody may change the tensors while they are sent.
    """

    flattened: Flattened
    layout: Layout
    payload: OutgoingPayload | SnapshotPayload
    watched: bool


def prepare(
    flattened: Flattened,
    copier: Callable[[], Copier],
    *,
    snapshot: bool = False,
    outgoing: Callable[..., OutgoingPayload] = OutgoingPayload,
) -> Prepared:
    """Get an object ready to be sent.

    Args:
        flattened: Its parts.
        copier: Gives what copies storages from their devices.
        snapshot: Copy everything, here and now.
        outgoing: In place of the default payload, for tests.

    Returns:
        The object, to be sent once.
    """
    layout = Layout(flattened.header)
    payload = outgoing(
        flattened.storages,
        layout.offsets,
        layout.nbytes,
        layout.chunk_size,
        parts=flattened.parts,
        copier=Here() if snapshot else copier(),
    )
    if not snapshot:
        return Prepared(flattened, layout, payload, watched=True)
    chunks = map(layout.chunk, range(layout.chunks))
    copies = SnapshotPayload(payload, chunks, layout.chunk_size, copier)
    flattened.versions.check(
        "while the snapshot was taken: no other thread may change it meanwhile"
    )
    # Nothing but the copies is needed any more: the originals are the caller's to drop.
    parts = dataclasses.replace(flattened, storages=[], parts={}, versions=Versions())
    return Prepared(parts, layout, copies, watched=False)


def send_message(
    make_ready: Callable[[], Prepared],
    *,
    inline: bool,
    checksum: bool,
    progress: Progress | None = None,
    start: Callable[[], object] = bool,
) -> Generator[Request, Any, Summary]:
    """Everything about sending one message but the sending.

    Args:
        make_ready: Takes the object apart, and prepares it.
        inline: The object is so small that this need not happen in a worker thread.
        checksum: Whether chunks carry a digest.
        progress: Called with bytes done and bytes in total, after each chunk.
        start: Called first, in the thread that drives the message.

    Yields:
        What it waits for.

    Returns:
        What was sent.
    """
    start()

    def begin() -> tuple[Prepared, Composer, list[Buffer]]:
        with real_tensors():
            ready = make_ready()
        composer = Composer(ready.flattened.header, ready.layout, checksum=checksum)
        return ready, composer, composer.opening(ready.flattened.skeleton)

    ready, composer, unsent = yield from work(begin, inline=inline)
    begun = False
    layout, payload = ready.layout, ready.payload
    # The look at the version counters takes 0.2 us a tensor.
    small = len(ready.flattened.header.tensors) <= INLINE_ROWS

    def compose(index: int) -> list[Buffer]:
        with real_tensors():
            frame: list[Buffer] = composer.chunk(payload.chunk(*layout.chunk(index)))
        return frame

    def compose_end() -> list[Buffer]:
        if ready.watched:
            ready.flattened.versions.check(_CHANGED)
        end: list[Buffer] = composer.end()
        return end

    def send_end(unsent: list[Buffer]) -> Generator[Request, Any, int]:
        nonlocal begun
        buffers = unsent + (yield from work(compose_end, inline=small))
        begun = True
        yield Send(buffers)
        return _size(buffers)

    frame: list[Buffer] = []
    in_thread = payload.has_device_copies or payload.has_gathered or payload.small > INLINE_ROWS
    if layout.chunks:
        frame = yield from work(functools.partial(compose, 0), inline=not in_thread)
    nbytes, ended = 0, False
    try:
        for index in range(layout.chunks):
            buffers, unsent = unsent + frame, []
            last = index == layout.chunks - 1
            if last and not payload.borrows:
                # Nobody can change these bytes any more: the end may go with them.
                buffers += yield from work(compose_end, inline=small)
                ended = True
            upcoming = None if last else functools.partial(compose, index + 1)
            begun = True
            # What takes its time is composed while the chunk before it is on the wire.
            frame = yield Send(
                buffers,
                background=upcoming if in_thread else None,
                transient=payload.has_device_copies,
            )
            nbytes += _size(buffers)
            if last and not ended:
                nbytes += yield from send_end([])
                ended = True
            if progress:
                progress(sum(layout.chunk(index)), layout.total)
            if upcoming and not in_thread:
                frame = upcoming()
        if not ended:
            nbytes += yield from send_end(unsent)
    except Exception as error:
        # Where a connection broke, the receiver has found that bytes changed on their way, maybe.
        look = ready.watched and isinstance(error, AiotorchioError)
        changed = ready.flattened.versions.changed(_CHANGED) if look else None
        if begun:
            # The stream stands between two frames, so the receiver can be told, if it has not got
            # all. Had the stream itself failed, this would fail with the same error.
            try:
                yield Send([] if ended else composer.abort(f"{type(error).__name__}: {error}"))
                yield MessageEnded()
            except AiotorchioError:
                if changed is None:
                    raise
        if changed is not None:
            raise changed from error
        raise
    yield MessageEnded()
    return _summary(ready.flattened, layout, composer, nbytes)


def _summary(flattened: Flattened, layout: Layout, composer: Composer, nbytes: int) -> Summary:
    header = flattened.header
    return Summary(
        nbytes=nbytes,
        payload_nbytes=layout.total,
        tensors=len(header.tensors),
        storages=len(header.storages),
        chunks=layout.chunks,
        codec=header.codec,
        message_id=composer.message_id.hex(),
        left_out_nbytes=flattened.left_out,
    )


def _size(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))


def send_streamed(
    pairs: AsyncIterator[tuple[str, torch.Tensor]] | Iterator[tuple[str, torch.Tensor]],
    flatten: Callable[[], Flattened],
    *,
    checksum: bool,
    progress: Progress | None = None,
    streamed: Callable[..., StreamedPayload] = StreamedPayload,
) -> Generator[Request, Any, Summary]:
    """Likewise for tensors that come from an iterator, of which no more than one is held.

    Args:
        pairs: The tensors with their names, in the order of the rows.
        flatten: Gives the header and the skeleton; there are no storages yet.
        checksum: Whether chunks carry a digest.
        progress: Called with bytes done and bytes in total, after each chunk.
        streamed: In place of the default payload, for tests.

    Yields:
        What it waits for.

    Returns:
        What was sent.
    """
    copier = DeviceCopier()
    flattened: Flattened = yield from work(flatten, inline=False)
    header = flattened.header
    layout = Layout(header)
    composer = Composer(header, layout, checksum=checksum)
    payload = streamed(layout.offsets, layout.nbytes, layout.chunk_size, copier=copier)
    # Half a millisecond for a hundred.
    tensors: _StreamedTensors = yield from work(
        functools.partial(_StreamedTensors, pairs, header),
        inline=len(header.tensors) <= INLINE_ROWS,
    )
    # At once: the receiver can prepare while the first tensor is made.
    opening = composer.opening(flattened.skeleton)
    yield Send(opening)
    nbytes = _size(opening)
    try:
        for index in range(layout.chunks):
            start, length = layout.chunk(index)
            frame = composer.chunk((yield from tensors.fill(payload.chunk(start, length))))
            nbytes += _size(frame)
            yield Send(frame, transient=True)
            # Its tensor must be free before the next one is made.
            del frame
            if progress:
                progress(start + length, layout.total)
        yield from tensors.finish()
    except Exception as error:
        yield Send(composer.abort(f"{type(error).__name__}: {error}"))
        yield MessageEnded()
        raise
    end = composer.end()
    yield Send(end)
    yield MessageEnded()
    return _summary(flattened, layout, composer, nbytes + _size(end))


class _StreamedTensors:
    """Takes tensors from an iterator, and compares them with what was announced."""

    def __init__(self, pairs: Any, header: Header) -> None:
        self._pairs = pairs
        self._rows = [(row.names[0], TensorSpec.of_row(row)) for row in header.tensors]
        self._taken = 0

    def fill(
        self, chunk: Generator[None, torch.Tensor, list[memoryview]]
    ) -> Generator[Request, Any, list[memoryview]]:
        """Give a chunk the tensors that it asks for."""

        def go_on(tensor: torch.Tensor | None) -> list[memoryview] | None:
            try:
                # The first value sent to a generator must be None.
                chunk.send(tensor)  # type: ignore[arg-type]
            except StopIteration as stop:
                views: list[memoryview] = stop.value
                return views
            return None

        views = go_on(None)
        while views is None:
            tensor = yield from self._next()
            # Bytes come from a device in a worker thread.
            views = yield from work(
                functools.partial(go_on, tensor), inline=tensor.device.type == "cpu"
            )
            del tensor
        return views

    def finish(self) -> Generator[Request, Any, None]:
        """Take what has no bytes and follows the last byte, and make sure that there is no more."""
        while self._taken < len(self._rows):
            yield from self._next()
        if (yield Next(self._pairs)) is not END:
            raise ValueError(f"the iterator gives more than the {len(self._rows)} tensors of specs")

    def _next(self) -> Generator[Request, Any, torch.Tensor]:
        name, spec = self._rows[self._taken]
        pair = yield Next(self._pairs)
        if pair is END:
            raise ValueError(f"the iterator ended where {name!r} must follow")
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"the iterator gives names with tensors, not {type(pair).__name__}")
        given, tensor = pair
        if given != name:
            raise ValueError(f"the iterator gives {given!r} where specs has {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        if TensorSpec.of(tensor) != spec:
            raise ValueError(f"{name!r} is {TensorSpec.of(tensor)} where specs has {spec}")
        if not has_memory(tensor) or tensor.device.type == "meta":
            raise ValueError(f"{name!r} is on meta, sparse, nested or a subclass: it has no bytes")
        self._taken += 1
        tensor = tensor.detach()

        def plain() -> torch.Tensor:
            return tensor.resolve_conj().resolve_neg().contiguous()

        is_plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        # On a device not in a worker thread: its work is queued behind that of the caller's stream.
        inline = is_plain or tensor.device.type != "cpu"
        made: torch.Tensor = yield from work(plain, inline=inline)
        return made
