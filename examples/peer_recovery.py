"""A new process takes over the live state of one that trains on; both then agree to the last bit.

The first process trains a small transformer on this repository's own pages. After a while it starts
a second one, which gets nothing but a TCP port. The second one receives the state (weights,
optimizer, schedule, random numbers, data) and takes the next ten steps with it, while the first
takes the same ten. The exit status is 0 only if every loss is the same in both.

python peer_recovery.py         about 20 seconds on two cores
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aiotorchio import Summary, load_from_stream, save_to_stream

HOST = "127.0.0.1"
COMPARED_STEPS = 10
DEADLINE_SECONDS = 300
MB = 10**6

State = dict[str, Any]
Sending = Coroutine[Any, Any, Summary]


# --- The training: no code here deals with interruptions ------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """The values with which a peer builds the same model and takes the same batches."""

    width: int
    depth: int
    heads: int = 4
    context: int = 64
    batch: int = 4
    dropout: float = 0.1
    learning_rate: float = 1e-3
    warmup: int = 20


class Transformer(nn.Module):
    """A transformer that predicts the next byte of a text."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            dim_feedforward=4 * config.width,
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.bytes = nn.Embedding(256, config.width)
        self.places = nn.Embedding(config.context, config.width)
        self.blocks = nn.TransformerEncoder(
            layer, config.depth, norm=nn.LayerNorm(config.width), enable_nested_tensor=False
        )
        self.head = nn.Linear(config.width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the next byte at every position."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.bytes(text) + self.places.weight[:length]
        logits: Tensor = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return logits


class Training:
    """A model in training: ``step`` changes it, ``state`` is everything that the next step needs.

    Args:
        config: The configuration of the model and its training.
        model: The model, made from the configuration.
        text: The training text, in bytes.
    """

    def __init__(self, config: Config, model: Transformer, text: Tensor) -> None:
        self.config, self.model, self.text = config, model, text
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda n: min((n + 1) / config.warmup, (config.warmup / (n + 1)) ** 0.5),
        )
        self.batches = torch.Generator()
        self.steps = 0

    @classmethod
    def from_state(cls, state: State) -> Training:
        """Go on from another process's state. Its tensors are used themselves: no copies."""
        config = Config(**state["config"])
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(state["model"], assign=True)
        training = cls(config, model, state["text"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.schedule.load_state_dict(state["schedule"])
        training.batches.set_state(state["batches"])
        training.steps = state["steps"]
        torch.set_rng_state(state["dropout"])
        return training

    def state(self) -> State:
        """Return the live tensors themselves: the next step changes them."""
        return {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.get_state(),
            "dropout": torch.get_rng_state(),
            "text": self.text,
            "steps": self.steps,
        }

    def step(self) -> float:
        """Learn from one batch; return its loss."""
        span = self.config.context + 1
        starts = torch.randint(
            len(self.text) - span, (self.config.batch, 1), generator=self.batches
        )
        batch = self.text[starts + torch.arange(span)].long()
        logits = self.model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        # Here, not before the next step: gradients are no part of the state.
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.item()


def pages() -> Tensor:
    """Return the pages of this repository, repeated if they are few; without any, this file."""
    root = Path(__file__).resolve().parent.parent
    found = sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])
    text = b"\n".join(page.read_bytes() for page in found) or Path(__file__).read_bytes()
    return torch.frombuffer(bytearray(text * (4096 // len(text) + 1)), dtype=torch.uint8)


# --- The first process: trains, and serves its state ---------------------------------------------


class LiveTraining:
    """Training in a worker thread, so that the event loop has time for peers.

    The lock of ``_stepped`` is held during each step: code that holds it runs between two steps,
    where the state is consistent. The lock is fair, so the wait is never longer than one step.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.losses: dict[int, float] = {}
        self._stepped = asyncio.Condition()

    async def run(self) -> None:
        """Take steps until cancelled."""
        while True:
            async with self._stepped:
                loss = await asyncio.to_thread(self.training.step)
                step = self.training.steps
                self.losses[step] = loss
                self._stepped.notify_all()
            if step % 10 == 0:
                mean = sum(self.losses[n] for n in range(step - 9, step + 1)) / 10
                say("train", f"step {step:4}  loss {mean:.4f}")

    async def reached(self, step: int) -> None:
        """Wait until a step was taken."""
        async with self._stepped:
            await self._stepped.wait_for(lambda: self.training.steps >= step)

    async def snapshot(self, writer: asyncio.StreamWriter) -> tuple[int, float, Sending]:
        """Take a snapshot between two steps; return the step, the seconds of pause, and the save.

        The tensors of a message must not change until the last byte has left. Sending the live
        tensors would take no memory, but stop the training until the network and the peer are done.
        A snapshot takes the size of the state once more, less with each chunk that is sent, and
        stops the training for a pause that no peer can make longer. In a worker thread it does not
        block the event loop either.
        """
        async with self._stepped:
            start = time.perf_counter()
            sending = await asyncio.to_thread(
                save_to_stream, self.training.state(), writer, snapshot=True
            )
            return self.training.steps, time.perf_counter() - start, sending


async def lead(config: Config, steps: int) -> bool:
    """Train, start a peer after so many steps, serve it, and compare both after that."""
    text = pages()
    live = LiveTraining(Training(config, Transformer(config), text))
    parameters = sum(p.numel() for p in live.training.model.parameters())
    say("train", f"{parameters / 1e6:.1f} M parameters, AdamW, {len(text):,} bytes of text")
    peers: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_server(lambda *peer: peers.put_nowait(peer), HOST, 0)
    try:
        # The first error of any task ends them all, and the peer's process with them.
        async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as tasks:
            training = tasks.create_task(live.run())
            await live.reached(steps)
            say("peer", "starting a second process; training goes on")
            process = tasks.create_task(run_peer(server.sockets[0].getsockname()[1]))
            cut, report = await serve(live, *await peers.get())
            await process
            await live.reached(cut + COMPARED_STEPS)
            training.cancel()
    finally:
        server.close()
    return compare(live.losses, report["losses"])


async def serve(
    live: LiveTraining, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[int, State]:
    """Send a peer the state; return the step of the snapshot, and the report of the peer."""
    try:
        peak = peak_memory()
        cut, pause, sending = await live.snapshot(writer)
        say("cut", f"after step {cut}: training held for {pause * 1e3:.0f} ms to copy the state")
        start = time.perf_counter()
        sent = await sending
        seconds = time.perf_counter() - start
        size = f"{sent.tensors} tensors, {sent.nbytes / MB:.1f} MB"
        speed = f"{seconds:.2f} s, {sent.nbytes / seconds / 1e9:.2f} GB/s"
        say("moved", f"{size}, codec {sent.codec}, {speed}, training all the while")
        grown = peak_memory() - peak
        report: State = await load_from_stream(reader, allow_pickle=False)
    finally:
        writer.close()
    here, there = f"{grown / MB:.1f} MB here", f"{report['grown'] / MB:.1f} MB there"
    say("memory", f"peak grew by {here}, {there}")
    return cut, report


async def run_peer(port: int) -> None:
    """Run the second process; it never outlives this call."""
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--join", str(port))
    try:
        if await process.wait():
            raise RuntimeError(f"the peer failed with exit status {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def compare(ours: dict[int, float], theirs: dict[int, float]) -> bool:
    """Tell whether a peer's losses equal those of this process, to the last bit."""
    print(f"\nstep  loss    {'here':22}there")
    equal = 0
    for step, loss in theirs.items():
        here, there = ours[step].hex(), loss.hex()
        equal += here == there
        print(f"{step:4}  {loss:.4f}  {here:22}{there:22}{'=' if here == there else 'DIFFERENT'}")
    print(f"{equal} of {COMPARED_STEPS} losses are the same to the last bit")
    return equal == COMPARED_STEPS


# --- The second process --------------------------------------------------------------------------


async def join(port: int) -> None:
    """Take over the state of the process at a port, take the next steps, report their losses."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        peak = peak_memory()
        # No pickle: no peer at that port can make this process run its code.
        state = await load_from_stream(reader, allow_pickle=False)
        grown = peak_memory() - peak
        training = Training.from_state(state)
        losses = {}
        for _ in range(COMPARED_STEPS):
            loss = await asyncio.to_thread(training.step)
            losses[training.steps] = loss
        await save_to_stream({"losses": losses, "grown": grown}, writer)
    finally:
        writer.close()


# --- Both ----------------------------------------------------------------------------------------


def say(what: str, text: str) -> None:
    """Print one line with the time."""
    print(f"{what:8}{text}", flush=True)


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes; 0 where the system is not Linux."""
    # Not getrusage: a process that a big one has started would begin with the peak of that.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="before the peer starts")
    parser.add_argument("--width", type=int, default=384, help="of the model, a multiple of 4")
    parser.add_argument("--depth", type=int, default=6, help="of the model")
    parser.add_argument("--join", type=int, metavar="PORT", help="be the second process")
    args = parser.parse_args()
    # The same sums in the same order in both processes.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.join is not None:
        asyncio.run(join(args.join))
        return True
    torch.manual_seed(0)
    return asyncio.run(lead(Config(width=args.width, depth=args.depth), args.steps))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
