"""``aiotorchio.compat`` and torch's own streaming functions, which it replaces, side by side.

Each object, file and error goes through both; results and types of errors are compared.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import http.client
import importlib.util
import inspect
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from aiotorchio import compat, errors
from aiotorchio.errors import AiotorchioError, StreamPoisoned, TruncatedError
from tests.support.backends import PATIENCE
from tests.support.corpus import CASES, LOAD_OPTIONS, assert_same, make

ancestor: Any = pytest.importorskip("torch.distributed._serialization")


class Functions(NamedTuple):
    save: Callable[..., None]
    load: Callable[..., Any]


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function of torch without torch's warnings about its internals."""

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **options)

    return called


TORCH = Functions(quiet(ancestor._streaming_save), quiet(ancestor._streaming_load))
OURS = Functions(compat.streaming_save, compat.streaming_load)

STATE = {"w": torch.arange(6.0).view(2, 3), "step": 3}
# A key that only the pickle codec can carry.
PICKLED = {1.5: torch.ones(2), "w": torch.arange(3)}
# More than sockets and pipes hold.
LARGE = {"w": torch.arange(2_000_000)}


def encoded(functions: Functions, obj: object, **options: Any) -> bytes:
    file = io.BytesIO()
    functions.save(obj, file, **options)
    return file.getvalue()


def round_trip(functions: Functions, obj: object, **options: Any) -> Any:
    return functions.load(io.BytesIO(encoded(functions, obj)), **options)


def raised(call: Callable[[], object]) -> Any:
    try:
        result = call()
    except Exception as error:
        return error
    pytest.fail(f"no error, but {result!r}")


def raised_by_both(call: Callable[[Functions], object]) -> tuple[Any, Any]:
    return raised(lambda: call(TORCH)), raised(lambda: call(OURS))


# ------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("name", ["streaming_save", "streaming_load"])
def test_the_signatures_are_the_same(name: str) -> None:
    def plain(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(each.name, each.kind, each.default) for each in parameters]

    assert plain(getattr(compat, name)) == plain(getattr(ancestor, f"_{name}"))


# ------------------------------------------------------------------------------ round trips

TORCH_FAILS = {
    *("two_dtypes", "two_sizes", "storage_and_view", "typed_storage_and_view"),
    *("scalars", "bytes_values", "empty_containers", "frozensets", "dtype_all_in_one"),
    *(f"dtype_{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
}
# torch loses the offsets of tensors on meta, and the type of untyped storages.
TORCH_CHANGES = {
    *("meta_strided", "meta_shared"),
    *("untyped_storage", "storage_twice", "empty_storage", "storage_odd_size"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_the_ancestor(name: str) -> None:
    obj, options = make(name), dict(LOAD_OPTIONS.get(name, {}))
    with torch.serialization.safe_globals(list(options.pop("safe_globals", []))):
        ours = round_trip(OURS, obj, **options)
        try:
            theirs = round_trip(TORCH, obj, **options)
        except Exception:
            # The errors differ; TORCH_FAILS lists the objects.
            assert name in TORCH_FAILS
            theirs = obj
        else:
            assert name not in TORCH_FAILS
    assert_same(ours, obj if name in TORCH_CHANGES else theirs)


def test_map_location() -> None:
    assert round_trip(OURS, STATE, map_location="meta")["w"].device.type == "meta"
    for place in ("cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, tag: storage):
        assert_same(
            round_trip(OURS, STATE, map_location=place),
            round_trip(TORCH, STATE, map_location=place),
        )


@pytest.mark.parametrize("functions", [TORCH, OURS], ids=["torch", "ours"])
@pytest.mark.parametrize("protocol", [2, 3, 5, -1])
def test_protocols(functions: Functions, protocol: int) -> None:
    data = encoded(functions, PICKLED, pickle_protocol=protocol)
    assert_same(functions.load(io.BytesIO(data), weights_only=False), PICKLED)
    if protocol not in (2, 3):
        with pytest.raises(pickle.UnpicklingError):
            functions.load(io.BytesIO(data))


_Pickler: Any = pickle._Pickler


class Python2(_Pickler):  # type: ignore[misc]
    """A pickler that writes bytes as Python 2 did."""

    dispatch = _Pickler.dispatch.copy()

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.SHORT_BINSTRING + bytes([len(obj)]) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"encoding": "latin1"}, "\xe9"),
        ({"encoding": "bytes"}, b"\xe9"),
        ({"errors": "replace"}, "\ufffd"),
        ({"errors": "ignore", "encoding": "ascii", "fix_imports": True, "buffers": None}, ""),
    ],
)
def test_arguments_of_the_unpickler(
    options: dict[str, Any], found: object, weights_only: bool
) -> None:
    if weights_only and "errors" in options:
        return  # see MISTAKES
    obj = {1.5: b"\xe9", "w": torch.ones(2)}
    for functions in (TORCH, OURS):
        data = encoded(functions, obj, pickle_module=SimpleNamespace(Pickler=Python2))
        loaded = functions.load(io.BytesIO(data), weights_only=weights_only, **options)
        assert loaded[1.5] == found


def test_a_pickle_module_of_the_callers() -> None:
    used = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            used.append((module, name))
            return super().find_class(module, name)

    module = SimpleNamespace(Unpickler=Unpickler)
    assert round_trip(OURS, {1.5: {2}}, weights_only=False, pickle_module=module) == {1.5: {2}}
    assert ("__builtin__", "set") in used or ("builtins", "set") in used


# ------------------------------------------------------------------------------------ files


class Bytewise:
    """A file with only ``write`` and ``read``, which handles a few bytes at a time."""

    def __init__(self, data: bytes = b"") -> None:
        self.file = io.BytesIO(data)

    def write(self, data: Any) -> int:
        return self.file.write(bytes(data)[:100])

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, 7))


class Silent:
    """A file whose ``write`` returns None, and which has only ``readinto`` for reading."""

    def __init__(self, data: bytes = b"") -> None:
        self.file = io.BytesIO(data)

    def write(self, data: Any) -> None:
        self.file.write(data)

    def readinto(self, buffer: memoryview) -> int:
        return self.file.readinto(buffer)


@pytest.mark.parametrize("kind", [Bytewise, Silent])
def test_files_that_the_ancestor_can_not_use(kind: Any) -> None:
    def through(functions: Functions) -> list[Any]:
        sink = kind()
        for obj in (STATE, PICKLED):
            functions.save(obj, sink)
        source = kind(sink.file.getvalue())
        return [functions.load(source), functions.load(source)]

    raised(lambda: through(TORCH))
    assert_same(through(OURS), [STATE, PICKLED])


@pytest.mark.parametrize("functions", [TORCH, OURS], ids=["torch", "ours"])
def test_messages_follow_each_other_and_nothing_is_flushed_or_closed(functions: Functions) -> None:
    class File(io.BytesIO):
        def flush(self) -> None:
            raise AssertionError

    file = File(b"before")
    file.seek(6)
    messages: list[object] = [STATE, PICKLED, [], LARGE]
    for obj in messages:
        functions.save(obj, file)
    file.write(b"behind")
    file.seek(6)
    for obj in messages:
        assert_same(functions.load(file), obj)
    assert file.read() == b"behind"
    assert not file.closed


@contextlib.contextmanager
def connected(*, tcp: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    if tcp:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ends = socket.create_connection(server.getsockname()), server.accept()[0]
    else:
        ends = socket.socketpair()
    with ends[0], ends[1]:
        for end in ends:
            end.settimeout(PATIENCE)
        yield ends


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("mode", ["one way", "both ways"])
def test_makefile_of_sockets(mode: str, buffering: int) -> None:
    def echo(end: socket.socket) -> None:
        with contextlib.ExitStack() as files:
            if mode == "both ways":
                source = sink = files.enter_context(end.makefile("rwb", buffering=buffering))
            else:
                source = files.enter_context(end.makefile("rb", buffering=buffering))
                sink = files.enter_context(end.makefile("wb", buffering=buffering))
            for _ in range(3):
                OURS.save(OURS.load(source), sink)
                sink.flush()

    with connected() as (here, there), ThreadPoolExecutor() as threads:
        echoed = threads.submit(echo, there)
        with here.makefile("wb") as sink, here.makefile("rb") as source:
            for obj in (STATE, PICKLED, LARGE):
                OURS.save(obj, sink)
                sink.flush()
                assert_same(OURS.load(source), obj)
            echoed.result(PATIENCE)


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
def test_pipes(buffering: int) -> None:
    out, into = os.pipe()
    with ThreadPoolExecutor() as threads, open(out, "rb", buffering=buffering) as source:

        def send() -> None:
            with open(into, "wb", buffering=buffering) as sink:
                for obj in (STATE, LARGE):
                    OURS.save(obj, sink)

        sent = threads.submit(send)
        for obj in (STATE, LARGE):
            assert_same(OURS.load(source), obj)
        assert source.read() == b""
        sent.result(PATIENCE)


# ------------------------------------------------------------------------------------- HTTP


class Chunked:
    """Writes each call as a chunk of a response with Transfer-Encoding: chunked."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(b"%x\r\n%b\r\n" % (len(data), bytes(data)))
        return len(data)


@contextlib.contextmanager
def response_to(answer: Callable[[Any], None]) -> Iterator[http.client.HTTPResponse]:
    """The response that a client gets from a server with this answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = PATIENCE

        def do_GET(self) -> None:
            self.close_connection = True
            self.send_response(200)
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor() as threads:
        server.timeout = PATIENCE
        served = threads.submit(server.handle_request)
        port = server.server_address[1]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, PATIENCE)) as client:
            client.request("GET", "/")
            with client.getresponse() as response:
                yield response
        served.result(PATIENCE)


@pytest.mark.parametrize("kind", ["length", "chunked", "until closed"])
def test_responses(kind: str) -> None:
    messages = (STATE, PICKLED, LARGE)

    def answer(handler: Any) -> None:
        sink = handler.wfile
        if kind == "length":
            length = sum(len(encoded(OURS, obj)) for obj in messages)
            handler.send_header("Content-Length", str(length))
        elif kind == "chunked":
            handler.send_header("Transfer-Encoding", "chunked")
            sink = Chunked(handler.wfile)
        handler.end_headers()
        for obj in messages:
            OURS.save(obj, sink)
        if kind == "chunked":
            sink.write(b"")

    with response_to(answer) as response:
        for obj in messages:
            assert_same(OURS.load(response), obj)
        assert response.read() == b""


@pytest.mark.parametrize("kind", ["length", "chunked", "until closed"])
@pytest.mark.parametrize("functions", [TORCH, OURS], ids=["torch", "ours"])
def test_responses_that_end_too_early(kind: str, functions: Functions) -> None:
    def answer(handler: Any) -> None:
        data = encoded(functions, STATE)
        sink = handler.wfile
        if kind == "length":
            handler.send_header("Content-Length", str(len(data)))
        elif kind == "chunked":
            handler.send_header("Transfer-Encoding", "chunked")
            sink = Chunked(handler.wfile)
        handler.end_headers()
        sink.write(data[:-1])

    with response_to(answer) as response:
        error = raised(lambda: functions.load(response))
    if functions is OURS:
        assert isinstance(error, TruncatedError)
        assert isinstance(error, http.client.IncompleteRead) == (kind == "chunked")


# ----------------------------------------------------------------------------------- errors


def load_with(**options: Any) -> Callable[[Functions], object]:
    return functools.partial(round_trip, obj=PICKLED, **options)


def save_with(**options: Any) -> Callable[[Functions], object]:
    return functools.partial(encoded, obj=PICKLED, **options)


def fails(*_: Any) -> Any:
    raise KeyError("the caller's own")


class Failing:
    write = read = readline = fails


class Refusing:
    """An object that cannot be pickled."""

    __reduce__ = fails


def closed_file() -> io.BytesIO:
    file = io.BytesIO()
    file.close()
    return file


class OneWay(io.RawIOBase):
    """A file that is neither readable nor writable."""


def save_to_a_socket(functions: Functions) -> None:
    with connected() as (here, _):
        functions.save(STATE, here)


# Wrong arguments, and errors of files and objects that the caller passes: plain errors.
MISTAKES: dict[str, Callable[[Functions], object]] = {
    "pickle_module": load_with(pickle_module=pickle),
    "errors": load_with(errors="replace"),
    "fix_imports": load_with(fix_imports=True),
    "buffers": load_with(buffers=None),
    "unknown": load_with(unknown=1),
    "unknown, trusted": load_with(unknown=1, weights_only=False),
    "encoding, trusted": load_with(encoding=3, weights_only=False),
    "errors, trusted": load_with(errors=3, weights_only=False),
    "no unpickler": load_with(pickle_module=io, weights_only=False),
    "no pickler": save_with(pickle_module=io),
    "unknown protocol": save_with(pickle_protocol=99),
    "no protocol": save_with(pickle_protocol="2"),
    "map_location": load_with(map_location=5),
    "map_location fails": load_with(map_location=fails),
    "map_location returns no storage": load_with(map_location=lambda storage, tag: 5),
    "save to a number": lambda functions: functions.save(STATE, 3),
    "save to a path": lambda functions: functions.save(STATE, "path"),
    "save to a socket": save_to_a_socket,
    "save as text": lambda functions: functions.save(STATE, io.StringIO()),
    "save to a closed file": lambda functions: functions.save(STATE, closed_file()),
    "save where none can": lambda functions: functions.save(STATE, OneWay()),
    "save fails": lambda functions: functions.save(STATE, Failing()),
    "load from a number": lambda functions: functions.load(3),
    "load from a path": lambda functions: functions.load("path"),
    "load from a closed file": lambda functions: functions.load(closed_file()),
    "load where none can": lambda functions: functions.load(OneWay()),
    "load fails": lambda functions: functions.load(Failing()),
    "function": functools.partial(encoded, obj=lambda: None),
    "lock": functools.partial(encoded, obj=[threading.Lock()]),
    "generator": functools.partial(encoded, obj=(n for n in range(3))),
    "class": functools.partial(encoded, obj=type("Nowhere", (), {})),
    "reduce fails": functools.partial(encoded, obj=Refusing()),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_have_the_same_types(what: str) -> None:
    theirs, ours = raised_by_both(MISTAKES[what])
    assert isinstance(ours, type(theirs))
    assert not isinstance(ours, AiotorchioError)


def test_the_text_about_a_pickle_module() -> None:
    theirs, ours = raised_by_both(MISTAKES["pickle_module"])
    assert str(ours) == str(theirs)
    assert "Can not safely load weights when explicit pickle_module is specified" in str(ours)


def test_text_is_a_type_error() -> None:
    theirs, ours = raised_by_both(lambda functions: functions.load(io.StringIO("text")))
    assert (type(theirs), type(ours)) == (AssertionError, TypeError)


@pytest.mark.parametrize("obj", [STATE, PICKLED], ids=["tree", "pickle"])
@pytest.mark.parametrize(
    "options",
    [{"pickle_module": pickle}, {"errors": "replace"}, {"unknown": 1, "weights_only": False}],
)
def test_mistakes_cost_no_message(obj: object, options: dict[str, Any]) -> None:
    file = io.BytesIO(encoded(OURS, obj))
    for _ in range(2):
        raised(lambda: OURS.load(file, **options))
    assert_same(OURS.load(file), obj)


class Loaded:
    """A class outside every allowlist."""


class Fails:
    """An object that fails when it is unpickled."""

    def __reduce__(self) -> Any:
        return fails, ()


class FailsInItsOwnWay(Exception):
    """An error that cannot be made from its args."""

    def __init__(self, *, text: str) -> None:
        super().__init__(text)


def fails_in_its_own_way() -> None:
    raise FailsInItsOwnWay(text="own")


class FailsOddly:
    def __reduce__(self) -> Any:
        return fails_in_its_own_way, ()


class Gone:
    """A class of a module that the receiver does not have."""


def of_a_module_that_is_gone(functions: Functions) -> object:
    Gone.__module__ = "gone_with_the_sender"
    module: Any = type(sys)("gone_with_the_sender")
    module.Gone = Gone
    sys.modules["gone_with_the_sender"] = module
    try:
        data = encoded(functions, Gone())
    finally:
        del sys.modules["gone_with_the_sender"]
    return functions.load(io.BytesIO(data), weights_only=False)


def write_to_a_closed_peer(functions: Functions, *, reset: bool, buffering: int) -> None:
    with connected(tcp=True) as (here, there):
        if reset:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
        if not reset:
            # A closed peer also answers the first byte with a reset, and the second byte fails.
            here.shutdown(socket.SHUT_WR)
        sink = here.makefile("wb", buffering=buffering)
        try:
            functions.save(LARGE, sink)
        finally:
            with contextlib.suppress(OSError):
                sink.close()


def write_to_a_peer_that_waits(functions: Functions, buffering: int) -> None:
    with connected() as (here, _):
        here.settimeout(0.05)
        sink = here.makefile("wb", buffering=buffering)
        try:
            functions.save(LARGE, sink)
        finally:
            with contextlib.suppress(OSError):
                sink.close()


def read_from_a_peer_that(does: str, functions: Functions) -> None:
    with connected(tcp=True) as (here, there), here.makefile("rb") as source:
        if does == "resets":
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            there.close()
        elif does == "closes":
            there.close()
        else:
            here.settimeout(0.05)
        functions.load(source)


# Failures of the message, its object, or the connection: the error has both types.
FAILURES: dict[str, Callable[[Functions], object]] = {
    "global": functools.partial(round_trip, obj=Loaded()),
    "function": functools.partial(round_trip, obj=os.getcwd),
    "unpickling fails": functools.partial(round_trip, obj=Fails(), weights_only=False),
    "module": of_a_module_that_is_gone,
    "fix_imports": functools.partial(
        round_trip, obj={1.5: {2}}, weights_only=False, fix_imports=False
    ),
    "cuda": functools.partial(round_trip, obj=STATE, map_location="cuda:99"),
    "xpu": functools.partial(round_trip, obj=STATE, map_location=torch.device("xpu:99")),
    "nowhere": functools.partial(round_trip, obj=PICKLED, map_location={"cpu": "nowhere"}),
    "nothing": lambda functions: functions.load(io.BytesIO()),
    "write, closed": functools.partial(write_to_a_closed_peer, reset=False, buffering=-1),
    "write, closed, unbuffered": functools.partial(
        write_to_a_closed_peer, reset=False, buffering=0
    ),
    "write, reset": functools.partial(write_to_a_closed_peer, reset=True, buffering=-1),
    "write, timeout": functools.partial(write_to_a_peer_that_waits, buffering=-1),
    "write, timeout, unbuffered": functools.partial(write_to_a_peer_that_waits, buffering=0),
    "read, reset": functools.partial(read_from_a_peer_that, "resets"),
    "read, closed": functools.partial(read_from_a_peer_that, "closes"),
    "read, timeout": functools.partial(read_from_a_peer_that, "waits"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_failures_have_both_types(what: str) -> None:
    theirs, ours = raised_by_both(FAILURES[what])
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, AiotorchioError)
    if ours.__cause__ is not None:
        assert isinstance(ours, type(ours.__cause__))
        assert str(ours.__cause__) in str(ours) or isinstance(ours, pickle.UnpicklingError)
    if isinstance(theirs, OSError):
        assert isinstance(ours, OSError)
        if not isinstance(theirs, TimeoutError):
            assert (ours.errno, ours.strerror) == (theirs.errno, theirs.strerror)
    if what in ("cuda", "xpu", "nowhere"):
        assert str(theirs).split(",")[0] in str(ours)
        assert ours.entry is not None
    # Errors can be pickled. (Below protocol 3, pickle replaces a BrokenPipeError by an OSError.)
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        same = pickle.loads(pickle.dumps(ours, protocol))
        assert isinstance(same, AiotorchioError) and isinstance(same, type(theirs))
        assert (str(same), vars(same)) == (str(ours), vars(ours))


def trusted(obj: object) -> object:
    return round_trip(OURS, obj, weights_only=False)


def test_what_cannot_be_both_is_ours() -> None:
    error = raised(lambda: trusted(FailsOddly()))
    assert type(error) is errors.InvalidObjectError
    assert isinstance(error.__cause__, FailsInItsOwnWay)


def test_where_an_error_is() -> None:
    error = raised(lambda: trusted(Fails()))
    assert isinstance(error, errors.InvalidObjectError) and isinstance(error, KeyError)
    assert error.entry == "skeleton"
    assert error.offset
    assert "the caller's own" in str(error)
    assert type(error.__cause__) is KeyError
    assert error.__suppress_context__


def test_errors_do_not_wait_for_the_garbage_collection() -> None:
    """Errors hold frames, and frames hold tensors, so errors must be free of reference cycles."""
    gc.disable()
    try:
        for obj in (Fails(), FailsOddly()):
            error = weakref.ref(raised(functools.partial(trusted, obj)))
            assert error() is None
    finally:
        gc.enable()


def test_bytes_that_were_lost_or_changed() -> None:
    """torch detects lost bytes with errors of various types, and only half of all changed bytes."""
    data = encoded(OURS, STATE)
    for size in range(len(data)):
        with pytest.raises(EOFError) as caught:
            OURS.load(io.BytesIO(data[:size]))
        assert type(caught.value) is TruncatedError
    theirs = encoded(TORCH, STATE)
    halves = (io.BytesIO(theirs[:size]) for size in range(len(theirs)))
    kinds = {type(raised(functools.partial(TORCH.load, half))) for half in halves}
    assert EOFError in kinds and len(kinds) > 3
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 0x10
        with pytest.raises(AiotorchioError):
            OURS.load(io.BytesIO(changed))
    last = bytearray(theirs)
    last[-1] ^= 0x10
    TORCH.load(io.BytesIO(last))


def test_what_exceeds_the_limits() -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    assert_same(round_trip(TORCH, deep), deep)
    with pytest.raises(errors.LimitExceeded):
        round_trip(OURS, deep)


def test_a_peer_that_was_not_changed() -> None:
    with pytest.raises(errors.ProtocolError, match="not an aiotorchio message"):
        OURS.load(io.BytesIO(encoded(TORCH, STATE)))
    raised(lambda: TORCH.load(io.BytesIO(encoded(OURS, STATE))))


def test_a_connection_after_an_error_inside_a_message() -> None:
    with connected() as (here, there), here.makefile("rb") as source:
        data = encoded(OURS, STATE)
        there.sendall(data[: len(data) // 2] + bytes(len(data)))
        with pytest.raises(AiotorchioError):
            OURS.load(source)
        with pytest.raises(StreamPoisoned):
            OURS.load(source)


# ---------------------------------------------------------------------------------- torchft


def can_listen_as_torchft_does() -> bool:
    try:
        socket.create_server(("", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def recovery(*args: object) -> Iterator[subprocess.Popen[str]]:
    """Run tests/support/torchft_recovery.py as a process, and kill it at the end."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"no_proxy": "*", "PYTHONPATH": os.fspath(root)}
    environment.pop("TORCHFT_USE_OTEL", None)
    # torch 2.13 warns about torchft's pytree while it is unpickled.
    ignored = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"
    script = ["tests/support/torchft_recovery.py", *map(str, args)]
    command = [sys.executable, "-W", "error", "-W", ignored, *script]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=environment,
    ) as process:
        # Both processes end on their own; the timer is for a process that hangs.
        deadline = threading.Timer(3 * PATIENCE, process.kill)
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
            process.kill()


@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")
@pytest.mark.skipif(not can_listen_as_torchft_does(), reason="torchft listens on IPv6")
def test_torchft_recovers_a_worker(tmp_path: Path) -> None:
    sent, received = tmp_path / "sent", tmp_path / "received"
    with recovery("serve", sent) as server:
        assert server.stdout is not None
        ports = server.stdout.readline().split()
        if not ports:
            pytest.fail(server.communicate()[1])
        with recovery("recover", received, *ports) as client:
            loads, complaints = client.communicate()
            assert client.returncode == 0, complaints
        _, complaints = server.communicate()
        assert server.returncode == 0, complaints
    # One load for the whole state; for the chunked one, the structure and three chunks.
    assert loads.split() == ["1", "4"]
    state = torch.load(sent, weights_only=False)
    for recovered in torch.load(received, weights_only=False):
        assert_same(recovered, state)
