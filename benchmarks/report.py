"""Writes the tables of the suite, in Markdown, from a file of results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from common import MIB
from goals import SIDES, Result, late, percentile

# The types that JSON gives.
Json = dict[str, Any]


def number(value: float) -> str:
    """Format a number with three significant digits, and no more decimals than these need."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} - {number(max(values))})"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(*heads: str) -> list[str]:
    # Columns after the first are numbers.
    return [row(*heads), row("---", *["---:"] * (len(heads) - 1))]


def goal_row(goal: Result) -> str:
    unit = "" if goal["unit"] == "x" else f" {goal['unit']}"
    target = f"{'<=' if goal['at_most'] else '>='} {goal['target']:.4g}{unit}"
    if goal["measured"] is None or goal["range"] is None:
        return row(goal["what"], goal["against"], target, "not measured", "-")
    low, high = goal["range"]
    measured = f"{number(goal['measured'])}{unit} ({number(low)} - {number(high)})"
    return row(goal["what"], goal["against"], target, measured, "yes" if goal["met"] else "no")


def goals(sections: dict[str, Json]) -> list[str]:
    rows = [goal_row(goal) for section in sections.values() for goal in section["goals"]]
    if not rows:
        return []
    return [row("what", "against", "goal", "measured", "met"), row(*["---"] * 5), *rows]


def run_row(run: Json, samples: dict[str, list[Json]]) -> str:
    seconds = [sample["seconds"] for sample in run["samples"]]
    median = statistics.median(seconds)
    ratio = ""
    if run["base"] in samples:
        base = statistics.median(sample["seconds"] for sample in samples[run["base"]])
        ratio = f"{base / median:.2f}"
    cpu = [statistics.median(sample["cpu"][side] for sample in run["samples"]) for side in (0, 1)]
    peaks = ["", ""]
    if run["repeat"] == 1:
        peaks = [
            f"{statistics.median(sample['peak'][side] for sample in run['samples']) / MIB:.1f}"
            for side in (0, 1)
        ]
    speed = run["count"] * run["nbytes"] * run["copies"] / median / 1e9
    return row(run["name"], spread(seconds), number(speed), ratio, *map(number, cpu), *peaks)


def lag_rows(runs: list[Json]) -> Iterator[str]:
    for run in runs:
        for side, name in enumerate(SIDES):
            counts = late(run["samples"], side)
            shares = [f"{percentile(counts, share):.2f}" for share in (0.5, 0.99, 1.0)]
            yield row(f"{run['name']}: {name}", *shares, f"{counts.total():,}")


def section_lines(name: str, section: Json) -> Iterator[str]:
    yield from ("", f"### {name}: {section['title']}", "")
    if section["skipped"]:
        yield f"Skipped: {section['skipped']}."
    if section["error"]:
        yield f"Failed: {section['error']}."
    if not section["runs"]:
        return
    yield from table(
        "method",
        "seconds (min - max)",
        "GB/s",
        f"ratio to {'raw' if name != 'fair' else 'one after the other'}",
        "CPU s, sender",
        "receiver",
        "peak MiB, sender",
        "receiver",
    )
    samples = {run["name"]: run["samples"] for run in section["runs"]}
    yield from (run_row(run, samples) for run in section["runs"])
    noted = [run for run in section["runs"] if "late" in run["samples"][0]["notes"][0]]
    if noted:
        yield ""
        yield from table("lag in ms", "p50", "p99", "max", "heartbeats")
        yield from lag_rows(noted)
    if section["missing"]:
        yield ""
        reasons = (f"{peer} ({reason})" for peer, reason in section["missing"].items())
        yield f"Not here: {', '.join(reasons)}."


def report(results: Json) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    sections = results["sections"]
    lines = [
        f"{results['machine']['description']}. {versions}.",
        f"{results['date']}; medians of {results['rounds']} rounds, minimum and maximum in"
        " brackets. A ratio is that of speeds: above 1 is faster.",
    ]
    if results["scale"] != 1:
        lines.append(f"**A trial: with {results['scale']:g} of the bytes.**")
    lines += ["", *goals(sections)]
    for name, section in sections.items():
        lines += section_lines(name, section)
    return "\n".join(lines)
