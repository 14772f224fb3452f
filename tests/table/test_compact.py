"""``compact=True``: random views of random storages arrive equal and share the same bytes.

The bytes that no tensor shows are marked, and must not be in the message where none are needed.
"""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aiotorchio
from aiotorchio.common.strides import Part
from aiotorchio.common.torch_private import typed_storage
from aiotorchio.graph.flatten import Flattened, flatten
from aiotorchio.memory.byteorder import swap_bytes
from aiotorchio.wire.validation import validate
from tests.support import craft
from tests.support.corpus import assert_same
from tests.support.payload_layouts import raw
from tests.support.tiers import examples

DTYPES = [
    *(torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.int64),
    *(torch.float64, torch.complex64, torch.complex128, torch.float8_e5m2),
]


def compacted(obj: object) -> Flattened:
    parts = flatten(obj, chunk_size=4096, metadata={}, producer="tests", compact=True)
    validate(parts.header, aiotorchio.Limits())
    return parts


def saved(obj: object, **options: Any) -> tuple[bytes, aiotorchio.Summary]:
    file = io.BytesIO()
    summary = aiotorchio.save(obj, file, **options)
    return file.getvalue(), summary


def addresses(tensor: torch.Tensor) -> list[int]:
    """The offset in its storage of each byte of each element, in the order of the indices."""
    size = tensor.element_size()
    starts = [int(tensor.storage_offset()) * size]
    for count, step in zip(tensor.shape, tensor.stride(), strict=True):
        starts = [start + n * step * size for start in starts for n in range(count)]
    return [start + n for start in starts for n in range(size)]


def key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def stored(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements as they are stored."""
    return bytes(raw(tensor).contiguous().flatten().tolist())


def assert_compact(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Check for equal tensors that share the same bytes and storages as before, and no others."""
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    back: dict[tuple[int, int], tuple[int, int]] = {}
    assert len(actual) == len(expected)
    for new, old in zip(actual, expected, strict=True):
        assert type(new) is type(old)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert new.requires_grad == old.requires_grad
        assert (new.is_conj(), new.is_neg()) == (old.is_conj(), old.is_neg())
        if old.is_meta:
            assert new.is_meta
            continue
        assert stored(new) == stored(old)
        for here, there in zip(addresses(new), addresses(old), strict=True):
            place, source = (key(new), here), (key(old), there)
            assert moved.setdefault(source, place) == place, "not shared any more"
            assert back.setdefault(place, source) == source, "shared, and was not"
    for (new, old), (new_2, old_2) in itertools.combinations(zip(actual, expected, strict=True), 2):
        assert (key(new) == key(new_2)) == (key(old) == key(old_2))
        assert (new is new_2) == (old is old_2)


def assert_parts_are_aligned(parts: Flattened) -> None:
    for index, pieces in parts.parts.items():
        row, end = parts.header.storages[index], 0
        for part in pieces:
            assert end <= part.at < end + 64
            end = part.at + part.nbytes
            # Parts keep numbers whole, so that a receiver of foreign byte order can reverse their
            # bytes.
            unit = row.unit or 1
            assert part.at % unit == part.start % unit == part.nbytes % unit == 0
            assert part.at % part.itemsize == part.start % part.itemsize == 0
        assert end == row.nbytes
        assert row.nbytes < parts.storages[index].nbytes()


def check(tensors: Sequence[torch.Tensor], **options: Any) -> aiotorchio.Summary:
    parts = compacted(list(tensors))
    assert_parts_are_aligned(parts)
    sizes = [row.nbytes for row in parts.header.storages]
    left_out = sum(storage.nbytes() for storage in parts.storages) - sum(sizes)
    assert parts.left_out == left_out >= 0
    _, before = saved(list(tensors), **options)
    data, summary = saved(list(tensors), compact=True, **options)
    assert summary.left_out_nbytes == left_out and before.left_out_nbytes == 0
    assert summary.payload_nbytes <= before.payload_nbytes
    assert (summary.tensors, summary.storages) == (before.tensors, before.storages)
    assert_compact(aiotorchio.load(io.BytesIO(data)), tensors)
    return summary


# ------------------------------------------------------------------------------ random views


@st.composite
def strided(draw: Callable[[Any], Any], storage: torch.UntypedStorage) -> torch.Tensor:
    """A random view of a storage: any dtype, overlapping, expanded, empty or without dimensions."""
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if dtype.itemsize]))
    room = storage.nbytes() // dtype.itemsize
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 2, 3, 0]), max_size=4))
    stride = [draw(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 9, 12, 17])) for _ in shape]
    for dim in sorted(range(len(shape)), key=lambda dim: stride[dim], reverse=True):
        if 0 not in shape and extent(shape, stride) > room:
            shape[dim] = 1 if room else 0
    if not shape and not room:
        shape, stride = [0], [1]
    free = room - (0 if 0 in shape else extent(shape, stride))
    offset = draw(st.integers(0, max(free, 0)))
    tensor = torch.empty((0,), dtype=dtype).set_(storage, offset, shape, stride)
    return flagged(draw, tensor)


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def flagged(draw: Callable[[Any], Any], tensor: torch.Tensor) -> torch.Tensor:
    kind = draw(st.integers(0, 5))
    if kind == 0 and tensor.is_complex():
        return tensor.conj()
    if kind == 1 and tensor.is_complex():
        return tensor.conj().imag  # a negative view
    if kind == 2 and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        return torch.nn.Parameter(tensor)
    return tensor


@settings(max_examples=examples(150))
@given(data=st.data(), sizes=st.lists(st.integers(0, 300), min_size=1, max_size=3))
def test_any_views_of_any_storages(data: st.DataObject, sizes: list[int]) -> None:
    storages = [torch.randint(2, (size,), dtype=torch.uint8).untyped_storage() for size in sizes]
    tensors: list[torch.Tensor] = []
    for _ in range(data.draw(st.integers(1, 6))):
        if tensors and data.draw(st.integers(0, 6)) == 0:
            tensors.append(data.draw(st.sampled_from(tensors)))  # tied
        else:
            tensors.append(data.draw(strided(data.draw(st.sampled_from(storages)))))
    check(tensors)


Op = Callable[[torch.Tensor, int, int], torch.Tensor]
OPS: dict[str, Op] = {
    "select": lambda t, dim, n: t.select(dim, n % t.size(dim)) if t.size(dim) else t,
    "narrow": lambda t, dim, n: (
        t.narrow(dim, n % (t.size(dim) + 1), (t.size(dim) - n) % 3)
        if n % (t.size(dim) + 1) + (t.size(dim) - n) % 3 <= t.size(dim)
        else t
    ),
    "step": lambda t, dim, n: t.transpose(0, dim)[n % 2 :: 1 + n % 3].transpose(0, dim),
    "transpose": lambda t, dim, n: t.transpose(dim, n % t.dim()),
    "diagonal": lambda t, dim, n: t.diagonal() if t.dim() == 2 else t,
    "unfold": lambda t, dim, n: t.unfold(dim, min(2, t.size(dim)), 1 + n % 2),
    "expand": lambda t, dim, n: t.unsqueeze(dim).expand(*t.shape[:dim], 1 + n % 3, *t.shape[dim:]),
    "chunk": lambda t, dim, n: t.chunk(3, dim)[n % len(t.chunk(3, dim))],
    "flatten": lambda t, dim, n: t.view(-1) if t.is_contiguous() else t,
    "bytes": lambda t, dim, n: t.view(torch.uint8) if t.stride(-1) == 1 and t.size(-1) else t,
    "wide": lambda t, dim, n: t.view(torch.complex64) if can_widen(t) else t,
}


def can_widen(t: torch.Tensor) -> bool:
    return (
        t.dtype == torch.float32
        and t.stride(-1) == 1
        and all(n % 2 == 0 for n in (t.size(-1), int(t.storage_offset()), *t.stride()[:-1]))
    )


@settings(max_examples=examples(150))
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    chains=st.lists(
        st.lists(
            st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 2), st.integers(0, 6)),
            max_size=4,
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_views_of_one_tensor(shape: list[int], chains: list[list[tuple[str, int, int]]]) -> None:
    base = torch.rand(shape)
    tensors = []
    for chain in chains:
        view = base
        for name, dim, n in chain:
            view = OPS[name](view, dim % view.dim(), n) if view.dim() else view
        tensors.append(view)
    check(tensors)


@settings(max_examples=examples(25))
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 60),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex128]),
    data=st.data(),
)
def test_chunks_end_anywhere_in_packed_parts(
    rows: int, columns: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    base = torch.randint(256, (rows * columns * dtype.itemsize,), dtype=torch.uint8)
    matrix = base.view(dtype).view(rows, columns)
    first = data.draw(st.integers(0, columns - 1))
    last = data.draw(st.integers(first + 1, columns))
    part = matrix[:, first:last]
    inner = part[rows // 3 :, : 1 + (last - first) // 2]
    tensors = [torch.ones(3), inner.t(), part, torch.ones(100, 2)[:, 1]]
    for chunk_size in (4096, 2**20):
        loaded = aiotorchio.load(io.BytesIO(saved(tensors, compact=True, chunk_size=chunk_size)[0]))
        for actual, expected in zip(loaded, tensors, strict=True):
            assert stored(actual) == stored(expected)
        assert loaded[1].data_ptr() - loaded[2].data_ptr() == (
            (rows // 3) * (last - first) * dtype.itemsize
        )


# ------------------------------------------------------------------------------ exact sizes


def marked(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor full of marked bytes, which must not be sent."""
    count = math.prod(shape) * dtype.itemsize
    return torch.full((count,), 0xEE, dtype=torch.uint8).view(dtype).view(shape)


def shown(tensor: torch.Tensor) -> torch.Tensor:
    """Fill the elements of a tensor with bytes that may be sent."""
    raw(tensor).fill_(0x11)
    return tensor


EXACT: dict[str, Callable[[], list[torch.Tensor]]] = {
    "column": lambda: [marked(30, 50)[:, 7]],
    "row": lambda: [marked(1000, 64)[77]],
    "first row": lambda: [marked(1000, 64)[0]],
    "last row": lambda: [marked(1000, 64)[-1]],
    "one element": lambda: [marked(1000)[77]],
    "narrow 0": lambda: [marked(20, 30, 10).narrow(0, 3, 5)],
    "narrow 1": lambda: [marked(20, 30, 10).narrow(1, 3, 5)],
    "narrow 2": lambda: [marked(20, 30, 10).narrow(2, 3, 5)],
    "narrow all": lambda: [marked(9, 9, 9)[2:5, 3:7, 1:8]],
    "q": lambda: [marked(16, 96).chunk(3, -1)[0]],
    "k": lambda: [marked(16, 96).chunk(3, -1)[1]],
    "v": lambda: [marked(16, 96).chunk(3, -1)[2]],
    "q in rows": lambda: [marked(96, 16).chunk(3, 0)[1]],
    "diagonal": lambda: [marked(40, 40).diagonal()],
    "steps": lambda: [marked(1000)[3::7]],
    "transposed": lambda: [marked(30, 50)[:, 10:20].t()],
    "expanded": lambda: [marked(30, 50)[:, 7:8].expand(30, 9)],
    "half": lambda: [marked(30, 50, dtype=torch.bfloat16)[:, 1::2]],
    "complex": lambda: [marked(30, 50, dtype=torch.complex128)[:, 1::2]],
    "real": lambda: [marked(30, 50, dtype=torch.complex64).real],
    "conjugate": lambda: [marked(30, 50, dtype=torch.complex64)[:, 4].conj()],
    "bytes of a column": lambda: [marked(30, 50).view(torch.uint8)[:, 5:9]],
    "large column": lambda: [marked(400, 600)[:, ::2]],
    "two rows": lambda: [marked(100, 64)[20], marked(100, 64)[40]],
    "rows of one": lambda: list(marked(100, 64)[::20]),
    "column and parts of it": lambda: [(c := marked(60, 50)[:, 7:14]), c[3:30, 2], c[::2].t()],
}


def elements(tensors: Sequence[torch.Tensor]) -> int:
    """The number of bytes that the tensors show; each byte counts once."""
    return len({(key(tensor), at) for tensor in tensors for at in addresses(tensor)})


def assert_exact(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        shown(tensor)
    data, summary = saved(list(tensors), compact=True)
    assert summary.payload_nbytes - elements(tensors) <= 63 * (summary.storages - 1)
    assert b"\xee" * 4 not in data
    assert_compact(aiotorchio.load(io.BytesIO(data)), tensors)


@pytest.mark.parametrize("name", EXACT)
def test_what_no_tensor_shows_does_not_leave(name: str) -> None:
    assert_exact(EXACT[name]())


MORE: dict[str, Callable[[], list[torch.Tensor]]] = {
    "two columns": lambda: [(m := marked(30, 50))[:, 0], m[:, 25]],
    "q and v": lambda: list(marked(16, 96).chunk(3, -1))[::2],
    "q and v by heads": lambda: [(m := marked(8, 3, 4, 16))[:, 0], m[:, 2]],
    "even rows and an odd column": lambda: [(m := marked(20, 10))[::2, 1], m[1::2, 3]],
    "heads and a row of them": lambda: [(m := marked(20, 24)[:, :12]).view(20, 3, 4), m[0]],
    "column and its windows": lambda: [(c := marked(30, 50)[:, 0]), c.unfold(0, 4, 1)],
    "expanded and plain": lambda: [
        (c := marked(30, 50)[:, 0:2]).unsqueeze(1).expand(30, 7, 2),
        c[:, 1],
    ],
}


@pytest.mark.parametrize("name", MORE)
def test_what_no_tensor_shows_does_not_leave_with_several_views(name: str) -> None:
    assert_exact(MORE[name]())


def test_views_of_other_item_sizes_keep_what_lies_between() -> None:
    column = torch.zeros(30, 50, dtype=torch.complex64)[:, 0]
    summary = check([column, column.real])
    assert summary.payload_nbytes == (29 * 50 + 1) * 8


def test_what_lies_between_views_that_overlap_in_part_is_sent() -> None:
    """A row and a column share one element, but neither contains the other."""
    matrix = torch.arange(100.0).view(10, 10)
    summary = check([matrix[4], matrix[:, 4]])
    # From the first element of the column to its last.
    assert summary.payload_nbytes == (90 + 1) * 4


def test_windows_are_sent_from_the_first_to_the_last() -> None:
    summary = check([torch.arange(100.0)[10:30].unfold(0, 4, 2)])
    assert summary.payload_nbytes == 20 * 4


def test_strides_are_those_among_what_is_sent() -> None:
    matrix = torch.arange(600.0).view(20, 30)
    data, _ = saved([matrix[:, 5], matrix[:, 5:15].t(), matrix[:, 5:6]], compact=True)
    column, part, slim = aiotorchio.load(io.BytesIO(data))
    assert (part.stride(), part.storage_offset()) == ((1, 10), 0)
    assert (column.stride(), column.storage_offset()) == ((10,), 0)
    assert slim.stride(0) == 10
    part += 1000
    assert torch.equal(column, matrix[:, 5] + 1000)


# ------------------------------------------------------------------------------ whole storages


def test_whole_storages_are_sent_as_ever() -> None:
    tensors = [torch.rand(30), torch.rand(4, 5).t(), torch.rand(6).expand(2, 6), torch.tensor(1.5)]
    parts = compacted(tensors)
    assert not parts.parts and not parts.left_out
    assert_same(aiotorchio.load(io.BytesIO(saved(tensors, compact=True)[0])), tensors)


def test_storages_that_the_object_has_itself_stay_whole() -> None:
    quantized = torch.quantize_per_tensor(torch.rand(8, 8), 0.1, 0, torch.qint8)[:, 2]
    shared = torch.rand(1000)
    obj = [
        [shared[:10], shared.untyped_storage()],
        [quantized],
        [(typed := torch.rand(50))[5:7], typed_storage(typed.untyped_storage(), torch.float32)],
    ]
    data, summary = saved(obj, compact=True)
    assert summary.left_out_nbytes == 0
    assert_same(aiotorchio.load(io.BytesIO(data)), obj)


def test_a_parameter_with_attributes() -> None:
    parameter = torch.nn.Parameter(torch.rand(100)[:10])
    parameter.tag = 1  # type: ignore[attr-defined]
    obj = {"p": parameter, "q": torch.rand(100)[:10]}
    data, summary = saved(obj, compact=True)
    assert (summary.codec, summary.left_out_nbytes) == ("pickle", 720)
    loaded = aiotorchio.load(io.BytesIO(data))
    assert loaded["p"].tag == 1
    assert torch.equal(loaded["p"], parameter) and torch.equal(loaded["q"], obj["q"])


def test_the_parts_of_a_sparse_tensor() -> None:
    indices, values = torch.tensor([[0, 9, 1, 9, 2, 9]])[:, ::2], torch.rand(3, 4)[:, 1]
    sparse = torch.sparse_coo_tensor(indices, values, (3,), check_invariants=True)
    data, _ = saved([sparse], compact=True)
    (loaded,) = aiotorchio.load(io.BytesIO(data))
    assert torch.equal(loaded.to_dense(), sparse.to_dense())


def test_meta_has_no_bytes_to_leave_out() -> None:
    meta = torch.empty(100, 100, device="meta")
    tensors = [meta[:, 3], meta[5], torch.rand(10)[:2]]
    data, summary = saved(tensors, compact=True)
    assert summary.left_out_nbytes == 32
    loaded = aiotorchio.load(io.BytesIO(data))
    assert loaded[0].untyped_storage().nbytes() == 40_000
    assert loaded[0].stride() == (100,) and key(loaded[0]) == key(loaded[1])


def test_within_skip_data() -> None:
    tensors = [torch.rand(10, 10)[:, 2]]
    with torch.serialization.skip_data():
        data, summary = saved(tensors, compact=True)
        plain, _ = saved(tensors)
    assert summary.left_out_nbytes == summary.payload_nbytes == 0
    assert len(data) == len(plain)


def test_nothing_is_shown() -> None:
    base = torch.rand(1000)
    tensors = [base[:0], base[500:500].view(0, 7), torch.rand(5)[2:2]]
    summary = check(tensors)
    assert summary.payload_nbytes == 0 and summary.left_out_nbytes == 4020


def test_views_of_many_storages_and_many_views_of_one() -> None:
    base = torch.rand(3000, 3)
    tensors = [*base[::3], *(torch.rand(3, 3)[:, 1] for _ in range(300)), base[::3, 1:]]
    check(tensors)


def test_the_rows_of_the_caller_are_untouched() -> None:
    tensor = torch.rand(10, 10)[:, 3]
    before = (tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes())
    saved([tensor], compact=True)
    assert before == (
        tensor.stride(),
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
    )
    assert tensor._version == 0


# ------------------------------------------------------------------------------ foreign byte order


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.complex64, torch.complex128])
def test_the_other_byte_order(dtype: torch.dtype) -> None:
    base = torch.randint(2**8, (64 * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(8, 8)
    tensors = [base[3, 1:2], base[5:7, 2:5], base[6, 3:4]]
    parts = compacted(tensors)
    assert parts.left_out
    data = _composed(parts)
    loaded = aiotorchio.load(io.BytesIO(data))
    unit = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    swap_bytes(base.untyped_storage(), unit)
    assert_compact(loaded, tensors)


def _composed(parts: Flattened) -> bytes:
    """The message as a sender of foreign byte order would write it."""
    from aiotorchio.memory.outgoing import OutgoingPayload
    from aiotorchio.wire.composer import Composer
    from aiotorchio.wire.layout import Layout

    parts.header.byteorder = "big" if sys.byteorder == "little" else "little"
    layout = Layout(parts.header)
    composer = Composer(parts.header, layout, checksum=True)
    payload = OutgoingPayload(
        parts.storages, layout.offsets, layout.nbytes, layout.chunk_size, parts=parts.parts
    )
    frames = [composer.opening(parts.skeleton)]
    frames += [
        composer.chunk_frame(payload.chunk_views(*layout.chunk_range(index)))
        for index in range(layout.chunks)
    ]
    return b"".join(b"".join(frame) for frame in [*frames, composer.end()])


# ------------------------------------------------------------------------------ beyond a storage


def shrunk() -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that reach beyond their storages, as FSDP leaves them between two steps."""
    small = torch.arange(20.0)
    yield "small", small[10:]
    small.untyped_storage().resize_(48)
    large = torch.zeros(300_000)
    yield "large", large[150_000:]
    large.untyped_storage().resize_(800_000)
    column = torch.zeros(1000, 10)
    yield "column", column[:, 0]
    column.untyped_storage().resize_(20_000)
    freed = torch.zeros(1000)
    yield "freed", freed[::2]
    freed.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "large",
        "column",
        "freed",
    ],
)
def test_a_tensor_beyond_its_storage(name: str) -> None:
    """The receiver refuses it, as without ``compact``; no byte outside the storage is read."""
    tensor = dict(shrunk())[name]
    data, _ = saved([tensor])
    with pytest.raises(aiotorchio.InvalidObjectError, match="reaches byte"):
        aiotorchio.load(io.BytesIO(data))
    parts = flatten([tensor], chunk_size=4096, metadata={}, producer="tests", compact=True)
    assert not parts.parts
    data, _ = saved([tensor], compact=True)
    with pytest.raises(aiotorchio.InvalidObjectError, match="reaches byte"):
        aiotorchio.load(io.BytesIO(data))


@pytest.mark.parametrize("before", [1, 2**16 + 1])
def test_a_part_that_does_not_begin_where_its_storage_does(before: int) -> None:
    base = torch.arange(9, dtype=torch.uint8)
    words = torch.empty((0,), dtype=torch.int16).set_(base.untyped_storage(), 1, (2,), (1,))
    number = torch.empty((0,), dtype=torch.int32).set_(base.untyped_storage(), 1, (), ())
    parts = compacted([torch.ones(before, dtype=torch.uint8), words, number])
    assert parts.parts[1] == [Part(2, 2, 1, (6,), (1,))]
    check([torch.ones(before, dtype=torch.uint8), words, number])


def test_parts_know_their_bytes() -> None:
    assert Part(0, 8, 4, (3, 2), (10, 1)).nbytes == 24
    assert not Part(0, 8, 4, (3, 2), (10, 1)).dense
    assert Part(0, 8, 4, (3, 2), (2, 1)).dense
    assert craft.flattened([torch.rand(10)[:2]]).parts == {}
