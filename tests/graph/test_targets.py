"""Which tensor is received into which target, and the one error that lists all misfits.

The match needs only the header; tests compare its result with the expected target tensors.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from aiotorchio import MismatchError, ProtocolError
from aiotorchio.graph.modules import has_memory
from aiotorchio.graph.targets import match_targets, target_tensors
from aiotorchio.wire.header import Header
from tests.support import corpus, craft


def header_of(obj: object) -> Header:
    return craft.flattened(obj).header


def matched(
    obj: object,
    into: Any,
    *,
    wanted: set[str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> dict[str, torch.Tensor]:
    destinations = target_tensors(into)
    header = obj if isinstance(obj, Header) else header_of(obj)
    names = destinations.keys() | {name for row in header.tensors for name in row.names}
    return match_targets(
        header,
        destinations,
        selection=names if wanted is None else wanted,
        all_selected=wanted is None,
        strict=strict,
        cast=cast,
    ).tensors


def misfits(obj: object, into: Any, **options: Any) -> dict[str, str]:
    with pytest.raises(MismatchError) as caught:
        matched(obj, into, **options)
    assert caught.value.entry == "header"
    assert (caught.value.missing, caught.value.unexpected) == ((), ())
    for name, why in caught.value.misfits.items():
        assert f"does not fit: {name}: {why}" in str(caught.value)
    return caught.value.misfits


# Target tensors


def assert_are(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check for the same tensor objects in the same order."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name] is tensor, name


A, B, C = torch.zeros(1), torch.zeros(2), torch.zeros(3)


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType, UserDict])
def test_a_mapping(kind: Any) -> None:
    assert_are(target_tensors(kind({"a": A, "b.c": B})), {"a": A, "b.c": B})


def test_a_nested_mapping() -> None:
    into = {"model": OrderedDict(w=A), "steps": [B, (C,)], "epoch": 3, 7: {"x": A}, "none": None}
    expected = {"model.w": A, "steps.0": B, "steps.1.0": C, "7.x": A}
    assert_are(target_tensors(into), expected)


def test_an_object_that_is_a_tensor_has_the_empty_name() -> None:
    assert_are(target_tensors({"": A}), {"": A})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.tied = nn.Linear(2, 3, bias=False)
        self.tied.weight = self.encoder.weight
        self.none = nn.Linear(2, 2, bias=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.plain = torch.zeros(5)


def test_a_module() -> None:
    model = Model()
    expected = {
        "mean": model.mean,
        "encoder.weight": model.encoder.weight,
        "encoder.bias": model.encoder.bias,
        "tied.weight": model.encoder.weight,
        "none.weight": model.none.weight,
    }
    assert_are(target_tensors(model), expected)  # type: ignore[arg-type]
    assert isinstance(target_tensors(model)["encoder.weight"], nn.Parameter)


def test_a_module_in_a_mapping() -> None:
    model = nn.Linear(2, 3)
    into = {"model": model, "more": MappingProxyType({"x": A, "y": {"z": model}})}
    expected = {"model.weight": model.weight, "model.bias": model.bias, "more.x": A}
    expected |= {"more.y.z.weight": model.weight, "more.y.z.bias": model.bias}
    assert_are(target_tensors(into), expected)


def shared() -> object:
    shared = {"w": torch.zeros(1)}
    return {"a": shared, "b": [shared], "c": shared}


def cyclic() -> object:
    cyclic: dict[str, Any] = {"t": torch.zeros(1), "child": {}}
    cyclic["child"]["parent"] = cyclic
    return cyclic


@pytest.mark.parametrize("make", [shared, cyclic])
def test_what_is_in_several_places_has_the_names_that_its_sender_gives(
    make: Callable[[], object],
) -> None:
    """An object can be received into an equal object."""
    destinations = target_tensors(make())
    assert list(matched(make(), make())) == list(destinations)
    assert len(set(map(id, destinations.values()))) == 1


class WithExtraState(Model):
    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("nobody asked for it")


def test_extra_state_of_modules_is_no_destination() -> None:
    outer = nn.Sequential(WithExtraState())
    assert "0._extra_state" in outer.state_dict()
    assert not any("_extra_state" in name for name in target_tensors(outer))
    assert list(target_tensors(WithExtraState())) == list(target_tensors(Model()))


def test_a_lazy_module_that_is_not_lazy_any_more() -> None:
    module = nn.LazyLinear(3)
    module(torch.zeros(1, 2))
    assert_are(target_tensors(module), {"weight": module.weight, "bias": module.bias})


@pytest.mark.parametrize("into", [None, 5, [A], (A,), {A}, A, nn.Linear, "text"], ids=repr)
def test_what_is_no_destination(into: Any) -> None:
    with pytest.raises(TypeError, match="into must be a mapping"):
        target_tensors(into)


@pytest.mark.parametrize("into", [{"a": {"b": A}, "a.b": B}, {1: A, "1": B}], ids=str)
def test_two_destinations_of_one_name(into: Any) -> None:
    with pytest.raises(ValueError, match=r"two tensors named '(a\.b|1)'"):
        target_tensors(into)


def test_one_destination_with_one_name_twice() -> None:
    assert_are(target_tensors({"a": {"b": A}, "a.b": A}), {"a.b": A})


# Tensors that fit


def test_what_fits_is_found_by_name() -> None:
    into = {"b": torch.zeros(2), "a": {"x": torch.zeros(2, 3)}}
    found = matched({"a": {"x": torch.ones(2, 3)}, "b": torch.ones(2), "n": 1}, into)
    assert_are(found, {"b": into["b"], "a.x": into["a"]["x"]})  # type: ignore[dict-item,index]


class Special(nn.Parameter):
    """A subclass of ``Parameter`` with attributes, as many libraries have."""


FITTING = {
    "parameter": nn.Parameter(torch.zeros(2, 3)),
    "parameter subclass": Special(torch.zeros(2, 3)),
    "subclass": torch.zeros(2, 3).as_subclass(corpus.Tagged),
    "non-leaf": nn.Parameter(torch.zeros(2, 3)) * 2,
    "transposed": torch.zeros(3, 2).t(),
    "every second": torch.zeros(4, 3)[::2],
    "a part": torch.zeros(9, 9)[3:5, 4:7],
    "buffer": nn.Buffer(torch.zeros(2, 3)),
}


@pytest.mark.parametrize("tensor", FITTING.values(), ids=FITTING)
def test_plain_tensors_of_every_kind_and_layout_fit(tensor: torch.Tensor) -> None:
    vars(tensor)["weight_loader"] = lambda: None
    assert has_memory(tensor)
    assert matched({"w": torch.ones(2, 3)}, {"w": tensor})["w"] is tensor


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)], ids=str)
def test_shapes_of_few_elements_fit(shape: tuple[int, ...]) -> None:
    matched({"w": torch.ones(shape)}, {"w": torch.zeros(shape)})


def test_a_tensor_without_elements_has_none_that_overlap() -> None:
    matched({"w": torch.ones(3, 0)}, {"w": torch.zeros(1, 0).expand(3, 0)})


def test_any_layout_of_the_sender_fits() -> None:
    for obj in (torch.ones(1, 3).expand(2, 3), torch.ones(4).as_strided((2, 3), (1, 1))):
        matched({"w": obj}, {"w": torch.zeros(2, 3)})
    complex_ = torch.ones(2, dtype=torch.complex64)
    for bits in (complex_.conj(), complex_.conj().imag):
        matched({"w": bits}, {"w": torch.zeros(2, dtype=bits.dtype)})


def test_both_flags_of_the_sender_fit() -> None:
    for obj in (nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)):
        matched({"w": obj}, {"w": torch.zeros(2)})


# Tensors that do not fit


NO_PLACE: dict[str, tuple[torch.Tensor, str]] = {
    "another shape": (torch.zeros(3), r"shape \[2\] in the message, \[3\] in the target"),
    "another number of dimensions": (torch.zeros(2, 1), r"\[2\] .* \[2, 1\]"),
    "a scalar": (torch.tensor(0.0), r"\[2\] .* \[\]"),
    "another dtype": (torch.zeros(2, dtype=torch.float64), r"float32 in .*float64 in .*cast=True"),
    "meta": (torch.zeros(2, device="meta"), "on meta, without memory"),
    "coo": (torch.zeros(2).to_sparse(), "a Tensor of layout torch.sparse_coo in the target"),
    "quantized": (
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        "quantized Tensor .* in",
    ),
    "nested": (torch.nested.nested_tensor([torch.zeros(1), torch.zeros(1)]), "nested Tensor in"),
    "jagged": (
        torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged),
        "but a NestedTensor",
    ),
    "wrapper": (corpus.Wrapper(torch.zeros(2)), "but a Wrapper"),
    "lazy parameter": (nn.parameter.UninitializedParameter(), "but a UninitializedParameter"),
    "lazy buffer": (nn.parameter.UninitializedBuffer(), "but a UninitializedBuffer"),
    "expanded": (torch.zeros(1).expand(2), "overlap"),
    "windows": (torch.zeros(3).as_strided((2,), (0,)), "overlap"),
    "neg": (torch.zeros(2, dtype=torch.complex64).conj().imag, "negative view: resolve it"),
}


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(("tensor", "text"), NO_PLACE.values(), ids=NO_PLACE)
def test_tensors_that_are_no_place(tensor: torch.Tensor, text: str, cast: bool) -> None:
    if cast and "cast=True" in text:
        matched({"w": torch.ones(2)}, {"w": tensor}, cast=True)
        return
    with pytest.raises(MismatchError, match=text) as caught:
        matched({"w": torch.ones(2)}, {"w": tensor}, cast=cast)
    assert list(caught.value.misfits) == ["w"]


def test_a_tensor_whose_memory_is_gone_is_no_place() -> None:
    """Sharded training frees the memory of parameters, but keeps their shape."""
    tensors = [torch.zeros(2), torch.zeros(4)[2:]]
    for tensor, nbytes in zip(tensors, (0, 12), strict=True):
        storage = tensor.untyped_storage()
        before = storage.nbytes()
        storage.resize_(nbytes)
        try:
            with pytest.raises(MismatchError, match="memory") as caught:
                matched({"w": torch.ones(2)}, {"w": tensor})
        finally:
            # Otherwise a traceback that shows this tensor would read freed memory.
            storage.resize_(before)
        assert list(caught.value.misfits) == ["w"]


def test_a_conjugate_view_is_no_place() -> None:
    complex_ = torch.zeros(2, dtype=torch.complex64)
    found = misfits({"w": complex_}, {"w": complex_.conj()})
    assert "resolve it first" in found["w"]
    matched({"w": complex_}, {"w": complex_.conj().resolve_conj()})


def test_windows_that_overlap_are_no_place() -> None:
    found = misfits({"w": torch.ones(4, 3)}, {"w": torch.zeros(10).as_strided((4, 3), (2, 1))})
    assert "overlap" in found["w"]


def test_a_dtensor_is_no_place() -> None:
    with corpus.process_group():
        into: Any = corpus.dtensor()
        assert "but a DTensor" in misfits({"d": torch.ones(4, 2)}, into)["d"]


def test_what_is_on_meta_at_the_sender_has_no_bytes() -> None:
    found = misfits({"w": torch.empty(2, device="meta")}, {"w": torch.zeros(2)})
    assert found == {"w": "the sender had it on meta, without bytes"}
    meta = torch.empty(2, device="meta")
    assert list(misfits({"w": meta}, {"w": meta})) == ["w"]


def test_each_destination_without_memory_is_one_of_its_own() -> None:
    """Tensors on meta all have address 0, but they are not tied."""
    found = misfits(
        {"a": torch.ones(2), "b": torch.ones(2)},
        {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")},
    )
    assert set(found.values()) == {"the target is on meta, without memory"}


def test_a_dtype_that_torch_does_not_have() -> None:
    header = header_of({"w": torch.ones(2)})
    header.tensors[0].dtype = "float33"
    with pytest.raises(ProtocolError, match="float33"):
        matched(header, {"w": torch.zeros(2)})


def test_two_tensors_of_one_name_cannot_be_told_apart() -> None:
    with pytest.raises(MismatchError, match="the same name"):
        matched({"a": {"b": A}, "a.b": B}, {"x": C}, strict=False)


# Casting


@pytest.mark.parametrize(
    ("source", "destination", "fits"),
    [
        ("float32", "float64", True),
        ("float64", "float16", True),
        ("float32", "bfloat16", True),
        ("bfloat16", "float8_e4m3fn", True),
        ("int64", "int8", True),
        ("int8", "float32", True),
        ("bool", "int64", True),
        ("uint8", "int8", True),
        ("float32", "complex64", True),
        ("float32", "int64", False),
        ("complex64", "float32", False),
        ("int64", "bool", False),
        ("float32", "bool", False),
    ],
)
def test_casts(source: str, destination: str, fits: bool) -> None:
    obj, into = {"w": corpus.of_dtype(source)}, {"w": corpus.of_dtype(destination)}
    why = misfits(obj, into)["w"]
    assert why.startswith(f"torch.{source} in the message, torch.{destination} in the target")
    # The hint is only there where it helps.
    assert ("cast=True" in why) == fits
    if fits:
        assert matched(obj, into, cast=True)
    else:
        assert "cast=True" not in misfits(obj, into, cast=True)["w"]


def test_what_can_be_cast_can_be_copied() -> None:
    """For some dtypes, torch says that a cast is possible, but the copy fails."""
    tensors = {name: corpus.of_dtype(name) for name in corpus.STRIDED_DTYPES}
    fitting, failed = 0, []
    for (source, obj), (destination, into) in itertools.permutations(tensors.items(), 2):
        try:
            matched({"w": obj}, {"w": into}, cast=True)
        except MismatchError:
            continue
        fitting += 1
        try:
            into.copy_(obj)
        except NotImplementedError:
            failed.append((source, destination))
    assert fitting > 100
    assert failed == []


# Names


def test_names_that_only_one_side_has() -> None:
    with pytest.raises(MismatchError) as caught:
        matched({"a": A, "new": B, "b": {"new": C}}, {"a": A, "old": B, "b": {"old": C}})
    assert caught.value.missing == ("old", "b.old")
    assert caught.value.unexpected == ("new", "b.new")
    assert caught.value.misfits == {}
    assert str(caught.value).splitlines() == [
        "the message does not fit the target",
        "    not in the message: old",
        "    not in the message: b.old",
        "    not in the target: new",
        "    not in the target: b.new (at header)",
    ]


def test_names_that_only_one_side_has_if_not_strict() -> None:
    into = {"a": torch.zeros(1), "old": B}
    assert_are(matched({"a": A, "new": C}, into, strict=False), {"a": into["a"]})
    assert matched({"new": C}, into, strict=False) == {}


def test_what_does_not_fit_is_an_error_if_not_strict_too() -> None:
    found = misfits({"a": A, "new": C}, {"a": B, "old": B}, strict=False)
    assert list(found) == ["a"]


def test_tensors_without_a_name() -> None:
    obj = {"s": torch.eye(2).to_sparse(), "w": A}
    with pytest.raises(MismatchError, match=r"2 tensors or .* have no name") as caught:
        matched(obj, {"w": A})
    assert not caught.value.unexpected
    assert matched(obj, {"w": A}, strict=False) == {"w": A}
    # Selected tensors have names.
    assert matched(obj, {"w": A}, wanted={"w"}) == {"w": A}


def test_only_what_is_wanted_counts() -> None:
    obj, into = {"a": A, "b": B, "new": C}, {"a": A, "b": C, "old": torch.zeros(1)}
    assert matched(obj, into, wanted={"a"}) == {"a": A}
    assert matched(obj, into, wanted=set()) == {}
    with pytest.raises(MismatchError) as caught:
        matched(obj, into, wanted={"a", "b", "old"})
    assert (caught.value.missing, caught.value.unexpected) == (("old",), ())
    assert list(caught.value.misfits) == ["b"]


def test_a_tied_tensor_goes_to_each_of_its_names() -> None:
    into = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert_are(matched({"a": A, "b": A}, into), into)
    with pytest.raises(MismatchError) as caught:
        matched({"a": A, "b": A}, {"a": A})
    assert caught.value.unexpected == ("b",)


# All misfits in one error


def test_all_that_does_not_fit_is_in_one_error() -> None:
    obj = {"fits": A, "shape": A, "dtype": A, "meta": A, "new": A, "newer": B}
    into = {
        "fits": torch.zeros(1),
        "shape": B,
        "dtype": torch.zeros(1, dtype=torch.int64),
        "meta": torch.zeros(1, device="meta"),
        "old": A,
    }
    with pytest.raises(MismatchError) as caught:
        matched(obj, into)
    assert caught.value.missing == ("old",)
    assert caught.value.unexpected == ("new", "newer")
    assert list(caught.value.misfits) == ["shape", "dtype", "meta"]
    for name in ("shape", "dtype", "meta", "old", "new", "newer"):
        assert f": {name}" in str(caught.value)
    assert ": fits" not in str(caught.value)


def test_the_text_of_many_misfits_is_short() -> None:
    count = 20_000
    header = header_of({"w": A})
    row = header.tensors[0]
    row.names[:] = [*(f"wrong.{n}" for n in range(count)), *(f"new.{n}" for n in range(count))]
    into = {f"wrong.{n}": B for n in range(count)} | {f"old.{n}": B for n in range(count)}
    with pytest.raises(MismatchError) as caught:
        matched(header, into)
    error = caught.value
    assert len(error.misfits) == len(error.missing) == len(error.unexpected) == count
    assert len(str(error)) < 10_000
    assert "does not fit: wrong.19: shape" in str(error)
    assert "wrong.20" not in str(error)
    for what in ("does not fit", "not in the message", "not in the target"):
        assert f"{what}: {count - 20} more" in str(error)


def test_the_text_of_giant_names_is_short_and_says_why() -> None:
    giant = "k" * 2**20
    obj = {f"{giant}1": A, f"{giant}2": A}
    with pytest.raises(MismatchError) as caught:
        matched(obj, {f"{giant}1": B, f"{giant}3": A})
    assert len(str(caught.value)) < 5000
    assert "shape [1] in the message, [2] in the target" in str(caught.value)
    assert caught.value.missing == (f"{giant}3",)
    assert caught.value.unexpected == (f"{giant}2",)
    assert list(caught.value.misfits) == [f"{giant}1"]


def test_keys_that_utf_8_cannot_carry() -> None:
    """The sender writes such keys with escapes; the match must use the same form."""
    obj, into = {"\ud800": A, "o": B}, {"\ud800": torch.zeros(1), "o": torch.zeros(2)}
    assert len(matched(obj, into)) == 2
    with pytest.raises(MismatchError) as caught:
        matched({"o": B}, into)
    str(caught.value).encode()
