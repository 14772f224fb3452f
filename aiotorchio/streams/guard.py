"""Exclusive use of a stream: one call at a time, and none on a poisoned stream.

In: the stream of a caller. Out: its adapter, for one message. A ``StreamBusy`` means that another
call uses the stream, a ``StreamPoisoned`` that an earlier call stopped inside a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from weakref import ref

from aiotorchio.errors import StreamBusy, StreamPoisoned
from aiotorchio.streams.base import Sink, Source
from aiotorchio.streams.blocking import BlockingStream
from aiotorchio.streams.blocking_sockets import one_call_at_a_time
from aiotorchio.streams.identity import IdentityTable

__all__ = ["exclusive"]

Direction = Literal["save", "load"]
Adapter = TypeVar("Adapter", Source, Sink, BlockingStream)


class _Call:
    """A call that uses a stream; it lives as long as the frame of the call."""


@dataclass(slots=True)
class _State:
    # The first live call has the stream. The references are weak, because a call that is
    # interrupted in its cleanup ends, too. There is no lock, because an interrupt could leave it
    # held; an append is atomic.
    calls: list[ref[_Call]] = field(default_factory=list)
    poison: str | None = None


_states: IdentityTable[dict[Direction, _State]] = IdentityTable()


def _state(stream: Any, direction: Direction) -> _State:
    if one_call_at_a_time(stream):
        # Saves and loads share one state, so that each refuses the other.
        direction = "load"
    try:
        states = _states.setdefault(stream, {})
    except TypeError:  # a stream without weak references is not guarded
        return _State()
    return states.setdefault(direction, _State())


def _stopped(direction: Direction, why: str) -> str:
    return f"an earlier {direction} stopped inside a message ({why})"


@contextmanager
def exclusive(
    stream: Any, direction: Direction, open_adapter: Callable[[Any], Adapter]
) -> Iterator[Adapter]:
    """Use a stream for one message.

    Args:
        stream: The stream of the caller.
        direction: One save and one load may use a stream at the same time; on a blocking TLS
            socket, only one of them.
        open_adapter: Makes the adapter of the stream.

    Raises:
        StreamBusy: Another call is using the stream in this direction.
        StreamPoisoned: An earlier call stopped inside a message.
    """
    state, call = _state(stream, direction), _Call()
    claim = ref(call)
    state.calls.append(claim)
    try:
        if next(each for each in list(state.calls) if each() is not None) is not claim:
            what = "call" if one_call_at_a_time(stream) else direction
            raise StreamBusy(
                f"another {what} is using this stream: await it first, or use another stream"
            )
        if state.poison is not None:
            raise StreamPoisoned(f"{state.poison}: close this stream and open another")
        adapter = open_adapter(stream)
        # The stream is poisoned until the end of the call: an interrupt may skip the lines below.
        state.poison = _stopped(direction, "it was interrupted")
        why = "it ended before the end of the message"
        try:
            yield adapter
        except BaseException as error:
            # The first line: a MismatchError lists each misfit in one of its own.
            first = str(error).partition("\n")[0]
            why = f"{type(error).__name__}: {first}" if first else repr(error)
            raise
        finally:
            try:
                state.poison = _stopped(direction, why) if adapter.in_message else None
                if adapter.in_message:
                    # Aborted at once, since the peer has nothing more to wait for.
                    adapter.abort()
                    # An abort ends both directions of a stream.
                    other = _state(stream, "load" if direction == "save" else "save")
                    other.poison = other.poison or state.poison
            finally:
                if adapter.time_budget is not None:
                    adapter.time_budget.close()
                adapter.release()
    finally:
        state.calls.remove(claim)
