"""Metrics of torchmetrics: persistent states are shown as copies, and as lists of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.ways import Model, cases, check

metrics = pytest.importorskip("torchmetrics")


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(20, 3).softmax(-1), torch.randint(3, (20,))


class Classifier(nn.Module):
    """A model with a metric of its accuracy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.accuracy = metrics.classification.MulticlassAccuracy(3)
        self.loss = metrics.MeanMetric()
        for metric in (self.accuracy, self.loss):
            metric.persistent(True)
        self.accuracy.update(*data())
        self.loss.update(torch.rand(5))


class Collection(nn.Module):
    """Metrics that share their states with each other, and one that keeps all inputs."""

    def __init__(self) -> None:
        super().__init__()
        options = {"task": "multiclass", "num_classes": 3}
        self.metrics = metrics.MetricCollection(
            {
                "accuracy": metrics.Accuracy(**options),
                "precision": metrics.Precision(**options),
                "all": metrics.AUROC(**options),
            }
        )
        self.metrics.persistent(True)
        for _ in range(2):
            self.metrics.update(*data())


def results(model: Any) -> Any:
    found = [each for each in model.modules() if isinstance(each, metrics.Metric)]
    # torchmetrics keeps the result of the last compute, also across load_state_dict.
    for metric in found:
        metric._computed = None
    return [metric.compute() for metric in found]


MODELS = {
    "in a model": Model(Classifier, results),
    "collection": Model(Collection, results),
}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@cases(MODELS)
def test_metrics(model: Model, way: str) -> None:
    check(model, way)
