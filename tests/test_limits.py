"""``Limits``: the defaults, and the default of ``total_nbytes`` from the memory of the machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from aiotorchio import limits as limits_module
from aiotorchio.limits import Limits


def test_defaults_are_those_of_the_specification() -> None:
    limits = Limits()
    assert limits.header_nbytes == limits.skeleton_nbytes == 32 * 2**20
    assert limits.chunk_nbytes == 64 * 2**20
    assert limits.entries == 500_000
    assert limits.depth == 256
    assert limits.dims == 64
    assert limits.sparse_nnz == 100_000_000
    assert 0 < limits.total_nbytes < 2**63


def test_total_is_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert limits_module._memory(()) == 3 * 4096


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_without_an_answer_there_is_no_bound(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def sysconf(_: str) -> int:
        raise error

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert limits_module._memory(()) == 2**63 - 1


def test_without_sysconf_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert limits_module._memory(()) == 2**63 - 1


@pytest.mark.parametrize(
    ("told", "total"), [("4096\n", 4096), ("max\n", None), ("9223372036854771712\n", None)]
)
def test_a_container_has_less_than_its_machine(
    tmp_path: Path, told: str, total: int | None
) -> None:
    file = tmp_path / "memory.max"
    file.write_text(told)
    machine = limits_module._memory(())
    found = limits_module._memory((str(tmp_path / "no such file"), str(file)))
    assert found == (machine if total is None else total)


def test_defaults_of_time() -> None:
    limits = Limits()
    assert limits.start_timeout is None
    assert limits.handshake_timeout == limits.idle_timeout == 60
    assert limits.write_timeout == 300
    assert limits.least_rate == 1024


def test_a_tensor_takes_no_more_than_all_storages_unless_told() -> None:
    assert Limits(total_nbytes=5).dense_nbytes == 5
    assert Limits(total_nbytes=5, expanded_nbytes=7).dense_nbytes == 7


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
    with pytest.raises(TypeError, match="total_nbytes must be a whole number"):
        Limits(total_nbytes=value)


@pytest.mark.parametrize("value", [True, "8", 1j])
def test_timeouts_are_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="idle_timeout must be a number of seconds or None"):
        Limits(idle_timeout=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dims", -1),
        ("sparse_nnz", -1),
        ("least_rate", -1),
        ("idle_timeout", -0.5),
        ("write_timeout", float("nan")),
    ],
)
def test_limits_are_not_negative(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, not {value}"):
        Limits(**{name: value})
