"""Every option of ``torch.save``, ``torch.load`` and related functions, next to aiotorchio's."""

from __future__ import annotations

import asyncio
import collections
import functools
import gzip
import io
import os
import pickle
import sys
import tarfile
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import serialization

import aiotorchio
from aiotorchio import compat
from tests.parity.twins import (
    by_stream,
    by_torch,
    by_us,
    error_of_torch,
    our_file,
    stream_file,
    torch_file,
)
from tests.support import corpus, craft

# New functions of aiotorchio are not in its types yet.
api: Any = aiotorchio

config: Any = serialization.config

Place = Callable[[Any, str], Any]


class Thing:
    """A class on no allowlist."""

    def __init__(self, value: Any = 1) -> None:
        self.value = value


class Other:
    """Takes the place of ``Thing``."""


class Evil:
    """Runs code when it is unpickled."""

    ran: list[str] = []  # noqa: RUF012 - all instances share it

    def __reduce__(self) -> Any:
        return note, ("ran",)


def note(what: str) -> str:
    Evil.ran.append(what)
    return what


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    Evil.ran.clear()


def _state() -> dict[str, Any]:
    base = torch.arange(6.0)
    return {
        "a": base.view(2, 3),
        "b": base[2:],
        "p": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "m": torch.empty(2, device="meta"),
        "n": 3,
    }


def _raw(data: bytes) -> Any:
    """A pickle module that writes this pickle for any object."""

    class Pickler:
        def __init__(self, file: Any, **_: Any) -> None:
            self.file = file

        def dump(self, _: object) -> None:
            self.file.write(data)

    return types.SimpleNamespace(__name__="raw", Pickler=Pickler)


def _both_files(data: bytes) -> tuple[io.BytesIO, io.BytesIO]:
    """A file of torch and a message of aiotorchio that contain this pickle."""
    pickled = frozenset()  # type: ignore[var-annotated]  # what the tree codec does not carry
    return (
        torch_file(pickled, pickle_module=_raw(data)),
        our_file(pickled, pickle_module=_raw(data)),
    )


# --------------------------------------------------------------------------------- map_location


@pytest.mark.parametrize(
    "map_location",
    [
        None,
        "cpu",
        "meta",
        torch.device("cpu"),
        torch.device("meta"),
        {},
        {"cpu": "cpu"},
        {"cpu": "meta"},
        {"cuda:0": "nowhere"},
        collections.defaultdict(lambda: "nowhere"),
        lambda storage, location: storage,
        lambda storage, location: None,
        lambda storage, location: torch.UntypedStorage(storage.nbytes(), device="meta"),
        functools.partial(lambda extra, storage, location: storage, None),
    ],
    ids=[
        "none",
        "str",
        "str_meta",
        "device",
        "device_meta",
        "empty_dict",
        "dict",
        "dict_meta",
        "dict_without_it",
        "defaultdict",
        "callable_storage",
        "callable_none",
        "callable_meta",
        "partial",
    ],
)
def test_map_location(map_location: Any) -> None:
    theirs = by_torch(_state(), map_location=map_location)
    streamed = by_stream(_state(), map_location=None)
    ours = by_us(_state(), map_location=map_location)
    assert ours.keys() == theirs.keys() == streamed.keys()
    for name in ("a", "b", "p", "m"):
        assert ours[name].device == theirs[name].device
        assert type(ours[name]) is type(theirs[name])
        assert (ours[name].shape, ours[name].stride()) == (
            theirs[name].shape,
            theirs[name].stride(),
        )
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].requires_grad == theirs[name].requires_grad
        assert ours[name].storage_offset() == theirs[name].storage_offset()
        assert ours[name].untyped_storage().nbytes() == theirs[name].untyped_storage().nbytes()
        if not ours[name].is_meta:
            assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("map_location", ["meta", {"cpu": "meta"}])
def test_map_location_meta_keeps_what_is_shared(map_location: Any) -> None:
    """torch makes a storage for each tensor there."""
    ours, theirs = (load(_state(), map_location=map_location) for load in (by_us, by_torch))
    assert ours["a"].untyped_storage()._cdata == ours["b"].untyped_storage()._cdata
    assert theirs["a"].untyped_storage()._cdata != theirs["b"].untyped_storage()._cdata


def test_map_location_meta_has_no_offset_in_a_file() -> None:
    """torch notes where the bytes are in the file; a stream has no such offsets after the load."""
    theirs, ours = (load(_state(), map_location="meta")["a"] for load in (by_torch, by_us))
    assert theirs.untyped_storage()._checkpoint_offset > 0
    assert getattr(ours.untyped_storage(), "_checkpoint_offset", None) is None


@pytest.mark.parametrize("map_location", ["meta", {"cpu": "meta"}])
@pytest.mark.parametrize(
    "make", [torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc]
)
def test_map_location_meta_of_sparse_tensors(make: Any, map_location: Any) -> None:
    theirs = by_torch(make(torch.eye(3)), map_location=map_location)
    ours = by_us(make(torch.eye(3)), map_location=map_location)
    assert (ours.layout, ours.shape, ours.device) == (theirs.layout, theirs.shape, theirs.device)
    assert ours.is_meta and ours._nnz() == theirs._nnz() == 3


def test_map_location_dict_to_a_device_works_better() -> None:
    with pytest.raises(TypeError):
        by_torch(_state(), map_location={"cpu": torch.device("cpu")})
    corpus.assert_same(by_us(_state(), map_location={"cpu": torch.device("cpu")}), _state())


def test_map_location_of_any_mapping_works_better() -> None:
    mapping: Mapping[str, str] = types.MappingProxyType({"cpu": "meta"})
    with pytest.raises(TypeError):
        by_torch(_state(), map_location=mapping)
    assert by_us(_state(), map_location=mapping)["a"].is_meta


@pytest.mark.parametrize("map_location", [3, b"cpu", ["cpu"]], ids=["int", "bytes", "list"])
def test_map_location_of_another_type(map_location: Any) -> None:
    with pytest.raises(TypeError):
        by_torch(_state(), map_location=map_location)
    with pytest.raises(TypeError, match="map_location"):
        by_us(_state(), map_location=map_location)


def _seen_by(load: Callable[..., Any]) -> tuple[list[Any], Any]:
    seen: list[Any] = []

    def place(storage: Any, location: str) -> Any:
        seen.append((type(storage), storage.tolist(), location, threading.get_ident()))
        return storage

    loaded = load(_state(), map_location=place)
    return seen, loaded


def test_a_callable_gets_each_storage_once_with_its_bytes_in_this_thread() -> None:
    """Each storage with bytes, in the order of the object; not those on meta."""
    (theirs, _), (ours, loaded) = _seen_by(by_torch), _seen_by(by_us)
    assert ours == theirs
    assert [kind for kind, *_ in ours] == [torch.UntypedStorage] * 2
    assert [thread for *_, thread in ours] == [threading.get_ident()] * 2
    corpus.assert_same(loaded, _state())


def test_a_callable_may_return_another_storage() -> None:
    made: list[torch.UntypedStorage] = []

    def place(storage: Any, location: str) -> Any:
        made.append(storage.clone())
        made[-1][0] = 1  # the lowest byte of a number of little-endian machines
        return made[-1]

    theirs, ours = by_torch(_state(), map_location=place), by_us(_state(), map_location=place)
    corpus.assert_same(ours, theirs)
    assert ours["a"].untyped_storage()._cdata == made[2]._cdata
    assert ours["a"].untyped_storage()._cdata == ours["b"].untyped_storage()._cdata


def test_a_callable_may_return_a_typed_storage_here() -> None:
    """``storage.cuda()`` returned one in older code; torch does not accept it any more."""

    def place(storage: Any, location: str) -> Any:
        return torch.TypedStorage(wrap_storage=storage, dtype=torch.uint8, _internal=True)

    with pytest.raises(TypeError):
        by_torch(_state(), map_location=place)
    corpus.assert_same(by_us(_state(), map_location=place), _state())


@pytest.mark.parametrize("result", ["cpu", 0, torch.ones(24, dtype=torch.uint8)], ids=type)
def test_a_callable_that_returns_no_storage(result: Any) -> None:
    with pytest.raises(TypeError):
        by_torch(torch.ones(6), map_location=lambda storage, location: result)
    with pytest.raises(TypeError, match="map_location"):
        by_us(torch.ones(6), map_location=lambda storage, location: result)


@pytest.mark.parametrize("nbytes", [0, 4, 16])
def test_a_callable_that_returns_another_size_is_refused(nbytes: int) -> None:
    """torch shows uninitialized memory."""

    def place(storage: Any, location: str) -> Any:
        return torch.UntypedStorage(nbytes)

    assert by_torch(torch.ones(2), map_location=place).shape == (2,)
    with pytest.raises(ValueError, match=f"{nbytes} bytes for a storage of 8"):
        by_us(torch.ones(2), map_location=place)


def test_the_error_of_a_callable_comes_as_it_is() -> None:
    def place(storage: Any, location: str) -> Any:
        raise KeyError("mine")

    for load in (by_torch, by_us):
        with pytest.raises(KeyError, match="mine"):
            load(_state(), map_location=place)


def test_a_callable_and_a_wrapper_subclass() -> None:
    """Its device belongs to no storage: the callable cannot choose one."""
    wrapper = corpus.Wrapper(torch.ones(2))
    options = {"map_location": lambda storage, location: storage}
    with torch.serialization.safe_globals([corpus.Wrapper]):
        error = error_of_torch(wrapper, **options)
    assert isinstance(error, RuntimeError) and "Callable map_location not supported" in str(error)
    with pytest.raises(aiotorchio.InvalidObjectError) as caught:
        by_us(wrapper, safe_globals=[corpus.Wrapper], **options)
    assert str(error) in str(caught.value)


def test_a_dict_moves_a_wrapper_subclass_with_its_parts() -> None:
    """In torch the wrapper reports its old device, and its parts are on another one."""
    wrapper, options = corpus.Wrapper(torch.ones(2)), {"map_location": {"cpu": "meta"}}
    with torch.serialization.safe_globals([corpus.Wrapper]):
        theirs, ours = by_torch(wrapper, **options), by_us(wrapper, **options)
    assert theirs.device.type == "cpu" and theirs.wrapped.is_meta
    assert ours.device.type == "meta" and ours.wrapped.is_meta


@pytest.mark.parametrize("map_location", [None, "cpu", "meta", torch.device("meta"), {}])
def test_a_wrapper_subclass_goes_where_its_parts_go(map_location: Any) -> None:
    wrapper = corpus.Wrapper(torch.ones(2))
    with torch.serialization.safe_globals([corpus.Wrapper]):
        theirs = by_torch(wrapper, map_location=map_location)
        ours = by_us(wrapper, map_location=map_location)
    assert ours.device == theirs.device == ours.wrapped.device == theirs.wrapped.device


# --------------------------------------------------------------------------- missing devices

ABSENT = [
    "cuda",
    "cuda:7",
    "cuda:99",
    "xpu",
    "xpu:1",
    "hpu",
    "hpu:0",
    "mtia",
    "mps",
    "privateuseone",
    "privateuseone:0",
    "xla:0",
    "cpu:0",
    "foo",
    "foo:3",
]


def _is_here(location: str) -> bool:
    kind, _, index = location.partition(":")
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is None or kind != accelerator.type:
        return False
    return int(index or 0) < torch.accelerator.device_count()


@pytest.fixture
def registry() -> Iterator[list[Any]]:
    """torch's registry of locations, restored after the test."""
    entries: list[Any] = torch.serialization._package_registry
    before = list(entries)
    yield entries
    entries[:] = before


def _tagged(location: str, obj: object) -> io.BytesIO:
    """Save with torch as on a machine where CPU storages have this location."""
    entries: list[Any] = torch.serialization._package_registry
    before = list(entries)
    try:
        torch.serialization.register_package(0, lambda storage: location, lambda *_: None)
        return torch_file(obj)
    finally:
        entries[:] = before


def _tagged_here(location: str, tensors: list[torch.Tensor]) -> bytes:
    def change(header: Any) -> None:
        header.locations = [location]

    return craft.message(craft.flattened(tensors).skeleton, "tree", tensors, change)


@pytest.mark.parametrize("location", ABSENT)
def test_tensors_of_a_device_that_is_not_here(location: str) -> None:
    if _is_here(location):
        pytest.skip("this machine has it")
    tensors = [torch.ones(2)]
    with pytest.raises(Exception) as theirs:
        torch.load(_tagged(location, tensors))
    with pytest.raises(aiotorchio.InvalidObjectError) as ours:
        craft.load(_tagged_here(location, tensors))
    assert str(theirs.value) in str(ours.value) and location in str(ours.value)
    corpus.assert_same(torch.load(_tagged(location, tensors), map_location="cpu"), tensors)
    corpus.assert_same(craft.load(_tagged_here(location, tensors), map_location="cpu"), tensors)


@pytest.mark.parametrize("form", ["str", "dict", "device", "callable"])
@pytest.mark.parametrize("location", ABSENT)
def test_map_location_to_a_device_that_is_not_here(location: str, form: str) -> None:
    if _is_here(location):
        pytest.skip("this machine has it")
    if form == "device":
        if location.startswith("foo"):
            pytest.skip("no device of torch")
        map_location: Any = torch.device(location)
    elif form == "dict":
        map_location = {"cpu": location}
    elif form == "callable":
        map_location = functools.partial(_to_device, location)
    else:
        map_location = location
    error = error_of_torch(torch.ones(2), map_location=map_location)
    # An error that the callable raises is raised as it is.
    kind = type(error) if form == "callable" else aiotorchio.InvalidObjectError
    with pytest.raises(kind) as ours:
        by_us(torch.ones(2), map_location=map_location)
    assert str(error) in str(ours.value)


def _to_device(location: str, storage: Any, _: str) -> Any:
    return torch.serialization.default_restore_location(storage, location)


@pytest.mark.parametrize("location", ABSENT)
def test_a_callable_that_leaves_a_storage_to_a_device_that_is_not_here(location: str) -> None:
    if _is_here(location):
        pytest.skip("this machine has it")
    tensors, seen = [torch.ones(2)], []

    def place(storage: Any, tag: str) -> Any:
        seen.append(tag)

    with pytest.raises(Exception) as theirs:
        torch.load(_tagged(location, tensors), map_location=place)
    with pytest.raises(aiotorchio.InvalidObjectError) as ours:
        craft.load(_tagged_here(location, tensors), map_location=place)
    assert str(theirs.value) in str(ours.value)
    assert seen == [location] * 2


@pytest.mark.parametrize("available", [True, False])
def test_a_device_module_that_has_too_few_devices(
    available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.SimpleNamespace(is_available=lambda: available, device_count=lambda: 2)
    monkeypatch.setattr(torch, "privateuseone", module, raising=False)
    error = error_of_torch(torch.ones(2), map_location="privateuseone:5")
    assert ("device_count() is 2" if available else "is_available() is False") in str(error)
    with pytest.raises(aiotorchio.InvalidObjectError) as ours:
        by_us(torch.ones(2), map_location="privateuseone:5")
    assert str(error) in str(ours.value)


def test_an_absent_device_of_an_object_without_tensors_matters_to_nobody() -> None:
    for load in (by_torch, by_us):
        assert load({"n": 1}, map_location="cuda:99") == {"n": 1}


def test_meta_tensors_stay_on_meta_whatever_the_location() -> None:
    for load in (by_torch, by_us):
        assert load(torch.empty(2, device="meta"), map_location="cuda:99").is_meta


def test_the_accelerator_of_this_machine() -> None:
    """Tensors go back to the device that torch recorded for them."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    device = torch.device("cpu") if accelerator is None else accelerator
    tensor = torch.arange(4.0).to(device)
    theirs, ours = by_torch(tensor), by_us(tensor)
    assert ours.device == theirs.device == tensor.device
    assert ours.tolist() == theirs.tolist() == [0, 1, 2, 3]
    seen: list[str] = []

    def place(storage: Any, location: str) -> Any:
        seen.append(location)

    by_us(tensor, map_location=place)
    assert seen == [torch.serialization.location_tag(tensor.untyped_storage())]


# ----------------------------------------------------------------------------- register_package


def _vault() -> tuple[dict[str, Any], list[Any], list[Any]]:
    """A device of an extension: a tagger and a restorer, and the lists of their calls."""
    asked: list[Any] = []
    restored: list[Any] = []

    def tag(storage: Any) -> str | None:
        asked.append((type(storage), storage.nbytes()))
        return "vault:1" if storage.nbytes() == 24 else None

    def restore(storage: Any, location: str) -> Any:
        if not location.startswith("vault"):
            return None
        restored.append((type(storage), storage.tolist(), location))
        return storage.clone()

    return {"tagger": tag, "deserializer": restore}, asked, restored


def _locations(obj: object) -> list[str]:
    """The tags of an object's storages in aiotorchio's message."""
    seen: list[str] = []

    def place(storage: Any, location: str) -> Any:
        seen.append(location)
        return storage

    by_us(obj, map_location=place)
    return seen


def test_a_tagger_of_higher_priority_is_asked_for_each_storage(registry: list[Any]) -> None:
    package, asked, _ = _vault()
    torch.serialization.register_package(5, **package)
    state = _state()
    del state["m"]
    torch_file(state)
    theirs = set(asked)
    asked.clear()
    assert _locations(state) == ["vault:1", "cpu"]
    assert set(asked) == theirs == {(torch.UntypedStorage, 24), (torch.UntypedStorage, 16)}


def test_a_tagger_of_lower_priority_is_not_asked_for_cpu_storages(registry: list[Any]) -> None:
    package, asked, _ = _vault()
    torch.serialization.register_package(15, **package)
    state = _state()
    del state["m"]
    torch_file(state)
    assert asked == []
    assert _locations(state) == ["cpu", "cpu"]
    assert asked == []


def test_a_tagger_is_not_asked_for_meta_tensors(registry: list[Any]) -> None:
    """They have no bytes that could be on another device."""
    asked: list[str] = []

    def tag(storage: Any) -> str:
        asked.append(storage.device.type)
        return "vault:1"

    def restore(storage: Any, location: str) -> Any:
        return storage if location == "vault:1" else None

    torch.serialization.register_package(5, tag, restore)
    theirs, ours = by_torch(_state()), by_us(_state())
    corpus.assert_same(ours, theirs)
    assert set(asked) == {"cpu"} and ours["m"].is_meta


def test_a_tagger_may_give_each_storage_its_own_location(registry: list[Any]) -> None:
    torch.serialization.register_package(
        5, lambda storage: f"vault:{storage.nbytes()}", lambda storage, location: None
    )
    assert _locations([torch.ones(1), torch.ones(3), torch.ones(1)]) == [
        "vault:4",
        "vault:12",
        "vault:4",
    ]


def test_a_tagger_that_says_nothing(registry: list[Any]) -> None:
    torch.serialization.register_package(5, lambda storage: "", lambda storage, location: None)
    assert _locations(torch.ones(2)) == ["cpu"]
    assert by_torch(torch.ones(2)).tolist() == by_us(torch.ones(2)).tolist() == [1, 1]


def test_the_error_of_a_tagger_comes_as_it_is(registry: list[Any]) -> None:
    def tag(storage: Any) -> str:
        raise KeyError("no tag")

    torch.serialization.register_package(5, tag, lambda storage, location: None)
    for save in (torch_file, our_file):
        with pytest.raises(KeyError, match="no tag"):
            save([torch.ones(2)])


@pytest.mark.parametrize("priority", [5, 15, 100])
def test_a_restorer_gets_the_whole_storage_and_its_location(
    priority: int, registry: list[Any]
) -> None:
    package, _, restored = _vault()
    file = _tagged("vault:1", torch.ones(6))
    data = _tagged_here("vault:1", [torch.ones(6)])
    torch.serialization.register_package(priority, **package)
    theirs = torch.load(file)
    (ours,) = craft.load(data)
    assert ours.tolist() == theirs.tolist() == [1] * 6
    whole = torch.ones(6).untyped_storage().tolist()
    assert restored == [(torch.UntypedStorage, whole, "vault:1")] * 2


def test_what_a_restorer_returns_is_what_the_tensors_show(registry: list[Any]) -> None:
    made: list[torch.UntypedStorage] = []

    def restore(storage: Any, location: str) -> Any:
        if location == "cpu":
            made.append(storage.clone())
            return made[-1]
        return None

    torch.serialization.register_package(5, lambda storage: None, restore)
    theirs, ours = by_torch(_state()), by_us(_state())
    assert len(made) == 4
    corpus.assert_same(ours, theirs)
    assert theirs["a"].untyped_storage()._cdata == made[0]._cdata
    assert ours["a"].untyped_storage()._cdata == made[2]._cdata
    assert ours["b"].untyped_storage()._cdata == made[2]._cdata


def test_a_restorer_of_lower_priority_is_not_asked_for_cpu_storages(registry: list[Any]) -> None:
    asked: list[str] = []

    def restore(storage: Any, location: str) -> Any:
        asked.append(location)

    torch.serialization.register_package(15, lambda storage: None, restore)
    for load in (by_torch, by_us):
        load(torch.ones(2))
        load(torch.ones(2), map_location="cpu")
    assert asked == []


def test_a_callable_that_leaves_a_storage_to_a_restorer(registry: list[Any]) -> None:
    restored: list[str] = []

    def restore(storage: Any, location: str) -> Any:
        restored.append(location)
        return storage.clone()

    torch.serialization.register_package(5, lambda storage: None, restore)
    for load in (by_torch, by_us):
        loaded = load(torch.ones(2), map_location=lambda storage, location: None)
        assert loaded.tolist() == [1, 1]
    assert restored == ["cpu", "cpu"]


def test_restorers_are_asked_in_the_order_of_their_priority(registry: list[Any]) -> None:
    asked: list[int] = []

    def restorer(priority: int, answer: bool) -> Place:
        def restore(storage: Any, location: str) -> Any:
            asked.append(priority)
            return storage if answer else None

        return restore

    file = _tagged("vault", torch.ones(2))
    data = _tagged_here("vault", [torch.ones(2)])
    for priority, answer in ((30, True), (40, True), (12, False), (2, False)):
        torch.serialization.register_package(
            priority, lambda storage: None, restorer(priority, answer)
        )
    torch.load(file)
    theirs = list(asked)
    asked.clear()
    craft.load(data)
    assert asked == theirs == [2, 12, 30]


def test_the_error_of_a_restorer_says_what_it_said(registry: list[Any]) -> None:
    def restore(storage: Any, location: str) -> Any:
        raise RuntimeError(f"{location} is on fire")

    torch.serialization.register_package(5, lambda storage: None, restore)
    with pytest.raises(RuntimeError, match="cpu is on fire"):
        by_torch(torch.ones(2))
    with pytest.raises(aiotorchio.InvalidObjectError, match="cpu is on fire"):
        by_us(torch.ones(2))


@pytest.mark.parametrize("form", ["str", "dict"])
def test_map_location_to_a_registered_location(form: str, registry: list[Any]) -> None:
    package, _, restored = _vault()
    torch.serialization.register_package(30, **package)
    map_location = "vault:9" if form == "str" else {"cpu": "vault:9"}
    theirs = by_torch(torch.ones(2), map_location=map_location)
    ours = by_us(torch.ones(2), map_location=map_location)
    corpus.assert_same(ours, theirs)
    whole = torch.ones(2).untyped_storage().tolist()
    assert restored == [(torch.UntypedStorage, whole, "vault:9")] * 2


def test_map_location_keeps_a_registered_location_away(registry: list[Any]) -> None:
    package, _, restored = _vault()
    torch.serialization.register_package(5, **package)
    theirs = by_torch(torch.ones(6), map_location="cpu")
    ours = by_us(torch.ones(6), map_location="cpu")
    corpus.assert_same(ours, theirs)
    assert restored == []


def test_a_whole_round_trip_through_a_registered_device(registry: list[Any]) -> None:
    package, _, restored = _vault()
    torch.serialization.register_package(5, **package)
    theirs = by_torch(_state())
    their_calls = list(restored)
    restored.clear()
    ours = by_us(_state())
    corpus.assert_same(ours, theirs)
    assert restored == their_calls and [location for *_, location in restored] == ["vault:1"]

    async def through_a_stream() -> Any:
        return await aiotorchio.load_from_stream(aiotorchio.iter_bytes(_state()))

    restored.clear()
    corpus.assert_same(asyncio.run(through_a_stream()), theirs)
    assert restored == their_calls


def test_a_registered_device_that_the_receiver_does_not_know(registry: list[Any]) -> None:
    package, _, _ = _vault()
    before = list(registry)
    torch.serialization.register_package(5, **package)
    theirs, ours = torch_file(torch.ones(6)), our_file(torch.ones(6))
    registry[:] = before
    with pytest.raises(RuntimeError, match=r"tagged with vault:1") as caught:
        torch.load(theirs)
    with pytest.raises(aiotorchio.InvalidObjectError) as refused:
        aiotorchio.load(ours)
    assert str(caught.value) in str(refused.value)


def test_storages_alone_are_tagged_and_restored_too(registry: list[Any]) -> None:
    package, _, restored = _vault()
    torch.serialization.register_package(5, **package)
    storage = torch.arange(24, dtype=torch.uint8).untyped_storage()
    ours = by_us([storage])[0]
    assert ours.tolist() == list(range(24))
    assert restored == [(torch.UntypedStorage, list(range(24)), "vault:1")]


def test_many_storages_are_restored_too(registry: list[Any]) -> None:
    """Storages that a worker thread unpacks, and small ones that share a chunk."""
    package, _, restored = _vault()
    torch.serialization.register_package(5, **package)
    obj = [torch.full((6,), float(n)) for n in range(300)] + [torch.zeros(20000)]
    corpus.assert_same(by_us(obj), obj)
    assert len(restored) == 300


# ---------------------------------------------------------------- pickle_module, pickle_protocol


@pytest.mark.parametrize("loader", ["dill", "pickle"])
def test_dill(loader: str) -> None:
    dill = pytest.importorskip("dill")
    scale = torch.full((2,), 3.0)

    class Local:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    obj = {
        "f": lambda x: x * scale,
        "local": Local(torch.ones(2)),
        "class": Local,
        "scale": scale,
    }
    module = dill if loader == "dill" else pickle
    theirs = torch.load(
        torch_file(obj, pickle_module=dill), pickle_module=module, weights_only=False
    )
    ours = aiotorchio.load(
        our_file(obj, pickle_module=dill), pickle_module=module, weights_only=False
    )
    for loaded in (theirs, ours):
        assert loaded["f"](torch.ones(2)).tolist() == [3, 3]
        assert loaded["local"].tensor.tolist() == [1, 1]
        loaded["scale"].fill_(5)
        assert loaded["f"](torch.ones(2)).tolist() == [5, 5]  # one tensor in both places


def test_dill_loads_what_pickle_saved() -> None:
    dill = pytest.importorskip("dill")
    obj = {"thing": Thing(torch.ones(2))}
    theirs = torch.load(torch_file(obj), pickle_module=dill, weights_only=False)
    ours = aiotorchio.load(our_file(obj), pickle_module=dill, weights_only=False)
    corpus.assert_same(ours, theirs)


def test_cloudpickle() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    scale = torch.full((2,), 3.0)

    class Local:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x * scale

    obj = {"f": lambda x: x * scale, "local": Local(), "scale": scale}
    theirs = torch.load(torch_file(obj, pickle_module=cloudpickle), weights_only=False)
    ours = aiotorchio.load(our_file(obj, pickle_module=cloudpickle), weights_only=False)
    for loaded in (theirs, ours):
        assert loaded["f"](torch.ones(2)).tolist() == loaded["local"](torch.ones(2)).tolist()
        loaded["scale"].fill_(5)
        assert loaded["f"](torch.ones(2)).tolist() == [5, 5]


def test_cloudpickle_has_no_unpickler() -> None:
    """``pickle`` loads what it saves."""
    cloudpickle = pytest.importorskip("cloudpickle")
    for load in (by_torch, by_us):
        with pytest.raises(AttributeError, match="Unpickler"):
            load(Thing(), pickle_module=cloudpickle, weights_only=False)


@pytest.mark.parametrize("name", ["dill", "cloudpickle"])
def test_other_pickles_are_refused_with_weights_only(name: str) -> None:
    module = pytest.importorskip(name)
    obj = {"f": lambda: 1}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(torch_file(obj, pickle_module=module))
    with pytest.raises(aiotorchio.UnsafeObjectError):
        aiotorchio.load(our_file(obj, pickle_module=module))


class RenamingPickler(pickle.Pickler):
    """Reduces one class with a special function."""

    def reducer_override(self, obj: Any) -> Any:
        return (note, (f"thing {obj.value}",)) if isinstance(obj, Thing) else NotImplemented


class RenamingUnpickler(pickle.Unpickler):
    """Finds a class under another name."""

    def find_class(self, module: str, name: str) -> Any:
        return Other if name == "Thing" else super().find_class(module, name)


def _module(**parts: Any) -> Any:
    return types.SimpleNamespace(
        __name__="mine", **{"Pickler": pickle.Pickler, "Unpickler": pickle.Unpickler, **parts}
    )


def test_a_pickler_of_ones_own() -> None:
    module = _module(Pickler=RenamingPickler)
    obj = [Thing(7), torch.ones(2)]
    theirs = torch.load(torch_file(obj, pickle_module=module), weights_only=False)
    ours = aiotorchio.load(our_file(obj, pickle_module=module), weights_only=False)
    corpus.assert_same(ours, theirs)
    assert ours[0] == "thing 7"


def test_an_unpickler_of_ones_own() -> None:
    module = _module(Unpickler=RenamingUnpickler)
    obj = [Thing(), torch.ones(2)]
    loads: list[tuple[Any, Any]] = [
        (torch_file(obj), torch.load),
        (our_file(obj), aiotorchio.load),
    ]
    for file, load in loads:
        loaded = load(file, pickle_module=module, weights_only=False)
        assert type(loaded[0]) is Other and loaded[1].tolist() == [1, 1]


def test_pickle_module_is_not_asked_for_what_needs_no_pickle() -> None:
    module = types.SimpleNamespace(__name__="none")
    with pytest.raises(AttributeError):
        torch_file({"a": [1]}, pickle_module=module)
    file = our_file({"a": [1]}, pickle_module=module)
    assert aiotorchio.load(file, pickle_module=module, weights_only=False) == {"a": [1]}
    with pytest.raises(AttributeError):
        our_file(Thing(), pickle_module=module)


def test_pickle_module_with_weights_only_is_refused() -> None:
    for load in (by_torch, by_stream):
        with pytest.raises(RuntimeError, match="explicit pickle_module"):
            load([1], pickle_module=pickle, weights_only=True)
    with pytest.raises(ValueError, match="pickle_module"):
        by_us([1], pickle_module=pickle, weights_only=True)


def test_pickle_module_alone_does_not_ask_for_foreign_code() -> None:
    """torch takes it as weights_only=False; here that has to be explicit."""
    assert by_torch(Evil(), pickle_module=pickle) == "ran"
    with pytest.raises(ValueError, match="pickle_module"):
        by_us(Evil(), pickle_module=pickle)
    assert Evil.ran == ["ran"]


PROTOCOLS = [-1, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_pickle_protocol_with_weights_only_false(protocol: int) -> None:
    obj = [Thing({"a": frozenset({1}), "b": b"x", "t": (True, None, 2**70)}), bytearray(b"y")]
    theirs = torch.load(torch_file(obj, pickle_protocol=protocol), weights_only=False)
    ours = aiotorchio.load(our_file(obj, pickle_protocol=protocol), weights_only=False)
    corpus.assert_same(ours, theirs)
    corpus.assert_same(ours, obj)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_pickle_protocol_with_tensors_in_it(protocol: int) -> None:
    """torch cannot load its own protocol 0, whose references are text."""
    linear = torch.nn.Linear(2, 2)
    obj = [Thing(torch.ones(2)), linear]
    file = torch_file(obj, pickle_protocol=protocol)
    if protocol == 0:
        with pytest.raises(AssertionError, match="saved_id"):
            torch.load(file, weights_only=False)
    else:
        assert torch.load(file, weights_only=False)[0].value.tolist() == [1, 1]
    ours = aiotorchio.load(our_file(obj, pickle_protocol=protocol), weights_only=False)
    assert ours[0].value.tolist() == [1, 1]
    assert torch.equal(ours[1].weight, linear.weight)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_pickle_protocol_of_a_state_dict_with_weights_only(protocol: int) -> None:
    """A plain state needs no pickle; torch loads that of the default protocol, others in part."""
    state = {"w": torch.ones(2), "flags": [True, None]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        try:
            torch.load(torch_file(state, pickle_protocol=protocol))
            loads = True
        except pickle.UnpicklingError:
            loads = False
    assert loads == (protocol in (2, 3))
    corpus.assert_same(aiotorchio.load(our_file(state, pickle_protocol=protocol)), state)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_pickle_protocol_of_a_pickled_object_with_weights_only(protocol: int) -> None:
    """Only the default one is supported; torch warns of protocol 3, and refuses 4 and 5."""
    obj = {None: torch.ones(2), (1, 2): True}
    file = our_file(obj, pickle_protocol=protocol)
    if protocol == 2:
        corpus.assert_same(aiotorchio.load(file), torch.load(torch_file(obj, pickle_protocol=2)))
        return
    with pytest.raises(aiotorchio.UnsafeObjectError, match=r"protocol|opcode"):
        aiotorchio.load(file)
    if protocol == 3:
        with pytest.warns(UserWarning, match="Detected pickle protocol 3"):
            torch.load(torch_file(obj, pickle_protocol=3))
    elif protocol not in (0, 1):
        with (
            pytest.warns(UserWarning, match="Detected pickle protocol"),
            pytest.raises(pickle.UnpicklingError),
        ):
            torch.load(torch_file(obj, pickle_protocol=protocol))
    else:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(torch_file(obj, pickle_protocol=protocol))


def test_a_pickle_protocol_that_python_does_not_have() -> None:
    for save in (torch_file, our_file):
        with pytest.raises(ValueError, match="pickle protocol must be <= 5"):
            save(Thing(), pickle_protocol=6)


# A string of Python 2: 'äö' in latin-1.
PYTHON_2 = b"\x80\x02U\x02\xe4\xf6."


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(("encoding", "text"), [("latin1", "äö"), ("bytes", b"\xe4\xf6")])
def test_encoding(encoding: str, text: Any, weights_only: bool) -> None:
    theirs, ours = _both_files(PYTHON_2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pickle_load_args only works", UserWarning)
        expected = torch.load(theirs, encoding=encoding, weights_only=weights_only)
    loaded = aiotorchio.load(ours, encoding=encoding, weights_only=weights_only)
    assert loaded == expected == text


@pytest.mark.parametrize("weights_only", [True, False])
def test_the_default_encoding_is_utf_8(weights_only: bool) -> None:
    for data, text in ((PYTHON_2, None), (b"\x80\x02U\x02\xc3\xa4.", "ä")):
        theirs, ours = _both_files(data)
        if text is None:
            with pytest.raises(UnicodeDecodeError):
                torch.load(theirs, weights_only=weights_only)
            with pytest.raises(aiotorchio.InvalidObjectError, match="utf-8"):
                aiotorchio.load(ours, weights_only=weights_only)
        else:
            assert torch.load(theirs, weights_only=weights_only) == text
            assert aiotorchio.load(ours, weights_only=weights_only) == text


def test_other_arguments_of_the_unpickler_go_with_its_module() -> None:
    theirs, ours = _both_files(PYTHON_2)
    options: dict[str, Any] = {"encoding": "ascii", "errors": "replace", "weights_only": False}
    assert torch.load(theirs, **options) == "\ufffd\ufffd"
    with pytest.raises(TypeError, match="errors"):
        aiotorchio.load(ours, **options)

    class Unpickler(pickle.Unpickler):
        def __init__(self, file: Any, *, encoding: str) -> None:
            super().__init__(file, encoding=encoding, errors="replace")

    module = _module(Unpickler=Unpickler)
    loaded = aiotorchio.load(ours, None, module, encoding="ascii", weights_only=False)
    assert loaded == "\ufffd\ufffd"


# ------------------------------------------------------------------- weights_only, safe globals


def test_weights_only_is_the_default() -> None:
    for load in (by_torch, by_stream, by_us):
        with pytest.raises(pickle.UnpicklingError):
            load(Evil())
    assert Evil.ran == []


def test_weights_only_false_runs_what_the_sender_sent() -> None:
    for load in (by_torch, by_stream, by_us):
        assert load(Evil(), weights_only=False) == "ran"
    assert Evil.ran == ["ran"] * 3


def test_weights_only_none_is_the_default_too() -> None:
    with pytest.raises(pickle.UnpicklingError):
        by_torch(Evil(), weights_only=None)
    with pytest.raises(aiotorchio.UnsafeObjectError):
        by_us(Evil(), weights_only=None)
    assert Evil.ran == []


@pytest.mark.parametrize("weights_only", [0, "", []])
def test_weights_only_of_another_type_runs_nothing(weights_only: Any) -> None:
    with pytest.raises(TypeError, match="weights_only"):
        by_us(Evil(), weights_only=weights_only)
    assert Evil.ran == []


def test_the_error_names_what_is_not_allowed() -> None:
    path = f"{Thing.__module__}.Thing"
    for load in (by_torch, by_us):
        with pytest.raises(pickle.UnpicklingError, match=f"{path}.* was not an allowed global"):
            load(Thing())
    file = io.BytesIO()
    compat.streaming_save(Thing(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=f"{path}.* was not an allowed global"):
        compat.streaming_load(file)


def test_add_and_clear_safe_globals(no_safe_globals: None) -> None:
    theirs, ours = torch_file(Thing([1])), our_file(Thing([1]))
    torch.serialization.add_safe_globals([Thing])
    assert torch.load(theirs).value == aiotorchio.load(ours).value == [1]
    torch.serialization.clear_safe_globals()
    theirs.seek(0)
    ours.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(theirs)
    with pytest.raises(aiotorchio.UnsafeObjectError):
        aiotorchio.load(ours)


def test_the_safe_globals_context_manager(no_safe_globals: None) -> None:
    with torch.serialization.safe_globals([Thing]):
        for load in (by_torch, by_stream, by_us):
            if load is not by_stream:  # it needs a private class on the list
                assert load(Thing([1])).value == [1]
    for load in (by_torch, by_us):
        with pytest.raises(pickle.UnpicklingError):
            load(Thing([1]))
    assert torch.serialization.get_safe_globals() == []


def test_a_path_for_a_global(no_safe_globals: None) -> None:
    """A global path of a class that was moved, or is another one here."""
    pair = (Other, f"{Thing.__module__}.Thing")
    with torch.serialization.safe_globals([pair]):
        assert type(by_torch(Thing())) is type(by_us(Thing())) is Other
    assert type(by_us(Thing(), safe_globals=[pair])) is Other


def test_safe_globals_of_one_call_leak_nowhere(no_safe_globals: None) -> None:
    assert by_us(Thing(), safe_globals=[Thing]).value == 1
    assert torch.serialization.get_safe_globals() == []
    for load in (by_torch, by_us):
        with pytest.raises(pickle.UnpicklingError):
            load(Thing())


def test_safe_globals_of_one_call_add_to_those_of_torch(no_safe_globals: None) -> None:
    with torch.serialization.safe_globals([Thing]):
        loaded = by_us([Thing(), Other()], safe_globals=[Other])
    assert [type(item) for item in loaded] == [Thing, Other]


@pytest.mark.parametrize(
    "bad", [(Thing,), (Thing, "a", "b"), (Thing, 3)], ids=["one", "three", "no_path"]
)
def test_a_pair_that_is_none(bad: Any, no_safe_globals: None) -> None:
    with torch.serialization.safe_globals([bad]):
        with pytest.raises((ValueError, TypeError)):
            by_torch(Thing())
        with pytest.raises(TypeError, match="safe_globals"):
            by_us(Thing())
    with pytest.raises(TypeError, match="safe_globals"):
        by_us(Thing(), safe_globals=[bad])


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("posix", "system"), ("nt", "system"), ("sys", "exit")]
)
def test_blocked_modules_even_if_listed(module: str, name: str, no_safe_globals: None) -> None:
    theirs, ours = _both_files(f"\x80\x02c{module}\n{name}\n.".encode("latin1"))
    pair: Any = (getattr(sys if module == "sys" else os, name), f"{module}.{name}")
    with torch.serialization.safe_globals([pair]):
        with pytest.raises(pickle.UnpicklingError, match=f"{module}"):
            torch.load(theirs)
        with pytest.raises(aiotorchio.UnsafeObjectError, match=f"{module}.{name}"):
            aiotorchio.load(ours)
    ours.seek(0)
    with pytest.raises(aiotorchio.UnsafeObjectError, match=f"{module}.{name}"):
        aiotorchio.load(ours, safe_globals=[pair])


def test_a_listed_function_is_called(no_safe_globals: None) -> None:
    with torch.serialization.safe_globals([note]):
        assert by_torch(Evil()) == by_us(Evil()) == "ran"


# ------------------------------------------------------------------------- environment variables


@pytest.mark.parametrize("value", ["1", "y", "yes", "true", "TRUE", "Yes"])
def test_force_weights_only_load(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value)
    for load in (by_torch, by_us):
        with pytest.raises(pickle.UnpicklingError):
            load(Evil(), weights_only=False)
    assert Evil.ran == []
    for load in (by_torch, by_us):
        assert load({"a": 1}, weights_only=False) == {"a": 1}


@pytest.mark.parametrize("value", ["0", "", "no", "false", "2", "on"])
def test_force_weights_only_load_that_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value)
    for load in (by_torch, by_us):
        assert load(Evil(), weights_only=False) == "ran"


def test_force_weights_only_load_and_a_pickle_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(RuntimeError, match="pickle_module"):
        by_torch(Evil(), weights_only=False, pickle_module=pickle)
    with pytest.raises(ValueError, match=r"pickle_module.* TORCH_FORCE_WEIGHTS_ONLY_LOAD forces"):
        by_us(Evil(), weights_only=False, pickle_module=pickle)
    assert Evil.ran == []


def test_force_no_weights_only_load_is_not_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver's code decides whether a sender's code runs, not an environment variable."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        assert by_torch(Evil()) == "ran"
    Evil.ran.clear()
    with pytest.raises(aiotorchio.UnsafeObjectError):
        by_us(Evil())
    assert Evil.ran == []


def test_both_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(RuntimeError, match="Only one of"):
        by_torch(Evil(), weights_only=False)
    with pytest.raises(aiotorchio.UnsafeObjectError):
        by_us(Evil(), weights_only=False)
    assert Evil.ran == []


# --------------------------------------------------------------------------- modes of the process


def test_the_default_device_does_not_matter() -> None:
    """torch.load puts the sparse tensor on it."""
    obj = {
        "a": torch.ones(2),
        "s": torch.eye(2).to_sparse(),
        "p": torch.nn.Parameter(torch.ones(1)),
    }
    theirs, ours = torch_file(obj), our_file(obj)
    with torch.device("meta"):
        their_device = torch.load(theirs)["s"].device
        loaded = aiotorchio.load(ours)
    assert their_device.type == "meta"
    corpus.assert_same(loaded, obj)


def test_the_default_dtype_does_not_matter() -> None:
    obj = {"a": torch.ones(2), "s": torch.eye(2).to_sparse(), "f": 1.5}
    theirs, ours = torch_file(obj), our_file(obj)
    torch.set_default_dtype(torch.float64)
    try:
        corpus.assert_same(aiotorchio.load(ours), torch.load(theirs))
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_grad_does_not_matter() -> None:
    theirs, ours = torch_file(_state()), our_file(_state())
    with torch.no_grad():
        corpus.assert_same(aiotorchio.load(ours), torch.load(theirs))


def test_inference_mode_does_not_matter() -> None:
    """torch.load makes inference tensors, which cannot be trained."""
    theirs, ours = torch_file(torch.ones(2)), our_file(torch.ones(2))
    with torch.inference_mode():
        assert torch.load(theirs).is_inference()
        loaded = aiotorchio.load(ours)
    assert not loaded.is_inference()


# ------------------------------------------------------------------------------- arguments, files


def test_map_location_by_position() -> None:
    load: Any = aiotorchio.load
    assert torch.load(torch_file(torch.ones(2)), "meta").is_meta
    assert load(our_file(torch.ones(2)), "meta").is_meta


def test_pickle_module_and_protocol_by_position() -> None:
    save: Any = aiotorchio.save
    for module, file in ((torch.save, io.BytesIO()), (save, io.BytesIO())):
        module(Thing(), file, pickle, 4)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths(kind: Any, tmp_path: Path) -> None:
    for module, name in ((torch, "zürich.pt"), (aiotorchio, "zürich.aio")):
        path = kind(tmp_path / name)
        module.save(_state(), path)
        loaded = module.load(path)
        assert torch.equal(loaded["a"], _state()["a"])


def test_paths_of_bytes(tmp_path: Path) -> None:
    path: Any = os.fsencode(tmp_path / "state")
    with pytest.raises(AttributeError):
        torch.save(_state(), path)
    aiotorchio.save(_state(), path)
    corpus.assert_same(aiotorchio.load(path), _state())


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system has no /proc/self/fd")
def test_paths_of_descriptors(tmp_path: Path) -> None:
    for module in (torch, aiotorchio):
        with tempfile.TemporaryFile(dir=tmp_path) as file:
            module.save(_state(), f"/proc/self/fd/{file.fileno()}")
            corpus.assert_same(module.load(file), _state())
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe:
            with open(writing, "wb"):
                module.save(_state(), f"/dev/fd/{writing}")
            corpus.assert_same(module.load(io.BytesIO(pipe.read())), _state())
    assert os.listdir(tmp_path) == []


def test_other_names_of_a_file(tmp_path: Path) -> None:
    """torch writes into the old file; here a new one takes its place, as links and modes stay."""
    for module, seen in ((torch, "new"), (aiotorchio, "old")):
        path = tmp_path / module.__name__
        module.save("old", path)
        path.chmod(0o600)
        os.link(path, tmp_path / "hard")
        (tmp_path / "link").symlink_to(path)
        module.save("new", tmp_path / "link")
        assert module.load(path) == "new"
        assert module.load(tmp_path / "hard") == seen
        assert path.stat().st_mode & 0o777 == 0o600
        (tmp_path / "hard").unlink()
        (tmp_path / "link").unlink()


def test_a_file_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    synced: list[None] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(fsync(descriptor)))
    torch.save(_state(), tmp_path / "state")
    assert len(synced) == 0
    aiotorchio.save(_state(), tmp_path / "state")
    assert len(synced) == 2


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    loads: tuple[Callable[..., Any], ...] = (torch.load, aiotorchio.load)
    for load in loads:
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none")


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    aiotorchio.save([1], path)
    with pytest.raises(AttributeError):
        aiotorchio.save([2, lambda: None], path)
    assert aiotorchio.load(path) == [1]
    torch.save([1], path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        torch.save([2, lambda: None], path)
    with pytest.raises(RuntimeError):
        torch.load(path)
    assert os.listdir(tmp_path) == ["state"]


def test_an_empty_file() -> None:
    with pytest.raises(EOFError):
        torch.load(io.BytesIO())
    with pytest.raises(EOFError) as caught:
        aiotorchio.load(io.BytesIO())
    assert isinstance(caught.value, aiotorchio.TruncatedError)


def test_a_file_that_is_cut_short() -> None:
    theirs, ours = torch_file(_state()).getvalue(), our_file(_state()).getvalue()
    with pytest.raises(RuntimeError):
        torch.load(io.BytesIO(theirs[:-20]))
    with pytest.raises(aiotorchio.TruncatedError):
        aiotorchio.load(io.BytesIO(ours[:-20]))


def test_damage_is_noticed() -> None:
    """torch.load does not check the bytes."""
    tensor = torch.arange(8, dtype=torch.uint8)
    for save, torch_loads in ((torch_file, True), (our_file, False)):
        data = bytearray(save(tensor).getvalue())
        data[data.index(bytes(range(8))) + 3] = 77
        if torch_loads:
            assert torch.load(io.BytesIO(data))[3] == 77
        else:
            with pytest.raises(aiotorchio.ChecksumError):
                aiotorchio.load(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["gzip", "unbuffered", "temporary", "spooled", "bytes"])
def test_file_objects(kind: str, tmp_path: Path) -> None:
    for module in (torch, aiotorchio):
        path = tmp_path / module.__name__
        writer: Any
        reader: Any
        if kind == "gzip":
            with gzip.open(path, "wb") as writer:
                module.save(_state(), writer)
            reader = gzip.open(path, "rb")  # noqa: SIM115 - closed below
        elif kind == "unbuffered":
            with open(path, "wb", buffering=0) as writer:
                module.save(_state(), writer)
            reader = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        else:
            makers: dict[str, Callable[[], Any]] = {
                "temporary": tempfile.TemporaryFile,
                "spooled": tempfile.SpooledTemporaryFile,
                "bytes": io.BytesIO,
            }
            reader = makers[kind]()
            module.save(_state(), reader)
            reader.seek(0)
        with reader:
            loaded = module.load(reader)
        assert torch.equal(loaded["b"], _state()["b"])


class OnlyRead:
    """A file that cannot seek, like a pipe."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def test_a_file_that_cannot_seek() -> None:
    with pytest.raises(AttributeError, match="seekable"):
        torch.load(OnlyRead(torch_file(_state()).getvalue()))  # type: ignore[arg-type]
    corpus.assert_same(aiotorchio.load(OnlyRead(our_file(_state()).getvalue())), _state())


def test_several_objects_in_one_file() -> None:
    """torch's loads need the end of the file to be the end of the object."""
    file = io.BytesIO()
    file.write(b"head")
    for n in range(3):
        aiotorchio.save([torch.full((2,), n)], file)
    file.seek(4)
    assert [aiotorchio.load(file)[0].tolist() for _ in range(3)] == [[0, 0], [1, 1], [2, 2]]
    file = io.BytesIO()
    for n in range(3):
        torch.save([torch.full((2,), n)], file)
    file.seek(0)
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        [torch.load(file) for _ in range(3)]


@pytest.mark.parametrize("bad", [3, None, [b"name"]], ids=["int", "none", "list"])
def test_what_is_no_file(bad: Any) -> None:
    with pytest.raises(AttributeError):
        torch.save([1], bad)
    with pytest.raises(AttributeError):
        torch.load(bad)
    with pytest.raises(TypeError):
        aiotorchio.save([1], bad)
    with pytest.raises(TypeError):
        aiotorchio.load(bad)


# ------------------------------------------------------------------ options that are left out


def test_mmap_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "state.aio"
    aiotorchio.save(_state(), path)
    load: Any = aiotorchio.load
    with pytest.raises(TypeError, match="mmap"):
        load(path, mmap=True)
    with config.patch({"load.mmap": True}):
        corpus.assert_same(aiotorchio.load(path), _state())


def test_the_old_format_is_left_out() -> None:
    save: Any = aiotorchio.save
    with pytest.raises(TypeError, match="_use_new_zipfile_serialization"):
        save([1], io.BytesIO(), _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", ["zip", "old", "tar", "torchscript", "streaming"])
def test_files_of_torch_are_none_of_ours(kind: str) -> None:
    if kind == "zip":
        file = torch_file(_state())
    elif kind == "streaming":
        file = stream_file(_state())
    elif kind == "old":
        file = torch_file(_state(), _use_new_zipfile_serialization=False)
    elif kind == "tar":
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
        file.seek(0)
    else:
        file = io.BytesIO()
        writer: Any = torch._C.PyTorchFileWriter(file)
        writer.write_record("constants.pkl", b"\x80\x02).", 4)
        writer.write_end_of_file()
        file.seek(0)
    with pytest.raises(aiotorchio.ProtocolError, match="not an aiotorchio message"):
        aiotorchio.load(file)


def test_torch_does_not_load_our_messages() -> None:
    for weights_only in (True, False):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(our_file(_state()), weights_only=weights_only)


def test_safetensors_paths_are_no_other_format_here(tmp_path: Path) -> None:
    """torch.load chooses the format by the name; here the bytes decide."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert torch.load(path)["w"].tolist() == [1, 1]
    with pytest.raises(aiotorchio.ProtocolError):
        aiotorchio.load(path)
    aiotorchio.save({"w": torch.ones(2)}, path)
    assert aiotorchio.load(path)["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"save.compute_crc32": False},
        {"save.storage_alignment": 4096},
        {"save.use_pinned_memory_for_d2h": True},
        {"load.endianness": torch.serialization.LoadEndianness.BIG},
        {"load.calculate_storage_offsets": True},
    ],
    ids=lambda settings: next(iter(settings)).split(".")[1],
)
def test_settings_of_torch_change_no_message(settings: dict[str, Any]) -> None:
    before = aiotorchio.save(_state(), io.BytesIO())
    with config.patch(settings):
        file = io.BytesIO()
        summary = aiotorchio.save(_state(), file)
        file.seek(0)
        corpus.assert_same(aiotorchio.load(file), _state())
    assert (summary.nbytes, summary.payload_nbytes) == (before.nbytes, before.payload_nbytes)


def test_checksum_takes_the_place_of_the_crc32_options() -> None:
    tensor = torch.arange(8, dtype=torch.uint8)
    data = bytearray(our_file(tensor, checksum=False).getvalue())
    data[data.index(bytes(range(8))) + 3] = 77
    assert aiotorchio.load(io.BytesIO(data))[3] == 77


def test_the_sources_of_a_class_are_neither_sent_nor_compared() -> None:
    """Only torch's old format has them; ``test_a_whole_module`` shows that there is no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.serialization.SourceChangeWarning)
        by_us(torch.nn.Linear(2, 2), weights_only=False)
    assert b"def forward" not in our_file(torch.nn.Linear(2, 2)).getvalue()
    old = torch_file(torch.nn.Linear(2, 2), _use_new_zipfile_serialization=False)
    assert b"def forward" in old.getvalue()


def test_streaming_load_and_save_by_other_names() -> None:
    """Only the import line changes."""
    for weights_only in (True, False):
        corpus.assert_same(
            by_us(_state(), weights_only=weights_only),
            by_stream(_state(), weights_only=weights_only),
        )


# ------------------------------------------------------------------------- get_unsafe_globals


UNSAFE: dict[str, Callable[[], Any]] = {
    "class": lambda: Thing(torch.ones(2)),
    "classes": lambda: [Thing(), Other(), Thing(Other())],
    "function": lambda: Evil(),
    "exception": lambda: ValueError("a"),
    "module": lambda: torch.nn.Linear(2, 2),
    "system": lambda: os.system,
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "sparse": lambda: {"s": torch.eye(2).to_sparse(), "t": Thing()},
    "none": lambda: {None: torch.ones(2), "c": collections.Counter("ab")},
}


@pytest.mark.parametrize("name", UNSAFE)
def test_get_unsafe_globals(name: str) -> None:
    obj = UNSAFE[name]()
    theirs = torch.serialization.get_unsafe_globals_in_checkpoint(torch_file(obj))
    ours = api.get_unsafe_globals(our_file(obj))
    assert ours == sorted(theirs)
    assert Evil.ran == []


def test_get_unsafe_globals_leaves_out_what_is_allowed_here_alone() -> None:
    obj = [frozenset({1}), b"", Thing()]
    theirs = torch.serialization.get_unsafe_globals_in_checkpoint(torch_file(obj))
    path = f"{Thing.__module__}.Thing"
    assert sorted(theirs) == ["builtins.bytes", "builtins.frozenset", path]
    assert api.get_unsafe_globals(our_file(obj)) == [path]


def test_get_unsafe_globals_of_another_protocol() -> None:
    """The function knows only the opcodes of the default protocol, in torch and here."""
    with pytest.raises(pickle.UnpicklingError):
        torch.serialization.get_unsafe_globals_in_checkpoint(torch_file(Thing(), pickle_protocol=4))
    with pytest.raises(aiotorchio.UnsafeObjectError):
        api.get_unsafe_globals(our_file(Thing(), pickle_protocol=4))


def test_get_unsafe_globals_of_what_needs_no_pickle() -> None:
    assert torch.serialization.get_unsafe_globals_in_checkpoint(torch_file(_state())) == []
    assert api.get_unsafe_globals(our_file(_state())) == []


def test_get_unsafe_globals_of_a_path(tmp_path: Path) -> None:
    path = tmp_path / "thing.aio"
    aiotorchio.save(Thing(), path)
    expected = [f"{Thing.__module__}.Thing"]
    assert api.get_unsafe_globals(path) == expected
    assert api.get_unsafe_globals(str(path)) == expected


def test_get_unsafe_globals_knows_those_that_were_added(no_safe_globals: None) -> None:
    torch.serialization.add_safe_globals([Thing])
    for names in (
        torch.serialization.get_unsafe_globals_in_checkpoint(torch_file([Thing(), Other()])),
        api.get_unsafe_globals(our_file([Thing(), Other()])),
    ):
        assert names == [f"{Other.__module__}.Other"]


def test_get_unsafe_globals_of_another_file() -> None:
    with pytest.raises(ValueError, match=r"torch\.save"):
        torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(b"x" * 100))
    with pytest.raises(aiotorchio.ProtocolError):
        api.get_unsafe_globals(io.BytesIO(b"x" * 100))


def test_get_unsafe_globals_of_a_message_that_is_loaded_then() -> None:
    async def main() -> None:
        reader = aiotorchio.StreamReader(aiotorchio.iter_bytes(Thing(torch.ones(2))))
        async with reader.open() as opened:
            message: Any = opened
            names = await message.get_unsafe_globals()
            assert names == [f"{Thing.__module__}.Thing"]
            assert await message.get_unsafe_globals() == names
            loaded = await message.load(safe_globals=[Thing])
        assert loaded.value.tolist() == [1, 1]

    asyncio.run(main())


def test_get_unsafe_globals_of_a_message_that_needs_no_pickle() -> None:
    async def main() -> None:
        reader = aiotorchio.StreamReader(aiotorchio.iter_bytes(_state()))
        async with reader.open() as opened:
            message: Any = opened
            assert await message.get_unsafe_globals() == []
            corpus.assert_same(await message.load(), _state())

    asyncio.run(main())


def test_get_unsafe_globals_of_a_message_that_is_refused_then() -> None:
    """The caller can decide after it has seen them; nothing of the pickle was built before."""

    async def main() -> None:
        reader = aiotorchio.StreamReader(aiotorchio.iter_bytes([Evil(), torch.ones(2)]))
        async with reader.open() as opened:
            message: Any = opened
            assert await message.get_unsafe_globals() == [f"{note.__module__}.note"]
            with pytest.raises(aiotorchio.UnsafeObjectError):
                await message.load()

    asyncio.run(main())
    assert Evil.ran == []
