"""Tensors in memory-mapped files arrive as ordinary tensors, and no file name is sent.

A small module copies the classes of tensordict; tests/zoo uses the real package.
"""

from __future__ import annotations

import copyreg
import io
import sys
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.graph.flatten import flatten
from tests.support.tensor_layouts import encoded


class Mapped(torch.Tensor):
    """A tensor that pickles as the name of its file."""

    file: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        return open_file, (self.file,)


def open_file(name: str) -> Mapped:
    raise AssertionError(f"{name} was opened")


class TensorDict(MutableMapping[str, Any]):
    """A mapping that records the folder of its files."""

    def __init__(self, items: dict[str, Any], folder: str | None = None) -> None:
        self._tensordict, self._is_memmap = items, folder is not None
        self._memmap_prefix = folder and Path(folder)
        self._is_locked = self._is_memmap

    def __getitem__(self, key: str) -> Any:
        return self._tensordict[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._tensordict[key] = value

    def __delitem__(self, key: str) -> None:
        del self._tensordict[key]

    def __iter__(self) -> Any:
        return iter(self._tensordict)

    def __len__(self) -> int:
        return len(self._tensordict)


class Registered(TensorDict):
    """A mapping with a reducing function in ``copyreg``, as tensordict's classes have."""


def make(kind: Any, state: dict[str, Any]) -> Any:
    made = kind.__new__(kind)
    vars(made).update(state)
    return made


copyreg.pickle(Registered, lambda value: (make, (Registered, dict(vars(value)))))


class Entry:
    """An entry that holds data other than a tensor."""

    def __init__(self, data: str, **notes: Any) -> None:
        self.non_tensordict: dict[str, Any] = {"data": data, "_metadata": notes}


@pytest.fixture(autouse=True)
def tensordict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install these classes as modules with tensordict's names."""
    for module, name, kind in (
        ("tensordict.memmap", "MemoryMappedTensor", Mapped),
        ("tensordict.base", "TensorDictBase", TensorDict),
        ("tensordict.tensorclass", "NonTensorDataBase", Entry),
    ):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[module], name, kind, raising=False)


SECRET = "a-secret-folder"


def mapped(tensor: torch.Tensor) -> Any:
    made = tensor.as_subclass(Mapped)
    made.file = f"/{SECRET}/file"
    return made


def received(obj: Any, **options: Any) -> Any:
    data = encoded(obj)
    assert SECRET.encode() not in data
    trusted = [make, TensorDict, Registered, Entry]
    return aiotorchio.load(io.BytesIO(data), safe_globals=trusted, **options)


def test_numbers_travel_and_no_name_of_a_file() -> None:
    whole = mapped(torch.arange(12.0).view(3, 4))
    part = mapped(whole.as_subclass(torch.Tensor)[1:, ::2])
    sent = {"whole": whole, "part": part, "again": [whole]}
    parts = flatten(sent, chunk_size=4096, metadata={}, producer="tests")
    assert parts.header.codec == "tree"
    # The storage is not a copy.
    assert [each.data_ptr() for each in parts.storages] == [whole.data_ptr()]
    loaded = received(sent)
    assert type(loaded["whole"]) is type(loaded["part"]) is torch.Tensor
    assert torch.equal(loaded["whole"], torch.arange(12.0).view(3, 4))
    assert torch.equal(loaded["part"], torch.arange(12.0).view(3, 4)[1:, ::2])
    assert loaded["again"][0] is loaded["whole"]


@pytest.mark.parametrize("kind", [TensorDict, Registered])
def test_a_mapping_is_received_in_memory(kind: type[TensorDict]) -> None:
    inner = kind({"c": mapped(torch.ones(2))}, f"/{SECRET}/b")
    entry = Entry("text", memmap_prefix=Path(f"/{SECRET}"), memmaped=True, other=1)
    sent = kind({"a": mapped(torch.arange(3)), "b": inner, "e": entry}, f"/{SECRET}")
    loaded = received(sent)
    assert type(loaded) is type(loaded["b"]) is kind
    for each in (loaded, loaded["b"]):
        assert (each._is_memmap, each._memmap_prefix, each._is_locked) == (False, None, False)
    assert torch.equal(loaded["a"], torch.arange(3)) and torch.equal(
        loaded["b"]["c"], torch.ones(2)
    )
    assert loaded["e"].non_tensordict == {"data": "text", "_metadata": {"other": 1}}
    # The object of the sender did not change.
    assert sent._memmap_prefix == Path(f"/{SECRET}") and sent._is_locked
    assert entry.non_tensordict["_metadata"]["memmaped"]


def test_a_mapping_in_memory_stays_as_it_is() -> None:
    sent = Registered({"a": torch.ones(2)})
    sent._is_locked = True
    assert received(sent)._is_locked
    assert received(Entry("text")).non_tensordict == {"data": "text", "_metadata": {}}


def test_such_a_tensor_is_received_into() -> None:
    into: dict[str, Any] = {"a": mapped(torch.zeros(3)), "b": torch.zeros(2)}
    sent = Registered({"a": mapped(torch.arange(3.0)), "b": mapped(torch.ones(2))}, f"/{SECRET}")
    loaded = received(sent, into=into)
    assert loaded["a"] is into["a"] and into["a"].tolist() == [0, 1, 2]
    assert into["b"].tolist() == [1, 1]


def test_other_layouts_travel_as_numbers() -> None:
    sent = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])
    loaded = received({"n": mapped(sent)})["n"]
    assert loaded.is_nested and [part.tolist() for part in loaded.unbind()] == [[1, 1], [0, 0, 0]]
