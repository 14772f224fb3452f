"""Parts that all streams share: merging of buffers, the cursor, and translation of errors."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import ProtocolError, TransferTimeout, TruncatedError
from aiotorchio.streams.base import Cursor, Endpoint, Sink, coalesce, connection_errors

buffers = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.binary(max_size=40).map(bytearray),
        st.binary().map(lambda data: memoryview(data)),
    )
)


@given(buffers, st.integers(1, 50))
def test_coalesce_keeps_every_byte_in_order(buffers: list[Buffer], size: int) -> None:
    pieces = list(coalesce(buffers, size))
    assert b"".join(pieces) == b"".join(buffers)
    assert all(0 < len(piece) <= size for piece in pieces)


@given(buffers, st.integers(1, 50))
def test_coalesce_makes_few_pieces(buffers: list[Buffer], size: int) -> None:
    pieces = list(coalesce(buffers, size))
    # Two neighbours fit into one piece only where a large buffer separates them.
    cuts = sum(-(-len(buffer) // size) + 1 for buffer in buffers if len(buffer) >= size)
    assert len(pieces) <= 2 * (sum(map(len, buffers)) // size) + cuts + 1


def test_coalesce_does_not_copy_what_is_large() -> None:
    large = bytearray(100)
    pieces = list(coalesce([b"head", large], 40))
    assert [len(piece) for piece in pieces] == [4, 40, 40, 20]
    large[:] = b"x" * 100
    assert b"".join(pieces) == b"head" + b"x" * 100


@given(st.lists(st.integers(0, 20)), st.data())
def test_a_cursor_writes_pieces_one_after_the_other_and_nothing_else(
    sizes: list[int], data: st.DataObject
) -> None:
    arrays = [bytearray(b"." * size) for size in sizes]
    cursor = Cursor([memoryview(array) for array in arrays])
    assert cursor.size == cursor.left == sum(sizes)
    written = b""
    while cursor.left and data.draw(st.booleans()):
        piece = data.draw(st.binary(max_size=cursor.left))
        cursor.write(piece)
        written += piece
        assert (cursor.done, bool(cursor)) == (len(written), cursor.left > 0)
    assert b"".join(arrays) == written + b"." * cursor.left


def test_a_piece_costs_as_much_as_the_buffers_that_it_fills() -> None:
    """The work does not grow with the number of buffers, which a peer chooses."""
    cursor = Cursor([memoryview(bytearray(4)) for _ in range(10_000)])
    looked_at: list[int] = []

    class Watched(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            looked_at.append(index)
            return super().__getitem__(index)

    cursor._buffers = Watched(cursor._buffers)
    for _ in range(10_000):
        cursor.write(b"abcd")
    assert len(looked_at) == 10_000


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (ConnectionResetError("reset"), TruncatedError),
        (BrokenPipeError(), TruncatedError),
        (ssl.SSLError("bad record"), TruncatedError),
        (anyio.BrokenResourceError(), TruncatedError),
        (anyio.ClosedResourceError(), TruncatedError),
        (TimeoutError("slow"), TransferTimeout),
    ],
)
def test_what_a_peer_does_is_translated(error: Exception, translated: type[Exception]) -> None:
    with pytest.raises(translated) as caught, connection_errors():
        raise error
    assert caught.value.__cause__ is error
    assert (str(error) or type(error).__name__) in str(caught.value)


def test_what_a_file_does_is_not_translated_but_what_a_socket_does() -> None:
    unreachable = OSError(errno.EHOSTUNREACH, "No route to host")
    with pytest.raises(OSError, match="No route") as caught, connection_errors():
        raise unreachable
    assert caught.value is unreachable
    with pytest.raises(TruncatedError, match="No route"), connection_errors(OSError):
        raise unreachable


FLAT = {
    "bytes": b"abcdefgh",
    "a subclass": type("Own", (bytes,), {})(b"abcdefgh"),
    "bytearray": bytearray(b"abcdefgh"),
    "items": memoryview(b"abcdefgh").cast("I"),
    "float32": np.frombuffer(b"abcdefgh", "f4"),
    "one number": np.frombuffer(b"abcdefgh", "f8").reshape(()),
    "two dimensions": np.frombuffer(b"abcdefgh", "u1").reshape(2, 4),
    "foreign byte order": np.frombuffer(b"abcdefgh", ">i4"),
    "structs": np.frombuffer(b"abcdefgh", [("a", "u2"), ("b", "u2")]),
    "texts": np.frombuffer(b"a\0\0\0b\0\0\0", "U2"),
    "one of many": np.frombuffer(b"abcdefgh", "u1").reshape(1, 8)[:, ::1],
}
EMPTY = [b"", bytearray(), *(np.zeros(shape) for shape in [(0,), (0, 4), (4, 0), (2, 0, 2)])]
STRIDED = [
    memoryview(b"abcdefgh")[::2],
    np.zeros((2, 4), order="F"),
    np.zeros((4, 4), "u1")[:, :2],
]
NO_BYTES = ["text", "", None, 5, ["a"], (b"a", b"b"), torch.ones(2), np.zeros(2, "M8[s]"), object()]


@pytest.mark.parametrize("kind", FLAT)
def test_contiguous_pieces_are_flat_bytes(kind: str) -> None:
    piece: Any = FLAT[kind]
    data = Endpoint().checked_piece(piece, 8)
    expected = piece.tobytes() if hasattr(piece, "tobytes") else bytes(piece)
    assert len(data) == len(expected) == 8
    assert bytes(data) == expected


def test_a_piece_costs_no_copy() -> None:
    array = np.zeros(1000, "f4").reshape(10, 100)
    data = Endpoint().checked_piece(array)
    array[:] = 1
    assert bytes(data) == array.tobytes()
    whole = bytes(1000)
    assert Endpoint().checked_piece(whole) is whole


@pytest.mark.parametrize("piece", EMPTY, ids=str)
def test_empty_pieces_of_any_shape(piece: Any) -> None:
    endpoint = Endpoint()
    assert endpoint.checked_piece(piece, 0) == b""
    assert not endpoint.in_message


@pytest.mark.parametrize("piece", [*NO_BYTES, *STRIDED], ids=lambda piece: type(piece).__name__)
def test_other_pieces_poison_the_stream(piece: Any) -> None:
    endpoint = Endpoint()
    with pytest.raises(ProtocolError, match=rf"\b{type(piece).__name__}\b") as caught:
        endpoint.checked_piece(piece, 100)
    assert caught.value.offset == 0
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert endpoint.in_message
    endpoint = Endpoint()
    endpoint.moved(7)
    endpoint.moved(5)
    with pytest.raises(ProtocolError) as caught:
        endpoint.checked_piece(piece, 100)
    assert caught.value.offset == 12


def test_a_piece_that_is_too_long() -> None:
    endpoint = Endpoint()
    assert endpoint.checked_piece(b"abc", 3) == b"abc"
    assert not endpoint.in_message
    for piece in (b"abcd", np.zeros(1, "f4")):
        with pytest.raises(ProtocolError, match="gave 4 bytes, but 3 were requested"):
            endpoint.checked_piece(piece, 3)
    assert endpoint.in_message


@pytest.mark.parametrize("count", [0, 5, True, np.int64(5)])
def test_counts(count: Any) -> None:
    endpoint = Endpoint()
    checked = endpoint.checked_count(count, 5, "f()")
    assert checked == count and type(checked) is int
    assert not endpoint.in_message


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (-1, "returned -1, but must return a number from 1 to 5"),
        (0, "returned 0,"),
        (6, "returned 6,"),
        (2**70, "returned 1180591620717411303424,"),
        (np.int8(-1), "returned -1,"),
        ("5", "an object of type str, but must return the number of bytes"),
        (b"5", "of type bytes"),
        (5.0, "of type float"),
        (None, "of type NoneType"),
    ],
)
def test_counts_that_cannot_be(count: Any, text: str) -> None:
    endpoint = Endpoint()
    endpoint.count = 9
    with pytest.raises(ProtocolError, match=rf"f\(\) returned {text[9:]}|f\(\) .*{text}") as caught:
        endpoint.checked_count(count, 5, "f()", least=1)
    assert caught.value.offset == 9
    assert endpoint.in_message


class OnceBroken(Sink):
    def __init__(self) -> None:
        self.calls = 0

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        self.calls += 1
        raise ZeroDivisionError

    def abort(self) -> None:
        raise AssertionError


@pytest.mark.anyio
async def test_a_sink_that_has_failed_goes_on_failing() -> None:
    sink = OnceBroken()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await sink.send([])
    assert sink.calls == 1
