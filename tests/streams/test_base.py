"""Parts that all streams share: merging of buffers, the cursor, and translation of errors."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import TransferTimeout, TruncatedError
from aiotorchio.streams.base import Cursor, Sink, coalesce, connection_errors

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
