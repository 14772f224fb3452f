"""Loads into tensors that share memory: with each other, or with the targets of another load."""

from __future__ import annotations

import functools
import io
import itertools
import os
import random
import sys
import threading
import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import DoubleBuffer, MismatchError, TruncatedError
from aiotorchio.engine.claims import Claim, claims
from aiotorchio.memory import incoming
from tests.support import corpus, craft
from tests.support.backends import IN_ONE_LOOP, both_ends, until
from tests.support.tensor_layouts import (
    LAYOUTS,
    MODES,
    Pieces,
    Watched,
    all_modes,
    assert_same_bits,
    encoded,
    into_options,
    load,
    over,
    place,
    safe_modes,
)

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)


@pytest.fixture(autouse=True)
def nothing_stays_claimed() -> Any:
    assert not claims
    yield
    assert not claims


# ------------------------------------------------------------------------------ tied weights


@all_modes
def test_a_gathered_copy_of_a_tied_model(mode: str) -> None:
    """Gathering clones every name, and breaks the ties."""
    sent, model = corpus.Tied(), corpus.Tied()
    state = {name: tensor.clone() for name, tensor in sent.state_dict().items()}
    loaded = load(encoded(state), **into_options(mode, model))
    assert loaded["decoder.weight"] is loaded["embedding.weight"] is model.embedding.weight
    corpus.assert_same(model.state_dict(), sent.state_dict())


@in_one_loop
@all_modes
async def test_a_gathered_copy_over_every_stream(kind: str, mode: str) -> None:
    tied = torch.randn(40_000)
    own = place((40_000,), torch.float32, offset=3)
    into = {"a": own, "b": own[:]}
    watched = Watched(into)
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save({"a": tied, "b": tied.clone()}, chunk_size=2**14)

        group.start_soon(push)
        loaded = await far.load(**into_options(mode, into))
    assert loaded["a"] is own and loaded["b"] is into["b"]
    watched.assert_filled({"a": tied, "b": tied})


@all_modes
@pytest.mark.parametrize("strict", [True, False])
def test_other_numbers_for_one_tensor(mode: str, strict: bool) -> None:
    for size, chunk_size in itertools.product([3, 30_000], [4096, 2**20]):
        own = place((size,), torch.float32, behind=1)
        into = {"a": own, "b": own[:], "c": place((5,), torch.float32)}
        watched = Watched(into)
        state = {"a": torch.ones(size), "b": torch.ones(size), "c": torch.ones(5)}
        state["b"][-1] = 2
        text = "nothing was changed" if mode != "plain" else "the target was written to"
        with pytest.raises(MismatchError, match=f"b and a are one tensor .*: {text}") as caught:
            load(encoded(state, chunk_size=chunk_size), **into_options(mode, into), strict=strict)
        assert list(caught.value.misfits) == ["b"]
        if mode != "plain":
            watched.assert_untouched()


@all_modes
async def test_other_numbers_in_an_async_load(mode: str) -> None:
    own = place((30_000,), torch.float32)
    into = {"a": own, "b": own[:]}
    watched = Watched(into)
    state = {"a": torch.ones(30_000), "b": torch.ones(30_000)}
    for at in (0, 15_000, 29_999):
        state["b"][at] = 2
        stream = Pieces(encoded(state, chunk_size=2**14), 5000)
        with pytest.raises(MismatchError, match="b and a are one tensor"):
            await aiotorchio.load_from_stream(stream, **into_options(mode, into))
        state["b"][at] = 1
        if mode != "plain":
            watched.assert_untouched()


def test_other_numbers_for_a_double_buffer_with_gaps() -> None:
    """A tensor with gaps in its storage is received into separate memory."""
    own = place((30,), torch.float32, step=2)
    into = {"a": own, "b": own[:]}
    watched, buffers = Watched(into), DoubleBuffer(into)
    with pytest.raises(MismatchError, match="nothing was changed"):
        load(encoded({"a": torch.ones(30), "b": torch.zeros(30)}), into=buffers)
    watched.assert_untouched()
    load(encoded({"a": torch.ones(30), "b": torch.ones(30)}), into=buffers)
    watched.assert_filled({"a": torch.ones(30)})


def random_copies(rng: random.Random, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make the same numbers several times, in separate storages or mixed in one of them."""
    state: dict[str, torch.Tensor] = {}
    mixed = torch.stack([values] * 2, rng.randint(0, values.dim()))
    dim = next(n for n in range(mixed.dim()) if mixed.size(n) == 2)
    halves = list(mixed.unbind(dim))
    for n in range(rng.randint(2, 5)):
        if halves and rng.random() < 0.5:
            state[f"w{n}"] = halves.pop()
        elif state and rng.random() < 0.3:
            state[f"w{n}"] = rng.choice(list(state.values()))
        else:
            state[f"w{n}"] = rng.choice(list(LAYOUTS.values()))(values).data.copy_(values)
    state["other"] = rng.choice(list(state.values()))
    return state


@pytest.mark.parametrize("seed", range(20))
def test_copies_in_any_layout(seed: int) -> None:
    rng = random.Random(seed)
    values = torch.randn(rng.choice([(), (3, 5), (50, 70), (3, 4, 5)]))
    state = random_copies(rng, values)
    names = [name for name in state if name != "other"]
    with mock.patch.object(incoming, "SMALL_STORAGE", rng.choice([1, 64, 2**16])):
        for mode, dtype in itertools.product(MODES, [torch.float32, torch.bfloat16]):
            own = rng.choice(list(LAYOUTS.values()))(values.to(dtype))
            into = dict.fromkeys(names, own)
            watched = Watched(into)
            load(
                encoded(state, chunk_size=4096),
                **into_options(mode, into),
                strict=False,
                cast=True,
            )
            watched.assert_filled(dict.fromkeys(names, values))
            # In separate storages, so that a change of one tensor leaves the others as they are.
            changed = {name: tensor.contiguous().clone() for name, tensor in state.items()}
            wrong = rng.choice(names)
            changed[wrong].view(-1)[rng.randrange(values.numel())] += 9
            watched = Watched(into)
            with pytest.raises(MismatchError, match="are one tensor in the target"):
                load(encoded(changed), **into_options(mode, into), strict=False, cast=True)
            if mode != "plain":
                watched.assert_untouched()


@all_modes
@pytest.mark.parametrize("dtype", corpus.STRIDED_DTYPES)
def test_bits_are_compared(dtype: str, mode: str) -> None:
    """The check compares bits, not numbers: NaN equals itself, and 0 is not -0."""
    for count, value in itertools.product([1, 9000], [0xFF, 0x7F]):
        itemsize = getattr(torch, dtype).itemsize
        bits = torch.full((count * itemsize,), value, dtype=torch.uint8)
        bits[-1] = 0x01
        sources = [
            over(each.untyped_storage(), getattr(torch, dtype), 0, (count,), (1,))
            for each in (bits.clone(), bits.clone())
        ]
        own = place((count,), getattr(torch, dtype), offset=1)
        data = encoded(dict(zip("ab", sources, strict=True)), chunk_size=4096)
        load(data, **into_options(mode, {"a": own, "b": own[:]}))
        assert_same_bits(own, sources[0])
        if sources[1].dtype != torch.bool:
            raw = torch.empty(0, dtype=torch.uint8).set_(sources[1].untyped_storage())
            raw[-itemsize] ^= 0x80
            data = encoded(dict(zip("ab", sources, strict=True)), chunk_size=4096)
            with pytest.raises(MismatchError, match="b and a are one tensor"):
                load(data, **into_options(mode, {"a": own, "b": own[:]}))


@all_modes
def test_numbers_are_compared_as_they_are_converted(mode: str) -> None:
    values = torch.randn(5000, dtype=torch.float64)
    values[::7] = float("nan")
    own = place((5000,), torch.bfloat16)
    into = {"a": own, "b": own[:], "c": own[:]}
    state = {"a": values, "b": values.bfloat16(), "c": values.float()[torch.arange(5000)]}
    load(encoded(state, chunk_size=4096), **into_options(mode, into), cast=True)
    assert torch.equal(own.nan_to_num(7), values.bfloat16().nan_to_num(7))
    state["b"][3] = 17
    with pytest.raises(MismatchError, match="b and a are one tensor"):
        load(encoded(state, chunk_size=4096), **into_options(mode, into), cast=True)


@all_modes
def test_conjugates_are_compared_as_they_are_meant(mode: str) -> None:
    values = torch.randn(300, dtype=torch.complex64)
    own = place((300,), torch.complex64)
    into = {"a": own, "b": own[:]}
    load(encoded({"a": values.conj(), "b": values.conj().clone()}), **into_options(mode, into))
    assert_same_bits(own, values.conj().resolve_conj())
    with pytest.raises(MismatchError, match="b and a are one tensor"):
        # The bytes are the same, but not the numbers.
        load(encoded({"a": values.conj(), "b": values}), **into_options(mode, into))


@all_modes
def test_copies_in_the_other_byte_order(mode: str) -> None:
    for second, fits in ((torch.arange(300.0), True), (torch.ones(300), False)):
        parts = craft.flattened({"a": torch.arange(300.0), "b": second})
        parts.header.byteorder = "big" if sys.byteorder == "little" else "little"
        data = craft.compose(parts)
        own = torch.zeros(300)
        try:
            load(data, **into_options(mode, {"a": own, "b": own[:]}))
        except MismatchError:
            assert not fits
        else:
            assert fits
            assert_same_bits(own, load(data)["a"])


@all_modes
def test_a_storage_that_is_kept_for_something_else(mode: str) -> None:
    base = torch.arange(9000.0)
    state = {"a": base[100:4000], "b": base[100:4000].clone(), "base": base}
    own = place((3900,), torch.float32, step=2)
    for names in (("a", "b"), ("b", "a")):
        into = dict.fromkeys(names, own)
        watched = Watched(into)
        load(encoded(state, chunk_size=4096), **into_options(mode, into), strict=False)
        watched.assert_filled({"a": base[100:4000]})
        wrong = state | {"b": base[101:4001].clone()}
        with pytest.raises(MismatchError, match="are one tensor"):
            load(encoded(wrong, chunk_size=4096), **into_options(mode, into), strict=False)


def test_what_is_compared_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def UntypedStorage(self, nbytes: int, *, device: Any = None) -> torch.UntypedStorage:
            made.append(nbytes)
            return torch.UntypedStorage(nbytes, device=device)

    monkeypatch.setattr(incoming, "torch", Spy())
    own = torch.zeros(2**18)
    state = {"a": torch.ones(2**18), "b": torch.ones(2**18)}
    load(encoded(state), into={"a": own, "b": own[:]})
    assert made == []


@all_modes
def test_a_message_with_one_name_of_a_tied_model(mode: str) -> None:
    """``named_parameters()`` gives a tied parameter once."""
    sent, model = corpus.Tied(), corpus.Tied()
    state = dict(sent.named_parameters()) | dict(sent.named_buffers())
    state = {name: tensor for name, tensor in state.items() if name in sent.state_dict()}
    assert len(state) < len(sent.state_dict())
    load(encoded(state), **into_options(mode, model))
    corpus.assert_same(model.state_dict(), sent.state_dict())


def test_a_name_of_other_memory_is_missing() -> None:
    own = torch.zeros(10)
    others = {
        "longer": own,
        "other": torch.zeros(5),
        "behind": own[5:],
        "empty": own[:0],
        "expanded": own[:1].expand(3),
        "meta": torch.zeros(5, device="meta"),
        "int": own.view(torch.int32)[:6],
    }
    for name, tensor in others.items():
        with pytest.raises(MismatchError) as caught:
            load(encoded({"a": torch.ones(5)}), into={"a": own[:5], name: tensor})
        assert caught.value.missing == (name,)
    filled = {"part": own[1:3], "rows": own[:4].view(2, 2).t(), "int": own[:5].view(torch.int32)}
    load(encoded({"a": torch.ones(5)}), into={"a": own[:5], **filled})
    assert own.tolist() == [1] * 5 + [0] * 5


# ------------------------------------------------------------------------------ overlaps


def packed() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {
        "qkv": lambda t: t,
        "q": lambda t: t[:30],
        "k": lambda t: t[30:60],
        "v": lambda t: t[60:],
        "bits": lambda t: t.view(torch.int32),
        "heads": lambda t: t.view(90, 2, 20)[:, 1],
    }


PLACES: dict[str, Callable[[], torch.Tensor]] = {
    "whole": lambda: place((90, 40), torch.float32),
    "part": lambda: place((90, 40), torch.float32, offset=4, behind=3),
    "gaps": lambda: place((90, 40), torch.float32, gap=5),
}


@all_modes
@pytest.mark.parametrize("chunk_size", [4096, 2**20])
def test_what_is_packed_alike_at_both_ends(mode: str, chunk_size: int) -> None:
    sent = torch.randn(90, 40)
    views = packed()
    state = {name: view(sent) for name, view in views.items()}
    for names in (list(views), list(reversed(views)), ["qkv", "k"], ["k", "heads", "q"]):
        for make in PLACES.values():
            own = make()
            into = {
                name: views[name](own) for name in names if name != "bits" or own.is_contiguous()
            }
            watched = Watched(into)
            data = encoded({name: state[name] for name in into}, chunk_size=chunk_size)
            load(data, **into_options(mode, into))
            watched.assert_filled({name: state[name] for name in into})


@all_modes
def test_only_what_is_packed_or_only_its_views(mode: str) -> None:
    sent = torch.randn(90, 40)
    state = {name: view(sent) for name, view in packed().items()}
    for names in (["qkv"], ["q", "k", "v"]):
        own = place((90, 40), torch.float32)
        into = {name: view(own) for name, view in packed().items()}
        watched = Watched(into)
        load(encoded({name: state[name].clone() for name in names}), **into_options(mode, into))
        watched.assert_filled({"qkv": sent})
    with pytest.raises(MismatchError) as caught:
        load(encoded({name: state[name] for name in ("q", "v")}), **into_options(mode, into))
    assert set(caught.value.missing) == {"qkv", "k", "bits", "heads"}


@all_modes
def test_what_is_packed_alike_and_converted(mode: str) -> None:
    sent = torch.randn(90, 40)
    own = place((90, 40), torch.float64, gap=2)
    views: list[Callable[[torch.Tensor], torch.Tensor]]
    views = [lambda t: t, lambda t: t[3:50], lambda t: t[:, 5:9]]
    into = {str(n): view(own) for n, view in enumerate(views)}
    watched = Watched(into)
    state = {str(n): view(sent) for n, view in enumerate(views)}
    load(encoded(state), **into_options(mode, into), cast=True)
    watched.assert_filled({"0": sent})
    with pytest.raises(MismatchError, match="2: shares memory with 0 in the target"):
        load(encoded(state | {"2": sent[:, 4:8]}), **into_options(mode, into), cast=True)


OVERLAPS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "another shape": lambda t: (t, t.view(20, 20)),
    "transposed": lambda t: (t.view(20, 20), t.view(20, 20).t()),
    "in part": lambda t: (t[:300], t[299:]),
    "inside": lambda t: (t, t[7:9]),
    "another dtype": lambda t: (t, t.view(torch.int32)),
    "rows and columns": lambda t: (t.view(20, 20)[3], t.view(20, 20)[:, 5]),
    "blocks": lambda t: (t.view(20, 20)[2:5, 3:9], t.view(20, 20)[4:8, 8:]),
    "every second and third": lambda t: (t[::2], t[1::3]),
    "another stride of one": lambda t: (t.view(1, 400), t.as_strided((1, 400), (7, 1))),
}


@all_modes
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("lay", OVERLAPS.values(), ids=OVERLAPS)
async def test_destinations_that_overlap(
    lay: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], strict: bool, mode: str
) -> None:
    into = dict(zip("ab", lay(place((400,), torch.float32)), strict=True))
    watched = Watched(into)
    state = {name: torch.ones_like(each) for name, each in into.items()}
    state["c"] = torch.ones(3)
    options = into_options(mode, into | {"c": torch.zeros(3)})
    async with both_ends("socket") as (near, far):
        await near.save(state)
        async with aiotorchio.StreamReader(far.source).open() as message:
            with pytest.raises(MismatchError, match="b: shares memory with a") as caught:
                await message.load(**options, strict=strict)
            assert list(caught.value.misfits) == ["b"]
            watched.assert_untouched()
            # No payload was read.
            corpus.assert_same(await message.load(), state)
    with pytest.raises(MismatchError, match="b: shares memory with a"):
        load(encoded(state), **options, strict=strict)
    watched.assert_untouched()
    # Loads of one name at a time are allowed.
    load(encoded({"b": state["b"]}), **options, strict=False)
    watched.assert_filled({"b": state["b"]})


INTERLEAVED: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "columns": lambda t: list(t.view(20, 20).unbind(1)),
    "blocks": lambda t: [b for rows in t.view(20, 20).split(7) for b in rows.split(6, 1)],
    "every third": lambda t: [t[n::3] for n in range(3)],
    "other strides": lambda t: [t[::2], t[1::4], t[3::8]],
    "neighbours": lambda t: list(t.split(41)),
}


@all_modes
@pytest.mark.parametrize("lay", INTERLEAVED.values(), ids=INTERLEAVED)
def test_destinations_among_each_other(
    lay: Callable[[torch.Tensor], list[torch.Tensor]], mode: str
) -> None:
    into = {str(n): each for n, each in enumerate(lay(place((400,), torch.float32)))}
    watched = Watched(into)
    state = {name: torch.randn(each.shape) for name, each in into.items()}
    load(encoded(state), **into_options(mode, into))
    watched.assert_filled(state)


@all_modes
def test_a_tied_tensor_and_a_part_of_it(mode: str) -> None:
    own = torch.zeros(10)
    into = {"a": own, "b": own[:], "part": own[3:5]}
    sent = torch.randn(10)
    load(encoded({"a": sent, "b": sent, "part": sent[3:5]}), **into_options(mode, into))
    assert_same_bits(own, sent)
    with pytest.raises(MismatchError, match="part: shares memory with a"):
        state = {"a": sent, "b": sent.clone(), "part": sent[3:5]}
        load(encoded(state), **into_options(mode, into))


# ------------------------------------------------------------------------------ two loads


class Held:
    """An async iterable that yields a message up to some byte, and the rest when it is released."""

    def __init__(self, data: bytes, until: int) -> None:
        self._pieces = [data[:until], data[until:]]
        self.waits, self.free = anyio.Event(), anyio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._pieces[0]
        self.waits.set()
        await self.free.wait()
        yield self._pieces[1]


VALUES = {f"p{n}": torch.full((9000,), float(n + 1)) for n in range(3)}
DATA = encoded(VALUES, chunk_size=2**14)


def same_memory(into: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Targets of the same memory, and names of it for another load."""
    return {
        "the same": into,
        "another dict": dict(into),
        "views": {name: each[:] for name, each in into.items()},
        "parameters": {name: nn.Parameter(each) for name, each in into.items()},
        "another dtype": {name: each.view(torch.int32) for name, each in into.items()},
        "a part": {"p1": into["p1"][8999:]},
    }


@all_modes
@pytest.mark.parametrize("first", MODES)
async def test_two_loads_into_the_same_tensors(first: str, mode: str) -> None:
    into = {name: torch.zeros(9000) for name in VALUES}
    stream = Held(DATA, len(DATA) // 2)
    async with anyio.create_task_group() as group:
        options = into_options(first, into)
        group.start_soon(functools.partial(aiotorchio.load_from_stream, stream, **options))
        await stream.waits.wait()
        for destination in same_memory(into).values():
            state = {name: torch.ones_like(each) for name, each in destination.items()}
            refused = pytest.raises(RuntimeError, match=r"another load is receiving into 'p\d'")
            async with aiotorchio.StreamReader(Pieces(encoded(state), 99)).open() as message:
                with refused:
                    await message.load(**into_options(mode, destination))
                # No payload was read.
                corpus.assert_same(await message.load(), state)
            with refused:
                load(encoded(state), **into_options(mode, destination))
            with refused:
                await anyio.to_thread.run_sync(
                    functools.partial(load, encoded(state), **into_options(mode, destination))
                )
        stream.free.set()
    corpus.assert_same(into, VALUES)
    load(DATA, **into_options(mode, into))


@pytest.mark.parametrize("mode", ["plain", "staged"])
async def test_two_loads_into_parts_of_one_storage(mode: str) -> None:
    base = torch.zeros(30, 600)
    shards = [{"w": base[:, n * 200 : (n + 1) * 200]} for n in range(3)]
    sent = [torch.randn(30, 200) for _ in shards]
    messages = [encoded({"w": each}, chunk_size=4096) for each in sent]
    streams = [Held(data, len(data) - 5000) for data in messages]
    async with anyio.create_task_group() as group:
        for stream, shard in zip(streams, shards, strict=True):
            options = into_options(mode, shard)
            group.start_soon(functools.partial(aiotorchio.load_from_stream, stream, **options))
        for stream in streams:
            await stream.waits.wait()
        for stream in streams:
            stream.free.set()
    assert_same_bits(base, torch.cat(sent, 1))


async def test_a_double_buffer_swaps_whole_storages() -> None:
    base = torch.zeros(18_000)
    stream = Held(encoded({"w": torch.ones(9000)}), 10_000)
    async with anyio.create_task_group() as group:
        into = DoubleBuffer({"w": base[:9000]})
        group.start_soon(functools.partial(aiotorchio.load_from_stream, stream, into=into))
        await stream.waits.wait()
        with pytest.raises(RuntimeError, match="another load is receiving into 'v'"):
            load(encoded({"v": torch.ones(9000)}), into={"v": base[9000:]})
        stream.free.set()


@all_modes
async def test_a_load_that_is_cancelled_sets_its_tensors_free(mode: str) -> None:
    into = {name: torch.zeros(9000) for name in VALUES}
    for until_byte in (10, 300, len(DATA) // 2, len(DATA) - 1):
        stream = Held(DATA, until_byte)
        async with anyio.create_task_group() as group:
            options = into_options(mode, into)
            group.start_soon(functools.partial(aiotorchio.load_from_stream, stream, **options))
            await stream.waits.wait()
            group.cancel_scope.cancel()
        assert not claims
    load(DATA, **into_options(mode, into))


@all_modes
def test_a_load_that_fails_sets_its_tensors_free(mode: str) -> None:
    into = {name: torch.zeros(9000) for name in VALUES}
    for cut in (0, 10, 300, len(DATA) // 2, len(DATA) - 1):
        with pytest.raises(TruncatedError):
            load(DATA[:cut], **into_options(mode, into))
        assert not claims
    with pytest.raises(MismatchError):
        load(DATA, **into_options(mode, into | {"p1": torch.zeros(3)}))
    assert not claims
    load(DATA, **into_options(mode, into))


@types.coroutine
def never() -> Generator[None, None, None]:
    yield


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@all_modes
async def test_a_coroutine_that_is_closed_sets_its_tensors_free(mode: str) -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield DATA[:5000]
        await never()

    into = {name: torch.zeros(9000) for name in VALUES}
    aiotorchio.load_from_stream(Pieces(DATA, 10), **into_options(mode, into)).close()
    async with aclosing(pieces()) as stream:
        call = aiotorchio.load_from_stream(stream, **into_options(mode, into))
        while not claims:
            # Until then, the call at most gives other tasks a turn.
            assert call.send(None) is None
        call.close()
        assert not claims
    load(DATA, **into_options(mode, into))


@safe_modes
async def test_staged_loads_are_refused_while_the_lock_is_waited_for(mode: str) -> None:
    into, lock = {name: torch.zeros(9000) for name in VALUES}, anyio.Lock()
    async with anyio.create_task_group() as group, lock:
        options = into_options(mode, into)
        first = functools.partial(
            aiotorchio.load_from_stream, Pieces(DATA, 2**14), lock=lock, **options
        )
        group.start_soon(first)
        await until(lambda: lock.statistics().tasks_waiting == 1)
        with pytest.raises(RuntimeError, match="another load is receiving into"):
            load(DATA, into=into, staged=True)
        assert not into["p1"].any()
    assert_same_bits(into["p1"], VALUES["p1"])


@all_modes
def test_loads_in_many_threads_into_the_same_tensors(mode: str) -> None:
    """One load at a time gets them; the others are refused, and change nothing."""
    into = {name: torch.zeros(9000) for name in VALUES}
    outcomes: list[object] = []
    start = threading.Barrier(8)

    def run() -> None:
        start.wait()
        for _ in range(10):
            try:
                load(DATA, **into_options(mode, dict(into)))
                outcomes.append(None)
            except RuntimeError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 80
    refusals = ("another load is receiving into", "got other memory while this load began")
    assert all(each is None or any(text in str(each) for text in refusals) for each in outcomes)
    assert None in outcomes
    corpus.assert_same(into, VALUES)


@all_modes
def test_a_swap_between_the_first_look_and_the_claim(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes about the targets are out of date: the load writes nothing there."""
    into = {name: torch.zeros(9000) for name in VALUES}
    before = {name: each.detach() for name, each in into.items()}
    make = Claim.make

    def make_after_a_swap(claim: Claim) -> None:
        monkeypatch.setattr(Claim, "make", make)
        load(DATA, into=aiotorchio.DoubleBuffer(dict(into)))
        make(claim)

    monkeypatch.setattr(Claim, "make", make_after_a_swap)
    other = encoded({name: -each for name, each in VALUES.items()})
    with pytest.raises(RuntimeError, match="got other memory while this load began"):
        load(other, **into_options(mode, dict(into)))
    assert not claims
    corpus.assert_same(into, VALUES)
    assert not any(each.any() for each in before.values())


@all_modes
def test_a_load_inside_of_a_load(mode: str) -> None:
    into = {name: torch.zeros(9000) for name in VALUES}
    inner: list[str] = []

    def progress(done: int, total: int) -> None:
        try:
            load(DATA, **into_options(mode, into))
        except RuntimeError as error:
            inner.append(str(error))

    load(DATA, **into_options(mode, into), progress=progress)
    assert inner and all("another load is receiving into" in each for each in inner)
    corpus.assert_same(into, VALUES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@all_modes
def test_a_forked_process_has_no_loads(mode: str) -> None:
    into = {name: torch.zeros(9000) for name in VALUES}
    options = into_options(mode, into)
    codes: list[int] = []

    def progress(done: int, total: int) -> None:
        if codes:
            return
        child = os.fork()
        if not child:
            code = 1
            try:
                # Without torch's threads, which the child does not have.
                small = {"p0": torch.zeros(2)} if mode != "plain" else {"p0": into["p0"][:2]}
                if mode == "double":
                    options["into"].memory.claim()
                load(encoded({"p0": torch.ones(2)}), into=small)
                code = len(claims)
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    load(DATA, **options, progress=progress)
    assert codes == [0]
    corpus.assert_same(into, VALUES)


def test_a_message_file_is_still_there_after_a_refusal() -> None:
    into = {name: torch.zeros(9000) for name in VALUES}
    file = io.BytesIO(DATA)

    def progress(done: int, total: int) -> None:
        if done == total:
            with pytest.raises(RuntimeError, match="another load"):
                aiotorchio.load(file, into=into)

    load(DATA, into=into, progress=progress)
    assert file.tell() < len(DATA) - 100_000


async def test_an_unfinished_iterable_is_left_to_its_owner() -> None:
    """A refused load closes only streams that it has opened."""
    into = {name: torch.zeros(9000) for name in VALUES}
    stream = Held(DATA, len(DATA) // 2)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(aiotorchio.load_from_stream, stream, into=into))
        await stream.waits.wait()
        pieces = aiotorchio.iter_bytes(VALUES)
        async with aclosing(pieces):
            with pytest.raises(RuntimeError, match=r"another load is receiving into 'p\d'"):
                await aiotorchio.load_from_stream(pieces, into=into)
        stream.free.set()
    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(("count", "more"), [(2, False), (3, False), (4, True)])
@all_modes
def test_some_of_many_that_share_memory_are_named(mode: str, count: int, more: bool) -> None:
    memory = torch.zeros(50)
    into = {str(n): memory[n : n + 20] for n in range(count + 1)}
    message = {name: torch.ones_like(each) for name, each in into.items()}
    before = memory.clone()
    with pytest.raises(MismatchError, match="shares memory with") as caught:
        load(encoded(message), **into_options(mode, into))
    found = caught.value.misfits
    assert len(found) == min(count, 3)
    assert ("there are more like it" in str(caught.value)) == more
    assert torch.equal(memory, before)
