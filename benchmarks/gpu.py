"""Sections for states on a GPU, and for their two bounds: the device copies and the loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Link, Method, State
from methods import Transfer, inside, streams


@contextlib.contextmanager
def _synchronized() -> Iterator[None]:
    """Wait for the GPU at the end of the timed call."""
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


def synchronized(make: Callable[[], Method]) -> Method:
    return inside(make(), _synchronized)


def ours() -> Method:
    return synchronized(streams)


def pinned_copies() -> Method:
    """Copy to pinned memory and, in the other process at the same time, from there to the GPU.

    The second copy makes fresh tensors. No bytes are sent between the processes.
    """

    def pinned(nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    @contextlib.contextmanager
    def send(state: State, link: Link) -> Iterator[Transfer]:
        tensors = [tensor.view(torch.uint8) for tensor in state.values()]
        link.tell([tensor.nbytes for tensor in tensors])
        memory = pinned(tensors[0].nbytes)

        def transfer() -> None:
            for tensor in tensors:
                memory.copy_(tensor, non_blocking=True)

        yield transfer

    @contextlib.contextmanager
    def receive(link: Link) -> Iterator[Transfer]:
        sizes: list[int] = link.hear()
        memory = pinned(sizes[0])
        received: list[Any] = []

        def transfer() -> None:
            received.extend(memory.to("cuda", non_blocking=True) for _ in sizes)

        yield transfer

    return inside(Method(send, receive), _synchronized)
