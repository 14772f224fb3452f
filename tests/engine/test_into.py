"""Loads into existing tensors, and loads of a selection: end to end."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import random
import sys
import threading
from collections import ChainMap, Counter, OrderedDict, UserDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import anyio
import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import MismatchError, StreamPoisoned, UnsafeObjectError
from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.memory import incoming
from aiotorchio.table.names import walk
from tests.support import corpus, craft
from tests.support.backends import IN_ONE_LOOP, both_ends
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
    load_pieces,
    over,
    place,
    places_for,
)
from tests.vectors.generate import FOLDER

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)


def state_of_all_sizes() -> dict[str, torch.Tensor]:
    return {
        "small": torch.arange(5),
        "large": torch.randn(40_000),
        "matrix": torch.randn(100, 300),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(50_000).bfloat16(),
        "transposed": torch.randn(20, 30, 40).permute(2, 0, 1),
        "complex": torch.randn(7, 3, dtype=torch.complex64).conj(),
        "bytes": torch.arange(200, dtype=torch.uint8)[3:150],
        "expanded": torch.randn(4, 1).expand(4, 9),
    }


def assert_are(loaded: Any, destinations: Mapping[str, Any]) -> None:
    """Check that the tensors of an object are the very targets."""
    found = {path: id(tensor) for path, tensor in walk(loaded)}
    assert found == {path: id(tensor) for path, tensor in walk(dict(destinations))}


# ------------------------------------------------------------------------------ every stream


@in_one_loop
@all_modes
async def test_every_stream_fills_tensors_that_are_there(kind: str, mode: str) -> None:
    state = state_of_all_sizes()
    destinations = places_for(state)
    watched, into = Watched(destinations), into_options(mode, destinations)
    progress: list[tuple[int, int]] = []
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            await near.save({"n": 1, **state}, chunk_size=2**16)
            await near.save("and on")

        group.start_soon(push)
        loaded = await far.load(**into, progress=lambda *figures: progress.append(figures))
        assert await far.load() == "and on"
    assert loaded.pop("n") == 1
    assert_are(loaded, destinations)
    watched.assert_filled(state)
    total = progress[-1][1]
    assert progress == [(min(n, total), total) for n in range(2**16, total + 2**16, 2**16)]


@all_modes
async def test_iterables_fill_tensors_that_are_there(mode: str) -> None:
    state = state_of_all_sizes()
    destinations = places_for(state)
    watched = Watched(destinations)
    pieces = aiotorchio.iter_bytes(state, chunk_size=2**16)
    loaded = await load_pieces(pieces, **into_options(mode, destinations))
    assert_are(loaded, destinations)
    watched.assert_filled(state)


@all_modes
@pytest.mark.parametrize("chunk_size", [4096, 2**16, 2**24])
@pytest.mark.parametrize("checksum", [True, False])
def test_the_blocking_twin(mode: str, chunk_size: int, checksum: bool) -> None:
    state = state_of_all_sizes()
    destinations = places_for(state)
    watched = Watched(destinations)
    data = encoded(state, chunk_size=chunk_size, checksum=checksum)
    assert_are(load(data, **into_options(mode, destinations)), destinations)
    watched.assert_filled(state)


async def test_one_message_after_the_other_into_the_same_tensors() -> None:
    states = [{"a": torch.randn(30_000), "b": torch.randn(5)} for _ in range(4)]
    for mode in MODES:
        destinations = places_for(states[0])
        options = into_options(mode, destinations)
        async with both_ends("socket") as (near, far), anyio.create_task_group() as group:

            async def push(near: Any = near) -> None:
                for state in states:
                    await near.save(state)

            group.start_soon(push)
            reader = aiotorchio.StreamReader(far.source)
            for state in states:
                watched = Watched(destinations)
                assert_are(await reader.load(**options), destinations)
                watched.assert_filled(state)


async def test_a_message_that_was_opened() -> None:
    state, destinations = {"a": torch.ones(3)}, {"a": torch.zeros(3)}
    async with both_ends("socket") as (near, far):
        await near.save(state)
        async with aiotorchio.StreamReader(far.source).open() as message:
            with pytest.raises(MismatchError):
                await message.load(into={"a": torch.zeros(4)})
            assert_are(await message.load(into=destinations), destinations)
    assert_same_bits(destinations["a"], state["a"])


# ------------------------------------------------------------------------------ layouts

SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(2.5),
    "vector": lambda: torch.randn(7),
    "empty": lambda: torch.empty(3, 0, 2),
    "matrix": lambda: torch.randn(40, 60),
    "transposed": lambda: torch.randn(60, 40).t(),
    "columns": lambda: torch.randn(40, 90)[:, 7:50:3],
    "rows": lambda: torch.randn(90, 40)[5::2],
    "channels last": lambda: torch.randn(3, 5, 4, 6).to(memory_format=torch.channels_last),
    "ones": lambda: torch.randn(1, 5, 1, 3),
    "expanded": lambda: torch.randn(6, 1, 5).expand(6, 40, 5),
    "expanded scalar": lambda: torch.tensor(1.5).expand(30, 40),
    "windows": lambda: torch.arange(3000.0).as_strided((400, 7), (5, 1), 11),
    "interleaved": lambda: torch.arange(50.0).as_strided((3, 2), (2, 3)),
    "conj": lambda: torch.randn(30, 40, dtype=torch.complex64).mH,
    "neg": lambda: torch.randn(30, 40, dtype=torch.complex64).conj().imag,
    "large": lambda: torch.randn(130, 200),
    "large transposed": lambda: torch.randn(200, 130).t(),
}


@all_modes
@pytest.mark.parametrize("source", SOURCES)
def test_any_layout_into_any_layout(source: str, mode: str) -> None:
    tensor = SOURCES[source]()
    data = [encoded({"w": tensor}, chunk_size=size) for size in (4096, 2**20)]
    for layout, message in itertools.product(LAYOUTS.values(), data):
        destinations = {"w": layout(tensor)}
        watched = Watched(destinations)
        assert load(message, **into_options(mode, destinations))["w"] is destinations["w"]
        watched.assert_filled({"w": tensor})


@pytest.mark.parametrize("dtype", corpus.STRIDED_DTYPES)
def test_every_dtype(dtype: str) -> None:
    tensor = corpus.of_dtype(dtype)
    # Alone, and with a tensor of its storage that arrives in new memory.
    messages = [encoded({"w": tensor}), encoded({"w": tensor, "other": tensor[:3]})]
    for mode, layout, data in itertools.product(MODES, ("part", "every second"), messages):
        destinations = {"w": LAYOUTS[layout](tensor)}
        watched = Watched(destinations)
        load(data, **into_options(mode, destinations), strict=False)
        watched.assert_filled({"w": tensor})


def random_views(rng: random.Random) -> dict[str, torch.Tensor]:
    """Make tensors of a few shared storages, some of them tied."""
    state: dict[str, torch.Tensor] = {}
    for n in range(rng.randint(1, 4)):
        storage = torch.randn(rng.choice([1, 50, 3000])).untyped_storage()
        for m in range(rng.randint(1, 4)):
            dtype = rng.choice([torch.float32, torch.float32, torch.int32, torch.int16])
            room = storage.nbytes() // dtype.itemsize
            shape, stride, offset = [], [], rng.randrange(room)
            left = room - 1 - offset
            for _ in range(rng.randint(0, 3)):
                step = rng.choice([0, 1, 2, 7, left // 2 + 1])
                size = rng.randint(
                    0 if rng.random() < 0.1 else 1, 1 + min(left // max(step, 1), 40)
                )
                left -= max(size - 1, 0) * step
                shape.append(size)
                stride.append(step)
            state[f"{n}.{m}"] = over(storage, dtype, offset, shape, stride)
    for name in list(state):
        if rng.random() < 0.2:
            state[f"tied.{name}"] = state[name]
    return state


def random_places(rng: random.Random, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    destinations = {}
    for name, tensor in state.items():
        if rng.random() < 0.7:
            destinations[name] = rng.choice(list(LAYOUTS.values()))(tensor)
    for name in state:
        if rng.random() < 0.5 and name in destinations and f"tied.{name}" in destinations:
            destinations[f"tied.{name}"] = destinations[name]
    return destinations


@pytest.mark.parametrize("seed", range(60))
def test_any_views_into_any_places(seed: int) -> None:
    """Tensors that share a storage, with a target or without, arrive as in a plain load."""
    rng = random.Random(seed)
    state = random_views(rng)
    data = encoded(state, chunk_size=4096)
    expected = load(data)
    # With a low limit, small tensors are received in place, as large ones are.
    with mock.patch.object(incoming, "SMALL_STORAGE", rng.choice([1, 64, 2**16])):
        for mode in MODES:
            destinations = random_places(rng, state)
            watched = Watched(destinations)
            loaded = load(data, **into_options(mode, destinations), strict=False)
            watched.assert_filled({name: expected[name] for name in destinations})
            for name, tensor in expected.items():
                assert_same_bits(loaded[name], tensor)
            assert {name for name in loaded if loaded[name] is destinations.get(name)} == set(
                destinations
            )


# ------------------------------------------------------------------------------ what is shared


def test_one_storage_at_the_sender_into_several() -> None:
    base = torch.arange(30_000.0)
    state = {"all": base, "part": base[7:1000], "t": base.view(100, 300).t()}
    for mode in MODES:
        destinations = places_for(state)
        watched = Watched(destinations)
        load(encoded(state, chunk_size=4096), **into_options(mode, destinations))
        watched.assert_filled(state)


def test_several_storages_into_one() -> None:
    state = {"a": torch.randn(20_000), "b": torch.randn(40, 50), "c": torch.arange(7.0)}
    for mode in MODES:
        base = place((25_000,), torch.float32)
        destinations = {"a": base[:20_000], "b": base[20_000:22_000].view(40, 50), "c": base[-7:]}
        watched = Watched(destinations)
        load(encoded(state, chunk_size=4096), **into_options(mode, destinations))
        watched.assert_filled(state)
        assert len({each.untyped_storage().data_ptr() for each in destinations.values()}) == 1


@all_modes
def test_a_tensor_that_is_tied_at_both_ends(mode: str) -> None:
    tied, own = torch.randn(300), torch.zeros(300)
    loaded = load(encoded({"a": tied, "b": [tied]}), **into_options(mode, {"a": own, "b": [own]}))
    assert loaded["a"] is loaded["b"][0] is own
    assert_same_bits(own, tied)


@all_modes
def test_a_tensor_that_is_tied_at_the_sender(mode: str) -> None:
    tied = torch.randn(300)
    into: dict[str, Any] = {"a": torch.zeros(300), "b": [torch.zeros(300)]}
    into["c"] = torch.zeros(300).double()
    loaded = load(
        encoded({"a": tied, "b": [tied], "c": tied}), **into_options(mode, into), cast=True
    )
    assert_are(loaded, into)
    for each in (into["a"], into["b"][0]):
        assert_same_bits(each, tied)
    assert_same_bits(into["c"], tied.double())


@all_modes
def test_tensors_without_a_destination_arrive_in_memory_of_their_own(mode: str) -> None:
    base = torch.arange(100.0)
    state: dict[str, Any] = {"w": base[3:50], "x": base, "y": base[::2], "own": torch.ones(5)}
    state["n"] = [base]
    data = encoded(state)
    destinations = {"w": place((47,), torch.float32, step=2)}
    watched = Watched(destinations)
    loaded = load(data, **into_options(mode, destinations), strict=False)
    assert loaded.pop("w") is destinations["w"]
    watched.assert_filled({"w": state["w"]})
    plain = load(data)
    del plain["w"]
    corpus.assert_same(loaded, plain)


# ------------------------------------------------------------------------------ objects


@all_modes
def test_a_module(mode: str) -> None:
    sent, model = corpus.Tied(), corpus.Tied()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scratch: Any = model.scratch
    scratch.fill_(7)
    loaded = load(encoded(sent.state_dict()), **into_options(mode, model))
    assert type(loaded) is OrderedDict
    corpus.assert_same(model.state_dict(), sent.state_dict())
    assert dict(model.named_parameters(remove_duplicate=False)) == parameters
    assert loaded["decoder.weight"] is loaded["embedding.weight"] is model.embedding.weight
    assert loaded["mask"] is model.mask
    assert model.get_buffer("scratch") is scratch and scratch.eq(7).all()
    assert all(each.requires_grad for each in model.parameters())


@all_modes
def test_a_module_goes_on_training(mode: str) -> None:
    sent, model = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    loss = model(torch.ones(1, 3, requires_grad=True)).sum() ** 2
    load(encoded(sent.state_dict()), **into_options(mode, model))
    # Results of the old numbers have no gradient any more.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for module in (sent, model):
        (module(torch.ones(1, 3)).sum() ** 2).backward()
    assert_same_bits(model.weight.grad, sent.weight.grad)  # type: ignore[arg-type]
    optimizer.step()
    assert not torch.equal(model.weight, sent.weight)


@all_modes
def test_the_state_of_an_optimizer(mode: str) -> None:
    def trained(steps: int) -> torch.optim.Optimizer:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * steps)
        for _ in range(steps):
            model(torch.randn(2, 4)).square().sum().backward()
            optimizer.step()
        return optimizer

    sent, own = trained(3).state_dict(), trained(1).state_dict()
    loaded = load(encoded(sent), **into_options(mode, own))
    assert_are(loaded, own)
    corpus.assert_same(own["state"], sent["state"])
    assert loaded["state"][1]["exp_avg"] is own["state"][1]["exp_avg"]
    # Values other than tensors come from the message.
    assert loaded["param_groups"] == sent["param_groups"] != own["param_groups"]


@all_modes
def test_a_module_and_its_optimizer(mode: str) -> None:
    def training() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    (sent, its), (model, own) = training(), training()
    data = encoded({"model": sent.state_dict(), "optimizer": its.state_dict()})
    load(data, **into_options(mode, {"model": model, "optimizer": own.state_dict()}))
    corpus.assert_same(model.state_dict(), sent.state_dict())
    for one, two in zip(own.state.values(), its.state.values(), strict=True):
        assert_same_bits(one["momentum_buffer"], two["momentum_buffer"])


@all_modes
def test_an_object_that_is_a_tensor(mode: str) -> None:
    own = torch.zeros(3)
    assert load(encoded(torch.ones(3)), **into_options(mode, {"": own})) is own
    assert own.eq(1).all()


@all_modes
def test_lists_and_tuples(mode: str) -> None:
    sent = [torch.ones(2), (torch.ones(3), [torch.ones(4)]), 5]
    into = {"0": torch.zeros(2), "1": (torch.zeros(3), [torch.zeros(4)])}
    loaded = load(encoded(sent), **into_options(mode, into))
    assert_are(loaded, into)
    corpus.assert_same(loaded, sent)


PICKLED: dict[str, Callable[[], Any]] = {
    "shared": lambda: [shared := {"w": torch.randn(3)}, shared],
    "counter": lambda: {"w": torch.randn(3), "c": Counter("abc")},
    "other keys": lambda: {(1, 2): torch.randn(3), None: [torch.randn(2)]},
    "cyclic": lambda: corpus.make("cyclic_dict"),
    "subclass of dict": lambda: {"c": Counter({"w": torch.randn(3)}), "x": torch.randn(2)},
    "surrogates": lambda: {"\ud800": torch.randn(3), "o": torch.randn(2)},
    "tied": lambda: {"a": (tied := torch.randn(3)), "b": [tied], "c": frozenset()},
}


@all_modes
@pytest.mark.parametrize("name", PICKLED)
def test_objects_that_are_pickled(name: str, mode: str) -> None:
    sent = PICKLED[name]()
    destinations = {path: torch.zeros_like(tensor) for path, tensor in walk(sent)}
    assert aiotorchio.save(sent, "/dev/null").codec == "pickle"
    loaded = load(encoded(sent), **into_options(mode, destinations))
    for path, tensor in walk(sent):
        assert_same_bits(destinations[path], tensor)
    if name == "shared":
        # One dict can hold one of two targets only: that of its first path.
        assert loaded[0] is loaded[1]
        destinations["1.w"] = destinations["0.w"]
    assert_are(loaded, destinations)


@all_modes
def test_a_shared_dict_into_one_of_its_places(mode: str) -> None:
    sent = {"model": (state := {"w": torch.randn(3), "b": torch.randn(2)}), "ema": state}
    into = {"ema": {"w": torch.zeros(3)}}
    loaded = load(encoded(sent), strict=False, **into_options(mode, into))
    assert loaded["model"] is loaded["ema"]
    assert loaded["ema"]["w"] is into["ema"]["w"]
    corpus.assert_same(loaded, sent)


def test_a_shared_dict_keeps_what_is_selected_at_any_place() -> None:
    sent = {"model": (state := {"w": torch.randn(3), "b": torch.randn(2)}), "ema": state}
    loaded = load(encoded(sent), select=["ema.w"])
    assert loaded["model"] is loaded["ema"]
    corpus.assert_same(loaded["ema"], {"w": state["w"]})


@all_modes
def test_what_a_pickle_holds_besides_tensors(mode: str) -> None:
    tagged: Any = torch.randn(3).as_subclass(corpus.Tagged)
    tagged.tag = "x"
    point = corpus.Point(1.5, torch.randn(2))
    sent = {"w": torch.randn(4), "t": tagged, "p": point, "s": torch.eye(3).to_sparse()}
    into = {"w": torch.zeros(4)}
    loaded = load(
        encoded(sent),
        **into_options(mode, into),
        strict=False,
        safe_globals=[corpus.Tagged, corpus.Point],
    )
    assert loaded["w"] is into["w"]
    assert_same_bits(into["w"], sent["w"])
    del loaded["w"], sent["w"]
    corpus.assert_same(loaded, sent)


def with_attributes(tensor: torch.Tensor, **attributes: Any) -> torch.Tensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


class NamedParameter(torch.nn.Parameter):
    """A class of parameters for sharded layers, as some libraries have."""


def state_of_tensors_with_attributes() -> dict[str, Any]:
    whole = torch.randn(4, 3)
    tied = with_attributes(torch.randn(2), tied=True)
    return {
        "plain": with_attributes(torch.randn(3), was_cloned=True),
        "leaf": with_attributes(torch.randn(3, requires_grad=True), related=whole),
        "tagged": with_attributes(torch.randn(2).as_subclass(corpus.Tagged), tag="x"),
        "parameter": with_attributes(torch.nn.Parameter(torch.randn(2)), sharded=2),
        "named": NamedParameter(torch.randn(2)),
        "buffer": torch.nn.Buffer(torch.randn(5)),
        "view": with_attributes(whole.t(), is_view=True),
        "whole": whole,
        "conjugate": with_attributes(torch.randn(2, dtype=torch.complex64).conj(), x=1),
        "uint16": with_attributes(torch.arange(3).to(torch.uint16), x=1),
        "tied": [tied, {"too": tied}],
    }


@pytest.mark.parametrize("weights_only", [True, False])
def test_tensors_with_attributes_come_back_as_they_were(weights_only: bool) -> None:
    sent = state_of_tensors_with_attributes()
    loaded = load(encoded(sent), weights_only=weights_only, safe_globals=[corpus.Tagged])
    # torch.load gives a plain parameter, too
    sent["named"] = torch.nn.Parameter(sent["named"].data)
    corpus.assert_same(loaded, sent)
    assert all(tensor.is_leaf for _, tensor in walk(loaded))
    assert loaded["leaf"].related is loaded["whole"]
    assert loaded["view"].data_ptr() == loaded["whole"].data_ptr()
    with pytest.raises(UnsafeObjectError, match="Tagged"):
        load(encoded(sent))


def test_tensors_with_attributes_of_earlier_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles of earlier senders make such tensors over a storage."""
    monkeypatch.setattr(pickle_codec, "_over_row", lambda tensor, reduced, table: reduced)
    sent = state_of_tensors_with_attributes()
    loaded = load(encoded(sent), safe_globals=[corpus.Tagged])
    sent["named"] = torch.nn.Parameter(sent["named"].data)
    corpus.assert_same(loaded, sent)


@all_modes
def test_into_tensors_for_some_with_attributes(mode: str) -> None:
    sent = state_of_tensors_with_attributes()
    into: dict[str, torch.Tensor] = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in walk(sent)
    }
    # Targets of any class, even one that refuses operations.
    into["plain"] = NamedParameter(torch.zeros(3))
    into["tagged"] = with_attributes(torch.zeros(2).as_subclass(corpus.Tagged), mine=1)
    loaded = load(encoded(sent), **into_options(mode, into), safe_globals=[corpus.Tagged])
    assert_are({**loaded, "tied": None}, {k: v for k, v in into.items() if "tied" not in k})
    # A tensor in two places stays one tensor.
    assert loaded["tied"][0] is into["tied.0"] and loaded["tied"][1]["too"] is into["tied.1.too"]
    for name, tensor in walk(sent):
        assert_same_bits(into[name].detach(), tensor.detach().resolve_conj())
    # The caller's tensors keep their own attributes.
    assert vars(into["tagged"]) == {"mine": 1} and not vars(into["plain"])


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def state_of_other_mappings() -> dict[str, Any]:
    return {
        "user": UserDict({"w": torch.randn(3), "n": 1}),
        "chain": ChainMap[str, Any]({"a": torch.randn(2)}, {"b": [torch.randn(2)]}),
        "parameters": torch.nn.ParameterDict({"p": torch.randn(2)}),
        "layer": Layer(torch.randn(2), torch.randn(1)),
    }


@all_modes
def test_mappings_that_are_not_dicts(mode: str) -> None:
    sent = state_of_other_mappings()
    into = {
        "user": MappingProxyType({"w": torch.zeros(3)}),
        "chain": ChainMap[str, Any]({"b": [torch.zeros(2)]}, {"a": torch.zeros(2)}),
        "parameters": torch.nn.ParameterDict({"p": torch.zeros(2)}),
        "layer": Layer(torch.zeros(2), torch.zeros(1)),
    }
    loaded = load(encoded(sent), **into_options(mode, into), weights_only=False)
    assert {path: id(tensor) for path, tensor in walk(loaded)} == {
        path: id(tensor) for path, tensor in walk(into)
    }
    assert type(loaded["user"]) is UserDict and loaded["user"]["n"] == 1
    assert type(loaded["layer"]) is Layer
    received = dict(walk(into))
    for path, tensor in walk(sent):
        assert_same_bits(received[path].detach(), tensor.detach())


def test_mappings_that_are_not_dicts_are_built_only_if_they_are_trusted() -> None:
    sent = {"user": UserDict({"w": torch.randn(3), "b": torch.randn(2)})}
    with pytest.raises(UnsafeObjectError, match="UserDict"):
        load(encoded(sent))
    loaded = load(encoded(sent), safe_globals=[UserDict], select="*.b")
    corpus.assert_same(loaded["user"].data, {"b": sent["user"]["b"]})


def test_select_of_tensors_with_attributes() -> None:
    sent = state_of_tensors_with_attributes()
    loaded = load(
        encoded(sent), select=["plain", "parameter", "tied.*"], safe_globals=[corpus.Tagged]
    )
    assert loaded["plain"].was_cloned and loaded["parameter"].sharded == 2
    assert loaded.keys() == {"plain", "parameter", "tied"}
    assert loaded["tied"][0].tied


def test_a_tensor_on_meta_with_attributes() -> None:
    sent = {"m": with_attributes(torch.empty(2, device="meta"), x=3)}
    loaded = load(encoded(sent))
    assert loaded["m"].device.type == "meta" and loaded["m"].x == 3
    with pytest.raises(MismatchError, match="m: the sender had it on meta"):
        load(encoded(sent), into={"m": torch.zeros(2)})


def test_a_class_that_pickles_its_tensors_by_itself_has_its_way() -> None:
    sent = {"own": torch.ones(2).as_subclass(WithItsOwnReduce)}
    assert torch.equal(load(encoded(sent), weights_only=False)["own"], torch.full((2,), 7.0))


class WithItsOwnReduce(torch.Tensor):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.full, ((2,), 7.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_storage_that_the_object_holds_itself(mode: str) -> None:
    tensor = torch.arange(5.0)
    data = encoded({"w": tensor, "s": tensor.untyped_storage(), "x": torch.ones(2)})
    with pytest.raises(MismatchError, match="has storage 0 itself"):
        load(data, **into_options(mode, {"w": torch.zeros(5)}), strict=False)
    into = {"x": torch.zeros(2)}
    loaded = load(data, **into_options(mode, into), strict=False)
    assert loaded["w"].untyped_storage().data_ptr() == loaded["s"].data_ptr()
    assert into["x"].eq(1).all()


@all_modes
def test_a_destination_is_wherever_the_object_has_its_tensor(mode: str) -> None:
    tensor = torch.randn(3)
    tagged: Any = torch.randn(2).as_subclass(corpus.Tagged)
    tagged.related = tensor
    sent = {"w": tensor, "p": corpus.Point(1.5, tensor), "f": frozenset({(1, tensor)}), "t": tagged}
    into = {"w": torch.zeros(3)}
    loaded = load(
        encoded(sent),
        **into_options(mode, into),
        strict=False,
        safe_globals=[corpus.Tagged, corpus.Point],
    )
    ((_, member),) = loaded["f"]
    for each in (loaded["w"], loaded["p"].weight, member, loaded["t"].related):
        assert each is into["w"]
    assert_same_bits(into["w"], tensor)


def test_the_tensors_of_a_pickle_are_checked_as_they_will_be() -> None:
    """They are checked after the exchange; before it, their numbers are offsets into memory."""
    coo = craft.rebuild(
        "_rebuild_sparse_tensor",
        craft.call("torch.serialization", "_get_layout", "torch.sparse_coo"),
        (craft.tensor(0), craft.tensor(1), (2,), False),
    )

    def change(header: Any) -> None:
        header.tensors[0].names[:], header.tensors[1].names[:] = ["i"], ["v"]

    data = craft.message(
        craft.pickled({"i": craft.tensor(0), "s": coo}),
        "pickle",
        [torch.tensor([[0, 2]]), torch.ones(2)],
        change,
    )
    for mode in MODES:
        into = {"i": torch.zeros(1, 2, dtype=torch.int64), "v": torch.zeros(2)}
        try:
            loaded = load(data, **into_options(mode, into), strict=False)
        except (aiotorchio.InvalidObjectError, aiotorchio.ProtocolError):
            continue
        assert int(loaded["s"]._indices().max()) < 2


# ------------------------------------------------------------------------------ casting

COMMON = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64", "complex128"]
COMMON += ["int64", "int16", "uint8", "uint32", "bool"]


@pytest.mark.parametrize("source", COMMON)
def test_casts(source: str) -> None:
    tensor = torch.arange(60).remainder(2 if source == "bool" else 7).view(6, 10)
    tensor = tensor.to(getattr(torch, source))
    data = [encoded({"w": tensor.t() if n else tensor}) for n in range(2)]
    for destination, mode, n in itertools.product(COMMON, MODES, range(2)):
        values = tensor.t() if n else tensor
        into = {"w": place(values.shape, getattr(torch, destination), step=2, offset=1)}
        watched = Watched(into)
        if not torch.can_cast(tensor.dtype, into["w"].dtype):
            with pytest.raises(MismatchError, match="in the target"):
                load(data[n], **into_options(mode, into), cast=True)
            watched.assert_untouched()
        else:
            load(data[n], **into_options(mode, into), cast=True)
            watched.assert_filled({"w": values})


@all_modes
def test_casts_of_large_tensors_in_many_chunks(mode: str) -> None:
    state = {"a": torch.randn(300, 200), "b": torch.randn(200, 300).t(), "c": torch.randn(3)}
    into = {name: place(each.shape, torch.float64, gap=1) for name, each in state.items()}
    watched = Watched(into)
    load(encoded(state, chunk_size=4096), **into_options(mode, into), cast=True)
    watched.assert_filled(state)


@all_modes
def test_casts_that_torch_cannot_make_come_before_the_first_byte(mode: str) -> None:
    data = encoded({"a": torch.ones(3, dtype=torch.int32), "b": torch.ones(3, dtype=torch.int32)})
    into = {"a": place((3,), torch.int32), "b": corpus.of_dtype("uint3", 3)}
    watched = Watched(into)
    with pytest.raises(MismatchError):
        load(data, **into_options(mode, into), cast=True)
    watched.assert_untouched()


# ------------------------------------------------------------------------------ other byte order


# The object in one of them contains a storage of its tensors.
VECTORS = sorted(
    {path.stem for path in FOLDER.glob("*.bin")} - {"pickle", "aborted", "aborted_early"}
)


@all_modes
@pytest.mark.parametrize("name", VECTORS)
def test_every_vector(name: str, mode: str) -> None:
    data = (FOLDER / f"{name}.bin").read_bytes()
    expected = dict(walk(load(data, map_location="cpu")))
    into = {
        name: LAYOUTS["gaps"](tensor) for name, tensor in expected.items() if not tensor.is_meta
    }
    watched = Watched(into)
    load(data, **into_options(mode, into), strict=False, map_location="cpu")
    watched.assert_filled({name: expected[name] for name in into})


@all_modes
@pytest.mark.parametrize("dtype", ["float32", "complex128", "int16", "bool", "float8_e5m2", "int4"])
def test_the_other_byte_order(dtype: str, mode: str) -> None:
    tensor = corpus.of_dtype(dtype, 3000).view(30, 100).t()
    parts = craft.flattened({"w": tensor, "v": tensor[:3]})
    parts.header.byteorder = "big" if sys.byteorder == "little" else "little"
    data = craft.compose(parts)
    expected = load(data)
    into = {"w": LAYOUTS["part"](tensor)}
    watched = Watched(into)
    loaded = load(data, **into_options(mode, into), strict=False)
    watched.assert_filled({"w": expected["w"]})
    assert_same_bits(loaded["v"], expected["v"])


# ------------------------------------------------------------------------------ selecting


def selectable() -> dict[str, Any]:
    tied = torch.ones(6)
    return {
        "encoder": OrderedDict({"w": torch.ones(2), "b": torch.ones(3)}),
        "head": {"w": torch.ones(4)},
        "list": [torch.ones(5), (tied, 7), {"x": tied}],
        "n": 1,
    }


def shapes(obj: Any) -> dict[str, tuple[str, int]]:
    return {path: (tensor.device.type, tensor.numel()) for path, tensor in walk(obj)}


SELECTIONS: list[tuple[Any, dict[str, tuple[str, int]]]] = [
    ("encoder.*", {"encoder.w": ("cpu", 2), "encoder.b": ("cpu", 3)}),
    (["head.w", "list.0"], {"head.w": ("cpu", 4), "list.0": ("cpu", 5)}),
    (lambda name: name.endswith("w"), {"encoder.w": ("cpu", 2), "head.w": ("cpu", 4)}),
    ("list.2.x", {"list.2.x": ("cpu", 6), "list.1.0": ("cpu", 6)}),
    ([], {}),
]


@pytest.mark.parametrize(("select", "expected"), SELECTIONS)
async def test_what_is_not_selected_is_left_out_of_dicts(
    select: Any, expected: dict[str, tuple[str, int]]
) -> None:
    # Lists and tuples keep items that are not selected, without memory.
    everywhere = {"list.0": ("meta", 5), "list.1.0": ("meta", 6)}
    loaded = await load_pieces(aiotorchio.iter_bytes(selectable()), select=select)
    assert shapes(loaded) == everywhere | expected
    assert loaded["n"] == 1 and loaded["list"][1][1] == 7
    assert type(loaded["encoder"]) is OrderedDict and type(loaded["list"][1]) is tuple
    for _, tensor in walk(loaded):
        assert tensor.device.type == "meta" or tensor.eq(1).all()


def test_a_generator_of_names_selects_once_and_for_all() -> None:
    names = (name for name in ["head.w"])
    assert shapes(load(encoded(selectable()), select=names))["head.w"] == ("cpu", 4)


def test_selecting_what_is_pickled() -> None:
    shared = {"w": torch.ones(2), "v": torch.ones(3)}
    sent = {"a": shared, "b": shared, "c": torch.ones(4), "s": torch.eye(3).to_sparse()}
    loaded = load(encoded(sent), select="a.w")
    assert loaded["a"] is loaded["b"]
    assert loaded["a"].keys() == {"w"} and loaded["a"]["w"].eq(1).all()
    assert loaded.keys() == {"a", "b"}
    loaded = load(encoded(sent), select=["c", "s"])
    assert loaded["a"] == {} and loaded["c"].eq(1).all()
    corpus.assert_same(loaded["s"], sent["s"])


def test_selecting_by_keys_that_utf_8_cannot_carry() -> None:
    loaded = load(encoded({"\ud800": torch.ones(1), "o": torch.ones(2)}), select="o")
    assert shapes(loaded) == {"o": ("cpu", 2)}


def test_selecting_some_of_one_storage() -> None:
    base = torch.arange(10.0)
    loaded = load(encoded({"a": base[2:5], "b": base, "c": torch.ones(1)}), select="a")
    corpus.assert_same(loaded, load(encoded({"a": base[2:5]})))


def test_selecting_a_storage_that_the_object_holds_itself() -> None:
    tensor = torch.arange(5.0)
    data = encoded({"w": tensor, "s": tensor.untyped_storage(), "x": torch.ones(2)})
    with pytest.raises(MismatchError, match="has storage 0 itself"):
        load(data, select="x")
    loaded = load(data, select="w")
    assert loaded["w"].untyped_storage().data_ptr() == loaded["s"].data_ptr()


@all_modes
def test_selecting_and_receiving_into(mode: str) -> None:
    sent = selectable()
    into = {"encoder.w": place((2,), torch.float32), "head.w": place((4,), torch.float32)}
    into |= {"encoder.b": place((99,), torch.int8), "old": place((1,), torch.int8)}
    watched = Watched(into)
    loaded = load(
        encoded(sent), **into_options(mode, into), select=["encoder.w", "list.1.0"], strict=False
    )
    watched.assert_filled({"encoder.w": sent["encoder"]["w"]})
    assert loaded["encoder"]["w"] is into["encoder.w"]
    assert shapes(loaded) == {
        "encoder.w": ("cpu", 2),
        "list.0": ("meta", 5),
        "list.1.0": ("cpu", 6),
    }


@all_modes
def test_only_what_is_selected_must_be_on_both_sides(mode: str) -> None:
    data = encoded(selectable())
    into = {"encoder.w": torch.zeros(2), "encoder.old": torch.zeros(2), "head.w": torch.zeros(9)}
    with pytest.raises(MismatchError) as caught:
        load(data, **into_options(mode, into), select="encoder.*")
    assert caught.value.missing == ("encoder.old",)
    assert caught.value.unexpected == ("encoder.b",)
    assert not caught.value.misfits
    assert load(data, **into_options(mode, into), select="encoder.w")
    assert into["encoder.w"].eq(1).all()
    with pytest.raises(MismatchError) as caught:
        load(data, **into_options(mode, into), select="head.w")
    assert list(caught.value.misfits) == ["head.w"]


def test_a_selection_that_nothing_matches() -> None:
    with pytest.raises(MismatchError, match=r"not in the message: 'decoder\.\*'") as caught:
        load(encoded(selectable()), select=["encoder.*", "decoder.*"])
    assert caught.value.offset is not None


def test_a_selection_in_a_pickle_that_is_not_searched() -> None:
    data = encoded({"coo": torch.eye(2).to_sparse(), "w": torch.ones(2)})
    assert list(load(data, select="coo")) == ["coo"]
    with pytest.raises(MismatchError) as caught:
        load(data, select="coo", weights_only=False)
    assert caught.value.message == (
        "selected, but not in the message (the names of composite tensors are unknown: with "
        "weights_only=False, the pickle is not searched): 'coo'"
    )
    assert load(data, select="w", weights_only=False)["w"].eq(1).all()
    # The tree codec has no composite tensors.
    with pytest.raises(MismatchError, match="not in the message: 'coo'"):
        load(encoded({"w": torch.ones(2)}), select="coo", weights_only=False)


def test_a_callable_map_location_sees_only_what_is_made() -> None:
    seen: list[int] = []

    def note(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        seen.append(storage.nbytes())
        return storage

    state = {"into": torch.ones(3), "selected": torch.ones(5), "other": torch.ones(7)}
    load(
        encoded(state),
        into={"into": torch.zeros(3)},
        strict=False,
        select=["into", "selected"],
        map_location=note,
    )
    assert seen == [20]


# ------------------------------------------------------------------------------ devices

TENSORS = [torch.arange(3.0), torch.ones(2, 2)]


def sent_from(location: str) -> bytes:
    def change(header: Any) -> None:
        header.locations = [location]

    return craft.message(craft.flattened(TENSORS).skeleton, "tree", TENSORS, change)


@all_modes
def test_a_device_of_the_sender_that_is_not_here_does_not_matter(mode: str) -> None:
    into = {"0": place((3,), torch.float32), "1": place((2, 2), torch.float32)}
    watched = Watched(into)
    data = sent_from("cuda:99")
    assert_are(load(data, **into_options(mode, into)), into)
    watched.assert_filled({"0": TENSORS[0], "1": TENSORS[1]})
    loaded = load(data, **into_options(mode, {"0": into["0"]}), select="0")
    assert loaded[0] is into["0"] and loaded[1].is_meta


@all_modes
def test_a_device_that_is_not_here_matters_before_the_first_byte(mode: str) -> None:
    into = {"0": place((3,), torch.float32)}
    watched, data = Watched(into), sent_from("cuda:99")
    with pytest.raises(aiotorchio.InvalidObjectError, match="cuda:99"):
        load(data, **into_options(mode, into), strict=False)
    watched.assert_untouched()
    loaded = load(data, **into_options(mode, into), strict=False, map_location="cpu")
    watched.assert_filled({"0": TENSORS[0]})
    assert_same_bits(loaded[1], TENSORS[1])


@all_modes
def test_destinations_stay_where_they_are(mode: str) -> None:
    into = {"0": torch.zeros(3)}
    loaded = load(encoded(TENSORS), **into_options(mode, into), strict=False, map_location="meta")
    assert loaded[0] is into["0"] and not into["0"].is_meta and loaded[1].is_meta
    assert_same_bits(into["0"], TENSORS[0])


# ------------------------------------------------------------------------------ memory


class SpyOnTorch:
    """A proxy of torch that notes every storage that is made."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def UntypedStorage(self, nbytes: int, *, device: Any = None) -> torch.UntypedStorage:
        if str(device) != "meta":
            self.made.append(nbytes)
        return torch.UntypedStorage(nbytes, device=device)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    spy = SpyOnTorch()
    monkeypatch.setattr(incoming, "torch", spy)
    return spy.made


LARGE = {"large": torch.ones(2**18), "small": torch.ones(10), "other": torch.ones(2**17)}


def test_memory_is_made_for_each_storage(made: list[int]) -> None:
    load(encoded(LARGE))
    assert made == [2**20, 40, 2**19]


def test_no_memory_is_made_for_what_is_not_selected(made: list[int]) -> None:
    load(encoded(LARGE), select="small")
    assert made == [40]
    load(encoded([*LARGE.values(), LARGE["large"][5:]]), select="2")
    assert made == [40, 2**19]


@all_modes
def test_no_memory_is_made_for_what_has_a_destination(made: list[int], mode: str) -> None:
    into = {name: place(each.shape, torch.float64, step=2) for name, each in LARGE.items()}
    load(encoded(LARGE), **into_options(mode, into), cast=True)
    assert made == []
    load(encoded(LARGE), **into_options(mode, {"large": into["large"]}), cast=True, strict=False)
    assert made == [40, 2**19]


# ------------------------------------------------------------------------------ what does not fit


@in_one_loop
async def test_nothing_is_written_if_anything_does_not_fit(kind: str) -> None:
    state = state_of_all_sizes()
    for mode in MODES:
        destinations = places_for(state) | {"empty": torch.zeros(7), "old": torch.zeros(1)}
        watched = Watched(destinations)
        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(near.save, state["small"])
            group.start_soon(far.load)
        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(near.save, {**state, "new": torch.ones(3)})
            with pytest.raises(MismatchError) as caught:
                await far.load(**into_options(mode, destinations))
            with pytest.raises(StreamPoisoned, match="MismatchError"):
                await far.load()
            group.cancel_scope.cancel()
        assert caught.value.missing == ("old",)
        assert caught.value.unexpected == ("new",)
        assert list(caught.value.misfits) == ["empty"]
        assert caught.value.offset is not None
        watched.assert_untouched()


@all_modes
def test_misfits_of_every_kind_leave_everything_as_it_was(mode: str) -> None:
    state = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    data = encoded(state)
    good = place((3,), torch.float32)
    for bad in (
        {"a": good},
        {"a": good, "b": place((4,), torch.float32)},
        {"a": good, "b": place((2, 2), torch.int32)},
        {"a": good, "b": place((1, 2), torch.float32).expand(2, 2)},
        {"a": good, "b": place((2, 2), torch.float32), "c": place((1,), torch.float32)},
        {"a": good, "b": torch.zeros(2, 2, device="meta")},
    ):
        watched = Watched({name: each for name, each in bad.items() if not each.is_meta})
        with pytest.raises(MismatchError):
            load(data, **into_options(mode, bad))
        watched.assert_untouched()


# ------------------------------------------------------------------------------ broken on the way

CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "other memory": lambda t: setattr(t, "data", torch.zeros_like(t)),
    "another shape": lambda t: setattr(t, "data", torch.zeros(2, *t.shape)),
    "another dtype": lambda t: setattr(t, "data", torch.zeros_like(t).view(torch.int32)),
    "larger": lambda t: t.resize_(2, *t.shape),
    "other storage": lambda t: t.set_(
        torch.zeros(99_999).untyped_storage(), 0, t.shape, t.stride()
    ),
    "transposed": lambda t: t.t_(),
}


@all_modes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_destination_that_changes_its_place_between_chunks(
    change: Callable[[torch.Tensor], object], mode: str
) -> None:
    state = {"w": torch.ones(90, 80), "x": torch.ones(3), "v": torch.ones(2, 10_000)}
    data = encoded(state, chunk_size=2**14)
    # The small one goes through a staging buffer, the large one arrives in place.
    for name, n in itertools.product(["w", "v"], range(7)):
        into = {key: torch.zeros_like(each) for key, each in state.items()}
        others = Watched({key: each for key, each in into.items() if key != name})
        meddle = Meddling(n, functools.partial(change, into[name]))
        with pytest.raises(MismatchError, match="changed its shape or its memory"):
            load(data, **into_options(mode, into), progress=meddle)
        if mode != "plain":
            others.assert_untouched()


@all_modes
async def test_a_destination_that_changes_its_place_while_bytes_are_on_the_way(mode: str) -> None:
    """A thread finds the error in the last chunk while the next one arrives."""
    state = {"x": torch.ones(3), "w": torch.ones(90, 80)}
    data = encoded(state, chunk_size=2**12)
    for n in range(6):
        into = {key: torch.zeros_like(each) for key, each in state.items()}
        others = Watched({"x": into["x"]})
        meddle = Meddling(n, into["w"].t_)
        stream = Pieces(data, 1000)
        with pytest.raises(MismatchError, match="changed its shape or its memory"):
            await aiotorchio.load_from_stream(stream, **into_options(mode, into), progress=meddle)
        if mode != "plain":
            others.assert_untouched()
        elif n < 5:
            with pytest.raises(StreamPoisoned, match="MismatchError"):
                await aiotorchio.load_from_stream(stream)


class Breaking(Pieces):
    """A connection that breaks at the end of its data."""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        try:
            return await super().receive(max_bytes)
        except anyio.EndOfStream:
            raise anyio.BrokenResourceError from None


async def test_a_broken_stream_matters_more_than_a_thread_that_fails() -> None:
    data = encoded({"w": torch.ones(90, 80)}, chunk_size=2**12)
    into = {"w": torch.zeros(90, 80)}
    meddle = Meddling(1, into["w"].t_)
    with pytest.raises(aiotorchio.TruncatedError, match="the connection broke"):
        await aiotorchio.load_from_stream(Breaking(data[:9000], 99), into=into, progress=meddle)


class Meddling:
    """A stream that runs a function once, after so many chunks."""

    def __init__(self, after: int, task: Callable[[], object]) -> None:
        self._after, self._task = after, task

    def __call__(self, done: int, total: int) -> None:
        if self._after == 0:
            self._task()
        self._after -= 1


@all_modes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_destination_that_changes_while_its_bytes_wait_elsewhere(
    change: Callable[[torch.Tensor], object], mode: str
) -> None:
    """Its storage is also that of a tensor without a target."""
    tensor = torch.ones(20, 30)
    data = encoded({"w": tensor, "other": tensor[3:], "x": torch.ones(3)})
    into = {"w": torch.zeros(20, 30), "x": torch.zeros(3)}
    others = Watched({"x": into["x"]})
    meddle = Meddling(0, functools.partial(change, into["w"]))
    with pytest.raises(MismatchError, match="changed its shape or its memory"):
        load(data, **into_options(mode, into), strict=False, progress=meddle)
    if mode != "plain":
        others.assert_untouched()


class MeddledFile(io.BytesIO):
    """A file that runs a function once, before one of its reads."""

    def __init__(self, data: bytes, after: int, task: Callable[[], object]) -> None:
        super().__init__(data)
        self._meddle = Meddling(after, task)
        self.reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self._count()
        return super().read(size)

    def readinto(self, buffer: Any) -> int:
        self._count()
        return super().readinto(buffer)

    def readinto1(self, buffer: Any) -> int:
        self._count()
        return super().readinto1(buffer)

    def _count(self) -> None:
        self.reads += 1
        self._meddle(0, 0)


@all_modes
@pytest.mark.parametrize("shape", [(5, 500), (5, 40_000)], ids=["small", "large"])
def test_a_destination_that_changes_its_shape_at_any_time(
    shape: tuple[int, ...], mode: str
) -> None:
    """A target is compared with the header, and checked again when its bytes arrive."""
    state = {"w": torch.ones(shape), "x": torch.ones(3)}
    data = encoded(state, chunk_size=2**18)
    for after in itertools.count():
        into = {name: torch.zeros_like(each) for name, each in state.items()}
        larger = torch.zeros(2, *shape)
        file = MeddledFile(data, after, lambda w=into["w"], to=larger: setattr(w, "data", to))  # type: ignore[misc]
        watched = Watched({"x": into["x"]})
        if file_is_done(file, into_options(mode, into)):
            break
        if mode != "plain":
            watched.assert_untouched()
        assert not larger.any()
    assert after > 5


def file_is_done(file: MeddledFile, options: dict[str, Any]) -> bool:
    try:
        aiotorchio.load(file, **options)
    except MismatchError:
        return False
    return True


# ------------------------------------------------------------------------------ wrong options

W = {"w": torch.zeros(2)}
OPTIMIZER = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"staged": True}, ValueError, "no effect without into"),
    ({"cast": True}, ValueError, "no effect without into"),
    ({"lock": anyio.Lock}, ValueError, "no effect without into"),
    ({"into": W, "lock": contextlib.nullcontext()}, ValueError, "without staged"),
    ({"into": 5}, TypeError, "into must be a mapping"),
    ({"into": [torch.zeros(2)]}, TypeError, "into must be a mapping"),
    ({"into": nn.Linear}, TypeError, "into must be a mapping"),
    ({"into": {"a": [OPTIMIZER]}}, TypeError, r"an optimizer at 'a\.0'.*state_dict\(\)"),
    ({"into": {"a": {"b": W["w"]}, "a.b": torch.zeros(1)}}, ValueError, "two tensors named 'a.b'"),
    ({"into": W, "strict": None}, TypeError, "strict"),
    ({"into": W, "cast": "yes"}, TypeError, "cast"),
    ({"into": W, "staged": 1}, TypeError, "staged"),
    ({"into": W, "staged": True, "lock": 5}, TypeError, "lock"),
    ({"into": W, "staged": True, "lock": object()}, TypeError, "lock"),
    ({"select": 5}, TypeError, "select"),
    ({"select": [5]}, TypeError, "select"),
    ({"select": b"w"}, TypeError, "select"),
]


@pytest.mark.parametrize(("options", "error", "match"), WRONG, ids=range(len(WRONG)))
async def test_wrong_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    """Wrong options are refused before anything is read."""
    async with both_ends("socket") as (near, far):
        await near.save({"w": torch.ones(2)})
        with pytest.raises(error, match=match):
            await far.load(**options)
        with pytest.raises(error, match=match):
            aiotorchio.load(io.BytesIO(), **options)
        assert (await far.load())["w"].eq(1).all()


async def test_a_lock_of_the_other_world_is_refused_before_anything_is_read() -> None:
    async with both_ends("socket") as (near, far):
        await near.save({"w": torch.ones(2)})
        with pytest.raises(TypeError, match="lock"):
            await far.load(into=W, staged=True, lock=threading.Lock())
        with pytest.raises(TypeError, match="lock"):
            aiotorchio.load(io.BytesIO(), into=W, staged=True, lock=anyio.Lock())
        assert (await far.load())["w"].eq(1).all()


def test_what_is_no_double_buffer() -> None:
    for wrong in (5, [torch.zeros(2)], nn.Linear):
        with pytest.raises(TypeError, match="into must be a mapping"):
            aiotorchio.DoubleBuffer(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"two tensors named 'a\.b'"):
        aiotorchio.DoubleBuffer({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)})
