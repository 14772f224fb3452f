"""The two tiers of the suite: the fast one, and everything.

A test function is a behaviour, and its parameters are of two kinds. Some are backends for the
behaviour: an event loop, a kind of stream, a kind of link. The fast tier runs one backend for each
behaviour, and different ones for different behaviours. Other parameters are values of the
behaviour: the fast tier runs cases in which each value appears once instead of each combination,
and an evenly spread part of a long list of values. All other cases are marked ``full``.

Tests that draw random inputs (hypothesis, fuzz, chaos) run in both tiers, in the fast one with a
fifth of the inputs; so do tests that go through every place in a message.

The rules apply to new tests, too. A test function always keeps at least one case; functions that
are slow by nature are listed below with the reason. A function that marks some of its cases itself,
as tests/attacks does, is left alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TypeVar

import pytest

T = TypeVar("T")
# The parameters of each case of a function, by its node id.
Cases = Mapping[str, Mapping[str, object]]

__all__ = ["FAST", "examples", "leave_out_full", "mark_tiers", "set_tier", "some"]

# The expression of pyproject.toml for ``-m``.
FAST = "not full"
_fast = False
# One of so many inputs is in the fast tier.
_SHARE = 5

# Parameters that choose a backend, and values that make a "kind" one.
_WAYS = {"anyio_backend", "far", "link", "loop", "loop_factory", "near", "run", "way", "world"}
_KINDS = {"streams", "streams-tls", "anyio", "anyio-tls", "socket"}

# Cases of a function in the fast tier: the objects of the corpus are hundreds.
_CASES_MAX = 12
# Fewer where a case costs half a second or more. A key is a file or a function of it.
_CASES_MAX_OF = {
    "tests/codecs/tree/test_size_estimate.py::test_no_object_takes_more": 4,
    "tests/memory/test_snapshot.py": 2,
    "tests/parity/test_global_state.py": 1,
    "tests/api/test_compact.py::test_iter_bytes_files_and_options": 2,
    "tests/api/test_compact.py::test_over_any_stream": 4,
    "tests/test_fuzz.py::test_every_bit": 1,
    "tests/test_fuzz.py::test_every_cut": 2,
    "tests/test_fuzz.py::test_seeds": 1,
    "tests/test_independent_reader.py::test_every_change": 4,
    "tests/test_independent_reader.py::test_every_cut": 4,
    "tests/engine/test_interrupts.py": 1,
    "tests/api/test_message.py::test_skipping_by_hand": 3,
    "tests/engine/test_streamed_save.py::test_any_sizes_make_the_payload_of_an_ordinary_save": 1,
    "tests/engine/test_staged.py": 2,
}

# Not in the fast tier at all, with the reason. A key is a folder, a file or a function of it.
_SLOW = {
    "tests/examples/test_examples.py::test_a_recovered_peer_takes_the_same_steps": "two processes"
    " that train; README's first command runs it",
    "tests/examples/test_examples.py::test_workers_answer_while_they_take_new_weights": "four"
    " processes that import torch",
    "tests/api/test_killed_saves.py": "processes of their own",
    "tests/codecs/tree/test_size_estimate.py::"
    "test_python_s_own_limit_is_not_what_refuses_deep_nesting": "two processes of their own",
    "tests/engine/test_interrupts.py::test_no_memory_on_an_event_loop": "each line of a load in"
    " turn",
    "tests/streams/test_asyncio.py::test_with_assertions_compiled_away": "a process of its own",
    "tests/examples/test_examples.py::test_a_state_larger_than_memory_passes": "moves 768 MiB",
    "tests/parity/test_tensors.py::test_dtensors_of_several_ranks": "a process group of processes",
    "tests/test_compat.py::test_torchft_recovers_a_worker": "torchft in a process of its own",
    "tests/test_kill.py": "forks and kills senders by the dozen",
}


def set_tier(expression: str) -> None:
    """Choose the tier by the value of ``-m``, before tests are imported."""
    global _fast
    _fast = expression == FAST


def examples(count: int) -> int:
    """The number of random inputs of the tier for a test with ``count`` of them."""
    return max(count // _SHARE, 5) if _fast else count


def some(values: Sequence[T]) -> Sequence[T]:
    """The values of the tier for a test that goes through many of them: all, or every fifth."""
    return values[::_SHARE] if _fast else values


def mark_tiers(items: Iterable[pytest.Item]) -> None:
    """Mark all cases that are not of the fast tier with ``full``."""
    functions: dict[str, list[pytest.Function]] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        if _entry(_SLOW, name) is not None:
            item.add_marker(pytest.mark.full)
        elif isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            functions.setdefault(name, []).append(item)
    for name, cases in functions.items():
        if any(case.get_closest_marker("full") for case in cases):
            continue
        chosen = _of_fast_tier(name, {case.nodeid: case.callspec.params for case in cases})
        for case in cases:
            if case.nodeid not in chosen:
                case.add_marker(pytest.mark.full)


def leave_out_full(metafunc: pytest.Metafunc) -> None:
    """Keep only the cases of the fast tier, before pytest makes items of them.

    Thousands of items that pytest deselects at once cost seconds in each process. ``mark_tiers``
    chooses all of the kept cases again.
    """
    name, calls = metafunc.definition.nodeid, metafunc._calls
    marks = [mark for call in calls for mark in [*call.marks, *metafunc.definition.own_markers]]
    if not calls or any(mark.name == "full" for mark in marks) or _entry(_SLOW, name) is not None:
        return
    chosen = _of_fast_tier(name, {f"{name}[{call.id}]": call.params for call in calls})
    metafunc._calls = [call for call in calls if f"{name}[{call.id}]" in chosen]


def _of_fast_tier(name: str, cases: Cases) -> set[str]:
    """The cases of a function that the fast tier runs."""
    count = _entry(_CASES_MAX_OF, name) or _CASES_MAX
    return set(_spread(_chosen(cases), count))


def _entry(table: Mapping[str, T], name: str) -> T | None:
    """The entry of a table for a function, or for the file or folder that it is in."""
    path = name.partition("::")[0]
    keys = [name, path, *map(str, PurePosixPath(path).parents)]
    return next((table[key] for key in keys if key in table), None)


def _chosen(cases: Cases) -> list[str]:
    """A few cases in which each value appears once."""
    values = {nodeid: _values(params) for nodeid, params in cases.items()}
    # The same cases in every run, and other backends for other functions.
    order = sorted(values, key=lambda nodeid: zlib.crc32(nodeid.encode()))
    chosen, seen = set[str](), set[tuple[str, int]]()
    # First the cases with most new values.
    for least in range(max(map(len, values.values())), 0, -1):
        for nodeid in order:
            if len(values[nodeid] - seen) >= least:
                seen |= values[nodeid]
                chosen.add(nodeid)
    chosen = chosen or {order[0]}
    return [nodeid for nodeid in cases if nodeid in chosen]


def _values(params: Mapping[str, object]) -> set[tuple[str, int]]:
    """The values of a case's parameters, without those that choose a backend."""
    # By identity: every case of a list of parameters has the same objects.
    return {
        (name, id(value))
        for name, value in params.items()
        if name not in _WAYS and not (name == "kind" and str(value) in _KINDS)
    }


def _spread(cases: Sequence[str], count: int) -> Sequence[str]:
    """A spread of at most so many cases of a list in which neighbours are alike."""
    if len(cases) <= count:
        return cases
    return [cases[n * len(cases) // count] for n in range(count)]
