"""``compact=True`` in the public functions: the same object arrives, without unused bytes."""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import StreamReader, StreamWriter, TensorSpec
from tests.support import corpus
from tests.support.backends import IN_ONE_LOOP, both_ends
from tests.support.corpus import assert_same
from tests.table.test_compact import assert_compact

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    table, qkv = torch.rand(5000, 64), torch.rand(96, 300)
    return {
        "row": table[77],
        "q": qkv[:, :100],
        "q_part": qkv[3:30, 20:40].t(),
        "column": torch.rand(1000, 100)[:, 7],
        "whole": torch.rand(300, 70),
        "z": torch.rand(20, 20, dtype=torch.complex64)[:, 3].conj(),
        "tied": (tied := nn.Parameter(torch.rand(40, 40)[:, :7])),
        "again": [tied, 7, "x"],
        "meta": torch.empty(5, device="meta"),
    }


def tensors(obj: dict[str, Any]) -> list[torch.Tensor]:
    found = [value for value in obj.values() if isinstance(value, torch.Tensor)]
    return [*found, obj["again"][0]]


def encoded(obj: object, **options: Any) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"snapshot": True, "chunk_size": 4096}])
@in_one_loop
async def test_over_any_stream(kind: str, options: dict[str, Any]) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        summaries = []

        async def send() -> None:
            writer = StreamWriter(near.sink)
            summaries.append(await writer.save(state(), compact=True, **options))
            summaries.append(await writer.save(state(), compact=True, **options))

        group.start_soon(send)
        assert_compact(tensors(await far.load()), tensors(state()))
        await far.load()
    sent = tensors(state())
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in sent}
    assert summaries[0].left_out_nbytes > 1_500_000
    left = sum(sizes.values()) - 20 - summaries[0].left_out_nbytes
    assert left <= summaries[0].payload_nbytes <= left + 63 * 6


@pytest.mark.parametrize("snapshot", [False, True])
async def test_iter_bytes_files_and_options(snapshot: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"compact": True, "snapshot": snapshot, "checksum": False}
    async with aclosing(aiotorchio.iter_bytes(state(), **options)) as pieces:
        assert_compact(tensors(await aiotorchio.load_from_stream(pieces)), tensors(state()))
    path = tmp_path / "state.aio"
    done: list[tuple[int, int]] = []
    summary = aiotorchio.save(
        state(), path, progress=lambda *figures: done.append(figures), **options
    )
    assert done[-1] == (summary.payload_nbytes, summary.payload_nbytes)
    assert path.stat().st_size == summary.nbytes
    assert_compact(tensors(aiotorchio.load(path)), tensors(state()))


@pytest.mark.parametrize("name", corpus.case_parameters())
def test_every_object_of_the_corpus(name: str) -> None:
    """An object that shows all of its storages arrives exactly; a packed one can be sent again."""
    obj = corpus.make(name)
    file = io.BytesIO()
    summary = aiotorchio.save(obj, file, compact=True)
    file.seek(0)
    options = corpus.LOAD_OPTIONS.get(name, {})
    loaded = aiotorchio.load(file, **options)
    if not summary.left_out_nbytes:
        assert_same(loaded, obj)
        return
    again = io.BytesIO()
    # A second save leaves out no more bytes.
    assert not aiotorchio.save(loaded, again, compact=True).left_out_nbytes
    again.seek(0)
    assert_same(aiotorchio.load(again, **options), loaded)
    if isinstance(obj, torch.Tensor) and obj.layout is not torch.strided:
        assert torch.equal(loaded.to_dense(), obj.to_dense())
    elif isinstance(obj, torch.Tensor):
        assert_compact([loaded], [obj])


def test_without_it_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", bytes)
    plain = encoded(state())
    assert plain == encoded(state(), compact=False) == encoded(state(), snapshot=True)
    assert encoded(state(), compact=True) == encoded(state(), compact=True, snapshot=True)
    whole = {"a": torch.rand(30, 4).t(), "b": torch.rand(3)}
    assert encoded(whole) == encoded(whole, compact=True)


def test_with_specs() -> None:
    for option in ("compact", "snapshot"):
        with pytest.raises(ValueError, match="cannot be combined with specs"):
            aiotorchio.save(iter(()), io.BytesIO(), specs={}, **{option: True})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ at the receiver


async def test_names_before_bytes() -> None:
    plain = encoded(state())
    data = encoded(state(), compact=True, chunk_size=4096)

    async def body() -> Any:
        for start in range(0, len(data), 5000):
            yield data[start : start + 5000]

    async with aclosing(body()) as pieces, StreamReader(pieces).open() as message:
        assert message.tensors["q"] == TensorSpec((96, 100), torch.float32)
        assert message.nbytes < len(plain) // 4
        found = [(name, tensor.clone()) async for name, tensor in message]
    expected = state()
    expected["again.0"] = expected["tied"]
    assert [name for name, _ in found if name not in expected] == []
    for name, tensor in found:
        if not tensor.is_meta:
            assert torch.equal(tensor, expected[name])


def test_select() -> None:
    sent = state()
    loaded = aiotorchio.load(io.BytesIO(encoded(sent, compact=True)), select=["q*", "column"])
    assert list(loaded) == ["q", "q_part", "column", "again"]
    assert_compact(
        [loaded[name] for name in ("q", "q_part", "column")],
        [sent[name] for name in ("q", "q_part", "column")],
    )


INTO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: torch.zeros(t.shape, dtype=t.dtype),
    "like": torch.empty_like,
    "in gaps": lambda t: torch.zeros((*t.shape, 2), dtype=t.dtype)[..., 0],
    "transposed": lambda t: torch.zeros(t.shape[::-1], dtype=t.dtype).permute(
        *reversed(range(t.dim()))
    ),
}


@pytest.mark.parametrize("options", [{}, {"staged": True}])
@pytest.mark.parametrize("layout", INTO)
@pytest.mark.parametrize("chunk_size", [4096, 2**22])
def test_into(layout: str, options: dict[str, Any], chunk_size: int) -> None:
    sent = {key: value for key, value in state().items() if key not in ("again", "meta")}
    into = {name: INTO[layout](tensor.detach()) for name, tensor in sent.items()}
    data = encoded(sent, compact=True, chunk_size=chunk_size)
    loaded = aiotorchio.load(io.BytesIO(data), into=into, **options)
    for name, tensor in sent.items():
        assert loaded[name] is into[name]
        assert torch.equal(into[name], tensor)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_into_a_double_buffer() -> None:
    sent = {key: value for key, value in state().items() if key not in ("again", "meta")}
    into = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in sent.items()}
    buffers = aiotorchio.DoubleBuffer(into)
    for factor in (1, 2):
        async with aclosing(
            aiotorchio.iter_bytes(
                {name: (base_of(tensor) * factor) for name, tensor in sent.items()}, compact=True
            )
        ) as pieces:
            await aiotorchio.load_from_stream(pieces, into=buffers, lock=asyncio.Lock())
        for name, tensor in sent.items():
            assert torch.equal(into[name], tensor * factor)


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """Make a view of a larger tensor, with the same numbers."""
    wide = torch.zeros((*tensor.shape, 3), dtype=tensor.dtype)
    wide[..., 1] = tensor.detach()
    return _Scaled(wide[..., 1])  # type: ignore[return-value]


class _Scaled:
    """A proxy of a view that multiplies it in place, so that it stays a view."""

    def __init__(self, view: torch.Tensor) -> None:
        self.view = view

    def __mul__(self, factor: int) -> torch.Tensor:
        return self.view.mul_(factor)


def test_a_change_while_it_is_sent() -> None:
    """Packed parts are copied; a change is noticed all the same, and never half of it is sent."""
    base = torch.zeros(1000, 1000)
    change = functools.partial(base.add_, 1)
    for snapshot in (False, True):
        file = io.BytesIO()
        options: dict[str, Any] = {"compact": True, "snapshot": snapshot, "chunk_size": 2**16}
        options["progress"] = lambda done, total: change() if done < 2**17 else None
        if snapshot:
            before = base[:, 3:300].clone()
            aiotorchio.save({"w": base[:, 3:300]}, file, **options)
            file.seek(0)
            assert torch.equal(aiotorchio.load(file)["w"], before)
        else:
            with pytest.raises(RuntimeError, match=r"tensor 0 \('w'\) was changed"):
                aiotorchio.save({"w": base[:, 3:300]}, file, **options)
            file.seek(0)
            with pytest.raises(aiotorchio.RemoteAbort, match="was changed"):
                aiotorchio.load(file)
