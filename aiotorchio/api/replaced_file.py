"""The file that ``save`` writes at a path: one that replaces the old one when it is whole.

In: a path. Out: an open file; when its block ends, it is the file at the path. Devices, pipes and
descriptors are written to as they are. An ``OSError`` has the caller's path as its ``filename``,
and means that the old file is unchanged, unless only the sync of the directory failed.

A save writes to another file in the same directory, and keeps it locked until it is renamed. A lock
ends with its process, so the next save to the path can tell a leftover from a file that is being
written. A file without a name (``O_TMPFILE``) would leave nothing, but it needs a name before it
can replace another file, and network file systems have no such files. The number of a process in
the name would mean nothing on another host, and an age needs clocks that agree. ``flock`` keeps
threads apart, too, and a forked child keeps the lock at most for longer; a lock by ``fcntl.lockf``
would end with the first descriptor of the file that is closed. Where files cannot be locked,
leftovers stay.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from typing import Any

if sys.platform != "win32":
    import fcntl

__all__ = ["open_to_replace"]

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# As many symbolic links as Linux follows.
_LINKS_MAX = 40
# Directories whose entries are the descriptors of a process, and no files.
_DESCRIPTORS = ("/proc/self/fd", "/dev/fd")


@contextlib.contextmanager
def open_to_replace(path: Path, *, durable: bool) -> Iterator[io.FileIO]:
    """Open a file that becomes the file at a path at the end of the block.

    If the block raises, the file at the path is as before. Symbolic links are followed. The mode of
    the old file is kept, and its owner and group as far as the process may set them.

    Args:
        path: The path. A device, a pipe or a descriptor is opened as by ``open(path, "wb")``.
        durable: Sync the file before it replaces the old one, and the directory after that.

    Raises:
        OSError: As by ``open(path, "wb")``; the directory takes no new file; the disk is full. Only
            if the sync of the directory fails, the file at the path is the new one.
        ValueError: The path has a null byte.
    """
    path = os.fspath(path)
    with _naming(path):
        target = _replaceable(os.fsdecode(path))
    if target is None:
        with _File(path, "wb", path) as file:
            yield file
            with _naming(path):
                file.close()
        return
    old = None
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target)
    with _unfinished(target, path, 0o666 if old is None else 0o600) as file:
        yield file
        with _naming(path):
            if old is not None:
                _take_over(str(file.name), old)
            if durable:
                os.fsync(file.fileno())
            # Some file systems report a full disk only here.
            file.close()
            os.replace(file.name, target)
            if durable:
                _sync_directory(os.path.dirname(target))


def _replaceable(path: str) -> str | None:
    """Follow the symbolic links at the end of a path.

    Directories on the way are left to the system, since those in ``/proc`` lead to places that only
    it can reach.

    Returns:
        The absolute path of the regular file to replace or to make; None if the path must be opened
        as it is, also to raise the error of ``open``.

    Raises:
        OSError: The current directory, in which a relative path begins, was removed.
        ValueError: The path has a null byte.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        pass  # a new file
    except OSError:
        # A loop, say, or a link of another user, which Linux does not follow in /tmp.
        return None
    # A relative path means the same after a change of the current directory.
    target = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
    without_files = {os.stat(each).st_dev for each in _DESCRIPTORS if os.path.exists(each)}
    for _ in range(_LINKS_MAX):
        directory = os.path.dirname(target)
        if not os.path.isdir(directory) or os.stat(directory).st_dev in without_files:
            return None
        if not os.path.islink(target):
            return target if os.path.isfile(target) or not os.path.exists(target) else None
        target = os.path.join(directory, os.readlink(target))
    return None


@contextlib.contextmanager
def _unfinished(target: str, path: str | bytes, mode: int) -> Iterator[io.FileIO]:
    """Create a locked file next to a target, and remove it at the end unless it was renamed."""
    directory, name = os.path.split(target)
    # A digest, because the name of the target may be as long as a name can be. It limits removals
    # to one target, because the ranks of a job save their files in one directory, and some network
    # file systems lock on each host alone.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    prefix = f".aiotorchio-{digest}-"
    # First, since the new file may need their room.
    _remove_leftovers(directory, prefix)
    while True:
        unfinished = os.path.join(directory, f"{prefix}{secrets.token_hex(8)}.part")
        try:
            with _File(unfinished, "xb", path, mode) as file, _locked(file) as is_locked:
                if is_locked:
                    yield file
                    return
        finally:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


@contextlib.contextmanager
def _locked(file: io.FileIO) -> Iterator[bool]:
    """Lock a new file, until the end of the block even if the file is closed before.

    The value is False if another save has taken the file for a leftover before it was locked.
    """
    if sys.platform == "win32":
        yield True
        return
    with io.FileIO(os.dup(file.fileno()), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            # A file system without locks: no save can lock it, and so none removes it.
            pass
        yield os.path.exists(file.name)


def _remove_leftovers(directory: str, prefix: str) -> None:
    """Remove the files with a prefix that no process has locked."""
    if sys.platform == "win32":
        # An open file cannot be renamed there, so a save would have to unlock its file before that.
        return

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if name.startswith(prefix):
                leftover = os.path.join(directory, name)
                # To write, which NFS needs for a lock.
                with contextlib.suppress(OSError), io.FileIO(leftover, "r+", opener=opener) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(leftover)


def _take_over(new: str, old: os.stat_result) -> None:
    """Give a new file the mode of the old one, and as far as possible its owner and group."""
    if sys.platform != "win32":
        for owner in (old.st_uid, -1):
            with contextlib.suppress(OSError):
                os.chown(new, owner, old.st_gid)
    os.chmod(new, stat.S_IMODE(old.st_mode))


def _sync_directory(directory: str) -> None:
    """Sync a directory, if the system can: Windows opens none, and some file systems sync none."""
    try:
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, descriptor := os.open(directory, os.O_RDONLY))
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise


class _File(io.FileIO):
    """An unbuffered file whose errors have the caller's path."""

    def __init__(self, name: str | bytes, mode: str, path: str | bytes, bits: int = 0o666) -> None:
        self._path = path
        with _naming(path):
            super().__init__(name, mode, opener=lambda name, flags: os.open(name, flags, bits))

    def write(self, data: Any, /) -> int:
        with _naming(self._path):
            return super().write(data)


@contextlib.contextmanager
def _naming(path: str | bytes) -> Iterator[None]:
    """Give errors of the system the caller's path, and no other."""
    try:
        yield
    except OSError as error:
        error.filename = path
        del error.filename2
        raise
