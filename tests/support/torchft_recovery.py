"""Runs torchft's HTTPTransport over aiotorchio; test_compat runs it in two processes.

``serve FILE`` has a state, writes it to a file and offers it, whole and in chunks; it prints the
ports, and stops at the end of its input. ``recover FILE PORT PORT`` fetches the state twice, writes
it to a file, and prints how many loads each fetch took.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from aiotorchio.compat import streaming_load, streaming_save
from tests.support.speed import patience

CHUNKS = (0, 3)
STEP = 7
TIMEOUT = timedelta(seconds=patience(60))

loads: list[None] = []


def transports() -> list[Any]:
    """Transports of torchft, with the two names replaced in its module."""
    module: Any = importlib.import_module("torchft.checkpointing.http_transport")

    def counted(*args: Any, **options: Any) -> object:
        loads.append(None)
        return streaming_load(*args, **options)

    assert callable(module._streaming_load) and callable(module._streaming_save)
    module._streaming_load, module._streaming_save = counted, streaming_save
    return [module.HTTPTransport(timeout=TIMEOUT, num_chunks=chunks) for chunks in CHUNKS]


def shut_down(transport: Any) -> None:
    transport.shutdown()
    # torchft leaves the socket open.
    transport._server.server_close()


def trained() -> dict[str, Any]:
    """The state of a training that is under way, with storages on both sides of 64 KiB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.Linear(128, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    for _ in range(STEP):
        optimizer.zero_grad()
        model(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return {
        # Without its _metadata, which torchft does not send.
        "model": OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "step": STEP,
    }


def serve(file: str) -> None:
    state = trained()
    torch.save(state, file)
    servers = transports()
    for server in servers:
        server.send_checkpoint([1], STEP, state, TIMEOUT)
    # Not its address(): the name of a bare machine may not resolve.
    print(*(server.address().split(":")[-1].split("/")[0] for server in servers), flush=True)
    sys.stdin.read()
    for server in servers:
        shut_down(server)


def recover(file: str, *ports: str) -> None:
    states, counts = [], []
    for client, port in zip(transports(), ports, strict=True):
        loads.clear()
        metadata = f"http://localhost:{port}/checkpoint/"
        states.append(client.recv_checkpoint(0, metadata, STEP, TIMEOUT))
        counts.append(len(loads))
        shut_down(client)
    torch.save(states, file)
    print(*counts)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        recover(*sys.argv[2:])
