"""The parser on valid messages, and on messages with every kind of damage.

Messages are built frame by frame with ``support/frames.py``; no stream is involved.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aiotorchio.errors import (
    AiotorchioError,
    ChecksumError,
    InvalidObjectError,
    LimitExceeded,
    ProtocolError,
    RemoteAbort,
    TruncatedError,
)
from aiotorchio.limits import Limits
from aiotorchio.wire.frames import (
    ABORT,
    CHUNK,
    END,
    HEADER,
    SKELETON,
    FrameHead,
    encode_preface,
)
from aiotorchio.wire.parser import (
    ChunkReceived,
    ChunkStarted,
    HeaderReceived,
    MessageEnded,
    Parser,
    ReadBytes,
    SkeletonReceived,
)
from tests.support.frames import (
    CHUNK_SIZE,
    EMPTY_DICT,
    LIMITS,
    NONCE,
    Message,
    bytewise,
    fields,
    frame,
    pack,
    parse,
    parse_three_ways,
    refused,
    two_chunks,
)
from tests.support.speed import patience

SMALL = bytes(Message())
SMALL_UNCHECKED = bytes(Message(checksum=False))
FILE = Path(__file__).parents[2] / "aiotorchio"


def starts(message: Message) -> list[int]:
    """The offset at which each frame begins."""
    places, at = [], 16
    for encoded in message.frames:
        places.append(at)
        at += len(encoded)
    return places


# Valid messages


@pytest.mark.parametrize("checksum", [True, False])
def test_events(checksum: bool) -> None:
    message = Message(checksum=checksum)
    parsed = parse_three_ways(bytes(message))
    header, skeleton, *rest = parsed.events
    assert isinstance(header, HeaderReceived)
    assert header.header.nonce == NONCE
    assert header.layout.offsets == [0, 64]
    assert header.message_id == message.identity
    assert skeleton == SkeletonReceived(EMPTY_DICT, starts(message)[1] + 32)
    assert rest == [ChunkStarted(0, 67), ChunkReceived(0, 67), MessageEnded()]
    assert parsed.payload == message.payload


@pytest.mark.parametrize("checksum", [True, False])
def test_several_chunks(checksum: bool) -> None:
    message = two_chunks(checksum=checksum)
    parsed = parse_three_ways(bytes(message))
    expected = []
    for place in ((0, 4096), (4096, 4096), (8192, 4)):
        expected += [ChunkStarted(*place), ChunkReceived(*place)]
    assert parsed.events[2:] == [*expected, MessageEnded()]
    assert parsed.payload == message.payload


def test_no_chunks() -> None:
    message = Message(pack(fields(storages=[], tensors=[])), b"", b"")
    parsed = parse_three_ways(bytes(message))
    assert [type(event) for event in parsed.events] == [
        HeaderReceived,
        SkeletonReceived,
        MessageEnded,
    ]


def test_two_messages_in_a_row() -> None:
    first, second = bytes(Message()), bytes(two_chunks())
    consumed = parse(first + second).consumed
    assert consumed == len(first)
    assert parse((first + second)[consumed:]).payload == two_chunks().payload


def test_nothing_of_the_payload_is_asked_for_before_the_header_is_valid() -> None:
    steps = Parser(LIMITS).parse()
    assert next(steps) == ReadBytes(8)
    assert steps.send(SMALL[:8]) == ReadBytes(8)
    assert steps.send(SMALL[8:16]) == ReadBytes(32)
    assert steps.send(SMALL[16:48]) == ReadBytes(len(Message().header))
    assert isinstance(steps.send(Message().header), HeaderReceived)


@pytest.mark.parametrize("start", [b"H", b"Not Foun", SMALL[:7] + b"x", b"PK\x03\x04"])
def test_foreign_bytes_are_told_by_the_first_eight(start: bytes) -> None:
    """A peer with another protocol may send no more bytes and keep the stream open."""
    steps = Parser(LIMITS).parse()
    next(steps)
    with pytest.raises(ProtocolError, match="it begins with"):
        steps.send(start)


# Truncated messages


@pytest.mark.parametrize("data", [SMALL, SMALL_UNCHECKED], ids=["checksum", "no checksum"])
def test_cut_at_every_byte(data: bytes) -> None:
    for size in range(len(data)):
        for cut in (bytewise, lambda view: [view]):
            with pytest.raises(TruncatedError) as caught:
                parse(data[:size], cut=cut)
            assert isinstance(caught.value, EOFError)
            assert caught.value.offset == size
            assert caught.value.entry is not None


def test_cut_around_every_frame() -> None:
    message = two_chunks()
    data = bytes(message)
    for start in [*starts(message), len(data)]:
        for size in (start - 1, start, start + 1, start + 31, start + 32, start + 33):
            if size < len(data):
                error = refused(TruncatedError, data[:size], trailing=b"")
                assert error.offset == size


def test_cut_messages_name_what_was_lost() -> None:
    message = Message()
    chunk = starts(message)[2] + 32
    data = bytes(message)
    assert "before a message began" in refused(TruncatedError, b"", trailing=b"").message
    for size, entry in (
        (15, "preface"),
        (16, "HEAD frame"),
        (chunk - 1, "CHNK frame"),
        (chunk, "storage 0, tensor 0 ('w')"),
        (chunk + 66, "storage 1, tensor 1"),
        (chunk + 67, "DONE frame"),
    ):
        refused(TruncatedError, data[:size], trailing=b"", entry=entry)


def test_cut_inside_an_abort() -> None:
    message = Message()
    opening = message.preface + message.frames[0]
    abort = frame(message.identity, ABORT, b"why")
    for size in range(1, len(abort)):
        refused(TruncatedError, opening + abort[:size], trailing=b"")


# Flipped bits


def flips(data: bytes) -> list[tuple[int, bytes]]:
    return [
        (n // 8, data[: n // 8] + bytes([data[n // 8] ^ 1 << n % 8]) + data[n // 8 + 1 :])
        for n in range(8 * len(data))
    ]


def test_every_flip_is_noticed() -> None:
    for place, flipped in flips(SMALL):
        with pytest.raises(AiotorchioError) as caught:
            parse(flipped + bytes(64))
        assert caught.value.entry is not None, place
        assert caught.value.offset is not None, place


def test_without_checksums_every_flip_outside_of_chunks_is_noticed() -> None:
    chunk = starts(Message())[2] + 32
    for place, flipped in flips(SMALL_UNCHECKED):
        if chunk <= place < chunk + 67:
            assert parse(flipped).payload != Message().payload
        else:
            with pytest.raises(AiotorchioError):
                parse(flipped + bytes(64))


@pytest.mark.parametrize("number", range(4))
def test_flipped_bodies_are_checksum_errors(number: int) -> None:
    message = Message()
    start = starts(message)[number] + 32
    damaged = bytearray(bytes(message))
    damaged[start] ^= 1
    refused(ChecksumError, bytes(damaged), offset=start)


def test_a_damaged_chunk_names_its_tensor() -> None:
    message = two_chunks()
    damaged = bytearray(bytes(message))
    start = starts(message)[3] + 32
    damaged[start + 100] ^= 1
    refused(ChecksumError, bytes(damaged), offset=start, entry="storage 0, tensor 0 ('w')")


# Frames in the wrong place


def second_chunk(message: Message, *, number: int = 1, offset: int = CHUNK_SIZE) -> bytes:
    return frame(message.identity, CHUNK, body_of(message, 1), number=number, offset=offset)


def body_of(message: Message, number: int) -> bytes:
    return message.frames[2 + number][32:]


def swap_frames(message: Message) -> None:
    message.frames[2], message.frames[3] = message.frames[3], message.frames[2]


def swap_bodies(message: Message) -> None:
    first, second = message.frames[2:4]
    message.frames[2], message.frames[3] = first[:32] + second[32:], second[:32] + first[32:]


def swap_bodies_and_digests(message: Message) -> None:
    first, second = message.frames[2:4]
    message.frames[2] = first[:24] + second[24:]
    message.frames[3] = second[:24] + first[24:]


def swap_bodies_and_fix_their_digests(message: Message) -> None:
    first, second = body_of(message, 0), body_of(message, 1)
    message.frames[2] = frame(message.identity, CHUNK, second)
    message.frames[3] = frame(message.identity, CHUNK, first, number=1, offset=CHUNK_SIZE)


def drop_chunk(message: Message) -> None:
    del message.frames[3]


def drop_last_chunk(message: Message) -> None:
    del message.frames[4]


def drop_all_chunks(message: Message) -> None:
    del message.frames[2:5]


def drop_skeleton(message: Message) -> None:
    del message.frames[1]


def repeat_chunk(message: Message) -> None:
    message.frames.insert(3, message.frames[2])


def repeat_last_chunk(message: Message) -> None:
    message.frames.insert(5, message.frames[4])


def repeat_skeleton(message: Message) -> None:
    message.frames.insert(2, message.frames[1])


def repeat_header(message: Message) -> None:
    message.frames.insert(1, message.frames[0])


def foreign_chunk(message: Message) -> None:
    other = Message(pack(fields(nonce=bytes(16))))
    body = body_of(message, 0)
    message.frames[2] = frame(other.identity, CHUNK, body)


def foreign_end(message: Message) -> None:
    message.frames[-1] = frame(bytes(16), END, message.frames[-1][32:], number=3, offset=8196)


def replay_chunk_with_another_index(message: Message) -> None:
    message.frames[3] = struct.pack("<4sIQ", CHUNK, 1, CHUNK_SIZE) + message.frames[2][16:]


def wrong_index(message: Message) -> None:
    message.frames[3] = second_chunk(message, number=7)


def index_of_32_bits(message: Message) -> None:
    message.frames[3] = second_chunk(message, number=2**32 - 1)


def hole(message: Message) -> None:
    message.frames[3] = second_chunk(message, offset=CHUNK_SIZE + 64)


def overlap(message: Message) -> None:
    message.frames[3] = second_chunk(message, offset=CHUNK_SIZE - 64)


def offset_of_64_bits(message: Message) -> None:
    message.frames[3] = second_chunk(message, offset=2**64 - 1)


def long_chunk(message: Message) -> None:
    body = body_of(message, 0) + bytes(1)
    message.frames[2] = frame(message.identity, CHUNK, body)


def short_chunk(message: Message) -> None:
    message.frames[2] = frame(message.identity, CHUNK, body_of(message, 0)[:-1])


def empty_chunk(message: Message) -> None:
    message.frames[2:2] = [frame(message.identity, CHUNK)] * 1000


def claims_2_64(message: Message) -> None:
    message.frames[2] = frame(message.identity, CHUNK, body_of(message, 0), length=2**64 - 1)


def long_end(message: Message) -> None:
    body = message.frames[-1][32:] + bytes(8)
    message.frames[-1] = frame(message.identity, END, body, number=3, offset=8196)


def empty_end(message: Message) -> None:
    message.frames[-1] = frame(message.identity, END, number=3, offset=8196)


def end_with_another_count(message: Message) -> None:
    body = message.frames[-1][32:]
    message.frames[-1] = frame(message.identity, END, body, number=2, offset=8196)


def end_with_another_total(message: Message) -> None:
    body = message.frames[-1][32:]
    message.frames[-1] = frame(message.identity, END, body, number=3, offset=8192)


def end_over_other_frames(message: Message) -> None:
    message.frames[-1] = frame(message.identity, END, bytes(8), number=3, offset=8196)


def end_at_once(message: Message) -> None:
    del message.frames[1:5]


def unknown_kind(message: Message) -> None:
    message.frames[2] = frame(message.identity, b"DATA", b"x")


def kind_that_is_no_text(message: Message) -> None:
    message.frames[2] = frame(message.identity, b"\xff\xfe\x00\x01")


def skeleton_with_index(message: Message) -> None:
    message.frames[1] = frame(message.identity, SKELETON, EMPTY_DICT, number=1)


def skeleton_with_offset(message: Message) -> None:
    message.frames[1] = frame(message.identity, SKELETON, EMPTY_DICT, offset=1)


def header_with_index(message: Message) -> None:
    message.frames[0] = frame(message.preface, HEADER, message.header, number=1)


def header_under_its_own_id(message: Message) -> None:
    message.frames[0] = frame(message.identity, HEADER, message.header)


def abort_with_index(message: Message) -> None:
    message.frames[2] = frame(message.identity, ABORT, b"x", number=1)


def abort_with_offset(message: Message) -> None:
    message.frames[2] = frame(message.identity, ABORT, b"x", offset=1)


def long_abort(message: Message) -> None:
    message.frames[2] = frame(message.identity, ABORT, b"x" * 4097)


def endless_abort(message: Message) -> None:
    message.frames[2] = frame(message.identity, ABORT, b"x", length=2**64 - 1)


def abort_that_is_not_utf8(message: Message) -> None:
    message.frames[2] = frame(message.identity, ABORT, b"\xff")


def damaged_abort(message: Message) -> None:
    message.frames[2] = frame(message.identity, ABORT, b"x", digest=1)


def foreign_abort(message: Message) -> None:
    message.frames[2] = frame(message.preface, ABORT, b"x")


@pytest.mark.parametrize(
    ("kind", "entry", "change"),
    [
        (ProtocolError, "CHNK frame", swap_frames),
        (ChecksumError, "storage 0, tensor 0 ('w')", swap_bodies),
        (ChecksumError, "storage 0, tensor 0 ('w')", swap_bodies_and_digests),
        # Each chunk is valid but in the wrong place; only the digest of the end frame shows it.
        (ChecksumError, "end", swap_bodies_and_fix_their_digests),
        (ProtocolError, "CHNK frame", drop_chunk),
        (ProtocolError, "CHNK frame", drop_last_chunk),
        (ProtocolError, "CHNK frame", drop_all_chunks),
        (ProtocolError, "SKEL frame", drop_skeleton),
        (ProtocolError, "CHNK frame", repeat_chunk),
        (ProtocolError, "DONE frame", repeat_last_chunk),
        (ProtocolError, "CHNK frame", repeat_skeleton),
        (ProtocolError, "SKEL frame", repeat_header),
        (ChecksumError, "storage 0, tensor 0 ('w')", foreign_chunk),
        (ChecksumError, "DONE frame", foreign_end),
        (ChecksumError, "storage 0, tensor 0 ('w')", replay_chunk_with_another_index),
        (ProtocolError, "CHNK frame", wrong_index),
        (ProtocolError, "CHNK frame", index_of_32_bits),
        (ProtocolError, "CHNK frame", hole),
        (ProtocolError, "CHNK frame", overlap),
        (ProtocolError, "CHNK frame", offset_of_64_bits),
        (ProtocolError, "chunk 0", long_chunk),
        (ProtocolError, "chunk 0", short_chunk),
        (ProtocolError, "chunk 0", empty_chunk),
        (ProtocolError, "chunk 0", claims_2_64),
        (ProtocolError, "end", long_end),
        (ProtocolError, "end", empty_end),
        (ProtocolError, "DONE frame", end_with_another_count),
        (ProtocolError, "DONE frame", end_with_another_total),
        (ChecksumError, "end", end_over_other_frames),
        (ProtocolError, "SKEL frame", end_at_once),
        (ProtocolError, "CHNK frame", unknown_kind),
        (ProtocolError, "CHNK frame", kind_that_is_no_text),
        (ProtocolError, "SKEL frame", skeleton_with_index),
        (ProtocolError, "SKEL frame", skeleton_with_offset),
        (ProtocolError, "HEAD frame", header_with_index),
        (ChecksumError, "HEAD frame", header_under_its_own_id),
        (ProtocolError, "ABRT frame", abort_with_index),
        (ProtocolError, "ABRT frame", abort_with_offset),
        (ProtocolError, "ABRT frame", long_abort),
        (ProtocolError, "ABRT frame", endless_abort),
        (ProtocolError, "ABRT frame", abort_that_is_not_utf8),
        (ChecksumError, "ABRT frame", damaged_abort),
        (ChecksumError, "ABRT frame", foreign_abort),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_misplaced(
    kind: type[AiotorchioError], entry: str, change: Callable[[Message], None]
) -> None:
    message = two_chunks()
    change(message)
    refused(kind, message, entry=entry)


@pytest.mark.parametrize("change", [swap_bodies, foreign_chunk])
def test_damage_in_chunks_without_checksum(change: Callable[[Message], None]) -> None:
    message = two_chunks(checksum=False)
    change(message)
    if change is swap_bodies:
        assert parse(bytes(message)).payload != message.payload
    else:
        refused(ProtocolError, message, entry="chunk 0")


def test_missing_end() -> None:
    message = two_chunks()
    del message.frames[-1]
    refused(TruncatedError, message, trailing=b"", entry="DONE frame")
    refused(ProtocolError, bytes(message) + bytes(two_chunks()), entry="DONE frame")


def test_unknown_flag_and_version() -> None:
    for at in (8, 9, 10, 11, 12, 13, 14, 15):
        damaged = bytearray(SMALL)
        damaged[at] ^= 2
        refused(ProtocolError, bytes(damaged), entry="preface", offset=at & ~1 if at < 12 else 12)


def test_a_downgrade_to_no_checksums_is_noticed() -> None:
    damaged = bytearray(SMALL)
    damaged[10] = 0
    refused(ChecksumError, bytes(damaged), entry="HEAD frame")


# Limits


@pytest.mark.parametrize(
    ("limits", "entry"),
    [
        (Limits(header_nbytes=len(Message().header) - 1), "HEAD frame"),
        (Limits(skeleton_nbytes=1), "SKEL frame"),
        (Limits(chunk_nbytes=4095), "header"),
        (Limits(total_nbytes=66), "header"),
        (Limits(entries=1), "header"),
        (Limits(dims=0), "tensor 0 ('w')"),
    ],
    ids=repr,
)
def test_limits(limits: Limits, entry: str) -> None:
    refused(LimitExceeded, SMALL, limits=limits, entry=entry)


def test_exact_limits() -> None:
    limits = Limits(
        header_nbytes=len(Message().header),
        skeleton_nbytes=2,
        chunk_nbytes=4096,
        total_nbytes=67,
        entries=2,
        dims=1,
    )
    assert parse_three_ways(SMALL, limits=limits)


@pytest.mark.parametrize("length", [2**30, 2**63, 2**64 - 1])
def test_a_frame_that_claims_too_much_is_refused_before_it_is_asked_for(length: int) -> None:
    preface = encode_preface(1)
    refused(LimitExceeded, preface + frame(preface, HEADER, length=length), entry="HEAD frame")
    message = Message()
    message.frames[1] = frame(message.identity, SKELETON, length=length)
    refused(LimitExceeded, message, entry="SKEL frame")


# The parser checks the header


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (ProtocolError, pack(fields()) + b"\0"),
        (ProtocolError, pack(fields(chunk_size=4097))),
        (LimitExceeded, pack(fields(storages=[[2**40 + 1, 1, 0]]))),
        (InvalidObjectError, pack(fields(storages=[[0, 1, 0]] * 2, tensors=fields()[8][1:]))),
    ],
    ids=["malformed", "wrong", "large", "invalid"],
)
def test_bad_header(kind: type[AiotorchioError], header: bytes) -> None:
    refused(kind, Message(header), offset=48)


# Aborted messages


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("reason", ["", "why", "x" * 4096])
def test_abort_in_place_of_every_frame(number: int, reason: str) -> None:
    message = two_chunks()
    identity = message.identity if number else message.preface
    message.frames[number:] = [frame(identity, ABORT, reason.encode())]
    data = bytes(message)
    error = refused(RemoteAbort, data, entry="ABRT frame", offset=len(data) - len(reason))
    assert error.message == f"the sender gave up: {reason}"


@pytest.mark.parametrize("ending", [END, ABORT])
def test_the_end_is_told_before_its_errors(ending: bytes) -> None:
    """Before an error in the end frame, the driver learns that the whole message has been read."""
    message = Message(pack(fields(storages=[], tensors=[])), b"")
    body = bytes(8)
    message.frames[-1] = frame(message.identity, ending, body)
    data, position = bytes(message), 0
    steps = Parser(LIMITS).parse()
    step, last = next(steps), None
    with pytest.raises((ChecksumError, RemoteAbort)):
        while True:
            answer = None
            if isinstance(step, ReadBytes):
                answer = data[position : position + step.size]
                position += step.size
            last = step
            step = steps.send(answer)
    assert last == MessageEnded()
    assert position == len(data)


# No torch, no I/O


def test_the_room_needs_neither_torch_nor_io() -> None:
    """Imports the modules without the ``__init__`` of the package, which imports torch."""
    modules = ["aiotorchio.errors", "aiotorchio.limits"]
    modules += [f"aiotorchio.wire.{path.stem}" for path in (FILE / "wire").glob("[!_]*.py")]
    code = f"""
import importlib, sys, types
package = types.ModuleType("aiotorchio")
package.__path__ = [{str(FILE)!r}]
sys.modules["aiotorchio"] = package
for name in {modules!r}:
    importlib.import_module(name)
print(*({{"torch", "numpy", "anyio", "trio", "asyncio", "socket", "ssl"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(60),
    )
    assert done.stdout.strip() == ""
    assert len(modules) == 10


def test_a_head_that_is_decoded_is_not_trusted() -> None:
    """``FrameHead.decode`` can return any values; the parser only compares them."""
    for seed in range(256):
        head = FrameHead.decode(bytes((seed * n + n // 7) % 256 for n in range(1, 33)))
        refused(ProtocolError, encode_preface(1) + head.encode(), entry="HEAD frame", offset=16)
