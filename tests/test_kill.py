"""After a sender is killed at any moment, targets have all old or all new values."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KILLS = 40

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture(scope="module")
def kill_sender() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # The processes of the senders import the module by its name.
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("kill_sender")
        # All tests fork the senders from one process, because importing torch takes seconds.
        with module.Senders() as senders:
            patch.setattr(module, "Senders", lambda: contextlib.nullcontext(senders))
            yield module


@pytest.mark.parametrize("way", ["staged", "double"])
def test_a_killed_sender_leaves_all_old_or_all_new(kill_sender: Any, way: str) -> None:
    kills = list(kill_sender.kill_senders(KILLS, way, seed=0))
    counts = Counter(kill.found.value for kill in kills)
    assert counts["old"] + counts["new"] == len(kills) == KILLS, counts
    # The seed determines the moments: some before the end of the message, some after it.
    assert counts["old"] > KILLS / 2
    assert counts["new"] > 0
    # Far from the end, and after the load, only one outcome is possible.
    for kill in kills:
        if kill.moment < 0.5:
            assert (kill.found.value, kill.error) == ("old", "TruncatedError")
        if kill.moment > 1:
            assert (kill.found.value, kill.error) == ("new", "")


def test_a_half_applied_state_would_be_seen(kill_sender: Any) -> None:
    kills = list(kill_sender.kill_senders(10, "in place", seed=0))
    assert Counter(kill.found.value for kill in kills)["half-applied"] > 5
