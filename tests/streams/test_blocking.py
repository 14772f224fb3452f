"""Blocking files and sockets: short reads and writes, missing methods, and errors of files."""

from __future__ import annotations

import errno
import io
import os
import socket
import threading
from typing import Any

import pytest

import aiotorchio
from aiotorchio.errors import StreamPoisoned, TruncatedError
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
