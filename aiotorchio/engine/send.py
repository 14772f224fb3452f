"""Sending one message: the save of an object, as a generator of requests.

In: an object and ``SaveOptions``. Out: a generator that yields requests (see ``requests``) and
returns a ``Summary``. ``outgoing_message`` is for the public functions, which drive the generator;
with ``specs`` it leads to ``send_streamed``. An error before the first byte leaves the stream as it
was. After that, the receiver gets an abort frame with the error, unless the stream itself failed.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Generator
from typing import Any

from aiotorchio.common.buffer import Buffer
from aiotorchio.common.torch_private import real_tensors
from aiotorchio.engine.prepared_save import PreparedSave, ReadyMessage
from aiotorchio.engine.requests import Progress, Request, Send, work
from aiotorchio.engine.save_options import SaveOptions
from aiotorchio.engine.send_streamed import iterator_of, send_streamed
from aiotorchio.engine.summary import Summary, summary
from aiotorchio.engine.thresholds import INLINE_ROWS
from aiotorchio.errors import AiotorchioError
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.parser import MessageEnded

__all__ = ["Sending", "outgoing_message", "send_message"]

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
    sending: Sending = yield from work(functools.partial(Sending.open, save), inline=save.is_small)
    try:
        yield from sending.chunks()
        yield from sending.finish()
    except Exception as error:
        yield from sending.abort(error)
        raise
    yield MessageEnded()
    return sending.summary()


class _State(enum.Enum):
    """How much of a message was sent, which decides whether an abort frame can follow."""

    UNSENT = enum.auto()  # No byte: the stream is untouched.
    OPEN = enum.auto()  # Whole frames, but no end frame: an abort frame can follow.
    ENDED = enum.auto()  # The end frame, alone or with the last chunk.


class Sending:
    """A message while it is sent: ``open``, then ``chunks`` and ``finish``, or ``abort``.

    Args:
        ready: The parts of the message.
        composer: The composer of its frames.
        opening: The composed preface, header and skeleton.
        progress: A callback of the caller, called with bytes done and bytes in total.
    """

    def __init__(
        self,
        ready: ReadyMessage,
        composer: Composer,
        opening: list[Buffer],
        progress: Progress | None,
    ) -> None:
        self._ready, self._composer, self._progress = ready, composer, progress
        self._payload, self._layout = ready.payload, ready.layout
        # The opening travels with the first chunk, or with the end frame if there is no chunk.
        self._unsent = opening
        self._state = _State.UNSENT
        self._nbytes = 0
        # The check of the version counters takes 0.2 us a tensor.
        self._is_small = len(ready.flattened.header.tensors) <= INLINE_ROWS

    @classmethod
    def open(cls, save: PreparedSave) -> Sending:
        """Take an object apart, and compose the opening. May run in a worker thread."""
        with real_tensors():
            ready = save.ready()
        composer = Composer(ready.flattened.header, ready.layout, checksum=save.options.checksum)
        opening = composer.opening(ready.flattened.skeleton)
        return cls(ready, composer, opening, save.options.progress)

    def chunks(self) -> Generator[Request, Any, None]:
        """Send the chunks, and with any chunk the end frame, too.

        The end frame travels with the last chunk if the bytes of that cannot change, otherwise
        after it. ``progress`` reports the last chunk only when the end frame was sent.
        """
        payload, layout = self._payload, self._layout
        in_thread = payload.has_device_copies or payload.has_gathered or payload.small > INLINE_ROWS
        frame: list[Buffer] = []
        if layout.chunks:
            compose = functools.partial(self._compose, 0)
            frame = yield from work(compose, inline=not in_thread)
        for index in range(layout.chunks):
            buffers, self._unsent = self._unsent + frame, []
            last = index == layout.chunks - 1
            if last and not payload.borrows:
                # The end frame says that no tensor was changed: these bytes are copies.
                buffers += yield from work(self._compose_end, inline=self._is_small)
            self._state = _State.ENDED if last and not payload.borrows else _State.OPEN
            upcoming = None if last else functools.partial(self._compose, index + 1)
            # Gathering, joining and device copies take long: they overlap with the chunk before.
            frame = yield Send(
                buffers,
                background=upcoming if in_thread else None,
                transient=payload.has_device_copies,
            )
            self._nbytes += sum(map(len, buffers))
            if last:
                yield from self.finish()
            if self._progress:
                self._progress(sum(layout.chunk_range(index)), layout.total)
            if upcoming and not in_thread:
                frame = upcoming()

    def finish(self) -> Generator[Request, Any, None]:
        """Send the end of a message without chunks; ``chunks`` has sent that of any other."""
        if self._state is _State.ENDED:
            return
        end = yield from work(self._compose_end, inline=self._is_small)
        buffers, self._unsent = self._unsent + end, []
        self._state = _State.OPEN
        yield Send(buffers)
        self._nbytes += sum(map(len, buffers))
        self._state = _State.ENDED

    def abort(self, error: Exception) -> Generator[Request, Any, None]:
        """Send the reason to the receiver, if the stream is intact.

        Args:
            error: The error that stopped the message; the caller raises it after this.

        Raises:
            RuntimeError: A tensor was changed while it was sent, and the connection broke: perhaps
                the receiver noticed the change.
            AiotorchioError: The error of the stream.
        """
        watched = self._ready.watched and isinstance(error, AiotorchioError)
        changed = self._ready.flattened.versions.changed(_CHANGED) if watched else None
        reason = f"{type(error).__name__}: {error}"
        try:
            if self._state is not _State.UNSENT:
                yield from self._tell(reason, raises=changed is None)
            if changed is not None:
                raise changed from error
        finally:
            # An error that is raised here holds this frame. If the frame held the error, the
            # payload would stay in memory until the next garbage collection.
            del error, changed

    def _tell(self, reason: str, *, raises: bool) -> Generator[Request, Any, None]:
        """Send an abort frame; ``raises`` says whether an error of the stream is raised."""
        frame = [] if self._state is _State.ENDED else self._composer.abort(reason)
        try:
            # If the stream itself has failed, this fails with the same error, even if empty.
            yield Send(frame)
            yield MessageEnded()
        except AiotorchioError:
            if raises:
                raise

    def summary(self) -> Summary:
        """Return the summary, after the last byte."""
        return summary(self._ready.flattened, self._layout, self._composer, self._nbytes)

    def _compose(self, index: int) -> list[Buffer]:
        with real_tensors():
            return self._composer.chunk_frame(
                self._payload.chunk_views(*self._layout.chunk_range(index))
            )

    def _compose_end(self) -> list[Buffer]:
        if self._ready.watched:
            self._ready.flattened.versions.check(_CHANGED)
        return self._composer.end()
