"""The unsafe globals of a file, which are read before a load. Saves: test_replaced_file.py."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiotorchio
from aiotorchio.streams.detect import open_blocking_source
from aiotorchio.streams.guard import exclusive
from tests.support import craft
from tests.support.lowered import lowered


class Distrusted:
    """A class on no allowlist."""


def file_of(obj: object, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    file.seek(0)
    return file


def test_unsafe_globals_need_a_file_that_can_seek() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with open(reading, "rb", 0) as file, pytest.raises(ValueError, match="cannot seek"):
        aiotorchio.get_unsafe_globals(file)


def test_unsafe_globals_while_another_load_uses_the_file() -> None:
    file = file_of(Distrusted())
    with exclusive(file, "load", open_blocking_source):
        file.seek(3)
        with pytest.raises(aiotorchio.StreamBusy):
            aiotorchio.get_unsafe_globals(file)
        assert file.tell() == 3


def test_what_is_never_allowed_stays_unsafe() -> None:
    pickle = b"\x80\x02cos\ngetpid\n)R."
    file = io.BytesIO(craft.message(pickle, "pickle", []))
    assert aiotorchio.get_unsafe_globals(file, safe_globals=[(os.getpid, "os.getpid")]) == [
        "os.getpid"
    ]


def test_there_is_an_end_to_the_names_of_a_pickle() -> None:
    names = b"".join(b"cmodule\nname%d\n" % n for n in range(11))
    file = io.BytesIO(craft.message(b"\x80\x02" + names + b".", "pickle", []))
    with lowered({"globals": 10}), pytest.raises(aiotorchio.LimitExceeded, match="10 globals"):
        aiotorchio.get_unsafe_globals(file)


def test_a_message_can_be_loaded_although_nobody_can_say_what_it_needs() -> None:
    data = file_of([Distrusted()], pickle_protocol=4).getvalue() + file_of(1).getvalue()

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    async def main() -> None:
        reader = aiotorchio.StreamReader(pieces())
        async with reader.open() as message:
            with pytest.raises(aiotorchio.UnsafeObjectError, match="protocol 4"):
                await message.get_unsafe_globals()
            (loaded,) = await message.load(weights_only=False)
            assert type(loaded) is Distrusted
        assert await reader.load() == 1

    asyncio.run(main())
