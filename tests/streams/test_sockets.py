"""Sources and sinks over sockets: many buffers, waits, cancellation and lost peers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
import torch
import trio
import uvloop

import aiotorchio
from aiotorchio.errors import ProtocolError, TransferTimeout, TruncatedError
from aiotorchio.streams import sockets
from aiotorchio.streams.sockets import SocketSink, SocketSource
from tests.support.backends import all_blocked, connected, soon

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


async def test_more_buffers_than_one_call_takes(pair: Any) -> None:
    near, far = pair
    sent = [bytes([n % 251]) * (n % 7) for n in range(5000)]
    data = b"".join(sent)
    received = [bytearray(n % 5) for n in range(8000)]
    size = sum(map(len, received))
    assert size > len(data)
    received.append(bytearray(0))
    async with anyio.create_task_group() as group:

        async def send() -> None:
            sink = SocketSink(near)
            await sink.send(sent)
            assert sink.in_message
            near.shutdown(socket.SHUT_WR)

        group.start_soon(send)
        source = SocketSource(far)
        # The stream ends before the buffers are full.
        assert await source.fill([memoryview(array) for array in received]) == len(data)
    assert b"".join(received) == data + bytes(size - len(data))


async def test_more_than_one_turn(pair: Any) -> None:
    near, far = pair
    data = bytes(range(256)) * 2**14
    async with anyio.create_task_group() as group:
        group.start_soon(SocketSink(near).send, [data])
        assert await SocketSource(far).read(len(data)) == data


async def test_nothing_to_do(pair: Any) -> None:
    near, far = pair
    sink, source = SocketSink(near), SocketSource(far)
    await sink.send([b"", b""])
    assert await source.read(0) == b""
    assert await source.fill([]) == 0
    assert not sink.in_message and not source.in_message


async def test_other_tasks_run_where_nothing_is_waited_for(pair: Any) -> None:
    near, far = pair
    turns = []

    async def other() -> None:
        turns.append(1)

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        # trio may run this task before the other one, but not twice in a row.
        for _ in range(2):
            await SocketSink(near).send([b"x"])
        assert turns
        group.start_soon(other)
        for _ in range(2):
            await SocketSource(far).read(1)
        assert len(turns) == 2


async def test_the_end_is_short(pair: Any) -> None:
    near, far = pair
    near.send(b"123")
    near.shutdown(socket.SHUT_WR)
    source = SocketSource(far)
    assert await source.read(5) == b"123"
    assert await source.read(5) == b""


async def test_a_lost_connection(pair: Any) -> None:
    near, far = pair
    far.close()
    sink = SocketSink(near)
    with pytest.raises(TruncatedError, match="BrokenPipeError"):
        await sink.send([b"x"])
    assert not sink.in_message


async def test_a_socket_closed_between_two_calls(pair: Any) -> None:
    near, far = pair
    sink, source = SocketSink(near), SocketSource(far)
    near.close()
    far.close()
    with pytest.raises(TruncatedError, match="Bad file descriptor"):
        await sink.send([b"x"])
    with pytest.raises(TruncatedError, match="Bad file descriptor"):
        await source.read(1)
    sink.abort()


async def test_an_abort_is_the_end_for_the_peer(pair: Any) -> None:
    near, far = pair
    SocketSink(near).abort()
    assert await SocketSource(far).read(1) == b""


@pytest.mark.parametrize("link", ["unix", "tcp"])
async def test_an_abort_of_the_source_stops_a_sender_that_waits(link: str) -> None:
    near, far = connected(link)
    errors: list[Exception] = []
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        async with anyio.create_task_group() as group:

            async def send() -> None:
                with pytest.raises(TruncatedError) as caught:
                    await SocketSink(near).send([bytes(2**25)])
                errors.append(caught.value)

            group.start_soon(send)
            await all_blocked()
            source = SocketSource(far)
            assert await source.read(1) == b"\0"
            source.abort()
            # Check before this end closes the socket: with TCP, a sender that waits gets no notice
            # of the end, and its probes become rarer the longer it waits.
            told = await soon(lambda: bool(errors))
            group.cancel_scope.cancel()
        assert told
        source.abort()
    source.abort()


@pytest.mark.parametrize("driver", [SocketSource, SocketSink])
def test_sockets_that_do_not_fit(pair: Any, driver: Callable[[socket.socket], Any]) -> None:
    near, far = pair
    near.setblocking(True)
    with pytest.raises(ValueError, match="non-blocking"):
        driver(near)
    near.settimeout(5)
    with pytest.raises(ValueError, match="non-blocking"):
        driver(near)
    far.close()
    with pytest.raises(ValueError, match="closed"):
        driver(far)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        pytest.raises(ValueError, match="stream socket"),
    ):
        driver(datagrams)


class Interrupted:
    """A socket whose first call is interrupted and whose third call fails."""

    def __init__(self, sock: socket.socket, error: BaseException) -> None:
        self.sock, self.error, self.calls = sock, error, 0

    def recv_into(self, view: memoryview) -> int:
        self.calls += 1
        if self.calls == 1:
            raise InterruptedError
        if self.calls == 3:
            raise self.error
        return self.sock.recv_into(view[:1])

    def fileno(self) -> int:
        return self.sock.fileno()


async def test_an_error_while_waiting(pair: Any) -> None:
    near, far = pair
    source = SocketSource(far)
    source._sock = Interrupted(far, ConnectionResetError("lost"))  # type: ignore[assignment]
    near.send(b"xyz")
    with pytest.raises(TruncatedError, match="lost"):
        await source.read(3)
    assert source.in_message


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, None])
def test_a_keyboard_interrupt_while_waiting_stops_watching(
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
) -> None:
    if loop_factory is None:
        import uvloop

        loop_factory = uvloop.new_event_loop
    near, far = socket.socketpair()
    far.setblocking(False)
    near.send(b"xyz")

    async def main() -> None:
        source = SocketSource(far)
        source._sock = Interrupted(far, KeyboardInterrupt())  # type: ignore[assignment]
        try:
            await source.read(3)
        finally:
            assert not asyncio.get_running_loop().remove_reader(far.fileno())

    with (
        near,
        far,
        pytest.raises(KeyboardInterrupt),
        asyncio.Runner(loop_factory=loop_factory) as runner,
    ):
        runner.run(main())


class Miscounting(socket.socket):
    """A socket that moves bytes, but returns another number."""

    result: Any

    def recv_into(self, *args: Any) -> Any:
        super().recv_into(*args)
        return self.result

    def recvmsg_into(self, *args: Any) -> Any:
        return self.result, *super().recvmsg_into(*args)[1:]

    def sendmsg(self, *args: Any) -> Any:
        super().sendmsg(*args)
        return self.result


@pytest.mark.parametrize("result", [-1, 4, 2**40, "a", None])
async def test_counts_that_cannot_be(pair: Any, result: Any) -> None:
    near, far = pair
    with Miscounting(fileno=far.detach()) as odd:
        odd.setblocking(False)
        odd.result = result
        for sizes in ([3], [1, 2]):
            near.send(b"abc")
            source = SocketSource(odd)
            with pytest.raises(ProtocolError, match="receiving returned") as caught:
                await source.fill([memoryview(bytearray(size)) for size in sizes])
            assert caught.value.offset == 0
            assert source.in_message
        sink = SocketSink(odd)
        for _ in range(2):
            with pytest.raises(ProtocolError, match=r"sendmsg\(\) returned"):
                await sink.send([b"abc"])
        assert near.recv(9) == b"abc"


async def test_a_socket_that_sends_nothing_for_ever(pair: Any) -> None:
    with Miscounting(fileno=pair[1].detach()) as odd:
        odd.setblocking(False)
        odd.result = 0
        with pytest.raises(ProtocolError, match="returned 0"):
            await SocketSink(odd).send([b"abc"])


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run_guest(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Runs a function of trio as a guest of asyncio."""

    def run(guest: Callable[[], Awaitable[Any]]) -> Any:
        async def host() -> Any:
            loop = asyncio.get_running_loop()
            done = loop.create_future()
            trio.lowlevel.start_guest_run(
                guest,
                run_sync_soon_threadsafe=loop.call_soon_threadsafe,
                done_callback=done.set_result,
                host_uses_signal_set_wakeup_fd=True,
            )
            return (await done).unwrap()

        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(host())

    return run


def test_trio_as_a_guest_of_asyncio(pair: Any, run_guest: Any) -> None:
    near, far = pair
    # Of several turns, with work in threads.
    state: dict[str, Any] = {"w": torch.arange(2**20), "text": "x"}

    async def guest() -> Any:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(aiotorchio.save_to_stream, state, near)
                return await aiotorchio.load_from_stream(far)

    loaded = run_guest(guest)
    assert torch.equal(loaded["w"], state["w"]) and loaded["text"] == "x"


def test_deadlines_in_a_guest(pair: Any, run_guest: Any) -> None:
    near, far = pair

    async def guest() -> None:
        with trio.fail_after(60):
            with pytest.raises(TransferTimeout, match="start_timeout"):
                limits = aiotorchio.Limits(start_timeout=0.01)
                await aiotorchio.load_from_stream(far, limits=limits)
            with pytest.raises(TransferTimeout, match="write_timeout"):
                limits = aiotorchio.Limits(write_timeout=0.01)
                await aiotorchio.save_to_stream(torch.zeros(2**22), near, limits=limits)

    run_guest(guest)


async def test_nothing_is_taken_after_a_cancellation(pair: Any) -> None:
    near, far = pair
    source = SocketSource(far)
    async with anyio.create_task_group() as group:
        group.start_soon(source.read, 3)
        await all_blocked()
        group.cancel_scope.cancel()
        near.send(b"xyz")
    assert not source.in_message
    assert await SocketSource(far).read(3) == b"xyz"


async def test_reading_and_writing_one_socket_at_once(pair: Any) -> None:
    near, far = pair
    data = bytes(2**20)
    async with anyio.create_task_group() as group:
        for sock in (near, far):
            group.start_soon(SocketSink(sock).send, [data])
            group.start_soon(SocketSource(sock).read, len(data))


async def test_two_duplicates_of_one_socket_at_once(pair: Any) -> None:
    near, far = pair
    data = bytes(2**20)
    with near.dup() as near_too, far.dup() as far_too:
        async with anyio.create_task_group() as group:
            group.start_soon(SocketSink(near).send, [data])
            group.start_soon(SocketSource(near_too).read, len(data))
            group.start_soon(SocketSink(far).send, [data])
            group.start_soon(SocketSource(far_too).read, len(data))


async def test_a_source_that_stops_stops_its_sender(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = pair
    monkeypatch.setattr(sockets, "TURN_SIZE", 100)
    sink = SocketSink(near)
    async with anyio.create_task_group() as group:
        group.start_soon(sink.send, [bytes(2**24)])
        await all_blocked()
        got = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                got += len(far.recv(2**20))
        assert 0 < got < 2**23
        group.cancel_scope.cancel()
