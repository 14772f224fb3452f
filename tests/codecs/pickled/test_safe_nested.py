"""Nested tensors of the jagged layout: valid ones load, and no part lies outside the values.

Hostile tensors of the strided layout are in ``support/hostile.py``. The names of the jagged layout
are on torch's own allowlist in every process, so a sender can use them without ``safe_globals``.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # allows the attributes that torch adds for noted lengths

from aiotorchio import InvalidObjectError, LimitExceeded, Limits, UnsafeObjectError
from aiotorchio.codecs.pickled import safe_nested
from aiotorchio.codecs.pickled.checks import Checks
from aiotorchio.codecs.pickled.safe_nested import NestedMaker
from aiotorchio.common import sparse_indices as indices_module
from aiotorchio.common import torch_private
from tests.support import craft
from tests.support.corpus import assert_same
from tests.support.craft import Code, call, get, name, new, put, rebuild, subclassed, tensor
from tests.support.tiers import examples

MODULE = "torch.nested._internal.nested_tensor"
REBUILD, KIND = name(MODULE, "_rebuild_njt"), name(MODULE, "NestedTensor")
jagged = torch.nested.nested_tensor_from_jagged


def integers(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def values() -> torch.Tensor:
    # A new tensor for each call, because torch adds an attribute to it.
    return torch.arange(16.0).reshape(8, 2)


def parts() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(5, 2)], layout=torch.jagged)


HONEST: dict[str, Callable[[], Any]] = {
    "parts": parts,
    "transposed": lambda: parts().transpose(1, 2),
    "narrow": lambda: torch.nested.narrow(
        torch.ones(2, 6, 2), 1, integers(1, 2), integers(2, 3), layout=torch.jagged
    ),
    "offsets_of_32_bits": lambda: jagged(values(), integers(0, 3, 8).int()),
    "lengths": lambda: jagged(values(), lengths=integers(4, 4)),
    "holes": lambda: jagged(values(), integers(0, 3, 7), integers(2, 1)),
    "lengths_noted_by_guess": lambda: jagged(
        values(), integers(0, 3, 8), min_seqlen=1, max_seqlen=2048
    ),
    "ragged_behind": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(2, 5)], layout=torch.jagged
    ),
    "empty_parts": lambda: jagged(torch.ones(0, 2), integers(0, 0, 0)),
    "no_parts": lambda: jagged(torch.ones(0, 2), integers(0)),
    "requires_grad": lambda: jagged(values(), integers(0, 3, 8)).requires_grad_(),
    "values_over_the_same_part": lambda: jagged(torch.ones(1, 2).expand(8, 2), integers(0, 8)),
}


@pytest.mark.parametrize("key", HONEST)
def test_honest(key: str) -> None:
    original = HONEST[key]()
    loaded = craft.round_trip({"x": original, "again": original})
    assert_same(loaded["x"], original)
    assert loaded["again"] is loaded["x"]
    assert_same(list(loaded["x"].unbind()), list(original.unbind()))


def test_without_numbers_there_is_nothing_to_check() -> None:
    loaded = craft.round_trip(parts(), map_location="meta")
    assert loaded.values().device.type == "meta"
    assert loaded.values().shape == (8, 2)


def rebuilt(arguments: dict[str, Any]) -> Code:
    return call(MODULE, "_rebuild_njt", arguments)


def load(
    shown: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    limits: Limits | None = None,
    through: Callable[[dict[str, Any]], Code] = rebuilt,
    **other: Any,
) -> Any:
    """Load a jagged tensor as torch pickles it, with the given arguments changed."""
    offsets = integers(0, 3, 8) if offsets is None else offsets
    rows = [values() if shown is None else shown, offsets, *([] if lengths is None else [lengths])]
    arguments: dict[str, Any] = {
        "values": tensor(0),
        "offsets": tensor(1),
        "lengths": None if lengths is None else tensor(2),
        "_ragged_idx": 1,
        "_metadata_cache": {},
        "requires_grad": False,
    }
    arguments |= {key.removeprefix("other_"): value for key, value in other.items()}
    skeleton = craft.pickled(through(arguments))
    return craft.load_pickle(skeleton, rows, limits=limits or Limits())


def test_what_is_changed_below_is_good() -> None:
    assert_same(load(), jagged(values(), integers(0, 3, 8)))


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": integers(0, 3, 9)},
        {"offsets": integers(0, 9, 17)},
        {"offsets": integers(0, -1, 8)},
        {"offsets": integers(-1, 3, 8)},
        {"offsets": integers(8, 3, 0)},
        {"offsets": torch.tensor([0.0, 3.0, 8.0])},
        {"offsets": integers(0, 3, 8)[None]},
        {"offsets": torch.ones((), dtype=torch.int64)},
        {"offsets": torch.ones(0, dtype=torch.int64)},
        {"offsets": integers(0).expand(100)},
        {"lengths": integers(3)},
        {"lengths": integers(3, 6)},
        {"lengths": integers(3, -1)},
        {"lengths": integers(3, 9)},
        {"lengths": torch.ones(2)},
        {"other__ragged_idx": 0},
        {"other__ragged_idx": 3},
        {"other__ragged_idx": -1},
        {"other__ragged_idx": True},
        {"other__ragged_idx": "1"},
        {"other_values": None},
        {"other_values": call(MODULE, "_rebuild_njt", {"values": tensor(0), "offsets": tensor(1)})},
        {"other_offsets": [0, 3, 8]},
        {"other_requires_grad": 1},
        {"other_anything": 1},
        {"other__metadata_cache": None},
        {"other__metadata_cache": {"max_seqlen": 5}},
        {"other__metadata_cache": {"max_seqlen": "5"}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_no_jagged_tensor(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidObjectError):
        load(**change)


@pytest.mark.parametrize(
    ("count", "offsets", "lengths"),
    [
        (8, integers(0, 2**63 - 1, -(2**63)), None),
        (8, integers(0, 3, 8), integers(3, 2**63 - 1)),
        (2**63 - 1, integers(0, 2**62 + 1, 2**62 + 1), integers(3, 2**62)),
        # Each number fits into 32 bits, but their sum does not.
        (2**31, integers(2**31 - 1, 2**31 - 1).int(), integers(2**31 - 1).int()),
    ],
    ids=["difference", "sum", "sum_of_two", "32_bits"],
)
def test_sums_that_overflow(
    monkeypatch: pytest.MonkeyPatch, count: int, offsets: torch.Tensor, lengths: torch.Tensor | None
) -> None:
    """Calls the check directly: in a message, other readers would follow these numbers."""
    shown = torch.empty(count, 0, device="meta")
    for in_python in (512, 0):
        monkeypatch.setattr(safe_nested, "IN_PYTHON", in_python)
        with pytest.raises(InvalidObjectError, match="beyond its values"):
            NestedMaker(Checks(Limits()))._check_parts(shown, 0, offsets, lengths, {})


def test_parts_of_the_strided_layout_lie_in_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with the addresses of all elements of each part; torch never gets these tensors."""
    monkeypatch.setattr(torch_private, "nested_view", lambda *parts: "made")
    monkeypatch.setattr(indices_module, "STEP", 64)
    draw, verdicts, limit = random.Random(1), {True: 0, False: 0}, 6
    for _ in range(examples(5000)):
        dims, count = draw.randrange(3), draw.randrange(4)
        low = draw.choice([0, 0, 0, -1])
        sizes, strides = (
            [[draw.randrange(low, 3) for _ in range(dims)] for _ in range(count)] for _ in range(2)
        )
        offsets = [draw.randrange(low, limit + 2) for _ in range(count)]
        right = all(
            min([offset, *size, *stride]) >= 0
            and offset <= limit
            and all(
                offset + sum(map(operator.mul, place, stride)) < limit
                for place in itertools.product(*map(range, size))
            )
            for offset, size, stride in zip(offsets, sizes, strides, strict=True)
        )
        verdicts[right] += 1
        numbers = (
            torch.tensor(each, dtype=torch.int64).reshape(shape)
            for each, shape in (
                (sizes, (count, dims)),
                (strides, (count, dims)),
                (offsets, (count,)),
            )
        )
        maker = NestedMaker(Checks(Limits()))
        if right:
            assert maker.strided(torch.ones(limit), *numbers) == "made"
        else:
            with pytest.raises(InvalidObjectError):
                maker.strided(torch.ones(limit), *numbers)
    assert min(verdicts.values()) > 100, verdicts


@pytest.mark.parametrize("key", ["dims", "expanded_nbytes"])
def test_limits_of_the_strided_layout(key: str) -> None:
    sizes = torch.ones(2, 3, dtype=torch.int64)
    parts = (torch.ones(6), sizes, sizes, integers(0, 1))
    least = {"dims": 3, "expanded_nbytes": 8}[key]
    NestedMaker(Checks(Limits(**{key: least}))).strided(*parts)
    with pytest.raises(LimitExceeded):
        NestedMaker(Checks(Limits(**{key: least - 1}))).strided(*parts)


@pytest.mark.parametrize(("in_python", "step"), [(512, 16_384), (0, 16_384), (0, 2)])
def test_parts_of_the_jagged_layout_lie_in_the_values(
    monkeypatch: pytest.MonkeyPatch, in_python: int, step: int
) -> None:
    monkeypatch.setattr(safe_nested, "IN_PYTHON", in_python)
    monkeypatch.setattr(indices_module, "STEP", step)
    draw, verdicts, limit = random.Random(2), {True: 0, False: 0}, 5
    for _ in range(examples(5000)):
        count, low = draw.randrange(6), draw.choice([0, 0, 0, -1])
        begins = [draw.randrange(low, limit + 1 - low) for _ in range(count + 1)]
        if draw.random() < 0.8:
            begins.sort()
        lengths = [draw.randrange(low, 3) for _ in range(count)] if draw.random() < 0.5 else None
        sizes = lengths or [end - begin for begin, end in itertools.pairwise(begins)]
        right = (
            begins == sorted(begins)
            and 0 <= begins[0] <= begins[-1] <= limit
            and all(n >= 0 and begin + n <= limit for begin, n in zip(begins, sizes, strict=False))
        )
        verdicts[right] += 1
        given = torch.tensor(begins, dtype=draw.choice([torch.int32, torch.int64]))
        other = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
        if right:
            wanted = (sum(sizes), min(sizes, default=0), max(sizes, default=0))
            assert safe_nested._lengths_within(given, other, limit) == wanted
        else:
            with pytest.raises(InvalidObjectError, match="beyond its values"):
                safe_nested._lengths_within(given, other, limit)
    assert min(verdicts.values()) > 100, verdicts


def noted(length: int) -> Code:
    """A length as torch notes it: in the shape of an empty tensor."""
    return craft.strided(0, "float32", 0, (length, 0), (1, 1))


def test_lengths_that_are_noted_right() -> None:
    loaded = load(other__metadata_cache={"min_seqlen": noted(3), "max_seqlen": noted(5)})
    assert (loaded._min_seqlen, loaded._max_seqlen) == (3, 5)


@pytest.mark.parametrize(
    "cache",
    [
        {"max_seqlen": noted(4)},
        {"min_seqlen": noted(4)},
        {"min_seqlen": tensor(1)},
        {"max_seqlen": tensor(1)},
        {"lengths": noted(5)},
    ],
    ids=["short", "long", "flat_least", "flat_most", "other"],
)
def test_lengths_that_are_noted_wrong(cache: dict[str, Any]) -> None:
    with pytest.raises(InvalidObjectError, match="cache"):
        load(other__metadata_cache=cache)


@pytest.mark.parametrize(
    "change",
    [
        # The parts all show the same values; they count like a padded tensor.
        {"offsets": torch.zeros(11, dtype=torch.int64), "lengths": torch.full((10,), 8)},
        {"other__metadata_cache": {"max_seqlen": noted(2000)}},
    ],
    ids=["lengths", "noted"],
)
def test_larger_than_its_values(change: dict[str, Any]) -> None:
    with pytest.raises(LimitExceeded):
        load(**change, limits=Limits(expanded_nbytes=160))


def with_state(state: Any) -> Callable[[dict[str, Any]], Code]:
    return lambda arguments: subclassed(REBUILD, KIND, (arguments,), state)


def test_no_state_changes_the_parts() -> None:
    state = {"_offsets": tensor(2), "_ragged_idx": 2, "_size": (2, 9, 2), "note": "kept"}
    loaded = load(lengths=integers(0, 9), other_lengths=None, through=with_state(state))
    assert loaded.note == "kept"
    del loaded.note
    assert_same(loaded, load())


def test_what_was_noted_is_not_changed_later() -> None:
    """The pickle keeps a reference to the dict of noted lengths and changes it afterwards."""

    def noted_later(arguments: dict[str, Any]) -> Code:
        cache = Code(b"}" + put(0))
        made = rebuilt(arguments | {"_metadata_cache": cache})
        later = get(0) + craft.assemble("max_seqlen") + craft.assemble(1) + b"s"
        return Code(b"](" + made + later + b"e")

    loaded, noted = load(through=noted_later)
    assert noted == {"max_seqlen": 1}
    assert loaded._metadata_cache == {}


@pytest.mark.parametrize(
    "through",
    [
        lambda _: call(MODULE, "NestedTensor", tensor(0), tensor(1)),
        lambda _: new(MODULE, "NestedTensor", tensor(0), tensor(1)),
        # Refused before the parts are checked.
        lambda arguments: subclassed(
            name("torch._utils", "_rebuild_tensor_v2"),
            KIND,
            (craft.storage(0, "float32"), 0, (4,), (1,), False, craft.ordered_dict()),
            {"_values": tensor(0), "_offsets": tensor(1)},
        ),
        lambda arguments: rebuild(
            "_rebuild_wrapper_subclass",
            *(KIND, name("torch", "float32"), (4,), (1,), 0),
            *(call("torch.serialization", "_get_layout", "torch.strided"), "cpu", False),
        ),
        lambda arguments: subclassed(REBUILD, name("torch", "Tensor"), (arguments,), {}),
        lambda arguments: rebuild(
            "_rebuild_parameter_with_state",
            *(rebuilt(arguments), False, craft.ordered_dict(), {"_offsets": tensor(0)}),
        ),
        lambda arguments: subclassed(
            name("torch._utils", "_rebuild_parameter_with_state"),
            KIND,
            (rebuilt(arguments), False, craft.ordered_dict(), {"_lengths": tensor(0)}),
            {},
        ),
        with_state(None),
        with_state(({}, {"_offsets": tensor(0)})),
        with_state({"data": tensor(0)}),
    ],
    ids=[
        *("call", "new", "tensor", "wrapper", "class", "parameter", "parameter_as_class"),
        *("no_state", "slots", "data"),
    ],
)
def test_no_other_way_to_make_one(through: Any) -> None:
    with pytest.raises(UnsafeObjectError):
        load(through=through)
