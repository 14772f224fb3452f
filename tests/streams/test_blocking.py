"""Blocking files and sockets: short reads and writes, missing methods, and errors of files."""

from __future__ import annotations

import errno
import io
import os
import socket
import threading
from typing import Any

import numpy as np
import pytest
import torch

import aiotorchio
from aiotorchio.errors import ProtocolError, StreamPoisoned, TruncatedError
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.blocking_sockets import open_blocking_socket


class Short(io.RawIOBase):
    """A file that reads and writes at most three bytes at a time."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(3, len(buffer), len(self.data))
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return count

    def write(self, data: Any) -> int:
        self.data += data[:3]
        return min(len(data), 3)


class OnlyRead:
    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, 3))


class OnlyWrite:
    """A file whose ``write`` writes everything and returns None."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


class NotReady(io.RawIOBase):
    """A non-blocking file that is not ready."""

    def readinto(self, buffer: Any) -> None:
        return None

    def write(self, data: Any) -> None:
        return None


class NotReadyToRead:
    def read(self, size: int) -> None:
        return None


def test_short_reads_and_writes() -> None:
    file = Short()
    BlockingStream(file).send([b"abcd", b"", bytearray(b"efgh" * 2**18), memoryview(b"i")])
    assert file.data == b"abcd" + b"efgh" * 2**18 + b"i"
    stream = BlockingStream(Short(b"abcdefgh"))
    one, two = bytearray(4), bytearray(3)
    assert stream.fill([memoryview(one), memoryview(two)]) == 7
    assert one + two == b"abcdefg"
    assert stream.read(5) == b"h"
    assert stream.read(5) == b""


def test_files_with_a_single_method() -> None:
    assert BlockingStream(OnlyRead(b"abcdef")).read(9) == b"abcdef"
    file = OnlyWrite()
    aiotorchio.save("text", file)
    assert aiotorchio.load(OnlyRead(file.data)) == "text"


class Inherits(io.BufferedIOBase):
    """A file with the ``readinto1`` of its base class, which needs ``read1``."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def read(self, size: int | None = -1, /) -> bytes:
        return self.file.read(size)


class InParts(Inherits):
    """A file whose ``read1`` returns at most three bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise AssertionError("it would wait for all that is asked for")

    def read1(self, size: int = -1, /) -> bytes:
        return self.file.read(min(size, 3))


@pytest.mark.parametrize("kind", [Inherits, InParts])
def test_buffered_files(kind: type[Inherits]) -> None:
    file = io.BytesIO()
    aiotorchio.save([1, "two"], file)
    assert aiotorchio.load(kind(file.getvalue())) == [1, "two"]
    assert BlockingStream(kind(b"abcdef")).read(9) == b"abcdef"


def test_what_nobody_else_writes_is_read_without_a_copy() -> None:
    class Whole(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            raise AssertionError("a copy")

    assert BlockingStream(Whole(b"abcdef")).read(9) == b"abcdef"


STATE = {"w": torch.arange(1000.0)}


def message() -> bytes:
    file = io.BytesIO()
    aiotorchio.save(STATE, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "f4", ">i4"])
def test_a_read_of_arrays(dtype: str) -> None:
    class Arrays(OnlyRead):
        def read(self, size: int) -> Any:
            data = self.file.read(size)
            return np.frombuffer(data, dtype).reshape(2, -1) if len(data) % 8 == 0 else data

    assert torch.equal(aiotorchio.load(Arrays(message()))["w"], STATE["w"])


class Reads:
    """Files that return something else than they should, after ``good`` bytes."""

    def __init__(self, good: int, result: Any) -> None:
        self.file, self.good, self.result = io.BytesIO(message()), good, result

    def read(self, size: int) -> Any:
        data = self.file.read(min(size, self.good))
        self.good -= len(data)
        return data or self.result(size)


class ReadsInto(Reads):
    def readinto(self, buffer: Any) -> Any:
        count = self.file.readinto(buffer[: self.good])
        self.good -= count
        return count or self.result(len(buffer))


@pytest.mark.parametrize("good", [0, 1, 100])
@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda size: bytes(size + 1), r"gave \d+ bytes, but \d+ were requested"),
        (lambda size: "a" * size, "str"),
        (lambda size: 5, "int"),
        (lambda size: memoryview(bytes(8))[::2], "not contiguous"),
    ],
)
def test_reads_that_cannot_be(good: int, result: Any, text: str) -> None:
    with pytest.raises(ProtocolError, match=text) as caught:
        aiotorchio.load(Reads(good, result))
    assert caught.value.offset == good


@pytest.mark.parametrize("good", [0, 1, 100])
@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda size: size + 1, r"readinto\(\) returned \d+, but must"),
        (lambda size: -1, r"readinto\(\) returned -1"),
        (lambda size: "a", "of type str"),
        (lambda size: 1.0, "of type float"),
    ],
)
def test_counts_of_reads_that_cannot_be(good: int, result: Any, text: str) -> None:
    file = ReadsInto(good, result)
    with pytest.raises(ProtocolError, match=text) as caught:
        aiotorchio.load(file)
    assert caught.value.offset == good
    with pytest.raises(StreamPoisoned):
        aiotorchio.load(file)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda size: size + 1, r"write\(\) returned \d+, but must return a number from 1 to \d+"),
        (lambda size: -1, r"write\(\) returned -1"),
        (lambda size: 0, r"write\(\) returned 0"),
        (lambda size: "a", "of type str"),
        (lambda size: 1.0, "of type float"),
    ],
)
@pytest.mark.parametrize("good", [0, 100])
def test_counts_of_writes_that_cannot_be(good: int, result: Any, text: str) -> None:
    class Writes:
        left, calls_after = good, 0

        def write(self, data: Any) -> Any:
            count = min(self.left, len(data))
            self.left -= count
            self.calls_after += not count
            return count or result(len(data))

    file = Writes()
    with pytest.raises(ProtocolError, match=text) as caught:
        aiotorchio.save(STATE, file)
    assert caught.value.offset == good
    # Nothing follows in a frame that may be half written, not even an abort.
    assert file.calls_after == 1
    with pytest.raises(StreamPoisoned):
        aiotorchio.save(STATE, file)


def test_a_seekable_file_is_not_poisoned() -> None:
    class Seekable(ReadsInto):
        def seekable(self) -> bool:
            return True

    file = Seekable(100, lambda size: -1)
    for _ in range(2):
        file.good = 100
        file.file.seek(0)
        with pytest.raises(ProtocolError, match="-1") as caught:
            aiotorchio.load(file)
        assert caught.value.offset == 100


class Miscounting(socket.socket):
    """A socket that moves bytes, but returns another number."""

    result: Any = -1

    def recv_into(self, *args: Any) -> Any:
        super().recv_into(*args)
        return self.result

    def sendmsg(self, *args: Any) -> Any:
        super().sendmsg(*args)
        return self.result


@pytest.mark.parametrize("timeout", [None, 10])
@pytest.mark.parametrize("result", [-1, 2**40, "a", None, 1.5])
def test_counts_of_sockets_that_cannot_be(timeout: float | None, result: Any) -> None:
    near, far = socket.socketpair()
    with near, Miscounting(fileno=far.detach()) as odd:
        odd.result = result
        odd.settimeout(timeout)
        near.send(b"abc")
        with pytest.raises(ProtocolError, match=r"recv_into\(\) returned"):
            aiotorchio.load(odd)
    near, far = socket.socketpair()
    with near, Miscounting(fileno=far.detach()) as odd:
        odd.result = result
        odd.settimeout(timeout)
        with pytest.raises(ProtocolError, match=r"sendmsg\(\) returned"):
            aiotorchio.save(STATE, odd)


def test_files_that_do_not_block() -> None:
    for file in (NotReady(), NotReadyToRead()):
        with pytest.raises(BlockingIOError, match="must be blocking"):
            BlockingStream(file).read(1)
    stream = BlockingStream(NotReady())
    for _ in range(2):
        with pytest.raises(BlockingIOError, match="must be blocking"):
            stream.send([b"x"])


def test_errors_of_files_are_theirs() -> None:
    class Full(OnlyWrite):
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        aiotorchio.save("text", Full())
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(ValueError, match="closed file"):
        aiotorchio.load(closed)


def test_pipes_are_poisoned_files_are_not() -> None:
    reading, writing = os.pipe()
    with open(writing, "wb", 0) as sink, open(reading, "rb", 0) as source:
        sink.write(b"no message, whatever it is; but longer than one's first bytes")
        with pytest.raises(aiotorchio.ProtocolError):
            aiotorchio.load(source)
        with pytest.raises(StreamPoisoned, match="ProtocolError"):
            aiotorchio.load(source)
        source.close()
        with pytest.raises(TruncatedError, match="BrokenPipeError"):
            aiotorchio.save("text", sink)


def test_sockets() -> None:
    near, far = socket.socketpair()
    with near, far:
        stream = open_blocking_socket(near)
        data = bytes(2**22)
        thread = threading.Thread(target=stream.send, args=([data],))
        thread.start()
        assert open_blocking_socket(far).read(len(data)) == data
        thread.join()
        stream.abort()
        assert open_blocking_socket(far).read(1) == b""
        near.close()
        stream.abort()
        with pytest.raises(TruncatedError, match="Bad file descriptor"):
            stream.send([b"x"])
    BlockingStream(io.BytesIO()).abort()
