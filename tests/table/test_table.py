"""The table of tensors and storages: rows, flags, units and locations of a sender's tensors."""

from __future__ import annotations

import torch

from aiotorchio.table.table import Table
from aiotorchio.wire.header import (
    CONJUGATE,
    MIXED_UNITS,
    NEGATIVE,
    PARAMETER,
    REQUIRES_GRAD,
    StorageRow,
    TensorRow,
)
from tests.support import corpus


def test_a_row_says_all_about_a_tensor() -> None:
    table = Table()
    tensor = torch.arange(12.0).view(3, 4).t()[1:]
    assert table.add_tensor(tensor, "w") == 0
    assert table.tensors == [TensorRow(0, "float32", 1, (3, 3), (1, 4), 0, ["w"])]
    assert table.storages == [StorageRow(48, 4, 0)]
    assert table.locations == ["cpu"]


def test_flags() -> None:
    table = Table()
    complex_ = torch.ones(2, dtype=torch.complex64)
    tensors = [
        torch.ones(1, requires_grad=True),
        torch.nn.Parameter(torch.ones(1)),
        torch.nn.Parameter(torch.ones(1), requires_grad=False),
        complex_.conj(),
        complex_.conj().imag,
    ]
    for tensor in tensors:
        table.add_tensor(tensor)
    assert [row.flags for row in table.tensors] == [
        REQUIRES_GRAD,
        REQUIRES_GRAD | PARAMETER,
        PARAMETER,
        CONJUGATE,
        NEGATIVE,
    ]


def test_the_same_tensor_has_one_row_and_every_name() -> None:
    table = Table()
    tensor = torch.ones(1)
    assert table.add_tensor(tensor, "a") == table.add_tensor(tensor, "b") == 0
    table.name(tensor, "c")
    table.name(torch.ones(1), "of no row")
    assert table.tensors[0].names == ["a", "b", "c"]


def test_rows_are_not_mixed_up_when_tensors_are_temporary() -> None:
    table = Table()
    rows = [table.add_tensor(torch.full((1,), n)) for n in range(50)]
    assert rows == list(range(50))


def test_units() -> None:
    table = Table()
    tensor = torch.ones(4)
    table.add_tensor(tensor)
    table.add_tensor(tensor.view(torch.int32))
    assert table.storages[0].unit == 4
    table.add_tensor(tensor.view(torch.complex64))
    assert table.storages[0].unit == 4  # complex64 consists of two numbers of four bytes
    table.add_tensor(tensor.view(torch.uint8))
    assert table.storages[0].unit == MIXED_UNITS
    table.add_tensor(tensor.view(torch.int32))
    assert table.storages[0].unit == MIXED_UNITS


def test_locations_are_shared() -> None:
    table = Table()
    for device in ("cpu", "meta", "cpu", "meta"):
        table.add_tensor(torch.empty(1, device=device))
    assert table.locations == ["cpu", "meta"]
    assert [row.location for row in table.storages] == [0, 1, 0, 1]


def test_what_a_row_cannot_say() -> None:
    table = Table()
    for name in (
        *("subclass", "tensor_with_attributes", "coo", "csr", "nested", "jagged", "buffer"),
        "wrapper_subclass",
    ):
        obj = corpus.make(name)
        tensor = obj["w"] if isinstance(obj, dict) else obj
        assert table.add_tensor(tensor) is None, name
    assert table.add_tensor(corpus.make("quantized_per_tensor")[0]) is None
    assert table.tensors == []
