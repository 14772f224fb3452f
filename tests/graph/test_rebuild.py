"""Rebuilding: foreign byte order, errors of a single tensor, and concurrent loads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import _utils, _weights_only_unpickler

import aiotorchio
from aiotorchio.graph.rebuild import build_tensors
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import Header, StorageRow, TensorRow
from tests.support import corpus, craft

OTHER = "big" if sys.byteorder == "little" else "little"


def swapped(tensor: torch.Tensor, unit: int) -> torch.Tensor:
    """The tensor over a copy of its storage in which every number has its bytes reversed."""
    data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    turned = data.view(-1, unit).flip(1).reshape(-1).contiguous()
    made = torch.empty(0, dtype=tensor.dtype)
    return made.set_(turned.untyped_storage(), 0, tensor.shape, tensor.stride())


def foreign(header: Header) -> None:
    header.byteorder = OTHER  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", corpus.STRIDED_DTYPES)
def test_byte_order(dtype: str) -> None:
    tensor = corpus.of_dtype(dtype)
    data = craft.message(
        craft.flattened([tensor]).skeleton,
        "tree",
        [swapped(tensor, DTYPES[dtype].unit)],
        foreign,
    )
    corpus.assert_same(craft.load(data), [tensor])
    # A callable ``map_location`` gets storages that already have the native byte order.
    corpus.assert_same(craft.load(data, map_location=lambda storage, _: storage), [tensor])


def test_byte_order_of_a_storage_of_mixed_numbers() -> None:
    tensor = torch.ones(4)
    data = craft.message(
        craft.flattened([tensor, tensor.view(torch.int64)]).skeleton,
        "tree",
        [tensor, tensor.view(torch.int64)],
        foreign,
    )
    with pytest.raises(aiotorchio.InvalidObjectError, match="several"):
        craft.load(data)


def test_byte_order_of_a_storage_of_unknown_numbers() -> None:
    parts = craft.flattened([torch.ones(4).untyped_storage()])
    foreign(parts.header)
    with pytest.raises(aiotorchio.InvalidObjectError):
        craft.load(craft.compose(parts))


def test_byte_order_of_meta() -> None:
    meta = torch.empty(4, device="meta")
    data = craft.message(craft.flattened([meta]).skeleton, "tree", [meta], foreign)
    corpus.assert_same(craft.load(data), [meta])


def test_what_torch_refuses_names_the_tensor() -> None:
    row = TensorRow(0, "int64", 0, (1,), (1,), 1, ["layer.weight"])
    header = craft.flattened([torch.ones(1)]).header
    header.storages, header.tensors = [StorageRow(8, 8, 0)], [row]
    with pytest.raises(aiotorchio.InvalidObjectError, match=r"layer\.weight") as caught:
        build_tensors(header, [torch.UntypedStorage(8)])
    assert caught.value.entry == "tensor 0 ('layer.weight')"


def test_many_loads_at_once() -> None:
    """Each concurrent load has its own outcome; no global state of torch changes."""
    coo = torch.eye(3).to_sparse()
    bad_coo = craft.rebuild(
        "_rebuild_sparse_tensor",
        craft.call("torch.serialization", "_get_layout", "torch.sparse_coo"),
        (craft.tensor(0), craft.tensor(1), (2,)),
    )
    Message = tuple[bytes, dict[str, Any], Callable[[Any], Any]]
    point = corpus.make("trusted_class")
    good: Message = (craft.compose(craft.flattened([coo, coo])), {}, lambda loaded: loaded[0])
    trusting: Message = (
        craft.compose(craft.flattened(point)),
        {"safe_globals": [corpus.Point]},
        lambda loaded: loaded[0].weight,
    )
    distrusting: Message = (trusting[0], {}, lambda loaded: loaded)
    bad: Message = (
        craft.message(craft.pickled(bad_coo), "pickle", [torch.tensor([[0, 9]]), torch.ones(2)]),
        {},
        lambda loaded: loaded,
    )
    wanted = [torch.Tensor, torch.Tensor, aiotorchio.UnsafeObjectError]
    wanted.append(aiotorchio.InvalidObjectError)
    before = (
        list(_utils._sparse_tensors_to_validate),
        set(_weights_only_unpickler._marked_safe_globals_set),
        torch.sparse.check_sparse_tensor_invariants.is_enabled(),
    )
    verdicts: dict[int, Any] = {}
    start = threading.Barrier(50)

    def work(index: int) -> None:
        data, options, read = (good, trusting, distrusting, bad)[index % 4]
        start.wait()
        for _ in range(4):
            try:
                verdicts[index] = read(craft.load(data, **options))
            except Exception as error:
                verdicts[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(verdicts) == 50
    for index, verdict in verdicts.items():
        assert type(verdict) is wanted[index % 4], verdict
    after = (
        list(_utils._sparse_tensors_to_validate),
        set(_weights_only_unpickler._marked_safe_globals_set),
        torch.sparse.check_sparse_tensor_invariants.is_enabled(),
    )
    assert after == before
