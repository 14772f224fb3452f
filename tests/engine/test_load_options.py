"""The options of a load: defaults, checks, and the signatures that must name each of them."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.serialization import skip_data

import aiotorchio
from aiotorchio.engine.load_options import IterateOptions, LoadOptions, check_lock

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "load_from_stream": aiotorchio.load_from_stream,
    "load": aiotorchio.load,
    "StreamReader.load": aiotorchio.StreamReader.load,
    "Message.load": aiotorchio.Message.load,
}
# Parameters that are no options of the load.
OTHERS = {"self", "stream", "file", "limits"}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_every_option(name: str) -> None:
    found = {
        each.name: (each.default, each.annotation) for each in parameters(FUNCTIONS[name]).values()
    }
    options = {
        each.name: (each.default, each.type)
        for each in dataclasses.fields(LoadOptions)
        if each.init
    }
    assert {name: each for name, each in found.items() if name not in OTHERS} == options


def test_iterating_has_each_of_its_options() -> None:
    options = {each.name for each in dataclasses.fields(IterateOptions) if each.init}
    for function in (aiotorchio.Message.iterate, aiotorchio.Message.tensors_sync):
        assert parameters(function).keys() - {"self"} == options


def test_the_defaults() -> None:
    options = LoadOptions()
    assert options.restricted is True and options.pickle_module is pickle
    assert options.targets is None and options.data_free is None
    assert options.allowed_globals == tuple(torch.serialization.get_safe_globals())


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoadOptions().strict = False  # type: ignore[misc]  # it is frozen


@pytest.mark.parametrize("option", ["weights_only", "allow_pickle", "strict", "cast", "staged"])
def test_a_switch_is_a_bool(option: str) -> None:
    with pytest.raises(TypeError, match=f"^{option} must be True or False, not 1$"):
        LoadOptions(**{option: 1})  # type: ignore[arg-type]  # as tested


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"staged": True}, "without into"),
        ({"lock": threading.Lock(), "into": {}}, "without staged=True"),
        ({"pickle_module": pickle}, "pickle_module"),
    ],
)
def test_an_option_without_effect_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoadOptions(**options)


def test_into_is_refused_inside_of_skip_data() -> None:
    with skip_data(), pytest.raises(ValueError, match="skip_data"):
        LoadOptions(into={"a": torch.ones(1)})


def test_an_iterator_of_names_is_read_once() -> None:
    options = LoadOptions(select=iter(["a", "b"]))
    assert options.select == ("a", "b")
    for select in (1, [1]):
        with pytest.raises(TypeError, match="select must be names"):
            LoadOptions(select=select)  # type: ignore[arg-type]  # as tested


def test_the_environment_can_force_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert LoadOptions(weights_only=False).restricted is True


def test_the_targets_are_looked_through_once() -> None:
    tensor = torch.ones(1)
    targets = LoadOptions(into={"a": {"b": tensor}}, staged=True).targets
    assert targets is not None and targets.staged and targets.tensors["a.b"] is tensor


def test_a_lock_is_of_the_kind_of_the_call() -> None:
    check_lock(threading.Lock(), "blocking")
    check_lock(asyncio.Lock(), "async")
    for lock in (threading.Lock(), asyncio.Lock):
        with pytest.raises(TypeError, match="async context manager"):
            check_lock(lock, "async")
    with pytest.raises(TypeError, match=r"threading\.Lock"):
        check_lock(asyncio.Lock(), "blocking")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_option_that_does_not_exist_is_refused_in_the_name_of_the_call(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'targets'"
    ):
        FUNCTIONS[name](targets=None)
