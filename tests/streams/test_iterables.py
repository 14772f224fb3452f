"""Sources over async iterables: any sizes of pieces, errors, left-over bytes, and closing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotorchio
from aiotorchio.errors import ProtocolError, StreamPoisoned, TransferTimeout, TruncatedError
from aiotorchio.streams.iterables import IterableSource, resumable
from tests.api.test_streams import SMALL, encoded
from tests.support.backends import run_blocking
from tests.support.corpus import assert_same

pytestmark = pytest.mark.anyio


class Pieces:
    """An async iterator over pieces; raises a piece that is an exception."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = list(pieces)

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Any:
        if not self.pieces:
            raise StopAsyncIteration
        if isinstance(self.pieces[0], Exception):
            raise self.pieces[0]
        return self.pieces.pop(0)


@given(st.lists(st.binary(max_size=9)), st.lists(st.integers(0, 9)))
def test_reads_take_what_they_ask_for(pieces: list[bytes], sizes: list[int]) -> None:
    async def main() -> None:
        source = IterableSource(Pieces(*pieces))
        data = b"".join(pieces)
        for size in sizes:
            expected, data = data[:size], data[size:]
            assert await source.read(size) == expected

    run_blocking(main())


async def test_fill_crosses_pieces_and_buffers() -> None:
    source = IterableSource(Pieces(b"ab", bytearray(b"cdefg"), b"", memoryview(b"hij")))
    one, two = bytearray(3), bytearray(5)
    assert await source.fill([memoryview(one), memoryview(two)]) == 8
    assert one + two == b"abcdefgh"
    assert source.in_message
    assert await source.fill([memoryview(one)]) == 2
    assert one == b"ijc"


async def test_pieces_of_other_items() -> None:
    source = IterableSource(Pieces(memoryview(bytes(8)).cast("I"), memoryview(bytes(2))))
    assert await source.read(10) == bytes(10)


async def test_empty_pieces_of_any_shape_are_skipped() -> None:
    empty = [np.zeros(shape) for shape in [(0,), (0, 4), (4, 0)]]
    source = IterableSource(Pieces(*empty, b"ab", *empty, np.zeros((1, 2), "u1"), *empty))
    assert await source.read(9) == b"ab\0\0"


class SocketMessage:
    """An item of aiohttp's WebSockets: bytes are in an attribute."""

    data = b"abc"


DATA = encoded(SMALL)


@pytest.mark.parametrize("piece", ["text", SocketMessage(), memoryview(DATA)[::2]])
@pytest.mark.parametrize("at", [0, 1, 100, len(DATA) - 1])
async def test_pieces_that_are_no_bytes(piece: object, at: int) -> None:
    stream = Pieces(DATA[:at], piece, DATA[at:])
    with pytest.raises(ProtocolError, match=type(piece).__name__) as caught:
        await aiotorchio.load_from_stream(stream)
    assert caught.value.offset == at
    with pytest.raises(StreamPoisoned):
        await aiotorchio.load_from_stream(stream)


async def test_the_offset_counts_from_the_beginning_of_the_message() -> None:
    stream = Pieces(DATA + DATA[:50], "text")
    assert_same(await aiotorchio.load_from_stream(stream), SMALL)
    with pytest.raises(ProtocolError) as caught:
        await aiotorchio.load_from_stream(stream)
    assert caught.value.offset == 50


async def test_text_after_a_message_is_not_of_it() -> None:
    stream = Pieces(DATA, "text")
    assert_same(await aiotorchio.load_from_stream(stream), SMALL)
    assert stream.pieces == ["text"]


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (ConnectionResetError("x"), TruncatedError),
        (TimeoutError("x"), TransferTimeout),
        (ZeroDivisionError("x"), ZeroDivisionError),
    ],
)
async def test_errors_of_the_iterator(error: Exception, translated: type[Exception]) -> None:
    source = IterableSource(Pieces(b"a", error))
    with pytest.raises(translated):
        await source.read(2)
    assert source.in_message


async def test_what_is_left_waits_for_the_next_source_of_the_same_iterator() -> None:
    async with aclosing(generator()) as iterator:
        first = IterableSource(iterator)
        assert await first.read(2) == b"ab"
        first.release()
        await first.aclose()
        second = IterableSource(iterator)
        assert await second.read(2) == b"cd"
        second.release()
        assert await IterableSource(iterator).read(9) == b"ef"


async def generator() -> AsyncGenerator[bytes, None]:
    yield b"abc"
    yield b"def"


async def test_there_is_no_connection_to_abort() -> None:
    source = IterableSource(Pieces(b"abc"))
    assert await source.read(1) == b"a"
    source.abort()
    assert await source.read(2) == b"bc"


async def test_an_iterator_of_our_own_is_closed() -> None:
    closed = []

    class Stored:
        async def __aiter__(self) -> AsyncGenerator[bytes, None]:
            try:
                yield b"abc"
                yield b"never"
            finally:
                closed.append(True)

    source = IterableSource(Stored())
    assert await source.read(2) == b"ab"
    await source.aclose()
    source.release()
    assert closed


async def test_an_iterator_of_our_own_that_cannot_be_closed() -> None:
    class Plain:
        def __aiter__(self) -> Any:
            return resumable(NoKey())

    source = IterableSource(Plain())
    assert await source.read(3) == b"xxx"
    await source.aclose()


class NoKey:
    __slots__ = ()

    def __aiter__(self) -> NoKey:
        return self

    async def __anext__(self) -> bytes:
        return b"x"


async def test_iterators_that_can_be_no_key_get_one() -> None:
    stream = resumable(NoKey())
    assert aiter(stream) is stream
    assert resumable(stream) is stream
    assert await IterableSource(stream).read(3) == b"xxx"
    async with aclosing(generator()) as iterator:
        assert resumable(iterator) is iterator
