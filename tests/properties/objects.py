"""Hypothesis strategies for objects of every kind, with tensors anywhere in their storages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.support import corpus

# Kinds that only the pickle codec can carry; ``corpus.make`` makes them.
RARE = (
    *("coo", "coo_uncoalesced", "csr", "bsr", "quantized_per_tensor", "quantized_per_channel"),
    *("nested", "jagged", "counter", "frozensets", "bytearrays", "layouts", "typed_storage"),
    *("ordered_with_attributes", "parameter_with_attributes", "tensor_with_attributes"),
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
# Longer integers have an opcode that torch does not know.
INTEGERS = st.integers() | st.integers(-(2**1000), 2**1000)
NUMBERS = st.floats() | st.complex_numbers() | INTEGERS
HASHABLE: st.SearchStrategy[Any] = st.one_of(
    *(st.none(), st.booleans(), INTEGERS, st.floats(allow_nan=False), TEXT, st.binary(max_size=9)),
    st.tuples(st.integers(), TEXT),
)
DEVICES = ("cpu", "cuda", "cuda:3", "meta", "mps:0")
ATOMS: st.SearchStrategy[Any] = st.one_of(
    *(HASHABLE, NUMBERS),
    st.sampled_from([getattr(torch, name) for name in corpus.DTYPES if name != "bits16"]),
    st.sampled_from([torch.device(name) for name in DEVICES]),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(torch.Size),
    st.sampled_from(RARE).map(corpus.make),
)


@st.composite
def storages(draw: st.DrawFn) -> torch.UntypedStorage:
    """A storage of at most 64 bytes."""
    data = draw(st.binary(max_size=64) | st.binary(min_size=32, max_size=32))
    return torch.tensor(list(data), dtype=torch.uint8).untyped_storage()


@st.composite
def tensors(draw: st.DrawFn, over: Sequence[torch.UntypedStorage]) -> torch.Tensor:
    """A tensor anywhere in one of these storages: expanded, overlapping, empty, a parameter."""
    storage = draw(st.sampled_from(over))
    dtype: torch.dtype = getattr(torch, draw(st.sampled_from(corpus.STRIDED_DTYPES)))
    room = storage.nbytes() // dtype.itemsize
    shape, strides = [], []
    left = room - 1
    for _ in range(draw(st.integers(0, 3))):
        size, stride = draw(st.integers(0 if left < 0 else 1, 4)), draw(st.integers(0, 5))
        stride = min(stride, left // (size - 1)) if size > 1 and left >= 0 else stride
        shape.append(0 if left < 0 else size)
        strides.append(stride)
        left -= max(size - 1, 0) * stride if left >= 0 else 0
    if left < 0 and 0 not in shape:
        shape, strides = [*shape, 0], [*strides, 1]
    if shape and draw(st.integers(0, 9)) == 0:
        shape[0] = 0
    offset = draw(st.integers(0, max(left, 0)))
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
    if dtype.is_complex and draw(st.booleans()):
        tensor = draw(st.sampled_from([torch.Tensor.conj, torch._neg_view]))(tensor)
    gradable = dtype.is_complex or dtype.is_floating_point
    requires_grad = gradable and draw(st.booleans())
    if draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def ordered_with_versions(items: dict[Any, Any]) -> OrderedDict[Any, Any]:
    """An ordered dict with metadata, as ``nn.Module.state_dict`` makes it."""
    made = OrderedDict(items)
    vars(made)["_metadata"] = OrderedDict({"": {"version": 1}})
    return made


DICTS: tuple[Callable[[Any], Any], ...] = (dict, OrderedDict, ordered_with_versions)


@st.composite
def graphs(draw: st.DrawFn) -> Any:
    """An object whose parts may occur in several places; a list may contain itself."""
    over = draw(st.lists(storages(), min_size=1, max_size=3))
    made: list[Any] = [draw(ATOMS), *draw(st.lists(tensors(over), max_size=5))]
    lists: list[list[Any]] = []
    for _ in range(draw(st.integers(0, 6))):
        items = draw(st.lists(st.sampled_from(made) | ATOMS, max_size=4))
        match draw(st.sampled_from(["list", "tuple", "dict", "set"])):
            case "list":
                lists.append(items)
                made.append(items)
            case "tuple":
                made.append(tuple(items))
            case "dict":
                keys = draw(
                    st.lists(HASHABLE, min_size=len(items), max_size=len(items), unique=True)
                )
                made.append(draw(st.sampled_from(DICTS))(dict(zip(keys, items, strict=True))))
            case _:
                made.append(draw(st.sets(HASHABLE, max_size=4)))
    # Only lists contain themselves: a tuple in itself needs an opcode that torch does not know.
    if lists and type(made[-1]) is list and draw(st.integers(0, 4)) == 0:
        draw(st.sampled_from(lists)).append(made[-1])
    return made[-1]
