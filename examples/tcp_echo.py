"""Sends a state dict to a TCP server, gets it back, and compares every bit.

python tcp_echo.py                              server and client in one process
python tcp_echo.py server --port 9000           or each on its own:
python tcp_echo.py client --port 9000 --mib 1024
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import torch

from aiotorchio import load_from_stream, save_to_stream


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Load an object and save it back; asyncio calls this for every connection."""
    try:
        state = await load_from_stream(reader, allow_pickle=False)
        await save_to_stream(state, writer)
    finally:
        writer.close()


async def ask(host: str, port: int, mib: int) -> bool:
    """Send a state dict of about ``mib`` MiB, and tell whether the same comes back."""
    state: dict[str, torch.Tensor] = {}
    for n in range(max(mib // 2, 1)):
        state[f"layers.{n}.weight"] = torch.randn(256, 1024)
        state[f"layers.{n}.gate"] = torch.randn(512, 1024).bfloat16()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        start = time.perf_counter()
        sent = await save_to_stream(state, writer)
        half = time.perf_counter()
        answer = await load_from_stream(reader, allow_pickle=False)
        end = time.perf_counter()
    finally:
        writer.close()
    for what, seconds in ("sent", half - start), ("received", end - half):
        speed = sent.payload_nbytes / seconds / 1e9
        print(f"{what:8}  {sent.tensors} tensors, {sent.payload_nbytes:,} bytes, {speed:.2f} GB/s")
    same = list(answer) == list(state) and all(same_bits(state[n], answer[n]) for n in state)
    print("the same, bit for bit" if same else "DIFFERENT")
    return same


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare like ``torch.equal``, but tell -0 from 0 and take NaN as equal to the same NaN."""
    same_type = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same_type and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


async def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("role", nargs="?", choices=["both", "server", "client"], default="both")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: the system chooses one")
    parser.add_argument("--mib", type=int, default=256, help="size of the state (%(default)s MiB)")
    args = parser.parse_args()
    if args.role == "client":
        return await ask(args.host, args.port, args.mib)
    async with await asyncio.start_server(echo, args.host, args.port) as server:
        host, port = server.sockets[0].getsockname()[:2]
        if args.role == "both":
            return await ask(host, port, args.mib)
        print(f"listening on {host}:{port}", flush=True)
        await server.serve_forever()
    return True


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main()) else 1)
