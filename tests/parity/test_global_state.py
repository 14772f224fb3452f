"""Many loads at once: each has its own verdict, and torch's state of the process is untouched."""

from __future__ import annotations

import asyncio
import io
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import _weights_only_unpickler as unpickler

import aiotorchio
from tests.parity.twins import our_file
from tests.support import corpus, craft
from tests.support.speed import patience

LOADS = 200


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value


class Other:
    pass


PATH = f"{Thing.__module__}.Thing"


@dataclass(frozen=True)
class Load:
    """A message, its load options, and the expected result."""

    data: bytes
    options: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] | None = None
    check: Callable[[Any], object] = lambda loaded: None


def _sparse_with(indices: list[list[int]]) -> bytes:
    """A sparse tensor of three numbers, with these indices."""
    layout = craft.call("torch.serialization", "_get_layout", "torch.sparse_coo")
    size = craft.call("torch", "Size", (3,))
    coo = craft.rebuild("_rebuild_sparse_tensor", layout, (craft.tensor(0), craft.tensor(1), size))
    tensors = [torch.tensor(indices), torch.ones(len(indices[0]))]
    return craft.message(craft.pickled(coo), "pickle", tensors)


def _state() -> dict[str, Any]:
    return {
        "w": torch.arange(6.0).view(2, 3),
        "p": torch.nn.Parameter(torch.ones(2)),
        "s": torch.eye(3).to_sparse(),
        "r": torch.eye(3).to_sparse_csr(),
        "n": {None: 1},
    }


def _is(kind: type) -> Callable[[Any], object]:
    def check(loaded: Any) -> None:
        assert type(loaded) is kind

    return check


def _loads() -> list[Load]:
    """Make different loads in turn, so that any two kinds run in parallel."""
    state, thing = our_file(_state()).getvalue(), our_file(Thing([1])).getvalue()
    many = {str(n): torch.full((2,), float(n)) for n in range(300)}
    kinds = [
        Load(state, check=lambda loaded: corpus.assert_same(loaded, _state())),
        Load(
            _sparse_with([[0, 2]]),
            check=lambda loaded: corpus.assert_same(loaded.to_dense(), torch.tensor([1.0, 0, 1])),
        ),
        Load(_sparse_with([[0, 3]]), error=aiotorchio.InvalidObjectError),
        Load(_sparse_with([[0, -1]]), error=aiotorchio.InvalidObjectError),
        Load(_sparse_with([[0, 3]]), {"weights_only": False}, error=aiotorchio.InvalidObjectError),
        Load(thing, error=aiotorchio.UnsafeObjectError),
        Load(thing, {"safe_globals": [Thing]}, check=_is(Thing)),
        Load(thing, {"safe_globals": [(Other, PATH)]}, check=_is(Other)),
        Load(thing, {"safe_globals": [Other]}, error=aiotorchio.UnsafeObjectError),
        Load(thing, {"weights_only": False}, check=_is(Thing)),
        Load(thing, {"allow_pickle": False}, error=aiotorchio.UnsafeObjectError),
        Load(
            our_file(many).getvalue(),
            {"map_location": "meta"},
            check=lambda loaded: all(tensor.is_meta for tensor in loaded.values()) or 1 / 0,
        ),
        Load(our_file(many).getvalue(), check=lambda loaded: corpus.assert_same(loaded, many)),
        Load(state, {"map_location": "nowhere"}, error=aiotorchio.InvalidObjectError),
    ]
    return [kinds[n % len(kinds)] for n in range(LOADS)]


def _verdict(load: Load, result: Any) -> None:
    if load.error is None:
        if isinstance(result, BaseException):
            raise result
        load.check(result)
    else:
        assert type(result) is load.error, f"{result!r}, not {load.error.__name__}"


def _process_wide() -> dict[str, Any]:
    return {
        "sparse": list(map(id, torch._utils._sparse_tensors_to_validate)),
        "safe": set(unpickler._marked_safe_globals_set),
        "safe_is": id(unpickler._marked_safe_globals_set),
        "invariants": torch.sparse.check_sparse_tensor_invariants.is_enabled(),
        "tls": dict(vars(torch.serialization._serialization_tls)),
        "packages": list(torch.serialization._package_registry),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().tolist(),
        "names": {name: id(value) for name, value in vars(unpickler).items()},
    }


@pytest.fixture(params=[False, True], ids=["as_usual", "invariants_checked"])
def untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's state of the process is the same before and after the test.

    During the test, a sparse tensor waits for its check in another load.
    """
    waiting = torch._utils._sparse_tensors_to_validate
    kept = list(waiting)
    waiting[:] = [torch.eye(2).to_sparse()]
    was_checked = torch.sparse.check_sparse_tensor_invariants.is_enabled()
    try:
        if request.param:
            torch.sparse.check_sparse_tensor_invariants.enable()
        before = _process_wide()
        yield
        assert _process_wide() == before
    finally:
        waiting[:] = kept
        if not was_checked:
            torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture(scope="module")
def loads() -> list[Load]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        return _loads()


def test_in_threads(loads: list[Load], untouched: None) -> None:
    results: list[Any] = [None] * LOADS
    states: list[Any] = [None] * LOADS
    together = threading.Barrier(LOADS, timeout=patience(30))

    def work(n: int) -> None:
        together.wait()
        try:
            results[n] = aiotorchio.load(io.BytesIO(loads[n].data), **loads[n].options)
        except Exception as error:
            results[n] = error
        states[n] = dict(vars(torch.serialization._serialization_tls))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(LOADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for load, result in zip(loads, results, strict=True):
        _verdict(load, result)
    clean = {"map_location": None, "skip_data": False, "materialize_fake_tensors": False}
    assert all(state == clean for state in states)


def test_in_tasks(loads: list[Load], untouched: None) -> None:
    async def pieces(data: bytes) -> AsyncIterator[bytes]:
        # All headers come before any payload: the loads are nested.
        for at in range(0, len(data), 1 + len(data) // 5):
            await asyncio.sleep(0)
            yield data[at : at + 1 + len(data) // 5]

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(aiotorchio.load_from_stream(pieces(load.data), **load.options) for load in loads),
            return_exceptions=True,
        )

    for load, result in zip(loads, asyncio.run(main()), strict=True):
        _verdict(load, result)


def test_in_tasks_and_threads_beside_torch(loads: list[Load], untouched: None) -> None:
    """torch's loads behave as before: neither library sees the other's allowlist."""
    file = io.BytesIO()
    torch.save(Thing([1]), file)
    data, results = file.getvalue(), []

    def torch_loads() -> None:
        for _ in range(20):
            try:
                results.append(torch.load(io.BytesIO(data)))
            except Exception as error:
                results.append(error)

    async def main() -> list[Any]:
        beside = asyncio.gather(*(asyncio.to_thread(torch_loads) for _ in range(2)))
        ours = [
            aiotorchio.load_from_stream(_once(load.data), **load.options) for load in loads[:50]
        ]
        answers = await asyncio.gather(*ours, return_exceptions=True)
        await beside
        return answers

    # torch checks and discards the tensors that wait for its next load.
    waiting = list(torch._utils._sparse_tensors_to_validate)
    answers = asyncio.run(main())
    torch._utils._sparse_tensors_to_validate[:] = waiting
    for load, answer in zip(loads[:50], answers, strict=True):
        _verdict(load, answer)
    assert len(results) == 40
    assert all("was not an allowed global" in str(error) for error in results)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def test_one_after_the_other(loads: list[Load], untouched: None) -> None:
    """A refused load changes nothing that affects the next one."""
    for load in loads[:28]:
        try:
            result = aiotorchio.load(io.BytesIO(load.data), **load.options)
        except Exception as error:
            result = error
        _verdict(load, result)


def test_torch_is_touched_by_its_own_loads() -> None:
    """These tests can notice a change: a failing load of torch leaves its map_location."""
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    file.seek(0)
    seen: list[Any] = []

    def fail() -> None:
        with pytest.raises(RuntimeError):
            torch.load(file, map_location="nowhere")
        seen.append(torch.serialization._serialization_tls.map_location)

    # In a new thread, with its own thread-local state.
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert seen == ["nowhere"]


def test_saves_touch_nothing(untouched: None) -> None:
    def work() -> None:
        for obj in (_state(), Thing(torch.ones(1)), [torch.empty(2, device="meta")]):
            our_file(obj)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        threads = [threading.Thread(target=work) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
