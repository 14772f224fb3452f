"""Checks docs/parity.md: each of its rows has a verdict, and an existing test."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
ROWS = [
    line
    for line in DOCUMENT.splitlines()
    if line.startswith("|") and not line.startswith("|---") and not line.endswith("| test |")
]


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = (
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {function.name for function in functions if function.name.startswith("test_")}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_there_are_rows() -> None:
    assert len(ROWS) > 250


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.rstrip("` |").split("::")[-1])
def test_a_row_has_a_verdict_and_its_tests(row: str) -> None:
    _, verdict, tests = cells(row)
    assert re.match("same|better: .|left out: .", verdict), verdict
    named = re.findall(r"`(tests/\S+?)::(test_\w+)`", tests)
    assert named
    for path, name in named:
        assert name in names_in(path), f"{path}::{name}"
