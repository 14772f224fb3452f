"""Blocking saves and loads of paths: a regular file is replaced as a whole, or stays unchanged.

Pipes are written to. The unsafe globals of a file can be read before a load.
"""

from __future__ import annotations

import asyncio
import io
import os
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.streams.detect import open_blocking_source
from aiotorchio.streams.guard import exclusive
from tests.support import craft
from tests.support.backends import PATIENCE
from tests.support.corpus import assert_same
from tests.support.lowered import lowered

STATE = {"w": torch.arange(20_000.0)}


def test_the_mode_of_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    path.chmod(0o600)
    aiotorchio.save(STATE, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert_same(aiotorchio.load(path), STATE)


def test_a_new_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    aiotorchio.save(STATE, tmp_path / "state")
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "state")}
    assert len(modes) == 1


def test_a_link_leads_to_what_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "v1").write_bytes(b"old")
    (tmp_path / "latest").symlink_to("v1")
    aiotorchio.save(STATE, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same(aiotorchio.load(tmp_path / "v1"), STATE)
    assert sorted(os.listdir(tmp_path)) == ["latest", "v1"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    loaded: list[Any] = []
    thread = threading.Thread(target=lambda: loaded.append(aiotorchio.load(path)), daemon=True)
    thread.start()
    aiotorchio.save(STATE, path)
    thread.join(PATIENCE)
    assert_same(loaded[0], STATE)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_saves_to_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    """A save within a save: each file is whole, and the save that ends last stays."""
    path = tmp_path / "state"

    def progress(done: int, total: int) -> None:
        aiotorchio.save("inner", path)
        assert aiotorchio.load(path) == "inner"

    aiotorchio.save(STATE, path, progress=progress)
    assert_same(aiotorchio.load(path), STATE)
    assert os.listdir(tmp_path) == ["state"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "state.part").write_bytes(b"mine")
    aiotorchio.save(STATE, tmp_path / "state")
    assert (tmp_path / "state.part").read_bytes() == b"mine"


def test_an_error_names_the_path_that_was_given(tmp_path: Path) -> None:
    path = str(tmp_path / "none" / "state")
    with pytest.raises(FileNotFoundError) as caught:
        aiotorchio.save(STATE, path)
    assert caught.value.filename == path


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        aiotorchio.save(STATE, tmp_path)
    assert tmp_path.is_dir()


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
