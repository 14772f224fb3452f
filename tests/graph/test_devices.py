"""``map_location``: the device of each received storage.

Storages of a GPU come from a crafted header, so these tests need no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.graph import devices
from aiotorchio.graph.devices import DeviceMap, MapLocation
from aiotorchio.wire.header import Header
from tests.support import corpus, craft

STATE = {"a": torch.arange(3.0), "m": torch.empty(2, device="meta")}


def from_cuda(header: Header) -> None:
    header.locations = [
        "cuda:0" if location == "cpu" else location for location in header.locations
    ]


def relocated(
    storage: torch.UntypedStorage, location: str, map_location: MapLocation
) -> torch.UntypedStorage:
    header = craft.flattened([torch.ones(1)]).header
    header.locations = [location]
    return DeviceMap(header, map_location).relocate(0, storage)


def message() -> bytes:
    """The state with the header that a sender with a GPU would write."""
    tensors = list(STATE.values())
    return craft.message(craft.flattened(tensors).skeleton, "tree", tensors, from_cuda)


@pytest.mark.parametrize(
    "map_location",
    [
        "cpu",
        torch.device("cpu"),
        {"cuda:0": "cpu"},
        {"cuda:0": torch.device("cpu")},
        lambda storage, location: storage,
        lambda storage, location: torch.TypedStorage(
            wrap_storage=storage, dtype=torch.uint8, _internal=True
        ),
    ],
)
def test_map_location_to_the_cpu(map_location: Any) -> None:
    corpus.assert_same(craft.load(message(), map_location=map_location), list(STATE.values()))


@pytest.mark.parametrize("map_location", ["meta", torch.device("meta"), {"cpu": "meta"}])
def test_map_location_to_meta(map_location: Any) -> None:
    (loaded,) = craft.round_trip([torch.ones(3, 2).t()], map_location=map_location)
    assert loaded.device.type == "meta"
    assert (loaded.shape, loaded.stride()) == ((2, 3), (1, 2))
    assert loaded.untyped_storage().nbytes() == 24


def test_a_callable_gets_every_storage_with_its_bytes() -> None:
    seen: list[tuple[list[int], str]] = []

    def place(storage: torch.UntypedStorage, location: str) -> Any:
        seen.append((storage.tolist(), location))
        return storage if location == "cuda:0" else None

    tensors = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)]
    data = craft.message(craft.flattened(tensors).skeleton, "tree", tensors, from_cuda)
    corpus.assert_same(craft.load(data, map_location=place), tensors)
    assert seen == [([1, 2], "cuda:0"), ([3], "cuda:0")]


def test_a_callable_that_does_not_care() -> None:
    corpus.assert_same(craft.round_trip(STATE, map_location=lambda storage, location: None), STATE)
    storage = torch.UntypedStorage(4)
    assert relocated(storage, "cpu", lambda storage, location: None) is storage


def test_a_callable_is_not_asked_for_storages_without_bytes() -> None:
    meta = torch.UntypedStorage(4, device="meta")
    assert relocated(meta, "meta", lambda storage, location: torch.UntypedStorage(4)) is meta


def test_a_callable_that_sends_a_storage_back_to_where_it_was() -> None:
    with pytest.raises(aiotorchio.InvalidObjectError, match="nowhere"):
        relocated(torch.UntypedStorage(4), "nowhere", lambda storage, location: None)


def test_a_callable_that_returns_a_storage_of_another_size() -> None:
    with pytest.raises(ValueError, match="8 bytes for a storage of 12"):
        craft.round_trip(STATE, map_location=lambda storage, location: torch.UntypedStorage(8))


def test_the_error_of_a_callable_is_its_own() -> None:
    def fail(storage: torch.UntypedStorage, location: str) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        craft.round_trip(STATE, map_location=fail)


@pytest.mark.parametrize(
    "location",
    [
        "cuda:99",
        "nowhere",
        "",
        "cpu:1:2",
        "cuda:-1",
        "cuda:x",
        "xpu",
        "hpu",
        "mps",
        "xla:0",
        "\x00",
    ],
)
def test_a_device_that_is_not_here(location: str) -> None:
    tensors = [torch.ones(1)]

    def change(header: Header) -> None:
        header.locations = [location]

    data = craft.message(craft.flattened(tensors).skeleton, "tree", tensors, change)
    with pytest.raises(aiotorchio.InvalidObjectError) as caught:
        craft.load(data)
    assert caught.value.entry == "header"
    corpus.assert_same(craft.load(data, map_location="cpu"), tensors)


def at_locations(count: int, distinct: int) -> Header:
    header = craft.flattened([torch.ones(1) for _ in range(count)]).header
    header.locations = [f"cuda:{n % distinct}" for n in range(count)]
    for n, row in enumerate(header.storages):
        row.location = n
    return header


def test_a_location_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def known(tag: str) -> torch.device:
        asked.append(tag)
        return torch.device("cpu")

    monkeypatch.setattr(devices, "known_location", known)
    DeviceMap(at_locations(300, 3), None)
    assert sorted(asked) == ["cuda:0", "cuda:1", "cuda:2"]


def test_locations_that_no_storage_has_do_not_matter() -> None:
    header = craft.flattened([torch.ones(1)]).header
    header.locations += [f"nowhere {n % 100}" for n in range(100_000)]
    assert DeviceMap(header, None).device(0).type == "cpu"


def test_more_locations_than_any_machine_has() -> None:
    with pytest.raises(aiotorchio.LimitExceeded, match="2000 different locations"):
        DeviceMap(at_locations(2000, 2000), None)


def test_map_location_of_another_type() -> None:
    with pytest.raises(TypeError, match="map_location"):
        craft.round_trip(STATE, map_location=3)
    with pytest.raises(TypeError, match="map_location"):
        DeviceMap(craft.flattened(STATE).header, 3)  # type: ignore[arg-type]  # as tested


def test_map_location_of_tensors_without_storage() -> None:
    source = craft.rebuild(
        "_rebuild_device_tensor_from_cpu_tensor",
        craft.tensor(0),
        craft.name("torch", "float32"),
        "xla:0",
        False,
    )
    for map_location in ("cpu", torch.device("cpu"), {"xla:0": "cpu"}):
        loaded = craft.load_pickle(
            craft.pickled(source), [torch.ones(2)], map_location=map_location
        )
        corpus.assert_same(loaded, torch.ones(2))
    with pytest.raises(aiotorchio.InvalidObjectError):
        craft.load_pickle(craft.pickled(source), [torch.ones(2)])


@pytest.mark.parametrize(
    ("restored", "error"),
    [(torch.ones(4), TypeError), (torch.UntypedStorage(3), ValueError)],
    ids=["no storage", "another size"],
)
def test_a_restorer_of_the_callers_that_restores_something_else(
    restored: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = [*torch.serialization._package_registry]
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    torch.serialization.register_package(5, lambda storage: None, lambda storage, tag: restored)
    with pytest.raises(error, match=r"restorer.* 'cpu'"):
        craft.round_trip([torch.ones(1)])
