"""Draws pictures of the results of the suite.

    python benchmarks/plot.py benchmarks/results/FILE.json docs/pictures

Needs matplotlib, and nothing else: pictures are made of the file alone, and the same file gives the
same bytes. Lines and bars are medians over rounds; bands and whiskers go from minimum to maximum. A
picture whose sections are not in the file is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

# Without types: a type check does not need matplotlib.
matplotlib: Any = importlib.import_module("matplotlib")
matplotlib.use("svg")
pyplot: Any = importlib.import_module("matplotlib.pyplot")

STYLE = {
    # Dark text with a white outline is readable on light and dark pages.
    "figure.facecolor": "white",
    "text.color": "#24292f",
    "axes.labelcolor": "#24292f",
    "axes.edgecolor": "#8c959f",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "font.size": 10,
    # Otherwise the names inside a file are random.
    "svg.hashsalt": "aiotorchio",
}
SAVED = {"Date": None, "Creator": None}

# Colours that colour-blind people can tell apart; aiotorchio's stands out.
LOOKS: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0969da", "linewidth": 2.5, "zorder": 3},
    "raw": {"color": "#8c959f", "linestyle": "--"},
    "streaming": {"color": "#d55e00"},
    "torch.save": {"color": "#009e73"},
    "torch.save + asyncio": {"color": "#009e73"},
    "safetensors + asyncio": {"color": "#cc79a7"},
}
NAMES = {
    "ours": "aiotorchio",
    "ours, no checksum": "aiotorchio, no checksum",
    "raw": "raw loop",
    "streaming": "torch _streaming_*",
}
SIDES = ("sender", "receiver")

Json = dict[str, Any]
Sections = dict[str, Json]


def named(method: str) -> str:
    return NAMES.get(method, method)


def seconds(run: Json) -> list[float]:
    return [sample["seconds"] for sample in run["samples"]]


def curve(axes: Any, section: Json, x_of: Callable[[Json], float], labels: list[str]) -> None:
    """Draw the throughput of each method at the sizes of its runs."""
    methods: dict[str, list[Json]] = {}
    for run in section["runs"]:
        methods.setdefault(run["method"], []).append(run)
    for method, runs in methods.items():
        x, look = [x_of(run) for run in runs], LOOKS.get(method, {})
        speeds = [
            [run["count"] * run["nbytes"] / value / 1e9 for value in seconds(run)] for run in runs
        ]
        axes.plot(
            x, list(map(statistics.median, speeds)), marker="o", ms=4, label=named(method), **look
        )
        axes.fill_between(
            x,
            list(map(min, speeds)),
            list(map(max, speeds)),
            color=look.get("color"),
            alpha=0.12,
            lw=0,
        )
    axes.set(xscale="log", yscale="log", ylabel="GB/s")
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}")
    axes.set_xticks(x, labels)
    axes.minorticks_off()
    axes.legend()


def by_size(sections: Sections, figure: Any) -> None:
    section = sections["curve-size"]
    axes = figure.subplots()
    runs = [run for run in section["runs"] if run["method"] == "ours"]
    labels = [run["name"].split(", ")[1] for run in runs]
    curve(axes, section, lambda run: run["nbytes"], labels)
    axes.set(title="Throughput of one tensor by its size", xlabel="size of the tensor")


def by_count(sections: Sections, figure: Any) -> None:
    section = sections["curve-count"]
    axes = figure.subplots()
    runs = [run for run in section["runs"] if run["method"] == "ours"]
    curve(axes, section, lambda run: run["count"], [f"{run['count']:,}" for run in runs])
    axes.set(title="Throughput of 64 MiB by the number of tensors", xlabel="tensors")


def memory(sections: Sections, figure: Any) -> None:
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    for run in sections["memory"]["runs"]:
        # The round in the middle.
        sample = sorted(run["samples"], key=lambda sample: sample["seconds"])[
            len(run["samples"]) // 2
        ]
        for axes, notes in zip(both, sample["notes"], strict=True):
            x, y = zip(*notes["resident"], strict=True)
            axes.plot(x, y, label=named(run["method"]), **LOOKS.get(run["method"], {}))
    for axes, side in zip(both, SIDES, strict=True):
        axes.set(title=f"Memory of the {side}, 1 GiB in 64 tensors", xlabel="seconds")
        axes.set(xlim=0, ylim=0)
    both[0].set_ylabel("MiB above before")
    both[0].legend()


def later(run: Json, side: int) -> tuple[list[float], list[float]]:
    """Return, for each lag, the share of heartbeats that came at least as late."""
    counts: Counter[float] = Counter()
    for sample in run["samples"]:
        for lag, count in sample["notes"][side]["late"].items():
            counts[float(lag)] += count
    lags = sorted(counts, reverse=True)
    shares = [seen / counts.total() for seen in accumulate(counts[lag] for lag in lags)]
    return lags[::-1], shares[::-1]


def lag(sections: Sections, figure: Any) -> None:
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    for run in sections["lag"]["runs"]:
        method, what = run["name"].split(", ", 1)
        look = LOOKS.get(method, {}) | {"linestyle": "-" if "GiB" in what else ":"}
        for side, axes in enumerate(both):
            axes.step(*later(run, side), where="pre", label=f"{named(method)}, {what}", **look)
    for axes, name in zip(both, SIDES, strict=True):
        axes.set(
            title=f"Lag of the {name}'s event loop", xlabel="ms late", xscale="log", yscale="log"
        )
        axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        axes.plot([10], [0.01], marker="x", color="black", ls="", label="goal: 99 % within 10 ms")
        axes.axvline(50, color="black", linewidth=0.8, label="goal: all within 50 ms")
    both[0].set_ylabel("share of heartbeats at least as late")
    both[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    # Below both axes, where it does not cover the lines.
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def peers(sections: Sections, figure: Any) -> None:
    titles = {"large": "1 GiB in 64 tensors", "small": "10,000 tensors of 4 KiB"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        runs = sorted(sections[name]["runs"], key=lambda run: -statistics.median(seconds(run)))
        for row, run in enumerate(runs):
            times, method = seconds(run), run["method"]
            median = statistics.median(times)
            colors = {"ours": "#0969da", "ours, no checksum": "#80b3ec", "raw": "#57606a"}
            whiskers = [[median - min(times)], [max(times) - median]]
            axes.barh(
                row, median, color=colors.get(method, "#c8cdd3"), xerr=whiskers, ecolor="#57606a"
            )
            axes.annotate(
                f"{median:.3g} s",
                (max(times), row),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(runs)), [named(run["method"]) for run in runs])
        axes.set(title=f"{title}: less is better", xlabel="seconds")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.18)
        axes.set_xlim(left=0)


# Each picture: its sections, its size in inches, and the function that draws it.
PICTURES: dict[str, tuple[list[str], tuple[float, float], Callable[[Sections, Any], None]]] = {
    "throughput-by-size": (["curve-size"], (8, 4.5), by_size),
    "throughput-by-count": (["curve-count"], (8, 4.5), by_count),
    "memory": (["memory"], (9, 3.8), memory),
    "lag": (["lag"], (9, 4.8), lag),
    "peers": (["large", "small"], (10, 4.2), peers),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a file that suite.py has written")
    parser.add_argument("folder", type=Path, help="for the pictures")
    args = parser.parse_args()
    sections: Sections = json.loads(args.results.read_text())["sections"]
    args.folder.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update(STYLE)
    for name, (needed, size, draw) in PICTURES.items():
        if not all(sections.get(section, {}).get("runs") for section in needed):
            print(f"{name}: left out, as not all of its sections are there: {', '.join(needed)}")
            continue
        figure = pyplot.figure(figsize=size, layout="constrained")
        draw(sections, figure)
        figure.savefig(args.folder / f"{name}.svg", metadata=SAVED)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
