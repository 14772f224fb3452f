"""Loads into modules do in place what ``load_state_dict`` does, or say why they do not."""

from __future__ import annotations

import copy
import io
import sys
import threading
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.algorithms._checkpoint.checkpoint_wrapper
from torch import nn

import aiotorchio
from aiotorchio import LimitExceeded, MismatchError
from aiotorchio.graph.module_survey import survey
from tests.support.tensor_layouts import Pieces, all_modes, encoded, into_options, load, safe_modes

pytestmark = pytest.mark.anyio


# ------------------------------------------------------------------------------ modules


def before_load(module: nn.Module, hook: Callable[..., None]) -> None:
    module.register_load_state_dict_pre_hook(hook)


class Copies(nn.Module):
    """A module whose state has a copy of a tensor that is no buffer, as in metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.total = torch.randn(3)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "total"] = self.total.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.total = state_dict.pop(prefix + "total")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Packed(nn.Module):
    """A module whose state has a number as a tensor, as in quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.scale = float(torch.randn(()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.tensor([self.scale])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.scale = float(state_dict.pop(prefix + "scale"))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Gathers(nn.Module):
    """A module whose state has one tensor for two shards."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = list(torch.randn(4).chunk(2))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = torch.cat(self.halves)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.halves = list(state_dict.pop(prefix + "weight").chunk(2))


class Extra(nn.Module):
    """A module with extra state, as in Transformer Engine."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.state = make()

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class OldName(nn.Module):
    """A module that was saved under another name in an old version."""

    def __init__(self, *, old: bool = False) -> None:
        super().__init__()
        self.register_parameter("w" if old else "weight", nn.Parameter(torch.randn(3)))
        if not old:
            before_load(self, self._rename)

    @staticmethod
    def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "w" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "w")


class RenamesBelow(nn.Module):
    """A child had another name in an old version, and has no code for it."""

    def __init__(self, *, old: bool = False) -> None:
        super().__init__()
        self.add_module("fc" if old else "linear", nn.Linear(2, 3))
        if not old:
            before_load(self, self._rename)

    @staticmethod
    def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix + "fc.")]:
            state_dict[prefix + "linear." + key[len(prefix) + 3 :]] = state_dict.pop(key)


class Quantized(nn.Module):
    """A layer like bitsandbytes' 4-bit ones: no code loads the parts of the weight in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(255, (8,), dtype=torch.uint8), False)
        self.absmax = torch.randn(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = self.absmax


class Views(nn.Module):
    """A module that computes with views of its weight, as bitsandbytes' layers do."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))
        self.where = where
        view = self.weight.detach().t()
        if where == "tensor":
            vars(self.weight)["CB"] = view
        elif where == "module":
            self.view = view
        elif where == "object":
            self.state = types.SimpleNamespace(CB=view)
        elif where == "list":
            self.views = [view]
        else:
            self.register_buffer("buffer", view, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: dict[str, Callable[[], Any]] = {
            "tensor": lambda: vars(self.weight)["CB"],
            "module": lambda: self.view,
            "object": lambda: self.state.CB,
            "list": lambda: self.views[0],
            "buffer": lambda: self.buffer,
        }
        result: torch.Tensor = x @ found[self.where]().t()
        return result


def extra_tensors() -> dict[str, Any]:
    return {"stats": torch.randn(2), "steps": 3, "more": [torch.randn(1)]}


def spectral() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(nn.Linear(3, 3))


def weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 3))


def batch_norm() -> nn.Module:
    module = nn.BatchNorm1d(3)
    module(torch.randn(4, 3))
    return module


def lazily() -> nn.Module:
    module = nn.LazyLinear(3)
    module(torch.zeros(1, 2))
    return module


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.nn.quantized.dynamic.Linear(3, 4)
    return module


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))


def compiled() -> Any:
    return torch.compile(nn.Linear(2, 3), backend="eager")


KINDS: dict[str, Callable[[], nn.Module]] = {
    "copies": Copies,
    "packed": Packed,
    "gathers": Gathers,
    "extra bytes": lambda: Extra(lambda: torch.randn(3).numpy().tobytes()),
    "extra tensor": lambda: Extra(lambda: torch.randn(3)),
    "extra dict of tensors": lambda: Extra(extra_tensors),
    "hook": OldName,
    "batch norm": batch_norm,
    "spectral norm": spectral,
    "weight norm": weight_norm,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    "was lazy": lazily,
    "compiled": compiled,
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 3)),
    "scripted": scripted,
    "rows": lambda: nn.ModuleDict({"a": Copies(), "b": nn.ModuleList([Packed(), Packed()])}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def model(kind: str) -> nn.Module:
    """Make a module between ordinary ones."""
    return nn.Sequential(nn.Linear(2, 2), KINDS[kind](), nn.LayerNorm(2))


def plainly(value: Any) -> Any:
    """Convert an object so that == compares it bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plainly(item) for key, item in value.items()}
    return [plainly(item) for item in value] if isinstance(value, list | tuple) else value


def state(module: nn.Module) -> Any:
    """Copy the current state; a module's state may change with the module."""
    return plainly(module.state_dict())


async def load_in(way: str, data: bytes, **options: Any) -> Any:
    if way == "blocking":
        return load(data, **options)
    return await aiotorchio.load_from_stream(Pieces(data, 1000), **options)


both_ways = pytest.mark.parametrize("way", ["stream", "blocking"])


# ------------------------------------------------------------------------------ what arrives


@kinds
@all_modes
@both_ways
async def test_a_module_is_as_after_load_state_dict(kind: str, mode: str, way: str) -> None:
    sent, module, expected = model(kind), model(kind), model(kind)
    expected.load_state_dict(sent.state_dict())
    places = {id(each) for each in module.parameters()}
    await load_in(way, encoded(sent.state_dict()), **into_options(mode, module))
    assert state(module) == state(expected) == state(sent)
    assert {id(each) for each in module.parameters()} == places


@all_modes
async def test_modules_in_a_destination_with_other_things(mode: str) -> None:
    sent: Any = {"a": {"model": model("copies")}, "b": model("extra dict of tensors")}
    into: Any = {
        "a": {"model": model("copies")},
        "b": model("extra dict of tensors"),
        "x": torch.zeros(3),
    }
    message = {
        "a": {"model": sent["a"]["model"].state_dict()},
        "b": sent["b"].state_dict(),
        "x": torch.ones(3),
    }
    await load_in("stream", encoded(message), **into_options(mode, into))
    assert state(into["a"]["model"]) == state(sent["a"]["model"])
    assert state(into["b"]) == state(sent["b"])
    assert into["x"].eq(1).all()


@pytest.mark.parametrize(
    "kind", ["batch norm", "compiled", "orthogonal", "parametrized", "spectral norm", "weight norm"]
)
@all_modes
def test_a_module_computes_as_its_sender(kind: str, mode: str) -> None:
    sent, module = KINDS[kind]().eval(), KINDS[kind]().eval()
    x = torch.randn(4, 3 if kind != "compiled" else 2)
    module(x)
    load(encoded(sent.state_dict()), **into_options(mode, module))
    assert torch.equal(module(x), sent(x))


@pytest.mark.parametrize("where", ["tensor", "module", "object", "list", "buffer"])
@all_modes
def test_views_that_a_module_keeps_of_its_tensors(mode: str, where: str) -> None:
    module = nn.Sequential(nn.Linear(2, 4), Views(where))
    options = into_options(mode, module)
    for _ in range(3):
        sent = nn.Sequential(nn.Linear(2, 4), Views("module"))
        load(encoded(sent.state_dict()), **options)
        x = torch.randn(3, 2)
        assert torch.equal(module(x), sent(x))


def test_a_lazy_module() -> None:
    sent, module = lazily(), nn.LazyLinear(3)
    load(encoded(sent.state_dict()), into=module)
    assert state(module) == state(sent)


def test_a_layer_that_torch_quantizes() -> None:
    sent: Any = nn.Sequential(quantized())
    module = nn.Sequential(quantized())
    weight = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    sent[0].set_weight_bias(weight, torch.randn(4))
    load(encoded(sent.state_dict()), into=module)
    x = torch.randn(2, 3)
    assert torch.equal(module(x), sent(x))


@pytest.mark.parametrize("kind", [OldName, RenamesBelow])
@all_modes
def test_a_hook_that_knows_old_names(kind: Any, mode: str) -> None:
    sent, module = nn.Sequential(kind(old=True)), nn.Sequential(kind())
    load(encoded(sent.state_dict()), **into_options(mode, module))
    assert list(state(module).values()) == list(state(sent).values())


def test_a_name_that_no_hook_knows() -> None:
    state = nn.Sequential(OldName()).state_dict()
    state["0.other"] = torch.ones(1)
    with pytest.raises(MismatchError, match=r"not in the target: 0\.other") as caught:
        load(encoded(state), into=nn.Sequential(OldName()))
    assert caught.value.unexpected == ("0.other",)
    load(encoded(state), into=nn.Sequential(OldName()), strict=False)


@all_modes
def test_a_batch_norm_that_did_not_count_batches_yet(mode: str) -> None:
    sent, module = nn.Sequential(batch_norm()), nn.Sequential(batch_norm())
    old = OrderedDict(sent.state_dict())
    del old["0.num_batches_tracked"]
    load(encoded(old), **into_options(mode, module))
    old["0.num_batches_tracked"] = torch.tensor(1)
    assert state(module) == plainly(old)


def test_a_batch_norm_of_today_counts_batches() -> None:
    sent = nn.Sequential(batch_norm()).state_dict()
    del sent["0.num_batches_tracked"]
    with pytest.raises(MismatchError, match=r"not in the message: 0\.num_batches_tracked"):
        load(encoded(sent), into=nn.Sequential(batch_norm()))


def test_nothing_else_may_be_missing_of_a_batch_norm() -> None:
    sent, module = nn.Sequential(batch_norm()).state_dict(), nn.Sequential(batch_norm())
    before = state(module)
    del sent["0.running_mean"]
    with pytest.raises(MismatchError, match=r"not in the message: 0\.running_mean"):
        load(encoded(sent), into=module)
    assert state(module) == before


def test_hooks_run_as_in_load_state_dict() -> None:
    seen: list[str] = []
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    def before(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
        seen.append(f"before {prefix} {len(state_dict)}")

    def after(module: nn.Module, keys: Any) -> None:
        seen.append(f"after {type(module).__name__} {keys.missing_keys} {keys.unexpected_keys}")

    before_load(module, before)
    before_load(module[1], before)
    module[1][0].register_load_state_dict_post_hook(after)
    module.register_load_state_dict_post_hook(after)
    message = copy.deepcopy(module).state_dict()
    module.load_state_dict(message)
    expected, seen[:] = list(seen), []
    load(encoded(message), into=module)
    assert seen == expected and len(seen) == 4


# ------------------------------------------------------------------------------ in part


def test_a_selection_of_entries() -> None:
    sent, module = model("copies"), model("copies")
    before = state(module)
    load(encoded(sent.state_dict()), into=module, select="1.total")
    assert state(module) == before | {"1.total": state(sent)["1.total"]}


def test_what_is_not_selected_is_not_loaded() -> None:
    sent, module = model("extra bytes"), model("extra bytes")
    before = state(module)
    load(encoded(sent.state_dict()), into=module, select="0.*")
    assert state(module) == before | {k: v for k, v in state(sent).items() if k[0] == "0"}


def is_refused_before_the_payload(
    module: nn.Module, data: bytes, mode: str, reason: str
) -> MismatchError:
    before, done = state(module), list[int]()
    options = into_options(mode, module)
    with pytest.raises(MismatchError, match=reason) as caught:
        load(data, progress=lambda count, _: done.append(count), **options)
    assert state(module) == before and not done
    return caught.value


@all_modes
def test_extra_state_that_is_missing(mode: str) -> None:
    message, module = model("extra bytes").state_dict(), model("extra bytes")
    del message["1._extra_state"]
    reason = r"not in the message: 1\._extra_state"
    error = is_refused_before_the_payload(module, encoded(message), mode, reason)
    assert error.missing == ("1._extra_state",)
    load(encoded(message), strict=False, **into_options(mode, module))
    assert state(module)["1.linear.weight"] == plainly(message["1.linear.weight"])


@pytest.mark.parametrize("value", [b"state", None, 5, torch.ones(1), {"a": torch.ones(1)}])
@pytest.mark.parametrize("path", ["", "a.model"])
@all_modes
def test_extra_state_for_a_module_of_tensors(mode: str, path: str, value: Any) -> None:
    """The message comes from a sender whose modules have extra state."""
    module, message = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)).state_dict()
    message["0._extra_state"] = value
    sent: Any = {"a": {"model": message}} if path else message
    into: Any = {"a": {"model": module}} if path else module
    before = state(module)
    with pytest.raises(MismatchError, match=r"not in the target: .*0\._extra_state"):
        load(encoded(sent), **into_options(mode, into))
    assert state(module) == before
    load(encoded(sent), strict=False, **into_options(mode, into))
    assert state(module)["0.weight"] == plainly(message["0.weight"])


@safe_modes
def test_extra_state_in_a_pickle_for_a_module_of_tensors(mode: str) -> None:
    module, message = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)).state_dict()
    before = state(module)
    message["0._extra_state"] = frozenset()
    with pytest.raises(MismatchError, match=r"not in the target: 0\._extra_state"):
        load(encoded(message), **into_options(mode, module))
    assert state(module) == before


def test_a_module_is_looked_through_in_one_pass() -> None:
    """The survey finds the same paths, tensors and hooks as torch's own functions."""
    shared = Extra(lambda: b"")
    module: Any = nn.ModuleDict({"a": model("batch norm"), "b": shared, "c": nn.Sequential(shared)})
    module["a"][0].register_buffer("passing", torch.ones(1), persistent=False)
    before_load(module["a"][2], lambda *_: None)
    found = survey(module)
    assert list(found.submodules.items()) == list(module.named_modules(remove_duplicate=False))
    shown = module.state_dict(keep_vars=True).values()
    assert found.own.keys() == {id(each) for each in shown if isinstance(each, torch.Tensor)}
    assert found.active == {"a.2", "b", "c.0"}
    assert found.norms and found.reads_state and not found.edits_missing and found.sharded is None


def test_an_empty_key_for_a_module_with_a_hook() -> None:
    module: Any = nn.Sequential(OldName())
    message = {**module.state_dict(), "": torch.ones(1)}
    with pytest.raises(MismatchError, match="not in the target"):
        load(encoded(message), into=module)


def test_extra_state_that_nobody_takes() -> None:
    message = nn.Sequential(nn.Linear(2, 2)).state_dict()
    message["0._extra_state"] = torch.ones(1)
    module: Any = nn.Sequential(nn.Linear(2, 2))
    module.register_load_state_dict_post_hook(lambda module, keys: None)
    with pytest.raises(MismatchError, match=r"not in the target: 0\._extra_state"):
        load(encoded(message), into=module)


# ------------------------------------------------------------------------------ refusals


@all_modes
def test_an_entry_that_nothing_loads(mode: str) -> None:
    """The module would end half new, half old."""
    sent, module = nn.Sequential(Quantized()), nn.Sequential(Quantized())
    before = state(module)
    with pytest.raises(MismatchError) as caught:
        load(encoded(sent.state_dict()), **into_options(mode, module))
    assert caught.value.misfits.keys() == {"0.weight.absmax"}
    assert "Quantized makes this entry, but nothing loads it" in str(caught.value)
    assert state(module) == before
    load(encoded(sent.state_dict()), **into_options(mode, module), select="0.weight")
    assert state(module)["0.weight"] == state(sent)["0.weight"]


def test_fsdp1_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(nn.Module):
        def state_dict(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("every rank would have to take part")

    fsdp = types.SimpleNamespace(FullyShardedDataParallel=Sharded)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", fsdp)
    for into in (Sharded(), {"model": nn.Sequential(Sharded())}):
        with pytest.raises(ValueError, match=r"FSDP1 module .*set_model_state_dict"):
            load(encoded({}), into=into)


# ------------------------------------------------------------------------------ errors


class Refuses(Extra):
    """A module that refuses one state, after it took a part of it."""

    refused: Any = None

    def __init__(self, state: bytes) -> None:
        super().__init__(lambda: state)
        self.taken: bytes = state

    def set_extra_state(self, state: Any) -> None:
        self.taken = state
        if state == self.refused:
            raise ZeroDivisionError("no such scale")
        self.state = state


@all_modes
@both_ways
async def test_a_module_that_raises(mode: str, way: str) -> None:
    sent = nn.Sequential(Copies(), Refuses(b"new")).state_dict()
    first, second = Copies(), Refuses(b"old")
    module = nn.Sequential(first, second)
    second.refused = b"new"
    before, total = state(module), first.total.clone()
    with pytest.raises(MismatchError, match=r"1 \(Refuses\).*: ZeroDivisionError: no") as caught:
        await load_in(way, encoded(sent), **into_options(mode, module))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    # Both modules have loaded their old state again.
    assert torch.equal(first.total, total) and second.taken == second.state == b"old"
    if mode != "plain":
        assert state(module) == before
        assert "written" not in str(caught.value)
    else:
        assert "its tensors were written to" in str(caught.value)
    second.refused = None
    await load_in(way, encoded(sent), **into_options(mode, module))
    assert state(module) == plainly(sent)


@safe_modes
def test_what_a_module_with_tensors_of_its_own_takes_back(mode: str) -> None:
    class Fails(Packed):
        fails = True

        def _load_from_state_dict(self, state_dict: Any, *rest: Any) -> None:
            super()._load_from_state_dict(state_dict, *rest)
            if self.fails:
                self.fails = False
                raise ZeroDivisionError

    module = nn.Sequential(Packed(), Fails())
    before = state(module)
    with pytest.raises(MismatchError, match=r"1 \(Fails\).*: ZeroDivisionError"):
        load(encoded(nn.Sequential(Packed(), Packed()).state_dict()), **into_options(mode, module))
    assert state(module) == before


@all_modes
@both_ways
async def test_a_module_that_does_not_take_back_what_it_had(mode: str, way: str) -> None:
    class Stuck(Refuses):
        def set_extra_state(self, state: Any) -> None:
            if state == b"new":
                self.state = state
            raise ZeroDivisionError

    sent = nn.Sequential(nn.Linear(2, 2), Refuses(b"new")).state_dict()
    module = nn.Sequential(nn.Linear(2, 2), Stuck(b"old"))
    with pytest.raises(MismatchError, match=r"half applied.*\n +1\._extra_state: Zero") as caught:
        await load_in(way, encoded(sent), **into_options(mode, module))
    assert isinstance(caught.value.__context__, MismatchError)


class Released:
    """A lock whose release fails."""

    def __init__(self, module: Copies) -> None:
        self._module, self.total = module, module.total

    def __enter__(self) -> None:
        assert self._module.total is self.total

    def __exit__(self, *_: object) -> None:
        assert self._module.total is not self.total
        raise ZeroDivisionError

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()


@pytest.mark.parametrize("mode", ["staged", "double"])
@both_ways
async def test_modules_load_under_the_lock_and_a_failed_release_undoes_it(
    mode: str, way: str
) -> None:
    module = Copies()
    before = state(module)
    with pytest.raises(ZeroDivisionError):
        await load_in(
            way,
            encoded(Copies().state_dict()),
            lock=Released(module),
            **into_options(mode, module),
        )
    assert state(module) == before


# ------------------------------------------------------------------------------ versions


@pytest.mark.parametrize("codec", ["tree", "pickle"])
def test_the_mark_of_assign_does_not_travel(codec: str) -> None:
    """With the mark, every later load of the state would let models share its memory."""
    source = nn.Linear(2, 2)
    message: Any = source.state_dict()
    nn.Linear(2, 2).load_state_dict(message, assign=True)
    marked = copy.deepcopy(message._metadata)
    assert marked[""]["assign_to_params_buffers"]
    obj = {"a": message} if codec == "tree" else {"a": message, "b": {1.5: 2}}
    file = io.BytesIO()
    assert aiotorchio.save(obj, file).codec == codec
    received = load(file.getvalue())["a"]
    assert received._metadata == OrderedDict({"": {"version": 1}})
    assert message._metadata == marked, "the sender's own is left alone"
    loaded = nn.Linear(2, 2)
    loaded.load_state_dict(received)
    assert loaded.weight.data_ptr() != received["weight"].data_ptr()


@pytest.mark.parametrize("codec", ["tree", "pickle"])
def test_a_mark_that_was_sent_does_not_count(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tree.encoder", "pickled.codec"):
        monkeypatch.setattr(f"aiotorchio.codecs.{module}.without_mark", lambda metadata: metadata)
    message: Any = nn.Linear(2, 2).state_dict()
    nn.Linear(2, 2).load_state_dict(message, assign=True)
    obj = {"a": message} if codec == "tree" else {"a": message, "b": {1.5: 2}}
    assert load(encoded(obj))["a"]._metadata == OrderedDict({"": {"version": 1}})


@all_modes
def test_a_tied_module_from_a_message_with_one_name(mode: str) -> None:
    """A hook does not see a name as missing that another name fills."""

    def tied() -> nn.Sequential:
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Copies())
        module[1].weight = module[0].weight
        return module

    sent, module = tied(), tied()
    message = dict(sent.state_dict())
    del message["1.weight"]
    module[1].register_load_state_dict_post_hook(lambda module, keys: None)
    load(encoded(message), **into_options(mode, module))
    assert state(module) == state(sent)


def test_a_mark_in_a_full_pickle_does_not_count() -> None:
    message: Any = nn.Linear(2, 2).state_dict()
    nn.Linear(2, 2).load_state_dict(message, assign=True)
    module = nn.Linear(2, 2)
    module.register_load_state_dict_post_hook(lambda *_: None)
    weight = module.weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiotorchio.codecs.pickled.codec.without_mark", lambda metadata: metadata)
        shared = {"w": 1.5}
        data = encoded({"module": message, "a": shared, "b": shared})
    into = {"module": module}
    load(data, into=into, weights_only=False)
    assert module.weight is weight and state(module) == plainly(message)


# ------------------------------------------------------------------------------ the caller's code


class Hooked(nn.Module):
    """Two tensors of one shape, and a hook that sees them before they are loaded."""

    def __init__(self, hook: Callable[[dict[str, Any], str], None]) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(2, 2)) for _ in range(2))
        before_load(self, lambda module, state_dict, prefix, *_: hook(state_dict, prefix))


def swap(state_dict: dict[str, Any], prefix: str) -> None:
    a, b = prefix + "a", prefix + "b"
    state_dict[a], state_dict[b] = state_dict[b], state_dict[a]


def transpose(state_dict: dict[str, Any], prefix: str) -> None:
    for key, value in list(state_dict.items()):
        state_dict[key] = value.t()


def double(state_dict: dict[str, Any], prefix: str) -> None:
    for value in state_dict.values():
        value.mul_(2)
    values = dict(state_dict)
    state_dict.clear()
    state_dict.update({key: value * 2 for key, value in values.items()})


def move(state_dict: dict[str, Any], prefix: str) -> None:
    kept = OrderedDict(state_dict)
    state_dict[prefix + "a"] = state_dict.pop(prefix + "b")
    assert state_dict.get("none", 5) == 5 and state_dict.pop("none", 6) == 6
    state_dict.setdefault(prefix + "b", kept[prefix + "a"])
    key, value = list(state_dict.copy().items())[-1]
    state_dict[key] = value


@pytest.mark.parametrize("hook", [swap, transpose, double, move])
@all_modes
def test_hooks_that_change_what_is_loaded(hook: Any, mode: str) -> None:
    sent, module = nn.Sequential(Hooked(hook)), nn.Sequential(Hooked(hook))
    expected = nn.Sequential(Hooked(hook))
    expected.load_state_dict(sent.state_dict())
    load(encoded(sent.state_dict()), **into_options(mode, module))
    assert state(module) == state(expected)


class Detaches(nn.Module):
    """A module whose state has detached tensors, for any arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "w"] = self.w.data


@all_modes
def test_tensors_that_are_shown_detached(mode: str) -> None:
    sent, module = nn.Sequential(Detaches()), nn.Sequential(Detaches())
    load(encoded(sent.state_dict()), **into_options(mode, module))
    assert state(module) == state(sent)


class OnlyTotal(nn.Module):
    """A module whose state has only an entry that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.randn(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "total"] = self.total.clone()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, versions: Any, strict: bool, missing: Any, *_: Any
    ) -> None:
        if prefix + "total" in state_dict:
            self.total = state_dict[prefix + "total"]
        else:
            missing.append(prefix + "total")


@pytest.mark.parametrize(
    "make", [OnlyTotal, lambda: Extra(lambda: 5)], ids=["made entry", "extra state"]
)
def test_an_entry_that_is_missing_of_a_module_without_others(make: Any) -> None:
    module = nn.Sequential(nn.Linear(2, 2), make())
    message = {k: v for k, v in module.state_dict().items() if k.startswith("0.")}
    with pytest.raises(MismatchError, match=r"not in the message: 1\."):
        load(encoded(message), into=module)
    load(encoded(message), into=module, strict=False)


def test_the_path_of_a_module_in_the_keys_of_the_message() -> None:
    sent, module = model("rows"), model("rows")
    message = {f"net.{name}": value for name, value in sent.state_dict().items()}
    load(encoded(message), into={"net": module})
    assert state(module) == state(sent)


@safe_modes
def test_a_hook_that_raises_behind_the_change(mode: str) -> None:
    module = nn.Sequential(Extra(lambda: b"old"), Copies())
    module.register_load_state_dict_post_hook(lambda *_: 1 / 0)
    before = state(module)
    message = nn.Sequential(Extra(lambda: b"new"), Copies()).state_dict()
    with pytest.raises(MismatchError, match="ZeroDivisionError"):
        load(encoded(message), **into_options(mode, module))
    assert state(module) == before


def test_a_hook_that_raises_before_the_change_leaves_nothing_half_applied() -> None:
    def refuse(*_: Any) -> None:
        raise ZeroDivisionError("not today")

    module = nn.Sequential(Copies())
    before_load(module[0], refuse)
    before = state(module)
    with pytest.raises(MismatchError, match="not today") as caught:
        load(encoded(nn.Sequential(Copies()).state_dict()), into=module, staged=True)
    assert "half applied" not in str(caught.value) and state(module) == before


class Versioned(nn.Module):
    """A module whose old version has its numbers in reverse order."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.randn(()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "scale"] = torch.tensor(self.scale)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, versions: Any, *rest: Any
    ) -> None:
        old = versions.get("version", 1) < 2
        self.scale = float(state_dict[prefix + "scale"]) * (100 if old else 1)


@pytest.mark.parametrize("versions", [{"0": {"version": 1}}, {"": 3}, [1], None], ids=repr)
def test_an_undo_goes_by_the_versions_of_the_module(versions: Any) -> None:
    module: Any = nn.Sequential(Versioned(), Refuses(b"old"))
    module[1].refused = b"new"
    message: Any = nn.Sequential(Versioned(), Refuses(b"new")).state_dict()
    message._metadata = versions
    before = state(module)
    with pytest.raises(MismatchError, match="did not load"):
        load(encoded(message), into=module, staged=True)
    assert state(module) == before


class Derived(nn.Module):
    """A module whose state has a value that it has computed from its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2))
        self.sum = self.a.detach().sum()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "sum"] = self.a.detach().sum()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.sum = state_dict.pop(prefix + "sum")
        super()._load_from_state_dict(state_dict, prefix, *rest)


@safe_modes
@both_ways
async def test_an_undo_has_what_was_shown_before_the_change(mode: str, way: str) -> None:
    module: Any = nn.Sequential(Derived(), Refuses(b"old"))
    module[1].refused = b"new"
    before, total = state(module), module[0].sum.clone()
    message = nn.Sequential(Derived(), Refuses(b"new")).state_dict()
    with pytest.raises(MismatchError, match="no such scale"):
        await load_in(way, encoded(message), **into_options(mode, module))
    assert state(module) == before and torch.equal(module[0].sum, total)


async def test_the_code_of_modules_runs_in_the_thread_of_the_call() -> None:
    here, threads = threading.current_thread(), set[threading.Thread]()

    class Notes(Extra):
        def set_extra_state(self, state: Any) -> None:
            threads.add(threading.current_thread())
            super().set_extra_state(state)

    module: Any = nn.Sequential(Notes(lambda: 1), Refuses(b"old"))
    module[1].refused = b"new"
    message = nn.Sequential(Extra(lambda: 2), Refuses(b"new")).state_dict()
    with pytest.raises(MismatchError):
        await load_in("stream", encoded(message), into=module, staged=True)
    assert threads == {here} and module[0].state == 1


def test_a_selected_extra_state_comes_whole() -> None:
    sent, module = Extra(extra_tensors), Extra(extra_tensors)
    load(encoded(sent.state_dict()), into=module, select=["_extra_state"])
    assert plainly(module.state) == plainly(sent.state)
    assert state(module)["linear.weight"] != state(sent)["linear.weight"]


def test_a_selected_extra_state_comes_with_its_sparse_tensors() -> None:
    sent, module = Extra(lambda: {"mask": torch.eye(2).to_sparse()}), Extra(lambda: None)
    load(encoded(sent.state_dict()), into=module, select=["_extra_state"])
    assert torch.equal(module.state["mask"].to_dense(), torch.eye(2))
    assert not torch.equal(module.linear.weight, sent.linear.weight)


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.eye(2).to_sparse()])
@pytest.mark.parametrize(
    "select", ["_extra_state.mask", "_extra_state.*", lambda name: name.endswith(".mask")]
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_an_entry_cannot_be_selected(
    strict: bool, select: Any, tensor: torch.Tensor
) -> None:
    sent, module = Extra(lambda: {"mask": tensor}), Extra(lambda: None)
    with pytest.raises(MismatchError, match="select the whole entry") as caught:
        load(encoded(sent.state_dict()), into=module, select=select, strict=strict)
    assert caught.value.entry == "_extra_state.mask" and module.state is None


def test_a_lazy_module_that_cannot_be_lazy_again() -> None:
    module: Any = nn.Sequential(nn.LazyLinear(3), Refuses(b"old"))
    module[1].refused = b"new"
    message = nn.Sequential(lazily(), Refuses(b"new")).state_dict()
    with pytest.raises(MismatchError, match=r"half applied.*\n.*0\.weight: it has memory now"):
        load(encoded(message), into=module, staged=True)


def test_a_hooked_module_of_inference_mode() -> None:
    with torch.inference_mode():
        module = nn.Linear(2, 2)
    module.register_load_state_dict_post_hook(lambda *_: None)
    sent = nn.Linear(2, 2)
    load(encoded(sent.state_dict()), into=module)
    assert state(module) == state(sent)


def test_hooks_of_a_submodule_without_entries() -> None:
    seen: list[str] = []
    module = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    before_load(module[0], lambda *_: seen.append("before"))
    module[0].register_load_state_dict_post_hook(
        lambda module, keys: seen.append(f"after {keys.missing_keys}")
    )
    message = module.state_dict()
    load(encoded(message), into=module)
    assert seen == ["before", "after []"]


def test_post_hooks_hear_of_what_is_missing() -> None:
    seen: list[list[str]] = []
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_load_state_dict_post_hook(
        lambda module, keys: seen.append(list(keys.missing_keys))
    )
    message = dict(module.state_dict())
    del message["0.bias"]
    load(encoded(message), into=module, strict=False)
    assert seen == [["0.bias"]]


def test_a_state_dict_that_does_not_go_by_submodules() -> None:
    class Wraps(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def state_dict(self, *args: Any, **options: Any) -> Any:
            return self.inner.state_dict(*args, **options)

    sent, module = Wraps(nn.Linear(2, 2)), Wraps(nn.Linear(2, 2))
    load(encoded(sent.state_dict()), into=module)
    assert state(module) == state(sent)
    with pytest.raises(ValueError, match=r"shows 'linear\.weight', which is no path of a sub"):
        load(encoded(sent.state_dict()), into=Wraps(Extra(lambda: 1)))


def test_a_checkpointed_module() -> None:
    """Its hooks remove its own part of the names."""
    wrap = torch.distributed.algorithms._checkpoint.checkpoint_wrapper.checkpoint_wrapper
    sent, module = (nn.Sequential(wrap(nn.Linear(2, 2)), Copies()) for _ in range(2))
    assert "0.weight" in sent.state_dict()
    load(encoded(sent.state_dict()), into=module)
    assert state(module) == state(sent)


def test_no_more_unknown_names_than_code_is_given() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for room in ("module_rules", "module_load"):
            patch.setattr(f"aiotorchio.graph.{room}.UNKNOWN_MAX", 2)
        message = OldName(old=True).state_dict() | {f"x{n}": torch.ones(1) for n in range(3)}
        with pytest.raises(MismatchError) as caught:
            load(encoded(message), into=OldName())
        assert caught.value.unexpected == ("x1", "x2")
        module: Any = OldName()
        load(encoded(message), into=module, strict=False)
        assert torch.equal(module.weight, message["w"])


def test_nested_entries_that_nothing_loads() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def state_dict(self, *args: Any, **options: Any) -> Any:
            return {"model": self.inner.state_dict(), "step": 3}

    module = Nested()
    before = plainly(module.state_dict())
    with pytest.raises(MismatchError, match="nothing loads it") as caught:
        load(encoded(Nested().state_dict()), into=module)
    assert caught.value.misfits.keys() == {"model"}
    assert plainly(module.state_dict()) == before


def test_torch_is_given_the_tensors_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gets no copies of the tensors: they would take as long as the load."""
    module, seen = nn.Sequential(Extra(lambda: 1)), list[Any]()
    call = nn.Module._load_from_state_dict

    def note(self: nn.Module, state_dict: Any, *rest: Any) -> None:
        seen.extend(state_dict.values())
        call(self, state_dict, *rest)

    monkeypatch.setattr(nn.Module, "_load_from_state_dict", note)
    monkeypatch.setattr(note, "__module__", "torch.nn.modules.module")
    load(encoded(module.state_dict()), into=module)
    weight: Any = module[0]
    assert any(each is weight.linear.weight for each in seen)


def test_an_undo_that_is_interrupted_is_done_again() -> None:
    interrupts = iter([KeyboardInterrupt])

    class Interrupted(Extra):
        def set_extra_state(self, state: Any) -> None:
            if state == 1:
                for error in interrupts:
                    raise error
            super().set_extra_state(state)

    sent = nn.Sequential(Copies(), Extra(lambda: 2), Refuses(b"new")).state_dict()
    module: Any = nn.Sequential(Copies(), Interrupted(lambda: 1), Refuses(b"old"))
    module[2].refused = b"new"
    before = state(module)
    with pytest.raises(KeyboardInterrupt):
        load(encoded(sent), into=module, staged=True)
    assert state(module) == before


class Shows(nn.Linear):
    """A module that returns extra state, and cannot load it."""

    def get_extra_state(self) -> Any:
        return {"n": 1}


@pytest.mark.parametrize("mode", [{}, {"staged": True}])
def test_extra_state_that_a_module_only_shows_is_not_missed(mode: dict[str, Any]) -> None:
    sent, model = dict(nn.Linear(2, 2).state_dict()), Shows(2, 2)
    Shows(2, 2).load_state_dict(sent)
    aiotorchio.load(io.BytesIO(encoded(sent)), into=model, **mode)
    assert torch.equal(model.weight, sent["weight"])


def test_code_of_a_class_that_the_caller_trusts_runs_once() -> None:
    """The check before the load does not run it as well."""
    made: list[Any] = []

    class Registered(torch.Tensor):
        def __setstate__(self, state: Any) -> None:
            vars(self).update(state)
            made.append(self)

    Registered.__module__, Registered.__qualname__ = __name__, "Registered"
    tensor: Any = torch.ones(2).as_subclass(Registered)
    tensor.note = 1
    model = Extra(lambda: None)
    sent = {**Extra(lambda: None).state_dict(), "_extra_state": {"tensor": tensor}}
    globals()["Registered"] = Registered
    try:
        data = encoded(sent)
        made.clear()
        aiotorchio.load(io.BytesIO(data), into=model, safe_globals=[Registered])
    finally:
        del globals()["Registered"]
    assert [each.device.type for each in made] == ["cpu"]


def below(key: str, state: dict[str, Any], *, flat: bool) -> dict[str, Any]:
    return {f"{key}.{name}": each for name, each in state.items()} if flat else {key: state}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("codec", ["tree", "pickle"])
@pytest.mark.parametrize("mixed", [True, False])
def test_extra_state_that_nobody_takes_is_refused_wherever_it_is(
    flat: bool, codec: str, mixed: bool
) -> None:
    linear = nn.Linear(2, 2)
    into: Any = {"0": linear} if mixed else nn.Sequential(linear)
    extra = {"x": 1} if codec == "tree" else Counter("ab")
    state = {**nn.Linear(2, 2).state_dict(), "_extra_state": extra}
    data = encoded(below("0", state, flat=flat))
    with pytest.raises(MismatchError, match=r"not in the target: 0\._extra_state"):
        aiotorchio.load(io.BytesIO(data), into=into)
    aiotorchio.load(io.BytesIO(data), into=into, strict=False)
    assert torch.equal(linear.weight, state["weight"])
    # Extra state of other modules is not that of this one.
    data = encoded(below("0", nn.Linear(2, 2).state_dict(), flat=flat) | {"b._extra_state": 1})
    if mixed:
        aiotorchio.load(io.BytesIO(data), into=into)


def test_names_of_extra_state_that_are_too_long_all_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {**nn.Linear(2, 2).state_dict(), "k" * 100: {f"{n}._extra_state": 1 for n in range(20)}}
    monkeypatch.setattr("aiotorchio.graph.strays.TEXT_MAX", 1000)
    with pytest.raises(LimitExceeded, match="names of extra state have more than 1000 characters"):
        aiotorchio.load(io.BytesIO(encoded(state)), into=nn.Linear(2, 2))
