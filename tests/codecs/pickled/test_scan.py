"""The scan, called directly on pickles of objects and on crafted opcodes.

Whole hostile pickles are in ``support/hostile.py``, valid ones in ``support/corpus.py``.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.scan import _ACTIONS, scan_pickle
from aiotorchio.engine.load_options import trusted
from aiotorchio.errors import AiotorchioError, LimitExceeded, ProtocolError, UnsafeObjectError
from aiotorchio.limits import Limits
from tests.support import corpus, craft, hostile
from tests.support.lowered import lowered


def scan(data: bytes, depth: int = 256, **options: Any) -> None:
    allowlist = Allowlist(trusted(options.get("safe_globals", ())), Limits(), None)
    scan_pickle(
        data,
        allowlist.globals,
        allowlist.stateful,
        depth_limit=depth,
        wide_keys=30_000,
        offset=1000,
    )


def objects() -> st.SearchStrategy[Any]:
    atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    hashable = atoms | st.tuples(atoms, atoms) | st.frozensets(atoms) | st.complex_numbers()
    return st.recursive(
        hashable,
        lambda items: (
            st.lists(items)
            | st.tuples(items, items)
            | st.dictionaries(hashable, items)
            | st.dictionaries(hashable, items).map(OrderedDict)
            | st.sets(hashable)
            | st.dictionaries(st.text(), st.integers()).map(Counter)
            | st.binary().map(bytearray)
            | items.map(lambda item: [item, item])
        ),
        max_leaves=20,
    )


@given(objects())
def test_honest_objects_pass_the_scan_and_load(obj: Any) -> None:
    data = pickle.dumps(obj, 2)
    # Integers of 256 bytes or more have an opcode (LONG4) that torch does not know.
    if b"\x8b" in data:
        return
    scan(data)
    corpus.assert_same(craft.load_pickle(data), obj)


@given(st.binary())
@example(b"\x80\x02}q\x00h\x00h\x00s.")
def test_anything_is_an_error_of_ours_or_loads(data: bytes) -> None:
    try:
        scan(b"\x80\x02" + data)
    except AiotorchioError as error:
        assert error.entry == "skeleton"
        assert error.offset is not None
        assert 1000 <= error.offset <= 1002 + len(data)


@given(st.lists(st.sampled_from(sorted(_ACTIONS)), max_size=30), st.binary())
def test_opcodes_at_random(codes: list[int], arguments: bytes) -> None:
    data = bytearray(b"\x80\x02")
    for n, code in enumerate(codes):
        data.append(code)
        if code in b"KUqh":
            data.append(arguments[n] % 4 if n < len(arguments) else 0)
    with contextlib.suppress(AiotorchioError):
        craft.load_pickle(bytes(data) + b".")


@pytest.mark.parametrize(
    ("data", "offset", "error"),
    [
        (b"\x80\x02(N.", 1004, ProtocolError),
        (b"\x80\x02]K\x01K\x02s.", 1007, UnsafeObjectError),
        (craft.pickled([craft.call("os", "getpid")]), 1004, UnsafeObjectError),
        (b"\x80\x02N.N", 1004, ProtocolError),
        (b"\x80\x02Ni", 1003, UnsafeObjectError),
    ],
)
def test_errors_say_where(data: bytes, offset: int, error: type[AiotorchioError]) -> None:
    with pytest.raises(error) as caught:
        scan(data)
    assert (caught.value.entry, caught.value.offset) == ("skeleton", offset)


def test_depth() -> None:
    scan(b"\x80\x02" + b")" + b"\x85" * 100 + b".", depth=100)
    with pytest.raises(LimitExceeded, match="99 levels"):
        scan(b"\x80\x02" + b")" + b"\x85" * 100 + b".", depth=99)


def test_hint_of_what_to_trust() -> None:
    with pytest.raises(UnsafeObjectError, match=r"GLOBAL fractions\.Fraction .*safe_globals"):
        scan(craft.pickled(craft.call("fractions", "Fraction", 1)))


def test_modules_that_torch_blocks_stay_blocked() -> None:
    import os

    with pytest.raises(UnsafeObjectError):
        scan(craft.pickled(craft.name("os", "getcwd")), safe_globals=[(os.getcwd, "os.getcwd")])


def test_many_honest_keys() -> None:
    for obj in (
        {(str(n), str(n + 1)): n for n in range(5000)},
        {(n, n * n): n for n in range(5000)},
        {float(n): None for n in range(5000)},
        {n << 64: None for n in range(5000)},
        {n << 32: None for n in range(5000)},
        {complex(n, -n): None for n in range(4000)},
        {(n, complex(n)) for n in range(4000)},
        [frozenset({(n, "a")}) for n in range(5000)],
        [bytes([n % 256]) * 100 for n in range(5000)],
    ):
        scan(pickle.dumps(obj, 2))


def test_colliding_keys_collide() -> None:
    """The keys in ``support/hostile.py`` do collide; otherwise its cases would test nothing."""
    assert len({hash(pair) for pair in hostile.COLLIDING_TUPLES}) == 1
    assert len({hash(number) for number in hostile.colliding_integers(6)}) == 1
    assert len({hash(complex(-1000003.0 * n, n)) for n in range(6)}) == 1


def test_a_set_of_trusted_things() -> None:
    scan(pickle.dumps({hostile.Marker(n) for n in range(3)}, 2), safe_globals=[hostile.Marker])


def test_keys_of_unknown_hashes_are_few() -> None:
    scan(pickle.dumps({complex(n): None for n in range(4096)}, 2))
    with lowered({"unknown_hashes": 6}):
        scan(pickle.dumps({complex(n): None for n in range(6)}, 2))
        with pytest.raises(LimitExceeded, match="6 keys"):
            scan(pickle.dumps({complex(n): None for n in range(7)}, 2))


def test_an_object_is_given_one_state() -> None:
    # Each state is copied into the object, and costs the sender only three bytes.
    first = b"\x80\x02ccollections\nOrderedDict\n)R}q\x00X\x01\x00\x00\x00aK\x01sb"
    scan(first + b".")
    with pytest.raises(UnsafeObjectError, match="a second state"):
        scan(first + b"h\x00b.")


@pytest.mark.parametrize("kind", [OrderedDict, set, bytearray])
def test_names_that_stand_for_something_are_no_part_of_an_object(kind: type) -> None:
    for obj in (kind, [kind], {"a": (1, kind)}):
        with pytest.raises(UnsafeObjectError, match="is a part of the object itself"):
            scan(pickle.dumps(obj, protocol=2))


@pytest.mark.parametrize("key", [lambda n: ((n,), 0), lambda n: ((), n), lambda n: (n, (), "a")])
def test_tuples_in_tuples_as_keys_are_few(key: Callable[[int], Any]) -> None:
    # Tuples have hashes of 64 bits, numbers of 61, so the scan cannot predict which are equal.
    scan(pickle.dumps({key(n): n for n in range(4000)}, protocol=2))
    with lowered({"unknown_hashes": 6}), pytest.raises(LimitExceeded, match="not plain values"):
        scan(pickle.dumps({key(n): n for n in range(7)}, protocol=2))


def test_an_empty_tuple_is_a_key_like_any_other() -> None:
    scan(pickle.dumps({(): 1, "a": {(): 2}}, protocol=2))


def test_lists_that_are_nested_after_they_were_measured() -> None:
    # ]q0 ]q1 a, h1 ]q2 a, ...: each new list is appended to the previous list, which is on top of
    # the stack.
    levels = 300
    data = b"\x80\x02]r\x00\x00\x00\x00"
    for level in range(1, levels):
        slot = level.to_bytes(4, "little")
        data += b"]r" + slot + b"aj" + slot
    # A tuple of all lists on the stack leaves one object at the end.
    with pytest.raises(LimitExceeded, match="nested deeper than 256"):
        craft.load_pickle(b"\x80\x02(" + data[2:] + b"t.")
