"""The examples in the docstrings run, and print the shown results."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import aiotorchio

MODULES = [module.name for module in pkgutil.walk_packages(aiotorchio.__path__, "aiotorchio.")]


@pytest.mark.parametrize("name", ["aiotorchio", *MODULES])
def test_the_examples_of_a_module(name: str) -> None:
    if name.endswith("__main__"):
        return
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_main_functions_have_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in ("save_to_stream", "iter_bytes", "save", "StreamWriter", "StreamReader"):
        assert any(test.examples for test in finder.find(getattr(aiotorchio, name), name)), name
