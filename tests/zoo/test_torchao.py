"""Layers that torchao quantized: weights are wrapper subclasses of several tensors.

Its Int4WeightOnlyConfig needs another package; IntxWeightOnlyConfig has four bits on any CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.ways import Model, cases, check

quantization = pytest.importorskip("torchao.quantization")

# torch's annotations lack it.
INT4: torch.dtype = vars(torch)["int4"]


def quantized(config: Any) -> Any:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)).to(torch.bfloat16)
    quantization.quantize_(model, config)
    return model


def eight_bits() -> Any:
    return quantized(quantization.Int8WeightOnlyConfig())


def four_bits() -> Any:
    groups = quantization.PerGroup(32)
    return quantized(quantization.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=groups))


@torch.no_grad()
def run(model: Any) -> Any:
    return model(torch.linspace(-1, 1, 128, dtype=torch.bfloat16).view(2, 64))


MODELS = {
    "int8": Model(eight_bits, run),
    "int4": Model(four_bits, run),
}


@cases(MODELS)
def test_a_quantized_model(model: Model, way: str) -> None:
    check(model, way)
