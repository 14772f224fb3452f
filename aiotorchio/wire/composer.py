"""The composer: from header, skeleton and chunks to the buffers to send.

In: a header, its layout, and the bytes of skeleton and chunks in order. Out: buffers, among which
those of the payload are the given ones. The send loops of engine/ call it. It raises no errors for
wrong input: the caller has checked it.
"""

from __future__ import annotations

from aiotorchio.common.buffer import Buffer
from aiotorchio.wire.frames import (
    ABORT,
    ABORT_REASON_MAX,
    CHUNK,
    END,
    FLAG_CHECKSUM,
    HEADER,
    SKELETON,
    EndDigest,
    FrameHead,
    encode_preface,
    frame_digest,
    message_id,
)
from aiotorchio.wire.header import Header, encode_header
from aiotorchio.wire.layout import Layout

__all__ = ["Composer"]


class Composer:
    """Writes one message: ``opening()``, every chunk in order, then ``end()`` or ``abort()``.

    Args:
        header: A valid header; ``validate`` checks it, the composer does not.
        layout: The layout of that header.
        checksum: Whether chunks carry a digest of their bytes.
    """

    def __init__(self, header: Header, layout: Layout, *, checksum: bool) -> None:
        self._layout = layout
        self._checksum = checksum
        self._preface = encode_preface(FLAG_CHECKSUM if checksum else 0)
        self._header = encode_header(header)
        self.message_id = message_id(self._preface, self._header)
        self._end_digest = EndDigest(self.message_id)
        self._index = 0

    def opening(self, skeleton: bytes) -> list[Buffer]:
        """Return the preface and the frames of header and skeleton."""
        head = FrameHead(HEADER, 0, 0, len(self._header))
        # The header defines the message id; in its own digest the preface stands for it.
        digest = frame_digest(self._preface, head, [self._header])
        opening: list[Buffer] = [
            self._preface,
            head._replace(digest=digest).encode(),
            self._header,
        ]
        return opening + self._frame(SKELETON, 0, 0, [skeleton])

    def chunk_frame(self, body: list[memoryview]) -> list[Buffer]:
        """Return the frame of the next chunk; ``body`` has exactly its bytes."""
        start, length = self._layout.chunk_range(self._index)
        frame = self._frame(CHUNK, self._index, start, body, length, digest=self._checksum)
        self._index += 1
        return frame

    def end(self) -> list[Buffer]:
        """Return the end frame, which proves that the message is whole."""
        return self._frame(END, self._index, self._layout.total, [self._end_digest.encode()])

    def abort(self, reason: str) -> list[Buffer]:
        """Return the frame that aborts a message; a long reason is cut."""
        text = reason.encode("utf-8", "replace")[:ABORT_REASON_MAX]
        # The cut may split a character: the remaining bytes of it are dropped.
        body = text.decode("utf-8", "ignore").encode()
        return self._frame(ABORT, 0, 0, [body])

    def _frame(
        self,
        kind: bytes,
        index: int,
        offset: int,
        body: list[Buffer] | list[memoryview] | list[bytes],
        length: int | None = None,
        *,
        digest: bool = True,
    ) -> list[Buffer]:
        size = sum(map(len, body)) if length is None else length
        head = FrameHead(kind, index, offset, size)
        if digest:
            head = head._replace(digest=frame_digest(self.message_id, head, body))
        encoded = head.encode()
        if kind in (SKELETON, CHUNK):
            self._end_digest.update(encoded)
        return [encoded, *body]
