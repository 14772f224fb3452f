"""What a case is, and how cases get from the tests to the processes that run them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MIB", "Case", "files_of", "read_cases", "write_cases"]

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What a peer does, and what has to come of it.

    Attributes:
        name: Of the case.
        wanted: The one class of error; empty if there must be none.
        messages: What the peer sends; if there are several, each over a connection of its own.
        play: How it sends them; see ``sender``.
        scenario: What is done at the other end; see ``receiver``.
        reason: Words of the last error, a regular expression; empty: any.
        limits: What the receiver accepts, if not the default.
        bounds: Bounds of its checks, if not those of ``Bounds``.
        options: Of the load.
        honest: Which object it is about; see ``corpus.HONEST``.
        after: What may become of the stream: ``"ended"`` (it is poisoned, and the peer is
            stopped), ``"clean"`` (the next message on it arrives), or the class of error that the
            next load raises; empty: nobody looks.
        located: Whether the error says where it was found.
        recursion_limit: Of the interpreter meanwhile, if not the default.
        ways: Parts of the names of the ways it is for; empty: all.
        deadline: Seconds until it must be over, but for 2 seconds of grace; more on a machine that
            is slow or busy.
        earliest: Seconds before which it must not be over.
        memory: Bytes that memory may grow by, beside those that are received.
        family: Which cases it belongs to.
    """

    name: str
    wanted: str
    messages: tuple[bytes, ...] = ()
    _: dataclasses.KW_ONLY
    play: str = "whole"
    scenario: str = "load"
    reason: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    honest: str = ""
    after: tuple[str, ...] = ("ended", "clean")
    located: bool = True
    recursion_limit: int = 0
    ways: tuple[str, ...] = ()
    deadline: float = 20
    earliest: float = 0
    memory: int = 64 * MIB
    family: str = ""

    def is_for(self, way: str) -> bool:
        """Whether it runs over a way."""
        return not self.ways or any(part in way for part in self.ways)

    @property
    def nbytes(self) -> int:
        """The most that is sent over one connection."""
        return max(map(len, self.messages), default=0)


def files_of(case: Case) -> Iterator[tuple[str, bytes]]:
    """Names of files, and what is in them."""
    for number, message in enumerate(case.messages):
        yield (case.name if len(case.messages) == 1 else f"{case.name}.{number}"), message


def write_cases(cases: Iterable[Case], directory: Path) -> None:
    """For ``read_cases`` of other processes."""
    entries = []
    for case in cases:
        entry = vars(case) | {"messages": [name for name, _ in files_of(case)]}
        entries.append(entry)
        for name, message in files_of(case):
            (directory / name).write_bytes(message)
    (directory / "cases.json").write_text(json.dumps(entries))


def read_cases(directory: Path) -> list[Case]:
    """The same cases, with their messages."""
    entries = json.loads((directory / "cases.json").read_text())
    for entry in entries:
        entry["messages"] = tuple((directory / name).read_bytes() for name in entry["messages"])
        entry |= {name: tuple(entry[name]) for name in ("after", "ways")}
    return [Case(**entry) for entry in entries]
