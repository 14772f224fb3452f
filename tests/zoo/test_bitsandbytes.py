"""Quantized layers of bitsandbytes, on a CPU: 8 bits, and 4 bits with scales that are quantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import MismatchError
from tests.support.tensor_layouts import encoded, load
from tests.zoo.ways import INTO, Model, bits, cases, check

layers = pytest.importorskip("bitsandbytes.nn")


@torch.no_grad()
def run(model: Any) -> Any:
    return model(torch.linspace(-1, 1, 128).view(2, 64))


def eight_bits() -> Any:
    make = layers.Linear8bitLt
    model = nn.Sequential(
        make(64, 32, has_fp16_weights=False), make(32, 64, has_fp16_weights=False)
    )
    # The move to a device quantizes the model.
    return model.to("cpu")


def used() -> Any:
    model = eight_bits()
    run(model)
    return model


def four_bits() -> Any:
    return nn.Sequential(nn.Linear(64, 64), layers.Linear4bit(64, 32, quant_type="nf4")).to("cpu")


def load_four_bits(model: Any, state: Any) -> Any:
    """Load as transformers does: load_state_dict refuses the state that these layers show."""
    quantized = {name: state[name] for name in state if name.startswith("1.weight.")}
    model[1].weight = layers.Params4bit.from_prequantized(
        state["1.weight"], quantized, device="cpu"
    )
    rest = {name: each for name, each in state.items() if name not in quantized}
    model.load_state_dict(rest, strict=False)
    return model


NOBODY = r"1\.weight\.absmax: state_dict\(\) of Linear4bit makes this entry"

MODELS = {
    # A used layer loads no other state: see ``test_layers_that_were_used``.
    "8 bits": Model(eight_bits, run, messages=1),
    "4 bits": Model(four_bits, run, load_four_bits, refused=dict.fromkeys(INTO, NOBODY)),
}


@cases(MODELS)
def test_a_quantized_model(model: Model, way: str) -> None:
    check(model, way)


@pytest.mark.parametrize("way", INTO)
def test_layers_that_were_used(way: str) -> None:
    """load_state_dict overwrites their weight and raises; into raises, and keeps it if staged."""
    receiver, sender = eight_bits(), eight_bits()
    run(receiver)
    with pytest.raises(RuntimeError, match="non-quantized Linear8bitLt is not supported"):
        copy.deepcopy(receiver).load_state_dict(sender.state_dict())
    before, outputs = bits(receiver.state_dict()), bits(run(receiver))
    into = aiotorchio.DoubleBuffer(receiver) if way == "double" else receiver
    with pytest.raises(MismatchError, match=r"0 \(Linear8bitLt\) did not load"):
        load(encoded(sender.state_dict()), into=into, staged=way == "staged")
    if way != "into":
        assert bits(receiver.state_dict()) == before and bits(run(receiver)) == outputs
