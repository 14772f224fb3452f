"""A network between two ends that damages the bytes by a schedule.

Faults are tied to bytes, not to time: the same schedule makes the same changes in the same bytes,
however TCP has cut them up on their way here.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.support.backends import connected

__all__ = ["Fault", "FaultKind", "Link", "Mangler", "Schedule"]

FaultKind = Literal["corrupt", "swap", "duplicate", "truncate", "reset", "silence"]
ENDINGS: tuple[FaultKind, ...] = ("truncate", "reset", "silence")

_PIECE_SIZE = 64 * 2**10
_PAUSE_MAX = 0.003
# The size of a socket's buffer. Receivers keep theirs: TCP probes small windows on a slow timer.
_NARROW = 16 * 2**10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """A change to a range of bytes.

    Args:
        kind: Endings let no more bytes through: there is an end, a reset, or silence.
        offset: The offset of the first byte, since the schedule began.
        length: The length of the range; endings have none.
        seed: The seed of the bits that change.
    """

    kind: FaultKind
    offset: int
    length: int = 0
    seed: int = 0

    def change(self, data: bytes) -> bytes:
        if self.kind == "corrupt":
            bits = random.Random(self.seed)
            return bytes(byte ^ bits.randrange(1, 256) for byte in data)
        if self.kind == "swap":
            return data[self.length // 2 :] + data[: self.length // 2]
        assert self.kind == "duplicate"
        return data + data


@dataclass(frozen=True)
class Schedule:
    """The changes of a network to the bytes of the sender.

    Args:
        faults: In the order of their offsets; they do not overlap.
        count: How many bytes the receiver will read; None for all.
        fragments: Whether bytes are passed on in pieces from one byte to 64 KiB.
        pauses: The probability of a pause after a piece.
        narrow: Whether senders soon have to wait for a receiver that does not read.
        tells_sender: Whether the sender notices an ending, too; otherwise its bytes are lost.
        seed: The seed of pieces and pauses.
    """

    faults: tuple[Fault, ...] = ()
    count: int | None = None
    fragments: bool = False
    pauses: float = 0.0
    narrow: bool = False
    tells_sender: bool = True
    seed: int = 0


class Mangler:
    """Applies faults to bytes.

    Args:
        faults: As in a schedule.
        count: As in a schedule.

    Attributes:
        harmed: Whether bytes that count differ between input and output.
    """

    def __init__(self, faults: tuple[Fault, ...], count: int | None) -> None:
        self._faults = deque(faults)
        self._count = count
        self._held = bytearray()
        self._position = 0
        self.harmed = False

    def feed(self, data: bytes) -> Iterator[bytes | Fault]:
        """Pass bytes in, and yield the bytes that come out; after an ending, no more bytes may go
        in.
        """
        self._held += data
        while self._held:
            fault = self._faults[0] if self._faults else None
            before = fault.offset - self._position if fault else len(self._held)
            if before > 0:
                yield self._take(before)
            elif fault is None or len(self._held) < fault.length:
                return
            else:
                self._faults.popleft()
                if fault.kind in ENDINGS:
                    self.harmed = True
                    yield fault
                    return
                piece = self._take(fault.length)
                changed = fault.change(piece)
                # Repeated bytes are unchanged; the bytes after them, if they count, are at other
                # offsets.
                followed = self._count is None or self._position < self._count
                self.harmed |= not changed.startswith(piece) or (followed and changed != piece)
                yield changed

    def end(self) -> bytes:
        """Return the bytes that were held back, at the end."""
        return self._take(len(self._held))

    def _take(self, count: int) -> bytes:
        piece = bytes(self._held[:count])
        del self._held[:count]
        self._position += len(piece)
        return piece


class Link:
    """A connection through a network.

    Args:
        schedule: The schedule of the bytes from ``near`` to ``far``, from ``begin`` on.

    Attributes:
        near: The sender's socket.
        far: The receiver's socket.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.near, self._near = connected("tcp")
        self.far, self._far = connected("tcp")
        for sock in (self._near, self._far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if schedule.narrow:
            for sock in (self.near, self._far):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NARROW)
        self._schedule = schedule
        self._mangler = Mangler(schedule.faults, schedule.count)
        self._random = random.Random(schedule.seed)
        self._began = False
        self._told = False

    @property
    def harmed(self) -> bool:
        """Whether the bytes that came out differ from those that went in, or are fewer."""
        return self._mangler.harmed

    def begin(self) -> None:
        """Apply the schedule to all bytes that are sent from now on; those before have arrived."""
        self._began = True

    async def carry(self) -> None:
        """Carry bytes both ways until both sides have ended."""
        with self._near, self._far:
            try:
                async with asyncio.TaskGroup() as group:
                    back = group.create_task(self._back())
                    group.create_task(self._forth(back))
            except* OSError:
                # One side is gone: reset the other one.
                self._reset_on_close(self._near, self._far)

    async def _back(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._far, _PIECE_SIZE):
            if not self._told:
                await loop.sock_sendall(self._near, data)
        if not self._told:
            self._near.shutdown(socket.SHUT_WR)

    async def _forth(self, back: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._near, _PIECE_SIZE):
            for piece in self._mangler.feed(data) if self._began else [data]:
                if isinstance(piece, Fault):
                    await self._end(piece.kind, back)
                    return
                await self._send(piece)
        await self._send(self._mangler.end())
        self._far.shutdown(socket.SHUT_WR)

    async def _send(self, data: bytes) -> None:
        loop, view = asyncio.get_running_loop(), memoryview(data)
        while view:
            count = len(view)
            if self._schedule.fragments:
                # Pieces below a hundred bytes are as frequent as larger ones.
                count = min(int(self._random.paretovariate(0.15)), _PIECE_SIZE)
            await loop.sock_sendall(self._far, view[:count])
            view = view[count:]
            # Pieces that are sent in one turn of the loop would arrive as one piece.
            await asyncio.sleep(0)
            if self._random.random() < self._schedule.pauses:
                await asyncio.sleep(self._random.uniform(0, _PAUSE_MAX))

    async def _end(self, kind: FaultKind, back: asyncio.Task[None]) -> None:
        if kind == "reset":
            if self._schedule.tells_sender:
                raise ConnectionResetError
            back.cancel()
            await asyncio.wait([back])
            self._reset_on_close(self._far)
            self._far.close()
            # No more bytes will come: without an end, TLS would wait for an answer to its close.
            self._near.shutdown(socket.SHUT_WR)
        elif kind == "truncate":
            self._far.shutdown(socket.SHUT_WR)
            if self._schedule.tells_sender:
                self._told = True
                self._near.shutdown(socket.SHUT_RDWR)
                return
        elif self._schedule.tells_sender:
            # No more bytes are read, either, until the receiver gives up.
            await asyncio.wait([back])
            return
        loop = asyncio.get_running_loop()
        while await loop.sock_recv(self._near, _PIECE_SIZE):
            pass

    def _reset_on_close(self, *socks: socket.socket) -> None:
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
