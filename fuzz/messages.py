"""Takes messages apart, changes them, and joins them again with the digests of a hostile sender."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from aiotorchio.errors import AiotorchioError
from aiotorchio.limits import Limits
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.frames import (
    ABORT,
    CHUNK,
    END,
    FLAG_CHECKSUM,
    FRAME_HEAD_SIZE,
    HEADER,
    PREFACE_SIZE,
    SKELETON,
    EndDigest,
    FrameHead,
    frame_digest,
    message_id,
)
from aiotorchio.wire.header import decode_header
from aiotorchio.wire.layout import Layout

__all__ = ["Draft", "Frame", "dissect", "vary", "vary_frames"]

_FRAMES_MAX = 200
_PAYLOAD_MAX = 2**16
_CHECKSUM_AT = 10

_NUMBERS = [0, 1, 2, 3, 4, 8, 15, 16, 63, 64, 65, 255, 4096, 8192, 2**31, 2**32, 2**62]
_NUMBERS += [2**63 - 1, 2**63, 2**64 - 1, -1, -(2**31), -(2**63)]
_WORDS = ["", "a", "little", "big", "tree", "pickle", "cpu", "cuda:0", "cuda:127", "meta", "0"]
_LEAVES: list[Any] = [
    *_NUMBERS,
    *_WORDS,
    *DTYPES,
    None,
    True,
    False,
    0.0,
    -0.0,
    float("nan"),
    1e300,
]
_LEAVES += [b"", b"x" * 16, b"\xff" * 9, [], [[]], "x" * 300]


@dataclass
class Frame:
    """One frame; its digest is made when it is written.

    Args:
        kind: Four letters.
        number: The number in the head.
        offset: The offset in the head.
        body: The bytes after the head.
        length: The length in the head, if it is not that of the body.
    """

    kind: bytes
    number: int
    offset: int
    body: bytes
    length: int | None = None


@dataclass
class Draft:
    """A message in parts, whether good or not.

    Args:
        preface: Its first 16 bytes.
        frames: The frames, as far as they can be told apart.
        rest: The bytes after the frames.
    """

    preface: bytes
    frames: list[Frame]
    rest: bytes = b""

    def __bytes__(self) -> bytes:
        """The message, with all digests right."""
        checksum = self.preface[_CHECKSUM_AT : _CHECKSUM_AT + 1] == bytes([FLAG_CHECKSUM])
        identity = self.preface
        end_digest: EndDigest | None = None
        encoded = [self.preface]
        for frame in self.frames:
            if frame.kind == END and end_digest and len(frame.body) == 8:
                frame.body = end_digest.encode()
            length = len(frame.body) if frame.length is None else frame.length
            head = FrameHead(frame.kind, frame.number, frame.offset, length)
            if checksum or frame.kind != CHUNK:
                head = head._replace(digest=frame_digest(identity, head, [frame.body]))
            encoded += [head.encode(), frame.body]
            if end_digest is None and frame.kind == HEADER:
                identity = message_id(self.preface, frame.body)
                end_digest = EndDigest(identity)
            elif end_digest and frame.kind in (SKELETON, CHUNK):
                end_digest.update(encoded[-2])
        return b"".join([*encoded, self.rest])

    def find(self, kind: bytes) -> Frame | None:
        """Return the first frame of a kind."""
        return next((frame for frame in self.frames if frame.kind == kind), None)

    def fit(self) -> None:
        """Replace the chunks by those that the header announces, if they are few."""
        header, skeleton = self.find(HEADER), self.find(SKELETON)
        if header is None or skeleton is None:
            return
        try:
            layout = Layout(decode_header(header.body, Limits(entries=10_000)))
        except (AiotorchioError, IndexError, ZeroDivisionError):
            return
        if layout.total > _PAYLOAD_MAX or layout.chunks > 16:
            return
        payload = b"".join(frame.body for frame in self.frames if frame.kind == CHUNK)
        payload = payload[: layout.total].ljust(layout.total, b"\x01")
        chunks = [layout.chunk_range(index) for index in range(layout.chunks)]
        self.frames = [header, skeleton]
        for index, (start, length) in enumerate(chunks):
            self.frames.append(Frame(CHUNK, index, start, payload[start : start + length]))
        self.frames.append(Frame(END, layout.chunks, layout.total, bytes(8)))


def dissect(data: bytes) -> Draft:
    """Take bytes apart as if they were a message; the joined parts have the same length."""
    draft = Draft(data[:PREFACE_SIZE], [])
    position = PREFACE_SIZE
    while len(data) - position >= FRAME_HEAD_SIZE and len(draft.frames) < _FRAMES_MAX:
        head = FrameHead.decode(data[position : position + FRAME_HEAD_SIZE])
        position += FRAME_HEAD_SIZE
        body = data[position : position + head.length]
        position += len(body)
        length = None if len(body) == head.length else head.length
        draft.frames.append(Frame(head.kind, head.number, head.offset, body, length))
    draft.rest = data[position:]
    return draft


def vary(encoded: bytes, random: Random, leaves: list[Any] | None = None) -> bytes | None:
    """Change a MessagePack value in a few places; return None if the bytes are no such value.

    Args:
        encoded: The value.
        random: Decides what is changed.
        leaves: Values that may be put in, in addition to values that have caused problems before.
    """
    try:
        root = [msgspec.msgpack.decode(encoded)]
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            _vary_once(root, random, _LEAVES if leaves is None else leaves + _LEAVES)
        return msgspec.msgpack.encode(root[0])
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError, TypeError):
        return None


def _vary_once(root: list[Any], random: Random, leaves: list[Any]) -> None:
    places = _places(root)
    within, at = random.choice(places)
    alike = [leaf for leaf in leaves if type(leaf) is type(within[at])]
    # Mostly of the same type, as the type is the first check of every reader.
    others = [place for place in places if type(place[0][place[1]]) is type(within[at])]
    other, there = random.choice(others if random.random() < 0.8 else places)
    match random.randrange(9):
        case 0:
            within[at] = random.choice(leaves)
        case 1 if type(within[at]) is int:
            within[at] += random.choice([-1, 1, -(2**20), 2**20])
        case 2:
            within[at] = other[there]
        case 3:
            within[at], other[there] = other[there], within[at]
        case 4 if within is not root:
            del within[at]
        case 5 if within is not root:
            within.insert(at, other[there])
        case 6 if random.random() < 0.3:
            within[at] = [within[at]] * random.choice([1, 1, 2, 5])
        case _:
            within[at] = random.choice(alike or leaves)


def _places(root: list[Any]) -> list[tuple[list[Any], int]]:
    places: list[tuple[list[Any], int]] = []
    waiting, seen = [root], {id(root)}
    while waiting and len(places) < 2000:
        within = waiting.pop()
        for at, item in enumerate(within):
            places.append((within, at))
            if type(item) is list and id(item) not in seen:
                seen.add(id(item))
                waiting.append(item)
    return places


def vary_frames(draft: Draft, random: Random) -> None:
    """Damage the order of the frames, or a head."""
    frames = draft.frames
    if not frames:
        return
    at, other = random.randrange(len(frames)), random.randrange(len(frames))
    frame = frames[at]
    match random.randrange(8):
        case 0:
            del frames[at]
        case 1:
            frames.insert(other, frame)
        case 2:
            frames[at], frames[other] = frames[other], frame
        case 3:
            frame.number = random.choice(_NUMBERS) % 2**32
        case 4:
            frame.offset = random.choice(_NUMBERS) % 2**64
        case 5:
            frame.length = random.choice(_NUMBERS) % 2**64
        case 6:
            frame.kind = random.choice([HEADER, SKELETON, CHUNK, END, ABORT, b"NONE"])
        case 7:
            reason = random.choice([b"", b"why", b"\xff", b"x" * 4096, b"x" * 4097])
            frames[at:] = [Frame(ABORT, 0, 0, reason)]
