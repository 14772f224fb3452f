"""The sender of every case, in a process without torch: it sends as the case says.

    python -m tests.attacks.sender DESCRIPTOR LINK DIRECTORY

The descriptor is one of a socket on which the receiver says, in lines of JSON, which case comes
next, and queries whether the connection was ended; the process lives as long as the receiver does.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attacks.cases import Case, Cases
from tests.support.speed import patience

__all__ = ["HONEST_FILE", "TLS_FILE"]

HONEST_FILE = "honest.message"
TLS_FILE = "server.pem"
# Seconds within which a receiver that gave up must have ended its connection, and a reading
# receiver must have read. Both take far less time: only a failure waits for it.
PATIENCE = patience(2.5)
BYTE_EVERY = 0.05
CRUMB_SIZE = 200
HEAD_SIZE, PREFACE_SIZE = 32, 16
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Control:
    """Lines of JSON, from the receiver and to it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Without a buffer: select does not see buffered bytes.
        self._lines = sock.makefile("rb", buffering=0)

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Any:
        return json.loads(self._lines.readline() or "null")

    def send(self, value: Any) -> None:
        self._sock.sendall(json.dumps(value).encode() + b"\n")


class Peer:
    """One connection of a case."""

    def __init__(self, sock: socket.socket, control: Control, honest: bytes) -> None:
        self.sock = sock
        self.control = control
        self.honest = honest
        self.ended = False

    def send(self, data: bytes) -> None:
        self.sock.settimeout(PATIENCE)
        try:
            self.sock.sendall(data)
        except TimeoutError:
            pass
        except OSError:
            self.ended = True

    def look(self, seconds: float) -> None:
        """Check whether the receiver ends the connection in this time."""
        end = time.monotonic() + seconds
        while not self.ended:
            self.sock.settimeout(max(end - time.monotonic(), 0.001))
            try:
                self.ended = not self.sock.recv(2**20)
            except TimeoutError:
                return
            except OSError:
                self.ended = True

    def told(self, seconds: float | None = None) -> bool:
        """Wait until the receiver sends a line."""
        return bool(select.select([self.control], [], [], seconds)[0])

    def finish(self) -> None:
        """Tell the receiver that no more bytes follow."""
        if isinstance(self.sock, ssl.SSLSocket):
            # ``unwrap`` sends the close of TLS, and would wait for that of the other end.
            self.sock.setblocking(False)
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        else:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def receive_exactly(self, size: int) -> bytes:
        data = bytearray()
        self.sock.settimeout(PATIENCE)
        while len(data) < size:
            data += self.sock.recv(min(size - len(data), 2**20)) or _ended()
        return bytes(data)


def _ended() -> bytes:
    raise EOFError


# How a peer sends


def whole(peer: Peer, data: bytes) -> None:
    """Send the message, and an honest one after it."""
    peer.send(data + peer.honest)


def silent(peer: Peer, data: bytes) -> None:
    """Send the message, and then nothing."""
    peer.send(data)


def finish(peer: Peer, data: bytes) -> None:
    """Send the message, and the end of the stream."""
    peer.send(data)
    peer.finish()


def cut(peer: Peer, data: bytes) -> None:
    """Send the message, and close the connection without a close of TLS."""
    peer.send(data)
    peer.sock.close()
    peer.ended = True


def crumbs(peer: Peer, data: bytes) -> None:
    """Send the message in small pieces, each in a separate record with TLS."""
    for start in range(0, len(data), CRUMB_SIZE):
        peer.send(data[start : start + CRUMB_SIZE])
    peer.send(peer.honest)


def reset(peer: Peer, data: bytes) -> None:
    """Send the message, wait until it can be received, and reset the connection."""
    peer.told()
    peer.control.receive()
    peer.send(data)
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    peer.sock.close()
    peer.ended = True


def drip(peer: Peer, data: bytes, slowly: int = 100) -> None:
    """Send the last 100 bytes of the message one by one, slowly, after all the others at once."""
    peer.send(data[:-slowly])
    for byte in data[-slowly:]:
        if peer.ended or peer.told(BYTE_EVERY):
            return
        peer.send(bytes([byte]))
        peer.look(0)


def steady(peer: Peer, data: bytes) -> None:
    """Send an honest message, its last 40 bytes as slowly, and another message at normal speed."""
    drip(peer, peer.honest, 40)
    peer.send(peer.honest)


def late(peer: Peer, data: bytes) -> None:
    """Send nothing until the receiver sends a line; then an honest message."""
    peer.told()
    peer.control.receive()
    peer.send(peer.honest)


def deaf(peer: Peer, data: bytes) -> None:
    """Read nothing until the receiver queries whether the connection was ended."""


def sip(peer: Peer, data: bytes) -> None:
    """Read a byte now and then."""
    while not peer.ended and not peer.told(BYTE_EVERY):
        try:
            peer.ended = not peer.sock.recv(1)
        except OSError:
            peer.ended = True


def taste(peer: Peer, data: bytes) -> None:
    """Read the first bytes, tell the receiver, and read no more."""
    peer.receive_exactly(100)
    peer.control.send("tasted")


def leave(peer: Peer, data: bytes) -> None:
    """Read the first bytes, and close."""
    peer.receive_exactly(100)
    cut(peer, b"")


def echo(peer: Peer, data: bytes) -> None:
    """Read a whole message, and send it back."""
    message = peer.receive_exactly(PREFACE_SIZE)
    kind = b""
    while kind not in (b"DONE", b"ABRT"):
        head = peer.receive_exactly(HEAD_SIZE)
        kind, _, _, length, _ = struct.unpack("<4sIQQQ", head)
        message += head + peer.receive_exactly(length)
    peer.send(message)


def answer(peer: Peer, data: bytes) -> None:
    """Read a request of HTTP, and send the message, which begins with the head of the answer, and
    the end.
    """
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += peer.receive_exactly(1)
    finish(peer, data)


PLAYS: dict[str, Callable[[Peer, bytes], None]] = {
    play.__name__: play
    for play in (
        *(whole, crumbs, silent, finish, cut, reset, drip, steady, late),
        *(deaf, sip, taste, leave, echo, answer),
    )
}


class Host:
    """Plays the cases that the receiver names, one after the other."""

    def __init__(self, control: Control, link: str, directory: Path) -> None:
        self._control = control
        self._cases = Cases(directory)
        self._honest = (directory / HONEST_FILE).read_bytes()
        self._context: ssl.SSLContext | None = None
        if link == "tls":
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.load_cert_chain(directory / TLS_FILE)
        if link == "unix":
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(b"")  # any name in the abstract namespace
            self._server.listen()
        else:
            self._server = socket.create_server(("127.0.0.1", 0))

    def run(self) -> None:
        address = self._server.getsockname()
        self._control.send(address if isinstance(address, tuple) else address.decode("latin1"))
        while (request := self._control.receive()) is not None:
            self._play(self._cases[request])

    def _play(self, case: Case) -> None:
        peer: Peer | None = None
        with contextlib.ExitStack() as opened:
            for message in case.sent:
                # The receiver may send no more lines after a failure.
                ready, _, _ = select.select([self._server.fileno(), self._control.fileno()], [], [])
                if self._server.fileno() not in ready:
                    break
                peer = self._accept()
                if peer is None:
                    continue
                opened.callback(peer.sock.close)
                with contextlib.suppress(OSError, EOFError):
                    PLAYS[case.play](peer, message)
                if len(case.contents) > 1 and not case.connections:
                    peer.look(PATIENCE)
                    peer.sock.close()
            # The receiver sends a line, or ends the link.
            if self._control.receive() == "ended?" and peer is not None:
                peer.look(PATIENCE)
                self._control.send(peer.ended)

    def _accept(self) -> Peer | None:
        sock, _ = self._server.accept()
        sock.settimeout(PATIENCE)
        if sock.family != socket.AF_UNIX:
            # A message in two pieces would wait for 40 ms in between.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            try:
                sock = self._context.wrap_socket(sock, server_side=True)
            except OSError:
                sock.close()
                return None
        return Peer(sock, self._control, self._honest)


def main() -> None:
    descriptor, link, directory = sys.argv[1:]
    control = Control(socket.socket(fileno=int(descriptor)))
    with contextlib.suppress(OSError):
        Host(control, link, Path(directory)).run()


if __name__ == "__main__":
    main()
