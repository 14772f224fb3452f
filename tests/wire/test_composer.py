"""The composer writes the bytes that the specification says, and does not copy the payload."""

from __future__ import annotations

import pytest

from aiotorchio.errors import RemoteAbort
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.frames import ABORT, ABORT_REASON_MAX, FrameHead
from aiotorchio.wire.header import decode_header, encode_header
from aiotorchio.wire.validation import validate
from tests.support.frames import EMPTY_DICT, LIMITS, Message, parse, refused, two_chunks


def composer_of(message: Message) -> Composer:
    header = decode_header(message.header, LIMITS)
    return Composer(header, validate(header, LIMITS), checksum=message.checksum)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("make", [Message, two_chunks])
def test_frames(make: type[Message], checksum: bool) -> None:
    message = make(checksum=checksum)
    composer = composer_of(message)
    assert composer.message_id == message.identity
    assert b"".join(composer.opening(message.skeleton)) == message.preface + b"".join(
        message.frames[:2]
    )
    payload = memoryview(message.payload)
    for number, start in enumerate(range(0, len(payload), message.chunk_size)):
        body = payload[start : start + message.chunk_size]
        assert b"".join(composer.chunk_frame([body])) == message.frames[2 + number]
    assert b"".join(composer.end()) == message.frames[-1]


def test_no_chunks() -> None:
    header = decode_header(Message().header, LIMITS)
    header.storages, header.tensors = [], []
    composer = Composer(header, validate(header, LIMITS), checksum=True)
    message = Message(encode_header(header), b"")
    assert b"".join(composer.opening(EMPTY_DICT) + composer.end()) == bytes(message)


def test_the_payload_passes_through_untouched() -> None:
    message = Message()
    composer = composer_of(message)
    composer.opening(EMPTY_DICT)
    views = [memoryview(message.payload)[:5], memoryview(message.payload)[5:]]
    head, *body = composer.chunk_frame(views)
    assert len(head) == 32
    assert [id(view) for view in body] == [id(view) for view in views]


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("reason", ["", "why", "é" * 10, "\ud800"])
def test_abort(chunks: int, reason: str) -> None:
    message = two_chunks()
    composer = composer_of(message)
    data = b"".join(composer.opening(EMPTY_DICT))
    for number in range(chunks):
        start = number * message.chunk_size
        body = memoryview(message.payload)[start : start + message.chunk_size]
        data += b"".join(composer.chunk_frame([body]))
    start = len(data) + 32
    data += b"".join(composer.abort(reason))
    error = refused(RemoteAbort, data, entry="ABRT frame", offset=start)
    assert error.message == f"the sender gave up: {reason}".replace("\ud800", "?")


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("x" * ABORT_REASON_MAX, "x" * ABORT_REASON_MAX),
        ("x" * (ABORT_REASON_MAX + 1), "x" * ABORT_REASON_MAX),
        ("x" + "é" * ABORT_REASON_MAX, "x" + "é" * (ABORT_REASON_MAX // 2 - 1)),
    ],
    ids=["fits", "cut", "cut inside a character"],
)
def test_long_reasons_are_cut(reason: str, kept: str) -> None:
    composer = composer_of(Message())
    opening = b"".join(composer.opening(EMPTY_DICT))
    head, body = composer.abort(reason)
    assert bytes(body).decode() == kept
    assert FrameHead.decode(bytes(head))[:4] == (ABORT, 0, 0, len(body))
    with pytest.raises(RemoteAbort):
        parse(opening + bytes(head) + bytes(body))
