"""The names in a header must be the paths to the tensors in the object.

Senders' names are compared with ``walk``; hostile headers with changed names must be refused.
"""

from __future__ import annotations

import tracemalloc
from collections import ChainMap, Counter, OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import anyio
import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import aiotorchio
from aiotorchio import Limits, MismatchError, ProtocolError, TensorSpec
from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.graph.rebuild import check_tree
from aiotorchio.table.containers import key_text
from aiotorchio.table.names import (
    Placeholder,
    check_names,
    rows_by_name,
    specs_of,
    walk,
)
from aiotorchio.table.table import Table
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import Header, TensorRow
from tests.support import corpus, craft

A, B, C = torch.ones(1), torch.ones(2), torch.ones(3)


class Pair(NamedTuple):
    first: Any
    second: Any


def names_of(obj: object) -> list[list[str]]:
    """The names in each row that a sender writes."""
    return [row.names for row in craft.flattened(obj).header.tensors]


def with_metadata(metadata: Any, **items: Any) -> OrderedDict[str, Any]:
    ordered = OrderedDict(items)
    vars(ordered)["_metadata"] = metadata
    return ordered


NAMED: dict[str, tuple[Any, list[list[str]]]] = {
    "tensor": (A, [[""]]),
    "no tensor": ({"a": 1}, []),
    "dict": ({"a": A, "b": 1, "c": B}, [["a"], ["c"]]),
    "list": ([A, 1, B], [["0"], ["2"]]),
    "tuple": ((1, A), [["1"]]),
    "nested": ({"a": [{"b": (A, B)}]}, [["a.0.b.0"], ["a.0.b.1"]]),
    "state dict": (OrderedDict({"layer.weight": A}), [["layer.weight"]]),
    "int keys": ({0: A, -1: {7: B}}, [["0"], ["-1.7"]]),
    "keys with dots": ({"a.b": A, "a": {"c": B}}, [["a.b"], ["a.c"]]),
    "an empty key": ({"": A}, [[""]]),
    "empty keys": ({"": {"": A, "a": B}, "b": {"": {"": C}}}, [[""], ["a"], ["b.."]]),
    "an empty key above": ({"": {"a": A}, "a": {"": {"b": B}}}, [["a"], ["a..b"]]),
    "set": ({"s": {A}, "t": [{B}]}, [["s"], ["t.0"]]),
    "a set alone": ({A}, [[""]]),
    "a set of tuples": ({"s": {(1, A)}}, [["s.1"]]),
    "a set under an empty key": ({"a": {"": {A}}}, [["a."]]),
    "metadata": (
        {"model": with_metadata({"x": A}, w=B), "y": C},
        [["_metadata.x"], ["model.w"], ["y"]],
    ),
    "metadata in metadata": (
        with_metadata(with_metadata(A, b=B), c=C),
        [["_metadata"], ["_metadata.b"], ["c"]],
    ),
    "metadata under an empty key": ({"": with_metadata([A], w=B)}, [["_metadata.0"], ["w"]]),
    "tied": ({"a": A, "b": [A, B], "c": A}, [["a", "b.0", "c"], ["b.1"]]),
    "the same name twice": ({"a": {"b": A}, "a.b": A}, [["a.b", "a.b"]]),
    "unicode": ({"\U0001f600": {"\x00": A}}, [["\U0001f600.\x00"]]),
    # With the pickle codec
    "surrogates": ({"\ud800": A}, [["\\ud800"]]),
    "a shared dict": ([shared := {"w": A}, shared], [["0.w", "1.w"]]),
    "other keys": ({None: A, (1, "a"): B, 2.5: C}, [["None"], ["(1, 'a')"], ["2.5"]]),
    "a subclass of dict": ([Counter({"w": A})], [["0.w"]]),
    "what is not plain": ({"s": torch.eye(2).to_sparse(), "w": A}, [[], [], ["w"]]),
    "attributes": ([corpus.Point(1.0, A), B], [[], ["1"]]),
}


@pytest.mark.parametrize(("obj", "expected"), NAMED.values(), ids=NAMED)
def test_names_are_paths(obj: Any, expected: list[list[str]]) -> None:
    assert names_of(obj) == expected


@pytest.mark.parametrize(("obj", "expected"), NAMED.values(), ids=NAMED)
def test_names_are_those_that_a_receiver_finds(obj: Any, expected: list[list[str]]) -> None:
    check(obj)
    check_skeleton(obj)


@pytest.mark.parametrize(
    "name", corpus.case_parameters(sorted(corpus.CASES.keys() - {"pretrained"}))
)
def test_names_of_every_object(name: str) -> None:
    obj = corpus.make(name)
    parts = craft.flattened(obj)
    check_skeleton(obj)
    names = Counter(name for row in parts.header.tensors for name in row.names)
    walked = Counter(
        path.encode("utf-8", "backslashreplace").decode()
        for path, tensor in walk(obj)
        if Table().add_tensor(tensor) is not None
    )
    # Tensors in sets and in metadata also have names, but ``walk`` does not visit them.
    assert walked <= names


def check(obj: Any, change: Callable[[list[TensorRow]], None] = lambda rows: None) -> None:
    """Check the names of an object as a receiver does, after a hostile sender's change."""
    parts = craft.flattened(obj)
    rows = parts.header.tensors
    change(rows)
    if parts.header.codec == "tree":
        stand_ins = [Placeholder(n) for n in range(len(rows))]
        check_names(tree_codec.decode(parts.skeleton, stand_ins, depth_limit=256), rows)


def check_skeleton(obj: Any) -> None:
    parts = craft.flattened(obj)
    if parts.header.codec == "tree":
        rows = parts.header.tensors
        check_tree(parts.skeleton, rows, names=True, limits=Limits(), offset=0)


# Random objects


def objects() -> st.SearchStrategy[Any]:
    """Nested containers with few tensors and keys, so that many places share a tensor."""
    tensors = [torch.ones(1) for _ in range(3)]
    keys = st.sampled_from(["", "a", "b", "a.b", ".", 0, 1, -1])
    return st.recursive(
        st.sampled_from(tensors) | st.none(),
        lambda items: (
            st.lists(items, max_size=3)
            | st.lists(items, max_size=3).map(tuple)
            | st.dictionaries(keys, items, max_size=3)
            | st.dictionaries(keys, items, max_size=3).map(OrderedDict)
            | st.builds(with_metadata, items, a=items)
            | st.sets(st.sampled_from(tensors))
        ),
        max_leaves=12,
    )


@given(objects())
def test_a_true_header_passes(obj: Any) -> None:
    check(obj)


@given(objects(), st.data())
def test_any_other_names_are_refused(obj: Any, data: st.DataObject) -> None:
    parts = craft.flattened(obj)
    rows = parts.header.tensors
    if parts.header.codec != "tree" or not rows:
        return
    before = [sorted(row.names) for row in rows]
    row = data.draw(st.sampled_from(rows))
    match data.draw(st.sampled_from(["drop", "add", "other", "swap"])):
        case "drop":
            row.names.pop(data.draw(st.integers(0, len(row.names) - 1)))
        case "add":
            row.names.append(data.draw(st.sampled_from(["", "a", *row.names])))
        case "other":
            row.names[0] = data.draw(st.text(max_size=5))
        case "swap":
            other = data.draw(st.sampled_from(rows))
            row.names[:], other.names[:] = list(other.names), list(row.names)
    change = renamed(*(row.names for row in rows))
    if [sorted(row.names) for row in rows] == before:
        check(obj, change)
    else:
        with pytest.raises(ProtocolError):
            check(obj, change)


# Hostile headers


def renamed(*names: list[str]) -> Callable[[list[TensorRow]], None]:
    def change(rows: list[TensorRow]) -> None:
        for row, own in zip(rows, names, strict=True):
            row.names[:] = own

    return change


NOT_AMONG, FEWER = "not among its names", "that is no path to it"
HOSTILE: dict[str, tuple[list[list[str]], str]] = {
    "missing": ([["a"], []], rf"{NOT_AMONG} .*tensor 1\)"),
    "of a tensor that is nowhere": ([["a"], ["b"], ["x"]], rf"{FEWER} .*tensor 2 \('x'\)"),
    "extra": ([["a", "x"], ["b"]], rf"{FEWER} .*tensor 0 \('a'\)"),
    "repeated": ([["a", "a"], ["b"]], FEWER),
    "swapped": ([["b"], ["a"]], rf"{NOT_AMONG} .*tensor 0 \('b'\)"),
    "as long": ([["a"], ["x"]], NOT_AMONG),
    "longer": ([["a"], ["b."]], NOT_AMONG),
    "empty": ([[""], ["b"]], NOT_AMONG),
}


@pytest.mark.parametrize(("names", "text"), HOSTILE.values(), ids=HOSTILE)
def test_names_that_are_no_paths(names: list[list[str]], text: str) -> None:
    def change(rows: list[TensorRow]) -> None:
        rows += [TensorRow(0, "float32", 0, (), (), 0, []) for _ in names[2:]]
        renamed(*names)(rows)

    with pytest.raises(ProtocolError, match=text):
        check({"a": A, "b": B}, change)


def test_a_sender_that_lies_is_refused_before_its_payload() -> None:
    obj = {"a": A, "b": B}
    parts = craft.flattened(obj)
    renamed(["b"], ["a"])(parts.header.tensors)
    data = craft.compose(parts)
    corpus.assert_same(craft.load(data), obj)
    reached: list[int] = []
    for options in ({"select": "a"}, {"into": {"a": torch.zeros(2)}, "strict": False}):
        with pytest.raises(ProtocolError, match=NOT_AMONG) as caught:
            craft.load(data, **options, progress=lambda done, total: reached.append(done))
        assert caught.value.offset is not None
        assert data[caught.value.offset :].startswith(parts.skeleton)
    assert not reached


def test_rows_that_the_object_has_nowhere_need_no_name() -> None:
    data = craft.message(msgpack.packb([2, "a", [5, 0]]), "tree", [A, B], only("a"))
    corpus.assert_same(craft.load(data, select="a"), {"a": A})


def only(name: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        for row in header.tensors:
            row.names.clear()
        header.tensors[0].names.append(name)

    return change


def test_a_tensor_in_several_tuples_of_a_set() -> None:
    """A set has no order: the receiver's hashes decide which of the paths comes first."""
    for _ in range(30):
        tensor = torch.ones(1)
        check({"s": {(tensor, 1), (2, tensor), (3, 4, tensor)}})


def peak_of(task: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        task()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


MEGABYTE = "k" * 2**20


def test_a_giant_key_above_much_takes_no_memory() -> None:
    rows = craft.flattened([torch.ones(1) for _ in range(2000)]).header.tensors
    for row in rows:
        row.names.clear()
    stand_ins = [Placeholder(n) for n in range(2000)]
    assert peak_of(lambda: check_names({MEGABYTE: [[]] * 2000}, [])) < 2**19
    for obj in ({MEGABYTE: stand_ins}, {"a": {MEGABYTE: stand_ins}}):
        with pytest.raises(ProtocolError, match=NOT_AMONG):
            peak_of(lambda obj=obj: check_names(obj, rows))  # type: ignore[misc]


def test_a_walk_makes_no_path_to_what_is_no_tensor() -> None:
    assert peak_of(lambda: list(walk({MEGABYTE: [0] * 200}))) < 2**23


# Rows by name


def test_rows_by_name() -> None:
    header = craft.flattened({"a": A, "b": {"c": B, "d": A}}).header
    assert list(rows_by_name(header.tensors).items()) == [("a", 0), ("b.d", 0), ("b.c", 1)]
    assert rows_by_name([]) == {}
    assert rows_by_name(craft.flattened({"a": {"b": A}, "a.b": A}).header.tensors) == {"a.b": 0}


@pytest.mark.parametrize("obj", [{"a": {"b": A}, "a.b": B}, {1: A, "1": B}, {"s": {A, B}}], ids=str)
def test_a_name_that_two_rows_have(obj: Any) -> None:
    header = craft.flattened(obj).header
    for read in (lambda: rows_by_name(header.tensors), lambda: specs_of(header)):
        with pytest.raises(MismatchError, match="tensors 0 and 1 have the same name") as caught:
            read()
        assert str(caught.value.entry).startswith("tensor 1 (")
    corpus.assert_same(craft.round_trip(obj), obj)


def test_the_error_about_a_giant_name_is_short() -> None:
    header = craft.flattened({MEGABYTE: {"b": A}, MEGABYTE + ".b": B}).header
    with pytest.raises(MismatchError) as caught:
        rows_by_name(header.tensors)
    assert len(str(caught.value)) < 2000


# Tensor specs


def test_specs_of_a_header() -> None:
    specs = specs_of(craft.flattened({"a": torch.ones(2, 3), "b": [A.int(), A]}).header)
    assert list(specs.items()) == [
        ("a", TensorSpec((2, 3), torch.float32)),
        ("b.0", TensorSpec((1,), torch.int32)),
        ("b.1", TensorSpec((1,), torch.float32)),
    ]


def test_a_dtype_that_torch_does_not_have() -> None:
    header = craft.flattened({"a": A}).header
    header.tensors[0].dtype = "float33"
    with pytest.raises(ProtocolError, match="float33"):
        specs_of(header)


def test_a_spec() -> None:
    spec = TensorSpec((2, 3), torch.float64)
    assert spec == TensorSpec.of(torch.empty(2, 3, dtype=torch.float64, device="meta"))
    assert spec != TensorSpec((3, 2), torch.float64)
    assert len({spec, TensorSpec((2, 3), torch.float64)}) == 1
    assert spec.nbytes == 48
    assert TensorSpec((), torch.bool).nbytes == 1
    assert TensorSpec((2**40, 0), torch.int8).nbytes == 0
    # The size of all elements that the expanded tensor shows.
    assert TensorSpec.of(A.expand(1000)).nbytes == 4000


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        ([2], torch.float32, TypeError),
        (2, torch.float32, TypeError),
        ((2.0,), torch.float32, TypeError),
        ((True,), torch.float32, TypeError),
        (("2",), torch.float32, TypeError),
        ((2,), "float32", TypeError),
        ((2,), float, TypeError),
        ((2, -1), torch.float32, ValueError),
    ],
)
def test_what_is_no_spec(shape: Any, dtype: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        TensorSpec(shape, dtype)


def test_a_size_of_torch_is_a_shape() -> None:
    assert TensorSpec(A.shape, A.dtype) == TensorSpec((1,), torch.float32)


# Walks


def test_a_walk_follows_the_order_of_the_object() -> None:
    obj = {"z": [A, {"y": B}], "a": (C, 1, {A}), "m": OrderedDict(k=B)}
    found = [("z.0", A), ("z.1.y", B), ("a.0", C), ("m.k", B)]
    assert [(path, id(tensor)) for path, tensor in walk(obj)] == [(p, id(t)) for p, t in found]


def test_a_walk_finds_every_place_of_a_container() -> None:
    cyclic: dict[str, Any] = {"a": A}
    cyclic["self"] = [cyclic]
    assert [path for path, _ in walk(cyclic)] == ["a"]
    shared = [A]
    assert [path for path, _ in walk({"x": {"y": shared}, "z": shared})] == ["x.y.0", "z.0"]
    assert [path for path, _ in walk([A, A])] == ["0", "1"]
    inner = (A, {"b": B})
    outer = {"": inner, "c": [inner]}
    paths = [path for path, _ in walk([outer, {"x": outer}])]
    below = [".0", ".1.b", "c.0.0", "c.0.1.b"]
    assert sorted(paths) == sorted(f"{top}.{path}" for top in ("0", "1.x") for path in below)


def test_a_walk_ends_where_containers_lead_back_to_themselves() -> None:
    cyclic: dict[str, Any] = {"a": A, "shared": (shared := [B])}
    cyclic["self"] = [cyclic, shared]
    above = [cyclic, shared]
    found = ["0.a", "0.self.1.0", "0.shared.0", "1.0"]
    assert sorted(path for path, _ in walk(above)) == found


def doubled(levels: int, bottom: Any) -> Any:
    for _ in range(levels):
        bottom = [bottom, bottom]
    return bottom


def test_a_walk_with_far_too_many_places_names_the_first_ones() -> None:
    assert len(list(walk(doubled(10, [A, B])))) == 2048
    assert [path for path, _ in walk(doubled(100, [A, B]))] == [
        ".".join("0" * 101),
        "0." * 100 + "1",
    ]
    # Containers without tensors do not count.
    assert len(list(walk([doubled(100, [1]), *[{"w": A}] * 3]))) == 3
    # The total length of paths is limited, too.
    shared = {MEGABYTE: A}
    assert len(list(walk([shared] * 8))) == 8
    assert [path for path, _ in walk([shared] * 20)] == [f"0.{MEGABYTE}"]


class Made(Mapping[str, Any]):
    """A mapping that makes new items on every access."""

    def __getitem__(self, key: str) -> Any:
        return [A.clone(), {"x": A.clone()}]

    def __iter__(self) -> Iterator[str]:
        return iter("abc")

    def __len__(self) -> int:
        return 3


def test_a_walk_through_other_mappings() -> None:
    obj = {
        "user": UserDict({"a": A}),
        "chain": ChainMap[str, Any]({"b": B}, {"c": [C]}),
        "fixed": MappingProxyType({"d": A}),
        "parameters": torch.nn.ParameterDict({"e": B}),
        "module": torch.nn.Linear(1, 1),
        "pair": Pair(A, {"f": B}),
        "made": Made(),
    }
    paths = {path for path, _ in walk(obj)}
    made = {f"made.{key}.{path}" for key in "abc" for path in ("0", "1.x")}
    assert paths - made == {
        *("user.a", "chain.b", "chain.c.0", "fixed.d", "parameters.e", "pair.0", "pair.1.f")
    }
    assert made < paths
    assert len(list(walk([made_ := Made(), made_]))) == 12


def test_a_walk_through_a_deep_object() -> None:
    deep: Any = A
    for _ in range(5000):
        deep = [deep]
    ((path, _),) = walk(deep)
    assert path == ".".join("0" * 5000)


def test_names_of_a_message() -> None:
    obj = {"model": with_metadata({"": {"version": 1}}, w=A), "steps": [B]}

    async def names() -> dict[str, TensorSpec]:
        async with aiotorchio.StreamReader(aiotorchio.iter_bytes(obj)).open() as message:
            return dict(message.tensors)

    assert anyio.run(names) == {"model.w": TensorSpec.of(A), "steps.0": TensorSpec.of(B)}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("a", "a"), (5, "5"), (True, "True"), (None, "None"), (1.5, "1.5"), (b"a", "b'a'")),
        *(((1, "a"), "(1, 'a')"), (torch.float32, "torch.float32"), ("a" * 10_000, "a" * 10_000)),
        *((torch.ones(2), "Tensor"), (torch.UntypedStorage(1), "UntypedStorage")),
        *(((1, (2, 3)), "tuple"), ((1,) * 17, "tuple"), (frozenset([1]), "frozenset")),
        *((("a" * 2000,), "tuple"), (b"a" * 2000, "bytes"), (10**5000, "int")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_text_of_a_key_is_short(key: Any, text: str) -> None:
    assert key_text(key) == text


def test_a_key_that_cannot_be_shown(tmp_path: Path) -> None:
    unprintable = torch.ones(1, dtype=torch.uint8).view(torch_dtype("uint7"))
    obj = {unprintable: [torch.ones(1)], "w": torch.zeros(1)}
    aiotorchio.save(obj, tmp_path / "file")
    loaded = aiotorchio.load(tmp_path / "file", select="w")
    assert [type(key) for key in loaded] == [torch.Tensor, str]
