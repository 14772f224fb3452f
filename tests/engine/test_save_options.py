"""The options of a save: one place for all public functions."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio import TensorSpec
from aiotorchio.engine.save_options import SaveOptions

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "save_to_stream": aiotorchio.save_to_stream,
    "save": aiotorchio.save,
    "StreamWriter.save": aiotorchio.StreamWriter.save,
    "iter_bytes": aiotorchio.iter_bytes,
}
# Parameters that are no options of the message.
OTHERS = {"self", "obj", "stream", "file", "limits", "durable"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_every_option(name: str) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    options = {each.name: (each.default, each.annotation) for each in parameters}
    fields = {
        each.name: (each.default, each.type)
        for each in dataclasses.fields(SaveOptions)
        if each.init
    }
    assert {key: value for key, value in options.items() if key not in OTHERS} == fields


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_option_that_does_not_exist_is_an_error_of_the_function(name: str) -> None:
    match = rf"^{name.replace('.', '[.]')}\(\) got an unexpected keyword argument 'mmap'"
    with pytest.raises(TypeError, match=match):
        FUNCTIONS[name](*[None] * 2, mmap=True)


def test_every_option_has_a_default() -> None:
    options = SaveOptions()
    assert options.pickle_module is pickle
    assert options.header_metadata == {}
    assert options.tensor_specs is None and options.skip is None


def test_later_changes_of_the_arguments_do_not_count() -> None:
    metadata = {"a": "b"}
    specs: dict[str, TensorSpec | torch.Tensor] = {"w": torch.zeros(2, device="meta")}
    options = SaveOptions(metadata=metadata, specs=specs)
    metadata.clear()
    specs.clear()
    assert options.header_metadata == {"a": "b"}
    assert options.tensor_specs == {"w": TensorSpec((2,), torch.float32)}


def test_skip_data_counts_as_it_is_when_the_options_are_made() -> None:
    with torch.serialization.skip_data() as _:
        options = SaveOptions()
        with pytest.raises(ValueError, match="skip_data cannot be combined with specs"):
            SaveOptions(specs={})
    assert options.skip is not None


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SaveOptions().checksum = False  # type: ignore[misc]  # it is frozen


def test_of_call_picks_the_options_among_the_arguments() -> None:
    arguments = {each.name: each.default for each in dataclasses.fields(SaveOptions) if each.init}
    options = SaveOptions.of_call(arguments | {"compact": True, "obj": 1, "limits": None})
    assert options == SaveOptions(compact=True)
