"""Cases of attacks, and the files that carry them from the tests to the processes that run them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MIB", "Case", "Cases", "files_of", "row_name", "write_cases"]

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """The actions of a peer, and the result that they must have.

    Attributes:
        name: The name of the case.
        wanted: The one class of error; empty if there must be none.
        messages: The messages that the peer sends; if there are several, each over a new
            connection.
        maker: Makes the one message if that takes long, so that only its users wait for it.
        connections: How many connections the scenario opens; 0: one for each message, one after the
            other. On each comes the next message, or the last one again.
        play: How the peer sends the messages; see ``sender``.
        scenario: The actions of the receiver; see ``scenarios``.
        loader: The call that takes the message; see ``loaders``.
        dress: The form in which the library gets the stream; see ``loaders``.
        reason: Words of the last error, a regular expression; empty: any.
        limits: The limits of the receiver, if not the default.
        bounds: The bounds of its checks, if not those of ``Bounds``.
        options: The options of the loader.
        honest: The honest object of the case; see ``corpus.HONEST``.
        after: The state of the stream after the case: ``"ended"`` (it is poisoned, and the peer is
            stopped), ``"clean"`` (the next message on it arrives), or the class of error that the
            next load raises; empty: not checked.
        located: Whether the error says where it was found.
        recursion_limit: The interpreter's recursion limit during the case, if not the default.
        ways: Parts of the names of the backends that run the case; empty: all.
        full: Whether it runs in the full tier only.
        deadline: Seconds until it must be over, with 2 seconds of grace; more on a machine that is
            slow or busy.
        earliest: Seconds before which it must not be over.
        memory: Bytes that memory may grow by, in addition to the received bytes, of all connections
            together.
        family: The group that the case belongs to.
    """

    name: str
    wanted: str
    messages: tuple[bytes, ...] = ()
    _: dataclasses.KW_ONLY
    maker: Callable[[], bytes] | None = None
    connections: int = 0
    play: str = "whole"
    scenario: str = "load"
    loader: str = "load"
    dress: str = ""
    reason: str = ""
    limits: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    honest: str = ""
    after: tuple[str, ...] = ("ended", "clean")
    located: bool = True
    recursion_limit: int = 0
    ways: tuple[str, ...] = ()
    full: bool = False
    deadline: float = 20
    earliest: float = 0
    memory: int = 64 * MIB
    family: str = ""

    def is_for(self, way: str) -> bool:
        """Whether a backend runs the case."""
        return not self.ways or any(part in way for part in self.ways)

    @property
    def contents(self) -> tuple[bytes, ...]:
        """The messages, made if necessary."""
        return self.messages if self.maker is None else (self.maker(),)

    @property
    def nbytes(self) -> int:
        """The most bytes that are sent over one connection."""
        return max(map(len, self.contents), default=0)

    @property
    def sent(self) -> tuple[bytes, ...]:
        """The messages that are sent over each connection in turn."""
        messages = self.contents or (b"",)
        return messages + messages[-1:] * (self.connections - len(messages))


def row_name(row: int) -> str:
    """The name of a row's tensor in messages of many rows; half of the names begin with an x."""
    return f"{'xy'[row % 2]}{row:05}"


def files_of(case: Case) -> Iterator[tuple[str, bytes]]:
    """The contents of files by name."""
    contents = case.contents
    for number, message in enumerate(contents):
        yield (case.name if len(contents) == 1 else f"{case.name}.{number}"), message


def write_cases(cases: Iterable[Case], directory: Path) -> None:
    """Write the files that ``Cases`` reads in other processes."""
    entries = []
    # Many cases send the same message.
    files: dict[bytes, str] = {}
    for case in cases:
        names = []
        for name, message in files_of(case):
            if message not in files:
                files[message] = name
                (directory / name).write_bytes(message)
            names.append(files[message])
        entries.append(vars(case) | {"messages": names, "maker": None})
    (directory / "cases.json").write_text(json.dumps(entries))


class Cases(Mapping[str, Case]):
    """The same cases by name; each lookup reads the messages from their files.

    Args:
        directory: The folder of the files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        entries = json.loads((directory / "cases.json").read_text())
        self._entries = {entry["name"]: entry for entry in entries}

    @property
    def objects(self) -> set[str]:
        """Names of the objects that the receiver makes."""
        entries = self._entries.values()
        return {entry["honest"] or entry["options"].get("object", "") for entry in entries}

    def __getitem__(self, name: str) -> Case:
        entry = dict(self._entries[name])
        files = [self._directory / file for file in entry["messages"]]
        entry["messages"] = tuple(file.read_bytes() for file in files)
        entry |= {field: tuple(entry[field]) for field in ("after", "ways")}
        return Case(**entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
