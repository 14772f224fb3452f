"""Ctrl-C, or no memory, in any line of the library: the process goes on as if it had not been."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio import AiotorchioError, StreamPoisoned
from tests.worlds import connected, descriptors

PACKAGE = str(Path(aiotorchio.__file__).parent) + os.sep
COLLECTION = PACKAGE + "collection.py"
STATE = {"w": torch.arange(3000.0), "b": torch.ones(3), "meta": {"step": 7, "lr": [1e-3, (1, 2)]}}
PICKLED = {"set": frozenset({1}), "w": torch.arange(3000.0), "sparse": torch.eye(3).to_sparse()}
# Every so many lines.
STEP = 7


@contextmanager
def interrupted(after: int, error: type[BaseException]) -> Iterator[list[str]]:
    """Raise an error when so many lines of the library have been executed in this thread."""
    left, where = after, []

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                where.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise error
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        # What holds the collector up is not proof against this: see docs/security.md.
        return on_line if name.startswith(PACKAGE) and name != COLLECTION else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield where
    finally:
        sys.settrace(before)


def as_before() -> tuple[Any, ...]:
    """What a call must leave as it was."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        threading.active_count(),
        descriptors(),
    )


def every_line(attempt: Callable[[], str], error: type[BaseException]) -> set[str]:
    """Interrupt an attempt at every so many lines until it is through; what came of it."""
    outcomes, expected = set(), as_before()
    for after in range(1, 10**6, STEP):
        with interrupted(after, error) as where:
            outcome = attempt()
        assert as_before() == expected, where
        outcomes.add(outcome)
        if not where:
            return outcomes
    raise AssertionError("it never ends")


ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
OBJECTS = pytest.mark.parametrize("obj", [STATE, PICKLED], ids=["tree", "pickle"])


@ERRORS
@OBJECTS
def test_saves_and_loads(error: type[BaseException], obj: Any) -> None:
    def attempt() -> str:
        near, far = connected("unix")
        with near, far:
            done = "nothing"
            try:
                aiotorchio.save(obj, near)
                done = "saved"
                loaded = aiotorchio.load(far)
                done = "loaded"
                assert loaded.keys() == obj.keys()
            except (error, AiotorchioError):
                pass
            sys.settrace(None)
            # The streams know how they stand: none is busy for ever, and none is taken for whole.
            near.settimeout(5)
            far.settimeout(5)
            try:
                aiotorchio.save("next", near)
                if done != "nothing":
                    # Or the first one, of which nothing was taken.
                    following = aiotorchio.load(far)
                    assert following == "next" or following.keys() == obj.keys()
            except (StreamPoisoned, aiotorchio.TruncatedError):
                return f"{done}, then poisoned"
            return f"{done}, then clean"

    outcomes = every_line(attempt, error)
    assert outcomes >= {"nothing, then clean", "nothing, then poisoned", "loaded, then clean"}


@ERRORS
def test_staged_loads_are_all_or_nothing(error: type[BaseException]) -> None:
    old = {"w": torch.zeros(3000), "b": torch.zeros(3)}
    new = {name: torch.full_like(tensor, 5) for name, tensor in old.items()}

    def attempt() -> str:
        near, far = connected("unix")
        with near, far:
            destination = {name: tensor.clone() for name, tensor in old.items()}
            tracer = sys.gettrace()
            sys.settrace(None)
            aiotorchio.save(new, near)
            sys.settrace(tracer)
            with suppress(error, AiotorchioError):
                aiotorchio.load(far, into=destination, staged=True)
            sys.settrace(None)
            for name, state in (("new", new), ("old", old)):
                if all(torch.equal(destination[key], state[key]) for key in state):
                    return name
            return "torn"

    assert every_line(attempt, error) == {"old", "new"}


def test_a_socket_is_as_it_was() -> None:
    """Timeouts of the owner's are back, whatever happened."""

    def attempt() -> str:
        near, far = socket.socketpair()
        with near, far:
            near.settimeout(5)
            with suppress(KeyboardInterrupt):
                aiotorchio.save(STATE, near)
            sys.settrace(None)
            assert near.gettimeout() == 5
            return ""

    every_line(attempt, KeyboardInterrupt)
