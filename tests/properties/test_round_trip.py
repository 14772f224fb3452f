"""Random objects arrive equal: types, bits, strides and shared parts."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aiotorchio
from tests.properties.objects import graphs
from tests.support.corpus import assert_same
from tests.support.tiers import examples

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"checksum": st.booleans(), "chunk_size": st.sampled_from([4096, 2**22])},
    optional={"snapshot": st.booleans(), "metadata": st.dictionaries(st.text(), st.text())},
)


@settings(
    max_examples=examples(400),
)
@given(graphs(), OPTIONS)
def test_objects_arrive_as_they_left(obj: Any, options: dict[str, Any]) -> None:
    file = io.BytesIO()
    summary = aiotorchio.save(obj, file, **options)
    assert summary.nbytes == len(file.getvalue())
    file.write(b"next")
    file.seek(0)
    assert_same(aiotorchio.load(file), obj)
    assert file.read() == b"next"
