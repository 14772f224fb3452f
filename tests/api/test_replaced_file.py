"""Saves to paths: a regular file is replaced as a whole, or stays unchanged; nothing else stays.

Devices, pipes and descriptors are written to as they are.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.api import replaced_file
from tests.support.backends import PATIENCE
from tests.support.corpus import assert_same

fcntl = pytest.importorskip("fcntl")

STATE = {"w": torch.arange(20_000.0)}
needs_descriptors = pytest.mark.skipif(
    not os.path.exists("/proc/self/fd"), reason="the system has no /proc/self/fd"
)
needs_full_device = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="the system has no /dev/full"
)


class BytesPath:
    """A path-like object of bytes."""

    def __init__(self, path: Any) -> None:
        self._path = os.fsencode(path)

    def __fspath__(self) -> bytes:
        return self._path


KINDS: list[Callable[[Any], Any]] = [os.fspath, os.fsencode, Path, BytesPath]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["str", "bytes", "Path", "PathLike of bytes"])


# ------------------------------------------------------------------------------ names and links


@kinds
def test_paths_of_all_types(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    path = kind(tmp_path / "state")
    for obj in (STATE, {"set": {1}}):
        aiotorchio.save(obj, path)
        assert_same(aiotorchio.load(path, weights_only=False), obj)
        assert aiotorchio.get_unsafe_globals(path) == []
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("name", [b"a" * 255, "ü".encode() * 127, b"a", b".part", b" ", b"-"])
def test_names_of_all_lengths(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    for n in range(2):
        aiotorchio.save(n, path)
        assert aiotorchio.load(path) == n
    assert os.listdir(os.fsencode(tmp_path)) == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in UTF-8")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff\xfe")
    aiotorchio.save(STATE, path)
    assert_same(aiotorchio.load(path), STATE)


def test_a_relative_path_means_the_same_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    aiotorchio.save(STATE, "state", progress=lambda done, total: os.chdir("other"))
    assert sorted(os.listdir(tmp_path)) == ["other", "state"]
    assert os.listdir(tmp_path / "other") == []


def test_an_absolute_path_needs_no_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    aiotorchio.save(STATE, tmp_path / "state")
    with pytest.raises(FileNotFoundError) as caught:
        aiotorchio.save(STATE, "state")
    assert caught.value.filename == "state"


def test_links_lead_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "v1").write_bytes(b"old")
    (tmp_path / "runs" / "last").symlink_to("v1")
    (tmp_path / "directory").symlink_to("runs")
    (tmp_path / "latest").symlink_to("directory/../runs/last")
    aiotorchio.save(STATE, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "runs" / "last").is_symlink()
    assert_same(aiotorchio.load(tmp_path / "runs" / "v1"), STATE)
    assert sorted(os.listdir(tmp_path)) == ["directory", "latest", "runs"]
    assert sorted(os.listdir(tmp_path / "runs")) == ["last", "v1"]


def test_a_link_to_no_file_stays_and_gets_one(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("v1")
    aiotorchio.save(STATE, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same(aiotorchio.load(tmp_path / "v1"), STATE)


def test_other_names_of_a_file_keep_the_old_one(tmp_path: Path) -> None:
    aiotorchio.save("old", tmp_path / "state")
    os.link(tmp_path / "state", tmp_path / "other")
    aiotorchio.save("new", tmp_path / "state")
    assert aiotorchio.load(tmp_path / "other") == "old"


BAD = {
    "directory": ".",
    "empty": None,
    "no parent": "none/state",
    "a file as parent": "file/state",
    "a directory that there is not": "none/",
    "a file as directory": "file/",
    "a loop": "loop",
    "a link into no directory": "astray",
    "a link to a directory": "link",
    "a long name": "a" * 256,
}


@kinds
@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_open(tmp_path: Path, kind: Callable[[Any], Any], name: str) -> None:
    (tmp_path / "file").write_bytes(b"file")
    for link, to in (("loop", "loop"), ("astray", "none/state"), ("link", ".")):
        (tmp_path / link).symlink_to(to)
    before = sorted(os.listdir(tmp_path))
    relative = BAD[name]
    text = "" if relative is None else os.path.join(tmp_path, relative)
    if kind is Path and (not text or text.endswith("/")):
        pytest.skip("Path has no such path")
    path = kind(text)
    with pytest.raises(OSError) as theirs, open(path, "wb"):
        pass
    with pytest.raises(OSError) as ours:
        aiotorchio.save(STATE, path)
    assert ours.type is theirs.type
    assert str(ours.value) == str(theirs.value)
    assert ours.value.filename == os.fspath(path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_null_byte_is_the_error_of_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null byte"):
        aiotorchio.save(STATE, f"{tmp_path}/a\0b")


def test_numbers_are_no_paths() -> None:
    with pytest.raises(TypeError, match="a path, a binary file or a blocking socket is needed"):
        aiotorchio.save(STATE, 1)


# ------------------------------------------------------------------------------ mode and owner


def test_the_mode_of_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    for mode in (0o600, 0o666, 0o440):
        path.chmod(mode)
        aiotorchio.save(STATE, path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert_same(aiotorchio.load(path), STATE)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_mode_that_open_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "other").write_bytes(b"")
        aiotorchio.save(STATE, tmp_path / "state")
    finally:
        os.umask(before)
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "state")}
    assert len(modes) == 1


def test_nobody_else_can_read_the_unfinished_file_of_a_private_one(tmp_path: Path) -> None:
    modes: list[int] = []

    def progress(done: int, total: int) -> None:
        modes.extend(
            stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)
        )

    (tmp_path / "state").write_bytes(b"old")
    (tmp_path / "state").chmod(0o600)
    aiotorchio.save(STATE, tmp_path / "state", progress=progress)
    assert modes == [0o600] * 2


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root can give a file to another user"
)
def test_the_owner_of_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    os.chown(path, 12, 34)
    path.chmod(0o640)
    aiotorchio.save(STATE, path)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o640)


def test_without_privileges_the_group_stays_if_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def chown(path: str, owner: int, group: int) -> None:
        calls.append((owner, group))
        raise PermissionError(errno.EPERM, "not permitted", path)

    path = tmp_path / "state"
    path.write_bytes(b"old")
    status = path.stat()
    monkeypatch.setattr(os, "chown", chown)
    aiotorchio.save(STATE, path)
    assert calls == [(status.st_uid, status.st_gid), (-1, status.st_gid)]
    assert_same(aiotorchio.load(path), STATE)


# ------------------------------------------------------------------------------ pipes, descriptors


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    loaded: list[Any] = []
    thread = threading.Thread(target=lambda: loaded.append(aiotorchio.load(path)), daemon=True)
    thread.start()
    aiotorchio.save(STATE, path)
    thread.join(PATIENCE)
    assert_same(loaded[0], STATE)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_device_is_written_to() -> None:
    before = os.stat(os.devnull)
    aiotorchio.save(STATE, os.devnull)
    assert os.path.samestat(os.stat(os.devnull), before)


def through_link(descriptor: int, directory: Path) -> str:
    """A link as /dev/stdout is one."""
    (directory / "link").symlink_to(f"/proc/self/fd/{descriptor}")
    return str(directory / "link")


WAYS_TO_DESCRIPTORS: dict[str, Callable[[int, Path], Any]] = {
    "/dev/fd": lambda descriptor, directory: f"/dev/fd/{descriptor}",
    "/proc/self/fd": lambda descriptor, directory: f"/proc/self/fd/{descriptor}".encode(),
    "task": lambda descriptor, directory: f"/proc/thread-self/fd/{descriptor}",
    "pid": lambda descriptor, directory: Path(f"/proc/{os.getpid()}/fd/{descriptor}"),
    "link": through_link,
}
ways_to_descriptors = pytest.mark.parametrize(
    "path_of", WAYS_TO_DESCRIPTORS.values(), ids=list(WAYS_TO_DESCRIPTORS)
)


@needs_descriptors
@ways_to_descriptors
def test_a_pipe_of_a_descriptor_is_written_to(
    tmp_path: Path, path_of: Callable[[int, Path], Any]
) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as file:
        with open(writing, "wb"):
            aiotorchio.save([1], path_of(writing, tmp_path))
        assert aiotorchio.load(file) == [1]
        assert file.read() == b""


def memory_file(directory: Path) -> Any:
    return open(os.memfd_create("state"), "r+b")


def unlinked_file(directory: Path) -> Any:
    return tempfile.TemporaryFile(dir=directory)


def removed_file(directory: Path) -> Any:
    file = open(directory / "removed", "w+b")  # noqa: SIM115 - the test closes it
    os.unlink(directory / "removed")
    # The text of the link is now also the name of another file.
    Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).write_bytes(b"other")
    return file


def named_file(directory: Path) -> Any:
    return open(directory / "named", "w+b")


@needs_descriptors
@ways_to_descriptors
@pytest.mark.parametrize("open_file", [memory_file, unlinked_file, removed_file, named_file])
def test_the_file_of_a_descriptor_is_written_to(
    tmp_path: Path, path_of: Callable[[int, Path], Any], open_file: Callable[[Path], Any]
) -> None:
    """Also a file that has a name: the descriptor, not the name, was meant."""
    with open_file(tmp_path) as file:
        file.write(b"longer than the message" * 10_000)
        file.flush()
        path = path_of(file.fileno(), tmp_path)
        before = {name: (tmp_path / name).lstat().st_ino for name in os.listdir(tmp_path)}
        summary = aiotorchio.save(STATE, path)
        assert os.fstat(file.fileno()).st_size == summary.nbytes
        file.seek(0)
        assert_same(aiotorchio.load(file), STATE)
        assert_same(aiotorchio.load(path), STATE)
        after = {name: (tmp_path / name).lstat().st_ino for name in os.listdir(tmp_path)}
        assert after == before
    for other in tmp_path.glob("* (deleted)"):
        assert other.read_bytes() == b"other"


@needs_descriptors
@pytest.mark.parametrize("descriptor", ["999999", "none"])
def test_a_descriptor_that_is_not_open(descriptor: str) -> None:
    path = f"/proc/self/fd/{descriptor}"
    with pytest.raises(FileNotFoundError) as caught:
        aiotorchio.save(STATE, path)
    assert caught.value.filename == path


@needs_descriptors
def test_a_path_through_a_directory_of_a_process(tmp_path: Path) -> None:
    """Such directories lead to files that are replaced as others."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        for n in range(2):
            aiotorchio.save(n, f"/proc/self/fd/{descriptor}/state")
            aiotorchio.save(n, f"/proc/self/root{tmp_path}/other")
    finally:
        os.close(descriptor)
    assert aiotorchio.load(tmp_path / "state") == aiotorchio.load(tmp_path / "other") == 1
    assert sorted(os.listdir(tmp_path)) == ["other", "state"]


# ------------------------------------------------------------------------------ durability


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The syncs and replacements of the test, in order."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("directory" if is_directory else "file")
        fsync(descriptor)

    def record_replacement(source: Any, target: Any) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replacement)
    return calls


def test_the_file_is_synced_before_it_replaces_and_the_directory_after(
    tmp_path: Path, synced: list[str]
) -> None:
    for _ in range(2):
        aiotorchio.save(STATE, tmp_path / "state")
    assert synced == ["file", "replace", "directory"] * 2


def test_without_durable_nothing_is_synced(tmp_path: Path, synced: list[str]) -> None:
    aiotorchio.save(STATE, tmp_path / "state", durable=False)
    assert synced == ["replace"]
    assert_same(aiotorchio.load(tmp_path / "state"), STATE)


def test_devices_are_not_synced(synced: list[str]) -> None:
    aiotorchio.save(STATE, os.devnull)
    assert synced == []


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_durable_is_a_bool(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=f"durable must be True or False, not {value!r}"):
        aiotorchio.save(STATE, tmp_path / "state", durable=value)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, number = os.fsync, 0

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    path = tmp_path / "state"
    monkeypatch.setattr(os, "fsync", failing)
    # Some file systems have no sync for directories.
    for number in (errno.EINVAL, errno.ENOTSUP):
        aiotorchio.save(number, path)
        assert aiotorchio.load(path) == number
    number = errno.EIO
    with pytest.raises(OSError) as caught:
        aiotorchio.save("new", path)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    assert aiotorchio.load(path) == "new"
    assert os.listdir(tmp_path) == ["state"]


def test_a_directory_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no directory, nor does a system without the right to read it."""
    real = os.open

    def refusing(path: Any, *arguments: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "denied", path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    aiotorchio.save(STATE, tmp_path / "state")
    assert_same(aiotorchio.load(tmp_path / "state"), STATE)


# ------------------------------------------------------------------------------ failures


def fail_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def fail_close(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []

    def close(file: Any) -> None:
        super(replaced_file._File, file).close()
        if not closed:
            closed.append(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replaced_file._File, "close", close, raising=False)


def fail_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the save a descriptor of a device that is full."""
    real = os.open

    def full(path: Any, flags: int, *mode: int) -> int:
        descriptor = real(path, flags, *mode)
        if flags & os.O_CREAT:
            os.close(descriptor)
            return real("/dev/full", os.O_WRONLY)
        return descriptor

    monkeypatch.setattr(os, "open", full)


def fail_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize(
    "fail",
    [fail_sync, fail_close, pytest.param(fail_write, marks=needs_full_device), fail_replace],
)
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch], None],
    is_new: bool,
) -> None:
    path = tmp_path / "state"
    if not is_new:
        aiotorchio.save("old", path)
    before = os.listdir(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError) as caught:
            aiotorchio.save(STATE, os.fsencode(path))
    assert caught.value.errno == errno.ENOSPC
    text = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: {os.fsencode(path)!r}"
    assert str(caught.value) == text
    assert os.listdir(tmp_path) == before
    if not is_new:
        assert aiotorchio.load(path) == "old"


@needs_full_device
def test_a_full_device_is_an_error_with_its_path() -> None:
    with pytest.raises(OSError) as caught:
        aiotorchio.save(STATE, "/dev/full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError, GeneratorExit])
def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "state"
    aiotorchio.save("old", path)
    raised = error("from the callback")

    def progress(done: int, total: int) -> None:
        assert len(os.listdir(tmp_path)) == 2
        raise raised

    with pytest.raises(error) as caught:
        aiotorchio.save(STATE, path, progress=progress)
    # It is passed on as it is: the path belongs to errors of the file.
    assert caught.value is raised
    assert getattr(raised, "filename", None) is None
    assert aiotorchio.load(path) == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_bad_object_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    aiotorchio.save("old", path)
    with pytest.raises((AttributeError, TypeError)):
        aiotorchio.save([threading.Lock()], path)
    assert aiotorchio.load(path) == "old"
    assert os.listdir(tmp_path) == ["state"]


# ------------------------------------------------------------------------------ several saves


def test_a_save_within_a_save(tmp_path: Path) -> None:
    """Each file is whole, and the save that ends last stays."""
    path = tmp_path / "state"

    def progress(done: int, total: int) -> None:
        aiotorchio.save("inner", path)
        assert aiotorchio.load(path) == "inner"

    aiotorchio.save(STATE, path, progress=progress)
    assert_same(aiotorchio.load(path), STATE)
    assert os.listdir(tmp_path) == ["state"]


def test_saves_of_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "state"
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def save(value: int) -> None:
        try:
            start.wait(PATIENCE)
            for _ in range(20):
                aiotorchio.save(torch.full((5000,), value), path, durable=False)
                loaded = aiotorchio.load(path)
                assert loaded.tolist() == [int(loaded[0])] * 5000
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failures == []
    assert os.listdir(tmp_path) == ["state"]


def unfinished_name(path: Path) -> str:
    """The name that a save gave its unfinished file."""
    names: set[str] = set()
    before = set(os.listdir(path.parent))
    aiotorchio.save(STATE, path, progress=lambda done, total: names.update(os.listdir(path.parent)))
    (name,) = names - before - {path.name}
    return name


def test_files_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "state"
    name = unfinished_name(path)
    others = ["state.part", ".state.part", unfinished_name(tmp_path / "other"), f"x{name}"]
    for other in others:
        (tmp_path / other).write_bytes(b"mine")
    aiotorchio.save(STATE, path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "other", "state"])


def test_leftovers_that_are_no_files(tmp_path: Path) -> None:
    """A save neither waits for a pipe nor follows a link nor removes a directory."""
    path = tmp_path / "state"
    name = unfinished_name(path)
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / f"{name}.link").symlink_to("target")
    (tmp_path / f"{name}.directory").mkdir()
    os.mkfifo(tmp_path / f"{name}.pipe")
    aiotorchio.save(STATE, path)
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert {f"{name}.link", f"{name}.directory"} <= set(os.listdir(tmp_path))


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        aiotorchio.save(STATE, tmp_path / "state")
    assert os.listdir(tmp_path) == ["state"]


def test_a_new_file_that_another_save_took_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is locked: it was removed in one case, and is being looked at in the other."""
    path = tmp_path / "state"
    flock, calls = fcntl.flock, []

    def first_removed(file: Any, flags: int) -> None:
        calls.append(os.listdir(tmp_path))
        if len(calls) == 1:
            os.unlink(tmp_path / calls[0][0])
        if len(calls) == 2:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", first_removed)
    aiotorchio.save(STATE, path)
    names = [name for (name,) in calls]
    assert len(set(names)) == len(names) == 3
    assert_same(aiotorchio.load(path), STATE)
    assert os.listdir(tmp_path) == ["state"]


def test_leftovers_stay_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    name = unfinished_name(path)
    (tmp_path / name).write_bytes(b"left")

    def flock(file: Any, flags: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        aiotorchio.save([1], path)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "state"])
    aiotorchio.save([2], path)
    assert os.listdir(tmp_path) == ["state"]
