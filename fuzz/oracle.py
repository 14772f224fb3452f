"""The allowed outcomes of hostile bytes: an object, or an ``AiotorchioError`` with a place."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from aiotorchio.errors import AiotorchioError

__all__ = ["Find", "MutateBytes", "check_refusal", "choose", "no_flood"]

MutateBytes = Callable[[bytes, int], bytes]
"""Changes bytes at random, to at most so many: the engine's own mutation."""

# Growth of memory beyond this is a flood: the least budget of any skeleton is 64 MiB.
_FLOOD = 192 * 2**20
# Texts of errors are cut at 10,000 characters; aiotorchio's own texts are shorter.
_SHOWN_MAX = 9_000
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Find(AssertionError):
    """A violation of a rule that must always hold."""


def check_refusal(error: AiotorchioError, start: int, size: int) -> None:
    """Check that an error has a text, and a place within the data.

    Args:
        error: The error as it was raised.
        start: The first byte of the data in the message.
        size: The size of the data, in bytes.
    """
    if error.entry is None or error.offset is None:
        raise Find(f"an error without a place: {error!r}") from error
    if len(error.message) > _SHOWN_MAX:
        raise Find(f"an error shows what it is about at any length: {error.message[:1000]}")
    if not start <= error.offset <= start + size:
        raise Find(f"an error at byte {error.offset} of {size}: {error!r}") from error


@contextmanager
def no_flood() -> Iterator[None]:
    """Check that the peak memory of this process grows only a little within the block."""
    before = _reset_peak()
    yield
    grown = _peak() - before
    if grown > _FLOOD:
        raise Find(f"{grown} bytes of memory for one input")


def _reset_peak() -> int:
    """Reset the peak to the resident memory, and return it.

    On other systems than Linux the peak never falls.
    """
    if _RESET.exists():
        _RESET.write_text("5")
    return _peak()


def _peak() -> int:
    if _RESET.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose(random: Random, *options: tuple[int, Callable[[], Any]]) -> Any:
    """Call one of several functions, each as often as its weight says."""
    weights: Sequence[int] = [weight for weight, _ in options]
    return random.choices([option for _, option in options], weights)[0]()
