"""Settings of tests with real libraries; without a network, models come from configurations."""

from __future__ import annotations

import os
import socket
from typing import NoReturn

import pytest

# The libraries read these variables when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise an error instead of a download."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the zoo uses no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
