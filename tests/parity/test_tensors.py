"""Tensors of every kind: they arrive as torch loads them."""

from __future__ import annotations

import copyreg
import io
import os
import pickletools
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.masked import MaskedTensor, masked_tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.testing._internal.two_tensor import TwoTensor

import aiotorchio
from aiotorchio.table.torch_dtypes import DTYPE_NAMES
from tests.parity import tensor_kinds as kinds
from tests.parity.twins import by_stream, by_torch, by_us, our_file, torch_file
from tests.support import corpus, craft
from tests.support.corpus import Tagged, assert_same, of_dtype
from tests.support.speed import patience

pytestmark = pytest.mark.filterwarnings(
    # Warnings of torch about functions that the tests use.
    "ignore:The PyTorch API of MaskedTensors is in prototype stage:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)

OTHER = "big" if sys.byteorder == "little" else "little"
REFUSALS = (aiotorchio.UnsafeObjectError, aiotorchio.InvalidObjectError)


def same_as_torch(obj: object, *trusted: Any) -> Any:
    """Check that an object arrives as torch loads it, with and without trust; return the object."""
    with torch.serialization.safe_globals(list(trusted)):
        ours = by_us(obj)
        assert_same(ours, by_torch(obj, weights_only=True))
    assert_same(by_us(obj, weights_only=False), by_torch(obj, weights_only=False))
    return ours


def arrives(obj: object, *trusted: Any) -> Any:
    """Check as ``same_as_torch``, and compare with the sent object."""
    ours = same_as_torch(obj, *trusted)
    assert_same(ours, obj)
    return ours


def attributed(tensor: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def subclassed(kind: type[torch.Tensor], **attributes: Any) -> Any:
    return attributed(torch.randn(3).as_subclass(kind), **attributes)


# ------------------------------------------------------------------------------- the corpus

# Objects that torch refuses to save or to load, or loads as something else.
LOST_BY_TORCH = {
    *("two_dtypes", "two_sizes", "storage_and_view", "typed_storage_and_view"),  # see below
    *("meta_strided", "meta_shared"),  # storages and offsets on meta are lost
    *("untyped_storage", "storage_twice", "empty_storage", "storage_odd_size"),  # they arrive typed
    *("scalars", "bytes_values", "empty_containers"),  # empty bytes and frozensets are refused
    "frozensets",
    *(f"dtype_{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    "dtype_all_in_one",
}


@pytest.mark.parametrize("name", corpus.case_parameters())
def test_every_case_of_the_corpus(name: str) -> None:
    obj, options = corpus.make(name), corpus.LOAD_OPTIONS.get(name, {})
    ours = by_us(obj, **options)
    assert_same(ours, obj)
    for load in (by_torch, by_stream):
        with torch.serialization.safe_globals(list(options.get("safe_globals", ()))):
            if name in LOST_BY_TORCH:
                with pytest.raises(Exception):  # noqa: B017 - it fails, or gives something else
                    assert_same(load(obj, weights_only=True), obj)
            else:
                assert_same(ours, load(obj, weights_only=True))


def test_what_torch_loses_is_in_the_corpus() -> None:
    there = {str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES}
    wanted = {n for n in LOST_BY_TORCH if not n.startswith("dtype_") or n[6:] in there}
    assert wanted - {"dtype_all_in_one"} <= corpus.CASES.keys()


# ------------------------------------------------- attributes, slots, state, and subclasses


def test_tensor_attributes() -> None:
    tensor: Any = torch.randn(3)
    attributed(tensor, tag="x", _private=1, related=[tensor.data, torch.eye(2).to_sparse()])
    arrives([tensor, tensor, tensor.data])


def test_parameter_attributes() -> None:
    """Attributes of parameters, as training libraries set them."""
    parameter = attributed(
        nn.Parameter(torch.randn(4)),
        main_grad=torch.ones(4),
        tensor_model_parallel=True,
        partition_dim=0,
        _no_weight_decay=True,
        _optim={"lr": 0.1},
    )
    arrives([parameter, parameter])


def test_attributes_of_views() -> None:
    base = torch.arange(6.0)
    arrives([base, attributed(base[2:4], tag=1)])


def test_attributes_of_tensors_that_are_not_strided() -> None:
    arrives(
        [
            attributed(torch.eye(3).to_sparse(), tag=1),
            attributed(torch.eye(3).to_sparse_csr(), tag=1),
            attributed(corpus.make("quantized_view"), tag=1),
            attributed(corpus.make("nested"), tag=1),
            attributed(torch.randn(2, dtype=torch.complex64).conj(), tag=1),
            attributed(torch.empty(2, device="meta"), tag=1),
            attributed(torch.arange(3).to(torch.uint16), tag=1),
        ]
    )


@pytest.mark.parametrize("name", ["sum", "shape_"])
def test_attributes_that_hide_a_method(name: str) -> None:
    """torch sets any attribute; here names of torch's own methods need a trusted sender."""
    tensor: Any = torch.randn(3)
    tensor.__dict__[name] = 1
    assert_same(by_torch(tensor, weights_only=True), tensor)
    if hasattr(torch.Tensor, name):
        with pytest.raises(aiotorchio.UnsafeObjectError, match=name):
            by_us(tensor)
    else:
        assert_same(by_us(tensor), tensor)
    assert_same(by_us(tensor, weights_only=False), tensor)


def test_getstate_and_setstate() -> None:
    tensor = subclassed(kinds.Packed, note="n")
    assert same_as_torch(tensor, kinds.Packed).note == ("unpacked", "n")


def test_setstate_without_getstate() -> None:
    tensor = subclassed(kinds.Restored, one=1)
    assert vars(same_as_torch(tensor, kinds.Restored)) == {"one": 1, "restored": True}


def test_a_state_of_three_parts_is_refused() -> None:
    tensor = subclassed(kinds.Odd)
    with torch.serialization.safe_globals([kinds.Odd]):
        with pytest.raises(RuntimeError, match="Invalid serialized state"):
            by_torch(tensor, weights_only=True)
        with pytest.raises(REFUSALS):
            by_us(tensor)


def test_slots() -> None:
    assert copyreg._slotnames(kinds.Slotted) == ["free", "slot", "unset"]  # type: ignore[attr-defined]
    tensor = arrives(subclassed(kinds.Slotted, slot=1, free=torch.ones(2), other=3), kinds.Slotted)
    assert not hasattr(tensor, "unset")


def test_properties_of_subclasses() -> None:
    assert arrives(subclassed(kinds.WithProperty, extra=2), kinds.WithProperty).extra == 2


def test_attributes_with_a_default_in_the_class() -> None:
    arrives(subclassed(kinds.WithDefault, level=2), kinds.WithDefault)


def test_attributes_of_subclasses_that_hide_a_method_of_tensors() -> None:
    """``Tensor.values`` is for sparse tensors; a class may keep its own values under the name."""
    arrives(subclassed(Tagged, values=torch.ones(2)), Tagged)


def test_subclasses_rebuilt_by_a_function_of_their_own() -> None:
    tensor = subclassed(kinds.Reduced, number=1)
    assert same_as_torch(tensor, kinds.Reduced, kinds.make_reduced).number == 2


def test_subclasses_of_every_kind_of_tensor() -> None:
    tensors = [
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.arange(3).to(torch.uint16),
        torch.empty(3, device="meta"),
        corpus.make("quantized_view"),
        torch.randn(3, requires_grad=True),
    ]
    arrives([attributed(t.as_subclass(Tagged), tag=n) for n, t in enumerate(tensors)], Tagged)


def test_subclasses_share_storages() -> None:
    base = torch.randn(6)
    arrives([base, base[2:].as_subclass(Tagged), nn.Parameter(base[:2])], Tagged)


def test_a_subclass_has_to_be_trusted() -> None:
    tensor = torch.randn(3).as_subclass(Tagged)
    with pytest.raises(Exception, match="Tagged"):
        by_torch(tensor, weights_only=True)
    with pytest.raises(aiotorchio.UnsafeObjectError, match="Tagged"):
        by_us(tensor)
    assert_same(by_us(tensor, weights_only=False), tensor)


def test_torch_dispatch_with_a_storage() -> None:
    arrives([kinds.Dispatching(base := torch.randn(3)), base], kinds.Dispatching)


def test_wrapper_subclasses_that_are_traceable() -> None:
    a, b = torch.randn(3), torch.randn(3)
    inner = TwoTensor(a, b)
    arrives({"two": inner, "same": TwoTensor(a, a), "a": a, "again": inner}, TwoTensor)
    arrives(TwoTensor(inner, TwoTensor(b, a)), TwoTensor)
    arrives(TwoTensor(a.clone(), b.clone(), requires_grad=True), TwoTensor)
    arrives(nn.Parameter(TwoTensor(a, b)), TwoTensor)
    arrives(TwoTensor(torch.empty(3, device="meta"), torch.empty(3, device="meta")), TwoTensor)


def test_wrapper_subclasses_with_torch_dispatch_alone() -> None:
    arrives(corpus.Wrapper(torch.randn(4, 3).t()), corpus.Wrapper)


def test_wrapper_subclasses_with_cached_sizes() -> None:
    wrapper: Any = kinds.Sized(torch.randn(2, 3))
    assert wrapper.shape == (2, 3)
    assert "_sym_sizes_capsule" in vars(wrapper)
    assert vars(same_as_torch(wrapper, kinds.Sized)).keys() == {"wrapped"}


def test_wrapper_subclasses_go_where_map_location_says() -> None:
    wrapper = kinds.Elsewhere(torch.randn(3), "cuda:0")
    for location in ("cpu", torch.device("cpu"), None):
        with torch.serialization.safe_globals([kinds.Elsewhere]):
            theirs = by_torch(wrapper, map_location=location, weights_only=True)
            assert by_us(wrapper, map_location=location).device == theirs.device
    # torch looks for a device among the keys, which are strings.
    with torch.serialization.safe_globals([kinds.Elsewhere]):
        assert by_torch(wrapper, map_location={"cuda:0": "cpu"}).device.type == "cuda"
        assert by_us(wrapper, map_location={"cuda:0": "cpu"}).device.type == "cpu"


def test_a_callable_map_location_places_no_wrapper_subclass() -> None:
    wrapper = kinds.Elsewhere(torch.randn(3), "cuda:0")
    with torch.serialization.safe_globals([kinds.Elsewhere]):
        with pytest.raises(RuntimeError, match="Callable map_location"):
            by_torch(wrapper, map_location=lambda storage, _: storage)
        with pytest.raises(aiotorchio.InvalidObjectError, match="map_location"):
            by_us(wrapper, map_location=lambda storage, _: storage)


def test_masked_tensors() -> None:
    mask = torch.tensor([True, False, True])
    for requires_grad in (False, True):
        masked = masked_tensor(torch.randn(3), mask, requires_grad=requires_grad)
        arrives(masked, MaskedTensor)


@pytest.mark.filterwarnings("ignore:is_coalesced is not implemented:UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_masked_tensors_are_refused_by_torch_itself(layout: str) -> None:
    data, mask = torch.eye(3), torch.eye(3).bool()
    masked = masked_tensor(getattr(data, layout)(), getattr(mask, layout)())
    with pytest.raises((TypeError, NotImplementedError)) as theirs:
        torch_file(masked)
    with pytest.raises(theirs.type):
        our_file(masked)


# ------------------------------------------------------------------- parameters and buffers


def test_parameters_with_state() -> None:
    """``_rebuild_parameter_with_state``, over every kind of data."""
    arrives(
        [
            attributed(nn.Parameter(torch.randn(3, dtype=torch.complex64).conj()), tag=1),
            attributed(nn.Parameter(torch.empty(3, device="meta")), tag=1),
            attributed(nn.Parameter(corpus.make("quantized_view"), requires_grad=False), tag=1),
            attributed(nn.Parameter(torch.randn(3), requires_grad=False), tag=[1, {"a": 2}]),
        ]
    )


def test_parameters_of_other_tensors() -> None:
    arrives(
        [
            nn.Parameter(torch.eye(3).to_sparse()),
            nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
            nn.Parameter(torch.eye(3).to_sparse_csr()),
            nn.Parameter(corpus.make("nested")),
            nn.Parameter(corpus.make("jagged")),
            nn.Parameter(torch.randn(3).as_subclass(Tagged)),
        ],
        Tagged,
    )


def test_parameter_subclasses_become_parameters() -> None:
    for parameter in (marked := kinds.Marked(torch.randn(3)), attributed(marked, tag=1)):
        loaded = same_as_torch(parameter, kinds.Marked)
        assert type(loaded) is nn.Parameter
        assert torch.equal(loaded, parameter)


def test_buffers() -> None:
    for persistent in (True, False):
        loaded = arrives(nn.Buffer(torch.randn(3), persistent=persistent))
        assert isinstance(loaded, nn.Buffer)
        assert loaded.persistent is persistent


@pytest.mark.parametrize("kind", [UninitializedParameter, UninitializedBuffer])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_uninitialized_parameters_and_buffers(kind: Any, requires_grad: bool) -> None:
    """torch keeps ``requires_grad`` alone: not the dtype, and not the persistence."""
    tensor = kind(requires_grad=requires_grad, dtype=torch.float64)
    with torch.serialization.safe_globals([kind]):
        loads = [by_torch(tensor, weights_only=True), by_us(tensor)]
    loads += [by_torch(tensor, weights_only=False), by_us(tensor, weights_only=False)]
    for loaded in loads:
        assert type(loaded) is kind
        assert (loaded.requires_grad, loaded.data.dtype) == (requires_grad, torch.float32)
        loaded.materialize((2, 3))
        assert type(loaded) is kind.cls_to_become
    with pytest.raises(Exception, match=kind.__name__):
        by_torch(tensor, weights_only=True)
    with pytest.raises(aiotorchio.UnsafeObjectError, match=kind.__name__):
        by_us(tensor)


def test_state_dicts_of_lazy_modules() -> None:
    trusted: list[Any] = [UninitializedParameter, UninitializedBuffer]
    for make in (lambda: nn.LazyLinear(3), nn.LazyBatchNorm1d):
        state = make().state_dict()
        with torch.serialization.safe_globals(trusted):
            theirs, ours = by_torch(state, weights_only=True), by_us(state)
        assert list(map(type, theirs.values())) == list(map(type, ours.values()))
        make().load_state_dict(ours)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "has_names"), reason="this torch has no named tensors any more"
)
def test_named_tensors_are_refused_by_both() -> None:
    tensor = torch.ones(2, 3, names=("a", "b"))  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match=r"[Nn]amed tensors"):
        torch_file(tensor)
    with pytest.raises(RuntimeError, match=r"[Nn]amed tensors"):
        our_file(tensor)


# ------------------------------------------------------------------------------------ autograd


def warnings_of_hooks(save: Callable[[Any], Any], obj: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(obj)
    return [text for w in caught if (text := str(w.message)).startswith("backward hook")]


def hooked(tensor: Any, hook: Callable[[Any], Any] | None = None) -> Any:
    tensor.requires_grad_()
    tensor.register_hook(hook or (lambda grad: grad))
    return tensor


def test_backward_hooks_are_warned_of_as_in_torch() -> None:
    for tensor in (
        hooked(torch.randn(3)),
        hooked(attributed(torch.randn(3), tag=1)),
        hooked(torch.randn(3).as_subclass(Tagged)),
        hooked(torch.empty(3, device="meta")),
        hooked(torch.eye(3).to_sparse()),
        hooked(attributed(nn.Parameter(torch.randn(3)), tag=1)),
    ):
        theirs = warnings_of_hooks(torch_file, tensor)
        assert warnings_of_hooks(our_file, tensor) == theirs
        assert len(theirs) == (not isinstance(tensor, nn.Parameter))


def test_backward_hooks_are_dropped() -> None:
    tensor = hooked(torch.randn(3))
    with pytest.warns(UserWarning, match="backward hook"):
        assert arrives(tensor)._backward_hooks is None


def test_backward_hooks_of_parameters_are_warned_of_too() -> None:
    """torch drops them without a warning."""
    parameter = hooked(nn.Parameter(torch.randn(3)))
    assert not warnings_of_hooks(torch_file, parameter)
    assert len(warnings_of_hooks(our_file, parameter)) == 1


def test_backward_hooks_are_warned_of_once_in_a_pickle() -> None:
    obj = [hooked(torch.randn(3)), shared := [1], shared]
    assert warnings_of_hooks(our_file, obj) == warnings_of_hooks(torch_file, obj)


def test_backward_hooks_that_ask_for_no_warning() -> None:
    @torch.utils.hooks.unserializable_hook  # type: ignore[untyped-decorator]
    def silent(grad: Any) -> Any:
        return grad

    tensor = hooked(torch.randn(3), silent)
    assert warnings_of_hooks(torch_file, tensor) == warnings_of_hooks(our_file, tensor) == []

    def ignored(grad: Any) -> Any:
        return grad

    # The name in a comment of torch/_utils.py; no code of torch reads it.
    ignored._torch_serialize_ignore = True  # type: ignore[attr-defined]
    tensor = hooked(torch.randn(3), ignored)
    theirs = warnings_of_hooks(torch_file, tensor)
    assert warnings_of_hooks(our_file, tensor) == theirs != []


def test_other_hooks_are_dropped_in_silence() -> None:
    tensor = torch.randn(3, requires_grad=True)
    tensor.register_post_accumulate_grad_hook(lambda parameter: None)
    arrives(tensor)


def test_requires_grad_of_leaves_and_others() -> None:
    leaf = torch.randn(3, requires_grad=True)
    results = [leaf * 2, (leaf * 2).view(3, 1), leaf.detach(), torch.randn(3)]
    for loaded, sent in zip(arrives(results), results, strict=True):
        assert loaded.is_leaf
        assert loaded.grad_fn is None
        assert loaded.requires_grad is sent.requires_grad


def test_grad_is_not_carried() -> None:
    leaf = torch.randn(3, requires_grad=True)
    other = leaf * 2
    other.retain_grad()
    other.sum().backward()
    parameter = attributed(nn.Parameter(torch.randn(3)), grad=torch.ones(3))
    for loaded in arrives([leaf, other, parameter]):
        assert loaded.grad is None


def test_requires_grad_of_coo_tensors_is_not_carried() -> None:
    tensor = torch.eye(3).to_sparse().requires_grad_()
    assert not same_as_torch(tensor).requires_grad
    assert arrives(nn.Parameter(tensor)).requires_grad


COMPRESSED: dict[str, Callable[[], Any]] = {
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
}


@pytest.mark.parametrize("layout", COMPRESSED)
def test_requires_grad_of_compressed_tensors(layout: str) -> None:
    tensor = COMPRESSED[layout]().requires_grad_()
    assert by_torch(tensor).requires_grad
    loaded = by_us(tensor)
    assert_same(loaded, tensor)
    assert loaded.is_leaf  # in torch it is no leaf


def test_conj_and_neg_bits() -> None:
    numbers = torch.randn(2, 3, dtype=torch.complex64)
    views = [numbers.conj(), numbers.mH, torch._neg_view(numbers.conj()), torch._neg_view(numbers)]
    views.append(torch.randn(3, dtype=torch.complex64).conj().imag)
    for loaded, view in zip(arrives([*views, numbers]), views, strict=False):
        assert torch.equal(loaded.resolve_conj().resolve_neg(), view.resolve_conj().resolve_neg())


def test_conj_bits_of_meta_tensors() -> None:
    """torch loses them."""
    tensor = torch.empty(3, dtype=torch.complex64, device="meta").conj()
    assert not by_torch(tensor).is_conj()
    assert_same(by_us(tensor), tensor)


def test_neg_bit_of_integers() -> None:
    """Only ``torch._neg_view``, which is private, makes them."""
    with pytest.raises(TypeError, match="resolve_neg"):
        by_us(torch._neg_view(torch.arange(3)))


def test_inference_tensors_arrive_as_normal_ones() -> None:
    with torch.inference_mode():
        tensors = {"w": torch.randn(3), "p": nn.Parameter(torch.randn(3))}
    for loaded in same_as_torch(tensors).values():
        assert not loaded.is_inference()


def test_a_load_in_inference_mode_makes_normal_tensors() -> None:
    """torch loads inference tensors, which cannot be trained afterwards."""
    tensors = {"w": torch.randn(3), "p": nn.Parameter(torch.randn(3))}
    with torch.inference_mode():
        theirs, ours = by_torch(tensors), by_us(tensors)
        assert theirs["w"].is_inference()
    assert_same(ours, tensors)
    ours["w"].requires_grad_().square().sum().backward()


def test_a_load_without_gradients() -> None:
    with torch.no_grad():
        arrives([torch.randn(3, requires_grad=True), nn.Parameter(torch.randn(3))])


def test_a_load_under_another_default_device_or_dtype() -> None:
    """torch puts sparse tensors on the default device, and their parts elsewhere."""
    tensors = [torch.eye(3).to_sparse(), torch.randn(2), corpus.make("quantized_view")]
    with torch.device("meta"):
        theirs, ours = by_torch(tensors), by_us(tensors)
    assert theirs[0].device.type == "meta"
    assert_same(ours, tensors)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ours = by_us(tensors)
    finally:
        torch.set_default_dtype(before)
    assert_same(ours, tensors)


def test_tensors_of_function_transforms_are_refused_by_both() -> None:
    def refused(tensor: torch.Tensor) -> torch.Tensor:
        for save in (torch_file, our_file):
            with pytest.raises((NotImplementedError, RuntimeError)):
                save(tensor)
        return tensor.sum()

    torch.func.vmap(refused)(torch.randn(2, 3))
    torch.func.grad(refused)(torch.randn(3))


def test_other_tensors_without_a_storage_are_refused_by_both() -> None:
    functional = torch._to_functional_tensor(torch.randn(3))
    for tensor in (torch._efficientzerotensor(3), torch.randn(3, 3).to_mkldnn(), functional):
        for save in (torch_file, our_file):
            with pytest.raises((NotImplementedError, RuntimeError)):
                save(tensor)


# ------------------------------------------------------------------------------------- sparse


INDICES = torch.tensor([[0, 1, 1], [2, 0, 2]])


def coo(is_coalesced: bool | None) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        INDICES, torch.ones(3), (2, 3), is_coalesced=is_coalesced, check_invariants=True
    )


@pytest.mark.parametrize("is_coalesced", [True, False, None])
def test_sparse_coo(is_coalesced: bool | None) -> None:
    tensor = coo(is_coalesced)
    assert arrives(tensor).is_coalesced() is bool(is_coalesced)
    arrives([tensor, tensor, INDICES, tensor.coalesce()])


def test_sparse_coo_that_can_not_be_coalesced() -> None:
    twice = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 0]]), torch.randn(3), (2,), check_invariants=True
    )
    assert not arrives(twice).is_coalesced()
    claimed = torch.sparse_coo_tensor(
        twice._indices(), twice._values(), (2,), is_coalesced=True, check_invariants=False
    )
    # The flag is wrong: torch accepts it.
    assert by_torch(claimed).is_coalesced()
    with pytest.raises(aiotorchio.InvalidObjectError, match="coalesced"):
        by_us(claimed)


def test_sparse_coo_without_dimensions_or_elements() -> None:
    arrives(
        [
            torch.sparse_coo_tensor(torch.zeros(0, 1), torch.ones(1), (), check_invariants=True),
            torch.sparse_coo_tensor(
                torch.zeros(2, 0), torch.ones(0), (2, 0), check_invariants=True
            ),
            torch.eye(3).bfloat16().to_sparse(),
            torch.randn(3, 3, dtype=torch.complex64).to_sparse().conj(),
        ]
    )


@pytest.mark.parametrize("layout", COMPRESSED)
def test_sparse_compressed(layout: str) -> None:
    tensor = COMPRESSED[layout]()
    arrives([tensor, tensor, tensor.values(), tensor * 2])


def test_sparse_compressed_of_other_indices_and_values() -> None:
    rows, columns = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    arrives(
        [
            torch.sparse_csr_tensor(
                rows.int(), columns.int(), torch.randn(2), (2, 2), check_invariants=True
            ),
            torch.sparse_csr_tensor(
                rows, columns, torch.randn(2, 3), (2, 2, 3), check_invariants=True
            ),
            torch.ones(2, 4, 4).to_sparse_bsr((2, 2)),
            torch.randn(3, 3, dtype=torch.complex64).to_sparse_csr().conj(),
        ]
    )


def bad_sparse() -> Iterator[torch.Tensor]:
    """Yield tensors with an index that is one too large."""
    yield torch.sparse_coo_tensor(torch.tensor([[3]]), torch.ones(1), (3,), check_invariants=False)
    for layout in (torch.sparse_csr, torch.sparse_csc):
        yield torch.sparse_compressed_tensor(
            torch.tensor([0, 1]),
            torch.tensor([3]),
            torch.ones(1),
            (1, 3) if layout is torch.sparse_csr else (3, 1),
            layout=layout,
            check_invariants=False,
        )
    for layout in (torch.sparse_bsr, torch.sparse_bsc):
        yield torch.sparse_compressed_tensor(
            torch.tensor([0, 1]),
            torch.tensor([2]),
            torch.ones(1, 2, 2),
            (2, 4) if layout is torch.sparse_bsr else (4, 2),
            layout=layout,
            check_invariants=False,
        )


class Untouched(list[Any]):
    def append(self, value: Any) -> None:
        raise AssertionError("something was appended to what all threads share")

    clear = append  # type: ignore[assignment]


def test_sparse_invariants_are_checked_without_what_all_threads_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = [our_file(make()) for make in COMPRESSED.values()] + [our_file(coo(True))]
    bad = [our_file(tensor) for tensor in bad_sparse()]
    flag: Any = torch.sparse.check_sparse_tensor_invariants
    before = flag.is_enabled()

    def sets_flag(*_: Any, **__: Any) -> None:
        raise AssertionError("this sets the flag of the process")

    with monkeypatch.context() as patch:
        patch.setattr(torch._utils, "_sparse_tensors_to_validate", Untouched())
        patch.setattr(torch._C, "_set_check_sparse_tensor_invariants", sets_flag)
        # The constructors set the flag and restore it.
        patch.setattr(torch, "sparse_coo_tensor", sets_flag)
        patch.setattr(torch, "sparse_compressed_tensor", sets_flag)
        for weights_only in (True, False):
            for file in good:
                file.seek(0)
                aiotorchio.load(file, weights_only=weights_only)
            for file in bad:
                file.seek(0)
                with pytest.raises(aiotorchio.InvalidObjectError):
                    aiotorchio.load(file, weights_only=weights_only)
    assert flag.is_enabled() == before


def test_sparse_invariants_are_always_checked() -> None:
    """torch checks them when a flag says so, for all threads at once."""
    for tensor in bad_sparse():
        assert by_torch(tensor).shape == tensor.shape
        with pytest.raises(aiotorchio.InvalidObjectError):
            by_us(tensor)
        with torch.sparse.check_sparse_tensor_invariants():
            with pytest.raises(RuntimeError):
                by_torch(tensor)
            with pytest.raises(aiotorchio.InvalidObjectError):
                by_us(tensor)


# ---------------------------------------------------------------- quantized, nested, and meta


def per_channel(
    dtype: torch.dtype, axis: int = 0, zero_points: torch.dtype = torch.int64
) -> torch.Tensor:
    scales = torch.tensor([0.1, 0.2, 0.3])
    shape = [4, 4, 4]
    shape[axis] = 3
    points = torch.tensor([0, 1, 2]).to(zero_points)
    return torch.quantize_per_channel(torch.randn(shape), scales, points, axis, dtype)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
def test_quantized_per_tensor(dtype: torch.dtype) -> None:
    tensor = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, dtype)
    arrives([tensor, tensor, tensor[1:, 1:], tensor.t(), tensor.int_repr()])
    arrives([torch.quantize_per_tensor(torch.randn(shape), 0.1, 2, dtype) for shape in ((), 0)])


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantized_per_channel(dtype: torch.dtype, axis: int) -> None:
    tensor = per_channel(dtype, axis)
    assert arrives(tensor).qscheme() is torch.per_channel_affine
    assert arrives([tensor, tensor])[0].q_per_channel_axis() == axis


def test_quantized_per_channel_with_float_parameters() -> None:
    """They are ``per_channel_affine_float_qparams``; torch writes another name, and loads it."""
    tensor = per_channel(torch.quint8, 1, torch.float32)
    assert tensor.qscheme() is torch.per_channel_affine_float_qparams
    assert arrives(tensor).qscheme() is torch.per_channel_affine_float_qparams


def test_quantized_views_and_layouts() -> None:
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    scale, point = torch.tensor(0.1).expand(3), torch.tensor(0).expand(3)
    arrives(
        [
            per_channel(torch.qint8)[1:],
            per_channel(torch.qint8)[:, 1:],
            torch.quantize_per_channel(images, scale, point, 1, torch.qint8),
            torch.quantize_per_channel(
                torch.randn(0, 4), torch.randn(0), torch.zeros(0).long(), 0, torch.qint8
            ),
        ]
    )


@pytest.mark.parametrize("dtype", [torch.quint4x2, torch.quint2x4])
def test_quantized_to_less_than_a_byte(dtype: torch.dtype) -> None:
    scales, points = torch.rand(4) + 0.1, torch.zeros(4)
    for width in (8, 7, 1):
        arrives(torch.quantize_per_channel(torch.randn(4, width), scales, points, 0, dtype))
    plain = torch._empty_affine_quantized([2, 8], scale=1.0, zero_point=0, dtype=dtype)
    torch.empty(0, dtype=torch.uint8).set_(plain.untyped_storage()).fill_(0x1B)
    arrives(plain)


@pytest.mark.parametrize(
    "scheme",
    [
        *(torch.per_tensor_affine, torch.per_tensor_symmetric, torch.per_channel_affine),
        *(torch.per_channel_symmetric, torch.per_channel_affine_float_qparams),
    ],
)
def test_quantization_schemes_themselves(scheme: torch.qscheme) -> None:
    assert by_torch({"q": scheme}) == {"q": scheme}
    assert by_us({"q": scheme}) == {"q": scheme}


def test_quantized_modules() -> None:
    for module in (
        torch.ao.nn.quantized.Linear(4, 3),
        torch.ao.nn.quantized.Conv2d(3, 2, 2),
        torch.ao.nn.quantized.dynamic.Linear(4, 3),
    ):
        arrives(module.state_dict())


def test_nested_strided() -> None:
    nested: Any = corpus.make("nested")
    arrives([nested, nested, nested.transpose(1, 2), nested[1]])
    arrives(corpus.make("nested").requires_grad_())
    arrives(torch.nested.nested_tensor([torch.randn(2), torch.randn(4)]))


def test_an_empty_nested_tensor_is_refused_by_torch_too() -> None:
    nested = torch.nested.nested_tensor([])
    with pytest.raises(RuntimeError, match="two dimensional"):
        by_torch(nested)
    with pytest.raises(aiotorchio.InvalidObjectError):
        by_us(nested)


def jagged(**options: Any) -> Any:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **options)


def test_nested_jagged() -> None:
    nested = jagged()
    arrives([nested, nested, nested.transpose(1, 2)])
    arrives(jagged(requires_grad=True))
    values, offsets = torch.randn(6, 3), torch.tensor([0, 2, 6])
    arrives(torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=2, max_seqlen=4))
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 1])
    arrives(torch.nested.narrow(torch.randn(3, 5, 2), 1, starts, lengths, layout=torch.jagged))
    with torch.device("meta"):
        nested = jagged()
    arrives(nested)


def test_nested_jagged_of_one_raggedness() -> None:
    """Tensors that shared a ragged dimension share it again."""
    nested = jagged()
    for loaded in (by_torch([nested, nested * 2]), by_us([nested, nested * 2])):
        assert loaded[0].shape == loaded[1].shape
        assert torch.equal((loaded[0] + loaded[1]).values(), nested.values() * 3)


def refusals(obj: object, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors of torch and of aiotorchio without imports that would allow more names."""
    files = (torch_file(obj), our_file(obj))
    monkeypatch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", set())
    with pytest.raises(Exception) as theirs:
        torch.load(files[0], weights_only=True)
    with pytest.raises(aiotorchio.UnsafeObjectError) as ours:
        aiotorchio.load(files[1])
    return [str(theirs.value), str(ours.value)]


def test_the_error_for_a_jagged_tensor_says_what_to_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, ours = refusals(jagged(), monkeypatch)
    for error in (theirs, ours):
        assert "``torch._dynamo`` must be imported to load nested jagged tensors" in error


def test_the_error_for_a_dtensor_says_what_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    with corpus.process_group():
        theirs, ours = refusals(corpus.dtensor(), monkeypatch)
    for error in (theirs, ours):
        assert "``torch.distributed.tensor`` must be imported to load DTensors" in error


def test_meta_tensors_share_their_storages() -> None:
    base = torch.empty(6, device="meta")
    tensors = [base, base[2:], base.view(2, 3).t(), nn.Parameter(base)]
    theirs, ours = by_torch(tensors), by_us(tensors)
    assert len({tensor.untyped_storage()._cdata for tensor in theirs}) == 4
    assert len({tensor.untyped_storage()._cdata for tensor in ours}) == 1
    assert_same(ours, tensors)


def test_meta_tensors_of_subclasses() -> None:
    """aiotorchio calls torch's own function: shape and strides, and a separate storage."""
    tensor = torch.empty(6, device="meta")[2:].as_subclass(Tagged)
    assert same_as_torch(tensor, Tagged).storage_offset() == 0


# ------------------------------------------------------------------------ dtypes and storages


@pytest.mark.parametrize("dtype", sorted(torch.storage._new_dtypes(), key=str), ids=str)
def test_dtypes_of_rebuild_tensor_v3(dtype: torch.dtype) -> None:
    tensor = of_dtype(str(dtype).removeprefix("torch."), 6)
    assert b"_rebuild_tensor_v3" in torch_file(tensor).getvalue()
    arrives([tensor, tensor[2:], nn.Parameter(tensor, requires_grad=False), dtype])


def test_two_dtypes_over_one_storage() -> None:
    numbers = torch.arange(4.0)
    for other in (numbers.view(torch.int32), numbers.view(torch.uint8), numbers.untyped_storage()):
        with pytest.raises(RuntimeError, match="view the same data as different types"):
            torch_file([numbers, other])
        assert_same(by_us([numbers, other]), [numbers, other])


def test_typed_storages() -> None:
    numbers = torch.arange(6.0)
    storage = numbers._typed_storage()
    arrives([storage, storage, numbers, numbers[2:]])
    arrives([torch.empty(0)._typed_storage(), of_dtype("bfloat16")._typed_storage()])
    arrives(corpus.make("quantized_view")._typed_storage())
    # Two objects around one storage arrive as one object, as in torch.
    loaded = same_as_torch([numbers._typed_storage(), numbers._typed_storage()])
    assert loaded[0] is loaded[1]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_storages_of_the_old_classes() -> None:
    for name in ("FloatStorage", "LongStorage", "BoolStorage", "ComplexDoubleStorage"):
        arrives(getattr(torch, name)(3).fill_(1))
    arrives(torch.FloatTensor([1, 2, 3]))


def test_untyped_storages() -> None:
    """torch returns typed storages, of bytes."""
    storage = torch.arange(3).untyped_storage()
    assert type(by_torch(storage, weights_only=True)) is torch.TypedStorage
    assert_same(by_us(storage), storage)


def test_lists_of_storages_that_share() -> None:
    one, two = torch.arange(3).untyped_storage(), torch.arange(3).untyped_storage()
    theirs = by_torch([one, two, one], weights_only=True)
    ours = by_us([one, two, one])
    assert_same(ours, [one, two, one])
    for storages in (theirs, ours):
        assert storages[0] is storages[2]
        assert storages[0].data_ptr() != storages[1].data_ptr()


def test_empty_storages() -> None:
    empty = torch.empty(0)
    arrives([empty, torch.empty(0, 3), torch.empty(2, 0, dtype=torch.bool)])
    # torch makes a storage for each tensor.
    assert_same(by_us([empty, empty.view(0, 1)]), [empty, empty.view(0, 1)])
    theirs = by_torch([empty, empty.view(0, 1)])
    assert theirs[0].untyped_storage()._cdata != theirs[1].untyped_storage()._cdata


def test_storages_on_meta() -> None:
    """torch cannot save them."""
    tensor = torch.empty(3, device="meta")
    for storage in (tensor.untyped_storage(), tensor._typed_storage()):
        with pytest.raises(NotImplementedError):
            torch_file(storage)
        assert_same(by_us(storage), storage)


def test_a_tensor_whose_storage_was_emptied_can_be_loaded_by_nobody() -> None:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        by_torch(tensor)
    with pytest.raises(aiotorchio.InvalidObjectError, match="storage 0, which has 0 bytes"):
        by_us(tensor)


def test_tensors_in_shared_memory() -> None:
    arrives(torch.randn(3).share_memory_())


# ------------------------------------------------------------------------------ distributed

ROOT = Path(__file__).parents[2]
RANKS = 3
DEADLINE = patience(120)


def test_dtensors_of_several_ranks(tmp_path: Path) -> None:
    """Each rank sends its DTensors to itself and to the next rank; see ``ranks``."""
    pairs = [socket.socketpair() for _ in range(RANKS)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else None
    processes = []
    try:
        for rank in range(RANKS):
            ends = pairs[rank][0].fileno(), pairs[rank - 1][1].fileno()
            arguments = map(str, (rank, RANKS, tmp_path / "store", *ends))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.parity.ranks", *arguments],
                    cwd=ROOT,
                    env=environment,
                    pass_fds=ends,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for pair in pairs:
            for end in pair:
                end.close()
        end_of_time = time.monotonic() + DEADLINE
        outputs = [
            process.communicate(timeout=max(end_of_time - time.monotonic(), 0.1))[0]
            for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    for rank, output in enumerate(outputs):
        assert f"the same {rank}" in output, "\n".join(outputs)


def test_dtensors_load_without_a_process_group() -> None:
    with corpus.process_group():
        obj = corpus.dtensor()
        theirs, ours = torch_file(obj), our_file(obj)
    assert_same(aiotorchio.load(ours), torch.load(theirs, weights_only=True))


@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
def test_sharded_tensors() -> None:
    """DTensor replaced these tensors; they need a trusted sender, as in torch."""
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    with corpus.process_group():
        spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu"])
        sharded = sharded_tensor.rand(spec, 6, 2)
        with pytest.raises(Exception, match="ShardedTensor"):
            by_torch(sharded, weights_only=True)
        with pytest.raises(aiotorchio.UnsafeObjectError, match="ShardedTensor"):
            by_us(sharded)
        theirs, ours = by_torch(sharded, weights_only=False), by_us(sharded, weights_only=False)
        assert type(ours) is type(theirs)
        assert ours.metadata() == theirs.metadata()
        for one, two in zip(ours.local_shards(), sharded.local_shards(), strict=True):
            assert_same(one.tensor, two.tensor)


# ---------------------------------------------------------------- foreign byte order


def turned(storage: torch.UntypedStorage, unit: int) -> torch.UntypedStorage:
    """Convert a storage to foreign byte order."""
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    return data.view(-1, unit).flip(1).reshape(-1).contiguous().untyped_storage()


def of_the_other_kind(obj: object) -> tuple[bytes, io.BytesIO]:
    """Make a message and a file of torch as a machine of the other byte order writes them."""
    parts = craft.flattened(obj)
    units = [row.unit for row in parts.header.storages]
    storages = [turned(one, unit) for one, unit in zip(parts.storages, units, strict=True)]
    parts.header.byteorder = OTHER  # type: ignore[assignment]
    file = io.BytesIO()
    with zipfile.ZipFile(torch_file(obj)) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            data, (*_, folder, record) = source.read(name), name.split("/")
            if record == "byteorder":
                data = OTHER.encode()
            elif folder == "data":
                # torch numbers the storages in the order of the object, as aiotorchio's tables do.
                data = bytes(storages[int(record)].tolist())
            target.writestr(name, data)
    file.seek(0)
    return craft.compose(replace(parts, storages=storages)), file


def loaded_by_torch(file: io.BytesIO) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "name",
    [
        *("conj_transposed", "conj_and_neg", "parameter_conj", "real_view"),
        *("quantized_per_tensor", "quantized_per_channel", "quantized_float_qparams"),
        *("coo", "coo_uncoalesced", "coo_hybrid", "csr", "csc", "bsr", "bsc", "csr_batched"),
        *("nested", "nested_transposed", "jagged", "shared_storage", "many_small"),
        *("typed_storage", "typed_storage_bfloat16", "parameter_with_attributes"),
        *("subclass_with_attributes", "wrapper_subclass", "checkpoint"),
    ],
)
def test_numbers_of_the_other_byte_order(name: str) -> None:
    obj, options = corpus.make(name), corpus.LOAD_OPTIONS.get(name, {})
    message, file = of_the_other_kind(obj)
    with torch.serialization.safe_globals(list(options.get("safe_globals", ()))):
        ours = craft.load(message)
        assert_same(ours, loaded_by_torch(file))
    assert_same(ours, obj)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "complex32", "bits16"])
def test_numbers_of_v3_of_the_other_byte_order(dtype: str) -> None:
    """torch does not convert them: it saves their storages untyped, as bytes."""
    tensor = of_dtype(dtype)
    message, file = of_the_other_kind(tensor)
    assert_same(craft.load(message), tensor)
    with pytest.raises(AssertionError, match="other bytes"):
        assert_same(loaded_by_torch(file), tensor)


def test_untyped_bytes_of_the_other_byte_order_are_refused() -> None:
    """Their dtype is unknown; torch leaves them as they are."""
    storage = torch.arange(3, dtype=torch.int16).untyped_storage()
    parts = craft.flattened([storage])
    parts.header.byteorder = OTHER  # type: ignore[assignment]
    with pytest.raises(aiotorchio.InvalidObjectError, match="several"):
        craft.load(craft.compose(parts))


# ------------------------------------------------------- names that torch allows for other files

CLASSES = {f"{kind.__module__}.{kind.__name__}" for kind in torch._storage_classes} | {
    f"{kind.__module__}.{kind.__name__}" for kind in torch._tensor_classes
}
OLD = {
    "torch._tensor._rebuild_from_type",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_xla_tensor",
}


def globals_of(obj: object) -> set[str]:
    parts = craft.flattened(obj)
    if parts.header.codec == "tree":
        return set()
    opcodes = pickletools.genops(parts.skeleton)
    return {str(arg).replace(" ", ".") for code, arg, _ in opcodes if code.name == "GLOBAL"}


def test_no_message_has_the_old_names() -> None:
    named: set[str] = set()
    for name in corpus.CASES:
        if name != "pretrained":
            named |= globals_of(corpus.make(name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        named |= globals_of([torch.FloatStorage(2), torch.FloatTensor(2), frozenset()])
    assert "torch._tensor._rebuild_from_type_v2" in named
    assert not named & (CLASSES | OLD)


@pytest.mark.parametrize("path", sorted(OLD))
def test_old_functions_are_refused(path: str) -> None:
    module, _, name = path.rpartition(".")
    code = craft.call(module, name, craft.storage(0, "float32"), 0, (2,), (1,))
    with pytest.raises(aiotorchio.UnsafeObjectError, match=name):
        craft.load_pickle(craft.pickled(code), [torch.ones(2)])


def test_classes_of_storages_and_tensors_are_refused() -> None:
    """torch's list has them, for its own files: a call would return uninitialized memory."""
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    for path in sorted(CLASSES):
        assert path in allowed
        module, _, name = path.rpartition(".")
        for code in (
            craft.name(module, name),
            craft.call(module, name, 4),
            craft.new(module, name, 4),
        ):
            with pytest.raises(aiotorchio.UnsafeObjectError, match=name):
                craft.load_pickle(craft.pickled(code))


def test_classes_as_values_of_an_object() -> None:
    """A class itself is sent as its name; the caller must trust it."""
    obj = {"kind": torch.Tensor, "old": torch.FloatTensor, "parameter": nn.Parameter}
    assert by_torch(obj, weights_only=True) == obj
    with pytest.raises(aiotorchio.UnsafeObjectError):
        by_us(obj)
    assert by_us(obj, safe_globals=list(obj.values())) == obj
    assert by_us(obj, weights_only=False) == obj


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("location", [None, "meta", torch.device("meta"), {"cpu": "meta"}])
def test_tensors_of_devices_without_storages(requires_grad: bool, location: Any) -> None:
    """Tensors as they come from xla, maia and mtia."""
    sent = [kinds.ByCpu(torch.randn(3).requires_grad_(requires_grad), "cpu"), torch.ones(2)]
    for weights_only in (True, False):
        theirs = by_torch(sent, map_location=location, weights_only=weights_only)
        ours = by_us(sent, map_location=location, weights_only=weights_only)
        assert type(ours[0]) is torch.Tensor
        assert_same(ours, theirs)


def test_a_callable_map_location_places_no_tensor_without_storage() -> None:
    sent = kinds.ByCpu(torch.randn(3), "cuda:0")
    with pytest.raises(RuntimeError, match="Callable map_location"):
        by_torch(sent, map_location=lambda storage, _: storage)
    with pytest.raises(aiotorchio.InvalidObjectError, match="map_location"):
        by_us(sent, map_location=lambda storage, _: storage)


def test_a_device_without_storages_that_is_not_there() -> None:
    """torch's error names the device, and so does aiotorchio's."""
    sent = kinds.ByCpu(torch.randn(3), "xla:0")
    with pytest.raises((RuntimeError, NotImplementedError)):
        by_torch(sent)
    with pytest.raises(aiotorchio.AiotorchioError):
        by_us(sent)


def test_safe_globals_of_torch_count() -> None:
    tensor = torch.randn(3).as_subclass(Tagged)
    with torch.serialization.safe_globals([Tagged]):
        assert_same(by_us(tensor), by_torch(tensor, weights_only=True))
    assert_same(by_us(tensor, safe_globals=[Tagged]), tensor)
