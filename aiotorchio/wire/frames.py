"""Encoding and digests of the preface and of the frames (SPEC.md section 3).

The parser and the composer call it. In: fields, or bytes of the exact size. Out: bytes, or fields,
which the parser must check. A ``ProtocolError`` means that the preface is not one of this format.

Every frame is a head of 32 bytes and a body. The digest in the head covers the message id, the rest
of the head and the body, so a frame that was changed, moved to another place or taken from another
message does not match.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import xxhash

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import ProtocolError

__all__ = [
    "ABORT",
    "ABORT_REASON_MAX",
    "CHUNK",
    "END",
    "FLAG_CHECKSUM",
    "FRAME_HEAD_SIZE",
    "HEADER",
    "MAGIC_SIZE",
    "PREFACE_SIZE",
    "SKELETON",
    "EndDigest",
    "FrameHead",
    "check_magic",
    "decode_preface",
    "encode_preface",
    "frame_digest",
    "message_id",
]

# As in PNG, the first byte is not ASCII and the line ends reveal a transfer in text mode.
MAGIC = b"\x89ATC\r\n\x1a\n"
VERSION = 1
FLAG_CHECKSUM = 1

HEADER, SKELETON, CHUNK, END, ABORT = b"HEAD", b"SKEL", b"CHNK", b"DONE", b"ABRT"
ABORT_REASON_MAX = 4096

_PREFACE = struct.Struct("<8sHHI")
_HEAD = struct.Struct("<4sIQQQ")
_HEAD_WITHOUT_DIGEST = struct.Struct("<4sIQQ")
MAGIC_SIZE = len(MAGIC)
PREFACE_SIZE = _PREFACE.size
FRAME_HEAD_SIZE = _HEAD.size


class FrameHead(NamedTuple):
    """The 32 bytes in front of every body."""

    kind: bytes
    number: int
    offset: int
    length: int
    digest: int = 0

    def encode(self) -> bytes:
        """Return the 32 bytes of the head."""
        return _HEAD.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> FrameHead:
        """Read a head from exactly 32 bytes; the caller must check its fields."""
        return cls(*_HEAD.unpack(data))


def encode_preface(flags: int) -> bytes:
    """Return the 16 bytes of the preface."""
    return _PREFACE.pack(MAGIC, VERSION, flags, 0)


def check_magic(start: bytes) -> None:
    """Check that the first 8 bytes of a stream, or fewer if it ended, begin a message.

    Raises:
        ProtocolError: They do not.
    """
    if not MAGIC.startswith(start):
        hint = " (a file of torch.save is for torch.load)" if start.startswith(b"PK") else ""
        raise ProtocolError(
            f"not an aiotorchio message: it begins with {start!r}{hint}", entry="preface", offset=0
        )


def decode_preface(data: bytes) -> int:
    """Read the 16 bytes of the preface.

    Returns:
        The flags.

    Raises:
        ProtocolError: The bytes are not a preface, or have another version, an unknown flag or a
            reserved bit that is set.
    """
    magic, version, flags, reserved = _PREFACE.unpack(data)
    check_magic(magic)
    if version != VERSION:
        raise _bad_preface(
            f"unknown format version {version}; this release reads version {VERSION}", 8
        )
    if flags & ~FLAG_CHECKSUM:
        raise _bad_preface(f"unknown flags {flags:#06x}; only {FLAG_CHECKSUM:#06x} may be set", 10)
    if reserved:
        raise _bad_preface(f"the reserved bytes must be zero, not {reserved:#010x}", 12)
    return int(flags)


def _bad_preface(what: str, offset: int) -> ProtocolError:
    return ProtocolError(what, entry="preface", offset=offset)


def message_id(preface: bytes, header: bytes) -> bytes:
    """Return the 16 bytes of the message id, a digest of preface and header."""
    return xxhash.xxh3_128_digest(preface + header)


def frame_digest(identity: bytes, head: FrameHead, body: Iterable[Buffer]) -> int:
    """Return xxh3_64 over the message id, the head without its digest, and the body."""
    state = xxhash.xxh3_64(identity)
    state.update(_HEAD_WITHOUT_DIGEST.pack(*head[:4]))
    for piece in body:
        state.update(piece)
    return state.intdigest()


class EndDigest:
    """The digest in the end frame: xxh3_64 over the message id and all heads after the first."""

    def __init__(self, identity: bytes) -> None:
        self._state = xxhash.xxh3_64(identity)

    def update(self, head: bytes) -> None:
        """Add the 32 bytes of one head."""
        self._state.update(head)

    def encode(self) -> bytes:
        """Return the body of the end frame: 8 bytes, little-endian."""
        return self._state.intdigest().to_bytes(8, "little")
