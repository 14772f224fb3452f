"""The tree codec: objects that it accepts, and its errors.

Hostile skeletons are in ``support/hostile.py``.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import aiotorchio
from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.codecs.tree import size_estimate
from aiotorchio.codecs.tree.precheck import check_size
from aiotorchio.errors import AiotorchioError, LimitExceeded, ProtocolError
from aiotorchio.table.table import Table
from aiotorchio.wire import bounds
from aiotorchio.wire.bounds import Bounds
from tests.support import corpus


class Pair(NamedTuple):
    first: int
    second: int


class Name(str):
    pass


def trees() -> st.SearchStrategy[Any]:
    keys: st.SearchStrategy[Any] = st.text() | st.integers(-(2**63), 2**64 - 1)
    atoms: st.SearchStrategy[Any] = st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers()),
        *(st.text(), st.binary(), st.sampled_from([torch.float32, torch.device("cpu")])),
        st.lists(st.integers(0, 2**63 - 1)).map(torch.Size),
    )
    return st.recursive(
        atoms,
        lambda items: (
            st.lists(items)
            | st.lists(items).map(tuple)
            | st.dictionaries(keys, items)
            | st.dictionaries(keys, items).map(OrderedDict)
            | st.sets(st.integers() | st.text() | st.binary())
        ),
        max_leaves=20,
    )


def decode(skeleton: bytes, tensors: Any = (), depth_limit: int = 256) -> Any:
    return tree_codec.decode(skeleton, tensors, depth_limit=depth_limit, offset=100)


@given(trees())
def test_round_trip(obj: Any) -> None:
    corpus.assert_same(decode(tree_codec.encode(obj, Table())), obj)


@given(trees(), st.data())
def test_any_damage_is_an_error_or_another_object(obj: Any, data: st.DataObject) -> None:
    skeleton = bytearray(tree_codec.encode(obj, Table()))
    at = data.draw(st.integers(0, len(skeleton) - 1))
    skeleton[at] ^= data.draw(st.integers(1, 255))
    try:
        decode(bytes(skeleton))
    except AiotorchioError as error:
        assert (error.entry, error.offset) == ("skeleton", 100)


def test_the_bytes_are_those_of_the_format() -> None:
    obj = {"a": [1, (2.5, None)], 3: OrderedDict(b=torch.ones(1)), "s": {b"x"}, "c": 1j}
    assert msgpack.unpackb(tree_codec.encode(obj, Table()), strict_map_key=False) == [
        *(2, "a", [0, 1, [1, 2.5, None]]),
        *(3, [3, [], "b", [5, 0]], "s", [4, b"x"], "c", [6, 0.0, 1.0]),
    ]


@pytest.mark.parametrize(
    "obj",
    [
        *(Pair(1, 2), Name("x"), bytearray(b"x"), frozenset(), Counter(), range(3), object(), int),
        *({None: 1}, {True: 1}, {1.5: 1}, {(1,): 1}, {2**64: 1}, {Name("a"): 1}, {Pair(1, 2)}),
        *("\ud800", {"\ud800": 1}, [b"", "a\udfff"], torch.strided, torch.per_tensor_affine),
        torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.qint8),
    ],
    # The same id in every process, because pytest-xdist compares the ids of its workers.
    ids=lambda obj: "object()" if type(obj) is object else repr(obj),
)
def test_what_is_left_to_pickle(obj: object) -> None:
    with pytest.raises(tree_codec.NotATreeError):
        tree_codec.encode(obj, Table())


NO_ROW = "that is sparse, quantized or nested, of a subclass, or has Python attributes"


@pytest.mark.parametrize(
    ("obj", "why"),
    [
        ({"a": [1, {2}, {3: frozenset()}]}, "'a.2.3' is a frozenset"),
        ([x := [1], {"b": x}], "'1.b' is a list that is in another place, too"),
        ({"a": {None: 1}}, "'a' is a dict with a NoneType as key"),
        ({"a": OrderedDict(b={(1,): 2})}, "'a.b' is a dict with a tuple as key"),
        ({"s": torch.eye(2).to_sparse()}, f"'s' is a Tensor {NO_ROW}"),
        ((torch.strided,), "'0' is a layout"),
        ("\ud800", "it has a text that UTF-8 cannot carry"),
        (Counter(), "a Counter"),
    ],
)
def test_why_an_object_is_left_to_pickle(obj: object, why: str) -> None:
    with pytest.raises(tree_codec.NotATreeError) as caught:
        tree_codec.encode(obj, Table())
    assert str(caught.value) == why
    file = io.BytesIO()
    with pytest.raises(ValueError, match="allow_pickle is False, and the object needs pickle: "):
        aiotorchio.save(obj, file, allow_pickle=False)
    assert not file.getvalue()


def test_shared_containers_are_left_to_pickle() -> None:
    tensor = torch.ones(1)
    for shared in ([1], {1: 2}, {1}, (1, [2]), (tensor,), OrderedDict()):
        with pytest.raises(tree_codec.NotATreeError, match="another place"):
            tree_codec.encode([shared, shared], Table())
    for unseen in ((1, "a", None), (), torch.ones(1), "x", 2**100):
        assert tree_codec.encode([unseen, unseen], Table())


def test_depth() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    skeleton = tree_codec.encode(deep, Table())
    with pytest.raises(tree_codec.NotATreeError, match="nested deeper than 100 levels"):
        tree_codec.encode([deep], Table())
    corpus.assert_same(decode(skeleton, depth_limit=100), deep)
    with pytest.raises(LimitExceeded, match="99 levels"):
        decode(skeleton, depth_limit=99)


def test_a_tensor_of_a_dtype_torch_lacks() -> None:
    with pytest.raises(ProtocolError, match="float33"):
        decode(msgpack.packb([9, "float33"]))


def test_growth_walks_over_every_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Any] = [b"\x80" * 200, b"\x80" * 300, b"\x80" * 70_000, "\u0410" * 10]
    texts += ["\u0410" * 100, "\u0410" * 200, "\u0410" * 40_000]
    numbers = [1.5, -(2**7), -(2**15), -(2**31), -(2**40), 2**7, 2**8, 2**16, 2**32, 2**63]
    constants = [None, True, False, 5, -1]
    packer = msgpack.Packer(strict_types=True)
    data = packer.pack([texts, numbers, constants, [[]] * 16, [0] * 70_000])
    expected = (
        size_estimate._NESTED_NBYTES * (6 + 16)
        + sum(size_estimate._TEXT_NBYTES + 4 * len(packer.pack(text)) for text in texts)
        + size_estimate._NUMBER_NBYTES * len(numbers)
        + size_estimate._CONSTANT_NBYTES * (len(constants) + 70_000)
    )
    # The headers of texts are counted in ``len``, and Python caches -1.
    assert abs(size_estimate.estimate_size(data)[0] - expected) < 300
    monkeypatch.setattr(bounds, "BOUNDS", Bounds(memory_floor=0))
    check_size(b"\xc6\x00\x00\x10\x00" + b"\x90" * 4096, 256)
    with pytest.raises(LimitExceeded):
        check_size(b"\xdc\x10\x00" + b"\x90" * 4096, 256)
    with pytest.raises(ProtocolError):
        check_size(b"\xc6\x00\x00\x20\x00" + b"\x90" * 4096, 256)


@pytest.mark.parametrize(
    "head", ["81", "de0001", "df00000001", "d401", "d8", "c70101", "c8000101", "c90000000101"]
)
def test_maps_and_extensions_are_refused_before_they_are_built(head: str) -> None:
    data = b"\x92\x00" + bytes.fromhex(head) + b"\x01" * 18
    with pytest.raises(ProtocolError, match="a map or an extension"):
        tree_codec.decode(data, [], depth_limit=256)
