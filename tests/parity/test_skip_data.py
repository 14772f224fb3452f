"""Structure without bytes: ``torch.serialization.skip_data`` and ``FakeTensorMode``."""

from __future__ import annotations

import asyncio
import io
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.serialization import skip_data

import aiotorchio
from tests.parity.twins import our_file, stream_file, torch_file
from tests.support import corpus

# Enough tensors to take apart and build in a worker thread.
MANY = 500


def _state() -> dict[str, Any]:
    base = torch.arange(1.0, 7.0)
    return {
        "a": base.view(2, 3).t(),
        "b": base[2:],
        "p": torch.nn.Parameter(torch.ones(2, dtype=torch.float64)),
        "n": [3, "x"],
    }


def _saved_without_data(obj: object) -> io.BytesIO:
    with skip_data():
        return our_file(obj)


def _assert_structure(actual: dict[str, Any], device: str) -> None:
    expected = _state()
    assert actual.keys() == expected.keys() and actual["n"] == expected["n"]
    for name in ("a", "b", "p"):
        one, two = actual[name], expected[name]
        assert type(one) is type(two)
        assert one.device.type == device
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
        assert one.storage_offset() == two.storage_offset()
        assert one.requires_grad == two.requires_grad
        assert one.untyped_storage().nbytes() == two.untyped_storage().nbytes()
    assert actual["a"].untyped_storage()._cdata == actual["b"].untyped_storage()._cdata


# ---------------------------------------------------------------------------------- saved under it


def test_saved_without_data_arrives_on_meta() -> None:
    """torch leaves holes in the file, which read as zeros; a stream has no holes to fill later."""
    with skip_data():
        theirs = torch_file(_state())
    _assert_structure(torch.load(theirs), "cpu")
    _assert_structure(aiotorchio.load(_saved_without_data(_state())), "meta")


def test_saved_without_data_no_byte_of_a_tensor_is_sent() -> None:
    obj = {"w": torch.arange(2**16, dtype=torch.int64), "n": 1}
    with skip_data():
        summary = aiotorchio.save(obj, io.BytesIO())
    assert summary.payload_nbytes == 0 and summary.tensors == 1
    assert summary.nbytes < 2000


def test_saved_without_data_by_a_worker_thread() -> None:
    obj = {str(n): torch.full((2,), n) for n in range(MANY)}
    loaded = aiotorchio.load(_saved_without_data(obj))
    assert loaded.keys() == obj.keys() and all(tensor.is_meta for tensor in loaded.values())


def test_saved_without_data_in_a_pickled_object() -> None:
    obj = [torch.ones(2), torch.ones(3).untyped_storage(), frozenset({1})]
    loaded = aiotorchio.load(_saved_without_data(obj))
    assert loaded[0].is_meta and loaded[0].shape == (2,)
    assert loaded[1].device.type == "meta" and loaded[1].nbytes() == 12
    assert loaded[2] == frozenset({1})


def test_saved_without_data_on_an_async_stream() -> None:
    async def main() -> Any:
        with skip_data():
            pieces = [bytes(piece) async for piece in aiotorchio.iter_bytes(_state())]
        return aiotorchio.load(io.BytesIO(b"".join(pieces)))

    _assert_structure(asyncio.run(main()), "meta")


@pytest.mark.parametrize("kind", ["quantized", "per_channel", "nested"])
def test_saved_without_data_what_torch_refuses_is_refused(kind: str) -> None:
    obj: Any
    if kind == "quantized":
        obj = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    elif kind == "per_channel":
        obj = torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
        )
    else:
        obj = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with skip_data():
        with pytest.raises(RuntimeError, match="under skip_data") as theirs:
            torch_file(obj)
        with pytest.raises(RuntimeError, match="under skip_data") as ours:
            our_file(obj)
        # The same with so many other tensors that a worker thread takes the object apart.
        with pytest.raises(RuntimeError, match="under skip_data"):
            our_file([obj, *(torch.ones(1) for _ in range(MANY))])
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_bsc])
def test_saved_without_data_sparse_tensors(layout: torch.layout) -> None:
    """In torch their indices are zeros; here all parts are on meta."""
    blocks = {"blocksize": (1, 1)} if layout is torch.sparse_bsc else {}
    to_sparse: Any = torch.eye(3).to_sparse
    sparse = to_sparse(layout=layout, **blocks)
    with skip_data():
        theirs, ours = torch_file(sparse), our_file(sparse)
    their_tensor, tensor = torch.load(theirs), aiotorchio.load(ours)
    assert (tensor.layout, tensor.shape, tensor.dtype) == (
        their_tensor.layout,
        their_tensor.shape,
        their_tensor.dtype,
    )
    assert tensor.is_meta and tensor._nnz() == 3


def test_saved_without_data_jagged_tensors() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with skip_data():
        theirs, ours = torch_file(jagged), our_file(jagged)
    their_tensor, tensor = torch.load(theirs), aiotorchio.load(ours)
    assert type(tensor) is type(their_tensor)
    assert tensor.is_meta and tensor.values().shape == their_tensor.values().shape


def test_saved_without_data_meta_tensors_need_no_warning() -> None:
    tensor = torch.empty_strided((2, 3), (1, 2), device="meta")
    with skip_data():
        with pytest.warns(UserWarning, match="skip_data context manager is a no-op"):
            theirs = torch_file(tensor)
        ours = our_file(tensor)
    for loaded in (torch.load(theirs), aiotorchio.load(ours)):
        assert loaded.is_meta and (loaded.shape, loaded.stride()) == ((2, 3), (1, 2))


def test_streaming_save_does_not_know_it() -> None:
    with skip_data(), pytest.raises(AttributeError, match="write_record_metadata"):
        stream_file(torch.ones(2))


def test_saved_without_data_only_inside_the_context() -> None:
    with skip_data():
        pass
    corpus.assert_same(aiotorchio.load(our_file(_state())), _state())
    with skip_data(), skip_data():
        pass
    corpus.assert_same(aiotorchio.load(our_file(_state())), _state())


# --------------------------------------------------------------------------------- loaded under it


def test_loaded_without_data() -> None:
    theirs, ours = torch_file(_state()), our_file(_state())
    with skip_data():
        _assert_structure(torch.load(theirs), "cpu")
        _assert_structure(aiotorchio.load(ours), "cpu")
    assert ours.read() == b""


def test_loaded_without_data_the_memory_is_not_written() -> None:
    """40 MiB of memory are fresh from the system: they do not have the numbers by chance."""
    tensor = torch.ones(10 * 2**20)
    file = our_file({"w": tensor}, checksum=False)
    with skip_data():
        loaded = aiotorchio.load(file)["w"]
    assert loaded.shape == tensor.shape and not torch.equal(loaded, tensor)


def test_loaded_without_data_in_a_worker_thread() -> None:
    obj = {str(n): torch.full((n % 7,), n) for n in range(MANY)}
    file = our_file(obj)
    with skip_data():
        loaded = aiotorchio.load(file)
    assert [tensor.shape for tensor in loaded.values()] == [t.shape for t in obj.values()]
    assert all(tensor.device.type == "cpu" for tensor in loaded.values())


def test_loaded_without_data_on_an_async_stream() -> None:
    async def main() -> Any:
        with skip_data():
            return await aiotorchio.load_from_stream(aiotorchio.iter_bytes(_state()))

    # The sender runs under the flag, too.
    _assert_structure(asyncio.run(main()), "meta")

    data = our_file(_state()).getvalue()

    async def pieces() -> Any:
        yield data

    async def receive() -> Any:
        with skip_data():
            return await aiotorchio.load_from_stream(pieces())

    _assert_structure(asyncio.run(receive()), "cpu")


def test_loaded_without_data_is_verified() -> None:
    """torch does not read the bytes that it skips."""
    tensor = torch.arange(8, dtype=torch.uint8)
    for file in (torch_file(tensor), our_file(tensor)):
        data = bytearray(file.getvalue())
        data[data.index(bytes(range(8))) + 3] = 77
        damaged = io.BytesIO(data)
        with skip_data():
            if data.startswith(b"PK"):
                assert torch.load(damaged).shape == (8,)
            else:
                with pytest.raises(aiotorchio.ChecksumError):
                    aiotorchio.load(damaged)


def test_loaded_without_data_is_received_whole() -> None:
    file = our_file(_state())
    steps: list[tuple[int, int]] = []
    with skip_data():
        aiotorchio.load(file, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0
    data = our_file(_state()).getvalue()
    with skip_data(), pytest.raises(aiotorchio.TruncatedError):
        aiotorchio.load(io.BytesIO(data[:-20]))


def test_loaded_without_data_and_the_next_message_follows() -> None:
    file = io.BytesIO()
    aiotorchio.save(_state(), file)
    aiotorchio.save({"next": torch.ones(2)}, file)
    file.seek(0)
    with skip_data():
        _assert_structure(aiotorchio.load(file), "cpu")
    assert aiotorchio.load(file)["next"].tolist() == [1, 1]


@pytest.mark.parametrize("map_location", ["cpu", "meta", {"cpu": "meta"}])
def test_loaded_without_data_somewhere(map_location: Any) -> None:
    theirs, ours = torch_file(_state()), our_file(_state())
    with skip_data():
        expected = torch.load(theirs, map_location=map_location)["a"].device.type
        _assert_structure(aiotorchio.load(ours, map_location=map_location), expected)


def test_loaded_without_data_a_callable_is_asked_all_the_same() -> None:
    asked: list[Any] = []

    def place(storage: Any, location: str) -> Any:
        asked.append((type(storage), storage.nbytes(), location))

    theirs, ours = torch_file(_state()), our_file(_state())
    with skip_data():
        torch.load(theirs, map_location=place)
        expected = list(asked)
        asked.clear()
        aiotorchio.load(ours, map_location=place)
    assert (
        asked
        == expected
        == [
            (torch.UntypedStorage, 24, "cpu"),
            (torch.UntypedStorage, 16, "cpu"),
        ]
    )


def test_loaded_without_data_an_absent_device_is_missing_all_the_same() -> None:
    theirs, ours = torch_file(torch.ones(2)), our_file(torch.ones(2))
    with skip_data():
        with pytest.raises(RuntimeError, match="tagged with nowhere") as caught:
            torch.load(theirs, map_location="nowhere")
        with pytest.raises(aiotorchio.InvalidObjectError) as refused:
            aiotorchio.load(ours, map_location="nowhere")
    assert str(caught.value) in str(refused.value)


def _sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def _nested() -> torch.Tensor:
    made: torch.Tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return made


def _per_channel() -> torch.Tensor:
    return torch.quantize_per_channel(
        torch.ones(2, 2), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
    )


@pytest.mark.parametrize("make", [_sparse, _nested, _per_channel])
def test_loaded_without_data_indices_are_never_trusted(make: Callable[[], torch.Tensor]) -> None:
    """torch builds such tensors from uninitialized indices and sizes."""
    file = our_file(make())
    with skip_data(), pytest.raises(aiotorchio.InvalidObjectError, match="skip_data"):
        aiotorchio.load(file)


# -------------------------------------------------------------------------- scope of the flag


def test_the_flag_is_that_of_the_thread() -> None:
    """Another thread saves and loads bytes at the same time."""
    results: dict[str, Any] = {}

    def elsewhere() -> None:
        results["loaded"] = aiotorchio.load(our_file(_state()))

    with skip_data():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        mine = our_file(_state())
        thread.join()
    corpus.assert_same(results["loaded"], _state())
    _assert_structure(aiotorchio.load(mine), "meta")


def test_the_flag_of_another_thread_is_not_mine() -> None:
    results: dict[str, Any] = {}
    inside, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with skip_data():
            results["file"] = our_file(_state())
            inside.set()
            assert done.wait(10)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert inside.wait(10)
    try:
        corpus.assert_same(aiotorchio.load(our_file(_state())), _state())
        many = {str(n): torch.full((2,), n) for n in range(MANY)}
        corpus.assert_same(aiotorchio.load(our_file(many)), many)
    finally:
        done.set()
        thread.join()
    _assert_structure(aiotorchio.load(results["file"]), "meta")


def test_the_flag_leaves_the_worker_threads_clean() -> None:
    """Later calls without the flag use the same threads."""
    many = {str(n): torch.full((2,), n) for n in range(MANY)}
    tls = torch.serialization._serialization_tls
    before = dict(vars(tls))
    for _ in range(4):
        with skip_data():
            without = aiotorchio.load(our_file(many))
        assert all(tensor.is_meta for tensor in without.values())
        corpus.assert_same(aiotorchio.load(our_file(many)), many)
    assert vars(tls) == before and not tls.skip_data


# ----------------------------------------------------------------------------------- fake tensors


def _fakes() -> dict[str, Any]:
    with FakeTensorMode():
        base = torch.empty(6)
        return {
            "a": base.view(2, 3),
            "b": base[2:],
            "c": torch.empty(2, device="cuda:0", dtype=torch.float16),
        }


def test_fake_tensors_are_not_pickled() -> None:
    with pytest.raises(AttributeError, match="Can't pickle") as theirs:
        torch_file(_fakes())
    with pytest.raises(AttributeError) as ours:
        our_file(_fakes())
    assert str(ours.value) == str(theirs.value)


def test_fake_tensors_are_not_pickled_without_data_either() -> None:
    with skip_data():
        for save in (torch_file, our_file):
            with pytest.raises(AttributeError, match="Can't pickle"):
                save(_fakes())


def test_materialized_fake_tensors() -> None:
    """In torch they are plain tensors of zeros on the device they fake; here they are on meta."""
    with skip_data(materialize_fake_tensors=True):
        theirs, ours = torch_file(_fakes()), our_file(_fakes())
    expected = torch.load(theirs, map_location="cpu")
    loaded = aiotorchio.load(ours)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert type(tensor) is type(expected[name]) is torch.Tensor
        assert tensor.is_meta
        assert (tensor.shape, tensor.stride()) == (expected[name].shape, expected[name].stride())
        assert tensor.dtype == expected[name].dtype
        assert tensor.storage_offset() == expected[name].storage_offset()
    assert loaded["a"].untyped_storage()._cdata == loaded["b"].untyped_storage()._cdata


def test_materialized_fake_tensors_by_a_worker_thread() -> None:
    with FakeTensorMode():
        obj = [torch.empty(n % 5) for n in range(MANY)]
    with skip_data(materialize_fake_tensors=True):
        loaded = aiotorchio.load(our_file(obj))
    assert [tensor.shape for tensor in loaded] == [tensor.shape for tensor in obj]


def test_materialized_beside_tensors_that_are_no_fakes() -> None:
    obj = {"real": torch.ones(2), "fake": _fakes()["a"]}
    with skip_data(materialize_fake_tensors=True):
        theirs, ours = torch.load(torch_file(obj)), our_file(obj)
    assert [type(tensor) for tensor in theirs.values()] == [torch.Tensor] * 2
    loaded = aiotorchio.load(ours)
    assert loaded["real"].is_meta and loaded["fake"].is_meta


def _loaded_as_fakes(
    load: Callable[..., Any], file: io.BytesIO, **options: Any
) -> tuple[Any, FakeTensorMode]:
    with FakeTensorMode() as mode:
        return load(file, **options), mode


@pytest.mark.parametrize(
    ("map_location", "device"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("cuda:1", "cuda:1"),
        ("cuda", "cuda:0"),
        (torch.device("cuda"), "cuda:0"),
        (torch.device("cuda", 3), "cuda:3"),
        ({"cpu": "cuda:0"}, "cuda:0"),
        ({"cuda:0": "cuda:1"}, "cpu"),
        ("meta", "meta"),
    ],
    ids=str,
)
def test_loaded_under_a_fake_mode(map_location: Any, device: str) -> None:
    """The devices need not exist, and the tensors take no memory."""
    theirs, _ = _loaded_as_fakes(torch.load, torch_file(_state()), map_location=map_location)
    ours, mode = _loaded_as_fakes(aiotorchio.load, our_file(_state()), map_location=map_location)
    for loaded in (theirs, ours):
        assert loaded["n"] == [3, "x"]
        for name, expected in _state().items():
            if name == "n":
                continue
            tensor = loaded[name]
            assert type(tensor) is FakeTensor
            assert tensor.fake_device == tensor.device == torch.device(device)
            assert tensor.untyped_storage().device.type == "meta"
            assert (tensor.shape, tensor.stride()) == (expected.shape, expected.stride())
            assert tensor.dtype == expected.dtype
            assert tensor.storage_offset() == expected.storage_offset()
            assert tensor.requires_grad == expected.requires_grad
        assert isinstance(loaded["p"], torch.nn.Parameter)
    assert all(ours[name].fake_mode is mode for name in ("a", "b", "p"))


def test_loaded_under_a_fake_mode_what_is_shared_stays_shared() -> None:
    """In torch each tensor gets a separate storage."""
    theirs, _ = _loaded_as_fakes(torch.load, torch_file(_state()))
    ours, _ = _loaded_as_fakes(aiotorchio.load, our_file(_state()))
    assert theirs["a"].untyped_storage()._cdata != theirs["b"].untyped_storage()._cdata
    assert ours["a"].untyped_storage()._cdata == ours["b"].untyped_storage()._cdata


def test_loaded_under_a_fake_mode_meta_stays_meta() -> None:
    for load, save in ((torch.load, torch_file), (aiotorchio.load, our_file)):
        loaded, _ = _loaded_as_fakes(load, save(torch.empty(2, device="meta")))
        assert type(loaded) is FakeTensor and loaded.fake_device.type == "meta"


def test_loaded_under_a_fake_mode_without_data_as_well() -> None:
    with skip_data():
        for load, save in ((torch.load, torch_file), (aiotorchio.load, our_file)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                file = save(_state())
            loaded, _ = _loaded_as_fakes(load, file)
            assert type(loaded["a"]) is FakeTensor


def test_loaded_under_a_fake_mode_by_a_worker_thread() -> None:
    obj = {str(n): torch.full((n % 7,), n) for n in range(MANY)}
    ours, mode = _loaded_as_fakes(aiotorchio.load, our_file(obj))
    assert all(tensor.fake_mode is mode for tensor in ours.values())
    assert [tensor.shape for tensor in ours.values()] == [t.shape for t in obj.values()]


def test_loaded_under_a_fake_mode_on_an_async_stream() -> None:
    data = our_file(_state()).getvalue()

    async def pieces() -> Any:
        yield data

    async def receive() -> Any:
        with FakeTensorMode():
            return await aiotorchio.load_from_stream(pieces())

    loaded = asyncio.run(receive())
    assert type(loaded["a"]) is type(loaded["p"]) is FakeTensor
    assert loaded["a"].fake_device.type == "cpu"


def test_loaded_under_a_fake_mode_takes_no_memory() -> None:
    """The header announces a terabyte, of which no byte was ever sent."""
    with FakeTensorMode():
        obj = torch.empty(2**38)
    with skip_data(materialize_fake_tensors=True):
        file = our_file(obj)
    loaded, _ = _loaded_as_fakes(
        aiotorchio.load, file, limits=aiotorchio.Limits(total_nbytes=2**41)
    )
    assert loaded.shape == (2**38,) and type(loaded) is FakeTensor


def test_loaded_under_a_fake_mode_is_verified() -> None:
    tensor = torch.arange(8, dtype=torch.uint8)
    data = bytearray(our_file(tensor).getvalue())
    data[data.index(bytes(range(8))) + 3] = 77
    with pytest.raises(aiotorchio.ChecksumError):
        _loaded_as_fakes(aiotorchio.load, io.BytesIO(data))


def test_loaded_under_a_fake_mode_with_a_callable_is_refused() -> None:
    def place(storage: Any, location: str) -> Any:
        return storage

    with pytest.raises(RuntimeError, match="Callable map_location not supported"):
        _loaded_as_fakes(torch.load, torch_file(torch.ones(2)), map_location=place)
    with pytest.raises(ValueError, match="map_location cannot be a callable"):
        _loaded_as_fakes(aiotorchio.load, our_file(torch.ones(2)), map_location=place)


def test_loaded_under_a_fake_mode_an_unknown_device() -> None:
    with pytest.raises(RuntimeError, match="at start of device string: foo"):
        _loaded_as_fakes(torch.load, torch_file(torch.ones(2)), map_location="foo")
    with pytest.raises(aiotorchio.InvalidObjectError, match="at start of device string: foo"):
        _loaded_as_fakes(aiotorchio.load, our_file(torch.ones(2)), map_location="foo")


def test_loaded_under_a_fake_mode_sparse() -> None:
    theirs, _ = _loaded_as_fakes(torch.load, torch_file(_sparse()))
    ours, _ = _loaded_as_fakes(aiotorchio.load, our_file(_sparse()))
    for loaded in (theirs, ours):
        assert type(loaded) is FakeTensor and loaded.layout is torch.sparse_coo
        assert (loaded.shape, loaded.fake_device.type) == ((3, 3), "cpu")


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_loaded_under_a_fake_mode_compressed_sparse(layout: torch.layout) -> None:
    """torch refuses; the tensor itself would be no fake, but its parts would be."""
    to_sparse: Any = torch.eye(3).to_sparse
    sparse = to_sparse(layout=layout)
    with pytest.raises(RuntimeError):
        _loaded_as_fakes(torch.load, torch_file(sparse))
    with pytest.raises(aiotorchio.InvalidObjectError, match="FakeTensorMode"):
        _loaded_as_fakes(aiotorchio.load, our_file(sparse))


async def _state_in_pieces() -> AsyncIterator[bytes]:
    """A message of enough tensors for a worker thread."""
    yield _MANY


_ONES = [torch.ones(2)]
_MANY = our_file([torch.ones(2)] + [torch.zeros(1) for _ in range(300)]).getvalue()


def test_the_flag_is_that_of_the_call_not_of_the_await() -> None:
    async def main() -> tuple[Any, Any]:
        with skip_data():
            without = aiotorchio.load_from_stream(_state_in_pieces())
            written = aiotorchio.iter_bytes(torch.ones(2))
        real = await aiotorchio.load_from_stream(written)
        return await without, real

    without, real = asyncio.run(main())
    assert without[0].shape == (2,)
    assert real.is_meta


def test_a_load_that_ends_inside_the_mode_of_another_task_is_real() -> None:
    async def main() -> Any:
        real = aiotorchio.load_from_stream(_state_in_pieces())
        small = aiotorchio.load_from_stream(aiotorchio.iter_bytes(_ONES))
        with FakeTensorMode():
            return await real, await small

    for loaded in asyncio.run(main()):
        assert type(loaded[0]) is torch.Tensor and loaded[0].tolist() == [1, 1]


def test_real_tensors_are_sent_inside_of_the_mode() -> None:
    matrix = torch.arange(600.0).view(20, 30)
    views = [matrix[:, 3], matrix[2]]
    file = io.BytesIO()
    with FakeTensorMode():
        for compact, snapshot in ((False, False), (True, False), (False, True)):
            aiotorchio.save(views, file, compact=compact, snapshot=snapshot)
    file.seek(0)
    for _ in range(3):
        column, row = aiotorchio.load(file)
        assert torch.equal(column, matrix[:, 3]) and torch.equal(row, matrix[2])


def test_specs_have_no_meaning_without_data() -> None:
    specs = {"a": aiotorchio.TensorSpec((2,), torch.float32)}
    with skip_data(), pytest.raises(ValueError, match="skip_data"):
        aiotorchio.save([("a", torch.ones(2))], io.BytesIO(), specs=specs)


def test_loaded_under_a_fake_mode_a_whole_module() -> None:
    """No code reads its memory, which would cause a warning."""
    theirs, ours = torch_file(torch.nn.Linear(2, 2)), our_file(torch.nn.Linear(2, 2))
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            their_module, _ = _loaded_as_fakes(torch.load, theirs, weights_only=False)
            module, _ = _loaded_as_fakes(aiotorchio.load, ours, weights_only=False)
    finally:
        torch.set_warn_always(always)
    for loaded in (their_module, module):
        assert type(loaded.weight) is FakeTensor
        assert isinstance(loaded.weight, torch.nn.Parameter)


@pytest.mark.parametrize("make", [_nested, _per_channel])
def test_loaded_under_a_fake_mode_what_torch_refuses(make: Callable[[], torch.Tensor]) -> None:
    for load, save in ((torch.load, torch_file), (aiotorchio.load, our_file)):
        with pytest.raises(Exception) as caught, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            _loaded_as_fakes(load, save(make()))
        if load is aiotorchio.load:
            assert isinstance(caught.value, aiotorchio.InvalidObjectError)


def test_loaded_outside_of_the_mode_is_real() -> None:
    with FakeTensorMode():
        pass
    corpus.assert_same(aiotorchio.load(our_file(_state())), _state())


# ----------------------------------------------------------------- options that torch.load lacks


def _iterated(mode: Any, **options: Any) -> dict[str, Any]:
    data = our_file({"a": torch.ones(2), "b": torch.ones(20000)}).getvalue()

    async def pieces() -> Any:
        yield data

    async def main() -> dict[str, Any]:
        with mode:
            async with aiotorchio.StreamReader(pieces()).open() as message:
                return {name: tensor async for name, tensor in message.iterate(**options)}

    return asyncio.run(main())


def test_iterated_without_data() -> None:
    tensors = _iterated(skip_data())
    assert [(name, tuple(tensor.shape)) for name, tensor in tensors.items()] == [
        ("a", (2,)),
        ("b", (20000,)),
    ]
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())


def test_iterated_under_a_fake_mode() -> None:
    tensors = _iterated(FakeTensorMode(), map_location="cuda:1")
    assert [type(tensor) for tensor in tensors.values()] == [FakeTensor] * 2
    assert all(tensor.fake_device == torch.device("cuda:1") for tensor in tensors.values())


@pytest.mark.parametrize("mode", [skip_data, FakeTensorMode])
def test_into_has_no_meaning_without_data(mode: Callable[[], Any]) -> None:
    file, destination = our_file({"a": torch.ones(2)}), {"a": torch.zeros(2)}
    with mode(), pytest.raises(ValueError, match="into"):
        aiotorchio.load(file, into=destination)
    assert destination["a"].tolist() == [0, 0]
