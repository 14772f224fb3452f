"""Harness of the wire's parser over whole messages; it does not import torch.

In addition to the checks of every harness: the parser requests no more than its limits allow, the
result does not depend on how the bytes are cut, bytes after a message do not matter, and accepted
messages can be composed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from aiotorchio.errors import AiotorchioError, TruncatedError
from aiotorchio.limits import Limits
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.frames import ABORT_REASON_MAX, HEADER, SKELETON
from aiotorchio.wire.header import Header
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
    Work,
)
from fuzz.messages import dissect, vary, vary_frames
from fuzz.oracle import Find, MutateBytes, check_refusal, choose, no_flood

__all__ = ["LIMITS", "MAX_LEN", "mutate", "test_one_input"]

MAX_LEN = 10_000
LIMITS = Limits(
    header_nbytes=2**16,
    skeleton_nbytes=2**15,
    chunk_nbytes=2**16,
    total_nbytes=2**20,
    entries=1000,
)
_READ_MAX = max(LIMITS.header_nbytes, LIMITS.skeleton_nbytes, ABORT_REASON_MAX)


@dataclass(frozen=True)
class Accepted:
    """The results of the parser for a whole accepted message."""

    header: Header
    checksum: bool
    skeleton: bytes
    payload: bytes
    consumed: int


@dataclass(frozen=True)
class Refused:
    """The error with which the parser refused a message."""

    kind: type[AiotorchioError]
    entry: str | None
    offset: int | None


def test_one_input(data: bytes) -> None:
    """Judge one input."""
    with no_flood():
        outcome = _outcome(data, whole=True)
        cut = _outcome(data, whole=False)
        if cut != outcome:
            raise Find(f"{outcome} as a whole, {cut} in pieces")
        if isinstance(outcome, Accepted) or outcome.kind is not TruncatedError:
            followed = _outcome(data + data[:64], whole=True)
            if followed != outcome:
                raise Find(f"{outcome} alone, {followed} with bytes behind it")
        if isinstance(outcome, Accepted):
            again = _outcome(_composed(outcome), whole=True)
            if not isinstance(again, Accepted) or _contents(again) != _contents(outcome):
                raise Find(f"{outcome} composed again is {again}")


def mutate(data: bytes, max_size: int, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change a message: its bytes as they are, or a part of it, with all digests made right."""
    draft = dissect(data)

    def change_bytes_of(kind: bytes) -> None:
        frame = draft.find(kind)
        if frame is not None:
            frame.body = mutate_bytes(frame.body, max_size)

    def change_header() -> None:
        frame = draft.find(HEADER)
        if frame is not None:
            changed = vary(frame.body, random)
            frame.body = mutate_bytes(frame.body, max_size) if changed is None else changed
            if random.random() < 0.7:
                draft.fit()

    def change_preface() -> None:
        draft.preface = mutate_bytes(draft.preface, len(draft.preface))

    if random.random() < 0.1:
        return mutate_bytes(data, max_size)
    choose(
        random,
        (12, change_header),
        (3, lambda: change_bytes_of(HEADER)),
        (1, lambda: change_bytes_of(SKELETON)),
        (4, lambda: vary_frames(draft, random)),
        (1, change_preface),
        (1, draft.fit),
    )
    return bytes(draft)[:max_size]


def _contents(message: Accepted) -> tuple[Any, ...]:
    return message.header, message.checksum, message.skeleton, message.payload


def _outcome(data: bytes, *, whole: bool) -> Accepted | Refused:
    try:
        return _parse(data, whole=whole)
    except AiotorchioError as error:
        check_refusal(error, 0, len(data))
        return Refused(type(error), error.entry, error.offset)


def _parse(data: bytes, *, whole: bool) -> Accepted:
    parser = Parser(LIMITS)
    steps = parser.parse()
    position, allowed = 0, LIMITS.total_nbytes
    header: HeaderReceived | None = None
    skeleton, payload = b"", bytearray()
    answer: Any = None
    ended = False
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            break
        answer = None
        if ended:
            raise Find(f"{step} behind the end")
        match step:
            case ReadBytes(size):
                if not 0 <= size <= _READ_MAX:
                    raise Find(f"the parser asks for {size} bytes")
                answer = data[position : position + size]
                position += len(answer)
            case FillBuffers(buffers):
                answer = _fill(buffers, memoryview(data)[position:])
                position += answer
                payload += b"".join(buffers)
            case Work(task):
                answer = task()
            case ChunkStarted(offset, length):
                allowed -= length
                if offset != len(payload) or not 0 < length <= LIMITS.chunk_nbytes or allowed < 0:
                    raise Find(f"a chunk of {length} bytes at {offset}")
                answer = _buffers(length, whole=whole)
            case HeaderReceived():
                header = step
            case SkeletonReceived():
                skeleton = step.skeleton
            case MessageEnded():
                ended = True
            case ChunkReceived():
                if parser.position != position:
                    raise Find(f"{parser.position} is not {position}")
    if header is None or not ended or parser.position != position:
        raise Find("a message without a header or an end")
    return Accepted(header.header, header.checksum, skeleton, bytes(payload), position)


def _buffers(length: int, *, whole: bool) -> list[memoryview]:
    view = memoryview(bytearray(length))
    if whole:
        return [view]
    cuts = [0, *(cut for cut in (1, 2, 63, 64, 1000) if cut < length), length]
    return [view[start:end] for start, end in itertools.pairwise(cuts)]


def _fill(buffers: Sequence[memoryview], data: memoryview) -> int:
    filled = 0
    for buffer in buffers:
        piece = data[filled : filled + len(buffer)]
        buffer[: len(piece)] = piece
        filled += len(piece)
    return filled


def _composed(message: Accepted) -> bytes:
    layout = Layout(message.header)
    composer = Composer(message.header, layout, checksum=message.checksum)
    buffers = composer.opening(message.skeleton)
    for index in range(layout.chunks):
        start, length = layout.chunk_range(index)
        buffers += composer.chunk_frame([memoryview(message.payload)[start : start + length]])
    return b"".join([*buffers, *composer.end()])
