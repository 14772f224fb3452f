"""Measures lag: how late a heartbeat on the event loop is while a state is transferred."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import torch
from common import Link, Method, State
from methods import PIECE_SIZE, AsyncTransfer, Beside, connected, on_loop, raw_sockets, streams

PERIOD = 0.001

Notes = dict[str, Any]


def heartbeat(notes: Notes) -> Beside:
    """Beat every millisecond; note how many beats came so many ms late."""
    late: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def beating() -> AsyncIterator[None]:
        over = False

        async def beat() -> None:
            due = time.perf_counter() + PERIOD
            while not over:
                await asyncio.sleep(due - time.perf_counter())
                # Each beat that was due during a stall counts: a stall of 40 ms makes 40 late
                # beats.
                while (lag := time.perf_counter() - due) >= 0:
                    late[f"{lag * 1000:.2f}"] += 1
                    due += PERIOD

        task = asyncio.create_task(beat())
        # The heartbeat sleeps before the transfer begins; a delay of its last beat counts, too.
        await asyncio.sleep(0)
        yield
        over = True
        await task
        notes["late"] = dict(sorted(late.items(), key=lambda item: float(item[0])))

    return beating


def ours(notes: Notes) -> Method:
    return streams(beside=heartbeat(notes))


def raw(notes: Notes) -> Method:
    return raw_sockets(beside=heartbeat(notes))


def torch_save(notes: Notes) -> Method:
    """``torch.save`` to bytes, which go over streams, and ``torch.load`` from bytes."""
    beside = heartbeat(notes)

    @contextlib.asynccontextmanager
    async def send(state: State, link: Link) -> AsyncIterator[AsyncTransfer]:
        async def transfer() -> None:
            file = io.BytesIO()
            torch.save(state, file)
            # The writer is drained when all is sent.
            writer.transport.set_write_buffer_limits(high=1, low=0)
            writer.write(file.tell().to_bytes(8, "little"))
            data = file.getbuffer()
            for start in range(0, len(data), PIECE_SIZE):
                writer.write(data[start : start + PIECE_SIZE])
                await writer.drain()

        async with connected(link, socket.AF_INET, False, serves=False) as (_, writer):
            yield transfer

    @contextlib.asynccontextmanager
    async def receive(link: Link) -> AsyncIterator[AsyncTransfer]:
        async def transfer() -> Any:
            size = int.from_bytes(await reader.readexactly(8), "little")
            return torch.load(io.BytesIO(await reader.readexactly(size)), weights_only=True)

        async with connected(link, socket.AF_INET, False, serves=True) as (reader, _):
            yield transfer

    return Method(
        lambda state, link: on_loop(send(state, link), beside=beside),
        lambda link: on_loop(receive(link), beside=beside),
    )
