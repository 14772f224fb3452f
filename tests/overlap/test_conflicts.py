"""Conflicts between overlapping targets, compared with a search through all bytes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch

from aiotorchio.common.strides import order_of
from aiotorchio.overlap import conflicts, drawing
from aiotorchio.overlap.conflicts import conflict, filled
from aiotorchio.overlap.extents import Extents, Footprint, Origin


def at(start: int, itemsize: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Footprint:
    extent = order_of(shape, stride).extent * itemsize
    return Footprint(start, start + extent, itemsize, shape, stride)


def of(base: torch.Tensor, view: torch.Tensor) -> Footprint:
    """The footprint of a view, as if its base began at address 4096."""
    start = 4096 + view.data_ptr() - base.data_ptr()
    return at(start, view.element_size(), tuple(view.shape), view.stride())


def bytes_of(each: Footprint, origin: Origin) -> Iterator[tuple[int, object]]:
    """Every byte of a footprint with the source of its value."""
    for index in itertools.product(*map(range, each.shape)):
        element = sum(i * step for i, step in zip(index, each.stride, strict=True))
        for byte in range(each.itemsize):
            address = each.start + element * each.itemsize + byte
            if origin.offset is None:
                yield address, origin.kind
            else:
                source = sum(i * step for i, step in zip(index, origin.stride, strict=True))
                yield address, (origin.kind, (origin.offset + source) * each.itemsize + byte)


def has_conflict(footprints: dict[str, Footprint], origins: dict[str, Origin]) -> bool:
    found: dict[int, object] = {}
    return any(
        found.setdefault(address, source) != source
        for name, each in footprints.items()
        for address, source in bytes_of(each, origins[name])
    )


def random_layout(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A random layout without overlap, with or without gaps, in any order of dimensions."""
    count = rng.randint(0, 3)
    shape = [rng.randint(1, 4) for _ in range(count)]
    stride, width = [0] * count, rng.choice([1, 1, 2])
    for dim in rng.sample(range(count), count):
        stride[dim] = width
        width = width * shape[dim] + rng.choice([0, 0, 1, 3])
    return tuple(shape), tuple(stride)


def random_tensors(rng: random.Random) -> tuple[dict[str, Footprint], dict[str, Origin]]:
    footprints, origins = {}, {}
    itemsizes = rng.choice([[4], [1], [2, 4], [1, 8]])
    # Often all are copied from one source at equal offsets, so that some cases have no conflict.
    shared = rng.random() < 0.4
    for n in range(rng.randint(2, 5)):
        shape, stride = random_layout(rng)
        itemsize = rng.choice(itemsizes)
        start = rng.randrange(0, 160 if n else 40, itemsize)
        footprints[str(n)] = at(4096 + start, itemsize, shape, stride)
        source = Origin(0, start // itemsize + 3, stride)
        if rng.random() < 0.1 and not shared:
            source = Origin(rng.randint(0, 1), rng.randint(0, 9), random_strides(rng, len(shape)))
        elif not shared:
            source = Origin(n if rng.random() < 0.8 else 0, None)
        origins[str(n)] = source
    return footprints, origins


def random_strides(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randint(0, 5) for _ in range(count))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("arithmetic", [True, False])
def test_conflicts_are_those_of_the_bytes(seed: int, arithmetic: bool) -> None:
    rng = random.Random(seed)
    outcomes = set()
    with (
        mock.patch.object(drawing, "_STRIP_UNITS", rng.choice([8, 24, 2**10])),
        mock.patch.object(conflicts, "_STEPS_MAX", 100 if arithmetic else 0),
    ):
        for _ in range(100):
            footprints, origins = random_tensors(rng)
            found = conflict(footprints, origins)
            expected = has_conflict(footprints, origins)
            assert (found is not None) == expected
            outcomes.add(expected)
            if found is not None:
                pair = dict.fromkeys(found)
                assert list(pair) == sorted(pair) and len(pair) == 2
                assert has_conflict({name: footprints[name] for name in pair}, origins)
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_filled_is_filled_byte_by_byte(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = set()
    with mock.patch.object(drawing, "_STRIP_UNITS", rng.choice([8, 24, 2**10])):
        for _ in range(150):
            footprints, _ = random_tensors(rng)
            targets = {name: footprints.pop(name) for name in list(footprints)[:2]}
            anything = Origin(0, None)
            others = list(footprints.values())
            there = {address for each in others for address, _ in bytes_of(each, anything)}
            expected = {
                name
                for name, target in targets.items()
                if {address for address, _ in bytes_of(target, anything)} <= there
            }
            assert filled(targets, others) == expected
            outcomes.add(len(expected))
    assert {0, 1} <= outcomes


def no_drawing() -> AbstractContextManager[object]:
    return mock.patch.object(conflicts, "drawn_conflict", side_effect=AssertionError)


def test_ten_thousand_columns_of_one_matrix_need_no_drawing() -> None:
    base = torch.empty(3, 10_000, dtype=torch.int8)
    footprints = {str(n): of(base, column) for n, column in enumerate(base.unbind(1))}
    origins = {name: Origin(n, None) for n, name in enumerate(footprints)}
    extents = Extents((each.start, each.end, name) for name, each in footprints.items())
    assert [len(names) for names in extents.together()] == [10_000]
    with no_drawing():
        assert conflict(footprints, origins) is None


def test_blocks_of_one_matrix_need_no_drawing() -> None:
    base = torch.empty(2, 20, 30, 7)
    parts = [part for rows in base.split(3, 1) for part in rows.split(4, 2)]
    parts[3:5] = [parts[3].permute(2, 0, 3, 1), parts[4][:, :, ::2], parts[4][:, :, 1::2]]
    footprints = {str(n): of(base, part) for n, part in enumerate(parts)}
    origins = {name: Origin(n, None) for n, name in enumerate(footprints)}
    with no_drawing():
        assert conflict(footprints, origins) is None
    footprints["more"], origins["more"] = of(base, base[1, 4:6, 3:5, 2:]), Origin(99, None)
    assert conflict(footprints, origins) == ("9", "more")


def test_strides_that_have_nothing_in_common() -> None:
    base = torch.empty(60, dtype=torch.int16)
    footprints = {"a": of(base, base[::2]), "b": of(base, base[1::4]), "c": of(base, base[3::12])}
    origins = {name: Origin(n, None) for n, name in enumerate(footprints)}
    with no_drawing():
        assert conflict(footprints, origins) is None
    footprints["d"], origins["d"] = of(base, base[55:56]), Origin(9, None)
    assert conflict(footprints, origins) is None
    footprints["d"] = of(base, base[51:52])
    assert conflict(footprints, origins) == ("c", "d")


def test_parts_of_one_copy_need_no_drawing() -> None:
    base = torch.empty(90, 10)
    footprints = {
        str(n): of(base, part) for n, part in enumerate([base, *base.split(30), base.t()])
    }
    origins = {
        name: Origin(4, (each.start - 4096) // 4 + 11, each.stride)
        for name, each in footprints.items()
    }
    with no_drawing():
        assert conflict(footprints, origins) is None
    origins["2"] = Origin(4, 12, origins["2"].stride)
    assert conflict(footprints, origins) == ("0", "2")
