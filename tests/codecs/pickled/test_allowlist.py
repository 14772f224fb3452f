"""The allowlist: which classes and functions a pickle may name, and the checks of their arguments.

Pickles are assembled opcode by opcode with ``support/craft.py`` and loaded.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from typing import Any

import numpy
import pytest
import torch
from torch import _weights_only_unpickler

import aiotorchio
from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.safe_builtins import make_device
from aiotorchio.limits import Limits
from tests.support import corpus, craft
from tests.support.craft import call, name, pickled, strided, subclassed


class Sealed(torch.Tensor):
    """A subclass that declares the attributes of its instances."""

    __slots__ = ("slot",)
    scale: float
    slot: int

    def method(self) -> None: ...


class Stateful(torch.Tensor):
    """A subclass that restores its own state."""

    def __setstate__(self, state: Any) -> None:
        self.restored = state


@pytest.mark.parametrize("args", [("cuda", 300), ("cuda:300",)], ids=str)
def test_a_device_that_torch_reads_as_another(args: tuple[Any, ...]) -> None:
    asked = ":".join(map(str, args))
    with pytest.raises(
        aiotorchio.InvalidObjectError, match=f"torch reads device '{asked}' as cuda"
    ):
        make_device(*args)


def test_the_names_are_those_of_torch() -> None:
    ours = set(Allowlist((), Limits(), None).globals)
    default = set(_weights_only_unpickler._get_allowed_globals())
    added = {"builtins.bytes", "builtins.frozenset", *map(str, corpus_dtypes())}
    assert ours - default <= added
    # The allowlist has no typed storages, which are persistent ids here, and no classes of typed
    # tensors, which are constructors. The other missing functions belong to old versions of torch
    # and to devices without storages.
    missing = {path for path in default - ours if not path.endswith(("Storage", "Tensor"))}
    assert missing <= {
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._utils._rebuild_tensor",
    }


def corpus_dtypes() -> list[torch.dtype]:
    return [getattr(torch, dtype) for dtype in corpus.DTYPES]


def test_safe_globals_hold_for_one_call() -> None:
    data = craft.compose(craft.flattened(corpus.make("trusted_class")))
    craft.load(data, safe_globals=[corpus.Point])
    with pytest.raises(aiotorchio.UnsafeObjectError, match="Point"):
        craft.load(data)


def test_what_torch_was_told_counts() -> None:
    data = craft.compose(craft.flattened(corpus.make("trusted_class")))
    with torch.serialization.safe_globals([corpus.Point]):
        craft.load(data)


def test_a_path_of_another_name() -> None:
    data = pickled(call("elsewhere.module", "Name", 1.5, craft.tensor(0)))
    loaded = craft.load_pickle(
        data, [torch.ones(1)], safe_globals=[(corpus.Point, "elsewhere.module.Name")]
    )
    assert type(loaded) is corpus.Point


@pytest.mark.parametrize("entry", [(corpus.Point,), (corpus.Point, 1), 5, "os.system"])
def test_malformed_safe_globals(entry: Any) -> None:
    with pytest.raises(TypeError, match="safe_globals"):
        craft.load_pickle(pickled(1), safe_globals=[entry])
    # The option is checked before any byte of the message is read.
    file = io.BytesIO(b"any")
    with pytest.raises(TypeError, match="safe_globals"):
        aiotorchio.load(file, safe_globals=[entry])
    assert file.tell() == 0


def source() -> tuple[Any, ...]:
    return (craft.storage(0, "float32"), 0, (4,), (1,), False, craft.ordered_dict())


REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def load(value: Any, *kinds: Any) -> Any:
    return craft.load_pickle(pickled(value), [torch.arange(4.0)], safe_globals=kinds)


@pytest.mark.parametrize("state", [{"scale": 2.0}, {"free": 1}, (None, {"slot": 3}), ({}, None)])
def test_attributes_that_a_subclass_has(state: Any) -> None:
    kind = name("tests.codecs.pickled.test_allowlist", "Sealed")
    loaded = load(subclassed(REBUILD, kind, source(), state), Sealed)
    assert type(loaded) is Sealed
    for part in state if isinstance(state, tuple) else [state]:
        for key, value in (part or {}).items():
            assert getattr(loaded, key) == value


@pytest.mark.parametrize("key", ["data", "grad", "__class__", "__array_interface__"])
def test_attributes_that_a_subclass_does_not_have(key: str) -> None:
    kind = name("tests.codecs.pickled.test_allowlist", "Sealed")
    with pytest.raises(aiotorchio.UnsafeObjectError, match=key):
        load(subclassed(REBUILD, kind, source(), {key: 1}), Sealed)


def test_a_subclass_that_restores_itself() -> None:
    kind = name("tests.codecs.pickled.test_allowlist", "Stateful")
    assert load(subclassed(REBUILD, kind, source(), {"data": 1}), Stateful).restored == {"data": 1}


def test_a_state_for_a_trusted_tensor_class_is_refused() -> None:
    made = subclassed(REBUILD, name("tests.support.corpus", "Tagged"), source(), {})
    with pytest.raises(aiotorchio.UnsafeObjectError, match="state"):
        load(craft.build(made, {"a": 1}), corpus.Tagged)
    allowlist = Allowlist([corpus.Tagged, Stateful, corpus.Point], Limits(), None)
    assert "tests.support.corpus.Tagged" not in allowlist.stateful
    assert {"tests.codecs.pickled.test_allowlist.Stateful", "tests.support.corpus.Point"} <= set(
        allowlist.stateful
    )


def test_a_plain_tensor_from_a_parameter() -> None:
    parameter = name("torch._utils", "_rebuild_parameter")
    args = (craft.tensor(0), True, craft.ordered_dict())
    loaded = load(subclassed(parameter, name("torch", "Tensor"), args, {"note": 1}))
    assert (type(loaded), loaded.note) == (torch.Tensor, 1)


def test_old_forms() -> None:
    """Forms of tensors that only older versions of torch wrote."""
    v3 = craft.rebuild(
        "_rebuild_tensor_v3",
        *(craft.storage(0), 1, (2,), (1,), False, craft.ordered_dict(), name("torch", "float32")),
    )
    corpus.assert_same(load(v3), torch.arange(4.0)[1:3])
    conj = craft.load_pickle(
        pickled(strided(0, "complex64", 0, (2,), (1,), {"conj": True, "neg": True})),
        [torch.ones(2, dtype=torch.complex64)],
    )
    assert conj.is_conj() and conj.is_neg()
    coo = craft.rebuild(
        "_rebuild_sparse_tensor",
        call("torch.serialization", "_get_layout", "torch.sparse_coo"),
        (craft.tensor(0), craft.tensor(1), call("torch", "Size", (3,))),
    )
    loaded = craft.load_pickle(pickled(coo), [torch.tensor([[0, 2]]), torch.ones(2)])
    assert loaded.to_dense().tolist() == [1, 0, 1]


def test_meta_tensors_without_storage() -> None:
    meta = craft.rebuild(
        "_rebuild_meta_tensor_no_storage", name("torch", "float32"), (2, 3), (1, 2), True
    )
    loaded = load(meta)
    assert loaded.is_meta and loaded.requires_grad
    assert (loaded.shape, loaded.stride()) == ((2, 3), (1, 2))


def test_plain_objects() -> None:
    assert load(call("builtins", "bytes")) == b""
    assert load(call("builtins", "bytearray")) == bytearray()
    assert load(call("builtins", "bytearray", "\u00ff", "latin-1")) == b"\xff"
    assert load(call("builtins", "frozenset")) == frozenset()
    assert load(call("collections", "Counter")) == Counter()
    assert load(call("torch", "Size")) == torch.Size([])
    assert load(call("builtins", "complex", 1.0, 2.0)) == 1 + 2j
    state = load(craft.build(craft.ordered_dict(), {"note": [1]}))
    assert (type(state), state.note) == (OrderedDict, [1])


def test_work_on_tensors_is_bounded() -> None:
    """A pickle can rebuild the same tensor many times; the bytes of all rebuilds count."""
    coo = craft.rebuild(
        "_rebuild_sparse_tensor",
        call("torch.serialization", "_get_layout", "torch.sparse_coo"),
        (craft.tensor(0), craft.tensor(1), (9,)),
    )
    tensors = [torch.zeros(1, 8, dtype=torch.int64), torch.ones(8)]
    data = pickled([coo] * 20)
    assert len(craft.load_pickle(data, tensors)) == 20
    with pytest.raises(aiotorchio.LimitExceeded, match="made from more than 1000 bytes"):
        craft.load_pickle(data, tensors, limits=Limits(total_nbytes=1000))


def test_full_pickle_gets_the_checked_functions() -> None:
    replaced = Allowlist((), Limits(), None).rebuild_functions()
    assert ("torch._utils", "_rebuild_sparse_tensor") in replaced
    assert ("torch._utils", "_rebuild_parameter_with_state") not in replaced


def test_arrays_of_numpy_load_when_the_caller_trusts_what_makes_them() -> None:
    array = numpy.arange(6.0).reshape(2, 3)
    make = array.__reduce__()[0]
    trusted = [make, numpy.ndarray, numpy.dtype, type(array.dtype)]
    file = io.BytesIO()
    aiotorchio.save({"array": array}, file)
    file.seek(0)
    loaded = aiotorchio.load(file, safe_globals=trusted)
    assert numpy.array_equal(loaded["array"], array)


class MadeByAFunction:
    """Pickles as a call of a trusted function and a state for the returned object."""

    def __reduce__(self) -> Any:
        return make_a_tensor, (), (torch.ones(4).untyped_storage(), 0, (100,), (1,))


def make_a_tensor() -> torch.Tensor:
    return torch.zeros(1)


def test_a_trusted_function_gives_no_tensor_a_state() -> None:
    file = io.BytesIO()
    aiotorchio.save(MadeByAFunction(), file)
    file.seek(0)
    with pytest.raises(aiotorchio.UnsafeObjectError, match="a state to a tensor"):
        aiotorchio.load(file, safe_globals=[make_a_tensor])


class Plain(torch.Tensor):
    """A trusted class that does not declare the attributes of its instances."""


def test_parts_of_tensors_are_plain() -> None:
    """Attributes of a trusted class could hide the methods that the checks call on the parts."""
    far = craft.rebuild(
        "_rebuild_nested_tensor",
        craft.tensor(0),
        *(hiding_part(row) for row in (1, 2, 3)),
    )
    tensors = [torch.arange(2.0), *(torch.tensor(x) for x in ([[4]], [[1]], [1 << 40]))]
    with pytest.raises(aiotorchio.InvalidObjectError, match="a Plain"):
        craft.load_pickle(pickled(far), tensors, safe_globals=[Plain])
    coo = craft.rebuild(
        "_rebuild_sparse_tensor",
        call("torch.serialization", "_get_layout", "torch.sparse_coo"),
        (craft.tensor(0), hiding_part(1), call("torch", "Size", (3,))),
    )
    with pytest.raises(aiotorchio.InvalidObjectError, match="a Plain"):
        craft.load_pickle(
            pickled(coo), [torch.tensor([[0, 2]]), torch.ones(2)], safe_globals=[Plain]
        )


def hiding_part(row: int) -> Any:
    kind = name("tests.codecs.pickled.test_allowlist", "Plain")
    parameter = name("torch._utils", "_rebuild_parameter")
    args = (craft.tensor(row), False, craft.ordered_dict())
    return subclassed(parameter, kind, args, {"tolist": kind})


class Stateless:
    """Has attributes, but no ``__setstate__``."""


class Restored(Stateless):
    def __setstate__(self, state: Any) -> None:
        self.state = state


def make_stateless() -> Stateless:
    return Stateless()


def make_restored() -> Restored:
    return Restored()


@pytest.mark.parametrize("state", [[("a", 1)], ([("a", 1)], None)], ids=["list", "tuple"])
def test_only_what_takes_a_state_itself_gets_pairs_for_one(state: Any) -> None:
    """Without ``__setstate__``, the pairs would go to ``dict.update``, with unchecked keys."""
    for function in (make_stateless, make_restored):
        made = craft.build(call(__name__, function.__name__), state)
        trusted = [function, Stateless, Restored]
        if function is make_restored:
            restored = craft.load_pickle(pickled(made), safe_globals=trusted)
            assert restored.state == state
            continue
        with pytest.raises(aiotorchio.UnsafeObjectError, match="a Stateless a state"):
            craft.load_pickle(pickled(made), safe_globals=trusted)
    attributes = craft.build(call(__name__, "make_stateless"), {"a": 1})
    trusted = [make_stateless, Stateless]
    assert craft.load_pickle(pickled(attributes), safe_globals=trusted).a == 1


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (0, (4, 8), (8, 1), None),
        (0, (4, 9), (9, 1), "20 bytes of a storage of 16"),
        (0, (), (), None),
        (0, (0, 100), (100, 1), None),
        (1, (2, 2), (2, 1), "a view"),
        (0, (8, 4), (1, 8), "a view"),
        (0, (4,), (0,), "a view"),
        (-1, (1,), (1,), "a view"),
    ],
)
def test_elements_smaller_than_a_byte(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], message: str | None
) -> None:
    made = craft.rebuild(
        "_rebuild_qtensor",
        craft.storage(0, "quint4x2"),
        *(offset, size, stride),
        (name("torch", "per_tensor_affine"), 0.5, 1),
        *(False, craft.ordered_dict()),
    )
    bytes_of_it = torch.arange(16, dtype=torch.uint8)
    if message is None:
        assert craft.load_pickle(pickled(made), [bytes_of_it]).shape == size
    else:
        with pytest.raises(aiotorchio.InvalidObjectError, match=message):
            craft.load_pickle(pickled(made), [bytes_of_it])
