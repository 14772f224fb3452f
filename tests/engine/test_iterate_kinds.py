"""Iteration and selections with composite tensors: each comes under its name, as one tensor."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio import (
    InvalidObjectError,
    LimitExceeded,
    Limits,
    MismatchError,
    ProtocolError,
    StreamReader,
    TruncatedError,
    UnsafeObjectError,
)
from aiotorchio.graph.composites import Composites
from aiotorchio.wire import bounds
from aiotorchio.wire.header import Header
from tests.support import corpus, craft
from tests.support.corpus import assert_same
from tests.support.tensor_layouts import Pieces, encoded

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

TRUST: dict[str, Any] = {"safe_globals": [corpus.Wrapper]}
JAGGED = torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged)


def quantized(*values: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.tensor(values), 0.1, 0, torch.qint8)


def state() -> dict[str, Any]:
    """A tensor of each kind, and dense ones among them; two are in two places."""
    eye = torch.eye(3) * 2
    coo, shared = eye.to_sparse(), {"quantized": quantized(1.0, 2.0)}
    return {
        "first": torch.arange(5000),
        "coo": coo,
        "layers": [{"csr": eye.to_sparse_csr()}, corpus.Wrapper(torch.full((2, 2), 3.0))],
        "parameter": torch.nn.Parameter(eye.to_sparse(), requires_grad=False),
        "dense": torch.rand(700),
        "channels": torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2).long(), 0, torch.quint8
        ),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
        "jagged": JAGGED,
        "again": [coo, shared, shared],
        "text": "no tensor",
        "last": torch.ones(2),
    }


NAMES = [
    *("first", "coo", "layers.0.csr", "layers.1", "parameter", "dense", "channels", "nested"),
    *("jagged", "again.0", "again.1.quantized", "again.2.quantized", "last"),
]


def numbers(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, corpus.Wrapper):
        return "wrapper", tensor.wrapped.tolist()
    if tensor.is_nested:
        return str(tensor.layout), [part.tolist() for part in tensor.unbind()]
    kind = type(tensor).__name__, str(tensor.layout), str(tensor.dtype)
    dense = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach().to_dense()
    return *kind, dense.tolist()


def named(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    prefix = path + "." if path else ""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named(item, prefix + key)
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from named(item, f"{prefix}{n}")


async def iterated(data: bytes, **options: Any) -> list[tuple[str, Any]]:
    limits = options.pop("limits", None)
    async with StreamReader(Pieces(data, 1000)).open(limits=limits) as message:
        return [item async for item in message.iterate(**options)]


@pytest.mark.parametrize("select", [None, "coo"])
@pytest.mark.parametrize("among", ["alone", "first", "last"])
async def test_parts_in_several_chunks(among: str, select: str | None) -> None:
    """The iteration goes on after a chunk that completes no tensor."""
    coo = torch.arange(1.0, 3001).to_sparse()
    sent = {"coo": coo} if among == "alone" else {"coo": coo, "w": torch.ones(2)}
    if among == "last":
        sent = {"v": torch.ones(1500), "w": torch.ones(2), "coo": coo}
    data = encoded(sent, chunk_size=4096)
    assert data.count(b"CHNK") > 5
    found = await iterated(data, select=select)
    assert [name for name, _ in found if name == "coo"] == ["coo"]
    assert len(found) == (1 if select else len(sent))
    assert torch.equal(dict(found)["coo"].to_dense(), coo.to_dense())


async def test_one_over_the_memory_of_another() -> None:
    """All rows have names, and only the skeleton shows the quantized tensor."""
    tensor = quantized(1.0, 2.0)
    bare = torch.empty(0, dtype=torch.int8).set_(tensor.untyped_storage(), 0, (2,), (1,))
    found = dict(await iterated(encoded({"bare": bare, "quantized": tensor})))
    assert torch.equal(found["bare"], bare)
    assert torch.equal(found["quantized"].dequantize(), tensor.dequantize())
    # A bare storage is no tensor; it is not yielded.
    found = dict(await iterated(encoded({"bare": bare, "storage": bare.untyped_storage()})))
    assert found.keys() == {"bare"}


@pytest.mark.parametrize("chunk_size", [4096, 2**20])
async def test_each_comes_once_under_its_names(chunk_size: int) -> None:
    sent = state()
    found = await iterated(encoded(sent, chunk_size=chunk_size), **TRUST)
    assert sorted(name for name, _ in found) == sorted(NAMES)
    tensors, expected = dict(found), dict(named(sent))
    for name in NAMES:
        assert numbers(tensors[name]) == numbers(expected[name]), name
    assert tensors["coo"] is tensors["again.0"]
    assert tensors["again.1.quantized"] is tensors["again.2.quantized"]


async def test_one_comes_as_soon_as_its_last_row_is_there() -> None:
    sent = {
        "coo": torch.eye(3).to_sparse(),
        **{f"{n}": torch.full((3000,), n, dtype=torch.uint8) for n in range(4)},
        "quantized": quantized(1.0),
        "last": torch.full((9000,), 1, dtype=torch.uint8),
    }
    pieces = Pieces(encoded(sent, chunk_size=4096), 100)
    async with StreamReader(pieces).open() as message:
        taken = {}
        async for name, _ in message:
            taken[name] = pieces.taken
    assert list(taken) == list(sent)
    assert taken["coo"] < taken["3"] < taken["last"]
    assert taken["quantized"] < taken["last"]


SELECTIONS: list[tuple[Any, list[str]]] = [
    ("coo", ["coo"]),
    ("again.0", ["again.0"]),
    (["layers.*", "dense"], ["layers.0.csr", "layers.1", "dense"]),
    (lambda name: name.endswith("quantized"), ["again.1.quantized", "again.2.quantized"]),
    (["nested", "last"], ["nested", "last"]),
    (lambda name: False, []),
]


@pytest.mark.parametrize(("select", "names"), SELECTIONS)
async def test_select_takes_one_or_leaves_it_out(select: Any, names: list[str]) -> None:
    sent = state()
    data, expected = encoded(sent, chunk_size=4096), dict(named(sent))
    found = await iterated(data, select=select, **TRUST)
    loaded = aiotorchio.load(io.BytesIO(data), select=select, **TRUST)
    # The items of a list stay, as dense ones do.
    kept = {name for name, _ in named(loaded)} - {"layers.1", "again.0"}
    assert kept == set(names) - {"layers.1", "again.0"}
    assert [name for name, _ in found] == names
    for name, tensor in [*found, *((n, t) for n, t in named(loaded) if n in names)]:
        assert numbers(tensor) == numbers(expected[name]), name


async def test_one_that_is_not_selected_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    hold = Composites.hold

    def noting(self: Composites, index: int, storage: torch.UntypedStorage | None) -> None:
        held.extend([index] if index in self.storages else [])
        hold(self, index, storage)

    monkeypatch.setattr(Composites, "hold", noting)
    sent = {"a": torch.eye(3).to_sparse(), "w": torch.ones(2), "b": torch.eye(3).to_sparse()}
    assert [name for name, _ in await iterated(encoded(sent), select=["b", "w"])] == ["w", "b"]
    # Only the indices and values of "b" were held, and they were freed.
    assert held == [3, 4]


async def test_nothing_is_kept_of_what_was_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Composites] = []
    choose = Composites.choose

    def noting(self: Composites, wanted: Any) -> None:
        seen.append(self)
        choose(self, wanted)

    monkeypatch.setattr(Composites, "choose", noting)
    assert len(await iterated(encoded(state(), chunk_size=4096), **TRUST)) == len(NAMES)
    (composites,) = seen
    assert not composites._held and not composites._results and not composites._chosen
    assert not +composites._uses and not +composites._storage_uses


async def test_memory_that_tensors_share_is_shared_here() -> None:
    values = torch.arange(6.0)
    indices = torch.tensor([[0, 2]])
    make = partial(torch.sparse_coo_tensor, is_coalesced=True, check_invariants=True)
    one, two = make(indices, values[:2], (3,)), make(indices, values[2:4], (3,))
    sent = {"one": one, "large": torch.ones(5000), "two": two, "values": values}
    found = dict(await iterated(encoded(sent, chunk_size=4096)))
    assert {name: numbers(each) for name, each in found.items()} == {
        name: numbers(each) for name, each in sent.items()
    }
    addresses = {each.untyped_storage().data_ptr() for each in (found["one"]._values(),)}
    assert addresses == {
        found["two"]._values().untyped_storage().data_ptr(),
        found["values"].untyped_storage().data_ptr(),
    }


async def test_dtensors() -> None:
    with corpus.process_group():
        sent: Any = corpus.dtensor()
        sent |= {"dense": torch.ones(3), "e": corpus.dtensor()["d"]}  # type: ignore[index]  # it is declared an object
        found = dict(await iterated(encoded(sent), safe_globals=corpus.dtensor_globals()))
        assert list(found) == ["d", "dense", "e"]
        for name in "de":
            assert type(found[name]) is type(sent[name])
            assert torch.equal(found[name].to_local(), sent[name].to_local())
            assert found[name].placements == sent[name].placements
        data = encoded(sent)
        loaded = aiotorchio.load(
            io.BytesIO(data), select="d", safe_globals=corpus.dtensor_globals()
        )
        assert list(loaded) == ["d"]


def attributes() -> dict[str, Any]:
    tensor: Any = torch.ones(2)
    tensor.scale = torch.ones(3)
    return {"w": torch.ones(2), "a": tensor}


UNNAMED: dict[str, tuple[Callable[[], Any], str]] = {
    "in an attribute": (attributes, "1 tensors or parts of tensors in this message have no name"),
    "a storage": (
        lambda: {"s": torch.eye(2).to_sparse(), "storage": torch.ones(2).untyped_storage()},
        "1 tensors or parts of tensors in this message have no name",
    ),
    "in a set": (
        lambda: {"s": {torch.eye(2).to_sparse()}},
        "2 tensors or parts of tensors in this message",
    ),
    "a class that is not trusted": (
        lambda: {"w": torch.ones(2), "x": corpus.Wrapper(torch.ones(2))},
        r"no name \(Unsupported global: GLOBAL tests.support.corpus.Wrapper",
    ),
    "one name for two": (
        lambda: {"a": {"b": torch.eye(2).to_sparse()}, "a.b": torch.eye(2).to_sparse()},
        "two tensors have the same name 'a.b'",
    ),
    "one name, and a dense tensor": (
        lambda: {"a": {"b": torch.eye(2).to_sparse()}, "a.b": torch.ones(2)},
        "two tensors have the same name 'a.b'",
    ),
}


@pytest.mark.parametrize("case", UNNAMED)
async def test_what_cannot_be_named_raises_before_anything_comes(case: str) -> None:
    make, reason = UNNAMED[case]
    pieces = Pieces(encoded(make()) + encoded({"next": torch.ones(1)}), 1000)
    reader = StreamReader(pieces)
    async with reader.open() as message:
        with pytest.raises(MismatchError, match=reason):
            await anext(message.iterate())
        # The message is unused.
        await message.load(**TRUST)
    assert list(await reader.load()) == ["next"]


async def test_a_selection_leaves_out_what_cannot_be_named() -> None:
    data = encoded({"w": torch.ones(2), "x": corpus.Wrapper(torch.ones(2))})
    for select in ("w", "*", lambda name: True):
        assert [name for name, _ in await iterated(data, select=select)] == ["w"]
    with pytest.raises(MismatchError, match=r"GLOBAL tests.support.corpus.Wrapper .*: 'x'"):
        await iterated(data, select="x")
    with pytest.raises(UnsafeObjectError, match=r"GLOBAL tests.support.corpus.Wrapper"):
        aiotorchio.load(io.BytesIO(data), select="w")
    assert [name for name, _ in await iterated(data, **TRUST)] == ["w", "x"]


async def test_one_without_a_target_is_left_out_or_refused() -> None:
    sent, into = {"w": torch.ones(2), "coo": torch.eye(2).to_sparse()}, {"w": torch.zeros(2)}
    data = encoded(sent)
    assert aiotorchio.load(io.BytesIO(data), into=into, select="w") == into
    with pytest.raises(MismatchError, match="not in the target: coo"):
        aiotorchio.load(io.BytesIO(data), into=into, select="coo")
    loaded = aiotorchio.load(io.BytesIO(data), into=into, select="coo", strict=False)
    assert list(loaded) == ["coo"]


async def test_map_location() -> None:
    sent = {"coo": torch.eye(3).to_sparse(), "w": torch.ones(2)}
    found = dict(await iterated(encoded(sent), map_location="meta"))
    assert {each.device.type for each in found.values()} == {"meta"}
    assert found["coo"].layout is torch.sparse_coo
    data = encoded(sent), encoded({"w": torch.ones(2), "q": quantized(1.0)})
    with torch.serialization.skip_data():
        found = dict(await iterated(data[1]))
        assert found["q"].is_quantized and found["w"].shape == (2,)
        with pytest.raises(InvalidObjectError, match="left out its numbers"):
            await iterated(data[0])


# ------------------------------------------------------------------------- hostile messages


def unnamed(header: Any) -> None:
    for row in header.tensors:
        row.names.clear()


def crafted(value: Any, *tensors: torch.Tensor) -> bytes:
    return craft.message(craft.pickled(value), tensors=tensors, change=unnamed)


def sparse(*parts: Any) -> craft.Code:
    layout = craft.call("torch.serialization", "_get_layout", "torch.sparse_coo")
    return craft.rebuild("_rebuild_sparse_tensor", layout, parts)


INDICES, VALUES = torch.tensor([[0, 5]]), torch.ones(2)
THING = torch.ones(2)


def wrapped(state: Any, size: tuple[Any, ...] = (2,)) -> craft.Code:
    layout = craft.call("torch.serialization", "_get_layout", "torch.strided")
    kind = craft.name("tests.support.corpus", "Wrapper")
    device = craft.call("torch", "device", "cpu")
    args = (kind, craft.name("torch", "float32"), size, (1,), 0, layout, device, False)
    function = craft.name("torch._utils", "_rebuild_wrapper_subclass")
    return craft.subclassed(function, kind, args, state)


HOSTILE: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "a wrong shape": (
        lambda: crafted(
            {"ok": sparse(craft.tensor(2), craft.tensor(1), (6,), True)}
            | {"bad": sparse(craft.tensor(0), craft.tensor(1), (3,), True)},
            *(INDICES, VALUES, torch.tensor([[0, 5]])),
        ),
        InvalidObjectError,
        "bad",
    ),
    "rows that do not fit": (
        lambda: crafted(
            {"bad": sparse(craft.tensor(0), craft.tensor(1), (6,), True)}, INDICES, torch.ones(7)
        ),
        InvalidObjectError,
        "bad",
    ),
    "a row that is not there": (
        lambda: crafted(
            {"bad": sparse(craft.tensor(0), craft.tensor(7), (6,), True)}, INDICES, VALUES
        ),
        ProtocolError,
        "skeleton",
    ),
    "a storage that is not there": (
        lambda: crafted(
            {"bad": craft.strided(9, "float32", 0, (2,), (1,)), "w": craft.tensor(0)}, THING
        ),
        ProtocolError,
        "skeleton",
    ),
    "a tensor beyond its storage": (
        lambda: crafted(
            {"ok": wrapped({"wrapped": craft.tensor(0)})}
            | {"bad": craft.strided(0, "float32", 0, (200,), (1,))},
            THING,
        ),
        InvalidObjectError,
        "bad",
    ),
    "an attribute that gives it other memory": (
        lambda: crafted({"bad": wrapped({"data": craft.tensor(0)})}, THING),
        UnsafeObjectError,
        "bad",
    ),
    "a shape of other than numbers": (
        lambda: crafted({"bad": wrapped({"wrapped": craft.tensor(0)}, ("2",))}, THING),
        InvalidObjectError,
        "bad",
    ),
    "a function as a tensor": (
        lambda: crafted(
            {
                "bad": craft.subclassed(
                    craft.name("torch", "Size"), craft.name("torch", "Tensor"), ((),), {}
                ),
                "w": [craft.strided(0, "float32", 0, (2,), (1,))],
            },
            THING,
        ),
        UnsafeObjectError,
        "skeleton",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_parts(case: str) -> None:
    make, error, entry = HOSTILE[case]
    found = []
    with pytest.raises((error, MismatchError) if entry == "skeleton" else error) as caught:
        async with StreamReader(Pieces(make(), 100)).open() as message:
            async for name, _ in message.iterate(**TRUST):
                found.append(name)
    assert "bad" not in found
    if entry == "bad":
        refused: Any = caught.value
        assert refused.entry == "bad"


async def test_one_that_is_made_of_itself() -> None:
    point = craft.Code(craft.new("tests.support.corpus", "Point") + craft.put(1))
    bad = craft.Code(wrapped({"wrapped": craft.tensor(0), "point": point}) + craft.put(2))
    # The point, which is a part of the tensor, gets the tensor in its state.
    loop = craft.build(craft.get(1), {"tensor": craft.get(2)})
    data = crafted({"bad": bad, "loop": loop}, THING)
    trusted = [corpus.Wrapper, corpus.Point]
    with pytest.raises(MismatchError, match="'bad' is made of itself"):
        await iterated(data, safe_globals=trusted)
    loaded = aiotorchio.load(io.BytesIO(data), safe_globals=trusted)
    assert loaded["bad"].point.tensor is loaded["bad"]


async def test_a_container_that_is_changed_after_its_use() -> None:
    """A load has used it as it was; a call that runs later would find it changed."""
    rest = craft.Code(b"}" + craft.put(1))
    more = craft.Code(craft.get(1) + craft.assemble("late") + craft.assemble(1) + b"s")
    bad = wrapped({"wrapped": craft.tensor(0), "rest": [rest]})
    with pytest.raises(MismatchError, match="changes a container after a call has used it"):
        await iterated(crafted({"bad": bad, "more": more}, THING), **TRUST)
    # A container that is changed before the call is fine.
    found = await iterated(crafted({"more": [rest, more], "ok": bad_after(1)}, THING), **TRUST)
    assert [name for name, _ in found] == ["ok"]
    assert found[0][1].rest == {"late": 1}


def bad_after(memo: int) -> craft.Code:
    return wrapped({"wrapped": craft.tensor(0), "rest": craft.get(memo)})


async def test_arguments_that_many_calls_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is charged for its own tuple of the arguments."""
    lower = dataclasses.replace(bounds.BOUNDS, memory_floor=2**16)
    monkeypatch.setattr(bounds, "BOUNDS", lower)
    many = craft.Code(craft.assemble(tuple([craft.tensor(0)] * 100)) + craft.put(1))
    function = craft.name("torch._utils", "_rebuild_sparse_tensor")
    calls = [craft.Code(function + craft.get(1) + b"R")] * 100
    data = crafted([many, calls], THING)
    with pytest.raises(LimitExceeded, match="take more than 65536 bytes of memory"):
        aiotorchio.load(io.BytesIO(data))
    with pytest.raises(MismatchError, match="take more than 65536 bytes of memory"):
        await iterated(data)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]  # as Python itself marks such classes


class Same:
    def __hash__(self) -> int:
        return 7


@pytest.mark.parametrize(
    ("made", "error", "text"),
    [
        (lambda: {craft.new(__name__, "Unhashable"): 1}, InvalidObjectError, "unhashable type"),
        (
            lambda: craft.call("builtins", "set", [craft.new(__name__, "Same")] * 100),
            LimitExceeded,
            "items with the same hash",
        ),
    ],
)
async def test_keys_and_members_of_trusted_classes(
    made: Callable[[], Any], error: type[Exception], text: str
) -> None:
    """Objects of these classes hash differently from their proxies."""
    trusted = [corpus.Wrapper, Unhashable, Same]
    data = crafted({"bad": wrapped({"wrapped": craft.tensor(0), "rest": made()})}, THING)
    with pytest.raises(error, match=text):
        aiotorchio.load(io.BytesIO(data), safe_globals=trusted)
    with pytest.raises(error, match=text) as caught:
        await iterated(data, safe_globals=trusted)
    refused: Any = caught.value
    assert refused.entry == "bad" and refused.offset is not None


@pytest.mark.parametrize("key", [torch.ones(2), (1, torch.ones(2)), corpus.Wrapper], ids=type)
async def test_what_is_below_a_key_without_a_text_has_no_name(key: Any) -> None:
    sent = {"w": torch.ones(3), key: torch.eye(2).to_sparse()}
    with pytest.raises(MismatchError, match="have no name"):
        await iterated(encoded(sent), **TRUST)
    loaded = aiotorchio.load(io.BytesIO(encoded(sent)), select="w", **TRUST)
    assert len(loaded) == 2 and torch.equal(loaded["w"], torch.ones(3))


async def test_keys_that_are_doubled_tuples() -> None:
    """The check visits each tuple once, however often it is in the next one."""
    key: tuple[Any, ...] = ()
    for _ in range(16):
        key = (key, key)
    found = await iterated(encoded({"w": torch.ones(3), key: {}, "coo": torch.eye(2).to_sparse()}))
    assert [name for name, _ in found] == ["w", "coo"]


async def test_a_shared_part_costs_once() -> None:
    """The number of tensors that contain the part does not matter."""
    big = [craft.Code(craft.assemble(list(range(1000))) + craft.put(1))]
    big += [craft.get(1)] * 199
    value = {
        f"{n}": wrapped({"wrapped": craft.tensor(0), "rest": each}) for n, each in enumerate(big)
    }
    found = await iterated(crafted(value, THING), **TRUST)
    assert len(found) == 200
    assert len({id(tensor.rest) for _, tensor in found}) == 1
    assert len({id(tensor.wrapped) for _, tensor in found}) == 1


DEEP: list[Any] = functools.reduce(lambda inner, _: [inner], range(300), [])


@pytest.mark.parametrize(
    ("sent", "options"),
    [
        ({"deep": DEEP}, {"weights_only": False}),
        ({"a": {"b": torch.eye(2).to_sparse()}, "a.b": torch.eye(2).to_sparse()}, {}),
    ],
)
def test_a_selection_does_not_need_names_that_it_does_not_name(
    sent: dict[str, Any], options: dict[str, Any]
) -> None:
    data = encoded({"w": torch.ones(2), "coo": torch.eye(2).to_sparse(), **sent})
    loaded = aiotorchio.load(io.BytesIO(data), select="w", **options)
    assert torch.equal(loaded["w"], torch.ones(2))


@pytest.mark.parametrize("encoding", ["latin1", "bytes"])
def test_a_selection_of_a_pickle_of_python_2(encoding: str) -> None:
    text = craft.Code(b"U\x03\xe9\xffa")
    value = {"w": craft.tensor(0), "coo": sparse(craft.tensor(1), craft.tensor(2), (6,), True)}

    def names(header: Header) -> None:
        for row, name in zip(header.tensors, ("w", "", ""), strict=True):
            row.names[:] = [name] if name else []

    data = craft.message(
        craft.pickled({**value, "text": text}), tensors=[THING, INDICES, VALUES], change=names
    )
    loaded = aiotorchio.load(io.BytesIO(data), select="w", encoding=encoding)
    assert loaded.keys() == {"w", "text"} and torch.equal(loaded["w"], THING)


def test_nothing_is_looked_at_in_a_pickle_that_is_not_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded({"w": torch.ones(2), "coo": torch.eye(2).to_sparse()})
    monkeypatch.setattr("aiotorchio.codecs.pickled.codec.load_with", None)
    with pytest.raises(UnsafeObjectError, match="allow_pickle is False"):
        aiotorchio.load(io.BytesIO(data), select="w", allow_pickle=False)


async def test_names_that_are_too_long_all_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotorchio.table.containers.TEXT_MAX", 1000)
    value = {"k" * 100: {f"{n}": wrapped({"wrapped": craft.tensor(0)}) for n in range(20)}}
    with pytest.raises(MismatchError, match="more than 1000 characters"):
        await iterated(crafted(value, THING), **TRUST)


async def test_indices_are_bounded_over_the_whole_message() -> None:
    sent = {f"{n}": torch.eye(50).to_sparse() for n in range(5)}
    assert len(await iterated(encoded(sent), limits=Limits(sparse_nnz=250))) == 5
    with pytest.raises(LimitExceeded, match=r"Limits.sparse_nnz") as caught:
        await iterated(encoded(sent), limits=Limits(sparse_nnz=240))
    assert caught.value.entry == "4"


async def test_every_cut() -> None:
    sent = {"w": torch.ones(1500), "coo": torch.eye(2).to_sparse(), "q": quantized(1.0)}
    data = encoded(sent, chunk_size=4096)
    for cut in range(0, len(data), 53):
        found = []
        with pytest.raises(TruncatedError):
            async with StreamReader(Pieces(data[:cut], 500)).open() as message:
                async for name, tensor in message:
                    found.append(name)
                    assert numbers(tensor) == numbers(sent[name])
        assert found == list(sent)[: len(found)]


async def test_what_follows_the_message_is_left_alone() -> None:
    reader = StreamReader(Pieces(encoded(state()) + encoded([torch.zeros(2)]) + b"tail", 100))
    async with reader.open() as message:
        async for _ in message.iterate(**TRUST):
            break
    assert_same(await reader.load(), [torch.zeros(2)])


async def test_an_iteration_that_failed_at_a_name_can_be_made_again() -> None:
    async with StreamReader(Pieces(encoded(state()), 1000)).open() as message:
        with pytest.raises(MismatchError, match="no name"):
            await anext(message.iterate())
        with pytest.raises(MismatchError, match="not in the message: 'nothing'"):
            await anext(message.iterate(select="nothing", **TRUST))
        found = [name async for name, _ in message.iterate(**TRUST)]
    assert sorted(found) == sorted(NAMES)
