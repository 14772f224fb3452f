"""``python -m fuzz HARNESS [options of libFuzzer] [files or folders]``; see README.md."""

from __future__ import annotations

import hashlib
import importlib
import sys
import types
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
HARNESSES = ("parser", "tree", "pickled")
# torch alone takes 300 MB, and the coverage counters grow.
RSS_LIMITS_MB = {"parser": 700, "tree": 2500, "pickled": 2500}


def main(name: str, arguments: list[str]) -> None:
    """Fuzz until there is a find, or as the options say."""
    atheris: Any = importlib.import_module("atheris")
    if name == "parser":
        _leave_torch_out()
    with atheris.instrument_imports(include=["aiotorchio"]):
        harness: Any = importlib.import_module(f"fuzz.{name}")
    if name == "pickled":
        unpickler = importlib.import_module("torch._weights_only_unpickler").Unpickler
        unpickler.load = atheris.instrument_func(unpickler.load)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        made: bytes = harness.mutate(data, max_size, Random(seed), atheris.Mutate)
        return made

    fuzzing = all(argument.startswith("-") for argument in arguments)
    finds = HERE / "finds" / name
    finds.mkdir(parents=True, exist_ok=True)

    def judge(data: bytes) -> None:
        try:
            harness.test_one_input(data)
        except BaseException:
            # libFuzzer writes the input, too, unless the interpreter ends before that.
            if fuzzing:
                (finds / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            raise

    options = [
        f"-artifact_prefix={finds}/",
        f"-rss_limit_mb={RSS_LIMITS_MB[name]}",
        f"-max_len={harness.MAX_LEN}",
        "-timeout=10",
        *arguments,
    ]
    if fuzzing:
        corpus = HERE / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        options += [str(corpus), str(HERE / "seeds" / name), str(finds)]
    atheris.Setup([sys.argv[0], *options], judge, custom_mutator=mutate)
    atheris.Fuzz()


def _leave_torch_out() -> None:
    """Let ``aiotorchio.wire`` be imported by itself: the package's own module needs torch."""
    package = types.ModuleType("aiotorchio")
    package.__path__ = [str(HERE.parent / "aiotorchio")]
    sys.modules["aiotorchio"] = package


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in HARNESSES:
        raise SystemExit(f"usage: python -m fuzz {{{','.join(HARNESSES)}}} [options] [files]")
    main(sys.argv[1], sys.argv[2:])
