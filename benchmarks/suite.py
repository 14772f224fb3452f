"""Measures all goals of speed, memory and lag in one run, next to other libraries.

    python benchmarks/suite.py                          # everything that can run here: half an hour
    python benchmarks/suite.py --rounds 1 --sections large,small --scale 0.1 --out FILE  # a trial
    python benchmarks/suite.py --report FILE

Writes every sample of every round to a file, and prints tables that are made of this file; plot.py
draws pictures of it. Libraries that are not installed are left out, and so are runs that do not fit
into the memory. sections.py lists the runs and methods; rounds.py measures them. Linux with glibc
only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from goals import judge
from report import report
from rounds import Sample, measure
from section import Section, readable
from sections import SECTIONS

RESULTS = Path(__file__).parent / "results"

PACKAGES = (
    *("aiotorchio", "torch", "numpy", "anyio", "trio", "uvloop"),
    *("safetensors", "torchft", "pyzmq", "ray", "tensorizer"),
)


def available_memory() -> int:
    """Return the available memory, in bytes."""
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """Describe the machine that runs the suite; the name is for a file."""
    cores = len(os.sched_getaffinity(0))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    parts = [f"{cores} cores of {model}", f"{memory / 2**30:.0f} GiB of memory"]
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or f"cpu-{cores}-cores",
        "description": ", ".join([*parts, gpu] if gpu else parts),
        "cores": cores,
        "cpu": model,
        "memory": memory,
        "gpu": gpu or None,
        "linux": platform.release(),
    }


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def why_not(section: Section) -> str:
    """Return why a section cannot run on this machine; empty if it can."""
    available = available_memory()
    if not section.reason and section.needs() > available:
        needs = readable(section.needs())
        return f"it takes about {needs} of memory, and {readable(available)} is free"
    return section.reason


def run(section: Section, rounds: int) -> dict[str, Any]:
    """Run a section, and return it as it is stored."""
    samples: dict[str, list[Sample]] = {}
    error, skipped = "", why_not(section)
    if not skipped:
        samples, error = measure(section.runs, rounds)
    return {
        "title": section.title,
        "skipped": skipped,
        "error": error,
        "missing": section.missing,
        "goals": [judge(goal, samples) for goal in section.goals],
        "runs": [
            {
                "name": run.name,
                "method": run.method,
                "base": run.base,
                "count": run.count,
                "nbytes": run.nbytes,
                "copies": run.copies,
                "repeat": run.repeat,
                "device": run.device,
                "samples": samples[run.name],
            }
            for run in section.runs
            if run.name in samples
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="that are counted")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="a comma between them")
    parser.add_argument("--scale", type=float, default=1, help="move only this share of the bytes")
    parser.add_argument("--out", type=Path, help="the file of the results")
    parser.add_argument("--report", type=Path, help="only print the tables of such a file")
    args = parser.parse_args()
    if args.report:
        print(report(json.loads(args.report.read_text())))
        return 0
    names = args.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")

    here, today = machine(), datetime.date.today().isoformat()
    out: Path = args.out or RESULTS / f"{today}-{here['name']}.json"
    if args.scale != 1 and not args.out:
        parser.error("a trial is no result: say where it goes, with --out")
    results: dict[str, Any] = {
        "date": today,
        "machine": here,
        "versions": versions(),
        "rounds": args.rounds,
        "scale": args.scale,
        "sections": {},
    }
    for name in names:
        start = time.monotonic()
        section = SECTIONS[name]().scaled(args.scale)
        stored = results["sections"][name] = run(section, args.rounds)
        # Written after each section: no result is lost if the next section takes too much memory.
        out.write_text(json.dumps(results) + "\n")
        ended = stored["error"] or (stored["skipped"] and f"skipped: {stored['skipped']}") or "done"
        print(f"{name}: {ended}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(report(json.loads(out.read_text())))
    return 1 if any(section["error"] for section in results["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
