"""Sending tensors that are made while they are sent: the save of an iterator with ``specs``.

In: an iterator of (name, tensor), and the specs of all of them in ``SaveOptions``. The header and
the skeleton are sent before the first tensor is made, and at most one tensor is held. A tensor that
differs from its spec is an error of the iterator, of which the receiver gets an abort frame.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch

from aiotorchio.engine.prepared_save import PRODUCER
from aiotorchio.engine.requests import END, Next, Request, Send, work
from aiotorchio.engine.save_options import SaveOptions
from aiotorchio.engine.summary import Summary, summary
from aiotorchio.engine.thresholds import INLINE_ROWS
from aiotorchio.graph.flatten import Flattened, flatten_specs
from aiotorchio.graph.modules import has_memory
from aiotorchio.memory.device_copy import DeviceCopier
from aiotorchio.memory.streamed import StreamedPayload
from aiotorchio.table.names import TensorSpec
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import Header
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.parser import MessageEnded

__all__ = ["iterator_of", "send_streamed"]

NamedTensors = AsyncIterator[tuple[str, torch.Tensor]] | Iterator[tuple[str, torch.Tensor]]


def iterator_of(pairs: Any) -> NamedTensors:
    """Begin to iterate over names and tensors.

    Raises:
        TypeError: Neither an iterable nor an async one.
    """
    if isinstance(pairs, Mapping):
        pairs = pairs.items()
    if isinstance(pairs, AsyncIterable):
        return aiter(pairs)
    if isinstance(pairs, Iterable):
        return iter(pairs)
    raise TypeError(
        "with specs, the object must be an iterable of names and tensors, not "
        f"{type(pairs).__name__}"
    )


def send_streamed(pairs: NamedTensors, options: SaveOptions) -> Generator[Request, Any, Summary]:
    """Send the tensors of an iterator as one message.

    Args:
        pairs: The names and tensors, in the order of ``specs``.
        options: Options with ``specs``.

    Yields:
        Requests; see ``requests``.

    Returns:
        The summary of the message.
    """
    copier = DeviceCopier()
    flattened: Flattened = yield from work(functools.partial(_flatten, options), inline=False)
    header = flattened.header
    layout = Layout(header)
    composer = Composer(header, layout, checksum=options.checksum)
    payload = StreamedPayload(layout.offsets, layout.nbytes, layout.chunk_size, copier=copier)
    # This takes half a millisecond for a hundred tensors.
    tensors: _StreamedTensors = yield from work(
        functools.partial(_StreamedTensors, pairs, header),
        inline=len(header.tensors) <= INLINE_ROWS,
    )
    # Sent at once, so that the receiver can prepare while the first tensor is made.
    opening = composer.opening(flattened.skeleton)
    yield Send(opening)
    nbytes = sum(map(len, opening))
    try:
        for index in range(layout.chunks):
            start, length = layout.chunk_range(index)
            frame = composer.chunk_frame(
                (yield from tensors.fill(payload.collect_views(start, length)))
            )
            nbytes += sum(map(len, frame))
            yield Send(frame, transient=True)
            # The tensor of the frame must be free before the next one is made.
            del frame
            if options.progress:
                options.progress(start + length, layout.total)
        yield from tensors.finish()
    except Exception as error:
        yield Send(composer.abort(f"{type(error).__name__}: {error}"))
        yield MessageEnded()
        raise
    end = composer.end()
    yield Send(end)
    yield MessageEnded()
    return summary(flattened, layout, composer, nbytes + sum(map(len, end)))


def _flatten(options: SaveOptions) -> Flattened:
    return flatten_specs(
        options.tensor_specs or {},
        chunk_size=options.chunk_size,
        metadata=options.header_metadata,
        producer=PRODUCER,
    )


class _StreamedTensors:
    """The tensors of an iterator, each compared with its row of the header.

    Args:
        pairs: The names and tensors.
        header: The header, with a row for each.
    """

    def __init__(self, pairs: NamedTensors, header: Header) -> None:
        self._pairs = pairs
        self._rows = [(row.names[0], TensorSpec.of_row(row)) for row in header.tensors]
        self._taken = 0

    def fill(
        self, chunk: Generator[None, torch.Tensor, list[memoryview]]
    ) -> Generator[Request, Any, list[memoryview]]:
        """Pass the tensors of a chunk to its generator, and return the buffers of the chunk."""

        def advance(tensor: torch.Tensor | None) -> list[memoryview] | None:
            try:
                # The first value sent to a generator must be None.
                chunk.send(tensor)  # type: ignore[arg-type]
            except StopIteration as stop:
                views: list[memoryview] = stop.value
                return views
            return None

        views = advance(None)
        while views is None:
            tensor = yield from self._next()
            # Bytes come from a device in a worker thread.
            views = yield from work(
                functools.partial(advance, tensor), inline=tensor.device.type == "cpu"
            )
            del tensor
        return views

    def finish(self) -> Generator[Request, Any, None]:
        """Take the tensors without bytes at the end, and make sure that no other follows."""
        while self._taken < len(self._rows):
            yield from self._next()
        if (yield Next(self._pairs)) is not END:
            raise ValueError(
                f"the iterator yields more than the {len(self._rows)} tensors of specs"
            )

    def _next(self) -> Generator[Request, Any, torch.Tensor]:
        """Take the next tensor, and return it as contiguous numbers."""
        pair = yield Next(self._pairs)
        tensor = self._checked(pair)
        del pair
        self._taken += 1
        is_plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        # No worker thread on a device: the copy must follow the work of the caller's stream.
        inline = is_plain or tensor.device.type != "cpu"
        made: torch.Tensor = yield from work(functools.partial(_contiguous, tensor), inline=inline)
        return made

    def _checked(self, pair: Any) -> torch.Tensor:
        name, spec = self._rows[self._taken]
        if pair is END:
            raise ValueError(f"the iterator ended before {name!r}, which specs has")
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                f"the iterator must yield pairs of name and tensor, not {type(pair).__name__}"
            )
        given, tensor = pair
        if given != name:
            raise ValueError(f"the iterator yields {given!r} where specs has {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name!r} must be a tensor, not {type(tensor).__name__}")
        if TensorSpec.of(tensor) != spec:
            raise ValueError(f"{name!r} is {TensorSpec.of(tensor)} where specs has {spec}")
        if not has_memory(tensor) or tensor.device.type == "meta":
            raise ValueError(
                f"{name!r} is on meta, sparse, nested or a subclass, and has no bytes to send"
            )
        return tensor.detach()


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()
