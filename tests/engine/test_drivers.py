"""The drivers answer each request as ``requests`` says."""

from __future__ import annotations

import io
from collections.abc import Generator
from typing import Any

import pytest

from aiotorchio.engine.drivers import drive_blocking, drive_to_pieces
from aiotorchio.engine.requests import END, Checkpoint, Fill, Next, Request, Send, in_turns, work
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.wire.parser import MessageEnded, ReadBytes, Work

pytestmark = pytest.mark.anyio


def saving(answers: list[Any]) -> Generator[Request, Any, str]:
    """Yields each request of a save, and notes the answers."""
    answers.append((yield Send([b"ab", memoryview(bytearray(b"c"))])))
    answers.append((yield Send([b"d"], background=lambda: 1)))
    answers.append((yield Work(lambda: 2)))
    answers.append((yield Work(lambda: 3, to_its_end=True)))
    items = iter([4])
    answers.append((yield Next(items)))
    answers.append((yield Next(items)))
    answers.append((yield Checkpoint()))
    answers.append((yield MessageEnded()))
    return "result"


ANSWERS = [None, 1, 2, 3, 4, END, None, None]


def test_answers_on_a_blocking_stream() -> None:
    file, answers = io.BytesIO(), list[Any]()
    stream = BlockingStream(file)
    assert drive_blocking(saving(answers), stream) == "result"
    assert file.getvalue() == b"abcd" and answers == ANSWERS
    assert not stream.in_message


async def test_answers_of_the_driver_to_pieces() -> None:
    answers = list[Any]()
    pieces = [bytes(piece) async for piece in drive_to_pieces(saving(answers))]
    assert b"".join(pieces) == b"abcd" and answers == ANSWERS


def test_fewer_bytes_only_at_the_end_of_the_stream() -> None:
    def loading() -> Generator[Request, Any, Any]:
        first = yield ReadBytes(2)
        memory = memoryview(bytearray(4))
        return first, (yield Fill([memory[:1], memory[1:]])), bytes(memory), (yield ReadBytes(1))

    answers = drive_blocking(loading(), BlockingStream(io.BytesIO(b"abcde")))
    assert answers == (b"ab", 3, b"cde\0", b"")


class Failing:
    """A message whose task fails, and which may yield requests before it raises."""

    def __init__(self) -> None:
        self.thrown: list[Exception] = []
        self.closed = False

    def __call__(self) -> Generator[Request, Any, None]:
        try:
            try:
                yield Work(self.fail)
            except ZeroDivisionError as error:
                self.thrown.append(error)
                yield Send([b"why"])
                raise
        finally:
            self.closed = True

    @staticmethod
    def fail() -> None:
        raise ZeroDivisionError


async def test_an_error_is_thrown_into_the_message_which_may_go_on() -> None:
    message, file = Failing(), io.BytesIO()
    with pytest.raises(ZeroDivisionError):
        drive_blocking(message(), BlockingStream(file))
    assert file.getvalue() == b"why" and len(message.thrown) == 1 and message.closed
    message, pieces = Failing(), []
    with pytest.raises(ZeroDivisionError):
        async for piece in drive_to_pieces(message()):
            pieces.append(piece)  # noqa: PERF401 - a comprehension would lose the pieces before the error
    assert pieces == [b"why"] and len(message.thrown) == 1 and message.closed


async def test_pieces_that_are_left_close_the_message() -> None:
    closed: list[Exception | None] = []

    def message() -> Generator[Request, Any, None]:
        try:
            yield Send([b"a"])
            yield Send([b"b"])
        except Exception as error:
            closed.append(error)
        finally:
            closed.append(None)

    pieces = drive_to_pieces(message())
    assert await anext(pieces) == b"a"
    await pieces.aclose()
    assert closed == [None]


def test_work_is_a_request_only_where_it_takes_long() -> None:
    with pytest.raises(StopIteration) as stop:
        next(work(lambda: 5, inline=True))
    assert stop.value.value == 5
    assert isinstance(next(work(lambda: 5, inline=False)), Work)


def test_checkpoints_between_many_items() -> None:
    message, requests = in_turns(str, range(40)), 0
    with pytest.raises(StopIteration) as stop:
        while True:
            assert isinstance(next(message), Checkpoint)
            requests += 1
    assert requests == 2 and stop.value.value == [str(n) for n in range(40)]
