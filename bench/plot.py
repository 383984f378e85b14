# SPDX-License-Identifier: Apache-2.0
"""Pictures: of results files, which are all that `main` reads, and of head scores.

Example: python -m razor_attention.bench.plot --results bench/results
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from razor_attention import HeadScores

from .harness import RESULTS


def plot_scores(scores: HeadScores, heads: dict[str, dict[int, list[int]]], path: str | Path) -> None:
    """Heat maps of both scores, layers x query heads, with a frame around the kv heads that each of them selects.

    Args:
        scores: of all query heads.
        heads: "induction" and "echo", each {layer: [kv_head, ...]}, from HeadScores.select.
        path: PNG to write.
    """
    num_layers, num_heads = scores.echo.shape
    group = num_heads // scores.num_kv_heads
    size = max(3.2, 0.24 * num_heads + 1.6), max(2.6, 0.24 * num_layers + 1.4)
    figure = Figure(figsize=(2 * size[0], size[1]), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("echo", "induction"), strict=True):
        image = axes.imshow(getattr(scores, name).numpy(), vmin=0, cmap="viridis", aspect="auto")
        figure.colorbar(image, ax=axes, label="mean attention")
        for layer, row in heads[name].items():
            for head in row:
                corner = head * group - 0.5, layer - 0.5
                axes.add_patch(Rectangle(corner, group, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
        axes.set_title(f"{name} score ({sum(map(len, heads[name].values()))} kv heads selected)")
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, format="png", dpi=150)


def plot_windows(windows: Tensor, method: str, path: str | Path) -> None:
    """A line over the heads for each layer, or the one for all of them; tokens on a logarithmic axis.

    Args:
        windows: (num_heads) or (num_layers, num_heads), integers, tokens.
        method: that found them, for the title.
        path: PNG to write.
    """
    rows = windows.reshape(-1, windows.shape[-1]).tolist()
    figure = Figure(figsize=(max(4.0, 0.24 * len(rows[0]) + 2.4), 3.4), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["viridis"]
    for layer, row in enumerate(rows):
        label = f"layer {layer}" if len(rows) > 1 else "all layers"
        axes.plot(row, marker="o", markersize=3, color=colors(layer / max(1, len(rows) - 1)), label=label)
    axes.set_yscale("symlog" if windows.min() < 1 else "log", base=2)
    axes.set_title(f"windows by {method}")
    axes.set_xlabel("query head")
    axes.set_ylabel("tokens")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(rows) <= 12:
        axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def latest(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """case -> plan -> the last row of a results file that has them."""
    cases: dict[str, dict[str, dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cases.setdefault(row["case"], {})[row["plan"]] = row
    return cases


def plot_results(path: Path, target: Path) -> None:
    """Bars of time, with the interquartile range, and of bytes: a row of axes for each case, a bar for each plan."""
    cases = {case: rows for case, rows in latest(path).items() if case != "read bandwidth"}
    figure = Figure(figsize=(11, sum(0.9 + 0.32 * len(rows) for rows in cases.values())), layout="constrained")
    ratios = [1.5 + len(rows) for rows in cases.values()]
    grid = figure.subplots(len(cases), 2, squeeze=False, height_ratios=ratios)
    for (case, rows), (left, right) in zip(cases.items(), grid, strict=True):
        names = list(rows)
        median, iqr = ([float(rows[name][key]) / 1e3 for name in names] for key in ("median_us", "iqr_us"))
        left.barh(names, median, xerr=[value / 2 for value in iqr], color="tab:blue")
        left.set_xlabel("ms")
        right.barh(names, [float(rows[name]["bytes"]) / 1e6 for name in names], color="tab:orange")
        right.set_xlabel("MB")
        right.set_yticklabels([])
        for axes in (left, right):
            axes.invert_yaxis()
            axes.set_title(case, loc="left", fontsize="medium")
    one = next(iter(next(iter(cases.values())).values()))
    figure.suptitle(f"{path.stem}: {one['machine']}, {one['isa']}, {one['threads']} threads")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the CSV files (default: {RESULTS})")
    arguments = flags.parse_args(argv)
    # The demos' tables have columns of their own, and pictures of their own: scores.png, alibi_windows.png.
    files = sorted(path for path in arguments.results.glob("*/*.csv") if not path.name.endswith("demo.csv"))
    if not files:
        flags.error(f"--results: expected <machine>/<question>.csv in it, got none in {arguments.results}")
    for path in files:
        target = arguments.results / "plots" / f"{path.parent.name}-{path.stem}.png"
        plot_results(path, target)
        print(target)


if __name__ == "__main__":
    main()
