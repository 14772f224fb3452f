"""The parser: from the bytes of a message to events, as a generator that requests its bytes.

The engine runs it. An ``AiotorchioError`` says where and why the bytes are not a message. The
generator yields *requests*, which its driver answers, and *events*:

    ReadBytes(n)        answer: n bytes, or fewer if the stream ended
    FillBuffers(views)  answer: the number of bytes written, fewer only if the stream ended
    Work(task)          answer: the result of the task; it takes long, so an event loop runs it
                        in a thread
    ChunkStarted(...)   answer: the buffers for the bytes of the chunk, in order
    other events        answer: None

It never requests a byte beyond its message, and checks every length before its request.
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
    """Request for the next ``size`` bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class FillBuffers:
    """Request to write the next bytes into these buffers."""

    buffers: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class Work:
    """Request to run a task outside the event loop.

    Attributes:
        task: The function to run.
        to_its_end: Whether a cancellation waits until the task has run, as for freeing long tables.
    """

    task: Callable[[], Any]
    to_its_end: bool = False


@dataclass(frozen=True, slots=True)
class HeaderReceived:
    """The header is received and valid, with ``nbytes`` bytes; no payload was requested yet."""

    header: Header
    layout: Layout
    message_id: bytes
    checksum: bool
    nbytes: int


@dataclass(frozen=True, slots=True)
class SkeletonReceived:
    """The skeleton is received and intact; ``offset`` is its first byte in the message."""

    skeleton: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class ChunkStarted:
    """A chunk follows, with ``length`` bytes of the payload from ``offset``."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkReceived:
    """The chunk of the last ``ChunkStarted`` is in its buffers, and intact."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class MessageEnded:
    """The last byte was read. After an abort or a wrong end digest, its error is raised next."""


# Decoding and checking takes about 70 ns a byte, 2 ms for this size: the most for an event loop.
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
        limits: The limits of the receiver.

    Attributes:
        position: Bytes of the message that were read so far.
        entry: The part of the message at that position.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._identity = b""
        self.position = 0
        self.entry = "preface"

    def parse(self) -> Generator[Step, Any, None]:
        """Yield requests and events until the message ends.

        Raises:
            ProtocolError: The bytes are not allowed here by SPEC.md.
            TruncatedError: The stream ended inside the message.
            ChecksumError: A digest does not match.
            LimitExceeded: The message has more than the limits allow.
            InvalidObjectError: The header describes tensors that cannot exist.
            RemoteAbort: The sender aborted the message.
        """
        # The magic is checked first: a peer with another protocol may send no more than this.
        magic: bytes = yield ReadBytes(MAGIC_SIZE)
        check_magic(magic)
        self._took(magic, MAGIC_SIZE, "preface")
        preface = magic + (yield from self._read(PREFACE_SIZE - MAGIC_SIZE, "preface"))
        checksum = bool(decode_preface(preface) & FLAG_CHECKSUM)

        # The message id depends on the header; until then, the preface takes its place.
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
        # The bytes of the header can take 32 MiB, and are not needed any more.
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
                f"the end frame must have 8 bytes, not {head.length}",
                entry="end",
                offset=self.position,
            )
        body = yield from self._body(head)
        yield MessageEnded()
        if body != end_digest.encode():
            raise ChecksumError(
                "the digest of the message does not match: the frames are not those that were sent",
                entry="end",
                offset=self.position - 8,
            )

    def _chunk(
        self, index: int, layout: Layout, end_digest: EndDigest, checksum: bool
    ) -> Generator[Step, Any, None]:
        offset, length = layout.chunk_range(index)
        head, encoded = yield from self._head(CHUNK, index, offset)
        if head.length != length:
            raise ProtocolError(
                f"the chunk must have {length} bytes, not {head.length}",
                entry=f"chunk {index}",
                offset=self.position,
            )
        if not checksum and head.digest:
            raise ProtocolError(
                "the chunk must have no digest: the message has no checksums",
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
        # The buffers would stay in memory until the request for the next chunk.
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
        """Read the next head, which must have this type, number and offset, or be an abort."""
        entry = f"{kind.decode()} frame"
        start = self.position
        encoded = yield from self._read(FRAME_HEAD_SIZE, entry)
        head = FrameHead.decode(encoded)
        if head.kind == ABORT:
            yield from self._aborted(head)
        if head.kind != kind:
            raise ProtocolError(
                f"the frame must have type {kind!r}, not {head.kind!r}", entry=entry, offset=start
            )
        if (head.number, head.offset) != (index, offset):
            raise ProtocolError(
                f"the frame must have number {index} and offset {offset}, not number {head.number} "
                f"and offset {head.offset}",
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
                f"the abort frame must have at most {ABORT_REASON_MAX} bytes, number 0 and offset "
                f"0, not {head.length}, {head.number} and {head.offset}",
                entry="ABRT frame",
                offset=self.position,
            )
        start = self.position
        body = yield from self._body(head)
        try:
            reason = body.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(
                "the reason in the abort frame is not UTF-8", entry="ABRT frame", offset=start
            ) from error
        yield MessageEnded()
        raise RemoteAbort(f"the sender gave up: {reason}", entry="ABRT frame", offset=start)

    def _limit(self, head: FrameHead, allowed: int) -> LimitExceeded:
        name = "header_nbytes" if head.kind == HEADER else "skeleton_nbytes"
        return LimitExceeded(
            f"the frame has {head.length} bytes, but Limits.{name} is {allowed}",
            entry=f"{head.kind.decode()} frame",
            offset=self.position,
        )


def _open_header(data: bytes, limits: Limits, offset: int) -> tuple[Header, Layout]:
    header = decode_header(data, limits, offset=offset)
    try:
        return header, validate(header, limits, offset=offset)
    except BaseException:
        # The traceback references the rows, and would free them all at once in another thread.
        release(header.tensors, header.storages)
        raise
