"""The layout of the preface and of the frames, and what their digests cover (SPEC.md section 3).

Every frame is a head of 32 bytes and a body. The digest in the head covers the identity of the
message, the rest of the head and the body, so a frame that was changed, moved to another place
or taken from another message does not match.
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
        """The head as it stands on the wire."""
        return _HEAD.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> FrameHead:
        """Read a head from exactly 32 bytes; the caller checks what it says."""
        return cls(*_HEAD.unpack(data))


def encode_preface(flags: int) -> bytes:
    """The 16 bytes that open a message."""
    return _PREFACE.pack(MAGIC, VERSION, flags, 0)


def check_magic(start: bytes) -> None:
    """Tell a message from other bytes by the first 8 of them, or by those that there are.

    Raises:
        ProtocolError: Foreign bytes.
    """
    if not MAGIC.startswith(start):
        hint = " (a file of torch.save is for torch.load)" if start.startswith(b"PK") else ""
        raise ProtocolError(
            f"not an aiotorchio message: it begins with {start!r}{hint}", entry="preface", offset=0
        )


def decode_preface(data: bytes) -> int:
    """Read the 16 bytes that open a message.

    Returns:
        The flags.

    Raises:
        ProtocolError: Foreign bytes, another version, an unknown flag, a reserved bit.
    """
    magic, version, flags, reserved = _PREFACE.unpack(data)
    check_magic(magic)
    if version != VERSION:
        raise _bad_preface(f"unknown format version {version}; this is {VERSION}", 8)
    if flags & ~FLAG_CHECKSUM:
        raise _bad_preface(f"unknown flags {flags:#06x}", 10)
    if reserved:
        raise _bad_preface(f"reserved bytes are {reserved:#010x} instead of zero", 12)
    return int(flags)


def _bad_preface(what: str, offset: int) -> ProtocolError:
    return ProtocolError(what, entry="preface", offset=offset)


def message_id(preface: bytes, header: bytes) -> bytes:
    """The identity of a message: 16 bytes, known as soon as its header is."""
    return xxhash.xxh3_128_digest(preface + header)


def frame_digest(identity: bytes, head: FrameHead, body: Iterable[Buffer]) -> int:
    """xxh3_64 over the message id, the head without its digest, and the body."""
    state = xxhash.xxh3_64(identity)
    state.update(_HEAD_WITHOUT_DIGEST.pack(*head[:4]))
    for piece in body:
        state.update(piece)
    return state.intdigest()


class EndDigest:
    """What the end frame holds: xxh3_64 over the message id and every head after the header's."""

    def __init__(self, identity: bytes) -> None:
        self._state = xxhash.xxh3_64(identity)

    def update(self, head: bytes) -> None:
        """Add the 32 bytes of one head."""
        self._state.update(head)

    def encode(self) -> bytes:
        """The body of the end frame: 8 bytes, little-endian."""
        return self._state.intdigest().to_bytes(8, "little")
