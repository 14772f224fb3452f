"""Foreign byte order: the bytes of every number in a storage are reversed, for every size."""

from __future__ import annotations

import pytest
import torch

from aiotorchio.memory import byteorder
from aiotorchio.memory.byteorder import swap_bytes
from aiotorchio.memory.host import view_of


def reversed_numbers(data: bytes, unit: int) -> bytes:
    whole = len(data) // unit * unit
    numbers = [data[at : at + unit][::-1] for at in range(0, whole, unit)]
    return b"".join(numbers) + data[whole:]


@pytest.mark.parametrize("unit", [1, 2, 4, 8])
@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 64, 1001])
def test_numbers_are_reversed_and_the_rest_is_left(unit: int, nbytes: int) -> None:
    data = bytes(n % 251 for n in range(nbytes))
    storage = torch.UntypedStorage(nbytes)
    view_of(storage)[:] = data
    swap_bytes(storage, unit)
    assert bytes(view_of(storage)) == reversed_numbers(data, unit)


def test_large_storages_are_swapped_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byteorder, "_STEP", 16)
    data = bytes(range(100))
    storage = torch.UntypedStorage(100)
    view_of(storage)[:] = data
    swap_bytes(storage, 4)
    assert bytes(view_of(storage)) == reversed_numbers(data, 4)
