"""Measures each step of a save and of a load of many tensors.

    python benchmarks/phases.py                 # 10,000 tensors of 4 KiB
    python benchmarks/phases.py --count 100000 --nbytes 1024

One process, no sockets, Python's garbage collector off; medians of seven, in milliseconds. The
steps are those of ``engine/send.py`` and ``engine/receive.py``, by their private names, which may
change with any version.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import state_of

from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.engine.finish import prepare
from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.matching import LoadContext, Match, match_names
from aiotorchio.engine.placement import Placement, place
from aiotorchio.engine.save_options import DEFAULT_CHUNK_SIZE
from aiotorchio.graph.flatten import flatten
from aiotorchio.graph.rebuild import build_tensors, check_tree
from aiotorchio.limits import Limits
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import decode_header, encode_header
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.validation import validate


def milliseconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - start) * 1000)
        del result
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--nbytes", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = state_of(arguments.count, arguments.nbytes)
    gc.disable()

    def take_apart() -> Any:
        return flatten(state, chunk_size=DEFAULT_CHUNK_SIZE, metadata={}, producer="")

    flattened = take_apart()
    header, limits = flattened.header, Limits()
    layout, encoded = Layout(header), encode_header(header)
    skeleton, rows = flattened.skeleton, header.tensors
    options = IterateOptions()

    def outgoing() -> OutgoingPayload:
        return OutgoingPayload(flattened.storages, layout.offsets, layout.nbytes, layout.chunk_size)

    def gather() -> None:
        for index in range(layout.chunks):
            sent.chunk_views(*layout.chunk_range(index))

    def compose() -> None:
        composer = Composer(header, layout, checksum=True)
        composer.opening(skeleton)
        for chunk in chunks:
            composer.chunk_frame(chunk)

    def decide() -> tuple[LoadContext, Match, Placement]:
        context = LoadContext.of(header, layout, options)
        match = match_names(context)
        return context, match, place(context, match)

    sent = outgoing()
    chunks = [sent.chunk_views(*layout.chunk_range(index)) for index in range(layout.chunks)]
    decided = decide()
    payload, _ = prepare(*decided)
    for index in range(layout.chunks):
        payload.buffers_for(*layout.chunk_range(index))
    storages = payload.storages()
    tensors = build_tensors(header, storages)
    sides = {
        "save": {
            "take the object apart (`flatten`)": take_apart,
            "lay out and encode the header": lambda: (Layout(header), encode_header(header)),
            "plan the payload": outgoing,
            "gather small storages": gather,
            "hash": compose,
            "look at the version counters": lambda: flattened.versions.check(""),
        },
        "load": {
            "decode the header": lambda: decode_header(encoded, limits),
            "validate it": lambda: validate(header, limits),
            "decide where things go": decide,
            "check the skeleton": lambda: check_tree(
                skeleton, rows, names=False, limits=limits, offset=0
            ),
            "plan the memory": lambda: prepare(*decided),
            "cut arenas into storages": payload.storages,
            "make the tensors": lambda: build_tensors(header, storages),
            "make the object": lambda: tree_codec.decode(
                skeleton, tensors, depth_limit=limits.depth
            ),
        },
    }
    print(f"{arguments.count:,} tensors of {arguments.nbytes:,} bytes\n")
    print("| step | ms | us a tensor |\n| --- | ---: | ---: |")
    for side, steps in sides.items():
        total = 0.0
        for what, work in steps.items():
            taken = milliseconds(work)
            total += taken
            print(f"| {side}: {what} | {taken:.1f} | {taken * 1000 / arguments.count:.2f} |")
        print(f"| {side}: all | {total:.1f} | {total * 1000 / arguments.count:.2f} |")


if __name__ == "__main__":
    main()
