"""The three steps between the header of a message and its object, without any I/O."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import msgspec
import pytest
import torch

from aiotorchio.engine.claims import HeldClaims, claims
from aiotorchio.engine.finish import Finish, prepare
from aiotorchio.engine.load_options import LoadOptions
from aiotorchio.engine.matching import LoadContext, Match, match_names
from aiotorchio.engine.placement import Placement, place
from aiotorchio.errors import InvalidObjectError, MismatchError
from aiotorchio.graph.flatten import flatten
from aiotorchio.memory.atomic import Exchange
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.wire.header import MIXED_UNITS, Header
from aiotorchio.wire.layout import Layout

CPU = torch.device("cpu")
STATE = {"a": torch.ones(4), "b": {"c": torch.ones(2, 2)}, "d": torch.ones(3, 2).t()}


def header_of(state: Any) -> Header:
    return flatten(state, chunk_size=4096, metadata={}, producer="tests").header


def context_of(state: Any = None, **options: Any) -> LoadContext:
    header, checked = header_of(STATE if state is None else state), LoadOptions(**options)
    return LoadContext.of(header, Layout(header), checked, checked.targets)


def placed(context: LoadContext) -> tuple[Match, Placement]:
    match = match_names(context)
    return match, place(context, match)


def prepared(context: LoadContext) -> tuple[IncomingPayload, Finish]:
    return prepare(context, *placed(context))


def foreign(header: Header) -> Header:
    other = "big" if sys.byteorder == "little" else "little"
    return msgspec.structs.replace(header, byteorder=other)


def test_without_options_names_do_not_matter() -> None:
    match, placement = placed(context_of())
    assert not match.uses_names and not match.row_of_name and not match.targets
    assert match.selection.all and match.fit is None
    assert placement.devices == [CPU] * 3 and not placement.prebuilt


def test_a_selection_leaves_out_storages() -> None:
    match, placement = placed(context_of(select="b.*"))
    assert match.uses_names and "b.c" in match.selection and "a" not in match.selection
    assert placement.devices == [None, CPU, None]
    assert {row: tensor.device.type for row, tensor in placement.prebuilt.items()} == {
        0: "meta",
        2: "meta",
    }


def test_the_storages_of_targets_are_not_made() -> None:
    target = torch.zeros(4)
    match, placement = placed(context_of(into={"a": target}, strict=False))
    assert match.targets == {"a": target} and placement.prebuilt == {0: target}
    assert placement.devices == [None, CPU, CPU]


def test_a_message_that_does_not_fit_is_refused_by_the_match() -> None:
    with pytest.raises(MismatchError, match="does not fit"):
        match_names(context_of(into={"a": torch.zeros(5)}))


def test_in_foreign_byte_order_targets_are_filled_by_deferred_copies() -> None:
    target = torch.zeros(4)
    context = context_of({"a": torch.ones(4)}, into={"a": target})
    context = dataclasses.replace(context, header=foreign(context.header), foreign_byteorder=True)
    _, placement = placed(context)
    assert placement.devices == [CPU]
    _, finish = prepare(context, *placed(context))
    assert [(each.row, each.error) for each in finish.deferred] == [(0, None)]
    assert finish.nbytes == context.layout.total + 16


def test_numbers_of_several_sizes_in_foreign_byte_order_are_refused() -> None:
    context = context_of({"a": torch.ones(4)})
    mixed = [msgspec.structs.replace(row, unit=MIXED_UNITS) for row in context.header.storages]
    header = msgspec.structs.replace(foreign(context.header), storages=mixed)
    with pytest.raises(InvalidObjectError, match="several sizes") as caught:
        match_names(dataclasses.replace(context, header=header, foreign_byteorder=True))
    assert caught.value.entry == "header"


def test_tied_targets_are_compared() -> None:
    target = torch.zeros(4)
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    match, placement = placed(context_of(state, into={"a": target, "b": target}))
    assert placement.compared_with == {"b": "a"}
    assert match.targets.keys() == {"a", "b"}


def test_staged_targets_wait_for_a_change() -> None:
    target = torch.zeros(4)
    _, finish = prepared(context_of({"a": torch.ones(4)}, into={"a": target}, staged=True))
    assert isinstance(finish.change, Exchange)
    assert finish.commit({"a": target}) is finish.change
    _, finish = prepared(context_of({"a": torch.ones(4)}, into={"a": target}))
    assert finish.change is None and finish.commit({"a": target}) is None


def test_a_target_that_was_resized_is_refused() -> None:
    target = torch.zeros(4)
    context = context_of({"a": torch.ones(4)}, into={"a": target})
    match, placement = placed(context)
    target.resize_(8)
    with pytest.raises(MismatchError, match="changed its shape"):
        prepare(context, match, placement)


def test_claims_keep_a_second_load_away_until_they_are_released() -> None:
    target = torch.zeros(4)
    match, _ = placed(context_of({"a": torch.ones(4)}, into={"a": target}))
    first, second = HeldClaims(), HeldClaims()
    first.claim(None, match.targets, match.memory_states, match.extents)
    with pytest.raises(RuntimeError, match="another load is receiving into 'a'"):
        second.claim(None, match.targets, match.memory_states, match.extents)
    first.release()
    second.claim(None, match.targets, match.memory_states, match.extents)
    second.release()
    second.release()
    assert not claims


def test_the_object_has_the_targets_in_it() -> None:
    target = torch.zeros(4)
    _, finish = prepared(context_of({"a": torch.ones(4)}, into={"a": target}))
    obj = {"a": target, "x": 1}
    assert finish.revised(obj) is obj


def test_tensors_that_are_not_selected_are_left_out_of_the_object() -> None:
    _, finish = prepared(context_of({"a": torch.ones(4), "b": torch.ones(1)}, select="a"))
    assert finish.revised({"a": torch.ones(4), "b": torch.ones(1)}).keys() == {"a"}
