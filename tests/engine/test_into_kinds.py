"""Composite tensors as targets: sparse, quantized, wrapper subclasses, DTensors."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import aiotorchio
from aiotorchio import LimitExceeded, MismatchError
from tests.api.test_streams import encoded
from tests.support import corpus

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
]


def plain(into: Any) -> dict[str, Any]:
    return {"into": into}


def staged(into: Any) -> dict[str, Any]:
    return {"into": into, "staged": True}


def double(into: Any) -> dict[str, Any]:
    return {"into": aiotorchio.DoubleBuffer(into)}


all_modes = pytest.mark.parametrize("mode", [plain, staged, double])
Mode = Callable[[Any], dict[str, Any]]


def quantized(*values: float, scale: float = 0.1) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.tensor(values), scale, 0, torch.qint8)


def state(one: float) -> dict[str, Any]:
    eye = torch.eye(3) * one
    return {
        "coo": (eye if one > 1 else eye[:, :1].expand(3, 3)).to_sparse(),
        "quantized": quantized(one, 2.0, scale=0.1 * one),
        "dense": torch.full((2,), one),
        "nested": [{"csr": eye.to_sparse_csr()}, corpus.Wrapper(torch.full((2, 2), one))],
    }


def numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    if isinstance(value, corpus.Wrapper):
        return value.wrapped.tolist()
    return (value.dequantize() if value.is_quantized else value.to_dense()).tolist()


def load(obj: Any, **options: Any) -> Any:
    return aiotorchio.load(io.BytesIO(encoded(obj)), safe_globals=[corpus.Wrapper], **options)


def same_tensors(loaded: Any, into: Any) -> bool:
    names = ("coo", "quantized", "dense")
    nested = loaded["nested"][0]["csr"] is into["nested"][0]["csr"]
    return nested and all(loaded[name] is into[name] for name in names)


@all_modes
def test_they_get_what_was_received(mode: Mode) -> None:
    into = state(1.0)
    loaded = load(state(3.0), **mode(into))
    assert numbers(into) == numbers(state(3.0))
    assert same_tensors(loaded, into) and loaded["nested"][1] is into["nested"][1]


@all_modes
async def test_they_get_it_from_a_stream(mode: Mode) -> None:
    into = state(1.0)
    async with aclosing(aiotorchio.iter_bytes(state(3.0))) as stream:
        loaded = await aiotorchio.load_from_stream(
            stream, safe_globals=[corpus.Wrapper], **mode(into)
        )
    assert numbers(into) == numbers(state(3.0))
    assert same_tensors(loaded, into)


OTHERS: dict[str, tuple[Callable[[], torch.Tensor], str, str]] = {
    "another layout": (
        lambda: torch.eye(3).to_sparse_csr(),
        "coo",
        "layout torch.sparse_coo in the message, a Tensor of layout torch.sparse_csr in the targ",
    ),
    "another shape": (lambda: torch.eye(2).to_sparse(), "coo", r"shape \[3, 3\] in the message"),
    "another dtype": (
        lambda: torch.eye(3).double().to_sparse(),
        "coo",
        "torch.float32 in the message, torch.float64 in the target",
    ),
    "another scheme": (
        lambda: torch.quantize_per_channel(
            torch.ones(2), torch.ones(2), torch.zeros(2).long(), 0, torch.qint8
        ),
        "quantized",
        "a quantized Tensor .torch.qint8, torch.per_tensor_affine. in the message",
    ),
    "dense in the message": (lambda: torch.eye(2).to_sparse(), "dense", "dense in the message"),
    "dense in the target": (lambda: torch.zeros(3, 3), "coo", "no tensor of this name: coo"),
    "not in the message": (lambda: quantized(1.0), "other", "not in the message: other"),
}


@pytest.mark.parametrize("mode", [staged, double])
@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_are_refused_by_name(case: str, mode: Mode) -> None:
    make, name, reason = OTHERS[case]
    into = state(1.0) | {name: make()}
    before = numbers(into)
    with pytest.raises(MismatchError, match=reason) as caught:
        load(state(3.0), **mode(into))
    assert name in str(caught.value)
    assert numbers(into) == before


@pytest.mark.parametrize("mode", [staged, double])
def test_what_torch_cannot_copy_leaves_all_as_it_was(mode: Mode) -> None:
    into = state(1.0)
    into["nested"][0]["csr"] = torch.zeros(3, 3).to_sparse_csr()
    before = numbers(into)
    with pytest.raises(MismatchError, match="could not be copied") as caught:
        load(state(3.0), **mode(into))
    assert caught.value.entry == "nested.0.csr"
    assert numbers(into) == before


def test_what_is_missing_or_not_selected_stays() -> None:
    into = state(1.0) | {"other": quantized(1.0)}
    load(state(3.0), into=into, strict=False, select=["dense", "quantized"])
    assert numbers(into) == numbers(
        state(1.0)
        | {"dense": torch.full((2,), 3.0), "quantized": state(3.0)["quantized"]}
        | {"other": quantized(1.0)}
    )


# ------------------------------------------------------------------------------ before the payload


def sparse(one: float) -> dict[str, Any]:
    """Mismatches that are found before the payload arrives."""
    return {"coo": (torch.eye(3) * one).to_sparse(), "dense": torch.full((2,), one)}


def is_refused_before_the_payload(obj: Any, into: Any, mode: Mode, reason: str) -> MismatchError:
    before, done = numbers(into), list[int]()
    with pytest.raises(MismatchError, match=reason) as caught:
        load(obj, progress=lambda count, _: done.append(count), **mode(into))
    assert numbers(into) == before and not done
    return caught.value


@all_modes
@pytest.mark.parametrize("case", ["another layout", "another shape", "another dtype"])
def test_other_kinds_are_refused_before_the_payload(case: str, mode: Mode) -> None:
    make, name, reason = OTHERS[case]
    is_refused_before_the_payload(sparse(3.0), sparse(1.0) | {name: make()}, mode, reason)


@all_modes
def test_a_missing_one_is_refused_before_the_payload(mode: Mode) -> None:
    into = sparse(1.0) | {"other": torch.eye(2).to_sparse()}
    error = is_refused_before_the_payload(sparse(3.0), into, mode, "not in the message: other")
    assert error.missing == ("other",)


@all_modes
def test_what_no_destination_takes_is_refused(mode: Mode) -> None:
    sent = sparse(3.0) | {"other": [torch.eye(2).to_sparse()]}
    reason = r"not in the target: other\.0"
    error = is_refused_before_the_payload(sent, sparse(1.0), mode, reason)
    assert error.unexpected == ("other.0",)
    into = sparse(1.0)
    loaded = load(sent, strict=False, **mode(into))
    assert numbers(into) == numbers(sparse(3.0))
    assert torch.equal(loaded["other"][0].to_dense(), torch.eye(2))
    into = sparse(1.0)
    load(sent, select=["coo", "dense"], **mode(into))
    assert numbers(into) == numbers(sparse(3.0))


@all_modes
@pytest.mark.parametrize("select", [["dense", "other.0"], ["dense", "other.*"]])
def test_a_selected_one_without_a_target(select: list[str], mode: Mode) -> None:
    sent = sparse(3.0) | {"other": {"0": torch.eye(2).to_sparse()}}
    into = sparse(1.0)
    error = is_refused_before_the_payload(
        sent, into, lambda into: {**mode(into), "select": select}, r"not in the target: other\.0"
    )
    assert error.unexpected == ("other.0",)
    loaded = load(sent, strict=False, select=select, **mode(into))
    assert torch.equal(loaded["other"]["0"].to_dense(), torch.eye(2))
    assert loaded["dense"] is into["dense"] and "coo" not in loaded
    assert numbers(into) == numbers(sparse(1.0) | {"dense": torch.full((2,), 3.0)})


@all_modes
def test_one_that_is_not_selected_is_left_out(mode: Mode) -> None:
    into = sparse(1.0)
    loaded = load(sparse(3.0), select=["d*"], **mode(into))
    assert loaded == {"dense": into["dense"]}
    assert numbers(into) == numbers(sparse(1.0) | {"dense": torch.full((2,), 3.0)})


@all_modes
@pytest.mark.parametrize("select", [None, ["coo"], "*"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_target_is_never_left_as_it_was(
    strict: bool, select: list[str] | str | None, mode: Mode
) -> None:
    into = {"coo": torch.zeros(3, 3), "dense": torch.zeros(2)}
    options = {"strict": strict, "select": select}
    reason = "no tensor of this name: coo" if strict and select is None else "does not fit: coo: "
    error = is_refused_before_the_payload(
        sparse(3.0), into, lambda into: {**mode(into), **options}, reason
    )
    assert list(error.misfits) == ([] if strict and select is None else ["coo"])


def test_an_absent_dense_target_of_a_message_with_others_stays() -> None:
    into = {"old": torch.zeros(2), "dense": torch.zeros(2)}
    loaded = load(sparse(3.0), strict=False, into=into)
    assert into["old"].eq(0).all() and into["dense"].eq(3).all()
    assert torch.equal(loaded["coo"].to_dense(), 3 * torch.eye(3))


# Parts that have names of their own


def pair(one: float) -> dict[str, Any]:
    """A composite tensor whose parts are entries, too, so that no row is without a name."""
    parts = torch.full((2,), one), torch.full((2,), one + 1)
    return {"a": parts[0], "b": parts[1], "pair": TwoTensor(*parts)}


def load_pair(**options: Any) -> Any:
    data = io.BytesIO(encoded(pair(3.0)))
    return aiotorchio.load(data, safe_globals=[TwoTensor], **options)


def values_of(tensor: Any) -> list[list[float]]:
    return [tensor.a.tolist(), tensor.b.tolist()]


@all_modes
@pytest.mark.parametrize("select", [None, "pair", "*"])
def test_a_dense_target_of_one_with_named_parts_is_refused(select: str | None, mode: Mode) -> None:
    into = {"pair": torch.zeros(2)}
    with pytest.raises(MismatchError) as caught:
        load_pair(strict=False, select=select, **mode(into))
    assert list(caught.value.misfits) == ["pair"] and not into["pair"].any()


@all_modes
def test_one_with_named_parts_needs_a_target(mode: Mode) -> None:
    into = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(MismatchError, match="not in the target: pair") as caught:
        load_pair(**mode(into))
    assert caught.value.unexpected == ("pair",) and not into["a"].any()


def test_one_with_named_parts_is_selected_by_its_name() -> None:
    loaded = load_pair(select="pair")
    assert list(loaded) == ["pair"] and values_of(loaded["pair"]) == [[3, 3], [4, 4]]
    assert list(load_pair(select="a")) == ["a"]
    into = {"pair": TwoTensor(torch.zeros(2), torch.zeros(2))}
    assert load_pair(select="pair", into=into) == into
    assert values_of(into["pair"]) == [[3, 3], [4, 4]]


async def test_one_with_named_parts_is_iterated_over() -> None:
    for select, expected in ((None, ["a", "b", "pair"]), ("pair", ["pair"]), ("a", ["a"])):
        async with (
            aclosing(aiotorchio.iter_bytes(pair(3.0))) as stream,
            aiotorchio.StreamReader(stream).open() as message,
        ):
            tensors = message.iterate(select=select, safe_globals=[TwoTensor])
            found = {name: tensor async for name, tensor in tensors}
        assert sorted(found) == expected
        if "pair" in found:
            assert values_of(found["pair"]) == [[3, 3], [4, 4]]


@pytest.mark.parametrize("mode", [staged, double])
@pytest.mark.parametrize("options", [{"strict": False}, {"select": ["a.b"]}])
def test_one_that_has_the_name_of_a_row_is_not_replaced(
    options: dict[str, Any], mode: Mode
) -> None:
    sent = {"a.b": torch.ones(3), "a": {"b": torch.eye(3).to_sparse()}}
    into = {"a.b": torch.zeros(3)}
    with pytest.raises(MismatchError, match="two tensors of the object have this name") as caught:
        load(sent, **options, **mode(into))
    assert caught.value.entry == "a.b" and not into["a.b"].any()


# One target with several names


@all_modes
def test_one_target_with_two_names(mode: Mode) -> None:
    tied = torch.zeros(3, 3).to_sparse()
    into, eye = {"a": tied, "b": tied}, torch.eye(3)
    error = is_refused_before_the_payload(
        {"a": eye.to_sparse(), "b": (2 * eye).to_sparse()}, into, mode, "the target is also 'a'"
    )
    assert list(error.misfits) == ["b"]
    for value, sent in enumerate((["a"], ["b"], ["a", "b"]), 2):
        shared = (value * eye).to_sparse()
        load(dict.fromkeys(sent, shared), **mode(into))
        assert torch.equal(tied.to_dense(), value * eye)


@all_modes
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_targets_are_refused(layout: torch.layout, mode: Mode) -> None:
    parts = [torch.ones(2), torch.ones(3)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    done = list[int]()
    with pytest.raises(MismatchError, match="nested tensor cannot be received into") as caught:
        load({"n": nested}, progress=lambda *_: done.append(1), **mode({"n": nested.clone()}))
    assert list(caught.value.misfits) == ["n"] and not done


def test_what_no_destination_takes_is_shown_up_to_a_number() -> None:
    sent = sparse(3.0) | {"other": [torch.eye(2).to_sparse() for _ in range(22)]}
    error = is_refused_before_the_payload(sent, sparse(1.0), plain, "target: 2 more")
    assert len(error.unexpected) == 22


class Holder:
    """An object with a tensor; it counts its instances."""

    __slots__ = ("held", "others")

    made = 0

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __setstate__(self, state: Any) -> None:
        Holder.made += 1
        self.held = state[1]["held"]


@pytest.mark.parametrize(
    "hide",
    [
        lambda tensor: {"a": [frozenset([tensor])]},
        lambda tensor: {"a": [{(tensor, 1): 2}]},
        lambda tensor: {"a": [Holder(tensor)]},
        lambda tensor: {"a": [{1: frozenset([(1, tensor)])}[1]]},
    ],
)
@pytest.mark.parametrize("mode", [staged, double])
def test_what_has_no_name_is_refused_with_its_place(mode: Mode, hide: Any) -> None:
    into = sparse(1.0)
    data = io.BytesIO(encoded(sparse(3.0) | hide(torch.ones(2))))
    with pytest.raises(MismatchError, match=r"1 tensors or storages .* no name .*'a\.0'"):
        aiotorchio.load(data, safe_globals=[Holder], **mode(into))
    assert numbers(into) == numbers(sparse(1.0))
    data.seek(0)
    aiotorchio.load(data, safe_globals=[Holder], strict=False, **mode(into))
    assert numbers(into) == numbers(sparse(3.0))


def test_a_tensor_that_is_named_elsewhere_is_not_without_a_name() -> None:
    sent, into = sparse(3.0), sparse(1.0)
    load(sent | {"all": frozenset([sent["coo"], sent["dense"]])}, into=into)
    assert numbers(into) == numbers(sparse(3.0))


def test_the_code_of_trusted_classes_runs_once() -> None:
    into, before = sparse(1.0) | {"other": torch.eye(2).to_sparse()}, Holder.made
    data = io.BytesIO(encoded(sparse(3.0) | {"a": Holder(torch.ones(2))}))
    with pytest.raises(MismatchError, match="its tensors were written to"):
        aiotorchio.load(data, safe_globals=[Holder], into=into)
    assert Holder.made == before + 1


async def test_a_message_that_was_refused_so_can_be_loaded_in_another_way() -> None:
    async with (
        aclosing(aiotorchio.iter_bytes(sparse(3.0))) as stream,
        aiotorchio.StreamReader(stream).open() as message,
    ):
        into: Any = sparse(1.0) | {"coo": torch.eye(3).to_sparse_csr()}
        with pytest.raises(MismatchError, match="coo"):
            await message.load(into=into)
        into = sparse(1.0)
        await message.load(into=into)
        assert numbers(into) == numbers(sparse(3.0))


@all_modes
def test_dtensors(mode: Mode) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    with corpus.process_group():
        sent: Any = corpus.dtensor()
        options: dict[str, Any] = {"safe_globals": corpus.dtensor_globals()}
        into: Any = corpus.dtensor()
        data = encoded(sent)
        loaded = aiotorchio.load(io.BytesIO(data), **mode(into), **options)
        assert loaded["d"] is into["d"]
        assert torch.equal(into["d"].to_local(), sent["d"].to_local())
        mesh = init_device_mesh("cpu", (1,))
        into = {"d": distribute_tensor(torch.zeros(4, 2), mesh, [Replicate()])}
        with pytest.raises(MismatchError, match=r"d: .*Shard.*in the message.*Replicate"):
            aiotorchio.load(io.BytesIO(data), **mode(into), **options)
        assert not into["d"].to_local().any()


def test_attributes_of_a_peer_make_no_dtensor() -> None:
    """A DTensor has attributes of these names, but this tensor is none."""
    sent: Any = torch.eye(2).to_sparse()
    sent.device_mesh, sent.placements = 1, (1,)
    into = {"a": torch.zeros(2, 2).to_sparse()}
    aiotorchio.load(io.BytesIO(encoded({"a": sent})), into=into)
    assert torch.equal(into["a"].to_dense(), torch.eye(2))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("storage", [torch.Tensor.untyped_storage, torch.Tensor.storage])
def test_a_storage_that_nothing_takes(storage: Callable[[torch.Tensor], Any]) -> None:
    sent = {"s": torch.eye(2).to_sparse(), "junk": storage(torch.ones(2))}
    into = {"s": torch.zeros(2, 2).to_sparse()}
    with pytest.raises(MismatchError, match=r"1 tensors or storages .* no name .*'junk'"):
        aiotorchio.load(io.BytesIO(encoded(sent)), into=into)
    assert into["s"].to_dense().eq(0).all()
    aiotorchio.load(io.BytesIO(encoded(sent)), into=into, strict=False)
    assert torch.equal(into["s"].to_dense(), torch.eye(2))


def test_names_and_places_that_are_too_long_all_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key can be above many: a small message would take far more memory."""
    into = {"s": torch.zeros(2, 2).to_sparse()}
    key, sparse = "k" * 100, torch.eye(2).to_sparse()
    for below in ([sparse.clone() for _ in range(40)], [{torch.ones(1)} for _ in range(15)]):
        data = encoded({"s": sparse, key: below})
        with pytest.raises(MismatchError):
            aiotorchio.load(io.BytesIO(data), into=into)
        with monkeypatch.context() as patch:
            patch.setattr("aiotorchio.table.containers.TEXT_MAX", 1000)
            patch.setattr("aiotorchio.graph.strays.TEXT_MAX", 1000)
            with pytest.raises(LimitExceeded, match=r"more than [13]000 characters"):
                aiotorchio.load(io.BytesIO(data), into=into)


@all_modes
def test_a_tensor_without_rows_that_nothing_takes(mode: Mode) -> None:
    """It is over the memory of another tensor: only the skeleton shows it."""
    tensor = quantized(1.0, 2.0)
    bare = torch.empty(0, dtype=torch.int8).set_(tensor.untyped_storage(), 0, (2,), (1,))
    data, into = encoded({"bare": bare, "hidden": tensor}), {"bare": torch.zeros(2).char()}
    with pytest.raises(MismatchError):
        aiotorchio.load(io.BytesIO(data), **mode(into))
    if mode is not plain:
        assert into["bare"].eq(0).all()
