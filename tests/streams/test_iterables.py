"""Sources over async iterables: any sizes of pieces, errors, left-over bytes, and closing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.errors import TransferTimeout, TruncatedError
from aiotorchio.streams.iterables import IterableSource, resumable
from tests.support.backends import run_blocking

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


async def test_pieces_that_are_no_bytes() -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        await IterableSource(Pieces("text")).read(1)


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
