"""TLS: which peers accept each other, and the errors of loads and saves on cut connections."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from cryptography.hazmat.primitives import serialization

from aiotorchio import AiotorchioError, ProtocolError, TruncatedError, tls
from tests.chaos.ends import TLS_WORLDS, Contexts, tls_world
from tests.support.backends import PATIENCE, WORLDS, End, Script, World, converse
from tests.support.corpus import assert_same
from tests.support.tensor_layouts import encoded

# A tensor in several TLS records, and many tensors in one record.
STATE = {"large": torch.arange(300_000), "small": [torch.arange(n) for n in range(50)], "step": 1}
MESSAGE = encoded(STATE)
# More than the sockets hold.
HUGE = torch.zeros(32 * 2**20, dtype=torch.uint8)

every_world = pytest.mark.parametrize("world", TLS_WORLDS, ids="-".join)
every_pair = pytest.mark.parametrize(
    ("near", "far"),
    [(near, far) for near in TLS_WORLDS for far in TLS_WORLDS],
    ids=[f"{'-'.join(near)}--{'-'.join(far)}" for near in TLS_WORLDS for far in TLS_WORLDS],
)
BLOCKING = ("blocking", "none")


class Files:
    """The certificate files of an authority."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, **options: Any) -> tuple[Path, Path]:
        """Write a certificate and its key; return their paths."""
        issued = self._authority.issue_cert(name, **options)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of an authority that no context here trusts."""
    return Files(tmp_path_factory.mktemp("tls") / "others")


@pytest.fixture(scope="module")
def one_sided(files: Files) -> Contexts:
    return Contexts(tls.server_context(*files.issue("localhost")), tls.client_context(files.ca))


@pytest.fixture(scope="module")
def mutual(files: Files) -> Contexts:
    return Contexts(
        tls.server_context(*files.issue("localhost"), client_ca=files.ca),
        tls.client_context(files.ca, *files.issue("trainer")),
    )


async def sends(end: End) -> None:
    await end.save(STATE)


async def receives(end: End) -> None:
    assert_same(await end.load(), STATE)


async def does_nothing(end: End) -> None:
    pass


def failures(near: World, near_script: Script[Any], far: World, far_script: Script[Any]) -> str:
    """The errors of both ends as text."""
    with pytest.raises(ExceptionGroup) as caught:
        converse(near, near_script, far, far_script)
    return "; ".join(f"{type(error).__name__}: {error}" for error in caught.value.exceptions)


# ------------------------------------------------------------------------------ accepted peers


@every_pair
@pytest.mark.parametrize("contexts", ["one_sided", "mutual"])
def test_objects_go_both_ways(
    near: tuple[str, str], far: tuple[str, str], contexts: str, request: pytest.FixtureRequest
) -> None:
    given: Contexts = request.getfixturevalue(contexts)

    async def client(end: End) -> None:
        await end.save(STATE)
        await receives(end)

    async def server(end: End) -> None:
        await receives(end)
        await end.save(STATE)

    converse(tls_world(*near, given), client, tls_world(*far, given), server)


# Not on uvloop: it drops encrypted bytes when a peer closes without ``close_notify``.
@pytest.mark.parametrize(
    "world", [each for each in TLS_WORLDS if each[1] != "uvloop"], ids="-".join
)
def test_nothing_is_lost_of_a_client_that_only_sends_and_closes(
    world: tuple[str, str], one_sided: Contexts
) -> None:
    """Unread session tickets would make the system reset the connection."""
    # A part waits at the receiver, the rest at the sender.
    sent, closed = [torch.arange(60_000)], threading.Event()

    async def sends_and_closes(end: End) -> None:
        await end.save(sent)
        end.sink.close()
        closed.set()

    async def receives_late(end: End) -> None:
        assert closed.wait(PATIENCE)
        assert_same(await end.load(), sent)

    near, far = tls_world(*BLOCKING, one_sided), tls_world(*world, one_sided)
    converse(near, sends_and_closes, far, receives_late)


def test_both_sides_speak_tls_1_3_and_know_each_other(mutual: Contexts) -> None:
    async def shake_hands(end: End) -> None:
        assert end.sink.version() == "TLSv1.3"
        assert end.sink.getpeercert()["subjectAltName"]
        assert not end.sink.session_reused
        await end.send(b"x")
        assert await end.receive(1) == b"x"
        # A ticket would have arrived by now.
        assert end.sink.session is None or not end.sink.session.has_ticket

    world = tls_world(*BLOCKING, mutual)
    converse(world, shake_hands, world, shake_hands)


def test_an_intermediate_authority_is_sent_along(tmp_path: Path) -> None:
    root = trustme.CA()
    issued = root.create_child_ca().issue_cert("localhost")
    ca, cert = tmp_path / "ca.pem", tmp_path / "server.pem"
    root.cert_pem.write_to_path(str(ca))
    issued.private_key_and_cert_chain_pem.write_to_path(str(cert))
    world = tls_world(*BLOCKING, Contexts(tls.server_context(cert), tls.client_context(ca)))
    converse(world, sends, world, receives)


# ------------------------------------------------------------------------------ refused peers


@every_world
def test_another_host_is_refused(world: tuple[str, str], one_sided: Contexts) -> None:
    wrong = Contexts(one_sided.server, one_sided.client, host="peer.example")
    text = failures(
        tls_world(*world, wrong), does_nothing, tls_world(*BLOCKING, wrong), does_nothing
    )
    assert "SSLCertVerificationError" in text
    assert "Hostname mismatch" in text


@every_world
def test_an_expired_certificate_is_refused(world: tuple[str, str], files: Files) -> None:
    cert, key = files.issue("localhost", not_after=datetime(2020, 1, 1, tzinfo=UTC))
    expired = Contexts(tls.server_context(cert, key), tls.client_context(files.ca))
    text = failures(
        tls_world(*world, expired), does_nothing, tls_world(*BLOCKING, expired), does_nothing
    )
    assert "certificate has expired" in text


@every_world
@pytest.mark.parametrize("trusted", ["other", "system"])
def test_an_unknown_authority_is_refused(
    world: tuple[str, str], trusted: str, files: Files, others: Files
) -> None:
    client = tls.client_context(others.ca if trusted == "other" else None)
    unknown = Contexts(tls.server_context(*files.issue("localhost")), client)
    text = failures(
        tls_world(*world, unknown), does_nothing, tls_world(*BLOCKING, unknown), does_nothing
    )
    assert "unable to get local issuer certificate" in text


@every_pair
@pytest.mark.parametrize("cert", ["none", "other"])
def test_an_unknown_client_gets_an_error_of_ours(
    near: tuple[str, str], far: tuple[str, str], cert: str, files: Files, others: Files
) -> None:
    """The server refuses the client after the client has begun to send."""
    own = others.issue("trainer") if cert == "other" else ()
    contexts = Contexts(
        tls.server_context(*files.issue("localhost"), client_ca=files.ca),
        tls.client_context(files.ca, *own),
    )
    errors: list[AiotorchioError] = []

    async def loads(end: End) -> None:
        try:
            await end.load()
        except AiotorchioError as error:
            errors.append(error)

    async def is_not_reached(end: End) -> None:
        raise AssertionError("the server took the client in")

    text = failures(tls_world(*near, contexts), loads, tls_world(*far, contexts), is_not_reached)
    assert "SSL" in text
    assert [type(error) for error in errors] == [TruncatedError]
    assert errors[0].offset == 0


@every_world
def test_an_unknown_client_cannot_save(world: tuple[str, str], files: Files) -> None:
    contexts = Contexts(
        tls.server_context(*files.issue("localhost"), client_ca=files.ca),
        tls.client_context(files.ca),
    )

    async def saves(end: End) -> None:
        with pytest.raises(TruncatedError):
            await end.save(HUGE)

    text = failures(
        tls_world(*world, contexts), saves, tls_world(*BLOCKING, contexts), does_nothing
    )
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in text
    assert "TruncatedError" not in text


@every_world
@pytest.mark.parametrize("side", ["client", "server"])
def test_older_tls_is_refused(world: tuple[str, str], side: str, files: Files) -> None:
    cert, key = files.issue("localhost")
    contexts = Contexts(tls.server_context(cert, key), tls.client_context(files.ca))
    if side == "client":
        old = Contexts(contexts.server, ssl.create_default_context(cafile=files.ca))
        old.client.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        old = Contexts(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), contexts.client)
        old.server.load_cert_chain(cert, key)
        old.server.maximum_version = ssl.TLSVersion.TLSv1_2
    ours, peer = tls_world(*world, old), tls_world(*BLOCKING, old)
    near, far = (peer, ours) if side == "client" else (ours, peer)
    text = failures(near, does_nothing, far, does_nothing)
    assert re.search("UNSUPPORTED_PROTOCOL|ALERT_PROTOCOL_VERSION", text)


# ------------------------------------------------------------------------------ no TLS at all

PLAIN = World("socket", "tls", "asyncio", next(w.opener for w in WORLDS if w.kind == "socket"))


@every_world
def test_plain_bytes_are_refused_at_a_port_for_tls(
    world: tuple[str, str], one_sided: Contexts
) -> None:
    async def speaks_plainly(end: End) -> None:
        with pytest.raises(TruncatedError):
            await end.save(HUGE)

    server = tls_world(*world, one_sided)
    text = failures(PLAIN, speaks_plainly, server, does_nothing)
    assert "SSLError" in text
    assert "TruncatedError" not in text


@every_world
def test_tls_is_no_message_at_a_plain_port(world: tuple[str, str], one_sided: Contexts) -> None:
    async def listens_plainly(end: End) -> None:
        with pytest.raises(ProtocolError, match="magic"):
            await end.load()

    text = failures(tls_world(*world, one_sided), does_nothing, PLAIN, listens_plainly)
    assert "ProtocolError" not in text


# ------------------------------------------------------------------------------ cut connections


def _fin(sock: ssl.SSLSocket) -> None:
    """End the TCP stream without ``close_notify``."""
    sock.shutdown(socket.SHUT_WR)


def _farewell(sock: ssl.SSLSocket) -> None:
    """Send ``close_notify``, without waiting for the answer."""
    sock.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        sock.unwrap()


def _reset(sock: ssl.SSLSocket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


CUTS = {"fin": _fin, "farewell": _farewell, "reset": _reset}


@every_world
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("at", [1, 10_000, len(MESSAGE) - 1])
@pytest.mark.parametrize("serves", [False, True], ids=["client", "server"])
def test_a_cut_message_is_truncated(
    world: tuple[str, str], cut: str, at: int, serves: bool, one_sided: Contexts
) -> None:
    async def cuts(end: End) -> None:
        await end.send(MESSAGE[:at])
        CUTS[cut](end.sink)
        end.sink.close()

    async def notices(end: End) -> None:
        with pytest.raises(TruncatedError):
            await end.load()

    ours, peer = tls_world(*world, one_sided), tls_world(*BLOCKING, one_sided)
    if serves:
        converse(peer, cuts, ours, notices)
    else:
        converse(ours, notices, peer, cuts)


# -------------------------------------------------------------------------- independent connections


class InMemory:
    """Both sides of a connection in memory."""

    def __init__(self, contexts: Contexts) -> None:
        self.to_client, self.to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = contexts.client.wrap_bio(
            self.to_client, self.to_server, server_hostname=contexts.host
        )
        self.server = contexts.server.wrap_bio(self.to_server, self.to_client, server_side=True)
        for side in (self.client, self.server, self.client, self.server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()


def test_a_peer_that_breaks_off_does_no_harm_to_another_connection(one_sided: Contexts) -> None:
    """OpenSSL has one error queue for all connections of a thread."""
    broken, healthy = InMemory(one_sided), InMemory(one_sided)
    broken.to_server.write(b"no record of TLS, as long as a header")
    with pytest.raises(ssl.SSLError):
        broken.server.read()
    # Before it can close, the client receives the alert of the server.
    with contextlib.suppress(ssl.SSLError):
        broken.client.unwrap()
    with pytest.raises(ssl.SSLWantReadError):
        healthy.client.read()


# ------------------------------------------------------------------------------ files


def test_a_key_may_be_in_the_file_of_its_certificate(tmp_path: Path, files: Files) -> None:
    cert, key = files.issue("localhost")
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    for contexts in (
        Contexts(tls.server_context(both), tls.client_context(files.ca, both)),
        Contexts(
            tls.server_context(str(both), None, str(files.ca)), tls.client_context(files.ca, both)
        ),
    ):
        world = tls_world(*BLOCKING, contexts)
        converse(world, sends, world, receives)


def test_only_what_is_named_is_trusted(files: Files) -> None:
    cert, key = files.issue("localhost")
    for context in (tls.client_context(files.ca), tls.server_context(cert, key, files.ca)):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert len(context.get_ca_certs()) == 1
    assert tls.client_context(files.ca).check_hostname
    anonymous = tls.server_context(cert, key)
    assert (anonymous.verify_mode, anonymous.get_ca_certs()) == (ssl.CERT_NONE, [])


def test_no_file_is_taken_for_another(tmp_path: Path, files: Files) -> None:
    cert, key = files.issue("localhost")
    _, other_key = files.issue("trainer")
    with pytest.raises(ValueError, match="key was given without cert"):
        tls.client_context(files.ca, key=key)
    for wrong in (cert, other_key, files.ca):
        with pytest.raises(ssl.SSLError):
            tls.server_context(cert, wrong)
    with pytest.raises(ssl.SSLError):
        tls.server_context(cert)
    with pytest.raises(ssl.SSLError):
        tls.server_context(cert, key, client_ca=key)
    with pytest.raises(ssl.SSLError):
        tls.client_context(key)
    calls: list[Callable[[Any], ssl.SSLContext]] = [
        lambda path: tls.client_context(path),
        lambda path: tls.client_context(files.ca, path),
        lambda path: tls.server_context(path, key),
        lambda path: tls.server_context(cert, path),
        lambda path: tls.server_context(cert, key, path),
    ]
    # An empty text, for example from an empty environment variable, is not None.
    for nothing in ("", tmp_path, tmp_path / "nothing.pem"):
        for call in calls:
            with pytest.raises(OSError) as caught:
                call(nothing)
            # OpenSSL's error names no file.
            assert str(nothing) in caught.value.__notes__[0]


def test_nobody_is_asked_for_a_password(tmp_path: Path, files: Files) -> None:
    cert, key = files.issue("localhost")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="encrypted"):
        tls.server_context(cert, encrypted)
    with pytest.raises(ValueError, match="encrypted"):
        tls.client_context(files.ca, cert, encrypted)
