"""Graph networks of torch_geometric, with the library's lazy layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zoo.ways import Model, cases, check

geometric = pytest.importorskip("torch_geometric.nn")

EDGES = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
KINDS = [("a", "to", "b"), ("b", "back", "a")]


def gcn() -> Any:
    return geometric.GCN(in_channels=4, hidden_channels=8, num_layers=2, out_channels=3)


def lazy() -> Any:
    return geometric.HeteroConv({kind: geometric.SAGEConv((-1, -1), 3) for kind in KINDS})


def used() -> Any:
    model = lazy()
    run_typed(model)
    return model


@torch.no_grad()
def run(model: Any) -> Any:
    return model(torch.linspace(-1, 1, 12).view(3, 4), EDGES)


@torch.no_grad()
def run_typed(model: Any) -> Any:
    inputs = {"a": torch.linspace(-1, 1, 12).view(3, 4), "b": torch.linspace(-1, 2, 15).view(3, 5)}
    return model(inputs, dict.fromkeys(KINDS, EDGES))


MODELS = {
    "GCN": Model(gcn, run),
    "typed": Model(used, run_typed),
    "typed, lazy": Model(used, run_typed, receiver=lazy),
}


@cases(MODELS)
def test_a_graph_network(model: Model, way: str) -> None:
    check(model, way)
