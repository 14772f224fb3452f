"""Every object of ``support/corpus.py`` is the same after flatten and rebuild.

Headers and names of some objects are also compared with the expected ones.
"""

from __future__ import annotations

import pickle
import types
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.codecs.pickled.scan import scan_pickle
from aiotorchio.engine.load_options import trusted
from aiotorchio.graph.flatten import Flattened, flatten
from aiotorchio.graph.rebuild import Rebuilder, build_tensors
from aiotorchio.wire.validation import validate
from tests.support import corpus, craft

PICKLED = {
    # Classes and kinds of tensors that rows and the tree codec do not have
    *("buffer", "subclass", "subclass_with_attributes", "wrapper_subclass", "trusted_class"),
    *("trusted_pair", "tensor_with_attributes", "parameter_with_attributes", "jagged", "nested"),
    *("nested_scalars", "nested_transposed", "layouts", "bytearrays", "frozensets", "counter"),
    *("untyped_storage", "storage_twice", "storage_and_view", "empty_storage", "typed_storage"),
    *("typed_storage_and_view", "typed_storage_bfloat16", "storage_odd_size"),
    *("empty_containers", "big_int_keys", "other_keys", "surrogates", "surrogate_keys"),
    # Objects that are shared, cyclic, too deep, or have attributes
    *("shared_list", "shared_dict", "shared_tuple", "cyclic_list", "cyclic_dict"),
    *("cyclic_through_tuple", "ordered_with_attributes", "ordered_shared_metadata"),
    *("tensor_key", "beyond_tree_depth", "scheduler_MultiStepLR"),
} | {name for name in corpus.CASES if name.startswith(("coo", "csr", "csc", "bsr", "bsc", "quant"))}


def rebuild(parts: Flattened, **options: Any) -> Any:
    limits = aiotorchio.Limits()
    validate(parts.header, limits)
    rebuilder = Rebuilder(
        parts.skeleton,
        parts.header.codec,
        allow_pickle=True,
        weights_only=True,
        pickle_module=pickle,
        encoding="utf-8",
        safe_globals=trusted(options.get("safe_globals", ())),
        map_location=None,
        limits=limits,
        offset=0,
    )
    rebuilder.check(parts.header.tensors, names=True)
    return rebuilder.build(build_tensors(parts.header, parts.storages), parts.storages)


@pytest.mark.parametrize("name", corpus.case_parameters())
def test_rebuild_is_the_inverse(name: str) -> None:
    obj = corpus.make(name)
    parts = craft.flattened(obj)
    assert parts.header.codec == ("pickle" if name in PICKLED else "tree")
    corpus.assert_same(rebuild(parts, **corpus.LOAD_OPTIONS.get(name, {})), obj)


@pytest.mark.parametrize("name", corpus.case_parameters())
def test_through_save_and_load(name: str) -> None:
    obj = corpus.make(name)
    loaded = craft.round_trip(obj, **corpus.LOAD_OPTIONS.get(name, {}))
    corpus.assert_same(loaded, obj)


@pytest.mark.parametrize("name", corpus.case_parameters(sorted(PICKLED)))
def test_trees_are_all_that_a_receiver_without_pickle_takes(name: str) -> None:
    with pytest.raises(aiotorchio.UnsafeObjectError, match="allow_pickle"):
        craft.round_trip(corpus.make(name), allow_pickle=False)


def test_dtensor() -> None:
    pytest.importorskip("torch.distributed.tensor")
    with corpus.process_group():
        obj = corpus.dtensor()
        loaded = craft.round_trip(obj, safe_globals=corpus.dtensor_globals())
        corpus.assert_same(loaded, obj)


@pytest.mark.parametrize("name", corpus.case_parameters(["model_resnet", "shared_list"]))
def test_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        loaded = craft.round_trip(corpus.make(name))
    for tensor in loaded.values() if isinstance(loaded, dict) else loaded[0][1:]:
        assert not tensor.is_inference()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(protocol: int) -> None:
    obj = [*corpus.make("shared_list"), frozenset({1}), torch.eye(2).to_sparse()]
    parts = flatten(obj, chunk_size=4096, metadata={}, producer="tests", pickle_protocol=protocol)
    data = craft.compose(parts)
    corpus.assert_same(craft.load(data, weights_only=False), obj)
    if protocol == 2:
        corpus.assert_same(craft.load(data), obj)
    else:
        with pytest.raises(aiotorchio.UnsafeObjectError):
            craft.load(data)


def test_weights_only_false_loads_any_class() -> None:
    obj = [corpus.make("trusted_class"), OrderedDict(a=range(3)), torch.eye(3).to_sparse_csr()]
    with pytest.raises(aiotorchio.UnsafeObjectError, match=r"tests\.support\.corpus\.Point"):
        craft.round_trip(obj)
    corpus.assert_same(craft.round_trip(obj, weights_only=False), obj)


def test_weights_only_false_keeps_the_checks_of_tensors() -> None:
    beyond = craft.strided(0, "float32", 0, (5,), (1,))
    with pytest.raises(aiotorchio.InvalidObjectError, match="reaches byte 20"):
        craft.load_pickle(craft.pickled(beyond), [torch.ones(4)], weights_only=False)


def test_weights_only_false_refuses_bytes_behind_the_pickle() -> None:
    with pytest.raises(aiotorchio.ProtocolError, match="1 bytes left over"):
        craft.load_pickle(pickle.dumps([1], 2) + b"N", weights_only=False)


def test_own_pickle_module() -> None:
    calls: list[str] = []

    class Pickler(pickle.Pickler):
        def dump(self, obj: Any) -> None:
            calls.append("dump")
            super().dump(obj)

    class Unpickler(pickle.Unpickler):
        def load(self) -> Any:
            calls.append("load")
            return super().load()

    module = types.SimpleNamespace(Pickler=Pickler, Unpickler=Unpickler)
    obj = corpus.make("shared_dict")
    data = craft.compose(
        flatten(obj, chunk_size=4096, metadata={}, producer="tests", pickle_module=module)
    )
    corpus.assert_same(craft.load(data, weights_only=False, pickle_module=module), obj)
    assert calls == ["dump", "load"]
    corpus.assert_same(craft.load(data), obj)  # the skeleton is still an ordinary pickle
    with pytest.raises(ValueError, match="pickle_module"):
        craft.load(data, pickle_module=module)


def test_cloudpickle() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    parts = flatten(
        [lambda: 7], chunk_size=4096, metadata={}, producer="tests", pickle_module=cloudpickle
    )
    assert craft.load(craft.compose(parts), weights_only=False)[0]() == 7


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        craft.flattened([lambda: 1])


@pytest.mark.parametrize("encoding", ["latin1", "ascii", "bytes", "utf-8"])
def test_encoding_of_python_2(encoding: str) -> None:
    skeleton = b"\x80\x02U\x03abc."
    wanted = b"abc" if encoding == "bytes" else "abc"
    assert craft.load_pickle(skeleton, encoding=encoding) == wanted
    with pytest.raises(aiotorchio.InvalidObjectError):
        craft.load_pickle(b"\x80\x02U\x01\xff.", encoding="ascii")


@pytest.mark.parametrize("pickled", [False, True])
def test_backward_hooks_are_dropped_with_a_warning(pickled: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda grad: grad)
    obj = [parameter, x := [1], x] if pickled else [parameter]
    with pytest.warns(UserWarning, match="backward hook .* not be serialized"):
        loaded = craft.round_trip(obj)
    assert loaded[0]._backward_hooks is None


def test_names() -> None:
    shared = torch.ones(2)
    metadata = OrderedDict({"": {"version": torch.ones(1)}})
    ordered: Any = OrderedDict(w=torch.ones(3))
    ordered._metadata = metadata
    obj = {"a": shared, "b": [shared, (torch.ones(3),)], 3: {"": torch.ones(1)}, "o": ordered}
    header = craft.flattened(obj).header
    assert [row.names for row in header.tensors] == [
        ["a", "b.0"],
        ["b.1.0"],
        ["3."],
        ["_metadata..version"],
        ["o.w"],
    ]
    assert craft.flattened(torch.ones(1)).header.tensors[0].names == [""]
    # With the pickle codec rows have the same names, except the names of attributes.
    header = craft.flattened([obj, obj, {"\ud800": shared.clone()}]).header
    assert header.codec == "pickle"
    names = sorted(name for row in header.tensors for name in row.names)
    paths = {"a", "b.0", "b.1.0", "3.", "o.w"}
    assert {f"{n}.{path}" for n in (0, 1) for path in paths} | {"2.\\ud800"} == set(names)


def test_pickles_of_honest_objects_pass_the_scan() -> None:
    scanned = 0
    for name in sorted(PICKLED):
        parts = craft.flattened(corpus.make(name))
        from aiotorchio.codecs.pickled.allowlist import Allowlist

        options = corpus.LOAD_OPTIONS.get(name, {})
        allowed = Allowlist(trusted(options.get("safe_globals", ())), aiotorchio.Limits(), None)
        scan_pickle(
            parts.skeleton, allowed.globals, allowed.stateful, depth_limit=256, wide_keys=30_000
        )
        scanned += 1
    assert scanned == len(PICKLED)


def test_no_copy_is_made() -> None:
    tensor = torch.ones(5)
    parts = craft.flattened({"t": tensor})
    assert parts.storages[0].data_ptr() == tensor.data_ptr()


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        craft.round_trip([torch.ones(1).untyped_storage(), torch.ones(2)])
