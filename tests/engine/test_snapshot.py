"""State that changes while it is sent: a snapshot sends the old state, other saves raise."""

from __future__ import annotations

import asyncio
import functools
import gc
import io
import threading
import weakref
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import ChecksumError, RemoteAbort, StreamWriter
from aiotorchio.engine.prepared_save import PreparedSave, ReadyMessage
from aiotorchio.memory.device_copy import bytes_of
from tests.memory.test_snapshot import Maps, maps
from tests.streams.test_detect import Bytes
from tests.support.backends import (
    IN_ONE_LOOP,
    CancelledAt,
    all_blocked,
    both_ends,
    cancelled_at,
    until,
)
from tests.support.corpus import assert_same

__all__ = ["maps"]

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)

CHUNK = 2**18
SHARED = [1, torch.ones(3)]

STATES: dict[str, Callable[[], Any]] = {
    "small": lambda: {"w": torch.arange(10.0)},
    "large": lambda: {"w": torch.arange(200_000)},
    "many": lambda: {f"w{n}": torch.full((40,), n) for n in range(1000)},
    "mixed": lambda: {"a": torch.rand(3), "b": torch.rand(100_000), "c": [torch.rand(5), 7, "x"]},
    "shared": lambda: {"a": (base := torch.rand(300, 300)), "b": base.t(), "c": base[7]},
    "pickled": lambda: {"a": (item := [torch.rand(100_000), 1]), "b": item},
    "empty": lambda: {"a": {}, "b": []},
    "model": lambda: dict(nn.Sequential(nn.Linear(99, 300), nn.BatchNorm1d(300)).state_dict()),
}


def ruin(state: Any) -> None:
    """Change every value of a state that can be changed."""
    if isinstance(state, torch.Tensor):
        state.fill_(-1)
        bytes_of(state.untyped_storage()).fill_(3)
    elif isinstance(state, dict):
        for value in list(state.values()):
            ruin(value)
        state["new"] = torch.ones(3)
        state.pop(next(iter(state)))
    elif isinstance(state, list):
        for value in state:
            ruin(value)
        state.append(0)
    else:
        return


def encoded(obj: object, **options: Any) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    return file.getvalue()


def made(name: str) -> tuple[Any, Any]:
    """Make a state, and the same again."""
    torch.manual_seed(0)
    state = STATES[name]()
    torch.manual_seed(0)
    return state, STATES[name]()


# ------------------------------------------------------------------------------ snapshots


@pytest.mark.parametrize("name", STATES)
@in_one_loop
async def test_the_state_at_the_call_arrives(kind: str, name: str) -> None:
    state, expected = made(name)
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        sending = aiotorchio.save_to_stream(state, near.sink, snapshot=True, chunk_size=CHUNK)
        ruin(state)

        async def send() -> None:
            await sending

        group.start_soon(send)
        assert_same(await far.load(), expected)


@pytest.mark.parametrize(
    "options", [{}, {"checksum": False}, {"compact": True}, {"chunk_size": 4096}]
)
@pytest.mark.parametrize("name", STATES)
async def test_iter_bytes(name: str, options: dict[str, Any]) -> None:
    state, expected = made(name)
    done: list[tuple[int, int]] = []
    pieces = aiotorchio.iter_bytes(
        state, snapshot=True, progress=lambda *figures: done.append(figures), **options
    )
    ruin(state)
    async with aclosing(pieces):
        assert_same(await aiotorchio.load_from_stream(pieces), expected)
        # The end comes with the last chunk; progress is reported when the iteration goes on.
        async for piece in pieces:
            raise AssertionError(piece)
    plain: list[tuple[int, int]] = []
    encoded(expected, progress=lambda *figures: plain.append(figures), **options)
    assert done == plain


@in_one_loop
async def test_a_stream_writer_and_start_soon_take_it_at_the_call(kind: str) -> None:
    state, expected = made("mixed")
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        writer = StreamWriter(near.sink)

        async def take() -> None:
            for _ in range(2):
                assert_same(await far.load(), expected)

        first = writer.save(state, snapshot=True)
        ruin(state)
        second_state, _ = made("mixed")
        second = writer.save(second_state, snapshot=True)
        ruin(second_state)
        group.start_soon(take)
        await first
        await second


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_in_a_task() -> None:
    state, expected = made("large")
    async with both_ends("streams") as (near, far):
        task = asyncio.create_task(
            aiotorchio.save_to_stream(state, near.sink, snapshot=True, chunk_size=CHUNK)
        )
        ruin(state)
        assert_same(await far.load(), expected)
        assert (await task).payload_nbytes == 1_600_000


@pytest.mark.parametrize("name", STATES)
def test_blocking(name: str, tmp_path: Path) -> None:
    """Each call of progress changes the state, and so does another thread whenever a piece is
    written.
    """
    state, expected = made(name)

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            if not self.tell():
                thread = threading.Thread(target=ruin, args=(state,))
                thread.start()
                thread.join()
            return super().write(data)

    file = File()
    aiotorchio.save(state, file, snapshot=True, chunk_size=4096)
    file.seek(0)
    assert_same(aiotorchio.load(file), expected)
    state, expected = made(name)
    path = tmp_path / "state.aio"
    aiotorchio.save(state, path, snapshot=True, progress=lambda *_: ruin(state))
    assert_same(aiotorchio.load(path), expected)


def test_the_bytes_are_those_of_a_message_without_it() -> None:
    for name in STATES:
        state, _ = made(name)
        plain, copied = encoded(state), encoded(state, snapshot=True)
        # Digests depend on the nonce, so only the sizes are compared.
        assert len(plain) == len(copied)


@in_one_loop
async def test_changes_between_chunks(kind: str) -> None:
    state, expected = made("large")
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def send() -> None:
            await aiotorchio.save_to_stream(
                state, near.sink, snapshot=True, chunk_size=4096, progress=lambda *_: ruin(state)
            )

        group.start_soon(send)
        assert_same(await far.load(), expected)


async def test_storages_that_are_freed_and_resized() -> None:
    state = {"a": torch.rand(100_000), "b": torch.rand(1000), "c": nn.Parameter(torch.rand(3))}
    expected = {name: tensor.detach().clone() for name, tensor in state.items()}
    pieces = aiotorchio.iter_bytes(state, snapshot=True)
    state["a"].untyped_storage().resize_(0)
    state["b"].resize_(5000)
    state["c"].data = torch.zeros(5)
    async with aclosing(pieces):
        loaded = await aiotorchio.load_from_stream(pieces)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


CALLS: dict[str, Callable[..., object]] = {
    "save_to_stream": lambda obj, **options: aiotorchio.save_to_stream(obj, None, **options),
    "StreamWriter": lambda obj, **options: StreamWriter(Bytes()).save(obj, **options),
    "iter_bytes": aiotorchio.iter_bytes,
    "save": lambda obj, **options: aiotorchio.save(obj, io.BytesIO(), **options),
}


@pytest.mark.parametrize("call", CALLS)
def test_errors_come_from_the_call(call: str) -> None:
    with pytest.raises(TypeError, match="pickle"):
        CALLS[call](threading.Lock(), snapshot=True)
    for option in ("snapshot", "compact", "checksum"):
        for value in (1, 0, None, "yes"):
            with pytest.raises(TypeError, match=f"^{option} must be True or False, not"):
                CALLS[call]({}, **{option: value})
        if option != "checksum":
            with pytest.raises(ValueError, match="cannot be combined with specs"):
                CALLS[call](iter(()), specs={}, **{option: True})


# ------------------------------------------------------------------------------ its memory


async def test_memory_is_given_back_chunk_by_chunk(maps: Maps) -> None:
    pieces = aiotorchio.iter_bytes([torch.zeros(40 * 4096)], snapshot=True, chunk_size=4 * 4096)
    assert len(maps.alive) == maps.made == 40
    most = []
    async with aclosing(pieces):
        async for piece in pieces:
            most.append(len(maps.alive))
            del piece
    assert most == sorted(most, reverse=True) and most[-1] <= 2
    assert not maps.alive


@in_one_loop
async def test_progress_sees_memory_given_back(kind: str, maps: Maps) -> None:
    state, left = torch.zeros(20 * 2**16, dtype=torch.uint8), []
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def send() -> None:
            await near.save(
                state,
                snapshot=True,
                chunk_size=2**16,
                progress=lambda *_: left.append(len(maps.alive)),
            )

        group.start_soon(send)
        await far.load()
    assert maps.made == 20 and not maps.alive
    assert all(count <= 20 - n + 1 for n, count in enumerate(left))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_calls_that_are_never_carried_out(maps: Maps) -> None:
    def calls() -> list[Any]:
        state, sink = [torch.zeros(100_000)], io.BytesIO()
        return [
            aiotorchio.save_to_stream(state, sink, snapshot=True, chunk_size=CHUNK),
            StreamWriter(Bytes()).save(state, snapshot=True, chunk_size=CHUNK),
            aiotorchio.iter_bytes(state, snapshot=True, chunk_size=CHUNK),
        ]

    never = calls()
    assert len(maps.alive) == 6
    del never
    assert not maps.alive
    closed = calls()
    for call in closed[:2]:
        call.close()
    assert len(maps.alive) == 2
    closed.clear()
    assert not maps.alive


@in_one_loop
async def test_a_save_cancelled_anywhere_frees_all(kind: str, maps: Maps) -> None:
    state = torch.zeros(8 * CHUNK, dtype=torch.uint8)
    for count in range(1, 400, 9):
        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

            async def take() -> None:
                with suppress(aiotorchio.TruncatedError):
                    await far.load()

            group.start_soon(take)
            done = False
            try:
                await cancelled_at(count, near.save(state, snapshot=True, chunk_size=CHUNK))
                done = True
            except CancelledAt:
                group.cancel_scope.cancel()
            # The traceback of the cancellation may keep the chunk that was being sent.
            assert len(maps.alive) <= 1
        gc.collect()
        assert not maps.alive
        if done:
            break
    assert done


async def test_an_iteration_that_is_left_frees_all(maps: Maps) -> None:
    pieces = aiotorchio.iter_bytes([torch.zeros(400_000)], snapshot=True, chunk_size=CHUNK)
    await anext(pieces)
    assert len(maps.alive) == 7
    await pieces.aclose()
    assert not maps.alive


@in_one_loop
async def test_a_save_that_is_cancelled_frees_all_at_once(kind: str, maps: Maps) -> None:
    state = torch.zeros(32 * 2**20, dtype=torch.uint8)
    async with both_ends(kind) as (near, _):
        async with anyio.create_task_group() as group:
            group.start_soon(functools.partial(near.save, state, snapshot=True))
            await all_blocked()
            assert 0 < len(maps.alive) <= 8
            group.cancel_scope.cancel()
        # The traceback of the cancellation may keep the chunk that was being sent.
        assert len(maps.alive) <= 1


@in_one_loop
async def test_a_connection_that_breaks_frees_all_at_once(kind: str, maps: Maps) -> None:
    state = torch.zeros(32 * 2**20, dtype=torch.uint8)
    async with both_ends(kind) as (near, far):

        async def send() -> None:
            try:
                await near.save(state, snapshot=True)
            except aiotorchio.TruncatedError:
                return
            raise AssertionError("sent")

        async with anyio.create_task_group() as group:
            group.start_soon(send)
            await all_blocked()
            if kind.startswith("streams"):
                far.sink.transport.abort()
            elif kind == "socket":
                far.source.close()
            else:
                await anyio.aclose_forcefully(far.source)
        assert not maps.alive


def test_a_file_that_fails_frees_all(maps: Maps) -> None:
    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        aiotorchio.save([torch.zeros(400_000)], Full(), snapshot=True, chunk_size=CHUNK)
    assert not maps.alive


async def test_the_state_itself_is_not_kept() -> None:
    state = {"w": torch.zeros(100_000)}
    tensor = weakref.ref(state["w"])
    pieces = aiotorchio.iter_bytes(state, snapshot=True)
    del state
    gc.collect()
    alive = tensor() is not None
    await pieces.aclose()
    assert not alive


async def test_without_it_nothing_is_copied(maps: Maps) -> None:
    state = torch.zeros(2**20, dtype=torch.uint8)
    async with aclosing(aiotorchio.iter_bytes([state])) as pieces:
        views = [piece async for piece in pieces if isinstance(piece, memoryview)]
    assert sum(map(len, views)) > 2**19 and not maps.made
    bytes_of(state.untyped_storage()).fill_(1)
    assert all(view.readonly and all(view[:100]) for view in views)


# ------------------------------------------------------------------------------ concurrent changes


NEXT = {"next": torch.arange(100_000)}


async def changed_while_sent(
    kind: str, state: Any, change: Callable[[], object], *, chunk_size: int = CHUNK
) -> tuple[BaseException | None, Any]:
    """Change a state when the first chunk is sent; return the error, and the result of the
    receiver.
    """
    outcome: list[Any] = []
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            change()

    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def take() -> None:
            try:
                outcome.append(await far.load())
            except (RemoteAbort, ChecksumError) as error:
                outcome.append(error)
            if isinstance(outcome[0], ChecksumError):
                while True:
                    await far.receive(2**16)
            assert_same(await far.load(), NEXT)

        error: BaseException | None = None
        group.start_soon(take)
        try:
            await near.save(state, chunk_size=chunk_size, progress=progress)
        except RuntimeError as caught:
            error = caught
        # The sender's stream stays usable, in any state of the receiver.
        await near.save(NEXT)
        await until(lambda: bool(outcome))
        if isinstance(outcome[0], ChecksumError):
            group.cancel_scope.cancel()
    return error, outcome[0]


@in_one_loop
async def test_a_change_between_two_chunks(kind: str) -> None:
    layer = {"layer": {"bias": torch.rand(3), "weight": torch.rand(300_000)}}
    error, arrived = await changed_while_sent(
        kind, layer, lambda: layer["layer"]["weight"][5].zero_()
    )
    assert "tensor 1 ('layer.weight') was changed while it was sent: pass snapshot=True" in str(
        error
    )
    assert isinstance(arrived, RemoteAbort) and "'layer.weight'" in str(arrived)


@in_one_loop
async def test_a_step_of_an_optimizer(kind: str) -> None:
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.rand(2, 500)).sum().backward()
    error, arrived = await changed_while_sent(kind, model.state_dict(), optimizer.step)
    assert "tensor 0 ('0.weight') was changed" in str(error)
    # The second chunk is composed when the first is sent.
    assert isinstance(arrived, RemoteAbort | ChecksumError)


@in_one_loop
async def test_behind_its_back(kind: str) -> None:
    """The counters do not notice; each chunk has the numbers of the time when it was sent."""
    tensor = torch.zeros(300_000)
    error, arrived = await changed_while_sent(kind, [tensor], lambda: tensor.data.fill_(1))
    assert error is None
    # The second chunk was composed before the change, and may be sent by view.
    assert isinstance(arrived, list | ChecksumError)


@in_one_loop
async def test_a_change_while_the_last_chunk_is_on_the_wire(kind: str) -> None:
    """The only chunk is larger than the buffers: it is changed while the receiver waits."""
    tensor = torch.zeros(32 * 2**20, dtype=torch.uint8)
    outcome: list[Any] = []
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def send() -> None:
            with pytest.raises(RuntimeError, match=r"tensor 0 .* was changed"):
                await near.save([tensor], chunk_size=32 * 2**20)
            await near.save(NEXT)

        group.start_soon(send)
        await all_blocked()
        tensor[-1] = 1
        try:
            outcome.append(await far.load(limits=aiotorchio.Limits(chunk_nbytes=2**26)))
        except RemoteAbort as error:
            outcome.append(error)
            assert_same(await far.load(), NEXT)
        except ChecksumError as error:
            outcome.append(error)
            group.cancel_scope.cancel()
    assert isinstance(outcome[0], RemoteAbort | ChecksumError)


async def test_a_change_in_iter_bytes() -> None:
    state = {"w": torch.zeros(200_000), "b": torch.zeros(2)}
    pieces, received = aiotorchio.iter_bytes(state, chunk_size=CHUNK), b""
    with pytest.raises(RuntimeError, match=r"tensor 0 \('w'\) was changed"):
        async for piece in pieces:
            received += piece
            if len(received) > CHUNK:
                state["w"].add_(1)
    # The second chunk is composed when the first is sent.
    with pytest.raises((RemoteAbort, ChecksumError)):
        aiotorchio.load(io.BytesIO(received))


@pytest.mark.parametrize("checksum", [True, False])
def test_a_change_while_writing_to_a_file(checksum: bool, tmp_path: Path) -> None:
    tensor = torch.zeros(200_000)
    options: dict[str, Any] = {
        "chunk_size": CHUNK,
        "checksum": checksum,
        "progress": lambda done, total: tensor.add_(1) if done < total else None,
    }
    file = io.BytesIO()
    with pytest.raises(RuntimeError, match="was changed"):
        aiotorchio.save(tensor, file, **options)
    aiotorchio.save(NEXT, file)
    file.seek(0)
    if checksum:
        with pytest.raises((RemoteAbort, ChecksumError)):
            aiotorchio.load(file)
    else:
        with pytest.raises(RemoteAbort, match="was changed"):
            aiotorchio.load(file)
        assert_same(aiotorchio.load(file), NEXT)
    path = tmp_path / "state.aio"
    aiotorchio.save(NEXT, path)
    with pytest.raises(RuntimeError, match="was changed"):
        aiotorchio.save(tensor, path, **options)
    assert_same(aiotorchio.load(path), NEXT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.aio"]


async def test_a_change_before_the_coroutine_runs_is_sent() -> None:
    state = {"w": torch.zeros(5)}
    pieces = aiotorchio.iter_bytes(state)
    state["w"].add_(1)
    state["b"] = torch.ones(2)
    async with aclosing(pieces):
        assert_same(await aiotorchio.load_from_stream(pieces), state)


@in_one_loop
async def test_a_change_after_the_save_is_no_error(kind: str) -> None:
    for size in (5, 200_000):
        state = {"w": torch.zeros(size)}

        def after(done: int, total: int, state: dict[str, torch.Tensor] = state) -> None:
            if done == total:
                state["w"].add_(1)

        async with both_ends(kind) as (near, far):
            for n in range(2):
                async with anyio.create_task_group() as group:
                    group.start_soon(functools.partial(near.save, state, progress=after))
                    assert_same(await far.load(), {"w": torch.full((size,), float(n))})


@pytest.mark.parametrize("size", [10, 200_000])
def test_tensors_of_inference_mode_are_sent(size: int) -> None:
    with torch.inference_mode():
        tensor = torch.ones(size)
    data = encoded([tensor], progress=lambda *_: None)
    assert torch.equal(aiotorchio.load(io.BytesIO(data))[0], torch.ones(size))


async def test_a_tensor_that_is_received_into_while_it_is_sent() -> None:
    tensor = torch.zeros(200_000)
    other = encoded({"w": torch.ones(200_000)})
    pieces, received = aiotorchio.iter_bytes({"w": tensor}, chunk_size=CHUNK), b""
    with pytest.raises(RuntimeError, match="was changed"):
        async for piece in pieces:
            received += piece
            if len(received) < CHUNK + 1000:
                aiotorchio.load(io.BytesIO(other), into={"w": tensor})
    with pytest.raises((RemoteAbort, ChecksumError)):
        aiotorchio.load(io.BytesIO(received))


# ------------------------------------------------------------------------------ concurrent resizes


@in_one_loop
async def test_a_storage_that_is_resized_later(kind: str) -> None:
    tensor = torch.zeros(300_000)

    def shrink() -> None:
        tensor.untyped_storage().resize_(0)

    # The error is found when the third chunk is composed.
    error, arrived = await changed_while_sent(kind, [tensor], shrink)
    assert "was resized to 0" in str(error)
    assert isinstance(arrived, RemoteAbort)


async def test_a_storage_that_is_resized_when_its_first_chunk_is_sent() -> None:
    tensor, received = torch.zeros(200_000), b""

    def progress(done: int, total: int) -> None:
        tensor.untyped_storage().resize_(0)

    pieces = aiotorchio.iter_bytes({"w": tensor}, chunk_size=CHUNK, progress=progress)
    with pytest.raises(RuntimeError, match="was resized"):
        async for piece in pieces:
            received += piece
    with pytest.raises(RemoteAbort, match="was resized"):
        aiotorchio.load(io.BytesIO(received))


def test_a_change_before_the_first_byte_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame gives the reason: it would come without a preface."""
    tensors = [torch.empty(2, device="meta") for _ in range(3)]
    unchanged = PreparedSave.ready

    def ready_and_change(save: PreparedSave) -> ReadyMessage:
        ready = unchanged(save)
        tensors[1].add_(1)
        return ready

    monkeypatch.setattr(PreparedSave, "ready", ready_and_change)
    file = io.BytesIO()
    with pytest.raises(RuntimeError, match=r"tensor 1 .* was changed"):
        aiotorchio.save(tensors, file)
    assert not file.getvalue()


def test_a_change_is_named_where_the_connection_broke_for_it() -> None:
    """A receiver that sees other bytes than announced closes: the error names the change, not the
    network.
    """
    tensor = torch.zeros(400_000)

    class Gone(io.RawIOBase):
        taken = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if self.taken > 2 * CHUNK:
                raise BrokenPipeError("the receiver went")
            self.taken += len(data)
            tensor.add_(1)
            return len(data)

    with pytest.raises(RuntimeError, match="was changed while it was sent") as caught:
        aiotorchio.save([tensor], Gone(), chunk_size=CHUNK)
    assert isinstance(caught.value.__cause__, aiotorchio.TruncatedError)
