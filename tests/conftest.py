"""Fixtures for every test, and settings of the whole run."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
import uvloop
from hypothesis import HealthCheck, settings

from tests.support import tiers
from tests.support.first_error import keep_first_error

ASYNC_WORLDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many random inputs there are, before tests are imported."""
    tiers.set_tier(config.option.markexpr)
    # The same examples each time, on slow machines too; fuzz/ searches for new ones.
    settings.register_profile(
        "tests",
        max_examples=tiers.examples(100),
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("tests")
    if hasattr(config, "workerinput"):
        # Threads of torch that wait for their turn take time from the other workers.
        torch.set_num_threads(1)


# This runs after pytest has made the cases.
@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leave out the cases of the full tier, except where tests are asked for by their names."""
    config = metafunc.config
    if config.option.markexpr == tiers.FAST and not any("::" in arg for arg in config.args):
        tiers.leave_out_full(metafunc)


# This runs before pytest deselects by marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of the full tier."""
    tiers.mark_tiers(items)


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from permanent objects, thousands of tests among them.

    Tests that look for leaks collect some thousand times: 0.2 s each without this.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any],
) -> Generator[None, object, object]:
    """Report a broken shared fixture once."""
    try:
        return (yield)
    except Exception as error:
        keep_first_error(fixturedef, error)
        raise


@pytest.fixture(params=ASYNC_WORLDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Async tests marked ``anyio`` run on every event loop."""
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        # Without devices ``torch.manual_seed`` formats the stack for each kind of them, and each
        # test takes 3 ms more.
        torch.default_generator.manual_seed(0)


@pytest.fixture
def no_safe_globals() -> Iterator[None]:
    """Empty torch's list of safe globals, to which packages such as tensordict add their own."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)
