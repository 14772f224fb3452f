"""The table of dtypes is complete and agrees with torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from aiotorchio.wire.dtypes import DTYPES

SPEC = Path(__file__).parents[2] / "SPEC.md"


@pytest.mark.parametrize("name", DTYPES)
def test_sizes_and_kinds(name: str) -> None:
    dtype = DTYPES[name]
    assert dtype.itemsize == dtype.unit * (2 if dtype.kind == "complex" else 1)
    assert dtype.unit in (1, 2, 4, 8)


@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
def test_torch_agrees(name: str) -> None:
    dtype = getattr(torch, name)
    assert dtype.itemsize == DTYPES[name].itemsize
    assert dtype.is_floating_point == (DTYPES[name].kind == "float")
    assert dtype.is_complex == (DTYPES[name].kind == "complex")


def test_no_dtype_of_torch_is_missing() -> None:
    known = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert known <= {getattr(torch, name) for name in DTYPES if hasattr(torch, name)}


def test_the_specification_has_the_same_table() -> None:
    section = SPEC.read_text(encoding="utf-8").split("### 5.3")[1].split("### 5.4")[0]
    written: dict[str, tuple[int, int, str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        names = re.findall(r"`(\w+)`", cells[0])
        if " to " in cells[0]:
            names = [f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)]
        sizes = [int(size) for size in cells[1].split(",")]
        sizes = sizes if len(sizes) > 1 else sizes * len(names)
        for name, size in zip(names, sizes, strict=True):
            written[name] = (size, size if cells[2] == "same" else int(cells[2]), cells[3])
    assert written == {name: tuple(dtype) for name, dtype in DTYPES.items()}
