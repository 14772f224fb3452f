"""Packages import only downward, and private names of torch appear in one module only.

The tests parse the sources without importing them. docs/architecture.md has the same order and
names every module.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "aiotorchio"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}

# The order of the packages from the ground up, each with the packages and the third-party libraries
# that it may import. A module at the top of the package counts as a package of one module.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "limits": (set(), set()),
    "common": (set(), {"torch"}),
    "wire": ({"errors", "limits", "common"}, {"msgspec", "xxhash"}),
    "table": ({"errors", "common", "wire"}, {"torch"}),
    "overlap": ({"common"}, {"torch"}),
    "codecs": ({"errors", "limits", "common", "wire", "table"}, {"msgspec", "torch"}),
    "graph": (
        {"errors", "limits", "common", "wire", "table", "overlap", "codecs"},
        {"msgspec", "torch"},
    ),
    "memory": ({"errors", "common"}, {"torch"}),
    "streams": ({"errors", "common"}, {"anyio"}),
    "tls": (set(), set()),
    "engine": (
        {
            "errors",
            "limits",
            "common",
            "wire",
            "table",
            "overlap",
            "codecs",
            "graph",
            "memory",
            "streams",
        },
        {"anyio", "torch"},
    ),
    "api": (
        {
            "errors",
            "limits",
            "common",
            "wire",
            "table",
            "codecs",
            "graph",
            "memory",
            "streams",
            "engine",
        },
        {"anyio", "torch"},
    ),
    "compat": ({"errors", "graph", "api"}, set()),
    "__init__": ({"errors", "limits", "table", "tls", "engine", "api"}, set()),
}

# The modules that may use private names of torch, with names that each must be seen to use.
DOOR = {
    "common/torch_private.py": {
        "_weights_only_unpickler",
        "_utils",
        "_C",
        "_cdata",
        "_untyped_storage",
        "_internal",
    },
    "common/torch_private_modules.py": {
        "_parameters",
        "_non_persistent_buffers_set",
        "_load_from_state_dict",
        "_load_state_dict_pre_hooks",
        "_IncompatibleKeys",
    },
}

# What ordinary code of torch hangs on objects of the user, so that every writer must know it.
PUBLIC_BY_CUSTOM = {
    # The versions of a state dict: an attribute that nn.Module.state_dict() sets.
    ("codecs/tree/decoder.py", "_metadata"),
    ("codecs/tree/encoder.py", "_metadata"),
    ("table/names.py", "_metadata"),
}


def layer_of(source: str) -> str:
    return source.split("/")[0].removesuffix(".py")


@cache
def tree_of(source: str) -> ast.Module:
    return ast.parse(SOURCES[source].read_text(encoding="utf-8"), source)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module, and every name from a module, that is imported anywhere in a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_layers(source: str) -> set[str]:
    names = (name.split(".") for name in imports(tree_of(source)))
    return {name[1] for name in names if name[0] == "aiotorchio"} - {layer_of(source)}


def imported_packages(source: str) -> set[str]:
    names = {name.split(".")[0] for name in imports(tree_of(source))}
    return names - sys.stdlib_module_names - {"aiotorchio"}


def test_every_source_is_in_a_layer() -> None:
    assert {layer_of(source) for source in SOURCES} == LAYERS.keys()


def test_the_layers_have_an_order() -> None:
    below: set[str] = set()
    for layer, (allowed, _) in LAYERS.items():
        assert allowed <= below, layer
        below.add(layer)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_imports_lead_downward(source: str) -> None:
    layers, packages = LAYERS[layer_of(source)]
    assert imported_layers(source) <= layers
    assert imported_packages(source) <= packages


def test_the_architecture_names_every_module_in_this_order() -> None:
    document = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(?:/|\.py)`", document, flags=re.MULTILINE)
    layers = [layer for layer in LAYERS if layer != "__init__"]
    assert [name for name in listed if name in layers][: len(layers)] == layers
    for source in SOURCES:
        if not source.endswith("__init__.py"):
            name = source if "/" not in source else source.split("/", 1)[1]
            assert f"`{name}`" in document, source


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_no_module_is_imported_by_name(source: str) -> None:
    """This test could not see such an import."""
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("__import__", "importlib.import_module", "import_module")


# Private names of torch


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@cache
def own_private_names() -> set[str]:
    """Private attributes, methods, functions and modules that this package defines."""
    names = {Path(source).stem for source in SOURCES}
    for source in SOURCES:
        for node in ast.walk(tree_of(source)):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(name)
                case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
    return names


# Attributes of modules whose names this package has for attributes of its own, too.
OF_MODULES = {"_buffers", "_modules", "_parameters"}


def private_names_of_torch(source: str, own: set[str]) -> set[str]:
    """Private names in torch, and private attributes that this package does not define."""
    tree = tree_of(source)
    if "torch" not in imported_packages(source):
        return set()
    found = set()
    for name in imports(tree):
        if name.startswith("torch."):
            found |= {part for part in name.split(".") if is_private(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_of_module = node.attr in OF_MODULES and ast.unparse(node.value) != "self"
            if is_of_module or ast.unparse(node).startswith("torch.") or node.attr not in own:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
            found |= {word.arg for word in node.keywords if word.arg and is_private(word.arg)}
    return found


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_private_names_of_torch_have_one_door(source: str) -> None:
    if source in DOOR:
        return
    found = private_names_of_torch(source, own_private_names())
    assert found - {name for where, name in PUBLIC_BY_CUSTOM if where == source} == set()


@pytest.mark.parametrize("source", sorted(DOOR))
def test_the_check_sees_the_private_names_where_they_are(source: str) -> None:
    """Else it would pass for having found nothing."""
    assert DOOR[source] <= private_names_of_torch(source, own_private_names())
