"""Saves to paths in processes that are killed, limited, or parts of a pipeline."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotorchio
from tests.support.backends import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

ROOT = Path(__file__).parents[2]
needs_descriptors = pytest.mark.skipif(
    not os.path.exists("/dev/stdout"), reason="the system has no /dev/stdout"
)


SAVE = "import sys, aiotorchio; aiotorchio.save([1, 2], sys.argv[1])"


@needs_descriptors
def test_the_standard_output_in_a_pipeline() -> None:
    command = [sys.executable, "-c", SAVE, "/dev/stdout"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as file:
        with open(write_end, "wb") as pipe:
            pipe.write(done.stdout)
        assert aiotorchio.load(file) == [1, 2]


@needs_descriptors
def test_process_substitution(tmp_path: Path) -> None:
    script = '"$0" -c "$1" >(cat > "$2.tmp"; mv "$2.tmp" "$2"; echo done)'
    command = ["bash", "-c", script, sys.executable, SAVE, str(tmp_path / "state")]
    # The output ends when both processes have ended.
    subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
    assert aiotorchio.load(tmp_path / "state") == [1, 2]


LIMITED = """
import errno, os, resource, sys, torch, aiotorchio
path, old = sys.argv[1], os.listdir(os.path.dirname(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    aiotorchio.save({"w": torch.ones(2**16)}, path)
except OSError as error:
    assert (error.errno, error.filename) == (errno.EFBIG, path), error
else:
    raise AssertionError("it was saved")
assert aiotorchio.load(path) == "old"
assert os.listdir(os.path.dirname(path)) == old == ["state"]
"""


def test_a_file_that_grows_too_large_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    aiotorchio.save("old", path)
    command = [sys.executable, "-c", LIMITED, str(path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE)


# A child that stops inside a save until its input ends.
CHILD = """
import sys, torch, aiotorchio

def stop(*arguments):
    print("stopped", flush=True)
    sys.stdin.read()
    return list, ()

class Stops:
    __reduce__ = stop

options = {"obj": Stops()} if sys.argv[2] == "pickle" else {"obj": torch.ones(2), "progress": stop}
aiotorchio.save(file=sys.argv[1], **options)
"""


@contextlib.contextmanager
def stopped_in_save(path: Path, where: str) -> Iterator[subprocess.Popen[str]]:
    """Run a process that is stopped in a save to a path."""
    command = [sys.executable, "-c", CHILD, str(path), where]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "stopped\n"
            yield process
        finally:
            process.kill()


def test_the_next_save_removes_the_leftover_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with stopped_in_save(path, "progress") as process:
        (unfinished,) = os.listdir(tmp_path)
        aiotorchio.save("running", path)
        assert sorted(os.listdir(tmp_path)) == sorted([unfinished, "state"])
        process.kill()
        process.wait(PATIENCE)
        assert aiotorchio.load(path) == "running"
        assert sorted(os.listdir(tmp_path)) == sorted([unfinished, "state"])
    aiotorchio.save("next", path)
    assert os.listdir(tmp_path) == ["state"]


def test_the_leftover_of_a_save_that_was_killed_in_its_object(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state"
    with stopped_in_save(path, "pickle") as process:
        aiotorchio.save("running", path)
        assert len(os.listdir(tmp_path)) == 2
        process.kill()
        process.wait(PATIENCE)
    aiotorchio.save("next", path)
    assert os.listdir(tmp_path) == ["state"]


def test_two_processes_that_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with stopped_in_save(path, "progress") as process:
        aiotorchio.save("parent", path)
        assert aiotorchio.load(path) == "parent"
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
    assert aiotorchio.load(path).tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["state"]
