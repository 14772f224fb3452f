"""A trainer pushes new weights to inference workers, which go on answering while they arrive.

Each worker keeps two sets of memory for its weights. Requests are answered from one of them while
the next version is received into the other; between two requests the two sets are exchanged. That
exchanges pointers only, so it takes equally long for any size of the model.

In version n every weight is n, and every answer depends on every weight, so an answer from weights
of two versions would be noticed. The exit status is 0 only if there was none.

python weight_sync.py                          about 15 seconds on two cores
python weight_sync.py --workers 1 --mib 1024   the pause stays as it is
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aiotorchio import (
    DoubleBuffer,
    StreamReader,
    TruncatedError,
    load_from_stream,
    save_to_stream,
)

HOST = "127.0.0.1"
DEADLINE_SECONDS = 300
LAYERS = 16
WIDTH = 512
SECONDS_BETWEEN_REQUESTS = 0.01

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Model(nn.Module):
    """Parallel layers: each number of an answer depends on one row of one layer."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        rows = mib * 2**20 // (4 * WIDTH * LAYERS)
        self.layers = nn.ParameterList(torch.zeros(rows, WIDTH) for _ in range(LAYERS))

    def forward(self, question: Tensor) -> Tensor:
        """Return the mean of each row of weights, if the request is all ones."""
        return torch.stack([layer @ question for layer in self.layers]) / WIDTH


# --- A worker: answers requests, and receives new weights at the same time
# -------------------------


@dataclass
class Report:
    """The counts and times of a worker; times in seconds."""

    requests: int = 0
    versions: int = 0
    refused: int = 0
    pause: float = 0.0
    longest_receiving: float = 0.0
    longest_otherwise: float = 0.0
    half_applied: int = 0


class Worker:
    """A worker that answers one request after the other, with the newest weights that it has."""

    def __init__(self, mib: int) -> None:
        self.model = Model(mib)
        self.buffers = DoubleBuffer(self.model)
        # Held for each request and for each exchange: a request uses one version from start to end.
        self.lock = asyncio.Lock()
        self.version = 0
        self.receiving = False
        self.report = Report()

    async def answer(self) -> None:
        """Answer requests until cancelled."""
        await asyncio.to_thread(self.ask)  # the first one takes longer, and is not counted
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_REQUESTS)
            start, received_before = time.perf_counter(), self.receiving
            async with self.lock:
                # In a thread, so that the event loop has time for the weights.
                answer = await asyncio.to_thread(self.ask)
            seconds = time.perf_counter() - start
            self.report.requests += 1
            self.report.half_applied += bool(answer.min() != answer.max())
            if received_before or self.receiving:
                self.report.longest_receiving = max(self.report.longest_receiving, seconds)
            else:
                self.report.longest_otherwise = max(self.report.longest_otherwise, seconds)

    @torch.inference_mode()
    def ask(self) -> Tensor:
        """One request."""
        answer: Tensor = self.model(torch.ones(WIDTH))
        return answer

    async def take_next(self, stream: StreamReader) -> bool:
        """Load or refuse the next version; return False if there is none."""
        try:
            async with stream.open() as message:
                # The header has arrived, the weights have not.
                version = int(message.metadata["version"])
                if version <= self.version:
                    self.report.refused += 1
                    return True  # leaving the block skips them
                self.receiving = True
                await message.load(into=self.buffers, lock=self.between_requests())
        except TruncatedError as error:
            if error.offset == 0:  # not inside a message: the trainer has closed the stream
                return False
            raise
        self.receiving = False
        self.version = version
        self.report.versions += 1
        return True

    @asynccontextmanager
    async def between_requests(self) -> AsyncIterator[None]:
        """Hold the lock, and note for how long: requests wait no longer than that."""
        async with self.lock:
            start = time.perf_counter()
            yield
            self.report.pause = max(self.report.pause, time.perf_counter() - start)


async def work(port: int, mib: int) -> None:
    worker = Worker(mib)
    reader, writer = await asyncio.open_connection(HOST, port)
    stream = StreamReader(reader)
    try:
        await worker.take_next(stream)  # no weights to answer with before that
        async with asyncio.TaskGroup() as tasks:
            requests = tasks.create_task(worker.answer())
            while await worker.take_next(stream):
                pass
            requests.cancel()
        await save_to_stream(asdict(worker.report), writer)
    finally:
        writer.close()


def work_in_process(port: int, mib: int) -> None:
    torch.set_num_threads(1)
    asyncio.run(work(port, mib))


# --- The trainer: makes versions, and pushes them to all workers ----------------------------------


async def train(args: argparse.Namespace) -> bool:
    joining: asyncio.Queue[Connection] = asyncio.Queue()
    server = await asyncio.start_server(lambda *pair: joining.put_nowait(pair), HOST, 0)
    port = server.sockets[0].getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    for _ in range(args.workers):
        # Daemons end with this process in any case.
        spawn.Process(target=work_in_process, args=(port, args.mib), daemon=True).start()
    async with asyncio.timeout(DEADLINE_SECONDS), server:
        workers = [await joining.get() for _ in range(args.workers)]
        model = Model(args.mib)
        for version in range(1, args.versions + 1):
            await asyncio.sleep(args.interval)  # a real trainer would train here
            for weights in model.parameters():
                nn.init.constant_(weights, version)
            await push(model, version, workers)
            if version == 2:
                print("version 1 once more, on purpose: the workers have to refuse it", flush=True)
                await push(model, 1, workers)
        reports = [Report(**await finish(*worker)) for worker in workers]
    return show(reports, args.versions)


async def push(model: Model, version: int, workers: list[Connection]) -> None:
    """Send the weights to all workers at once; they must not change before this returns."""
    start = time.perf_counter()
    metadata = {"version": str(version)}
    sending = [
        save_to_stream(model.state_dict(), writer, metadata=metadata) for _, writer in workers
    ]
    # Not in a TaskGroup: one failure would cancel the other saves, and so break their connections.
    results = await asyncio.gather(*sending, return_exceptions=True)
    for worker, result in zip(list(workers), results, strict=True):
        if isinstance(result, BaseException):
            print(f"a worker is gone: {result}", flush=True)
            worker[1].transport.abort()
            workers.remove(worker)
    print(f"pushed version {version} in {time.perf_counter() - start:.2f} s", flush=True)


async def finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any]:
    """Tell a worker that there are no more versions, and return its report."""
    writer.write_eof()
    report: dict[str, Any] = await load_from_stream(reader, allow_pickle=False)
    writer.close()
    return report


def show(reports: list[Report], versions: int) -> bool:
    """Print the reports of the workers; tell whether they are as expected."""
    print("\n        requests  versions    stale  longest pause    longest request  half-applied")
    print("worker  answered     taken  refused      by a swap  receiving     else       answers")
    good = True
    for number, report in enumerate(reports, 1):
        print(
            f"{number:6}{report.requests:10}{report.versions:10}{report.refused:9}"
            f"{report.pause * 1e3:12.2f} ms{report.longest_receiving * 1e3:8.0f} ms"
            f"{report.longest_otherwise * 1e3:6.0f} ms{report.half_applied:14}"
        )
        good = good and report.half_applied == 0 and report.versions == versions
        good = good and report.refused == (versions > 1)
    print("every answer came from one version" if good else "FAILED")
    return good


def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--mib", type=int, default=64, help="size of the model (%(default)s MiB)")
    parser.add_argument("--versions", type=int, default=5, help="how many to push (%(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between them")
    args = parser.parse_args()
    return asyncio.run(train(args))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
