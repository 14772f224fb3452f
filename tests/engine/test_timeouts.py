"""Slow or silent peers, over every kind of stream and on every loop."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import torch

import aiotorchio
from aiotorchio import Limits, StreamPoisoned, StreamReader, TransferTimeout, TruncatedError
from tests.support.backends import (
    CLIENT_TLS,
    IN_ONE_LOOP,
    PATIENCE,
    SERVER_TLS,
    all_blocked,
    both_ends,
    connected,
    suppress_broken,
)
from tests.support.speed import patience, slowdown

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)

STATE = {"w": torch.arange(200_000), "small": torch.ones(3)}
# More than sockets hold.
LARGE = {"w": torch.zeros(8_000_000)}
# Seconds that differ clearly from no time at all, and keep the test short.
SHORT = round(0.15 * slowdown(), 3)
# Seconds in which bytes of a peer arrive, if there are any.
AMPLE = patience(0.15)


def encoded(obj: object, **options: Any) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    return file.getvalue()


MESSAGE = encoded(STATE)


@in_one_loop
@pytest.mark.parametrize("count", [1, 7, 8, 40, 300, 100_000, len(MESSAGE) - 1])
async def test_a_sender_that_falls_silent(kind: str, count: int) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        group.start_soon(near.send, MESSAGE[:count])
        with anyio.fail_after(PATIENCE), pytest.raises(TransferTimeout) as caught:
            await far.load(limits=Limits(idle_timeout=SHORT))
        assert re.match(r"no byte moved for [\d.]+ s \(Limits.idle_timeout\)", str(caught.value))
        assert caught.value.entry is not None
        assert caught.value.offset is not None and caught.value.offset <= count
        with pytest.raises(StreamPoisoned, match="TransferTimeout"):
            await far.load()


@in_one_loop
async def test_a_header_that_is_never_whole(kind: str) -> None:
    async with both_ends(kind) as (near, far):
        await near.send(MESSAGE[:30])
        limits = Limits(idle_timeout=None, handshake_timeout=SHORT)
        with anyio.fail_after(PATIENCE), pytest.raises(TransferTimeout, match="handshake_timeout"):
            await far.load(limits=limits)


@in_one_loop
async def test_behind_the_header_the_handshake_is_over(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        limits = Limits(handshake_timeout=PATIENCE)
        await near.send(MESSAGE[:2000])
        async with StreamReader(far.source).open(limits=limits) as message:
            time_budget = message._source.time_budget
            assert time_budget is not None
            group.start_soon(near.send, MESSAGE[2000:])
            torch.testing.assert_close(await message.load(), STATE)
            assert time_budget._handshake_end == float("inf")
            assert time_budget.count == len(MESSAGE)


@in_one_loop
async def test_a_message_that_never_begins(kind: str) -> None:
    async with both_ends(kind) as (near, far):
        with anyio.fail_after(PATIENCE), pytest.raises(TransferTimeout) as caught:
            await far.load(limits=Limits(start_timeout=SHORT))
        assert "start_timeout" in str(caught.value)
        assert (caught.value.entry, caught.value.offset) == ("preface", 0)
        # No byte was read: the stream is as before.
        async with anyio.create_task_group() as group:
            group.start_soon(near.save, STATE)
            torch.testing.assert_close(await far.load(), STATE)


@in_one_loop
async def test_a_sender_that_trickles(kind: str) -> None:
    """Each byte comes in time, but all of them would take for ever."""
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def trickle() -> None:
            await near.send(MESSAGE[:1000])
            for byte in MESSAGE[1000:]:
                await anyio.sleep(SHORT / 10)
                with suppress_broken():
                    await near.send(bytes([byte]))

        group.start_soon(trickle)
        limits = Limits(idle_timeout=SHORT, least_rate=10**6)
        with (
            anyio.fail_after(PATIENCE),
            pytest.raises(TransferTimeout, match=r"Limits\.") as caught,
        ):
            await far.load(limits=limits)
        assert caught.value.offset is not None and caught.value.offset < len(MESSAGE)
        group.cancel_scope.cancel()


@in_one_loop
async def test_a_consumer_that_takes_its_time(kind: str) -> None:
    """Only the sender's time counts."""
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        group.start_soon(near.save, STATE)
        async with StreamReader(far.source).open(limits=Limits(idle_timeout=AMPLE)) as message:
            names = []
            async for name, _ in message:
                await anyio.sleep(1.5 * AMPLE)
                names.append(name)
        assert names == list(STATE)


@in_one_loop
async def test_a_receiver_that_never_reads(kind: str) -> None:
    async with both_ends(kind) as (near, _):
        with anyio.fail_after(PATIENCE), pytest.raises(TransferTimeout) as caught:
            await near.save(LARGE, limits=Limits(write_timeout=SHORT))
        assert re.match(r"no byte moved for [\d.]+ s \(Limits.write_timeout\)", str(caught.value))
        assert caught.value.offset is not None
        with pytest.raises(StreamPoisoned, match="TransferTimeout"):
            await near.save("more")


@in_one_loop
async def test_a_sender_that_makes_its_tensors_slowly(kind: str) -> None:
    """The receiver gets its bytes in time; the sender's own delay does not count."""
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def produce() -> Any:
            for name in ("a", "b"):
                await anyio.sleep(1.5 * AMPLE)
                yield name, torch.ones(1000)

        specs = {name: torch.empty(1000, device="meta") for name in ("a", "b")}

        async def save() -> None:
            limits = Limits(write_timeout=AMPLE)
            await aiotorchio.save_to_stream(produce(), near.sink, specs=specs, limits=limits)

        group.start_soon(save)
        assert list(await far.load()) == ["a", "b"]


@in_one_loop
async def test_a_receiver_that_gives_up_stops_the_sender(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        stopped = anyio.Event()

        async def save() -> None:
            with pytest.raises(TruncatedError):
                await near.save(LARGE, limits=Limits(write_timeout=PATIENCE))
            stopped.set()

        group.start_soon(save)
        with pytest.raises(aiotorchio.LimitExceeded):
            await far.load(limits=Limits(total_nbytes=1000))
        # The sender stops before the receiver's end is closed.
        with anyio.fail_after(PATIENCE / 2):
            await stopped.wait()


@in_one_loop
async def test_a_receiver_that_is_cancelled_stops_the_sender(kind: str) -> None:
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        stopped, begun = anyio.Event(), anyio.Event()

        async def save() -> None:
            with pytest.raises(TruncatedError):
                await near.save(LARGE, chunk_size=2**16)
            stopped.set()

        async def load() -> None:
            with anyio.CancelScope() as scope:

                def cancel(done: int, total: int) -> None:
                    scope.cancel()
                    begun.set()

                await far.load(progress=cancel)

        group.start_soon(save)
        group.start_soon(load)
        with anyio.fail_after(PATIENCE / 2):
            await begun.wait()
            await stopped.wait()


async def test_the_callers_own_deadline_is_a_cancellation(anyio_backend: Any) -> None:
    async with both_ends("anyio") as (near, far):
        await near.send(MESSAGE[:100])
        with anyio.move_on_after(SHORT) as scope:
            await far.load()
        assert scope.cancelled_caught
        with pytest.raises(StreamPoisoned, match="Cancelled"):
            await far.load()


async def test_an_iterable_that_waits(anyio_backend: Any) -> None:
    async def pieces() -> Any:
        yield MESSAGE[:500]
        await anyio.sleep_forever()

    with anyio.fail_after(PATIENCE), pytest.raises(TransferTimeout, match="idle_timeout"):
        await aiotorchio.load_from_stream(pieces(), limits=Limits(idle_timeout=SHORT))


async def test_endless_patience(anyio_backend: Any) -> None:
    limits = Limits(
        handshake_timeout=None, idle_timeout=None, write_timeout=float("inf"), least_rate=0
    )
    async with both_ends("anyio") as (near, far), anyio.create_task_group() as group:

        async def save() -> None:
            await aiotorchio.save_to_stream(STATE, near.sink, limits=limits)

        group.start_soon(save)
        await all_blocked()
        torch.testing.assert_close(await far.load(limits=limits), STATE)


# ------------------------------------------------------------------------------ blocking twins


@contextlib.contextmanager
def blocking_ends(link: str, timeout: float | None = None) -> Iterator[tuple[Any, Any]]:
    near, far = connected("unix" if link == "unix" else "tcp")
    ends: dict[str, Any] = {"near": near, "far": far}
    if link == "tls":

        def serve() -> None:
            ends["near"] = SERVER_TLS.wrap_socket(near, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        ends["far"] = CLIENT_TLS.wrap_socket(far, server_hostname="localhost")
        thread.join()
    for sock in ends.values():
        sock.settimeout(timeout)
    with ends["near"] as near, ends["far"] as far:
        yield near, far


blocking = pytest.mark.parametrize("link", ["unix", "tcp", "tls"])
own_timeout = pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["none", "long"])


@blocking
@own_timeout
@pytest.mark.parametrize("count", [1, 40, 100_000])
def test_a_blocking_load_of_silence(link: str, timeout: float | None, count: int) -> None:
    with blocking_ends(link, timeout) as (near, far):
        near.sendall(MESSAGE[:count])
        with pytest.raises(TransferTimeout, match="no byte moved for") as caught:
            aiotorchio.load(far, limits=Limits(idle_timeout=SHORT))
        assert caught.value.entry is not None and caught.value.offset is not None
        assert far.gettimeout() == timeout
        with pytest.raises(StreamPoisoned):
            aiotorchio.load(far)
        # The sender is stopped.
        near.settimeout(PATIENCE)
        with pytest.raises(OSError):
            while True:
                near.sendall(bytes(2**20))


@blocking
def test_a_blocking_load_that_is_refused_stops_its_sender(link: str) -> None:
    """The sender waits for room, on a connection full of unread bytes."""
    with blocking_ends(link) as (near, far):
        errors: list[Exception] = []

        def save() -> None:
            try:
                aiotorchio.save(LARGE, near)
            except aiotorchio.AiotorchioError as error:
                errors.append(error)

        sending = threading.Thread(target=save)
        sending.start()
        end = time.monotonic() + PATIENCE
        while select.select([], [near], [], 0)[1]:
            assert time.monotonic() < end, "there is always room"
        with pytest.raises(aiotorchio.LimitExceeded):
            aiotorchio.load(far, limits=Limits(total_nbytes=1000))
        sending.join(PATIENCE)
        assert not sending.is_alive()
        assert near.gettimeout() is None and far.gettimeout() is None
        assert [type(error) for error in errors] == [TruncatedError]


@blocking
@pytest.mark.parametrize("few", [False, True], ids=["default_timeout", "no_descriptors"])
def test_breaking_off_needs_nothing_and_waits_for_nobody(link: str, few: bool) -> None:
    """It needs neither another descriptor nor the timeout that sockets get by default."""
    with blocking_ends(link) as (near, far):
        near.sendall(b"no message, but longer than the first bytes of one")
        opened: list[int] = []
        default = socket.getdefaulttimeout()
        try:
            if few:
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
                with contextlib.suppress(OSError):
                    while True:
                        opened.append(os.dup(0))
            else:
                socket.setdefaulttimeout(10 * PATIENCE)
            with pytest.raises(aiotorchio.ProtocolError):
                aiotorchio.load(far)
        finally:
            socket.setdefaulttimeout(default)
            for descriptor in opened:
                os.close(descriptor)
            if few:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert os.get_blocking(far.fileno())
        near.settimeout(PATIENCE)
        with pytest.raises(OSError):
            while True:
                near.sendall(bytes(2**20))


@blocking
def test_a_blocking_load_that_never_begins(link: str) -> None:
    with blocking_ends(link) as (near, far):
        with pytest.raises(TransferTimeout, match="start_timeout"):
            aiotorchio.load(far, limits=Limits(start_timeout=SHORT))
        aiotorchio.save("later", near)
        assert aiotorchio.load(far) == "later"


@blocking
@own_timeout
def test_a_blocking_save_that_nobody_reads(link: str, timeout: float | None) -> None:
    with blocking_ends(link, timeout) as (near, _):
        with pytest.raises(TransferTimeout, match="no byte moved for"):
            aiotorchio.save(LARGE, near, limits=Limits(write_timeout=SHORT))
        assert near.gettimeout() == timeout
        with pytest.raises(StreamPoisoned):
            aiotorchio.save("more", near)


@blocking
def test_the_timeout_of_the_socket_itself_counts_too(link: str) -> None:
    with blocking_ends(link, SHORT) as (near, far):
        near.sendall(MESSAGE[:100])
        with pytest.raises(TransferTimeout, match="the connection timed out"):
            aiotorchio.load(far)
        assert far.gettimeout() == SHORT
    with blocking_ends(link, SHORT) as (near, _):
        with pytest.raises(TransferTimeout, match="the connection timed out"):
            aiotorchio.save(LARGE, near)
        assert near.gettimeout() == SHORT


def test_a_blocking_socket_of_tls_is_for_one_call_at_a_time() -> None:
    """Two calls would take each other's timeouts for the owner's."""
    with blocking_ends("tls", PATIENCE) as (near, far):
        errors: list[Exception] = []

        def load() -> None:
            try:
                aiotorchio.load(far, limits=Limits(start_timeout=PATIENCE / 2))
            except aiotorchio.AiotorchioError as error:
                errors.append(error)

        loading = threading.Thread(target=load)
        loading.start()
        end = time.monotonic() + PATIENCE
        while far.gettimeout() == PATIENCE:
            assert time.monotonic() < end, "the load does not begin"
        with pytest.raises(aiotorchio.StreamBusy, match="another call"):
            aiotorchio.save(STATE, far)
        near.close()
        loading.join()
        assert [type(error) for error in errors] == [TruncatedError]
        assert far.gettimeout() == PATIENCE


@blocking
@pytest.mark.parametrize(
    "timeout",
    [30 * 86400, 1e300, 10**400, float("inf")],
    ids=["month", "long", "longer", "endless"],
)
def test_more_patience_than_systems_have_timeouts(link: str, timeout: float) -> None:
    limits = Limits(start_timeout=timeout, idle_timeout=timeout, write_timeout=timeout)
    with blocking_ends(link) as (near, far):
        sending = threading.Thread(
            target=aiotorchio.save, args=(LARGE, near), kwargs={"limits": limits}
        )
        sending.start()
        assert torch.equal(aiotorchio.load(far, limits=limits)["w"], LARGE["w"])
        sending.join()


@pytest.mark.parametrize("seconds", [30 * 86400, 1e300, 10**400], ids=["month", "long", "longer"])
@in_one_loop
async def test_more_patience_than_timers_have(kind: str, seconds: float) -> None:
    limits = Limits(start_timeout=seconds, handshake_timeout=seconds, idle_timeout=seconds)
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def save() -> None:
            with anyio.fail_after(PATIENCE):
                await near.save(STATE, limits=Limits(write_timeout=seconds))

        group.start_soon(save)
        with anyio.fail_after(PATIENCE):
            torch.testing.assert_close(await far.load(limits=limits), STATE)


def test_both_directions_of_a_blocking_socket_at_once() -> None:
    """Deadlines of one thread do not apply to the other."""
    near, far = socket.socketpair()
    with near, far:
        loaded: list[Any] = []

        def answer() -> None:
            loaded.append(aiotorchio.load(far))
            aiotorchio.save(STATE, far)

        thread = threading.Thread(target=answer)
        thread.start()
        sender = threading.Thread(target=aiotorchio.save, args=(LARGE, near))
        sender.start()
        torch.testing.assert_close(
            aiotorchio.load(near, limits=Limits(idle_timeout=PATIENCE)), STATE
        )
        sender.join()
        thread.join()
        assert torch.equal(loaded[0]["w"], LARGE["w"])


def test_a_pipe_that_was_silent_for_too_long() -> None:
    reading, writing = os.pipe()
    with open(writing, "wb", 0) as sink, open(reading, "rb", 0) as source:

        def write() -> None:
            sink.write(MESSAGE[:100])
            # Wait until the reader has certainly waited for too long.
            threading.Event().wait(3 * SHORT)
            sink.write(MESSAGE[100:200])

        thread = threading.Thread(target=write)
        thread.start()
        with pytest.raises(TransferTimeout, match="no byte moved for"):
            aiotorchio.load(source, limits=Limits(idle_timeout=SHORT))
        thread.join()


def test_a_file_has_no_pace() -> None:
    limits = Limits(idle_timeout=0, handshake_timeout=0, write_timeout=0)
    file = io.BytesIO()
    aiotorchio.save(STATE, file, limits=limits)
    file.seek(0)
    torch.testing.assert_close(aiotorchio.load(file, limits=limits), STATE)


async def test_iter_bytes_has_no_limits() -> None:
    with pytest.raises(TypeError, match="limits"):
        # mypy's error is right.
        aiotorchio.iter_bytes(STATE, limits=Limits())  # type: ignore[call-arg]
