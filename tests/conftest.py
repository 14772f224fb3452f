"""Fixtures that every test can use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import uvloop
from hypothesis import HealthCheck, settings

# The same examples each time, however slow the machine is; new ones are looked for by fuzz/.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("tests")

ASYNC_WORLDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


@pytest.fixture(params=ASYNC_WORLDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Async tests marked ``anyio`` run on every event loop."""
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers."""
    torch.manual_seed(0)
