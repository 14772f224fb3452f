"""The documents: links lead to files, and the examples of README and the guide run."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import trustme
from anyio.streams.tls import TLSListener

import aiotorchio
from tests.support.speed import patience

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {".venv", ".git", "node_modules"} & set(path.relative_to(ROOT).parts[:-1])
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
README = ROOT / "README.md"
TESTS_COMMAND = 2


def prose(path: Path) -> str:
    """The text of a page without its code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The headings of a page, in the form of GitHub's links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_readme_fits_on_a_few_screens() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    commands = re.findall(r"^```sh\n(.*)\n```$", README.read_text(encoding="utf-8"), re.MULTILINE)
    # .ci/run runs the second command.
    assert len(commands) == TESTS_COMMAND
    assert "pytest" in commands[TESTS_COMMAND - 1]
    assert [line for line in lines if len(line) > 120 and line not in commands] == []


# The reference

REFERENCE = ROOT / "docs" / "guide" / "reference.md"
DESCRIBED: dict[str, Callable[..., Any]] = {
    "save_to_stream": aiotorchio.save_to_stream,
    "load_from_stream": aiotorchio.load_from_stream,
    "snapshot": aiotorchio.snapshot,
    "tls.server_context": aiotorchio.tls.server_context,
    "tls.client_context": aiotorchio.tls.client_context,
}


def rows_of(text: str) -> list[list[str]]:
    """The rows of the tables in a text whose first cell is code."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_reference_has_every_argument(name: str) -> None:
    section = REFERENCE.read_text(encoding="utf-8").split(f"\n## {name}\n")[1].split("\n## ")[0]
    written = {row[0].strip("`"): row[2].strip("`") for row in rows_of(section)}
    defaults = {
        parameter.name: default_of(parameter.default)
        for parameter in inspect.signature(DESCRIBED[name]).parameters.values()
    }
    assert written == defaults


def default_of(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f'"{value}"' if isinstance(value, str) else repr(value)


def test_the_guide_has_every_limit() -> None:
    text = (ROOT / "docs" / "guide" / "errors-and-limits.md").read_text(encoding="utf-8")
    section = text.split("\n## Limits\n")[1].split("\n## ")[0]
    written = [row[0].strip("`") for row in rows_of(section)]
    assert sorted(written) == sorted(inspect.signature(aiotorchio.Limits).parameters)


def test_the_guide_has_every_error() -> None:
    text = (ROOT / "docs" / "guide" / "errors-and-limits.md").read_text(encoding="utf-8")
    section = text.split("\n## Errors\n")[1].split("\n## ")[0]
    names = [name for name in aiotorchio.__all__ if is_error(getattr(aiotorchio, name))]
    assert sorted([*(row[0].strip("`") for row in rows_of(section)), "AiotorchioError"]) == names


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


# The examples: programs run as they are, fragments over a connection to a peer that sends a few
# messages and drops all that it receives.


class Example:
    """A block of Python code in a page."""

    def __init__(self, page: Path, line: int, source: str) -> None:
        self.source = source
        self.name = f"{page.relative_to(ROOT)}:{line}"
        self.is_program = "\nimport " in f"\n{source}"


def examples() -> list[Example]:
    found = []
    for page in [README, *sorted((ROOT / "docs" / "guide").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            found.append(Example(page, line, block[1]))
    return found


EXAMPLES = examples()
PROGRAMS = [example for example in EXAMPLES if example.is_program]
FRAGMENTS = [example for example in EXAMPLES if not example.is_program]
# The objects that the peer sends to fragments with these words; others get the state of a model.
MODEL = torch.nn.Linear(4, 2)
MESSAGES: dict[str, object] = {
    '{"model": model}': {"model": MODEL.state_dict(), "step": 3},
    '{"module": model}': {f"module.{name}": t for name, t in MODEL.state_dict().items()},
    "lora": {"layer.lora_a": torch.ones(3), "layer.weight": torch.zeros(2)},
}


def name_of(example: Example) -> str:
    return example.name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the certificates that the examples name."""
    monkeypatch.chdir(tmp_path)
    authority = trustme.CA()
    authority.cert_pem.write_to_path("ca.pem")
    for name, identity in ("server", "localhost"), ("client", "client.example"):
        certificate = authority.issue_cert(identity)
        certificate.private_key_pem.write_to_path(f"{name}.key")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(f"{name}.pem", append=True)
    return tmp_path


def adapted(source: str) -> str:
    return source.replace("8765", str(free_port())).replace("peer.example", "localhost")


# Runs each program in a new process with nothing but these modules, which take a second to import.
# For each line of JSON on its input it prints the exit status of a program.
RUNNER = """
import json, os, sys
import torch, aiotorchio

for line in sys.stdin:
    source, directory, *streams = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(directory)
for descriptor, path in enumerate(streams, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
"""


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A program that hangs is killed with it.
        start_new_session=True,
    ) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("example", PROGRAMS, ids=name_of)
def test_programs(example: Example, here: Path, runner: subprocess.Popen[str]) -> None:
    assert runner.stdin is not None and runner.stdout is not None
    files = [here / "stdout", here / "stderr"]
    print(
        json.dumps([adapted(example.source), str(here), *map(str, files)]),
        file=runner.stdin,
        flush=True,
    )
    assert select.select([runner.stdout], [], [], patience(60))[0], "it hangs"
    status = runner.stdout.readline().strip()
    output, errors = (file.read_text(encoding="utf-8") for file in files)
    assert status == "0", errors
    assert errors == ""
    assert output
    assert "refused" not in output


@asynccontextmanager
async def connected(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(aiotorchio.AiotorchioError, OSError):
            await serve(reader, writer)
        writer.transport.abort()
        ended.set()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            await ended.wait()


async def drain(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**16):
        pass


def peer_of(message: object) -> Callable[..., Any]:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            await aiotorchio.save_to_stream(message, writer, metadata={"version": "7"})
        await drain(reader)

    return peer


class Response:
    """The used part of httpx's ``Response``."""

    def __init__(self, message: object) -> None:
        self.message = message

    def raise_for_status(self) -> None:
        pass

    def aiter_bytes(self) -> AsyncIterator[bytes | memoryview]:
        return aiotorchio.iter_bytes(self.message)


class Client:
    """The used part of httpx's ``Client``."""

    @asynccontextmanager
    async def stream(self, method: str, url: str) -> AsyncIterator[Response]:
        yield Response(MODEL.state_dict())


async def names_for(
    message: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> dict[str, Any]:
    """The names that fragments use."""

    async def nothing(*_: object) -> None:
        pass

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await aiotorchio.save_to_stream(message, writer)
        writer.close()

    def consume(tensors: Any) -> None:
        assert list(tensors)

    def shards(specs: dict[str, aiotorchio.TensorSpec]) -> Any:
        return ((name, torch.zeros(spec.shape, dtype=spec.dtype)) for name, spec in specs.items())

    return {
        "aiotorchio": aiotorchio,
        "anyio": anyio,
        "asyncio": asyncio,
        "ssl": ssl,
        "torch": torch,
        "TLSListener": TLSListener,
        "StreamingResponse": list,
        "client": Client(),
        "context": ssl.create_default_context(),
        "engine": types.SimpleNamespace(load_weights=consume),
        "gather_shards": shards,
        "limits": aiotorchio.Limits(),
        "log": logging.getLogger(),
        "model": torch.nn.Linear(4, 2),
        "plan": [("a", (2, 3), torch.float32), ("b", (4,), torch.int64)],
        "question": torch.ones(4),
        "reader": reader,
        "serve": send,
        "state": MODEL.state_dict(),
        "train_on": nothing,
        "url": "https://peer.example",
        "use": lambda name, tensor: None,
        "version": 3,
        "weight": torch.zeros(8, 6),
        "start": 1,
        "end": 3,
        "writer": writer,
        "writers": [writer],
    }


async def run_fragment(example: Example) -> None:
    message = next((m for key, m in MESSAGES.items() if key in example.source), MODEL.state_dict())
    source = adapted(example.source)
    is_server = "serve(handle)" in source
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(source, example.name, "exec", flags=flags)
    async with connected(peer_of(message)) as (reader, writer):
        names = await names_for(message, reader, writer)
        if "client_context" in source:
            context = aiotorchio.tls.server_context("server.pem", "server.key", "ca.pem")
            port = int(source.split('"localhost", ')[1].split(",")[0])
            server = await asyncio.start_server(names["serve"], "localhost", port, ssl=context)
        running = types.FunctionType(code, names)()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5 if is_server else patience(30)):
                if running is not None:
                    await running
            assert not is_server
        if is_server:
            await names["listener"].aclose()
        if "client_context" in source:
            names["writer"].transport.abort()
            server.close()
        if "def receive" in source:
            await converse(names["send"], names["receive"])


async def converse(send: Callable[..., Any], receive: Callable[..., Any]) -> None:
    """Run the two sides of a fragment against each other."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await send(writer)

    async with connected(serve) as (reader, _):
        await receive(reader)


@pytest.mark.parametrize("example", FRAGMENTS, ids=name_of)
def test_fragments(example: Example, here: Path) -> None:
    asyncio.run(run_fragment(example))
