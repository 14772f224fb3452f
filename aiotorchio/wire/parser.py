"""Bytes -> events, as a generator that asks for the bytes it needs.

The generator yields *requests*, which its driver answers, and *events*:

    ReadBytes(n)        answer: n bytes, or fewer if the stream ended
    FillBuffers(views)  answer: how many bytes were written, fewer only if the stream ended
    Work(task)          answer: what the task returns; it takes long, so an event loop runs it
                        in a thread
    ChunkStarted(...)   answer: the buffers that take the chunk, in order
    other events        answer: None

It never asks for a byte beyond its message, and checks every length before it asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from aiotorchio.common.gc_pause import release
from aiotorchio.errors import (
    ChecksumError,
    LimitExceeded,
    ProtocolError,
    RemoteAbort,
    TruncatedError,
)
from aiotorchio.limits import Limits
from aiotorchio.wire.frames import (
    ABORT,
    ABORT_REASON_MAX,
    CHUNK,
    END,
    FLAG_CHECKSUM,
    FRAME_HEAD_SIZE,
    HEADER,
    MAGIC_SIZE,
    PREFACE_SIZE,
    SKELETON,
    EndDigest,
    FrameHead,
    check_magic,
    decode_preface,
    frame_digest,
    message_id,
)
from aiotorchio.wire.header import Header, decode_header
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.validation import validate

__all__ = [
    "ChunkReceived",
    "ChunkStarted",
    "FillBuffers",
    "HeaderReceived",
    "MessageEnded",
    "Parser",
    "ReadBytes",
    "SkeletonReceived",
    "Step",
    "Work",
]


@dataclass(frozen=True, slots=True)
class ReadBytes:
    """Asks for the next ``size`` bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class FillBuffers:
    """Asks for the next bytes to be written into these buffers."""

    buffers: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class Work:
    """Asks to run a task away from the event loop.

    Attributes:
        task: What to run.
        to_its_end: Whether a cancellation waits until it has run. It must not take the place of an
            error that the task cleans up behind.
    """

    task: Callable[[], Any]
    to_its_end: bool = False


@dataclass(frozen=True, slots=True)
class HeaderReceived:
    """The header is in and valid; ``nbytes`` is its size. Nothing of the payload was asked for."""

    header: Header
    layout: Layout
    message_id: bytes
    checksum: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class SkeletonReceived:
    """The skeleton is in and intact; ``offset`` is its first byte in the message."""

    skeleton: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class ChunkStarted:
    """A chunk follows: ``length`` bytes of the payload from ``offset``."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """The chunk of the last ``ChunkStarted`` is in its buffers, and intact."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class MessageEnded:
    """The stream stands behind the last byte of the message: whole, or aborted by its sender."""


# Decoding and checking takes about 70 ns a byte, 2 ms for this size. Event loops wait no longer.
_SMALL_HEADER = 32 * 2**10

Step = (
    ReadBytes
    | FillBuffers
    | Work
    | HeaderReceived
    | SkeletonReceived
    | ChunkStarted
    | ChunkReceived
    | MessageEnded
)


class Parser:
    """Reads one message.

    Args:
        limits: What to accept.

    Attributes:
        position: Bytes of the message that were read so far.
        entry: What is read there.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._identity = b""
        self.position = 0
        self.entry = "preface"

    def parse(self) -> Generator[Step, Any, None]:
        """Yield requests and events until the message ends.

        Raises:
            ProtocolError: Bytes that SPEC.md does not allow here.
            TruncatedError: The stream ended.
            ChecksumError: A digest does not match.
            LimitExceeded: More than the limits allow.
            InvalidObjectError: The header describes tensors that cannot exist.
            RemoteAbort: The sender gave up.
        """
        # First, and even if there is no more: a peer that speaks something else may say no more.
        magic: bytes = yield ReadBytes(MAGIC_SIZE)
        check_magic(magic)
        self._took(magic, MAGIC_SIZE, "preface")
        preface = magic + (yield from self._read(PREFACE_SIZE - MAGIC_SIZE, "preface"))
        checksum = bool(decode_preface(preface) & FLAG_CHECKSUM)

        # The header defines the message id; until it is in, the preface stands for it.
        self._identity = preface
        head, _ = yield from self._head(HEADER, 0, 0)
        if head.length > self._limits.header_nbytes:
            raise self._limit(head, self._limits.header_nbytes)
        start = self.position
        data = yield from self._body(head)
        self._identity = message_id(preface, data)
        open_header = functools.partial(_open_header, data, self._limits, start)
        header, layout = open_header() if len(data) <= _SMALL_HEADER else (yield Work(open_header))
        end_digest = EndDigest(self._identity)
        yield HeaderReceived(header, layout, self._identity, checksum, len(data))
        # It can have a size of 32 MiB, and is not needed any more.
        del data, open_header

        head, encoded = yield from self._head(SKELETON, 0, 0)
        if head.length > self._limits.skeleton_nbytes:
            raise self._limit(head, self._limits.skeleton_nbytes)
        end_digest.update(encoded)
        start = self.position
        skeleton = yield from self._body(head)
        yield SkeletonReceived(skeleton, start)

        for index in range(layout.chunks):
            yield from self._chunk(index, layout, end_digest, checksum)

        head, _ = yield from self._head(END, layout.chunks, layout.total)
        if head.length != 8:
            raise ProtocolError(
                f"end frame of {head.length} bytes instead of 8",
                entry="end",
                offset=self.position,
            )
        body = yield from self._body(head)
        yield MessageEnded()
        if body != end_digest.encode():
            raise ChecksumError(
                "the frames are not those that were sent", entry="end", offset=self.position - 8
            )

    def _chunk(
        self, index: int, layout: Layout, end_digest: EndDigest, checksum: bool
    ) -> Generator[Step, Any, None]:
        offset, length = layout.chunk(index)
        head, encoded = yield from self._head(CHUNK, index, offset)
        if head.length != length:
            raise ProtocolError(
                f"chunk of {head.length} bytes where {length} must follow",
                entry=f"chunk {index}",
                offset=self.position,
            )
        if not checksum and head.digest:
            raise ProtocolError(
                "digest in a message without checksums",
                entry=f"chunk {index}",
                offset=self.position,
            )
        end_digest.update(encoded)
        self.entry = f"chunk {index}"
        buffers = yield ChunkStarted(offset, length)
        filled = yield FillBuffers(buffers)
        if filled < length:
            raise TruncatedError(
                f"the stream ended {length - filled} bytes before the end of chunk {index}",
                entry=layout.entry_at(offset + filled),
                offset=self.position + filled,
            )
        if checksum and frame_digest(self._identity, head, buffers) != head.digest:
            raise ChecksumError(
                f"the bytes of chunk {index} are not those that were sent",
                entry=layout.entry_at(offset),
                offset=self.position,
            )
        self.position += length
        # They would keep their memory alive for as long as the next chunk is not asked for.
        del buffers
        yield ChunkReceived(offset, length)

    def _read(self, size: int, entry: str) -> Generator[Step, Any, bytes]:
        self.entry = entry
        data: bytes = yield ReadBytes(size)
        self._took(data, size, entry)
        return data

    def _took(self, data: bytes, size: int, entry: str) -> None:
        self.position += len(data)
        if len(data) < size:
            what = "before a message began" if self.position == 0 else f"inside the {entry}"
            raise TruncatedError(f"the stream ended {what}", entry=entry, offset=self.position)

    def _head(
        self, kind: bytes, index: int, offset: int
    ) -> Generator[Step, Any, tuple[FrameHead, bytes]]:
        """The next head, which must be of this kind and place, or else an abort."""
        entry = f"{kind.decode()} frame"
        start = self.position
        encoded = yield from self._read(FRAME_HEAD_SIZE, entry)
        head = FrameHead.decode(encoded)
        if head.kind == ABORT:
            yield from self._aborted(head)
        if head.kind != kind:
            raise ProtocolError(
                f"frame {head.kind!r} where {kind!r} must follow", entry=entry, offset=start
            )
        if (head.number, head.offset) != (index, offset):
            raise ProtocolError(
                f"index {head.number} at {head.offset} where {index} at {offset} must follow",
                entry=entry,
                offset=start,
            )
        return head, encoded

    def _body(self, head: FrameHead) -> Generator[Step, Any, bytes]:
        entry = f"{head.kind.decode()} frame"
        start = self.position
        body = yield from self._read(head.length, entry)
        if frame_digest(self._identity, head, [body]) != head.digest:
            raise ChecksumError("the bytes are not those that were sent", entry=entry, offset=start)
        return body

    def _aborted(self, head: FrameHead) -> Generator[Step, Any, None]:
        if (head.number, head.offset) != (0, 0) or head.length > ABORT_REASON_MAX:
            raise ProtocolError(
                f"abort of {head.length} bytes, index {head.number} at {head.offset}",
                entry="ABRT frame",
                offset=self.position,
            )
        start = self.position
        body = yield from self._body(head)
        try:
            reason = body.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(
                "the reason of an abort is not UTF-8", entry="ABRT frame", offset=start
            ) from error
        yield MessageEnded()
        raise RemoteAbort(f"the sender gave up: {reason}", entry="ABRT frame", offset=start)

    def _limit(self, head: FrameHead, allowed: int) -> LimitExceeded:
        name = "header_nbytes" if head.kind == HEADER else "skeleton_nbytes"
        return LimitExceeded(
            f"frame of {head.length} bytes, {allowed} allowed (Limits.{name})",
            entry=f"{head.kind.decode()} frame",
            offset=self.position,
        )


def _open_header(data: bytes, limits: Limits, offset: int) -> tuple[Header, Layout]:
    header = decode_header(data, limits, offset=offset)
    try:
        return header, validate(header, limits, offset=offset)
    except BaseException:
        # The traceback holds them, and would free them wherever it is dropped.
        release(header.tensors, header.storages)
        raise
