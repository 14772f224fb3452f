"""Preface, heads and digests of frames, byte by byte."""

from __future__ import annotations

import struct

import pytest
import xxhash

from aiotorchio.errors import ProtocolError
from aiotorchio.wire.frames import (
    CHUNK,
    FLAG_CHECKSUM,
    FRAME_HEAD_SIZE,
    PREFACE_SIZE,
    EndDigest,
    FrameHead,
    decode_preface,
    encode_preface,
    frame_digest,
    message_id,
)

MAGIC = b"\x89ATC\r\n\x1a\n"


@pytest.mark.parametrize("flags", [0, FLAG_CHECKSUM])
def test_preface(flags: int) -> None:
    preface = encode_preface(flags)
    assert preface == MAGIC + bytes([1, 0, flags, 0, 0, 0, 0, 0])
    assert len(preface) == PREFACE_SIZE == 16
    assert decode_preface(preface) == flags


@pytest.mark.parametrize(
    ("preface", "offset"),
    [
        (bytes(16), 0),
        (b"GET / HTTP/1.1\r\n", 0),
        (MAGIC[:6] + b"\n" + MAGIC[7:] + struct.pack("<HHI", 1, 1, 0), 0),
        (MAGIC + struct.pack("<HHI", 0, 1, 0), 8),
        (MAGIC + struct.pack("<HHI", 2, 1, 0), 8),
        (MAGIC + struct.pack("<HHI", 0x0100, 1, 0), 8),
        (MAGIC + struct.pack("<HHI", 1, 2, 0), 10),
        (MAGIC + struct.pack("<HHI", 1, 0x8001, 0), 10),
        (MAGIC + struct.pack("<HHI", 1, 1, 1), 12),
        (MAGIC + struct.pack("<HHI", 1, 1, 2**31), 12),
        # The error names the first wrong field.
        (MAGIC + struct.pack("<HHI", 2, 2, 2), 8),
        (MAGIC + struct.pack("<HHI", 1, 2, 2), 10),
    ],
)
def test_bad_preface(preface: bytes, offset: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_preface(preface)
    assert caught.value.entry == "preface"
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    "head",
    [
        FrameHead(CHUNK, 0, 0, 0),
        FrameHead(b"\xff\x00ab", 2**32 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1),
        FrameHead(CHUNK, 1, 2, 3, 4),
    ],
)
def test_head_round_trip(head: FrameHead) -> None:
    encoded = head.encode()
    assert len(encoded) == FRAME_HEAD_SIZE == 32
    assert FrameHead.decode(encoded) == head


def test_head_is_little_endian() -> None:
    encoded = FrameHead(CHUNK, 0x01020304, 5, 6, 7).encode()
    assert encoded == (
        b"CHNK\x04\x03\x02\x01" + b"\x05" + bytes(7) + b"\x06" + bytes(7) + b"\x07" + bytes(7)
    )


def test_message_id_is_canonical() -> None:
    assert message_id(b"a", b"bc") == xxhash.xxh3_128_intdigest(b"abc").to_bytes(16, "big")


def test_frame_digest_covers_identity_head_and_body() -> None:
    head = FrameHead(CHUNK, 1, 2, 6, digest=99)
    identity = bytes(range(16))
    digest = frame_digest(identity, head, [b"ab", memoryview(b"cd"), bytearray(b"ef")])
    assert digest == xxhash.xxh3_64_intdigest(identity + head.encode()[:24] + b"abcdef")
    assert digest == frame_digest(identity, head._replace(digest=0), [b"abcdef"])
    for other in (
        frame_digest(identity[::-1], head, [b"abcdef"]),
        frame_digest(identity, head._replace(kind=b"DONE"), [b"abcdef"]),
        frame_digest(identity, head._replace(number=0), [b"abcdef"]),
        frame_digest(identity, head._replace(offset=0), [b"abcdef"]),
        frame_digest(identity, head._replace(length=0), [b"abcdef"]),
        frame_digest(identity, head, [b"abcdeF"]),
    ):
        assert other != digest


def test_end_digest_covers_whole_heads() -> None:
    heads = [FrameHead(b"SKEL", 0, 0, 1, 2).encode(), FrameHead(CHUNK, 0, 0, 3, 4).encode()]
    digest = EndDigest(b"0123456789abcdef")
    for head in heads:
        digest.update(head)
    expected = xxhash.xxh3_64_intdigest(b"0123456789abcdef" + b"".join(heads))
    assert digest.encode() == expected.to_bytes(8, "little")
