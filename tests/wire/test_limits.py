"""The defaults, and what a machine that does not tell its memory gets."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from aiotorchio.wire.limits import Limits


def test_defaults_are_those_of_the_specification() -> None:
    limits = Limits()
    assert limits.header_nbytes == limits.skeleton_nbytes == 32 * 2**20
    assert limits.chunk_nbytes == 64 * 2**20
    assert limits.entries == 1_000_000
    assert limits.depth == 256
    assert limits.dims == 64
    assert 0 < limits.total_nbytes < 2**63


def test_total_is_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert Limits().total_nbytes == 3 * 4096


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_without_an_answer_there_is_no_bound(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def sysconf(_: str) -> int:
        raise error

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert Limits().total_nbytes == 2**63 - 1


def test_without_sysconf_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert Limits().total_nbytes == 2**63 - 1


def test_limits_do_not_change_and_have_names() -> None:
    limits = Limits(dims=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.dims = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Limits(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Limits(unknown=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [8e9, True, None, "8"])
def test_limits_are_whole_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="total_nbytes is a whole number"):
        Limits(total_nbytes=value)


def test_limits_are_not_negative() -> None:
    with pytest.raises(ValueError, match="dims is -1"):
        Limits(dims=-1)
