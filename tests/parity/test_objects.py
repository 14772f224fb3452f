"""Python objects: they arrive as torch loads them, and no other function is called."""

from __future__ import annotations

import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import operator
import pathlib
import pickle
import random
import struct
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import aiotorchio
from tests.parity.twins import by_stream, by_torch, by_us, our_file, torch_file
from tests.support import corpus

# ------------------------------------------------------------------------------- the classes


class Point(NamedTuple):
    x: int
    y: Any = 0


@dataclass
class Plain:
    number: int
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    number: int


@dataclass(slots=True)
class Slotted:
    number: int
    tensor: Any = None


@dataclass(frozen=True, slots=True)
class FrozenSlotted:
    number: int


class Color(enum.Enum):
    RED = 1
    GREEN = (1, "two")


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Slots:
    __slots__ = ("a", "b")


class SlotsAndDict(Slots):
    pass


class Stateful:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.derived = "not sent"

    def __getstate__(self) -> Any:
        return [self.value]

    def __setstate__(self, state: Any) -> None:
        (self.value,) = state
        self.derived = "made again"


class FalseState:
    """Its state is false, so no pickle carries it, and ``__setstate__`` is not called."""

    def __init__(self) -> None:
        self.value = 1

    def __getstate__(self) -> Any:
        return None

    def __setstate__(self, state: Any) -> None:
        raise AssertionError


class Reduced:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return make_reduced, (self.value,)


def make_reduced(value: Any) -> Reduced:
    return Reduced(value)


class ReducedWithState(Reduced):
    def __reduce__(self) -> Any:
        return make_reduced_with_state, (), {"value": self.value}


def make_reduced_with_state() -> ReducedWithState:
    return ReducedWithState(None)


class NewArguments:
    def __new__(cls, value: int) -> NewArguments:
        self = super().__new__(cls)
        self.value = value  # type: ignore[attr-defined]
        return self

    def __getnewargs__(self) -> tuple[int]:
        return (self.value,)  # type: ignore[attr-defined]


class NewKeywords:
    def __new__(cls, *, value: int) -> NewKeywords:
        self = super().__new__(cls)
        self.value = value  # type: ignore[attr-defined]
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"value": self.value}  # type: ignore[attr-defined]


class Failure(ValueError):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.note = ["kept"]


class Text(str):
    pass


class Whole(int):
    pass


class Items(list[Any]):
    pass


class Pairs(dict[Any, Any]):
    pass


class Node:
    def __init__(self) -> None:
        self.other: Any = None


def _slots() -> Slots:
    made = Slots()
    made.a = torch.ones(2)  # type: ignore[attr-defined]
    return made


def _slots_and_dict() -> SlotsAndDict:
    made = SlotsAndDict()
    made.a, made.c = 1, [2]  # type: ignore[attr-defined]
    return made


# --------------------------------------------------------------------------------- the cases

CASES: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "namedtuple": (lambda: Point(1, torch.ones(2)), [Point]),
    "dataclass": (lambda: Plain(1, [torch.ones(2)]), [Plain]),
    "frozen_dataclass": (lambda: Frozen(1), [Frozen]),
    "dataclass_with_slots": (lambda: Slotted(1, torch.ones(1)), [Slotted]),
    "frozen_dataclass_with_slots": (lambda: FrozenSlotted(1), [FrozenSlotted]),
    "enum": (lambda: [Color.RED, Color.GREEN, Color.RED], [Color]),
    "int_enum": (lambda: {"level": Level.LOW}, [Level]),
    "flag": (lambda: Access.READ | Access.WRITE, [Access]),
    "slots": (_slots, [Slots]),
    "slots_and_dict": (_slots_and_dict, [SlotsAndDict]),
    "getstate": (lambda: Stateful({"a": torch.ones(1)}), [Stateful]),
    "false_state": (FalseState, [FalseState]),
    "reduce": (lambda: Reduced(torch.ones(1)), [make_reduced]),
    "getnewargs": (lambda: NewArguments(3), [NewArguments]),
    "subclass_of_str": (lambda: Text("a"), [Text]),
    "subclass_of_int": (lambda: Whole(3), [Whole]),
    "exception": (lambda: ValueError("a", 2), [(ValueError, "exceptions.ValueError")]),
    "exception_of_mine": (lambda: Failure(3), [Failure]),
    "pure_path": (lambda: pathlib.PurePosixPath("/a/b"), [pathlib.PurePosixPath]),
    "path": (lambda: pathlib.Path("a/b"), [type(pathlib.Path())]),
    "datetime": (lambda: datetime.datetime(2026, 11, 22, 7, 30), [datetime.datetime]),
    "date": (lambda: datetime.date(2026, 11, 22), [datetime.date]),
    "timedelta": (lambda: datetime.timedelta(1, 2, 3), [datetime.timedelta]),
    "datetime_with_zone": (
        lambda: datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC),
        [datetime.datetime, datetime.timezone, datetime.timedelta],
    ),
    "fraction": (lambda: fractions.Fraction(1, 3), [fractions.Fraction]),
    "decimal": (lambda: decimal.Decimal("1.50"), [decimal.Decimal]),
    "uuid": (lambda: uuid.UUID(int=5), [uuid.UUID]),
    "range": (lambda: range(1, 9, 2), [(range, "builtins.range")]),
    "slice": (lambda: slice(1, None, 2), [slice]),
    "ellipsis": (lambda: [...], [(..., "builtins.Ellipsis")]),
    "class": (lambda: [int, Plain], [int, Plain]),
    "function": (lambda: {"f": nn.functional.relu}, [nn.functional.relu]),
    "partial": (
        lambda: functools.partial(nn.functional.relu, inplace=True),
        [functools.partial, nn.functional.relu],
    ),
    "operator": (lambda: operator.add, [(operator.add, "_operator.add")]),
    "generator": (lambda: torch.Generator().manual_seed(7), [torch.Generator]),
}


def _is_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, BaseException):
        assert type(actual) is type(expected)
        corpus.assert_same(actual.args, expected.args)
        corpus.assert_same(vars(actual), vars(expected))
    elif isinstance(expected, functools.partial):
        assert (actual.func, actual.args, actual.keywords) == (
            expected.func,
            expected.args,
            expected.keywords,
        )
    elif isinstance(expected, torch.Generator):
        assert type(actual) is type(expected)
        assert torch.equal(actual.get_state(), expected.get_state())
    elif isinstance(expected, Slots):
        assert type(actual) is type(expected)
        for name in ("a", "b", "c"):
            assert hasattr(actual, name) == hasattr(expected, name)
            if hasattr(actual, name):
                corpus.assert_same(getattr(actual, name), getattr(expected, name))
    elif isinstance(expected, Slotted):
        assert (type(actual), actual.number) == (type(expected), expected.number)
        corpus.assert_same(actual.tensor, expected.tensor)
    elif isinstance(expected, FrozenSlotted | enum.Enum | defaultdict | deque):
        assert (type(actual), actual) == (type(expected), expected)
    elif isinstance(expected, list) and expected and isinstance(expected[0], enum.Enum):
        assert actual == expected and all(a is b for a, b in zip(actual, expected, strict=True))
    else:
        corpus.assert_same(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_with_weights_only_false(name: str) -> None:
    make, _ = CASES[name]
    theirs = by_torch(make(), weights_only=False)
    ours = by_us(make(), weights_only=False)
    _is_same(ours, theirs)
    if name not in ("getstate", "false_state"):
        _is_same(ours, make())


@pytest.mark.parametrize("name", CASES)
def test_refused_until_allowed(name: str) -> None:
    obj = CASES[name][0]()
    with pytest.raises(pickle.UnpicklingError):
        by_torch(obj)
    with pytest.raises(aiotorchio.UnsafeObjectError) as caught:
        by_us(obj)
    assert isinstance(caught.value, pickle.UnpicklingError)


@pytest.mark.parametrize("name", CASES)
def test_with_the_same_allowlist(name: str) -> None:
    make, allowed = CASES[name]
    ours = by_us(make(), safe_globals=allowed)
    with torch.serialization.safe_globals(allowed):
        theirs = by_torch(make())
        also_ours = by_us(make())
    _is_same(ours, theirs)
    _is_same(also_ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_as_streaming_load_does(name: str) -> None:
    make, allowed = CASES[name]
    with torch.serialization.safe_globals(allowed):
        theirs = by_stream(make())
    _is_same(by_us(make(), safe_globals=allowed), theirs)


# ----------------------------------------------------------- objects that no allowlist can load


@pytest.mark.parametrize(
    ("obj", "listed"),
    [
        pytest.param(NewKeywords(value=3), [NewKeywords, functools.partial, getattr], id="new_ex"),
        pytest.param(Items([1]), [Items], id="subclass_of_list"),
        pytest.param(Pairs(a=1), [Pairs], id="subclass_of_dict"),
        pytest.param(defaultdict(int, a=1), [defaultdict, int], id="defaultdict"),
        pytest.param(deque([1]), [deque], id="deque"),
    ],
)
def test_containers_of_other_classes_need_weights_only_false(obj: Any, listed: list[Any]) -> None:
    with torch.serialization.safe_globals(listed), pytest.raises(pickle.UnpicklingError):
        by_torch(obj)
    with pytest.raises(aiotorchio.UnsafeObjectError):
        by_us(obj, safe_globals=listed)
    _is_same(by_us(obj, weights_only=False), by_torch(obj, weights_only=False))


def test_a_state_for_what_a_function_made_needs_its_class_too() -> None:
    obj = ReducedWithState(5)
    with torch.serialization.safe_globals([make_reduced_with_state]):
        with pytest.raises(pickle.UnpicklingError, match="Can only build"):
            by_torch(obj)
        with pytest.raises(aiotorchio.UnsafeObjectError, match="Can only build"):
            by_us(obj)
    allowed: list[Any] = [make_reduced_with_state, ReducedWithState]
    with torch.serialization.safe_globals(allowed):
        theirs = by_torch(obj)
    ours = by_us(obj, safe_globals=allowed)
    assert (type(ours), ours.value) == (type(theirs), theirs.value) == (ReducedWithState, 5)


class Listed:
    """Pickles as a call that gives a list, and items for it."""

    def __reduce__(self) -> Any:
        return make_list, (), None, iter([2, 3])


def make_list() -> list[int]:
    return [1]


def test_items_for_what_a_function_made_need_weights_only_false() -> None:
    """Before the call, the scan of the pickle cannot know that the result will be a list."""
    with torch.serialization.safe_globals([make_list]):
        assert by_torch(Listed()) == [1, 2, 3]
        with pytest.raises(aiotorchio.UnsafeObjectError, match="not a list"):
            by_us(Listed())
    assert by_us(Listed(), weights_only=False) == [1, 2, 3]


@pytest.mark.parametrize(
    "obj",
    [torch.channels_last, torch.finfo(torch.float32), torch.iinfo(torch.int8), lambda: None],
    ids=["memory_format", "finfo", "iinfo", "lambda"],
)
def test_what_pickle_cannot_carry_raises_what_pickle_raises(obj: Any) -> None:
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)) as theirs:
        torch_file(obj)
    with pytest.raises(type(theirs.value)) as ours:
        our_file(obj)
    # The name of a local function is the same, its address is not.
    assert str(ours.value).split(" at 0x")[0] == str(theirs.value).split(" at 0x")[0]


# ------------------------------------------------------------------ objects that need no allowlist

PLAIN: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "bools": lambda: [True, False],
    "ints": lambda: [0, -1, 255, 256, 65535, 2**31, -(2**31), 2**63, -(2**63), 2**64, 10**300],
    "floats": lambda: [0.0, -0.0, 1.5, float("inf"), -float("inf"), 5e-324],
    "nan": lambda: struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0123))[0],
    "complex": lambda: [1 + 2j, complex(-0.0, float("inf"))],
    "strings": lambda: ["", "a", "\x00", "ä", "😀", "\ud800", "x" * 70000],
    "bytes": lambda: [b"a", bytes(range(256)), b"y" * 70000],
    "bytearray": lambda: [bytearray(b"abc"), bytearray()],
    "set": lambda: [{1, 2}, {"a"}, set()],
    "tuple": lambda: [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((),)],
    "dict": lambda: {"b": 1, "a": {}, "": None},
    "keys": lambda: {1: "int", None: 1, 1.5: 2, (1, "a"): 3, b"x": 4, 2**70: 5, True + 1: 6},
    "bool_keys": lambda: {True: 1, False: 2},
    "ordered_dict": lambda: OrderedDict(b=1, a=OrderedDict()),
    "counter": lambda: Counter("abca"),
    "size": lambda: [torch.Size([]), torch.Size([2, 0, 3])],
    "device": lambda: [torch.device(name) for name in ("cpu", "cuda:1", "meta", "mps:0", "xla:3")],
    "layout": lambda: [
        torch.strided,
        torch.sparse_coo,
        torch.sparse_csr,
        torch.sparse_csc,
        torch.sparse_bsr,
        torch.sparse_bsc,
        torch.jagged,
    ],
    "qscheme": lambda: [
        torch.per_tensor_affine,
        torch.per_tensor_symmetric,
        torch.per_channel_affine,
        torch.per_channel_symmetric,
        torch.per_channel_affine_float_qparams,
    ],
    "dtype": lambda: sorted(
        {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
    ),
    "dtype_keys": lambda: {torch.float32: 1, torch.Size([1]): 2, torch.device("cpu"): 3},
    "tensor_keys": lambda: [*{torch.ones(2): 1}],
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values(name: str) -> None:
    theirs, ours = by_torch(PLAIN[name]()), by_us(PLAIN[name]())
    corpus.assert_same(ours, theirs)
    corpus.assert_same(by_us(PLAIN[name](), weights_only=False), theirs)


@pytest.mark.parametrize(
    "obj",
    [b"", frozenset({1, "a"}), frozenset(), 1 << 3000, -(1 << 2100)],
    ids=["no_bytes", "frozenset", "empty_frozenset", "large_int", "large_negative_int"],
)
def test_plain_values_that_torch_refuses_by_default(obj: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        by_torch(obj)
    corpus.assert_same(by_us(obj), obj)


def test_equal_keys_of_other_types_stay_what_they_are() -> None:
    obj = {1: "a", "1": "b", 1.5: "c"}
    ours = by_us(obj)
    assert [type(key) for key in ours] == [int, str, float]
    corpus.assert_same(ours, by_torch(obj))


@pytest.mark.parametrize("depth", [10, 99, 100, 101, 250])
def test_nesting(depth: int) -> None:
    obj: Any = torch.ones(1)
    for level in range(depth):
        obj = [obj] if level % 2 else {"a": obj}
    corpus.assert_same(by_us(obj), by_torch(obj))


def test_deeper_nesting_needs_limits() -> None:
    obj: Any = 1
    for _ in range(400):
        obj = [obj]
    assert isinstance(by_torch(obj), list)
    with pytest.raises(aiotorchio.LimitExceeded, match="256 levels"):
        by_us(obj)
    loaded = by_us(obj, limits=aiotorchio.Limits(depth=400))
    for _ in range(400):
        (loaded,) = loaded
    assert loaded == 1


def test_nesting_beyond_the_recursion_limit_raises_what_torch_raises() -> None:
    obj: Any = 1
    for _ in range(10 * sys.getrecursionlimit()):
        obj = [obj]
    with pytest.raises(RecursionError):
        torch_file(obj)
    with pytest.raises(RecursionError):
        our_file(obj)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytes(33 * 2**20),
        lambda: "x" * (33 * 2**20),
        # Each byte takes two bytes of UTF-8, in the default protocol.
        lambda: np.full(17 * 2**20, 255, "u1"),
    ],
    ids=["bytes", "str", "numpy"],
)
def test_large_objects_around_the_tensors_need_limits(make: Callable[[], Any]) -> None:
    """The default limits accept 32 MiB of them; torch has no limit."""
    obj = make()
    file = our_file(obj)
    with pytest.raises(aiotorchio.LimitExceeded, match="skeleton_nbytes is 33554432"):
        aiotorchio.load(file, weights_only=False)
    file.seek(0)
    limits = aiotorchio.Limits(skeleton_nbytes=2**27)
    loaded = aiotorchio.load(file, weights_only=False, limits=limits)
    assert type(loaded) is type(obj) and len(loaded) == len(obj)


@pytest.mark.parametrize("obj", [bytes(2**20), "x" * 2**20], ids=["bytes", "str"])
def test_large_bytes_in_several_places_are_sent_in_each_of_them(obj: Any) -> None:
    assert len(torch_file([obj] * 4).getvalue()) < 2 * 2**20
    ours = our_file([obj] * 4)
    assert len(ours.getvalue()) > 4 * 2**20
    assert aiotorchio.load(ours, allow_pickle=False) == [obj] * 4


# ------------------------------------------------------------------------- sharing and cycles


def _shared() -> Any:
    inner, pair, text = [1], (torch.ones(1), [2]), {"k": 1}
    members = {1}
    return {"a": inner, "b": [inner, pair], "c": pair, "d": (text, text), "e": [members, members]}


def _list_in_itself() -> Any:
    obj: list[Any] = [1]
    obj.append(obj)
    return obj


def _dict_in_itself() -> Any:
    obj: dict[str, Any] = {"a": torch.ones(1)}
    obj["self"] = obj
    return obj


def _ordered_dict_in_itself() -> Any:
    obj: OrderedDict[str, Any] = OrderedDict()
    obj["self"] = [obj]
    return obj


def _tuple_in_itself() -> Any:
    inner: list[Any] = []
    obj = (inner, 1)
    inner.append(obj)
    return obj


def _pair_in_each_other() -> Any:
    a: dict[str, Any] = {}
    b: list[Any] = [a]
    a["b"] = b
    return [a, b]


def _tuple_in_a_dict_in_itself() -> Any:
    holder: dict[str, Any] = {}
    obj = (1, 2, 3, holder)
    holder["t"] = obj
    return obj


GRAPHS: dict[str, Callable[[], Any]] = {
    "shared": _shared,
    "list": _list_in_itself,
    "dict": _dict_in_itself,
    "ordered_dict": _ordered_dict_in_itself,
    "pair": _pair_in_each_other,
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_shared_or_recursive(name: str, weights_only: bool) -> None:
    theirs = by_torch(GRAPHS[name](), weights_only=weights_only)
    ours = by_us(GRAPHS[name](), weights_only=weights_only)
    corpus.assert_same(ours, theirs)
    corpus.assert_same(ours, GRAPHS[name]())


@pytest.mark.parametrize("make", [_tuple_in_itself, _tuple_in_a_dict_in_itself])
def test_tuples_in_themselves_need_weights_only_false(make: Callable[[], Any]) -> None:
    """Their pickles have an opcode that torch's weights-only unpickler does not know."""
    with pytest.raises(pickle.UnpicklingError, match="Unsupported operand"):
        by_torch(make())
    with pytest.raises(aiotorchio.UnsafeObjectError, match="opcode POP"):
        by_us(make())
    ours = by_us(make(), weights_only=False)
    corpus.assert_same(ours, by_torch(make(), weights_only=False))
    corpus.assert_same(ours, make())


def _instances() -> Any:
    a, b = Node(), Node()
    a.other, b.other = b, [a, (b,), {"a": a}]
    return a


def _instance_in_its_set() -> Any:
    node = Node()
    node.other = {node}
    return node


def _instance_in_its_key() -> Any:
    node = Node()
    node.other = {node: (node, [node])}
    return node


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("make", [_instances, _instance_in_its_set, _instance_in_its_key])
def test_instances_that_refer_to_themselves(make: Callable[[], Node], weights_only: bool) -> None:
    options: dict[str, Any] = {"weights_only": weights_only}
    with torch.serialization.safe_globals([Node]):
        theirs = by_torch(make(), **options)
    ours = by_us(make(), safe_globals=[Node], **options)
    for node in (theirs, ours):
        assert type(node) is Node
        if make is _instances:
            b = node.other
            assert b.other[0] is node and b.other[1][0] is b and b.other[2]["a"] is node
        elif make is _instance_in_its_set:
            assert node.other == {node}
        else:
            assert [*node.other] == [node] and node.other[node][0] is node.other[node][1][0]


def test_a_recursive_set_that_pickle_cannot_carry_faithfully() -> None:
    """A frozenset in an instance in it: pickle makes the set first, of a half-made instance."""
    node = Node()
    node.other = frozenset({node})
    theirs = by_torch(node, weights_only=False)
    ours = by_us(node, weights_only=False)
    assert ours.other == {ours} and theirs.other == {theirs}


# --------------------------------------------------------------------------------------- numpy

NUMPY: list[Any] = [
    np.arange(1).__reduce__()[0],
    np.float64(1).__reduce__()[0],
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "u4", "?", "U3", "c8")},
]


@pytest.mark.parametrize(
    "obj",
    [
        np.float32(1.5),
        np.float64(-0.0),
        np.int64(-3),
        np.bool_(True),
        np.complex64(1 + 2j),
        np.str_("abc"),
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3)),
        np.array(3, dtype="u1"),
        np.array([True, False]),
        np.array(["a", "bcd"]),
        np.dtype("f4"),
    ],
    ids=lambda obj: f"{type(obj).__name__}_{getattr(obj, 'dtype', obj)}",
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_numpy(obj: Any, weights_only: bool) -> None:
    options: dict[str, Any] = {"weights_only": weights_only}
    with torch.serialization.safe_globals(NUMPY):
        theirs = by_torch([obj], **options)[0]
    ours = by_us([obj], safe_globals=NUMPY, **options)[0]
    assert type(ours) is type(theirs) is type(obj)
    if isinstance(obj, np.dtype):
        assert ours == theirs == obj
    else:
        assert ours.dtype == theirs.dtype == obj.dtype
        assert ours.shape == obj.shape and ours.tobytes("A") == theirs.tobytes("A")
        assert ours.flags.f_contiguous == theirs.flags.f_contiguous


def test_an_empty_array_of_numpy_needs_bytes_on_the_list_of_torch() -> None:
    obj = np.zeros((0, 2), "f4")
    with torch.serialization.safe_globals(NUMPY), pytest.raises(pickle.UnpicklingError):
        by_torch([obj])
    (ours,) = by_us([obj], safe_globals=NUMPY)
    assert (ours.shape, ours.dtype) == (obj.shape, obj.dtype)


@pytest.mark.parametrize("obj", [np.float64(1.5), np.arange(3)], ids=["scalar", "array"])
def test_numpy_is_refused_until_allowed(obj: Any) -> None:
    with pytest.raises(pickle.UnpicklingError):
        by_torch([obj])
    with pytest.raises(aiotorchio.UnsafeObjectError, match="numpy"):
        by_us([obj])


# ------------------------------------------------------------------------------- random states


def test_random_state_of_torch() -> None:
    state = {
        "cpu": torch.get_rng_state(),
        "generator": torch.Generator().manual_seed(5).get_state(),
    }
    ours = by_us(state)
    corpus.assert_same(ours, by_torch(state))
    expected = torch.rand(3)
    torch.set_rng_state(ours["cpu"])
    assert torch.equal(torch.rand(3), expected)


def test_random_state_of_python() -> None:
    generator = random.Random(5)
    state = generator.getstate()
    expected = generator.random()
    for loaded in (by_torch(state), by_us(state)):
        generator.setstate(loaded)
        assert generator.random() == expected


def test_random_state_of_numpy() -> None:
    generator = np.random.RandomState(5)
    state = {"legacy": generator.get_state(), "new": np.random.default_rng(6).bit_generator.state}
    expected = generator.random_sample()
    with torch.serialization.safe_globals(NUMPY):
        theirs = by_torch(state)
    ours = by_us(state, safe_globals=NUMPY)
    assert ours["new"] == theirs["new"] == state["new"]
    for loaded in (theirs, ours):
        generator.set_state(loaded["legacy"])
        assert generator.random_sample() == expected


def test_generators_whole() -> None:
    obj: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(5),
        "numpy": np.random.default_rng(5),
    }
    obj["python"] = random.Random(5)
    theirs, ours = by_torch(obj, weights_only=False), by_us(obj, weights_only=False)
    for loaded in (theirs, ours):
        assert torch.equal(
            torch.rand(2, generator=loaded["torch"]),
            torch.rand(2, generator=torch.Generator().manual_seed(5)),
        )
        assert loaded["numpy"].random() == np.random.default_rng(5).random()
        assert loaded["python"].random() == random.Random(5).random()


# ---------------------------------------------------------------------------------- state dicts


def _trained(kind: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    model = nn.Linear(3, 2)
    make: Any = kind
    optimizer: torch.optim.Optimizer = make(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"capturable": False, "maximize": True}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Rprop, {}),
    ],
)
def test_optimizers(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    state = _trained(kind, **options).state_dict()
    ours = by_us(state)
    corpus.assert_same(ours, by_torch(state))
    fresh = _trained(kind, **options)
    fresh.load_state_dict(ours)
    corpus.assert_same(fresh.state_dict()["state"], state["state"])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "multi_step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.5),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    optimizer = _trained(torch.optim.SGD, momentum=0.9)
    state = SCHEDULERS[name](optimizer).state_dict()
    corpus.assert_same(by_us(state), by_torch(state))


def test_grad_scaler() -> None:
    state = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    assert state["scale"] == 8.0
    corpus.assert_same(by_us(state), by_torch(state))


def test_module_state_keeps_its_versions() -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    state._metadata["1"]["note"] = [torch.ones(1)]  # type: ignore[attr-defined]
    ours, theirs = by_us(state), by_torch(state)
    corpus.assert_same(ours, theirs)
    assert ours._metadata["1"]["version"] == 2
    assert ours._metadata["1"]["note"][0].tolist() == [1.0]


class WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extra: Any = {"seen": {1, 2}, "epoch": 3}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_of_a_module() -> None:
    state = nn.Sequential(WithExtraState()).state_dict()
    ours = by_us(state)
    corpus.assert_same(ours, by_torch(state))
    fresh = nn.Sequential(WithExtraState())
    fresh.load_state_dict(ours)
    assert ours["0._extra_state"] == {"seen": {1, 2}, "epoch": 3}


class Registered:
    """Its class has a registered reducer."""


def _reduce_registered(obj: Registered) -> Any:
    return make_reduced, ("registered",)


def test_reducers_that_copyreg_knows() -> None:
    copyreg.pickle(Registered, _reduce_registered)
    try:
        obj = [Registered(), torch.ones(1)]
        theirs, ours = by_torch(obj, weights_only=False), by_us(obj, weights_only=False)
    finally:
        del copyreg.dispatch_table[Registered]
    assert type(theirs[0]) is type(ours[0]) is Reduced
    assert theirs[0].value == ours[0].value == "registered"


def test_attributes_of_an_ordered_dict() -> None:
    state = OrderedDict(a=torch.ones(1))
    state.note = {"x": [1, torch.ones(1)]}  # type: ignore[attr-defined]
    corpus.assert_same(by_us(state), by_torch(state))


def _model() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)
    )
    model[4].weight.requires_grad_(False)
    model.register_buffer("steps", torch.tensor(3))
    return model.eval()


def test_a_whole_module() -> None:
    model, x = _model(), torch.randn(2, 3)
    theirs, ours = by_torch(model, weights_only=False), by_us(model, weights_only=False)
    assert repr(ours) == repr(theirs) == repr(model) and not ours.training
    assert torch.equal(ours(x), model(x)) and torch.equal(theirs(x), model(x))
    corpus.assert_same(ours.state_dict(), theirs.state_dict())
    assert not ours[4].weight.requires_grad and ours[0].weight.requires_grad
    with pytest.raises(pickle.UnpicklingError):
        by_torch(model)
    with pytest.raises(aiotorchio.UnsafeObjectError):
        by_us(model)


def _named(paths: Iterable[str]) -> list[Any]:
    return [
        getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
        for path in paths
    ]


def test_a_whole_module_from_an_allowlist() -> None:
    model, x = _model(), torch.randn(2, 3)
    allowed = _named(torch.serialization.get_unsafe_globals_in_checkpoint(torch_file(model)))
    with torch.serialization.safe_globals(allowed):
        theirs = by_torch(model)
    ours = by_us(model, safe_globals=allowed)
    assert torch.equal(ours(x), theirs(x))
    corpus.assert_same(ours.state_dict(), theirs.state_dict())


def test_a_module_with_tied_parameters() -> None:
    model = corpus.Tied()
    ours = by_us(model, weights_only=False)
    assert ours.decoder.weight is ours.embedding.weight
    assert by_torch(model, weights_only=False).decoder.weight is not None


def test_a_module_with_a_hook() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(_double)
    x = torch.ones(1, 2)
    theirs, ours = by_torch(model, weights_only=False), by_us(model, weights_only=False)
    assert torch.equal(ours(x), model(x)) and torch.equal(theirs(x), model(x))


def _double(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def test_an_optimizer_whole() -> None:
    optimizer = _trained(torch.optim.SGD, momentum=0.9)
    theirs = by_torch(optimizer, weights_only=False)
    ours = by_us(optimizer, weights_only=False)
    corpus.assert_same(ours.state_dict(), theirs.state_dict())


def test_parameters_stay_those_of_their_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    both = by_us({"model": model, "optimizer": optimizer}, weights_only=False)
    assert both["optimizer"].param_groups[0]["params"][0] is both["model"].weight
    theirs = by_torch({"model": model, "optimizer": optimizer}, weights_only=False)
    assert theirs["optimizer"].param_groups[0]["params"][0] is theirs["model"].weight
