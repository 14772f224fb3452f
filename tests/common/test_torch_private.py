"""Private parts of torch that the package uses: these tests fail first if torch changes them."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
import torch

import aiotorchio
from aiotorchio.common import torch_private
from tests.support import corpus
from tests.test_layers import DOOR

PACKAGE = Path(aiotorchio.__file__).parent


def test_no_other_module_uses_private_names_of_torch() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in DOOR:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
                dotted = ast.unparse(node)
                assert not dotted.startswith("torch."), f"{path.name}: {dotted}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [node.module or "", *(alias.name for alias in node.names)]
                assert not any("._" in name or name[0] == "_" for name in names), path.name


def test_storages() -> None:
    tensor = torch.ones(2)
    storage = tensor.untyped_storage()
    assert torch_private.storage_key(storage) == torch_private.storage_key(
        tensor[1:].untyped_storage()
    )
    assert torch_private.storage_key(storage) != torch_private.storage_key(
        torch.ones(2).untyped_storage()
    )
    typed = torch_private.typed_storage(storage, torch.float32)
    assert typed.dtype is torch.float32
    assert torch_private.untyped_storage_of(typed) is storage


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_view_bits(conjugate: bool, negative: bool) -> None:
    tensor = torch.tensor([1 + 2j])
    torch_private.set_view_bits(tensor, conjugate=conjugate, negative=negative)
    assert (tensor.is_conj(), tensor.is_neg()) == (conjugate, negative)
    wanted = (1 - 2j) if conjugate else (1 + 2j)
    assert tensor.item() == (-wanted if negative else wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_parameters(requires_grad: bool) -> None:
    tensor = torch.ones(2)
    made = torch_private.make_parameter(tensor, requires_grad)
    corpus.assert_same(made, torch.nn.Parameter(torch.ones(2), requires_grad))
    assert made.data_ptr() == tensor.data_ptr()
    assert made.is_leaf
    assert isinstance(made, torch.nn.Parameter)


def test_names_of_dimensions() -> None:
    assert not torch_private.has_names(torch.ones(1))


@pytest.mark.parametrize(
    ("module", "name", "path"),
    [
        ("__builtin__", "set", "builtins.set"),
        ("copy_reg", "x", "copyreg.x"),
        ("exceptions", "StandardError", "builtins.Exception"),
        ("collections", "OrderedDict", "collections.OrderedDict"),
        ("__builtin__", "xrange", "builtins.range"),
    ],
)
def test_names_of_python_2(module: str, name: str, path: str) -> None:
    assert torch_private.python_name(module, name) == path


def test_sparse_tensors_are_checked_without_the_flag_of_the_process() -> None:
    indices, values = torch.tensor([[0, 1]]), torch.ones(2)
    made = torch_private.make_coo(indices, values, (3,), True)
    wanted = torch.sparse_coo_tensor(
        indices, values, (3,), is_coalesced=True, check_invariants=True
    )
    corpus.assert_same(made, wanted)
    for bad in (torch.tensor([[0, 3]]), torch.tensor([[0, -1]]), torch.tensor([[1, 1]])):
        with pytest.raises(RuntimeError):
            torch_private.make_coo(bad, values, (3,), True)
    with pytest.raises(RuntimeError):
        torch_private.make_compressed(
            torch.tensor([0, 2]), torch.tensor([0, 9]), values, (1, 3), torch.sparse_csr
        )
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()


def test_the_unpickler_sees_only_its_own_list() -> None:
    data = b"\x80\x02cmy\nname\n)R."
    unpickler = torch_private.WeightsOnlyUnpickler(
        io.BytesIO(data),
        allowed={"my.name": lambda: 7},
        persistent_load=lambda reference: None,
        encoding="utf-8",
    )
    assert unpickler.load() == 7
    from torch import _weights_only_unpickler

    assert "my.name" not in _weights_only_unpickler._get_allowed_globals()
