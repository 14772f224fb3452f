"""Tables about a user's objects find them by identity, never by equality.

The objects raise when they are compared or hashed, or are equal to everything.
"""

from __future__ import annotations

import gc
import io
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio import StreamBusy, StreamPoisoned, TruncatedError, compat
from aiotorchio.codecs.pickled import safe_builtins
from aiotorchio.streams import guard, iterables
from aiotorchio.streams.identity import IdentityTable
from tests.support.tensor_layouts import encoded

pytestmark = pytest.mark.anyio


class Odd:
    """An object that must not be compared or hashed."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __hash__(self) -> int:
        raise AssertionError("hashed")

    def __bool__(self) -> bool:
        raise AssertionError("asked whether it is true")


class Equal:
    """An object that is equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 7


class Slotted:
    """An object that cannot be weakly referenced."""

    __slots__ = ()


kinds = pytest.mark.parametrize("kind", [Odd, Equal])


@kinds
def test_each_object_has_a_value_of_its_own(kind: Any) -> None:
    table: IdentityTable[int] = IdentityTable()
    keys = [kind() for _ in range(3)]
    assert [table.setdefault(key, n) for n, key in enumerate(keys)] == [0, 1, 2]
    assert [table.setdefault(key, 9) for key in keys] == [0, 1, 2]
    table[keys[0]] = 5
    assert table.pop(keys[0], 9) == 5
    assert table.pop(keys[0], 9) == 9
    assert table.pop(kind(), 9) == 9
    assert len(table) == 2


@kinds
def test_no_entry_survives_its_object(kind: Any) -> None:
    table: IdentityTable[int] = IdentityTable()
    for n in range(1000):  # ids are reused
        key = kind()
        assert table.setdefault(key, n) == n
        table[key] = -n
        del key
        assert not len(table)
    ring: list[Any] = [kind()]
    ring.append(ring)
    table[ring[0]] = 1
    del ring
    gc.collect()
    assert not len(table)


def test_a_value_set_again_is_forgotten_with_its_object() -> None:
    table: IdentityTable[str] = IdentityTable()
    key = Odd()
    for _ in range(3):
        table[key] = "one"
        table.pop(key, "")
        table.setdefault(key, "two")
    assert len(table) == 1
    del key
    assert not len(table)


def test_what_cannot_be_weakly_referenced() -> None:
    table: IdentityTable[int] = IdentityTable()
    with pytest.raises(TypeError):
        table[Slotted()] = 1
    with pytest.raises(TypeError):
        table.setdefault(Slotted(), 1)
    assert table.pop(Slotted(), 3) == 3
    assert not len(table)


def test_threads_agree_on_the_value_of_an_object() -> None:
    table: IdentityTable[object] = IdentityTable()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            key, start = Odd(), threading.Barrier(4)
            found: list[object] = []

            def look(
                key: Odd = key, found: list[object] = found, start: threading.Barrier = start
            ) -> None:
                start.wait()
                found.append(table.setdefault(key, object()))

            threads = [threading.Thread(target=look) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(map(id, found))) == 1
    finally:
        sys.setswitchinterval(before)
    look.__defaults__ = ()
    del key, threads, thread
    gc.collect()
    assert not len(table)


# ------------------------------------------------------------------------------ streams


class Body:
    """An async iterable of bytes that is its own iterator."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop(0)


class EqualBody(Equal, Body):
    __hash__ = Equal.__hash__


class OddBody(Odd, Body):
    __hash__ = Odd.__hash__


@dataclass
class UnhashableBody:
    url: str = ""
    pieces: list[bytes] = field(default_factory=list)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self.pieces:
            raise StopAsyncIteration
        return self.pieces.pop(0)


def unhashable(*pieces: bytes) -> UnhashableBody:
    return UnhashableBody(pieces=list(pieces))


bodies = pytest.mark.parametrize("make", [EqualBody, OddBody, unhashable, Body])


@bodies
async def test_what_is_left_over_is_for_the_same_iterator(make: Any) -> None:
    left = len(iterables._left_over)
    one, other = make(encoded("one") + encoded("two")), make(encoded("other"))
    assert await aiotorchio.load_from_stream(one) == "one"
    assert await aiotorchio.load_from_stream(other) == "other"
    assert await aiotorchio.load_from_stream(one) == "two"
    assert len(iterables._left_over) == left


@bodies
async def test_poison_is_for_the_same_stream(make: Any) -> None:
    broken, sound = make(encoded("broken")[:-9]), make(encoded("sound"))
    with pytest.raises(TruncatedError):
        await aiotorchio.load_from_stream(broken)
    assert await aiotorchio.load_from_stream(sound) == "sound"
    with pytest.raises(StreamPoisoned):
        await aiotorchio.load_from_stream(broken)


@bodies
async def test_only_the_same_stream_is_busy(make: Any) -> None:
    one = make(encoded({"w": torch.ones(2)}))
    async with aiotorchio.StreamReader(one).open() as message:
        assert await aiotorchio.load_from_stream(make(encoded("other"))) == "other"
        with pytest.raises(StreamBusy):
            await aiotorchio.load_from_stream(one)
        assert (await message.load())["w"].tolist() == [1, 1]


class File(io.RawIOBase):
    """A file in memory that gives the bytes that were written to it."""

    def __init__(self) -> None:
        self.data = bytearray()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self.data))
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return count

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


class EqualFile(Equal, File):
    __hash__ = Equal.__hash__


class OddFile(Odd, File):
    __hash__ = Odd.__hash__


@pytest.mark.parametrize("make", [EqualFile, OddFile])
def test_blocking_files(make: Any) -> None:
    broken, sound = make(), make()
    broken.data += encoded("broken")[:-9]
    with pytest.raises(TruncatedError):
        aiotorchio.load(broken)
    aiotorchio.save("sound", sound)
    assert aiotorchio.load(sound) == "sound"
    with pytest.raises(StreamPoisoned):
        aiotorchio.load(broken)


def test_states_of_streams_are_forgotten() -> None:
    gc.collect()
    before = len(guard._states)
    file = OddFile()
    aiotorchio.save("it", file)
    assert len(guard._states) == before + 1
    del file
    gc.collect()
    assert len(guard._states) <= before


# ------------------------------------------------------------------------------ no streams


class NoWrite(Odd):
    write = read = readinto = None


class OddWrite(Odd):
    write = read = readinto = 5


NO_FILES = [
    pytest.param(lambda: torch.ones(2, 3), id="tensor"),
    pytest.param(lambda: torch.nn.Linear(1, 1), id="module"),
    pytest.param(Odd, id="odd"),
    pytest.param(NoWrite, id="no-write"),
    pytest.param(OddWrite, id="odd-write"),
    pytest.param(Slotted, id="slotted"),
    pytest.param(lambda: [1, 2], id="list"),
]


@pytest.mark.parametrize("make", NO_FILES)
async def test_what_is_no_stream(make: Any) -> None:
    for _ in range(2):
        stream, other = make(), make()
        for each in (stream, other, stream):
            with pytest.raises(TypeError, match="cannot save to"):
                aiotorchio.save({}, each)
            with pytest.raises(TypeError, match="cannot load from"):
                aiotorchio.load(each)
            with pytest.raises(TypeError, match="cannot save to"):
                await aiotorchio.save_to_stream({}, each)
            with pytest.raises(TypeError, match="cannot load from"):
                await aiotorchio.load_from_stream(each)
            # The same errors as from torch.save and torch.distributed's streaming functions.
            with pytest.raises((TypeError, AttributeError)):
                compat.streaming_save({}, each)
            with pytest.raises((TypeError, AttributeError)):
                compat.streaming_load(each)


async def test_an_option_that_is_no_text() -> None:
    reader = aiotorchio.StreamReader(Body(encoded("it")))
    unread: Any = torch.ones(2)
    with pytest.raises(ValueError, match="unread must be 'skip' or 'abort'"):
        async with reader.open(unread=unread):
            raise AssertionError


@pytest.mark.parametrize("items", [torch.ones(2), torch.ones(0), (1,), Odd()])
def test_a_set_from_what_a_sender_made(items: Any) -> None:
    with pytest.raises(aiotorchio.UnsafeObjectError, match="a set from"):
        safe_builtins.make_set(items)
    assert safe_builtins.make_set(()) == safe_builtins.make_set([]) == set()


@pytest.mark.parametrize("codec", [torch.ones(2), b"latin1", Odd()])
def test_bytes_from_what_a_sender_made(codec: Any) -> None:
    with pytest.raises(aiotorchio.UnsafeObjectError, match="latin-1"):
        safe_builtins.encode("text", codec)
