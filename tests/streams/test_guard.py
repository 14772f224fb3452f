"""One call at a time in each direction of a stream, and poisoned streams."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from threading import Thread
from typing import Any
from weakref import ref

import pytest

from aiotorchio.common.buffer import Buffer
from aiotorchio.errors import StreamBusy, StreamPoisoned
from aiotorchio.streams import guard
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.guard import exclusive


class Stream:
    pass


class FakeSink(Sink):
    def __init__(self, stream: Any) -> None:
        self.aborted = self.released = 0

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        raise AssertionError

    def abort(self) -> None:
        self.aborted += 1

    def release(self) -> None:
        self.released += 1


class FakeSource(Source):
    def __init__(self, stream: Any) -> None:
        self.released = self.aborted = 0

    async def read(self, size: int) -> bytes:
        raise AssertionError

    async def fill(self, buffers: Sequence[memoryview]) -> int:
        raise AssertionError

    def abort(self) -> None:
        self.aborted += 1

    def release(self) -> None:
        self.released += 1


def test_one_call_in_each_direction() -> None:
    stream = Stream()
    with exclusive(stream, "save", FakeSink) as sink, exclusive(stream, "load", FakeSource):
        with pytest.raises(StreamBusy, match="another save"):
            exclusive(stream, "save", FakeSink).__enter__()
        with pytest.raises(StreamBusy, match="another load"):
            exclusive(stream, "load", FakeSource).__enter__()
    assert isinstance(sink, FakeSink) and sink.released == 1
    with exclusive(stream, "save", FakeSink):
        pass


@pytest.mark.parametrize("error", [ValueError("why"), KeyboardInterrupt()])
def test_stopping_inside_a_message_poisons_that_direction(error: BaseException) -> None:
    stream = Stream()
    with pytest.raises(type(error)), exclusive(stream, "save", FakeSink) as sink:
        sink.in_message = True
        raise error
    assert isinstance(sink, FakeSink)
    assert (sink.aborted, sink.released) == (1, 1)
    for _ in range(2):
        with pytest.raises(StreamPoisoned, match=type(error).__name__):
            exclusive(stream, "save", FakeSink).__enter__()
    with pytest.raises(StreamPoisoned, match=rf"earlier save stopped .*\({type(error).__name__}"):
        exclusive(stream, "load", FakeSource).__enter__()


def test_a_load_that_stops_inside_a_message_aborts() -> None:
    stream = Stream()
    with pytest.raises(ValueError, match="why"), exclusive(stream, "load", FakeSource) as source:
        source.in_message = True
        raise ValueError("why")
    assert isinstance(source, FakeSource) and source.released == source.aborted == 1
    with pytest.raises(StreamPoisoned):
        exclusive(stream, "load", FakeSource).__enter__()


def test_a_stream_that_is_left_inside_a_message_is_poisoned_without_an_error_too() -> None:
    stream = Stream()
    with exclusive(stream, "load", FakeSource) as source:
        source.in_message = True
    assert isinstance(source, FakeSource) and source.released == 1
    for _ in range(2):
        with pytest.raises(StreamPoisoned, match="before the end of the message"):
            exclusive(stream, "load", FakeSource).__enter__()
    with pytest.raises(StreamPoisoned, match=r"earlier load stopped .*before the end"):
        exclusive(stream, "save", FakeSink).__enter__()


def test_stopping_between_messages_leaves_the_stream_usable() -> None:
    stream = Stream()
    with pytest.raises(ValueError, match="why"), exclusive(stream, "save", FakeSink) as sink:
        raise ValueError("why")
    assert isinstance(sink, FakeSink)
    assert (sink.aborted, sink.released) == (0, 1)
    with exclusive(stream, "save", FakeSink):
        pass


def test_a_driver_that_cannot_be_opened_leaves_the_stream_free() -> None:
    stream = Stream()

    def fails(stream: Any) -> Sink:
        raise TypeError("no stream")

    with pytest.raises(TypeError, match="no stream"):
        exclusive(stream, "save", fails).__enter__()
    with exclusive(stream, "save", FakeSink):
        pass


@pytest.mark.parametrize("stream", [[], 5, object()])
def test_streams_that_cannot_be_watched(stream: Any) -> None:
    with exclusive(stream, "save", FakeSink), exclusive(stream, "save", FakeSink):
        pass


def test_a_stream_is_forgotten_with_its_last_reference() -> None:
    gc.collect()
    stream = Stream()
    before = len(guard._states)
    with exclusive(stream, "save", FakeSink):
        assert len(guard._states) == before + 1
    reference = ref(stream)
    del stream
    gc.collect()
    assert reference() is None and len(guard._states) == before


def test_threads_see_each_other() -> None:
    stream = Stream()
    errors = []

    def other() -> None:
        try:
            exclusive(stream, "save", FakeSink).__enter__()
        except StreamBusy as error:
            errors.append(error)

    with exclusive(stream, "save", FakeSink):
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1
