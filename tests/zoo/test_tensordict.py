"""TensorDicts: as a state, as parameters of a module, and in files that are mapped into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.ways import Model, cases, check

tensordict = pytest.importorskip("tensordict")

_folders: list[Path] = []


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[None]:
    """The folder of memory-mapped tensors."""
    _folders.append(tmp_path)
    yield
    _folders.pop()


def plain() -> Any:
    return tensordict.TensorDict(
        {"a": torch.randn(3, 2), "b": {"c": torch.randint(100, (3,))}}, batch_size=[3]
    )


def mapped() -> Any:
    return plain().memmap(tempfile.mkdtemp(dir=_folders[-1]))


def numbers(state: Any) -> Any:
    return [state["a"].sum(), state["b", "c"] * 2]


def itself(state: Any) -> Any:
    return state


def flat(state: Any) -> Any:
    return state.state_dict()


def update(state: Any, received: Any) -> Any:
    return state.update_(received)


class Scaled(nn.Module):
    """A module with its parameters in a TensorDict."""

    def __init__(self) -> None:
        super().__init__()
        self.params = tensordict.TensorDictParams(plain().exclude(("b", "c")))
        self.params["b"] = {"scale": nn.Parameter(torch.randn(3))}

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        result: torch.Tensor = self.params["a"].sum(-1) * self.params["b", "scale"]
        return result


def parameters() -> Any:
    return tensordict.TensorDictParams(
        tensordict.TensorDict({"a": torch.randn(3), "b": {"c": torch.randn(2)}})
    )


MODELS = {
    "state_dict": Model(plain, numbers, state=flat),
    "TensorDict": Model(plain, numbers, update, state=itself),
    "memory-mapped, state_dict": Model(mapped, numbers, state=flat),
    "memory-mapped": Model(mapped, numbers, update, state=itself),
    "in a module": Model(Scaled, lambda model: model()),
    "TensorDictParams": Model(parameters, numbers, state=flat),
}


@cases(MODELS)
def test_a_tensordict(model: Model, way: str) -> None:
    check(model, way)


def test_no_file_name_travels() -> None:
    """The state dict of a memory-mapped TensorDict has tensors without a file."""
    assert not any(vars(tensor) for tensor in mapped().state_dict().values())
