"""The tensors that ``select`` keeps, and the object after the others were removed or replaced."""

from __future__ import annotations

import tracemalloc
from collections import ChainMap, OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from aiotorchio import LimitExceeded, MismatchError, ProtocolError
from aiotorchio.graph import select as select_module
from aiotorchio.graph.select import revise, selected
from aiotorchio.table.names import walk
from tests.support import corpus

NAMES = ["", "a", "a.b", "encoder.0.weight", "encoder.10.bias", "head[0]", "x*", "l\n.w", "A"]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("a", {"a"}),
        ("", {""}),
        (["a", "a.b", "a"], {"a", "a.b"}),
        (iter(["a"]), {"a"}),
        ({"a": 1}, {"a"}),
        ([], set()),
        ("*", set(NAMES)),
        ("a*", {"a", "a.b"}),
        ("encoder.*", {"encoder.0.weight", "encoder.10.bias"}),
        ("*.weight", {"encoder.0.weight"}),
        ("encoder.?.*", {"encoder.0.weight"}),
        ("encoder.[0-9].*", {"encoder.0.weight"}),
        ("[!a]", {"A"}),
        ("l*w", {"l\n.w"}),
        # A name comes before a pattern.
        ("head[0]", {"head[0]"}),
        ("head[[]0]", {"head[0]"}),
        ("x*", {"x*"}),
        (["a", "*.bias"], {"a", "encoder.10.bias"}),
        (lambda name: name.count(".") == 2, {"encoder.0.weight", "encoder.10.bias"}),
        (lambda name: name, set(NAMES) - {""}),
        (lambda name: None, set()),
        ({"a", "A"}.__contains__, {"a", "A"}),
    ],
)
def test_selected(select: Any, expected: set[str]) -> None:
    assert selected(select, NAMES) == expected


def test_patterns_are_compared_with_names_that_begin_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the work is the caller's patterns times the peer's names, without a bound."""
    names = [f"{layer}.{n}" for layer in ("abc", "abd", "x") for n in range(100)]
    compared: list[str] = []

    def noted(name: str) -> str:
        compared.append(name)
        return name

    monkeypatch.setattr(select_module, "_comparable", noted)
    monkeypatch.setattr(select_module, "_SORTED_AT_ONCE", 7)
    assert selected([f"abc.{n}*" for n in range(10, 20)], names) == {
        f"abc.{n}" for n in range(10, 20)
    }
    assert len(compared) == 10
    compared.clear()
    assert selected(names, names) == set(names)
    assert not compared
    # Equal patterns count once.
    assert len(selected(["abd*"] * 3, names)) == len(compared) == 100


def test_a_name_that_is_too_long_for_patterns() -> None:
    names = ["a" * 2**16, "b" * (2**16 + 1)]
    assert selected("a*", names) == {names[0]}
    assert selected(names[1], names) == {names[1]}
    with pytest.raises(LimitExceeded, match="65537 characters"):
        selected("*b", names)


def test_names_that_come_from_an_iterator() -> None:
    assert selected(["a*", "A"], iter(NAMES)) == {"a", "a.b", "A"}
    assert selected(lambda name: name == "a", iter(NAMES)) == {"a"}


@pytest.mark.parametrize(
    "select", ["b", "B*", "encoder", "head[1]", "a.b.", ["a", "b"], [".*", "b"]]
)
def test_what_selects_nothing_is_an_error(select: Any) -> None:
    with pytest.raises(MismatchError, match=r"not in the message: .*'(b|B\*|encoder|head.*|a.b.)'"):
        selected(select, NAMES)


def test_all_that_selects_nothing_is_in_one_error() -> None:
    with pytest.raises(MismatchError) as caught:
        selected(["a", "b", "c*"], NAMES)
    assert str(caught.value) == "selected, but not in the message: 'b', 'c*'"


def test_the_error_of_a_predicate_is_its_own() -> None:
    def fail(name: str) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        selected(fail, NAMES)


# Changing an object with ``revise``

A, B, C, D = (torch.full((1,), float(n)) for n in range(4))


class Pair(NamedTuple):
    first: Any
    second: Any


def leaving_out(*paths: str) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    return lambda path, tensor: None if path in paths else tensor


def revise_all(obj: Any, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Revise an object whose message has all names that a sender must give."""
    revise(obj, {path for path, _ in walk(obj)}, change)


def test_what_is_left_out_of_dicts() -> None:
    obj = {"a": A, "b": OrderedDict(c=B, d=C), "e": [{"f": D}], "n": 1}
    revise_all(obj, leaving_out("a", "b.d", "e.0.f"))
    corpus.assert_same(obj, {"b": OrderedDict(c=B), "e": [{}], "n": 1})


def test_what_can_be_left_out_of_dicts_only() -> None:
    obj = [A, (B, C), {D}, Pair(A, B)]
    revise_all(obj, lambda path, tensor: None)
    corpus.assert_same(obj, [A, (B, C), {D}, Pair(A, B)])
    revise_all(A, lambda path, tensor: None)


def test_what_comes_in_the_place_of_a_tensor() -> None:
    obj: Any = {"a": A, "b": [A, (A,)], "": {"": A}}
    revise_all(obj, lambda path, tensor: {"a": B, "b.0": C, "b.1.0": D, "": D}[path])
    assert obj["a"] is B
    assert obj["b"][0] is C
    assert obj[""][""] is D
    assert obj["b"][1][0] is D


def test_what_has_no_name_stays() -> None:
    obj = {"a": A, "b": B, "set": {C}, "n": None}
    revise(obj, {"a", "set"}, lambda path, tensor: None)
    corpus.assert_same(obj, {"b": B, "set": {C}, "n": None})
    revise(obj, set(), lambda path, tensor: None)
    assert obj["b"] is B


def paths_of(obj: Any) -> dict[str, int]:
    paths: dict[str, int] = {}

    def note(path: str, tensor: torch.Tensor) -> torch.Tensor:
        assert path not in paths
        paths[path] = id(tensor)
        return tensor

    revise_all(obj, note)
    return paths


def test_each_container_is_entered_once() -> None:
    cyclic: dict[str, Any] = {"a": A}
    cyclic["self"] = [cyclic]
    assert paths_of(cyclic) == {"a": id(A)}


SHARED: dict[str, Callable[[Any], Any]] = {
    "side by side": lambda shared: {"a": shared, "b": shared},
    "in a list": lambda shared: [shared, [shared], shared],
    "first deep, then not": lambda shared: {"a": {"b": [shared]}, "c": shared},
    "in what is shared": lambda shared: [[inner := {"a": shared}, shared], inner, (inner,)],
    "in other mappings": lambda shared: [UserDict({"a": shared}), ChainMap({}, {"b": shared})],
    "in a tuple": lambda shared: ({"x": shared}, shared, {"y": shared}),
}


@pytest.mark.parametrize("hold", SHARED.values(), ids=SHARED)
def test_paths_are_the_names_that_the_sender_gave(hold: Callable[[Any], Any]) -> None:
    """A tensor in several places has a name for each; ``select`` and ``into`` use these names."""
    obj = hold({"w": A, "v": [B]})
    assert paths_of(obj) == {path: id(tensor) for path, tensor in walk(obj)}


def test_what_is_left_out_at_all_places_goes_and_all_else_stays() -> None:
    shared = {"a": A, "b": B, "c": C, "d": (D, {"e": A})}
    obj: Any = {"x": shared, "y": [shared]}
    changed = {"x.a": None, "y.0.a": A, "x.b": None, "y.0.b": None, "x.c": A, "y.0.c": B}
    deep = {"x.d.0": A, "x.d.1.e": None, "y.0.d.0": B, "y.0.d.1.e": None}
    revise_all(obj, lambda path, tensor: (changed | deep)[path])
    assert obj["x"] is obj["y"][0] is shared
    assert shared["a"] is A and "b" not in shared and shared["c"] is A
    pair: Any = shared["d"]
    assert pair[0] is A and pair[1] == {}


def test_names_of_the_first_place_alone_count_for_all() -> None:
    """The header has names for the first place only."""
    shared = {"a": A, "b": B}
    obj: Any = {"x": shared, "y": [shared]}
    revise(obj, {"x.a", "x.b"}, leaving_out("x.a"))
    assert obj["x"] is obj["y"][0] is shared and shared == {"b": B}


def test_other_mappings() -> None:
    fixed = MappingProxyType({"a": A})
    parameters = torch.nn.ParameterDict({"a": A, "b": B})
    obj: dict[str, Any] = {
        "user": UserDict({"a": A, "b": B}),
        "chain": ChainMap[str, Any]({"a": A}, {"a": B, "b": (B,)}, {"c": C, "d": D}),
        "fixed": fixed,
        "parameters": parameters,
    }
    changed = {"user.b": C, "chain.b.0": A, "chain.d": A, "parameters.b": (p := parameters["b"])}
    revise_all(obj, lambda path, tensor: changed.get(path))
    assert obj["user"].data == {"b": C}
    maps = obj["chain"].maps
    assert maps[0] == {} and maps[1].keys() == {"b"} and maps[1]["b"][0] is A
    assert maps[2] == {"d": A}
    # A ``MappingProxyType`` cannot change: its tensor stays as it was received.
    assert obj["fixed"] is fixed and fixed["a"] is A
    assert list(parameters) == ["b"] and parameters["b"] is p


def test_a_peer_cannot_make_places_without_end() -> None:
    """A hundred levels have 2**100 places, but a message has few names."""
    obj: Any = {"a": A}
    for _ in range(100):
        obj = [obj, obj]
    first = "0." * 100 + "a"
    changed: list[str] = []

    def note(path: str, tensor: torch.Tensor) -> torch.Tensor:
        changed.append(path)
        return B

    revise(obj, {first, "1." * 100 + "a"}, note)
    assert changed == [first]
    for _ in range(100):
        obj = obj[0]
    assert obj["a"] is B


def test_shared_containers_under_giant_keys_take_no_memory() -> None:
    shared = [A]
    obj = {GIANT: {n: shared for n in range(1000)}, "a": {GIANT: shared}}
    name = f"{GIANT}.0.0"
    assert peak_of(lambda: revise(obj, {name}, leaving_out())) < 2**23


def test_a_deep_object() -> None:
    deep: Any = {"a": A}
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(LimitExceeded, match="too deep"):
        revise_all(deep, lambda path, tensor: None)


GIANT = "k" * 2**20


def peak_of(task: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        task()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("much", [[0] * 200, [[] for _ in range(200)], [A] * 200], ids=range(3))
def test_a_giant_key_above_much_takes_no_memory(much: list[Any]) -> None:
    """A hostile sender could put a million entries under such a key."""
    obj = {GIANT: much, "a": A}
    assert peak_of(lambda: revise(obj, {"a", "b"}, leaving_out("a"))) < 2**23
    assert obj.keys() == {GIANT}


def test_many_tensors_under_a_giant_key_take_no_more_time_than_their_names_would() -> None:
    joined = 0

    class Names(set[str]):
        def __contains__(self, name: object) -> bool:
            nonlocal joined
            joined += 1
            return super().__contains__(name)

    obj = {GIANT: {n: A for n in range(100, 1000)}}
    names = Names({"x" * (len(GIANT) + 4)})
    with pytest.raises(ProtocolError, match="other places than their names say"):
        revise(obj, names, leaving_out())
    assert joined < 10
