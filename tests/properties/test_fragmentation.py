"""The sizes of the pieces in which a message arrives change neither the object nor the error.

Valid and damaged messages are cut at random and loaded from each kind of stream.
"""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import anyio
import pytest
from anyio.abc import ByteReceiveStream
from hypothesis import given, settings
from hypothesis import strategies as st

import aiotorchio
from aiotorchio.errors import AiotorchioError
from tests.api.test_streams import encoded
from tests.properties.objects import graphs
from tests.support.corpus import assert_same

pytest.importorskip("resource", reason="fuzz asks for peaks of memory as Unix has them")
from fuzz import mutate
from fuzz.objects import LIMITS
from tests.support.tiers import examples

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

frequent = settings(
    max_examples=examples(60),
)
SAMPLES = [*mutate.larger().values(), *mutate.small().values()]
BEHIND = b"not of this message"


@dataclass(frozen=True)
class Refused:
    """The parts of an error that must be the same for every stream."""

    kind: type[AiotorchioError]
    entry: str | None
    offset: int | None


class Pieces:
    """An async iterable that is its own iterator."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise StopAsyncIteration


class Scripted(ByteReceiveStream):
    """A byte stream of anyio that gives pieces in order; long ones take several calls."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while not self._left:
            await anyio.lowlevel.checkpoint()
            try:
                self._left = next(self._pieces)
            except StopIteration:
                raise anyio.EndOfStream from None
        piece, self._left = self._left[:max_bytes], self._left[max_bytes:]
        return piece

    async def aclose(self) -> None:
        raise AssertionError("the stream is its owner's")


def fed(pieces: Iterator[bytes]) -> asyncio.StreamReader:
    """A reader that gets one piece in every turn of the loop."""
    reader, loop = asyncio.StreamReader(), asyncio.get_running_loop()

    def feed() -> None:
        for piece in pieces:
            reader.feed_data(piece)
            loop.call_soon(feed)
            return
        reader.feed_eof()

    feed()
    return reader


Streams = Callable[[Iterator[bytes]], Any]
STREAMS: dict[str, Streams] = {"iterable": Pieces, "anyio": Scripted, "reader": fed}


def whole(data: bytes) -> Iterator[bytes]:
    return iter([data])


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[n : n + 1] for n in range(len(data)))


def at_random(random: Random) -> Callable[[bytes], Iterator[bytes]]:
    def cut(data: bytes) -> Iterator[bytes]:
        count = random.choice([0, 1, 3, 30])
        cuts = sorted(random.randrange(len(data) + 1) for _ in range(count))
        # Drop empty pieces: an iterable may give some, but a stream never does.
        ends = itertools.pairwise([0, *cuts, len(data)])
        return (data[start:end] for start, end in ends if start < end)

    return cut


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def loaded(stream: Any) -> Any:
    """The object in a list, or the parts of the error."""
    try:
        obj = await aiotorchio.load_from_stream(stream, limits=LIMITS)
    except AiotorchioError as error:
        return Refused(type(error), error.entry, error.offset)
    finally:
        assert len(asyncio.all_tasks()) == 1
    return [obj]


def blocking(data: bytes) -> Any:
    """The outcome of a load from a file: the object in a list, or the parts of the error."""
    try:
        return [aiotorchio.load(io.BytesIO(data), limits=LIMITS)]
    except AiotorchioError as error:
        return Refused(type(error), error.entry, error.offset)


def check(runner: asyncio.Runner, data: bytes, seed: int) -> None:
    """Load the bytes from every kind of stream, in several cuts; all outcomes must be equal."""
    expected = blocking(data)
    cuts = [whole, at_random(Random(seed)), at_random(Random(seed + 1))]
    # One byte at a time only for short messages, because each byte takes a turn of the loop.
    cuts += [bytewise] if len(data) < 800 else []

    async def others() -> list[Any]:
        return [await loaded(make(cut(data))) for cut in cuts for make in STREAMS.values()]

    for outcome in runner.run(others()):
        assert type(outcome) is type(expected), (outcome, expected)
        if isinstance(expected, Refused):
            assert outcome == expected
        else:
            assert_same(outcome, expected)


@frequent
@given(obj=graphs(), seed=st.integers(0, 2**32), behind=st.sampled_from([b"", BEHIND]))
def test_objects(runner: asyncio.Runner, obj: Any, seed: int, behind: bytes) -> None:
    check(runner, encoded(obj, checksum=bool(seed % 2)) + behind, seed)


@frequent
@given(seed=st.integers(0, 2**32))
def test_damaged_messages(runner: asyncio.Runner, seed: int) -> None:
    random = Random(seed)
    data = mutate.damaged(random, random.choice(SAMPLES[:3]), random.choice(SAMPLES))
    check(runner, data, seed)


@frequent
@given(seed=st.integers(0, 2**32))
def test_messages_of_hostile_senders(runner: asyncio.Runner, seed: int) -> None:
    random = Random(seed)
    check(runner, mutate.repaired(random, random.choice(SAMPLES)), seed)


@frequent
@given(obj=graphs(), cut=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**32))
def test_messages_that_end_early(runner: asyncio.Runner, obj: Any, cut: float, seed: int) -> None:
    data = encoded(obj)
    check(runner, data[: int(cut * len(data))], seed)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_one_message_after_the_other(runner: asyncio.Runner, stream: str, size: int) -> None:
    samples = list(mutate.small().values())
    data = b"".join(sample.data for sample in samples)
    pieces = (data[start : start + size] for start in range(0, len(data), size))

    async def main() -> None:
        reader = aiotorchio.StreamReader(STREAMS[stream](pieces))
        for sample in samples:
            assert_same(await reader.load(), sample.obj)

    runner.run(main())
