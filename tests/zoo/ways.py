"""The harness: a library's model, received in every way, computes as after ``load_state_dict``.

In: a ``Model`` and a way. A way gives exactly the state and the outputs that the library's own load
gives, twice in a row, or refuses before the first byte with an error that names the entry and
leaves the receiver as it was. There is no third outcome.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import MismatchError
from tests.support.tensor_layouts import Pieces, encoded

__all__ = ["INTO", "WAYS", "Model", "bits", "cases", "check"]

WAYS = ["load", "into", "staged", "double", "iterate"]
INTO = ["into", "staged", "double"]


def load_state_dict(module: Any, state: Any) -> Any:
    """Load as torch documents it."""
    module.load_state_dict(state)
    return module


@dataclass(frozen=True)
class Model:
    """A model of a library.

    Attributes:
        make: Makes a model, with other numbers each time.
        run: Computes the outputs for a fixed input.
        load: Loads a state into a model, or makes another model of it; the reference.
        state: Returns the state to send.
        receiver: Makes a model to receive into, if it differs from the sender.
        destination: Returns the value of ``into`` for a model.
        messages: How many messages are received, one after the other, with the outputs after each.
        safe_globals: The classes that a receiver trusts.
        refused: By way: a pattern of the error.
        xfail: By way: why the way neither works nor refuses yet.
    """

    make: Callable[[], Any]
    run: Callable[[Any], Any]
    load: Callable[[Any, Any], Any] = load_state_dict
    state: Callable[[Any], Any] = nn.Module.state_dict
    destination: Callable[[Any], Any] = lambda module: module
    receiver: Callable[[], Any] | None = None
    messages: int = 2
    safe_globals: Iterable[Any] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    xfail: Mapping[str, str] = field(default_factory=dict)


def cases(models: Mapping[str, Model]) -> pytest.MarkDecorator:
    """Each model in each way."""
    return pytest.mark.parametrize(
        ("model", "way"),
        [
            pytest.param(
                model,
                way,
                id=f"{name}-{way}",
                marks=[pytest.mark.xfail(strict=True, reason=model.xfail[way])]
                if way in model.xfail
                else [],
            )
            for name, model in models.items()
            for way in WAYS
        ],
    )


def bits(value: Any) -> Any:
    """All numbers below a value, in a form that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        if torch.nn.parameter.is_lazy(value):
            return "lazy"
        if hasattr(value, "__tensor_flatten__"):
            names, context = value.__tensor_flatten__()
            parts = {name: bits(getattr(value, name)) for name in names}
            return type(value).__name__, repr(context), parts
        plain = value.detach().contiguous().flatten()
        return str(value.dtype), tuple(value.shape), plain.view(torch.uint8).tolist()
    if isinstance(value, Mapping):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def filled(state: Any, tensors: Mapping[str, torch.Tensor], path: str = "") -> Any:
    """The same state, with the received tensors under its own paths.

    Raises:
        KeyError: A tensor was not received.
    """
    if isinstance(state, torch.Tensor):
        return tensors[path]
    if isinstance(state, Mapping):
        prefix = path + "." if path else ""
        result: Any = copy.copy(state)
        result.update({key: filled(item, tensors, f"{prefix}{key}") for key, item in state.items()})
        return result
    if isinstance(state, list):
        return [filled(item, tensors, f"{path}.{n}") for n, item in enumerate(state)]
    return state


async def receive(model: Model, way: str, receiver: Any, into: Any, state: Any) -> Any:
    """Receive a state in one of the ways; return the model that has it."""
    stream = Pieces(encoded(state), 1000)
    if way == "iterate":
        async with aiotorchio.StreamReader(stream).open() as message:
            tensors = {name: tensor async for name, tensor in message}
        return model.load(receiver, filled(state, tensors))
    options: dict[str, Any] = {"safe_globals": model.safe_globals}
    if way == "load":
        return model.load(receiver, await aiotorchio.load_from_stream(stream, **options))
    await aiotorchio.load_from_stream(stream, into=into, staged=way == "staged", **options)
    return receiver


def check(model: Model, way: str) -> None:
    """Receive states, one after the other, or check the refusal."""
    make_receiver = model.receiver or model.make
    receiver = make_receiver()
    into = model.destination(receiver)
    into = aiotorchio.DoubleBuffer(into) if way == "double" else into
    for _ in range(model.messages):
        sender = model.make()
        state = model.state(sender)
        before = bits(model.state(receiver))
        if way in model.refused:
            with pytest.raises(MismatchError, match=model.refused[way]) as caught:
                asyncio.run(receive(model, way, receiver, into, state))
            assert caught.value.entry == "header"
            assert bits(model.state(receiver)) == before
            continue
        # The library may keep the state that it gets.
        expected = model.load(make_receiver(), copy.deepcopy(state))
        assert bits(state) != before
        receiver = asyncio.run(receive(model, way, receiver, into, state))
        assert bits(model.state(receiver)) == bits(model.state(expected)) == bits(state)
        assert bits(model.run(receiver)) == bits(model.run(expected)) == bits(model.run(sender))
