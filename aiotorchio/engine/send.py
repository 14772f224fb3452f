"""Sending one message: an object, or the tensors of an iterator (see ``send_streamed``)."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import Any

from aiotorchio.common.buffer import Buffer
from aiotorchio.common.torch_private import real_tensors
from aiotorchio.engine.prepared_save import PreparedSave, ReadyMessage
from aiotorchio.engine.requests import Request, Send, work
from aiotorchio.engine.save_options import SaveOptions
from aiotorchio.engine.send_streamed import iterator_of, send_streamed
from aiotorchio.engine.summary import Summary, summary
from aiotorchio.engine.thresholds import INLINE_ROWS
from aiotorchio.errors import AiotorchioError
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.parser import MessageEnded

__all__ = ["outgoing_message", "send_message"]

_CHANGED = "while it was sent: pass snapshot=True to send the state as it is when the call is made"


def outgoing_message(obj: object, options: SaveOptions) -> Generator[Request, Any, Summary]:
    """Return the message of a save, of which nothing is done yet but the snapshot.

    Call it when the caller makes the call.

    Raises:
        TypeError: An object that the options exclude.
        ValueError: Options that the object excludes.
    """
    if options.specs is None:
        return send_message(PreparedSave(obj, options))
    return send_streamed(iterator_of(obj), options)


def send_message(save: PreparedSave) -> Generator[Request, Any, Summary]:
    """Send one object as a message.

    Yields:
        Requests; see ``requests``.

    Returns:
        The summary of the message.
    """
    save.begin()
    progress = save.options.progress

    def begin() -> tuple[ReadyMessage, Composer, list[Buffer]]:
        with real_tensors():
            ready = save.ready()
        composer = Composer(ready.flattened.header, ready.layout, checksum=save.options.checksum)
        return ready, composer, composer.opening(ready.flattened.skeleton)

    ready, composer, unsent = yield from work(begin, inline=save.is_small)
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
    return summary(ready.flattened, layout, composer, nbytes)


def _size(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))
