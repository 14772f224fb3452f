"""Ctrl-C, or a MemoryError, in any line of the library: the process goes on as before.

Ctrl-C comes in the blocking calls: an event loop takes it between two of its callbacks, and cancels
a task; other tests cover that. MemoryError comes in calls on a loop.
"""

from __future__ import annotations

import ast
import functools
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
from anyio import create_task_group, fail_after, run

import aiotorchio
from aiotorchio import AiotorchioError, StreamPoisoned
from tests.support.backends import PATIENCE, both_ends, connected, descriptors
from tests.support.tiers import examples

PACKAGE = str(Path(aiotorchio.__file__).parent) + os.sep
# The pause of the garbage collector is not proof against this: see docs/security.md. Nor are the
# scopes and groups of anyio, if the error comes between the end of their block and their own code.
COLLECTION = os.path.join(PACKAGE, "common", "gc_pause.py")
SCOPES = {"_within_time_budget", "_with", "run_in_thread"}
STATE = {"w": torch.arange(3000.0), "b": torch.ones(3), "meta": {"step": 7, "lr": [1e-3, (1, 2)]}}
PICKLED = {"set": frozenset({1}), "w": torch.arange(3000.0), "sparse": torch.eye(3).to_sparse()}
# Interrupts come at every seventh line, in the fast tier at every 35th; each test begins with
# another line.
STEP = 700 // examples(100)


@functools.cache
def with_lines(path: str) -> tuple[frozenset[int], frozenset[int]]:
    """The lines of a source on which ``with`` begins, and those of a ``try`` right inside it."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    blocks = [each for each in ast.walk(tree) if isinstance(each, ast.With)]
    return (
        frozenset(each.lineno for each in blocks),
        frozenset(each.body[0].lineno for each in blocks if isinstance(each.body[0], ast.Try)),
    )


@contextmanager
def interrupted(after: int, error: type[BaseException]) -> Iterator[list[str]]:
    """Raise an error when so many lines of the library have been executed in this thread."""
    left, where = after, []

    def on_lines(
        lines: frozenset[int], tries: frozenset[int], resumed: int
    ) -> Callable[[FrameType, str, Any], Any]:
        """Trace one frame, except the seams of its ``with`` blocks.

        Python takes no interrupt between ``__enter__`` and the body (a ``try`` there is a line that
        does nothing), nor between the body and ``__exit__``. Only a tracer can come between. A
        generator that is resumed in a line has entered the blocks before it.
        """
        entered = {*tries, *(line for line in lines if line <= resumed)}

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            line = frame.f_lineno
            leaves = line in entered
            if line in lines:
                entered.add(line)
            if event == "line" and not leaves:
                left -= 1
                if left == 0:
                    where.append(f"{frame.f_code.co_filename}:{line}")
                    raise error
            return on_line

        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if not name.startswith(PACKAGE) or name == COLLECTION or function in SCOPES:
            return None
        return on_lines(*with_lines(name), frame.f_lineno)

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield where
    finally:
        sys.settrace(before)


def as_before() -> tuple[Any, ...]:
    """The state of the process that a call must restore."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_torch_function_enabled(),
        descriptors(),
    )


def every_line(attempt: Callable[[], str], error: type[BaseException], first: int) -> set[str]:
    """Interrupt an attempt at every so many lines until it is through; return the outcomes."""
    outcomes, expected = set(), as_before()
    # Threads of other tests may end at any time.
    threads = set(threading.enumerate())
    for after in range(first, 10**6, STEP):
        with interrupted(after, error) as where:
            outcome = attempt()
        assert as_before() == expected, where
        assert threads.issuperset(threading.enumerate()), where
        outcomes.add(outcome)
        if not where:
            return outcomes
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("error", "obj", "first"),
    [
        pytest.param(KeyboardInterrupt, STATE, 1, id="interrupt-tree"),
        pytest.param(KeyboardInterrupt, PICKLED, 2, id="interrupt-pickle"),
        pytest.param(MemoryError, STATE, 3, id="memory-tree"),
        pytest.param(MemoryError, PICKLED, 4, id="memory-pickle"),
    ],
)
def test_saves_and_loads(error: type[BaseException], obj: Any, first: int) -> None:
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
            # The streams are in a known state: none stays busy, and none is wrongly clean.
            near.settimeout(5)
            far.settimeout(5)
            try:
                aiotorchio.save("next", near)
                if done != "nothing":
                    # Or the first object, of which no byte was read.
                    following = aiotorchio.load(far)
                    assert following == "next" or following.keys() == obj.keys()
            except (StreamPoisoned, aiotorchio.TruncatedError):
                return f"{done}, then poisoned"
            return f"{done}, then clean"

    outcomes = every_line(attempt, error, first)
    assert outcomes >= {"nothing, then clean", "nothing, then poisoned", "loaded, then clean"}


def test_saves_to_paths(tmp_path: Path) -> None:
    """The old file or the new one is whole; the next save removes what no cleanup could."""
    path = tmp_path / "state"
    aiotorchio.save("old", path)

    def attempt() -> str:
        with suppress(KeyboardInterrupt):
            aiotorchio.save(STATE, path)
        sys.settrace(None)
        loaded, left = aiotorchio.load(path), len(os.listdir(tmp_path)) - 1
        aiotorchio.save("old", path)
        assert os.listdir(tmp_path) == ["state"]
        assert loaded == "old" or loaded.keys() == STATE.keys()
        return f"{'old' if loaded == 'old' else 'new'}, {left} left"

    outcomes = every_line(attempt, KeyboardInterrupt, 1)
    assert outcomes - {"old, 1 left"} == {"old, 0 left", "new, 0 left"}


@pytest.mark.parametrize(("error", "first"), [(KeyboardInterrupt, 5), (MemoryError, 6)])
def test_staged_loads_are_all_or_nothing(error: type[BaseException], first: int) -> None:
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

    assert every_line(attempt, error, first) == {"old", "new"}


def test_a_socket_is_as_it_was() -> None:
    """The owner's timeouts are restored in any case."""

    def attempt() -> str:
        near, far = socket.socketpair()
        with near, far:
            near.settimeout(5)
            with suppress(KeyboardInterrupt):
                aiotorchio.save(STATE, near)
            sys.settrace(None)
            assert near.gettimeout() == 5
            return ""

    every_line(attempt, KeyboardInterrupt, 7)


@pytest.mark.parametrize(("kind", "first"), [("socket", 1), ("streams", 3), ("anyio", 5)])
def test_no_memory_on_an_event_loop(kind: str, first: int) -> None:
    async def talk() -> str:
        async with both_ends(kind) as (near, far):
            done = "nothing"
            with fail_after(PATIENCE):
                try:
                    async with create_task_group() as group:
                        group.start_soon(near.save, STATE)
                        loaded = await far.load()
                    done = "both"
                    assert loaded.keys() == STATE.keys()
                except* (MemoryError, AiotorchioError):
                    pass
                sys.settrace(None)
                # Neither direction stays busy, or is wrongly clean.
                try:
                    await near.save("next")
                    if done == "both":
                        assert await far.load() == "next"
                except (StreamPoisoned, aiotorchio.TruncatedError):
                    return f"{done}, then poisoned"
            return f"{done}, then clean"

    def attempt() -> str:
        tracer = sys.gettrace()
        sys.settrace(None)

        async def main() -> str:
            sys.settrace(tracer)
            return await talk()

        return run(main)

    outcomes = every_line(attempt, MemoryError, first)
    assert outcomes >= {"nothing, then poisoned", "both, then clean"}
