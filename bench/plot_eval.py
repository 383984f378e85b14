# SPDX-License-Identifier: Apache-2.0
"""Pictures of `razor eval`, from its results.csv alone: a map of the needle for each method, and curves over the bytes.

Example: python -m razor_attention.bench.plot_eval results/results.csv
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from razor_attention.hf.eval.results import Row, read_rows, wilson


def plot_eval(path: Path, out: Path, prefix: str = "") -> list[Path]:
    """Draw needle.png, if that task was run, and curves.png.

    Args:
        path: results.csv.
        out: folder of the pictures.
        prefix: of their names.
    Returns:
        The files written.
    """
    rows, drawn = read_rows(path), list[Path]()
    if needles := [row for row in rows if row.task == "needle"]:
        drawn.append(out / f"{prefix}needle.png")
        _needle_map(needles, drawn[-1])
    if rows:
        drawn.append(out / f"{prefix}curves.png")
        _curves(rows, drawn[-1])
    return drawn


def family(method: str) -> str:
    """The methods that count as one: random heads of all seeds."""
    return re.sub(r"^random-\d+$", "random", method)


def label(method: str) -> str:
    """A method's name in a picture: of a file, the file's name without its folders."""
    return re.sub(r"=[^,]*/", "=", method)


def together(rows: Iterable[Row]) -> tuple[int, int]:
    """Right answers and answers of several rows."""
    several = list(rows)
    return sum(row.correct for row in several), sum(row.n for row in several)


def _needle_map(rows: list[Row], target: Path) -> None:
    """Lengths x depths: a line of maps for each method, one for each budget."""
    names, budgets = (
        list(dict.fromkeys(some)) for some in ([family(r.method) for r in rows], [r.budget for r in rows])
    )
    budgets = sorted({budget for budget in budgets if budget}, key=float) or [""]
    lengths = sorted({row.length for row in rows})
    depths = sorted({row.depth for row in rows}, key=float)
    size = (0.4 * len(lengths) + 0.9) * len(budgets) + 2.4, (0.14 * len(depths) + 0.35) * len(names) + 0.9
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(names), len(budgets), squeeze=False)
    for y, name in enumerate(names):
        for x, budget in enumerate(budgets):
            axes = grid[y, x]
            mine = [row for row in rows if family(row.method) == name and row.budget in (budget, "")]
            table = []
            for depth in depths:
                cells = [together(row for row in mine if (row.depth, row.length) == (depth, n)) for n in lengths]
                table.append([right / n if n else float("nan") for right, n in cells])
            image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            below = y == len(names) - 1
            axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" if below else "" for n in lengths])
            axes.set_yticks(range(len(depths)), ["" if x else f"{float(depth):.0%}" for depth in depths])
            axes.tick_params(labelsize="x-small")
            if y == 0:
                axes.set_title(budget, fontsize="small")
        grid[y, 0].set_ylabel(label(name), fontsize="small", rotation=0, ha="right", va="center")
    figure.suptitle("needles found, by depth and tokens; share of the full cache's bytes above", fontsize="small")
    figure.colorbar(image, ax=grid, shrink=0.6)
    figure.savefig(target, format="png", dpi=120)


def _curves(rows: list[Row], target: Path) -> None:
    """Accuracy, of perplexity its value, over measured bytes: axes for each task and length, a line for each method."""
    panels = list(dict.fromkeys((row.task, row.length) for row in rows))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines + 1), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    names = list(dict.fromkeys(family(row.method) for row in rows))
    for axes, (task, length) in zip(grid, panels, strict=False):
        for number, name in enumerate(names):
            mine = [row for row in rows if (row.task, row.length, family(row.method)) == (task, length, name)]
            points = []
            for budget in dict.fromkeys(row.budget for row in mine):
                same = [row for row in mine if row.budget == budget]
                (right, n), size = together(same), sum(row.kv_bytes for row in same) / len(same) / 1e6
                value = right / n
                if task == "perplexity":
                    value = math.exp(sum(math.log(float(row.perplexity)) for row in same) / len(same))
                low, high = (value, value) if task == "perplexity" else wilson(right, n)
                points.append((size, value, value - low, high - value))
            if points:
                size_mb, values, below, above = zip(*sorted(points), strict=True)
                style = {"marker": "osv^D*xP"[number % 8], "color": f"C{number % 10}", "markersize": 4, "capsize": 2}
                errors = [[max(0.0, e) for e in side] for side in (below, above)]
                axes.errorbar(size_mb, values, yerr=errors, label=label(name), **style)
        axes.set_title(f"{task}, {length} tokens", fontsize="medium")
        axes.set_xlabel("KV cache, MB")
        axes.set_ylabel("perplexity" if task == "perplexity" else "accuracy")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * columns, fontsize="small")
    figure.savefig(target, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("results", type=Path, help="results.csv")
    arguments = flags.parse_args(argv)
    print(*plot_eval(arguments.results, arguments.results.parent), sep="\n")


if __name__ == "__main__":
    main()
