"""The garbage collector is paused during a call, and runs again after every outcome."""

from __future__ import annotations

import gc
import io
import os
import threading
from collections.abc import Iterator

import pytest
import torch

import aiotorchio
from aiotorchio.common.gc_pause import gc_paused


def paused() -> bool:
    return gc.get_threshold()[0] == 0


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = gc.get_threshold(), gc.isenabled()
    yield
    assert (gc.get_threshold(), gc.isenabled()) == before


def test_it_waits_inside_and_goes_on_behind() -> None:
    with gc_paused():
        assert paused()
    assert not paused()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, GeneratorExit])
def test_it_goes_on_whatever_was_raised(error: type[BaseException]) -> None:
    with pytest.raises(error), gc_paused():
        raise error
    assert not paused()
    with gc_paused():
        assert paused()


def test_who_turns_it_off_meanwhile_finds_it_off() -> None:
    with gc_paused():
        gc.disable()
    assert not gc.isenabled()
    gc.enable()


def test_who_sets_other_thresholds_meanwhile_finds_them() -> None:
    before = gc.get_threshold()
    with gc_paused():
        gc.set_threshold(123, 4, 5)
    assert gc.get_threshold() == (123, 4, 5)
    gc.set_threshold(*before)


def test_who_has_turned_it_off_by_a_threshold_finds_it_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    with gc_paused():
        assert paused()
    assert paused()
    gc.set_threshold(*before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_meanwhile_collects() -> None:
    before = gc.get_threshold()
    with gc_paused():
        child = os.fork()
        if not child:
            code = 1
            try:
                assert gc.get_threshold() == before
                with gc_paused():
                    assert paused()
                code = 0
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_blocks_that_overlap_do_not_hold_it_up_for_good() -> None:
    first_entered, second_entered = threading.Event(), threading.Event()
    first_left, second_may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with gc_paused():
            first_entered.set()
            assert second_entered.wait(30)
        first_left.set()

    def second() -> None:
        assert first_entered.wait(30)
        with gc_paused():
            second_entered.set()
            assert second_may_leave.wait(30)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    assert first_left.wait(30)
    assert not paused()
    second_may_leave.set()
    for thread in threads:
        thread.join()
    with gc_paused():
        assert paused()


def test_no_collection_looks_through_what_a_load_has_made_so_far() -> None:
    file = io.BytesIO()
    aiotorchio.save({str(n): torch.ones(2) for n in range(3000)}, file)
    collections = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append((phase, info["generation"]))

    gc.collect()
    gc.callbacks.append(note)
    try:
        file.seek(0)
        state = aiotorchio.load(file)
    finally:
        gc.callbacks.remove(note)
    assert len(state) == 3000
    # One collection at the end of each task; one every 700 objects would be dozens.
    assert len([phase for phase, _ in collections if phase == "start"]) <= 10
