"""Builds messages, good and bad, without the composer; runs the parser over bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from aiotorchio.errors import AiotorchioError
from aiotorchio.limits import Limits
from aiotorchio.wire.frames import (
    CHUNK,
    END,
    HEADER,
    SKELETON,
    EndDigest,
    FrameHead,
    encode_preface,
    frame_digest,
    message_id,
)
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

LIMITS = Limits(total_nbytes=2**40)
NONCE = bytes(range(16))
EMPTY_DICT = b"\x91\x02"
CHUNK_SIZE = 4096

Event = HeaderReceived | SkeletonReceived | ChunkStarted | ChunkReceived | MessageEnded


def fields(**changes: Any) -> list[Any]:
    """The items of a good header: two tensors in two storages, one chunk."""
    items = {
        "byteorder": "little",
        "nonce": NONCE,
        "producer": "tests",
        "metadata": [["key", "value"]],
        "codec": "tree",
        "chunk_size": CHUNK_SIZE,
        "locations": ["cpu"],
        "storages": [[8, 4, 0], [3, 1, 0]],
        "tensors": [
            [0, "float32", 0, [2], [1], 1, ["w"]],
            [1, "uint8", 0, [3], [1], 0, []],
        ],
    }
    assert changes.keys() <= items.keys()
    return list((items | changes).values())


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def frame(
    identity: bytes,
    kind: bytes,
    body: bytes = b"",
    *,
    number: int = 0,
    offset: int = 0,
    length: int | None = None,
    digest: int | None = None,
) -> bytes:
    head = FrameHead(kind, number, offset, len(body) if length is None else length)
    if digest is None:
        digest = frame_digest(identity, head, [body])
    return head._replace(digest=digest).encode() + body


@dataclass
class Message:
    """The frames of a message; tests change them before they are joined."""

    header: bytes = field(default_factory=lambda: pack(fields()))
    payload: bytes = bytes(range(8)) + bytes(56) + b"abc"
    skeleton: bytes = EMPTY_DICT
    checksum: bool = True
    chunk_size: int = CHUNK_SIZE

    def __post_init__(self) -> None:
        self.preface = encode_preface(int(self.checksum))
        self.identity = message_id(self.preface, self.header)
        self.frames = [
            frame(self.preface, HEADER, self.header),
            frame(self.identity, SKELETON, self.skeleton),
        ]
        for number, start in enumerate(range(0, len(self.payload), self.chunk_size)):
            body = self.payload[start : start + self.chunk_size]
            digest = None if self.checksum else 0
            self.frames.append(
                frame(self.identity, CHUNK, body, number=number, offset=start, digest=digest)
            )
        self.frames.append(self.end())

    def end(self) -> bytes:
        """The end frame for ``frames`` after the header."""
        digest = EndDigest(self.identity)
        chunks = [f for f in self.frames[1:] if f[:4] in (SKELETON, CHUNK)]
        for encoded in chunks:
            digest.update(encoded[:32])
        return frame(
            self.identity,
            END,
            digest.encode(),
            number=len(chunks) - 1,
            offset=len(self.payload),
        )

    def __bytes__(self) -> bytes:
        return self.preface + b"".join(self.frames)


def two_chunks(**options: Any) -> Message:
    """A message of one storage of 8196 bytes in three chunks, two of them of one size."""
    header = fields(
        storages=[[8196, 1, 0]], tensors=[[0, "uint8", 0, [8196], [1], 0, ["w"]]], metadata=[]
    )
    return Message(pack(header), bytes(n % 251 for n in range(8196)), **options)


@dataclass
class Parsed:
    events: list[Event]
    payload: bytes
    consumed: int

    @property
    def header(self) -> HeaderReceived:
        event = self.events[0]
        assert isinstance(event, HeaderReceived)
        return event


Cut = Callable[[memoryview], list[memoryview]]


def whole(view: memoryview) -> list[memoryview]:
    return [view]


def bytewise(view: memoryview) -> list[memoryview]:
    return [view[n : n + 1] for n in range(len(view))]


def parse(data: bytes, *, limits: Limits = LIMITS, cut: Cut = whole) -> Parsed:
    """Drive the parser; ``cut`` cuts the memory that takes a chunk into buffers."""
    parser = Parser(limits)
    steps = parser.parse()
    position = 0
    events: list[Event] = []
    payload = bytearray()
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            break
        answer = None
        match step:
            case ReadBytes(size):
                answer = data[position : position + size]
                position += len(answer)
            case FillBuffers(buffers):
                answer = fill(buffers, memoryview(data)[position:])
                position += answer
                payload += b"".join(buffers)
            case Work(task):
                answer = task()
            case ChunkStarted(_, length):
                events.append(step)
                answer = cut(memoryview(bytearray(length)))
            case _:
                events.append(step)
    assert parser.position == position
    return Parsed(events, bytes(payload), position)


def fill(buffers: Iterable[memoryview], data: memoryview) -> int:
    filled = 0
    for buffer in buffers:
        piece = data[filled : filled + len(buffer)]
        buffer[: len(piece)] = piece
        filled += len(piece)
    return filled


def parse_three_ways(data: bytes, *, limits: Limits = LIMITS) -> Parsed:
    """Parse a message whole, byte by byte, and with another message after it, which must stay
    unread.
    """
    parsed = parse(data, limits=limits)
    for other in (
        parse(data, limits=limits, cut=bytewise),
        parse(data + data, limits=limits),
    ):
        assert other.events[1:] == parsed.events[1:]
        assert other.payload == parsed.payload
        assert other.consumed == len(data)
        assert other.header.header == parsed.header.header
        assert other.header.message_id == parsed.header.message_id
        assert vars(other.header.layout) == vars(parsed.header.layout)
    assert parsed.consumed == len(data)
    return parsed


def refused(
    kind: type[AiotorchioError],
    message: Message | bytes,
    *,
    limits: Limits = LIMITS,
    trailing: bytes = bytes(64),
    entry: str | None = None,
    offset: int | None = None,
) -> AiotorchioError:
    """Check that a message is refused with exactly this error, whole, byte by byte, and trailed."""
    data = bytes(message)
    raised: list[AiotorchioError] = []
    for cut, behind in ((whole, b""), (bytewise, b""), (whole, trailing)):
        with pytest.raises(AiotorchioError) as caught:
            parse(data + behind, limits=limits, cut=cut)
        raised.append(caught.value)
    assert [type(error) for error in raised] == [kind] * 3
    assert len({str(error) for error in raised}) == 1
    assert raised[0].entry is not None
    assert raised[0].offset is not None
    assert 0 <= raised[0].offset <= len(data)
    if entry is not None:
        assert raised[0].entry == entry
    if offset is not None:
        assert raised[0].offset == offset
    return raised[0]
