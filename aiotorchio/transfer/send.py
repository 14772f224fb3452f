"""Sending one message: an object that is there, or tensors that are made while they are sent."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.drive import END, Next, Request, Send
from aiotorchio.graph.flatten import Flattened
from aiotorchio.graph.into import has_memory
from aiotorchio.graph.names import TensorSpec
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.memory.produced import ProducedPayload
from aiotorchio.memory.staging import DeviceCopier
from aiotorchio.streams.base import Buffer
from aiotorchio.transfer.steps import Progress, work
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import Header, Layout
from aiotorchio.wire.parser import MessageEnded

__all__ = ["Summary", "send_message", "send_produced"]


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

    header, layout, composer, payload, unsent = yield from work(prepare, inline=inline)
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
        frame = yield from work(first, inline=not payload.has_staged)
        for index in range(layout.chunks):
            buffers, unsent = unsent + frame, []
            upcoming = functools.partial(compose, index + 1) if index + 1 < layout.chunks else None
            try:
                if payload.has_staged or upcoming is None:
                    # The next chunk comes from its device while this one is on the wire.
                    frame = yield Send(buffers, meanwhile=upcoming, passing=payload.has_staged)
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
    return _summary(header, layout, composer, nbytes)


def _summary(header: Header, layout: Layout, composer: Composer, nbytes: int) -> Summary:
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


def send_produced(
    pairs: AsyncIterator[tuple[str, torch.Tensor]] | Iterator[tuple[str, torch.Tensor]],
    flatten: Callable[[], Flattened],
    *,
    checksum: bool,
    progress: Progress | None = None,
    produced: Callable[..., ProducedPayload] = ProducedPayload,
) -> Generator[Request, Any, Summary]:
    """Likewise for tensors that come from an iterator, of which no more than one is held.

    Args:
        pairs: The tensors with their names, in the order of the rows.
        flatten: Gives the header and the skeleton; there are no storages yet.
        checksum: Whether chunks carry a digest.
        progress: Called with bytes done and bytes in total, after each chunk.
        produced: In place of the default payload, for tests.

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
    payload = produced(layout.offsets, layout.nbytes, layout.chunk_size, copier=copier)
    tensors = _Produced(pairs, header)
    # At once: the receiver can prepare while the first tensor is made.
    opening = composer.opening(flattened.skeleton)
    yield Send(opening)
    nbytes = _size(opening)
    try:
        for index in range(layout.chunks):
            start, length = layout.chunk(index)
            frame = composer.chunk((yield from tensors.fill(payload.chunk(start, length))))
            nbytes += _size(frame)
            yield Send(frame, passing=True)
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
    return _summary(header, layout, composer, nbytes + _size(end))


class _Produced:
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
