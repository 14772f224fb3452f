"""Measures fairness: many connections at once between one server and one client process.

Each load notes when it is done, which shows whether one connection delays another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from common import Link, Method, State
from methods import AsyncTransfer, Streams, on_loop

import aiotorchio

CONNECTIONS = 200

Notes = dict[str, Any]
Each = Callable[[Streams], Awaitable[Any]]
# Uses each connection, and returns the results.
Schedule = Callable[[list[Streams], Each], Awaitable[list[Any]]]


async def _together(connections: list[Streams], each: Each) -> list[Any]:
    return await asyncio.gather(*map(each, connections))


async def _in_turn(connections: list[Streams], each: Each) -> list[Any]:
    return [await each(connection) for connection in connections]


@contextlib.asynccontextmanager
async def _connected(link: Link) -> AsyncIterator[list[Streams]]:
    connections = []
    for sock in link.sockets(CONNECTIONS):
        sock.setblocking(False)
        connections.append(await asyncio.open_connection(sock=sock))
    yield connections
    for _, writer in connections:
        writer.close()
        # The peer may have closed first.
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _method(notes: Notes, schedule: Schedule) -> Method:
    @contextlib.asynccontextmanager
    async def send(state: State, link: Link) -> AsyncIterator[AsyncTransfer]:
        async with _connected(link) as connections:
            yield lambda: schedule(
                connections, lambda streams: aiotorchio.save_to_stream(state, streams[1])
            )

    @contextlib.asynccontextmanager
    async def receive(link: Link) -> AsyncIterator[AsyncTransfer]:
        async def transfer() -> list[Any]:
            async def load(streams: Streams) -> Any:
                state = await aiotorchio.load_from_stream(streams[0])
                done.append(time.perf_counter() - start)
                return state

            start = time.perf_counter()
            done: list[float] = notes.setdefault("done", [])
            return await schedule(connections, load)

        async with _connected(link) as connections:
            yield transfer

    return Method(
        lambda state, link: on_loop(send(state, link)), lambda link: on_loop(receive(link))
    )


def together(notes: Notes) -> Method:
    """Load over all connections at once; note when each load was done."""
    return _method(notes, _together)


def in_turn(notes: Notes) -> Method:
    """Load over as many connections, one after the other."""
    return _method(notes, _in_turn)
