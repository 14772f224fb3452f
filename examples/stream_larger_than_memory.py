"""A state of 8 GiB passes between two processes that may use 512 MiB of memory each.

The sender makes one shard after the other, each when the network has taken the one before. The
receiver checks one shard after the other, and the sender waits for it. Neither ever has more than
one shard in memory. The operating system enforces the limit; Linux only.

Number n of all the numbers in the state is n, so that a wrong, damaged or misplaced shard would be
noticed. The exit status is 0 only if all of it was right.

python stream_larger_than_memory.py                              about 20 seconds on two cores
python stream_larger_than_memory.py --gib 64 --limit-mib 384
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator

import torch
from torch import Tensor

from aiotorchio import Limits, StreamReader, StreamWriter, TensorSpec

HOST = "127.0.0.1"
DEADLINE_SECONDS = 60
MIB = 2**20
SHARD_LENGTH = 32 * MIB // 8
SHARD = TensorSpec((SHARD_LENGTH,), torch.int64)


def make_shard(number: int) -> Tensor:
    """Make a part of the state; a real one is read from a disk or gathered from other machines."""
    return torch.arange(number * SHARD_LENGTH, (number + 1) * SHARD_LENGTH)


# --- The sender ----------------------------------------------------------------------------------


async def shards(count: int) -> AsyncIterator[tuple[str, Tensor]]:
    """Yield every shard with its name; each is made when it is its turn, and not kept."""
    for number in range(count):
        yield f"shard.{number}", await asyncio.to_thread(make_shard, number)


async def send(port: int, count: int) -> None:
    _, writer = await asyncio.open_connection(HOST, port)
    try:
        # Shapes and dtypes are sent before all tensors, so they have to be known.
        specs = {f"shard.{number}": SHARD for number in range(count)}
        await StreamWriter(writer).save(shards(count), specs=specs)
    finally:
        writer.close()


# --- The receiver --------------------------------------------------------------------------------


def is_right(shard: Tensor, number: int) -> bool:
    """Tell whether a shard is the expected one; takes the memory of another shard for a moment."""
    return torch.equal(shard, make_shard(number))


async def receive(connection: socket.socket, total_nbytes: int) -> bool:
    """Check every shard; tell whether all were right."""
    reader, writer = await asyncio.open_connection(sock=connection)
    # By default a message may be as large as the memory of the machine, since a load keeps it.
    limits = Limits(total_nbytes=total_nbytes)
    right = 0
    try:
        async with StreamReader(reader).open(limits=limits) as message:
            async for name, shard in message:
                number = int(name.removeprefix("shard."))
                right += await asyncio.to_thread(is_right, shard, number)
                # Otherwise the shard would live on until the next one has arrived.
                del shard
            print(f"received  {right} of {len(message.tensors)} shards are right")
            return right == len(message.tensors) > 0
    finally:
        writer.close()


# --- Both ----------------------------------------------------------------------------------------


def limit_memory(who: str, nbytes: int) -> None:
    """Have the system refuse this process more memory than that, and check that it does.

    The limit holds for all memory that a process can write to and does not share: torch's own
    memory after the import, the stacks of threads, and all tensors.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
    try:
        torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError:
        print(f"{who:10}the system refuses a tensor of {nbytes // MIB} MiB", flush=True)
    else:
        raise SystemExit(f"{who}: this system does not limit memory")


def show_peak(who: str) -> None:
    """Print the peak memory of this process, the code of torch and Python included."""
    # Not ru_maxrss, which a process inherits from its parent.
    with open("/proc/self/status", encoding="ascii") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(f"{who:10}peak of resident memory {peak / 1024:.0f} MiB", flush=True)


def send_in_process(port: int, count: int, limit: int) -> None:
    torch.set_num_threads(1)
    limit_memory("sender", limit)
    asyncio.run(send(port, count))
    show_peak("sender")


def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=8, help="size of the state (%(default)s GiB)")
    parser.add_argument("--limit-mib", type=int, default=512, help="memory of each process")
    args = parser.parse_args()
    nbytes, limit = int(args.gib * 2**30), args.limit_mib * MIB
    count = nbytes // SHARD.nbytes
    torch.set_num_threads(1)
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(DEADLINE_SECONDS)
        arguments = (listener.getsockname()[1], count, limit)
        spawn = multiprocessing.get_context("spawn")
        sender = spawn.Process(target=send_in_process, args=arguments, daemon=True)
        sender.start()
        limit_memory("receiver", limit)
        connection, _ = listener.accept()
    start = time.perf_counter()
    right = asyncio.run(receive(connection, nbytes))
    seconds = time.perf_counter() - start
    sender.join()
    show_peak("receiver")
    print(f"{count * SHARD.nbytes / 2**30:.2f} GiB in {seconds:.1f} s: ", end="")
    print(f"{count * SHARD.nbytes / 2**30 / seconds:.2f} GiB/s")
    return right and sender.exitcode == 0


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
