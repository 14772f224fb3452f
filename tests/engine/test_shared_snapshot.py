"""A state that is copied once and sent to many receivers."""

from __future__ import annotations

import gc
import io
import weakref
from contextlib import aclosing
from typing import Any

import anyio
import pytest
import torch
from torch import nn

import aiotorchio
from tests.engine.test_snapshot import STATES, ruin
from tests.support import corpus
from tests.support.corpus import assert_same
from tests.support.tensor_layouts import encoded, load

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", STATES)
def test_it_is_the_state_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    state = STATES[name]()
    torch.manual_seed(0)
    expected = STATES[name]()
    taken = aiotorchio.snapshot(state)
    ruin(state)
    for _ in range(2):
        assert_same(load(encoded(taken)), expected)


@pytest.mark.parametrize("name", corpus.CASES)
def test_it_is_sent_as_the_state_itself(name: str) -> None:
    obj = corpus.CASES[name]()
    sent = encoded(aiotorchio.snapshot(obj))
    assert_same(load(sent, **corpus.LOAD_OPTIONS.get(name, {})), obj)


async def test_many_receivers_at_once() -> None:
    state = {"w": torch.rand(300_000), "b": torch.rand(3)}
    taken = aiotorchio.snapshot(state)
    assert taken.nbytes == 300_003 * 4 and "2 tensors" in repr(taken)
    received: list[Any] = []
    ids: set[str] = set()

    async def receive(number: int) -> None:
        body = aiotorchio.iter_bytes(taken, metadata={"n": str(number)}, chunk_size=2**16)
        async with aclosing(body), aiotorchio.StreamReader(body).open() as message:
            assert message.metadata == {"n": str(number)}
            assert message.producer.startswith("aiotorchio/")
            ids.add(message.message_id)
            received.append(await message.load())

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(receive, number)
    assert len(received) == len(ids) == 5
    for each in received:
        assert_same(each, state)


def test_ties_and_views_stay() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    state = {"a": weight, "b": weight, "t": weight.detach().t(), "row": weight.detach()[1]}
    for options in ({}, {"dtype": torch.float64}, {"device": "cpu"}):
        loaded = load(encoded(aiotorchio.snapshot(state, **options)))
        assert loaded["a"] is loaded["b"] and isinstance(loaded["a"], nn.Parameter)
        pointers = {each.untyped_storage().data_ptr() for each in loaded.values()}
        assert len(pointers) == 1
        for name, tensor in state.items():
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype))
            assert loaded[name].stride() == tensor.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_a_dtype_for_floating_point_numbers(dtype: torch.dtype) -> None:
    memory = torch.randn(8)
    state: dict[str, Any] = {
        "w": torch.randn(3, 5).t(),
        "half": torch.randn(7).bfloat16()[2:],
        "n": torch.arange(3),
        "z": torch.randn(2, dtype=torch.complex64),
        "empty": torch.empty(0, 2),
        "meta": torch.empty(3, device="meta"),
        "two": [memory, memory.view(torch.int32)],
    }
    loaded = load(encoded(aiotorchio.snapshot(state, dtype=dtype)))
    for name in ("w", "half", "empty"):
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], state[name].to(dtype))
        assert loaded[name].stride() == state[name].stride()
    assert loaded["n"].dtype == torch.int64 and loaded["z"].dtype == torch.complex64
    assert loaded["meta"].dtype == torch.float32 and loaded["meta"].is_meta
    assert [each.dtype for each in loaded["two"]] == [torch.float32, torch.int32]


def test_a_dtype_leaves_what_has_no_name() -> None:
    sparse = torch.eye(3).to_sparse()
    shared = [torch.ones(2)]
    state = {"sparse": sparse, "a": shared, "b": shared}
    loaded = load(encoded(aiotorchio.snapshot(state, dtype=torch.float16)))
    assert loaded["sparse"].dtype == torch.float32 and loaded["a"] is loaded["b"]
    assert loaded["a"][0].dtype == torch.float16


def test_a_device() -> None:
    state = {"w": torch.ones(2), "m": torch.ones(3, device="meta")}
    taken = aiotorchio.snapshot(state, device=torch.device("cpu"))
    file = io.BytesIO(encoded(taken))
    assert_same(aiotorchio.load(file), state)


def test_the_copies_are_free_when_the_snapshot_is() -> None:
    taken = aiotorchio.snapshot({"w": torch.rand(1000)})
    storage = weakref.ref(taken._flattened.storages[0])
    encoded(taken)
    del taken
    gc.collect()
    assert storage() is None


def test_options_of_a_save() -> None:
    shared = [torch.ones(1)]
    taken = aiotorchio.snapshot([shared, shared])
    assert taken.codec == "pickle"
    with pytest.raises(ValueError, match="needs pickle"):
        encoded(taken, allow_pickle=False)
    for option in ("snapshot", "compact"):
        with pytest.raises(ValueError, match="cannot be combined with a Snapshot"):
            encoded(taken, **{option: True})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float32"}, TypeError),
        ({"dtype": torch.int64}, ValueError),
        ({"device": 5}, TypeError),
        ({"device": "no such device"}, RuntimeError),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        aiotorchio.snapshot({"w": torch.ones(1)}, **options)


def test_inside_of_skip_data() -> None:
    with torch.serialization.skip_data(), pytest.raises(ValueError, match="skip_data"):
        aiotorchio.snapshot({"w": torch.ones(1)})


def test_it_is_no_part_of_another_object() -> None:
    with pytest.raises(TypeError, match="by itself"):
        encoded({"a": aiotorchio.snapshot([])})
