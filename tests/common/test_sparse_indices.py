"""Checks of sparse indices, in Python and in steps, agree with torch's checks on random tensors."""

from __future__ import annotations

import functools
import itertools
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aiotorchio import Limits
from aiotorchio.codecs.pickled.checks import Checks
from aiotorchio.codecs.pickled.safe_nested import NestedMaker
from aiotorchio.common import sparse_indices as indices_module
from aiotorchio.common import torch_private
from aiotorchio.common.sparse_indices import check_compressed_indices, check_coo_indices, steps
from tests.support.tiers import examples

CSR, CSC, BSR, BSC = torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc
COMPRESSED = (CSR, CSC, BSR, BSC)
# The most numbers that are checked in Python, and the elements of one step.
SIZES = ((512, 16_384), (0, 16_384), (0, 7), (0, 2))


def refused(check: Callable[..., Any], *args: Any, **options: Any) -> bool:
    try:
        check(*args, **options)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize(
    ("count", "overlap", "width", "wanted"),
    [
        (0, 0, 1, []),
        (0, 1, 1, []),
        (1, 1, 1, [(0, 1)]),
        (4, 0, 1, [(0, 4)]),
        (5, 1, 1, [(0, 5)]),
        (6, 1, 1, [(0, 5), (4, 6)]),
        (5, 0, 2, [(0, 2), (2, 4), (4, 5)]),
        (2, 0, 9, [(0, 1), (1, 2)]),
    ],
)
def test_steps(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    overlap: int,
    width: int,
    wanted: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(indices_module, "STEP", 4)
    assert [(each.start, each.stop) for each in steps(count, overlap, width=width)] == wanted


@pytest.mark.parametrize("in_python", [0, 512])
@pytest.mark.parametrize("distinct", [False, True])
def test_coo_as_torch(monkeypatch: pytest.MonkeyPatch, in_python: int, distinct: bool) -> None:
    monkeypatch.setattr(indices_module, "IN_PYTHON", in_python)
    monkeypatch.setattr(indices_module, "STEP", 2)
    for numbers in itertools.product((-1, 0, 1, 2), repeat=4):
        for shape, size in (((1, 4), (2,)), ((2, 2), (2, 1))):
            indices = torch.tensor(numbers).reshape(shape)
            values = torch.ones(shape[1])
            torchs = refused(
                torch._validate_sparse_coo_tensor_args, indices, values, size, distinct
            )
            assert refused(check_coo_indices, indices, size, distinct=distinct) == torchs, indices


@dataclass(frozen=True)
class Parts:
    """The arguments that make a tensor of a compressed layout."""

    compressed: torch.Tensor
    plain: torch.Tensor
    values: torch.Tensor
    size: tuple[int, ...]
    layout: torch.layout

    def given(self) -> tuple[Any, ...]:
        return self.compressed, self.plain, self.values, self.size, self.layout


def valid(draw: random.Random, layout: torch.layout) -> Parts:
    batch = draw.choice([(), (), (1,), (3,), (2, 2), (0,), (2, 0)])
    rows, columns = draw.randrange(5), draw.randrange(5)
    nnz = draw.randrange(rows * columns + 1)
    compressed, plain = [], []
    for _ in range(math.prod(batch)):
        cells = sorted(draw.sample(list(itertools.product(range(rows), range(columns))), nnz))
        compressed.append([sum(row < n for row, _ in cells) for n in range(rows + 1)])
        plain.append([column for _, column in cells])
    dtype = draw.choice([torch.int32, torch.int64])
    block = (draw.randrange(1, 3), draw.randrange(1, 4)) if layout in (BSR, BSC) else ()
    dense = draw.choice([(), (), (2,), (0,), (2, 1)])
    scale = block or (1, 1)
    counts = (rows, columns) if layout in (CSR, BSR) else (columns, rows)
    return Parts(
        torch.tensor(compressed, dtype=dtype).reshape(*batch, rows + 1),
        torch.tensor(plain, dtype=dtype).reshape(*batch, nnz),
        torch.ones(*batch, nnz, *block, *dense),
        (*batch, counts[0] * scale[0], counts[1] * scale[1], *dense),
        layout,
    )


def changed(draw: random.Random, parts: Parts) -> Parts:
    """Change one thing, but keep the compressed indices in range."""
    compressed, plain, values = parts.compressed.clone(), parts.plain.clone(), parts.values
    nnz = plain.shape[-1]
    kind = draw.randrange(12)
    if kind < 3 and plain.numel():
        plain.view(-1)[draw.randrange(plain.numel())] = draw.randrange(-1, 6)
    elif kind == 3 and plain.numel() > 1:
        at = draw.randrange(plain.numel() - 1)
        plain.view(-1)[at : at + 2] = plain.view(-1)[at : at + 2].flip(0)
    elif kind < 7 and compressed.numel():
        compressed.view(-1)[draw.randrange(compressed.numel())] = draw.randrange(nnz + 1)
    elif kind == 7:
        size = list(parts.size)
        size[draw.randrange(len(size))] += draw.choice([-1, 1, 2])
        return replace(parts, size=tuple(max(n, 0) for n in size))
    elif kind == 8:
        return replace(parts, size=parts.size[1:] if draw.random() < 0.5 else (1, *parts.size))
    elif kind == 9:
        dtype = draw.choice([torch.int32, torch.int64, torch.int16, torch.float32])
        compressed = compressed.to(dtype)
        if draw.random() < 0.5:
            plain = plain.to(dtype)
    elif kind == 10:
        # Every second number of a tensor twice as long.
        plain = plain.repeat_interleave(2, -1)[..., ::2]
    else:
        # Another shape: number of values, dimensions, batches or blocks.
        shape = [*values.shape] or [1]
        at = draw.randrange(len(shape))
        shape[at : at + 1] = draw.choice([[], [shape[at] + 1], [shape[at], 1], [2]])
        values = torch.ones(shape)
    return replace(parts, compressed=compressed, plain=plain, values=values)


def refused_by_torch(parts: Parts) -> bool:
    # torch reads between the compressed indices, so they must be in range.
    assert all(0 <= n <= parts.plain.shape[-1] for n in parts.compressed.flatten().tolist())
    return refused(torch._validate_sparse_compressed_tensor_args, *parts.given())


@pytest.mark.parametrize("layout", COMPRESSED, ids=str)
def test_compressed_as_torch(monkeypatch: pytest.MonkeyPatch, layout: torch.layout) -> None:
    draw = random.Random(str(layout))
    verdicts = {True: 0, False: 0}
    for number in range(examples(5000)):
        parts = valid(draw, layout)
        for _ in range(number % 3):
            parts = changed(draw, parts)
        wanted = refused_by_torch(parts)
        if not wanted and parts.compressed.shape[-1] == 1:
            # Without rows, torch does not check the one compressed index of each batch.
            wanted = bool(parts.compressed.any()) or parts.plain.numel() > 0
        verdicts[wanted] += 1
        for in_python, step in SIZES:
            monkeypatch.setattr(indices_module, "IN_PYTHON", in_python)
            monkeypatch.setattr(indices_module, "STEP", step)
            assert refused(check_compressed_indices, *parts.given()) == wanted, parts
    assert min(verdicts.values()) > sum(verdicts.values()) / 10, verdicts


@pytest.mark.parametrize("layout", COMPRESSED, ids=str)
@pytest.mark.parametrize(
    ("starts", "indices"),
    [
        ([0, 3], [0, 1]),
        ([0, -1, 2], [0, 1]),
        ([0, 3, 2], [0, 1]),
        ([-1, 1, 2], [0, 1]),
        ([1, 1, 2], [0, 1]),
        ([0, 1, 1], [0, 1]),
        ([0, 2, 1, 2], [0, 1]),
        ([0, 2**62, -(2**62), 2], [0, 1]),
        ([0, 2**63 - 1, -(2**63), 2], [0, 1]),
        ([1], []),
        ([1], [0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_compressed_indices_out_of_range(
    monkeypatch: pytest.MonkeyPatch,
    layout: torch.layout,
    starts: list[int],
    indices: list[int],
    sizes: tuple[int, int],
) -> None:
    """Calls the package's check only: these indices would make torch read outside its memory."""
    monkeypatch.setattr(indices_module, "IN_PYTHON", sizes[0])
    monkeypatch.setattr(indices_module, "STEP", sizes[1])
    block = (1, 1) if layout in (BSR, BSC) else ()
    rows = len(starts) - 1
    size = (rows, 2) if layout in (CSR, BSR) else (2, rows)
    for batch in ((), (2,)):
        compressed, plain = (
            torch.tensor(numbers, dtype=torch.int64).expand(*batch, len(numbers)).contiguous()
            for numbers in (starts, indices)
        )
        values = torch.ones(*plain.shape, *block)
        with pytest.raises(RuntimeError, match="compressed indices that"):
            check_compressed_indices(compressed, plain, values, (*batch, *size), layout)


def transposed(numbers: list[int], *batch: int) -> torch.Tensor:
    """The same numbers in each batch, with the dimensions of the batch transposed in memory."""
    return torch.tensor(numbers).expand(*batch[::-1], len(numbers)).contiguous().transpose(0, 1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("at", [None, (0, 0), (2, 1), (4, 0), (4, 1)])
def test_batches_in_another_order(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], at: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(indices_module, "IN_PYTHON", sizes[0])
    monkeypatch.setattr(indices_module, "STEP", sizes[1])
    compressed, plain = transposed([0, 1, 3], 5, 2), transposed([1, 0, 1], 5, 2)
    if at is not None:
        plain[at][1] = 1
    parts = Parts(compressed, plain, torch.ones(5, 2, 3), (5, 2, 2, 2), CSR)
    assert not plain.is_contiguous()
    wanted = refused_by_torch(parts)
    assert wanted == (at is not None)
    assert refused(check_compressed_indices, *parts.given()) == wanted


@pytest.mark.parametrize("layout", COMPRESSED, ids=str)
def test_dimensions_beyond_the_integers_of_the_indices(layout: torch.layout) -> None:
    block = (1, 1) if layout in (BSR, BSC) else ()
    for length, wanted in ((2**31 - 1, False), (2**31, True), (2**32 + 1, True)):
        size = (1, length) if layout in (CSR, BSR) else (length, 1)
        compressed, plain = torch.tensor([0, 1]).int(), torch.tensor([0]).int()
        parts = Parts(compressed, plain, torch.ones(1, *block), size, layout)
        assert refused_by_torch(parts) == wanted
        assert refused(check_compressed_indices, *parts.given()) == wanted


def large(count: int, width: int = 100) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that check about ``count`` numbers, for every kind of sparse or nested tensor."""
    rows = count // width
    starts, indices = torch.arange(rows + 1) * width, torch.arange(width).repeat(rows)
    values = torch.ones(len(indices))
    yield "coo", lambda: torch_private.make_coo(indices[None], values, (width,), False)
    columns = torch.stack([torch.arange(rows).repeat_interleave(width), indices])
    yield "coalesced", lambda: torch_private.make_coo(columns, values, (rows, width), True)
    for layout in COMPRESSED:
        given = values[:, None, None] if layout in (BSR, BSC) else values
        size = (rows, width) if layout in (CSR, BSR) else (width, rows)
        make = functools.partial(
            torch_private.make_compressed, starts, indices, given, size, layout
        )
        yield str(layout), make
    ends = torch.tensor([0, width]).expand(rows, 2).contiguous()
    batches, blank = indices.view(rows, width), torch.ones(rows, width)
    yield (
        "batches",
        lambda: torch_private.make_compressed(ends, batches, blank, (rows, 1, width), CSR),
    )
    order, other = transposed([0, 1], rows, 50), transposed([0], rows, 50)
    blanks, shape = torch.ones(rows, 50, 1), (rows, 50, 1, 1)
    yield (
        "batches in order",
        lambda: torch_private.make_compressed(order, other, blanks, shape, CSR),
    )
    shown = torch.ones(count)
    maker = NestedMaker(Checks(Limits(total_nbytes=2**50)))
    for lengths in (None, torch.zeros(count, dtype=torch.int32)):
        arguments = {"values": shown, "offsets": torch.arange(count + 1), "lengths": lengths}
        yield f"jagged {lengths is None}", functools.partial(maker.jagged, arguments)
    parts = torch.ones(count // 50, 2, dtype=torch.int64)
    yield "nested", lambda: maker.strided(shown, parts, parts, torch.arange(len(parts)))


# Operations that read no numbers: they only assemble a tensor from its parts.
UNREAD = {
    "is_pinned",
    "_sparse_coo_tensor_with_dims_and_tensors",
    "_sparse_compressed_tensor_unsafe",
    "_nested_view_from_buffer",
}


class Operations(TorchDispatchMode):
    """Records for each torch operation the largest number of elements of its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.most: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and name not in UNREAD:
            counts = [each.numel() for each in args if isinstance(each, torch.Tensor)]
            self.most[name] = max(self.most.get(name, 0), *counts, 0)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [100, 1000, 70_000])
def test_no_operation_is_large_enough_for_threads(count: int) -> None:
    noted = Operations()
    for _, make in large(count):
        with noted:
            make()
    assert not [name for name in noted.most if "valid" in name]
    assert max(noted.most.values()) < 32_768, noted.most
    if count > 512:
        assert {"aminmax", "scatter_", "all"} <= noted.most.keys()


THREADS = """
import os, warnings
import torch
from tests.common.test_sparse_indices import large

warnings.simplefilter("ignore")
torch.set_num_threads(1)
checks = [*large(100), *large(1000), *large(70_000)]
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
for name, make in checks:
    make()
    print(name, len(os.listdir("/proc/self/task")) - before)
torch.ones(200_000) + 1
print("torch", len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_of_torch_is_started() -> None:
    """Some operations, such as indexing, use threads for any number of elements."""
    run = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True
    )
    *ours, torchs = run.stdout.splitlines()
    assert torchs == "torch 3", run.stdout
    assert all(line.endswith(" 0") for line in ours), run.stdout
    assert len(ours) == 3 * len(list(large(100)))
