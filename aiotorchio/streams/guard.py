"""One call at a time on a stream, and none after one that stopped inside a message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from aiotorchio.errors import StreamBusy, StreamPoisoned
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.blocking import BlockingStream

__all__ = ["exclusive"]

Direction = Literal["save", "load"]
Driver = TypeVar("Driver", Source, Sink, BlockingStream)


@dataclass(slots=True)
class _State:
    # A lock for the blocking twins, which may come from several threads.
    busy: Lock = field(default_factory=Lock)
    poison: str | None = None


_states: WeakKeyDictionary[Any, dict[Direction, _State]] = WeakKeyDictionary()


def _state(stream: Any, direction: Direction) -> _State:
    try:
        states = _states.setdefault(stream, {})
    except TypeError:  # streams that cannot be hashed or weakly referenced are not watched
        return _State()
    return states.setdefault(direction, _State())


@contextmanager
def exclusive(
    stream: Any, direction: Direction, open_driver: Callable[[Any], Driver]
) -> Iterator[Driver]:
    """Use a stream for one message.

    Args:
        stream: The caller's stream.
        direction: A stream may be saved to and loaded from at once, but not twice the same.
        open_driver: Makes the driver.

    Raises:
        StreamBusy: Another call is using the stream in this direction.
        StreamPoisoned: Another call stopped inside a message.
    """
    state = _state(stream, direction)
    if not state.busy.acquire(blocking=False):
        raise StreamBusy(f"another {direction} is using this stream")
    try:
        if state.poison is not None:
            raise StreamPoisoned(
                f"an earlier {direction} stopped inside a message: {state.poison}; "
                f"close this stream and open another"
            )
        driver = open_driver(stream)
        try:
            yield driver
            if driver.in_message:
                state.poison = "it was left there"
        except BaseException as error:
            if driver.in_message:
                state.poison = f"{type(error).__name__}: {error}" if str(error) else repr(error)
                # At once: whoever is at the other end has nothing to wait for any more.
                driver.abort()
            raise
        finally:
            driver.release()
    finally:
        state.busy.release()
