"""Every bad input, with the one class of error that it gets, and honest objects that get none.

``python -m tests.attacks.corpus DIRECTORY`` writes the messages of all cases but the long ones, a
file each: seeds for mutation of messages.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

import aiotorchio
from aiotorchio.wire.frames import CHUNK, HEADER, SKELETON
from tests.attacks import costs
from tests.attacks.cases import MIB, Case, files_of
from tests.support import corpus as objects
from tests.support import craft, hostile
from tests.support.frames import (
    EMPTY_DICT,
    LIMITS,
    Message,
    fields,
    frame,
    pack,
    two_chunks,
)
from tests.wire import test_header, test_parser

__all__ = ["AUTHORITY_FILE", "HONEST", "WARM_UP", "all_cases", "behind", "behind_message"]

AUTHORITY_FILE = "authority.pem"
WARM_UP = "honest-warm_up"
SEED_NBYTES = 2**16
GIB = 2**30
# The least seconds that can be told from the delays of a busy machine.
SOON = 0.2
# Clocks have a coarse resolution.
EARLIEST = 0.19
# Backends of cases in which the receiver works long on bytes that have arrived: the link does not
# matter.
PLAIN_WAYS = ("blocking-none-tcp", "streams-asyncio-tcp", "anyio-trio-tcp")
# Levels of nesting: beyond every limit, and too few to harm a reader that recurses into them.
DEEP = 300
# The limit of a message that may be as large as a model.
ROOMY = {"total_nbytes": LIMITS.total_nbytes}
MACHINE = {"total_nbytes": GIB}

SMALL = bytes(Message())
CHUNKS = bytes(two_chunks())
INT64_MAX = 2**63 - 1


# ------------------------------------------------------------------------------ cut off


def truncated() -> Iterator[Case]:
    """The stream ends, or breaks, inside a message."""
    wanted = "TruncatedError"

    def cuts(name: str, *messages: bytes, **options: Any) -> Case:
        after = ("ended",) if len(messages) == 1 else ()
        return Case(name, wanted, messages, **{"play": "finish", "after": after} | options)

    yield cuts("empty", b"", after=("TruncatedError",))
    yield cuts("cut_at_every_byte", *(SMALL[:size] for size in range(len(SMALL))))
    borders = test_parser.starts(two_chunks())
    yield cuts("cut_at_every_frame", *(CHUNKS[:border] for border in borders))
    # Of 4000 bytes, the tensors show the first 8.
    unseen = Message(pack(fields(storages=[[4000, 4, 0], [3, 1, 0]])), bytes(4032 + 3))
    end_of_unseen = test_parser.starts(unseen)[2] + 32 + 2000
    yield cuts("cut_where_no_tensor_looks", bytes(unseen)[:end_of_unseen])
    within = bytes(Message())[:-20]
    yield cuts("closed", within, play="cut")
    yield cuts("tls_cut", within, play="cut", ways=("tls",))
    yield cuts(
        "tls_cut_before_a_message", b"", play="cut", ways=("tls",), after=("TruncatedError",)
    )
    # Bytes that were not read by then are lost with the connection, maybe the whole message.
    broken: dict[str, Any] = {"play": "reset", "scenario": "load_when_open"}
    broken["after"] = ("ended", "TruncatedError")
    yield cuts("reset", within, **broken)
    yield cuts("reset_in_a_chunk", CHUNKS[:2000], **broken)
    # A claim within the limits takes no memory before its bytes arrive.
    large = fields(storages=[[512 * MIB, 1, 0]], tensors=[], chunk_size=64 * MIB)
    claim = Message(pack(large))
    del claim.frames[2:]
    claim.frames.append(frame(claim.identity, CHUNK, bytes(4096), length=64 * MIB))
    yield cuts("claim_of_half_a_gib", bytes(claim), limits=MACHINE, memory=16 * MIB)
    # Claims of a few bytes that the limits allow.
    for table, item in (
        ("tensors", [0, "bool", 0, [], [], 0, []]),
        ("storages", [0, 1, 0]),
    ):
        header = Message(with_many(table, pack(item), aiotorchio.Limits().entries))
        opening = header.preface + header.frames[0]
        # The limits allow these claims; ``Limits.header_nbytes`` gives their memory footprint.
        memory = 16 * MIB + 20 * len(header.header)
        yield cuts(f"half_a_million_{table}", opening, ways=PLAIN_WAYS, memory=memory)
    for name, head, body in (
        ("length", b"Content-Length: %d" % len(SMALL), SMALL[:-9]),
        ("pieces", b"Transfer-Encoding: chunked", b"%x\r\n" % len(SMALL) + SMALL[:-9]),
        ("no_piece", b"Transfer-Encoding: chunked", b"100\r\n" + SMALL[:256] + b"\r\n"),
    ):
        answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body
        http = {"play": "answer", "scenario": "load_http", "after": ()}
        yield cuts(f"http_{name}", answer, ways=("blocking",), **http)


# ------------------------------------------------------------------------------ the format


def with_header(**changes: Any) -> bytes:
    return bytes(Message(pack(fields(**changes))))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def swapped_storages() -> bytes:
    """Two storages of one size, in one chunk, each with the bytes of the other."""
    header = fields(
        storages=[[64, 1, 0], [64, 1, 0]],
        tensors=[[n, "uint8", 0, [64], [1], 0, [name]] for n, name in enumerate("ab")],
    )
    payload = bytes(range(128))
    message = Message(pack(header), payload)
    head = message.frames[2][:32]
    message.frames[2] = head + payload[64:] + payload[:64]
    return bytes(message)


def nested_header() -> bytes:
    """A header with endless arrays in its last table."""
    return bytes(Message(pack(fields()[:-1]).replace(b"\x98", b"\x99", 1) + b"\x91" * DEEP))


def nested_fields() -> Iterator[bytes]:
    """Headers with endless arrays in place of any field."""
    mark = "replaced below"
    for path in (*test_header.INTEGERS, *test_header.TEXTS, *test_header.ARRAYS):
        header = pack(test_header.replace(fields(), path, mark))
        yield bytes(Message(header.replace(pack(mark), b"\x91" * DEEP + b"\xc0")))


def protocol() -> Iterator[Case]:
    """Messages that violate SPEC.md."""
    wanted, after = "ProtocolError", ("ended",)
    identity = Message().identity
    opening = Message().preface + b"".join(Message().frames[:2])
    messages = {
        "magic_http": b"HTTP/1.1 404 Not Found\r\n\r\n",
        "magic_zip": b"PK\x03\x04" + bytes(60),
        "magic_zeros": bytes(64),
        "version": flipped(SMALL, 8),
        # There is one hash, and a flag that says whether it is present: the other flags are
        # unknown.
        "unknown_flag": SMALL[:10] + b"\x03\x00" + SMALL[12:],
        "unknown_hash": SMALL[:10] + b"\x02\x00" + SMALL[12:],
        "reserved": flipped(SMALL, 12),
        "behind_the_header": bytes(Message(pack(fields()) + b"\0")),
        "behind_the_skeleton": bytes(Message(skeleton=EMPTY_DICT + b"\xc0")),
        "duplicate_key": with_header(metadata=[["a", "x"], ["a", "y"]]),
        "tensor_without_storage": with_header(tensors=[[9, "uint8", 0, [1], [1], 0, []]]),
        "length_negative": with_header(storages=[[-8, 4, 0], [3, 1, 0]]),
        "length_float": with_header(storages=[[8.0, 4, 0], [3, 1, 0]]),
        "length_bool": with_header(storages=[[True, 4, 0], [3, 1, 0]]),
        "length_null": with_header(storages=[[None, 4, 0], [3, 1, 0]]),
        "length_of_64_bits": with_header(storages=[[2**64 - 1, 4, 0], [3, 1, 0]]),
        "map_for_the_header": bytes(Message(pack(dict(enumerate(fields()))))),
        "map_for_a_row": with_header(storages=[{0: 8, 1: 4, 2: 0}]),
        "extra_field": bytes(Message(pack([*fields(), 0]))),
        "extra_field_in_a_row": with_header(storages=[[8, 4, 0, 0], [3, 1, 0]]),
        "missing_field": bytes(Message(pack(fields()[:-1]))),
        "header_depth": bytes(Message(b"\x91" * DEEP)),
        "header_depth_in_a_row": nested_header(),
        "header_utf8": bytes(Message(pack(fields()).replace(b"\xa5tests", b"\xa5test\xff"))),
        "byteorder": with_header(byteorder="middle"),
        "codec": with_header(codec="json"),
        "empty_chunks": opening + frame(identity, CHUNK) * 10,
        "location": with_header(storages=[[8, 4, 1], [3, 1, 0]]),
        "unit": with_header(storages=[[8, 3, 0], [3, 1, 0]]),
        "dtype": with_header(tensors=[[0, "float33", 0, [2], [1], 0, []]]),
    }
    for name, message in messages.items():
        yield Case(f"wire-{name}", wanted, (message,), after=after)
    fill: dict[str, Any] = {"play": "finish", "after": ()}
    bad_values = (
        test_header.replace(fields(), path, value)
        for path, value in parameters(test_header.test_type)
    )
    yield Case("wire-types", wanted, messages_of(bad_values), **fill)
    bad_bounds = (
        test_header.replace(fields(), path, value)
        for path, value in parameters(test_header.test_bounds)
    )
    yield Case("wire-bounds", wanted, messages_of(bad_bounds), **fill)
    headers = map(Message, parameters(test_header.test_not_messagepack))
    yield Case("wire-not_messagepack", wanted, tuple(map(bytes, headers)), **fill)


def rows() -> Iterator[Case]:
    """Rows of impossible tensors."""
    by_class: dict[str, list[bytes]] = {}
    for kind, items in parameters(test_header.test_bad_row):
        by_class.setdefault(kind.__name__, []).append(bytes(Message(pack(items))))
    for kind, messages in by_class.items():
        yield Case(f"rows-{kind}", kind, tuple(messages), play="finish", limits=ROOMY, after=())
    big = fields(byteorder="big", storages=[[8, 0, 0], [3, 1, 0]])
    for name, items in (
        ("offset", test_header.tensor(offset=1)),
        ("size", test_header.tensor(shape=[3])),
        ("stride", test_header.tensor(stride=[2])),
        ("beyond_its_storage", test_header.tensor(nbytes=7)),
        ("quantized", test_header.tensor("qint8")),
        ("nowhere", test_header.tensor(location="nowhere:7")),
        ("byteorder_of_mixed_units", big),
    ):
        message = bytes(Message(pack(items)))
        yield Case(f"row-{name}", "InvalidObjectError", (message,), after=("ended",))


def limited() -> Iterator[Case]:
    """Messages that exceed a limit."""
    preface = Message().preface
    claimed = Message()
    claimed.frames[1] = frame(claimed.identity, SKELETON, length=1001)
    endless = Message()
    endless.frames[1] = frame(endless.identity, SKELETON, length=2**64 - 1)
    tensors = {
        "expanded": test_header.tensor("uint8", [101], [0]),
        "dims": test_header.tensor(shape=[1] * 5, stride=[0] * 5),
        "dims_of_none": test_header.tensor(shape=[1] * 5000, stride=[0] * 5000),
        "storage": test_header.storage([1001, 1, 0]),
        "many_small": fields(storages=[[64, 1, 0]] * 20, tensors=[]),
        "chunk_size": fields(chunk_size=8192 + 64),
    }
    messages = {
        "header": preface + frame(preface, HEADER, length=1001),
        "header_of_64_bits": preface + frame(preface, HEADER, length=2**64 - 1),
        "skeleton": bytes(claimed),
        "skeleton_of_64_bits": bytes(endless),
    } | {name: bytes(Message(pack(items))) for name, items in tensors.items()}
    for table, item in (("storages", b"\x90"), ("tensors", b"\xc0"), ("metadata", b"\x01")):
        messages[f"entries_{table}"] = bytes(Message(with_many(table, item, 21)))
    messages["texts"] = bytes(Message(with_many("locations", pack("cpu"), 40)))
    limits = {"header_nbytes": 1000, "skeleton_nbytes": 1000, "chunk_nbytes": 8192, "entries": 20}
    limits |= {"total_nbytes": 1000, "expanded_nbytes": 100, "dims": 4}
    reasons = {
        "expanded": "Limits.expanded_nbytes",
        "dims": "5 dimensions, but Limits.dims is 4",
        "dims_of_none": "more than 4096 items of shape",
        "storage": "payload has 1001 bytes",
        "many_small": "payload has 1280 bytes",
        "chunk_size": "chunks of 8256 bytes",
        "header": "1001",
        "header_of_64_bits": str(2**64 - 1),
        "skeleton": "1001",
        "skeleton_of_64_bits": str(2**64 - 1),
        "texts": "short texts that take more than 500 bytes",
    } | {
        f"entries_{table}": f"more than 20 {table}" for table in ("storages", "tensors", "metadata")
    }
    for name, message in messages.items():
        # A header of thousands of dimensions is longer than those of the others.
        low = limits | ({"header_nbytes": 20_000} if name == "dims_of_none" else {})
        bounds = {"texts_floor": 500} if name == "texts" else {}
        yield Case(
            f"limit-{name}",
            "LimitExceeded",
            (message,),
            reason=reasons[name],
            limits=low,
            bounds=bounds,
            after=("ended",),
        )


def with_many(table: str, item: bytes, count: int) -> bytes:
    """Make a header with the same item in a table, again and again."""
    names = ["byteorder", "nonce", "producer", "metadata", "codec", "chunk_size"]
    names += ["locations", "storages", "tensors"]
    parts = [pack(value) for value in fields(storages=[[1, 1, 0]], tensors=[])]
    parts[names.index(table)] = b"\xdd" + struct.pack(">I", count) + item * count
    return b"\x99" + b"".join(parts)


def damaged() -> Iterator[Case]:
    """Messages with other bytes than those that were sent."""
    wanted = "ChecksumError"
    header, skeleton, chunk, end = (start + 32 for start in test_parser.starts(Message()))
    for name, place in (("header", header), ("skeleton", skeleton), ("payload", chunk)):
        yield Case(f"flip-{name}", wanted, (flipped(SMALL, place),), after=("ended",))
    # The frame's own digest finds it: then the end of the message is unknown.
    yield Case("flip-end", wanted, (flipped(SMALL, end),))
    yield Case("flip-digest", wanted, (flipped(SMALL, chunk - 1),), after=("ended",))
    yield Case("swapped_storages", wanted, (swapped_storages(),), after=("ended",))
    for kind, _, change in parameters(test_parser.test_misplaced):
        message = two_chunks()
        change(message)
        yield Case(f"frames-{change.__name__}", kind.__name__, (bytes(message),))
    yield Case("frames-no_end", "ProtocolError", (CHUNKS[:-40],), after=("ended",))
    unchecked = two_chunks(checksum=False)
    test_parser.foreign_chunk(unchecked)
    yield Case("frames-digest_of_none", "ProtocolError", (bytes(unchecked),), after=("ended",))
    gave_up = two_chunks()
    gave_up.frames[3:] = [frame(gave_up.identity, b"ABRT", b"no more")]
    yield Case("abort", "RemoteAbort", (bytes(gave_up),), after=("clean",))


def parameters(test: Any) -> list[Any]:
    """The parameters of another test."""
    mark = next(mark for mark in test.pytestmark if mark.name == "parametrize")
    return list(mark.args[1])


def messages_of(headers: Iterable[Any]) -> tuple[bytes, ...]:
    return tuple(bytes(Message(pack(header))) for header in headers)


# ------------------------------------------------------------------------------ the object


def skeletons() -> Iterator[Case]:
    """Errors in the skeletons around the tensors."""
    tensors = hostile.tensors()
    plain = craft.flattened(tensors)
    for codec, cases in (("tree", hostile.trees()), ("pickle", hostile.pickles())):
        header = msgspec.structs.replace(plain.header, codec=codec)
        parts = dataclasses.replace(plain, header=header)
        cut: list[bytes] = []
        for key, case in cases.items():
            message = craft.compose(dataclasses.replace(parts, skeleton=case.skeleton))
            if key.startswith("cut_"):
                cut.append(message)
                continue
            yield Case(
                f"{codec}-{key}",
                case.wanted,
                (message,),
                reason=case.reason,
                limits=dict(case.limits),
                bounds=dict(case.bounds),
            )
        yield Case(f"{codec}-cuts", "ProtocolError", tuple(cut), play="finish", after=())
    # Some programs lift Python's recursion limit; it must not be the only protection of the stack.
    for name, wanted, message in (
        ("tree", "LimitExceeded", craft.message(b"\x92\x00" * DEEP + b"\xc0", "tree")),
        ("pickle", "LimitExceeded", craft.message(hostile.limits()["deep_tuple_300_key"])),
        ("header", "ProtocolError", nested_header()),
    ):
        reason = "header is malformed" if name == "header" else "nested deeper than 256 levels"
        yield Case(
            f"deep-{name}",
            wanted,
            (message,),
            reason=reason,
            recursion_limit=10**6,
            ways=PLAIN_WAYS,
        )
    yield Case(
        "deep-fields",
        "ProtocolError",
        tuple(nested_fields()),
        play="finish",
        after=(),
        recursion_limit=10**6,
        ways=PLAIN_WAYS,
    )
    refused = {"allow_pickle": False}
    message = craft.message(craft.pickled({"a": 1}))
    yield Case("pickle-refused", "UnsafeObjectError", (message,), options=refused)


# ------------------------------------------------------------------------------ the peer


def slow() -> Iterator[Case]:
    """Peers that keep the receiver waiting."""
    wanted = "TransferTimeout"
    idle = {"idle_timeout": SOON}
    clock: dict[str, Any] = {"deadline": SOON, "earliest": EARLIEST}
    header = Message().preface + Message().frames[0]
    silent: dict[str, Any] = {"play": "silent", "after": ("ended",), "limits": idle} | clock
    for name, sent in (
        ("preface", SMALL[:10]),
        ("header", header),
        ("chunk_head", SMALL[: test_parser.starts(Message())[2] + 32]),
        ("chunk", CHUNKS[:2000]),
        ("all_but_a_byte", SMALL[:-1]),
    ):
        yield Case(f"silent_after_{name}", wanted, (sent,), **silent)
    large = fields(storages=[[4 * MIB, 1, 0]], tensors=[], chunk_size=MIB)
    half = Message(pack(large), bytes(4 * MIB), chunk_size=MIB)
    yield Case("silent_in_large", wanted, (bytes(half)[: 2 * MIB + 999],), **silent)
    handshake = {"handshake_timeout": SOON, "idle_timeout": None}
    yield Case("silent_handshake", wanted, (SMALL[:20],), **silent | {"limits": handshake})
    # A byte each 0.05 s, of the last hundred: five seconds, if no deadline ends it.
    rate = idle | {"least_rate": 1000}
    dripping = silent | {"play": "drip", "limits": rate}
    yield Case("slow_end", wanted, (SMALL,), **dripping)
    yield Case("slow_chunk", wanted, (CHUNKS[:4000],), **dripping)
    yield Case("slow_header", wanted, (header,), **dripping)
    late = handshake | {"least_rate": 0}
    yield Case("slow_handshake", wanted, (header,), **dripping | {"limits": late})
    # Slow, but not too slow: the longest pause is a thirtieth of the time budget.
    steady = {"idle_timeout": 1.0, "least_rate": 1}
    yield Case("steady", "", play="steady", limits=steady, after=("clean",), deadline=5)
    never: dict[str, Any] = {"play": "late", "limits": {"start_timeout": SOON}, "after": ("clean",)}
    yield Case("no_start", wanted, scenario="load_late", **clock, **never)


def deaf() -> Iterator[Case]:
    """Peers that do not read the bytes that are sent to them."""
    wanted = "TransferTimeout"
    options: dict[str, Any] = {"scenario": "save", "located": False, "after": ("ended",)}
    slow: dict[str, Any] = {
        "limits": {"write_timeout": SOON},
        "deadline": SOON,
        "earliest": EARLIEST,
    }
    yield Case("deaf", wanted, play="deaf", **options, **slow)
    yield Case("sips", wanted, play="sip", **options, **slow)
    yield Case("leaves", "TruncatedError", play="leave", **options)


def misused() -> Iterator[Case]:
    """Forbidden uses of a stream by its owner."""
    stream_error: dict[str, Any] = {"located": False}
    stopped = stream_error | {"after": ("ended",)}
    waiting = ("streams", "anyio", "socket")
    bad: dict[str, Any] = {"messages": (SMALL[:-20] + bytes(20),)}
    twice: dict[str, Any] = stream_error | {"after": ()}
    yield Case("busy_save", "StreamBusy", play="deaf", scenario="save_twice", **twice)
    yield Case("busy_load", "StreamBusy", play="silent", scenario="load_twice", **twice)
    yield Case("load_after_error", "StreamPoisoned", **bad, scenario="load_after_error", **stopped)
    yield Case(
        "load_after_cancel",
        "StreamPoisoned",
        (CHUNKS[:6000],),
        play="silent",
        scenario="load_after_cancel",
        ways=waiting,
        **stopped,
    )
    yield Case(
        "load_cancelled_clean",
        "",
        play="late",
        scenario="load_cancelled",
        after=("clean",),
        ways=waiting,
    )
    yield Case(
        "save_after_error", "StreamPoisoned", play="leave", scenario="save_after_error", **stopped
    )
    yield Case(
        "save_after_cancel",
        "StreamPoisoned",
        play="taste",
        scenario="save_after_cancel",
        ways=waiting,
        **stopped,
    )


# ------------------------------------------------------------------------------ honest objects


def behind() -> object:
    """An object that follows others on a stream."""
    return {"behind": torch.arange(8.0)}


def behind_message() -> bytes:
    file = io.BytesIO()
    aiotorchio.save(behind(), file)
    return file.getvalue()


def many_tensors() -> object:
    whole = torch.arange(10_000 * 4.0)
    return {f"layers.{n}.weight": whole[4 * n : 4 * n + 4].clone() for n in range(10_000)}


def nested_to_the_limit() -> object:
    innermost: list[Any] = []
    for _ in range(DEPTH - 1):
        innermost = [innermost]
    return innermost


DEPTH = aiotorchio.Limits().depth

HONEST: dict[str, Callable[[], object]] = {
    "warm_up": lambda: [{"a": torch.ones(2)}, {1, (2, 3)}, bytearray(b"x"), torch.zeros(MIB)],
    "many_tensors": many_tensors,
    "nested_to_the_limit": nested_to_the_limit,
} | {
    name: objects.CASES[name]
    for name in (
        *("optimizer_AdamW", "checkpoint", "model_parameters", "scheduler_MultiStepLR"),
        *("coo", "coo_uncoalesced", "coo_hybrid", "coo_empty", "csr", "csc", "bsr", "bsc"),
        *("quantized_per_tensor", "quantized_per_channel", "quantized_view"),
        *("nested", "nested_transposed", "jagged", "expanded", "expanded_scalar", "meta_huge"),
        *("overlapping", "two_dtypes", "shared_storage", "unviewed_bytes", "conj_and_neg"),
        *("typed_storage_and_view", "storage_odd_size", "parameter_twice", "many_dims"),
        *("bytes_values", "bytearrays", "sets", "frozensets", "complex_values", "counter"),
        *("big_integers", "huge_integer", "other_keys", "surrogates", "torch_constants"),
        *("deep_list", "deep_tuple", "deep_dict", "beyond_tree_depth", "cyclic_list", "wide"),
        *("ordered_with_attributes", "tensor_with_attributes", "many_small", "large"),
    )
}


def honest() -> Iterator[Case]:
    """Objects that no check may refuse, there and back."""
    for name in HONEST:
        yield Case(
            f"honest-{name}", "", play="echo", scenario="echo", honest=name, after=("echoed",)
        )


def long_skeletons() -> Iterator[Case]:
    """Allowed skeletons that take long: other tasks get turns during the load."""
    lists: dict[str, tuple[Any, int, tuple[str, ...]]] = {
        "empty_lists": ([0], 520_000, ("streams-asyncio-tcp",)),
        "numbers": (1, 3_000_000, ("anyio-trio-tcp",)),
        "sets": ([4], 180_000, ("socket-trio-unix",)),
        "texts": ("abc", 1_000_000, ("streams-uvloop-tcp",)),
    }
    for name, (item, count, ways) in lists.items():
        nbytes = len(msgspec.msgpack.encode(item)) * count
        # As long as the limits allow, with a part that takes a second.
        for part, parts in (("", 1), ("-part", 8)):
            yield Case(
                f"long-{name}{part}",
                "",
                maker=functools.partial(long_list, item, count // parts),
                after=("clean",),
                ways=ways,
                full=not part,
                # Twelve seconds of processor time, and in some runs as much again for the probe.
                deadline=20 if part else 60,
                memory=64 * MIB + 48 * nbytes // parts,
            )


def long_list(item: Any, count: int) -> bytes:
    """Make a message of the tree codec: a list of so many equal values."""
    node = msgspec.msgpack.encode(item)
    return craft.message(b"\xdd" + struct.pack(">I", count + 1) + b"\x00" + node * count, "tree")


# ------------------------------------------------------------------------------ all of them


def family_of(case: Case, function: str) -> str:
    """The function that makes a case; for the many skeletons, their codec, too."""
    return case.name.split("-")[0] if function == "skeletons" else function


def all_cases() -> list[Case]:
    families = (
        *(truncated, protocol, rows, limited, damaged, skeletons),
        *(slow, deaf, misused, honest, long_skeletons, *costs.FAMILIES),
    )
    cases = [
        dataclasses.replace(case, family=family_of(case, family.__name__))
        for family in families
        for case in family()
    ]
    names = {case.name for case in cases}
    assert len(names) == len(cases)
    return cases


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for case in all_cases():
        if case.maker is not None:
            continue
        for name, message in files_of(case):
            if len(message) <= SEED_NBYTES:
                (directory / name).write_bytes(message)


if __name__ == "__main__":
    main()
