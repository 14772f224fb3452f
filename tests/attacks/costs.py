"""The work that a peer can cause, with each loader: tables of kinds and loaders.

A kind is a message that is cheap to send, or a way to send it, and the receiver's options for it.
Each kind meets each loader, except those that a kind names with the reason. The rules are the same
for all: the event loop is not held, memory grows only by received bytes, a cancelled call ends. All
messages are honest, so that no error ends the work early, except those that end in the middle.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import aiotorchio
from aiotorchio.codecs.tree.tags import Tag
from aiotorchio.wire.frames import CHUNK, HEADER, SKELETON
from tests.attacks.cases import MIB, Case, row_name
from tests.attacks.loaders import LOADERS, WAITING_LOADERS
from tests.support.frames import Message, fields, frame, pack

__all__ = ["FAMILIES", "KINDS", "Kind", "met"]

# Enough to hold the loop for longer than allowed, if all of it ran there.
ROWS, NAMES, SIDE = 10_000, 60_000, 8000
# Tensors to receive into: the caller chooses their number, and each costs a tenth of a millisecond.
DESTINATIONS = 1000
CHUNK_SIZE = 64 * MIB
WAITING = ("streams", "anyio", "socket")
# Backends where a connection can follow a broken one: OpenSSL keeps the errors of a broken
# connection for its thread, and CPython may report them for the next one.
PLAIN = ("asyncio-tcp", "asyncio-unix", "uvloop-tcp", "trio-tcp", "trio-unix")
Options = dict[str, Any]

# Why a kind does not meet a loader.
NO_PATTERNS = "it takes no names and no patterns"
NO_BYTES = "it keeps no bytes"
NO_DESTINATIONS = "it copies nothing to tensors that are there"
HEADER_ONLY = "it reads nothing behind the header"


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Attributes:
        make: The message.
        into: The targets; see ``loaders.destinations``.
        select: The value of ``select``.
        selects: Other loaders that select the same.
        without: Loaders that it does not meet, with the reason.
        fast: Loaders of the fast tier: the one with which the work was found, and each loader for
            some kind.
        cancels: Loaders of the fast tier for a call that is cancelled; empty: the work is too short
            for that with any loader.
        memory: See ``Case``.
        deadline: See ``Case``.
        play: See ``Case``.
        dress: See ``Case``.
        ways: See ``Case``.
    """

    make: Callable[[], bytes]
    _: dataclasses.KW_ONLY
    into: Options
    fast: tuple[str, ...]
    cancels: str = ""
    select: str | list[str] = "w"
    selects: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    memory: int = 64 * MIB
    deadline: float = 10
    play: str = "whole"
    dress: str = ""
    ways: tuple[str, ...] = ()

    def options(self, loader: str) -> Options:
        """The options of a loader."""
        options: Options = {}
        if loader in ("into", "staged"):
            options = {"into": self.into, "strict": False}
        if loader == "select" or loader in self.selects:
            options["select"] = self.select
        return options


# ------------------------------------------------------------------------------ messages


def dict_of(names: Mapping[str, int]) -> bytes:
    """Make a skeleton: a dict of tensors, by name their rows."""
    items: list[Any] = [Tag.DICT]
    for name, row in names.items():
        items += [name, [Tag.TENSOR, row]]
    return pack(items)


@functools.cache
def many_names() -> bytes:
    """One tensor without bytes, in many places."""
    names = [f"{n:05x}" for n in range(NAMES)]
    row = [0, "uint8", 0, [0], [1], 0, names]
    header = fields(storages=[[0, 1, 0]], tensors=[row], metadata=[])
    return bytes(Message(pack(header), b"", dict_of(dict.fromkeys(names, 0))))


@functools.cache
def rows(nbytes: int, *, every: int = 1, byteorder: str = "little", count: int = ROWS) -> bytes:
    """Many small storages in one chunk, all or some of them with a tensor."""
    numbers = range(0, count, every)
    unit, dtype = (1, "uint8") if byteorder == "little" else (8, "int64")
    tensors = [[n, dtype, 0, [nbytes // unit], [1], 0, [row_name(n)]] for n in numbers]
    header = fields(
        byteorder=byteorder,
        storages=[[nbytes, unit, 0]] * count,
        tensors=tensors,
        metadata=[],
        chunk_size=CHUNK_SIZE,
    )
    stride = -(-nbytes // 64) * 64
    payload = bytes((count - 1) * stride + nbytes if nbytes else 0)
    skeleton = dict_of({row_name(n): index for index, n in enumerate(numbers)})
    return bytes(Message(pack(header), payload, skeleton, chunk_size=CHUNK_SIZE))


@functools.cache
def one_tensor(nbytes: int, unit: int, row: tuple[Any, ...], byteorder: str = "little") -> bytes:
    """One tensor, ``w``, in one storage."""
    dtype, shape, stride = row
    header = fields(
        byteorder=byteorder,
        storages=[[nbytes, unit, 0]],
        tensors=[[0, dtype, 0, shape, stride, 0, ["w"]]],
        metadata=[],
        chunk_size=4 * MIB,
    )
    return bytes(Message(pack(header), bytes(nbytes), dict_of({"w": 0}), chunk_size=4 * MIB))


def swapped() -> bytes:
    """A payload of 32 MiB in foreign byte order."""
    return one_tensor(32 * MIB, 2, ("int16", (16 * MIB,), (1,)), "big")


def windows() -> bytes:
    """A tensor of few bytes, each of them in many rows."""
    return one_tensor(2 * SIDE, 1, ("uint8", (SIDE, SIDE), (1, 1)))


def expanded() -> bytes:
    """One number, at every place of a large tensor."""
    return one_tensor(1, 1, ("uint8", (SIDE, SIDE), (0, 0)))


def saved(obj: object) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file)
    return file.getvalue()


@functools.cache
def long_skeleton() -> bytes:
    """A long skeleton of the tree codec, and a tensor."""
    numbers = [[n % 100] * (n % 3) for n in range(20_000)]
    return saved({"w": torch.ones(1), "lists": numbers, "texts": ["abc"] * 100_000})


@functools.cache
def long_pickle() -> bytes:
    """A long pickle, and a tensor."""
    # The tree codec has no frozensets.
    return saved(
        {"w": torch.ones(1), "other": frozenset({1}), "pairs": [(n, str(n)) for n in range(20_000)]}
    )


@functools.cache
def sparse(count: int, size: int) -> bytes:
    """Sparse tensors, and a dense one."""
    diagonal = torch.stack([torch.arange(size)] * 2)
    made = [
        torch.sparse_coo_tensor(diagonal, torch.ones(size), (size, size), check_invariants=True)
        for _ in range(count)
    ]
    return saved({"w": torch.ones(1), "sparse": made})


@functools.cache
def nested(count: int, parts: int) -> bytes:
    """Nested tensors, jagged and not, and a dense one."""
    made = []
    for n in range(count):
        layout = torch.jagged if n % 2 else torch.strided
        made.append(torch.nested.nested_tensor([torch.ones(2, 2)] * parts, layout=layout))
    return saved({"w": torch.ones(1), "nested": made})


def claimed_header() -> bytes:
    """The beginning of a header of 32 MiB."""
    message = Message()
    return message.preface + frame(message.preface, HEADER, b"\x99", length=32 * MIB)


def claimed_skeleton() -> bytes:
    """The beginning of a skeleton of 32 MiB."""
    message = Message(pack(one_row()))
    opening = message.preface + message.frames[0]
    return opening + frame(message.identity, SKELETON, b"\x91", length=32 * MIB)


def claimed_chunk() -> bytes:
    """The first byte of a chunk of 64 MiB, nearly all of it one tensor."""
    large = [0, "uint8", 0, [CHUNK_SIZE - 64], [1], 0, ["large"]]
    small = [1, "float32", 0, [1], [1], 0, ["w"]]
    header = fields(
        storages=[[CHUNK_SIZE - 64, 1, 0], [4, 4, 0]],
        tensors=[large, small],
        metadata=[],
        chunk_size=CHUNK_SIZE,
    )
    message = Message(pack(header), b"", dict_of({"large": 0, "w": 1}))
    opening = message.preface + b"".join(message.frames[:2])
    return opening + frame(message.identity, CHUNK, b"\0", length=CHUNK_SIZE - 60)


# ------------------------------------------------------------------------------ kinds

ONE = {"names": ["w"], "shape": [1], "dtype": "float32"}
NAMED = ("iterate",)
SOME_ROWS: Options = {"into": {"rows": DESTINATIONS, "shape": [64]}, "select": "x*"}
NONE_NEEDED = dict.fromkeys(("skip", "tensors", "unsafe_globals"), NO_BYTES)
INTO_ONLY = dict.fromkeys(LOADERS.keys() - {"into", "staged"}, NO_DESTINATIONS)

KINDS: dict[str, Kind] = {
    "names": Kind(
        many_names,
        fast=("select",),
        cancels="into",
        into={"names": ["00000"], "shape": [0]},
        select=["*7", "0000*", "00001"],
    ),
    "patterns": Kind(
        lambda: rows(0, count=10_000),
        fast=("select",),
        cancels="iterate",
        deadline=1,
        into={"rows": DESTINATIONS, "shape": [0]},
        # Ten million pairs of a name and a pattern.
        select=[f"x{n:04}*" for n in range(1000)],
        selects=("into", "staged", "iterate"),
        without=dict.fromkeys(
            ("load", "relocate", "skip", "tensors", "unsafe_globals"), NO_PATTERNS
        ),
    ),
    "swapped": Kind(
        swapped,
        fast=("iterate",),
        cancels="load",
        into={"names": ["w"], "shape": [16 * MIB], "dtype": "int16"},
        without=NONE_NEEDED,
    ),
    "swapped_rows": Kind(
        lambda: rows(8, byteorder="big"),
        fast=("load",),
        into={"rows": DESTINATIONS, "shape": [1], "dtype": "int64"},
        select="x*",
        without=NONE_NEEDED,
    ),
    "windows": Kind(
        windows,
        fast=("into",),
        cancels="into",
        into={"names": ["w"], "shape": [SIDE, SIDE], "transposed": True},
        memory=64 * MIB + SIDE**2,
        without=INTO_ONLY,
    ),
    "expanded": Kind(
        expanded,
        fast=("staged",),
        cancels="staged",
        into={"names": ["w"], "shape": [SIDE, SIDE]},
        memory=64 * MIB + SIDE**2,
        without=INTO_ONLY,
    ),
    "rows": Kind(lambda: rows(64), fast=("iterate", "select"), cancels="select", **SOME_ROWS),
    "empty_rows": Kind(
        lambda: rows(0), fast=("relocate",), into={"rows": DESTINATIONS, "shape": [0]}, select="x*"
    ),
    # The property takes a microsecond for each row.
    "specs": Kind(
        lambda: rows(0, count=6 * ROWS),
        fast=("tensors",),
        into={},
        without=dict.fromkeys(LOADERS.keys() - {"tensors"}, "it does so with fewer rows"),
    ),
    # Those of the other names have no tensor.
    "gaps": Kind(
        lambda: rows(64, every=2), fast=("iterate",), into={"rows": 1, "shape": [64]}, select="x*"
    ),
    "crumbs": Kind(
        lambda: rows(64),
        dress="crumbs",
        ways=WAITING,
        fast=("into", "skip"),
        cancels="skip",
        **SOME_ROWS,
    ),
    "records": Kind(
        lambda: rows(64, count=2 * DESTINATIONS),
        play="crumbs",
        ways=("tls",),
        fast=("load",),
        **SOME_ROWS,
    ),
    "skeleton": Kind(long_skeleton, fast=("staged",), cancels="iterate", into=ONE),
    "pickle": Kind(long_pickle, fast=("unsafe_globals",), cancels="load", into=ONE),
    "small_sparse": Kind(
        lambda: sparse(300, 10), fast=("load",), cancels="relocate", into=ONE, selects=NAMED
    ),
    "large_sparse": Kind(
        lambda: sparse(1, 200_000), fast=("into",), cancels="load", into=ONE, selects=NAMED
    ),
    "small_nested": Kind(
        lambda: nested(200, 3), fast=("load",), cancels="select", into=ONE, selects=NAMED
    ),
    "large_nested": Kind(
        lambda: nested(2, 20_000), fast=("skip",), cancels="load", into=ONE, selects=NAMED
    ),
    # Each has three parts, and is yielded by its name when the last of them has arrived.
    "parts": Kind(
        lambda: sparse(1000, 10), fast=("iterate",), cancels="iterate", into=ONE, select="*"
    ),
}


# Claims after which a peer may stop: the bytes until then, and loaders that do not get there.
CLAIMS: dict[str, tuple[Callable[[], bytes], Mapping[str, str]]] = {
    "header": (claimed_header, {}),
    "skeleton": (claimed_skeleton, {"tensors": HEADER_ONLY}),
    "chunk": (claimed_chunk, {"tensors": HEADER_ONLY}),
}
CONNECTIONS, PER_CONNECTION = 20, MIB
STALLED = {"idle_timeout": 0.4}

CANCELLATIONS = 2


def costs() -> Iterator[Case]:
    """Each kind with each loader."""
    for name, kind in KINDS.items():
        for loader in met(kind):
            yield Case(
                f"cost-{name}-{loader}",
                "",
                maker=kind.make,
                full=loader not in kind.fast,
                play=kind.play,
                # A stream in disguise cannot be broken, and keeps the following messages.
                scenario="load_once" if kind.dress else "load",
                after=() if kind.dress else ("ended", "clean"),
                deadline=kind.deadline,
                **in_common(kind, loader),
            )


def cancelled() -> Iterator[Case]:
    """Long work that is cancelled in the middle."""
    for name, kind in KINDS.items():
        # The property is available when the header has arrived.
        short = {"tensors"} if name not in ("names", "rows", "crumbs") else {}
        loaders = [loader for loader in met(kind) if loader not in short]
        for loader in loaders if kind.cancels else ():
            yield Case(
                f"cancel-{name}-{loader}",
                "",
                maker=kind.make,
                connections=CANCELLATIONS + 1,
                scenario="load_and_cancel",
                full=loader != kind.cancels,
                after=(),
                deadline=kind.deadline,
                **in_common(kind, loader) | {"ways": PLAIN},
            )


def claims() -> Iterator[Case]:
    """Long frames that are claimed, with one byte sent of each, over many connections at once."""
    for number, (name, (make, without)) in enumerate(CLAIMS.items()):
        loaders = [loader for loader in LOADERS if loader not in without]
        for loader in loaders:
            options: Options = {}
            if loader in ("into", "staged"):
                options = {"into": {"names": ["w"], "shape": [1], "dtype": "float32"}}
                options["strict"] = False
            elif loader == "select":
                options = {"select": "w"}
            yield Case(
                f"claim-{name}-{loader}",
                "TransferTimeout",
                (make(),),
                connections=CONNECTIONS,
                scenario="load_at_once",
                play="silent",
                loader=loader,
                options=options,
                limits=STALLED,
                ways=WAITING if loader in WAITING_LOADERS else (),
                full=loader not in (by_turns(loaders, number), by_turns(loaders, number + 4)),
                after=(),
                memory=CONNECTIONS * PER_CONNECTION,
            )


def equals() -> Iterator[Case]:
    """Streams that compare equal, of two connections."""
    whole = bytes(Message(skeleton=dict_of({"w": 0}), header=pack(one_row()), payload=bytes(4)))
    for number, dress in enumerate(("equal", "unhashable", "equal_pieces", "unhashable_pieces")):
        fast = (
            "load",
            by_turns(list(LOADERS), 2 * number + 1),
            by_turns(list(LOADERS), 2 * number),
        )
        for loader in LOADERS:
            options: Options = {}
            if loader in ("into", "staged"):
                options = {"into": ONE}
            elif loader == "select":
                options = {"select": "w"}
            common: Options = {
                "connections": 2,
                "loader": loader,
                "options": options,
                "dress": dress,
                "full": loader not in fast,
                "after": ("clean",),
                "ways": WAITING if loader in WAITING_LOADERS or "pieces" in dress else (),
            }
            if loader != "tensors":
                yield Case(
                    f"{dress}-broken-{loader}",
                    "TruncatedError",
                    (whole[:-1], whole),
                    play="finish",
                    scenario="load_beside_broken",
                    **common,
                )
                # Not over TLS: an end that leaves a sound connection waits for the close of its
                # peer, which serves the other connection.
                plain = PLAIN if common["ways"] else (*PLAIN, "blocking")
                yield Case(
                    f"{dress}-turns-{loader}",
                    "",
                    (whole,),
                    scenario="load_in_turns",
                    **common | {"ways": plain},
                )


def produced() -> Iterator[Case]:
    """Bytes that are made for a consumer that never waits."""
    for name in ("large", "no_checksum", "small_chunks", "many_tensors", "made", "made_async"):
        yield Case(
            f"produce-{name}",
            "",
            scenario="produce",
            play="deaf",
            options={"object": name},
            loader="skip",
            after=("stopped",),
            ways=WAITING,
        )


def one_row() -> list[Any]:
    row = [0, "float32", 0, [1], [1], 0, ["w"]]
    return fields(storages=[[4, 4, 0]], tensors=[row], metadata=[])


def in_common(kind: Kind, loader: str) -> Options:
    """The common attributes of all cases of a kind with a loader."""
    waits = loader in WAITING_LOADERS
    return {
        "loader": loader,
        "options": kind.options(loader),
        "dress": kind.dress,
        "memory": kind.memory,
        # Blocking streams have no loaders that wait.
        "ways": (("asyncio-tls", "trio-tls") if kind.ways == ("tls",) else WAITING)
        if waits
        else kind.ways,
    }


def by_turns(loaders: list[str], number: int) -> str:
    """The loader of a kind in the fast tier: each loader for some kind."""
    return loaders[number % len(loaders)]


def met(kind: Kind) -> list[str]:
    """The loaders that a kind meets."""
    return [loader for loader in LOADERS if loader not in kind.without]


FAMILIES = (costs, cancelled, claims, equals, produced)
