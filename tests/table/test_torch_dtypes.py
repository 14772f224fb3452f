"""The map between names of dtypes and torch's dtypes is complete and agrees with torch."""

from __future__ import annotations

import pytest

import aiotorchio
from aiotorchio.table.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES, torch_dtype
from aiotorchio.wire.dtypes import DTYPES
from tests.support import corpus


def test_every_dtype_of_torch_is_in_the_format() -> None:
    assert set(corpus.DTYPES) == set(TORCH_DTYPES)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_the_table_agrees_with_torch(name: str) -> None:
    dtype = torch_dtype(name)
    assert DTYPE_NAMES[dtype] == name
    itemsize, unit, kind = DTYPES[name]
    assert itemsize == dtype.itemsize
    assert dtype.is_complex == (kind == "complex")
    assert dtype.is_floating_point == (kind == "float")
    assert unit == (itemsize // 2 if dtype.is_complex else itemsize)


@pytest.mark.parametrize("name", ["float33", "Tensor", "", 3, None])
def test_unknown(name: object) -> None:
    with pytest.raises(aiotorchio.ProtocolError):
        torch_dtype(name)
