"""The estimate of memory and depth of MessagePack, compared with the decoded value."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.codecs.tree.size_estimate import estimate_size
from aiotorchio.errors import ProtocolError
from tests.support.speed import patience

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=40),
    max_leaves=50,
)  # fmt: skip


def depth_of(value: Any) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0) if value else 0
    return 0


@given(VALUES)
def test_the_depth_of_anything(value: Any) -> None:
    assert estimate_size(msgpack.packb(value))[1] == depth_of(value)


@given(VALUES)
def test_the_memory_of_anything(value: Any) -> None:
    data = msgpack.packb(value)
    tracemalloc.start()
    decoded = msgspec.msgpack.decode(data)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A text may take more memory than its UTF-8 bytes.
    assert taken <= estimate_size(data)[0] + 3 * len(data) + 512
    del decoded


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    try:
        memory, depth = estimate_size(data)
    except ProtocolError:
        return
    assert memory >= 0 and depth <= len(data)


@pytest.mark.parametrize("head", [b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\x91"])
def test_every_head_counts(head: bytes) -> None:
    assert estimate_size(head * 1000 + b"\xc0")[1] == 1000


# Above every limit, but not deep enough to harm a recursive decoder.
DEEP = 300
NESTED = """
import sys, threading, aiotorchio
from tests.support import craft
from tests.support.frames import Message
sys.setrecursionlimit(int(sys.argv[1]))
threading.stack_size(int(sys.argv[2]))
depth = int(sys.argv[3])
deep = b"\\x92\\x00" * depth + b"\\xc0"
header = b"\\x99" + b"\\x91" * depth

def attempt(data):
    try:
        craft.load(data)
    except aiotorchio.AiotorchioError as error:
        print(type(error).__name__, error.message, sep=": ")

for data in (craft.message(deep, "tree"), bytes(Message(header=header))):
    thread = threading.Thread(target=attempt, args=(data,))
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize(
    ("recursion", "stack"), [(1000, 0), (10**6, 0), (1000, 256 * 1024), (10**6, 256 * 1024)]
)
def test_python_s_own_limit_is_not_what_refuses_deep_nesting(recursion: int, stack: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NESTED, str(recursion), str(stack), str(DEEP)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    tree, header = run.stdout.splitlines()
    assert re.match("LimitExceeded: .*nested deeper than 256 levels", tree), run.stderr
    assert header.startswith("ProtocolError: the header is malformed: Expected"), run.stderr


def nodes(*items: Any) -> bytes:
    data: bytes = msgpack.packb(list(items))
    return data


@pytest.mark.parametrize(
    "node",
    [
        *(nodes(0), nodes(0, 0), nodes(1), nodes(1, 0), nodes(2), nodes(2, 0, 0), nodes(4)),
        *(nodes(4, 0), nodes(3, []), nodes(3, [None]), nodes(3, [], 0, 0), nodes(3, [0], 0, 0)),
        *(nodes(3, [[2, 0, 0]]), nodes(6, 1.5, 2.5), nodes(7, b"\xff" * 8 + b"\x01"), nodes(8)),
        *(nodes(8, 2, 3), nodes(9, "int8")),
        *(nodes(10, "cpu"), nodes(2, *range(12)), nodes(2, *range(44)), nodes(3, [], *range(44))),
        *(nodes(4, *range(5)), nodes(4, *range(20)), nodes(4, *"abcdefgh")),
        *(nodes(4, *range(1000, 6000)), nodes(4, *(str(n) for n in range(30_000)))),
        *(nodes(2, *range(100_000)), nodes(3, [], *range(100_000))),
    ],
    ids=lambda node: node[:12].hex(),
)  # fmt: skip
def test_no_object_takes_more(node: bytes) -> None:
    """The peak includes the decoded list and the rebuilt object, which exist at the same time."""
    count = max(1, 40_000 // len(node))
    data = b"\xdd" + (count + 1).to_bytes(4, "big") + b"\x00" + node * count
    tracemalloc.start()
    obj = tree_codec.decode(data, [], depth_limit=256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(obj) == count
    assert peak <= estimate_size(data)[0] + 30_000
