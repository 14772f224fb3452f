"""All or nothing: after any failure, every target has its old bytes or every target the new ones.

``Exchange`` copies to and from shadows; ``BufferSwap`` makes targets show other memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.errors import MismatchError
from aiotorchio.memory import atomic
from aiotorchio.memory.atomic import BackMemory, BufferSwap, Exchange, note_change
from aiotorchio.memory.host import view_of
from aiotorchio.memory.memory_state import memory_state
from aiotorchio.table.torch_dtypes import TORCH_DTYPES
from tests.support.payload_layouts import (
    CountingCopier,
    View,
    bytes_of_storage,
    copy_of,
    random_storage,
    raw,
    shapes,
    storages_made,
    views,
    with_elements_of,
)
from tests.support.tiers import examples

COPIER = CountingCopier()
NUMBERS = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool]


def receive(staging: Exchange | BufferSwap) -> list[torch.Tensor]:
    """Fill the shadows with random bytes; return copies of them."""
    for shadow in staging.shadows:
        raw(shadow).random_(0, 256)
    return [copy_of(shadow) for shadow in staging.shadows]


def same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(raw(tensor), raw(other))


def storages_of(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    return [bytes_of_storage(tensor) for tensor in tensors]


@st.composite
def destinations(draw: Callable[[Any], Any]) -> torch.Tensor:
    view: View = draw(views(draw(shapes)))
    return view.random(draw(st.sampled_from(NUMBERS)))


def destinations_of_each_kind() -> list[torch.Tensor]:
    tied = torch.randn(5)
    return [
        torch.randn(6, 5),
        torch.randn(3, 4).T,
        torch.randn(4, 9)[:, 2:8:2],
        torch.randn(()),
        tied,
        torch.randn(2, 3, dtype=torch.complex64),
        tied,
        torch.nn.Parameter(torch.randn(7)),
    ]


# Exchange


@settings(max_examples=examples(150))
@given(st.lists(destinations(), max_size=4), st.sampled_from([64, 2**22]))
def test_bytes_are_exchanged_and_come_back(tensors: list[torch.Tensor], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_STEP", step)
        before, elements = storages_of(tensors), [copy_of(tensor) for tensor in tensors]
        exchange = Exchange(tensors, COPIER)
        arrived = receive(exchange)
        assert storages_of(tensors) == before
        exchange.apply()
        # Every element is new; every byte between and around the elements is old.
        assert storages_of(tensors) == [
            with_elements_of(*pair) for pair in zip(elements, arrived, strict=True)
        ]
        assert all(same(*pair) for pair in zip(exchange.shadows, elements, strict=True))
        exchange.undo()
        assert storages_of(tensors) == before


@pytest.mark.parametrize("name", [name for name in TORCH_DTYPES if not name.startswith("q")])
def test_any_dtype_can_be_exchanged(name: str) -> None:
    tensor = View((3, 5), (7, 1), 2).random(TORCH_DTYPES[name])
    exchange = Exchange([tensor], COPIER)
    (arrived,) = receive(exchange)
    exchange.apply()
    assert same(tensor, arrived)


def test_whichever_copy_fails_all_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_STEP", 48)
    tensors = destinations_of_each_kind()
    whole = CountingCopier()
    Exchange(tensors, whole).apply()
    assert whole.copies > 3 * len(tensors)
    for failing in range(1, whole.copies + 1):
        before = storages_of(tensors)
        exchange = Exchange(tensors, CountingCopier(failing))
        receive(exchange)
        with pytest.raises(RuntimeError, match="device lost"):
            exchange.apply()
        exchange.undo()
        assert storages_of(tensors) == before
        # A second undo does not touch later changes.
        tensors[0].fill_(1)
        exchange.undo()
        assert tensors[0].eq(1).all()


def test_destinations_that_overlap_come_back_in_reverse_order() -> None:
    base = torch.arange(6.0)
    exchange = Exchange([base, base[2:], base[:4]], COPIER)
    for n, shadow in enumerate(exchange.shadows):
        shadow.fill_(n + 10)
    exchange.apply()
    assert base.tolist() == [12, 12, 12, 12, 11, 11]
    exchange.undo()
    assert base.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_was_not_exchanged_need_not_be_undone() -> None:
    tensors = destinations_of_each_kind()
    before = storages_of(tensors)
    copier = CountingCopier()
    exchange = Exchange(tensors, copier)
    receive(exchange)
    exchange.undo()
    assert storages_of(tensors) == before
    assert copier.copies == 0


def test_little_memory_is_taken_beside_the_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_STEP", 256)
    copier = CountingCopier()
    Exchange([torch.zeros(50, 50), torch.zeros(64, 40)[:, ::4]], copier).apply()
    assert 128 < copier.largest <= 256


def test_tied_destinations_have_one_shadow() -> None:
    tensor = torch.zeros(3)
    exchange = Exchange([tensor, torch.zeros(3), tensor, tensor.view(3)], COPIER)
    first, other, *tied = exchange.shadows
    assert all(shadow is first for shadow in tied)
    assert other is not first
    first.fill_(1)
    exchange.apply()
    assert tensor.tolist() == [1, 1, 1]


def test_shadows_lie_as_their_destinations_do_if_these_have_no_gaps() -> None:
    """A shadow with the layout of a dense target can receive the bytes as they arrive."""
    dense = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    exchange = Exchange([dense, dense[:, 1], torch.zeros(4, 3).T], COPIER)
    assert [shadow.stride() for shadow in exchange.shadows] == [dense.stride(), (20, 5, 1), (1, 3)]


Pick = Callable[[torch.Tensor], torch.Tensor]
EMPTY: dict[str, Pick] = {
    "in the middle": lambda base: base[3:3],
    "at the end": lambda base: base[len(base) :],
    "no rows": lambda base: base[:0].view(0, 3),
    "no columns": lambda base: base[2:2].view(3, 0),
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_tensors_without_elements_have_nothing_to_exchange(
    empty: Pick,
) -> None:
    base = torch.arange(5.0)
    tensor = empty(base)
    states = memory_state(base), memory_state(tensor)
    exchange = Exchange([tensor], COPIER)
    exchange.apply()
    assert base.tolist() == [0, 1, 2, 3, 4]
    exchange.undo()
    assert base.tolist() == [0, 1, 2, 3, 4]
    assert (memory_state(base), memory_state(tensor)) == states


# Buffer swap


def swapped(
    memory: BackMemory,
    tensors: Sequence[torch.Tensor],
    received: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Receive one message of random bytes; return them."""
    memory.claim()
    swap = memory.swap(tensors, tensors if received is None else received, COPIER)
    arrived = receive(swap)
    swap.prepare()
    swap.apply()
    memory.release()
    return arrived


def test_tensors_stay_and_their_memory_takes_turns() -> None:
    tensors = destinations_of_each_kind()
    there = [id(tensor) for tensor in tensors]
    layouts = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    memory, addresses = BackMemory(), []
    for _ in range(6):
        arrived = swapped(memory, tensors)
        # Of tied tensors, the bytes that came last.
        assert all(map(same, tensors, [*arrived[:4], arrived[6], *arrived[5:]]))
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert [id(tensor) for tensor in tensors] == there
    assert [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors] == layouts
    assert addresses == [addresses[0], addresses[1]] * 3
    assert not set(addresses[0]) & set(addresses[1])


def test_nothing_is_shown_before_all_is_there() -> None:
    tensors = destinations_of_each_kind()
    memory = BackMemory()
    swapped(memory, tensors)
    before, states = storages_of(tensors), list(map(memory_state, tensors))
    swap = memory.swap(tensors, tensors, COPIER)
    receive(swap)
    swap.undo()
    assert (storages_of(tensors), list(map(memory_state, tensors))) == (before, states)


COVERS: dict[str, tuple[list[Pick], bool]] = {
    "all of it": ([lambda base: base], True),
    "in other order": ([lambda base: base.T], True),
    "both halves": ([lambda base: base[3:], lambda base: base[:3]], True),
    "overlapping": ([lambda base: base[1:], lambda base: base[:4]], True),
    "one within the other": ([lambda base: base, lambda base: base[2:3]], True),
    "not the first": ([lambda base: base[1:], lambda base: base[2:]], False),
    "not the last": ([lambda base: base[:5], lambda base: base[:2]], False),
    "not the middle": ([lambda base: base[:2], lambda base: base[3:]], False),
    "not the gaps": ([lambda base: base[:, ::3]], False),
    "gaps that another one fills": ([lambda base: base, lambda base: base[:, ::3]], False),
    "not all of the gaps": ([lambda base: base[::2], lambda base: base[1:2]], False),
}


@pytest.mark.parametrize("case", COVERS)
def test_only_what_a_message_does_not_have_is_copied(case: str) -> None:
    picks, whole = COVERS[case]
    base = torch.randn(6, 4)
    received = [pick(base) for pick in picks]
    expected, copier = base.clone(), CountingCopier()
    swap = BackMemory().swap([base, *received], received, copier)
    for pick, shadow in zip(picks, swap.shadows, strict=True):
        pick(expected).copy_(shadow.fill_(9))
    assert swap.is_instant and swap.needs_prepare != whole
    swap.prepare()
    swap.apply()
    assert torch.equal(base, expected)
    assert (copier.copies == 0) == whole


def test_what_a_message_does_not_have_may_change_until_it_is_whole() -> None:
    base = torch.zeros(6)
    swap = BackMemory().swap([base, base[2:4]], [base[2:4]], COPIER)
    swap.shadows[0].fill_(9)
    base.fill_(5)
    swap.prepare()
    swap.apply()
    assert base.tolist() == [5, 5, 9, 9, 5, 5]


def test_a_copy_that_fails_leaves_all_as_it_was() -> None:
    base, memory = torch.zeros(6), BackMemory()
    for failing in (1, 2):
        before, state = bytes_of_storage(base), memory_state(base)
        swap = memory.swap([base], [base[2:4]], CountingCopier(failing))
        receive(swap)
        with pytest.raises(RuntimeError, match="device lost"):
            swap.prepare()
            swap.apply()
        swap.undo()
        assert (bytes_of_storage(base), memory_state(base)) == (before, state)
        swapped(memory, [base])


@settings(max_examples=examples(150))
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30), st.sampled_from([1, 2, 3]))))
def test_what_a_message_does_not_have_is_there_after_it(lines: list[tuple[int, int, int]]) -> None:
    """Other tensors of the same storage and bytes that no tensor shows keep their values."""
    storage = random_storage(130)
    whole = View((100,), (1,), 20).over(storage, torch.uint8)
    received = [
        View((length,), (step,), start).over(storage, torch.uint8) for start, length, step in lines
    ]
    memory = BackMemory()
    for _ in range(3):
        expected = copy_of(whole).untyped_storage()
        arrived = swapped(memory, [whole, *received], received)
        for (start, length, step), tensor in zip(lines, arrived, strict=True):
            View((length,), (step,), start).over(expected, torch.uint8).copy_(tensor)
        assert {memory_state(each)[0] for each in received} <= {memory_state(whole)[0]}
        assert bytes_of_storage(whole) == bytes(view_of(expected))


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_a_tensor_without_elements_stands_for_no_bytes(
    empty: Pick,
) -> None:
    base = torch.arange(5.0)
    for received in ([empty(base), base[1:]], [empty(base)], [base[:3], empty(base), base[4:]]):
        swap = BackMemory().swap([base, *received], received, COPIER)
        for shadow in swap.shadows:
            shadow.fill_(9)
        swap.prepare()
        swap.apply()
        kept = [n for n in range(5) if base[n] != 9]
        assert base[kept].tolist() == kept
        base.copy_(torch.arange(5.0))


def test_other_storages_are_left_alone() -> None:
    moving, resting = torch.zeros(3), torch.zeros(3)
    state = memory_state(resting)
    swapped(BackMemory(), [moving, resting], [moving])
    assert memory_state(resting) == state


def test_memory_behind_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message with only some of the tensors keeps the second memory of the others."""
    first, second = torch.zeros(1000), torch.zeros(2000)
    made = storages_made(monkeypatch)
    memory = BackMemory()
    for received in ([first, second], [first], [second], [first, second], [second], [first]):
        swapped(memory, [first, second], received)
    assert sorted(storage.nbytes() for storage in made) == [4000, 8000]


def test_memory_behind_what_is_gone_is_not_kept() -> None:
    tensor = torch.zeros(1000)
    memory = BackMemory()
    shown_before = weakref.ref(tensor.untyped_storage())
    swapped(memory, [tensor])
    gc.collect()
    assert shown_before() is not None
    tensor.data = torch.zeros(2000)
    swapped(memory, [tensor])
    gc.collect()
    assert shown_before() is None


def test_memory_that_a_tensor_shows_is_not_received_into() -> None:
    """The memory that one target would show next is still shown by another tensor."""
    tensor = torch.zeros(3)
    memory, shown_before = BackMemory(), tensor.detach()
    swapped(memory, [tensor])
    for _ in range(2):
        (arrived,) = swapped(memory, [tensor, shown_before], [tensor])
        assert same(tensor, arrived)
        assert shown_before.tolist() == [0, 0, 0]


def test_what_failed_to_arrive_is_never_shown() -> None:
    base = torch.zeros(10)
    first, second = base[:6], base[6:]
    memory = BackMemory()
    swapped(memory, [first, second])
    before = second.clone()
    swap = memory.swap([first, second], [first, second], COPIER)
    receive(swap)
    (arrived,) = swapped(memory, [first, second], [first])
    assert same(first, arrived)
    assert same(second, before)


def test_views_of_one_storage_go_on_sharing_it() -> None:
    base = torch.zeros(2, 3)
    row, transposed = base[1], base.T
    swapped(BackMemory(), [base, row, transposed], [base])
    base.fill_(5)
    assert row.tolist() == [5, 5, 5]
    assert transposed.tolist() == [[5, 5]] * 3


def test_conjugate_and_negative_views_stay_what_they_are() -> None:
    base = torch.zeros(2, dtype=torch.complex64)
    conjugate, negative = base.conj(), base.conj().imag
    swap = BackMemory().swap([base, conjugate, negative], [base], COPIER)
    swap.shadows[0].fill_(1 + 2j)
    swap.prepare()
    swap.apply()
    assert (conjugate.is_conj(), negative.is_neg()) == (True, True)
    assert (conjugate.tolist(), negative.tolist()) == ([1 - 2j] * 2, [-2.0] * 2)


class Stubborn(torch.Tensor):
    """A tensor that once refuses to show other memory."""

    refused = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__ and not cls.refused:  # type: ignore[attr-defined]
            cls.refused = True
            raise RuntimeError("not now")
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("messages", [0, 1, 2])
def test_whichever_tensor_fails_all_show_what_they_did(position: int, messages: int) -> None:
    tensors = [torch.zeros(3) for _ in range(4)]
    tensors[position] = tensors[position].as_subclass(Stubborn)
    Stubborn.refused = True
    memory = BackMemory()
    for _ in range(messages):
        swapped(memory, tensors)
    before, states = storages_of(tensors), list(map(memory_state, tensors))
    swap = memory.swap(tensors, tensors, COPIER)
    receive(swap)
    Stubborn.refused = False
    with pytest.raises(RuntimeError, match="not now"):
        swap.prepare()
        swap.apply()
    swap.undo()
    assert (storages_of(tensors), list(map(memory_state, tensors))) == (before, states)
    arrived = swapped(memory, tensors)
    assert all(map(same, tensors, arrived))


def test_a_swap_that_was_undone_can_be_done_again() -> None:
    tensor = torch.zeros(3)
    memory = BackMemory()
    swapped(memory, [tensor])
    before, state = tensor.clone(), memory_state(tensor)
    swap = memory.swap([tensor], [tensor], COPIER)
    receive(swap)
    swap.prepare()
    swap.apply()
    behind = memory_state(tensor)
    swap.undo()
    assert same(tensor, before)
    assert memory_state(tensor) == state
    swapped(memory, [tensor])
    assert memory_state(tensor) == behind
    # A second undo does not touch later changes.
    swap.undo()
    assert memory_state(tensor) == behind


def test_one_message_at_a_time() -> None:
    memory = BackMemory()
    memory.claim()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="another load is using this DoubleBuffer"):
            memory.claim()
    memory.release()
    memory.claim()
    memory.release()


# Exchange and buffer swap

Staging = Callable[[list[torch.Tensor]], Exchange | BufferSwap]
BOTH: list[Staging] = [
    lambda tensors: Exchange(tensors, COPIER),
    lambda tensors: BackMemory().swap(tensors, tensors, COPIER),
]
both = pytest.mark.parametrize("staging", BOTH, ids=["exchange", "swap"])


@both
def test_no_tensors_are_no_trouble(staging: Staging) -> None:
    nothing = staging([])
    assert nothing.shadows == []
    nothing.prepare()
    nothing.apply()
    nothing.undo()


@both
def test_a_parameter_stays_one_and_autograd_knows(staging: Staging) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    loss = (parameter * parameter).sum()
    change = staging([parameter])
    change.shadows[0].fill_(2)
    assert not change.shadows[0].requires_grad
    version = parameter._version
    change.prepare()
    change.apply()
    assert parameter.tolist() == [2, 2, 2]
    assert (parameter.is_leaf, parameter.requires_grad) == (True, True)
    assert parameter._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    (parameter * parameter).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [4, 4, 4]


@both
def test_a_view_that_changes_tells_those_who_computed_with_all_of_it(staging: Staging) -> None:
    base = torch.ones(4, requires_grad=True) * 1
    loss = (base * base).sum()
    change = staging([base[1:3]])
    change.prepare()
    change.apply()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both
@pytest.mark.parametrize("inside", [False, True])
def test_tensors_of_inference_mode_change_too(staging: Staging, inside: bool) -> None:
    with torch.inference_mode():
        inference = torch.zeros(3)
    ordinary = torch.nn.Parameter(torch.zeros(3))
    with torch.inference_mode(inside):
        change = staging([inference, ordinary])
        for shadow in change.shadows:
            shadow.fill_(2)
        change.prepare()
        change.apply()
    assert (inference.tolist(), ordinary.tolist()) == ([2, 2, 2], [2, 2, 2])
    with torch.inference_mode(inside):
        change.undo()
    assert (inference.tolist(), ordinary.tolist()) == ([0, 0, 0], [0, 0, 0])
    assert (inference.is_inference(), ordinary.is_inference()) == (True, False)


@both
def test_a_destination_that_is_no_longer_there_stops_it(staging: Staging) -> None:
    tensors = [torch.zeros(3) for _ in range(3)]
    change = staging(tensors)
    receive(change)
    tensors[1].data = torch.zeros(3)
    states = list(map(memory_state, tensors))
    with pytest.raises(MismatchError, match="changed its shape or its memory"):
        change.prepare()
        change.apply()
    change.undo()
    assert list(map(memory_state, tensors)) == states
    assert not any(tensor.any() for tensor in tensors)
    # Nothing changed, so the version counters did not change.
    assert [tensors[0]._version, tensors[2]._version] == [0, 0]


def test_changes_are_noted_where_there_are_versions() -> None:
    with torch.inference_mode():
        inference = torch.zeros(2)
    leaf = torch.nn.Parameter(torch.zeros(2))
    view = torch.zeros(4)[1:3]
    note_change([inference, leaf, view])
    note_change(iter([leaf]))
    note_change([])
    assert (leaf._version, view._version) == (2, 1)
