"""One call at a time on a stream, and none after one that stopped inside a message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from weakref import ref

from aiotorchio.errors import StreamBusy, StreamPoisoned
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.blocking_sockets import is_one_way
from aiotorchio.streams.identity import IdentityTable

__all__ = ["exclusive"]

Direction = Literal["save", "load"]
Adapter = TypeVar("Adapter", Source, Sink, BlockingStream)


class _Call:
    """One that uses a stream; alive as long as its frame is."""


@dataclass(slots=True)
class _State:
    # Of the calls that are alive, the first has the stream. Weak references: a call that is
    # interrupted while it cleans up is over, too. No lock: an interrupt could leave it held, and
    # appending is atomic.
    calls: list[ref[_Call]] = field(default_factory=list)
    poison: str | None = None


_INTERRUPTED = "it was interrupted"
_states: IdentityTable[dict[Direction, _State]] = IdentityTable()


def _state(stream: Any, direction: Direction) -> _State:
    if is_one_way(stream):
        direction = "load"
    try:
        states = _states.setdefault(stream, {})
    except TypeError:  # streams that cannot be weakly referenced are not watched
        return _State()
    return states.setdefault(direction, _State())


@contextmanager
def exclusive(
    stream: Any, direction: Direction, open_adapter: Callable[[Any], Adapter]
) -> Iterator[Adapter]:
    """Use a stream for one message.

    Args:
        stream: The caller's stream.
        direction: A stream may be saved to and loaded from at once, but not twice the same; a
            blocking one of TLS has only one.
        open_adapter: Makes the adapter.

    Raises:
        StreamBusy: Another call is using the stream in this direction.
        StreamPoisoned: Another call stopped inside a message.
    """
    state, call = _state(stream, direction), _Call()
    claim = ref(call)
    state.calls.append(claim)
    try:
        if next(each for each in list(state.calls) if each() is not None) is not claim:
            what = "call" if is_one_way(stream) else direction
            raise StreamBusy(f"another {what} is using this stream")
        if state.poison is not None:
            raise StreamPoisoned(
                f"an earlier {direction} stopped inside a message: {state.poison}; "
                f"close this stream and open another"
            )
        adapter = open_adapter(stream)
        # Until it is known how it ended: nobody may take what an interrupted call leaves for whole.
        state.poison = _INTERRUPTED
        why = "it was left there"
        try:
            yield adapter
        except BaseException as error:
            why = f"{type(error).__name__}: {error}" if str(error) else repr(error)
            raise
        finally:
            try:
                state.poison = why if adapter.in_message else None
                if adapter.in_message:
                    # At once: whoever is at the other end has nothing to wait for any more.
                    adapter.abort()
                    # That ends both directions of a stream that has two.
                    other = _state(stream, "load" if direction == "save" else "save")
                    other.poison = other.poison or f"a {direction} did: {why}"
            finally:
                if adapter.deadline is not None:
                    adapter.deadline.close()
                adapter.release()
    finally:
        state.calls.remove(claim)
