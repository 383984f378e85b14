# SPDX-License-Identifier: Apache-2.0
"""Pictures: of results files, which are all that `main` reads, and of head scores.

Example: python -m razor_attention.bench.plot --results bench/results
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from razor_attention import HeadScores

from .harness import RESULTS

Cells = dict[str, str]  # of a row of a results file, by column
_CONTEXT = re.compile(r"(decode|prefill) (\d+)k")
_CAPACITY = re.compile(r"(held|decode) (\d+)")
_BUDGETS = (8, 16, 24, 80)  # GB, that the picture of capacities marks


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


def latest(path: Path) -> dict[str, dict[str, Cells]]:
    """case -> plan -> the last row of a results file that has them; what ran with fewer threads says so in its case."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    most = max(int(row["threads"]) for row in rows)
    cases: dict[str, dict[str, Cells]] = {}
    for row in rows:
        few = f", {row['threads']} thread{'s' * (row['threads'] != '1')}" if int(row["threads"]) < most else ""
        cases.setdefault(row["case"] + few, {})[row["plan"]] = row
    return cases


def plot_bars(cases: dict[str, dict[str, Cells]], title: str, target: Path) -> None:
    """Bars of time, with the interquartile range, of bytes and, where it was taken, of the share of the roofline: a row
    of axes for each case, a bar for each plan."""
    columns = [("median_us", 1e3, "ms", "tab:blue"), ("bytes", 1e6, "MB", "tab:orange")]
    if any(float(row["roofline"]) for rows in cases.values() for row in rows.values()):
        columns.append(("roofline", 1.0, "of the roofline", "tab:green"))
    height = sum(1.0 + 0.3 * len(rows) for rows in cases.values())
    figure = Figure(figsize=(1.5 + 4.2 * len(columns), 0.6 + height), layout="constrained")
    ratios = [1.5 + len(rows) for rows in cases.values()]
    grid = figure.subplots(len(cases), len(columns), squeeze=False, height_ratios=ratios)
    for (case, rows), line in zip(cases.items(), grid, strict=True):
        for axes, (column, unit, label, color) in zip(line, columns, strict=True):
            values = [float(row[column]) / unit for row in rows.values()]
            spread = [float(row["iqr_us"]) / 2e3 for row in rows.values()] if column == "median_us" else None
            bars = axes.barh(list(rows), values, xerr=spread, color=color, error_kw={"elinewidth": 1, "alpha": 0.5})
            axes.bar_label(bars, [_short(value) for value in values], padding=4, fontsize="small")
            axes.set_xlim(0, 1.25 * max(max(values) + max(spread or [0.0]), 1e-9))
            axes.set_xlabel(label)
            axes.invert_yaxis()
            if axes is line[0]:
                axes.set_title(case, loc="left", fontsize="medium")
            else:
                axes.set_yticklabels([])
    figure.suptitle(title)
    figure.savefig(target, format="png", dpi=110)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def contexts(cases: dict[str, dict[str, Cells]], phase: str) -> dict[str, list[tuple[int, Cells]]]:
    """plan -> (tokens, row) by ascending tokens, of the cases such as "decode 32k"."""
    lines: dict[str, list[tuple[int, Cells]]] = {}
    for case, rows in cases.items():
        if found := _CONTEXT.fullmatch(case):
            for plan, row in rows.items():
                if found[1] == phase:
                    lines.setdefault(plan, []).append((int(found[2]) * 1024, row))
    return {plan: sorted(line, key=lambda point: point[0]) for plan, line in lines.items()}


def plot_contexts(cases: dict[str, dict[str, Cells]], title: str, target: Path) -> None:
    """Lines over the context, a color for each plan: times of decode and prefill, bytes, shares of the roofline."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    (left, right), (bytes_axes, roofline) = figure.subplots(2, 2)
    lines = {phase: contexts(cases, phase) for phase in ("decode", "prefill")}
    plans = list(dict.fromkeys(plan for phase in lines.values() for plan in phase if not plan.endswith(" op")))
    color = {plan: f"C{index}" for index, plan in enumerate(plans)}
    for axes, phase, style in ((left, "decode", "o-"), (right, "prefill", "s--")):
        for plan, points in lines[phase].items():
            if plan not in color:  # `op` lies on `attend`
                continue
            tokens, rows = [at for at, _ in points], [row for _, row in points]
            median = [float(row["median_us"]) / 1e3 for row in rows]
            spread = [float(row["iqr_us"]) / 2e3 for row in rows]
            axes.errorbar(tokens, median, spread, fmt=style, color=color[plan], label=plan, capsize=2)
            share = [float(row["roofline"]) for row in rows]
            if any(share):
                roofline.plot(tokens, share, style, color=color[plan])
            if phase == "decode" and plan != "sdpa packed":  # which reads what sdpa reads
                size = [float(row["bytes"]) / 1e6 for row in rows]
                name = "full cache" if plan == "sdpa" else plan.removesuffix(" attend")
                if plan != "full attend":
                    bytes_axes.plot(tokens, size, style, color=color[plan], label=name)
        axes.set_title(f"{phase}: time of " + ("one token" if phase == "decode" else "the prompt"))
        axes.set_ylabel("ms")
        axes.set_yscale("log")
    bytes_axes.set_title("memory: keys and values of a layer")
    bytes_axes.set_ylabel("MB")
    bytes_axes.set_yscale("log")
    roofline.set_title("share of the roofline measured in the same run")
    roofline.axhline(1, color="black", linewidth=0.8)
    roofline.set_ylim(0, max(1.35, 1.1 * roofline.dataLim.y1))
    for axes in (left, right, bytes_axes, roofline):
        phases = {left: ["decode"], right: ["prefill"], bytes_axes: ["decode"]}.get(axes, list(lines))
        ticks = sorted({at for phase in phases for line in lines[phase].values() for at, _ in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{at // 1024}K" for at in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    styles = [Line2D([], [], color="gray", marker="o", label="decode")]
    styles.append(Line2D([], [], color="gray", marker="s", linestyle="--", label="prefill"))
    roofline.legend(handles=styles, title="colors as above", fontsize="small", loc="upper right")
    figure.suptitle(title)
    figure.savefig(target, format="png", dpi=110)


def plot_capacity(cases: dict[str, dict[str, Cells]], title: str, target: Path) -> None:
    """Bytes over the context, lines by arithmetic and dots that were measured; time of a token where it was."""
    found: dict[str, dict[str, list[tuple[int, Cells]]]] = {"held": {}, "resident": {}, "decode": {}}
    for case, rows in cases.items():
        if context := _CAPACITY.fullmatch(case):
            for name, row in rows.items():
                plan, _, kind = name.partition(", ")  # "most in 24 GB" lies on the plan's line, "resident" was measured
                line = found[kind if kind == "resident" else context[1]].setdefault(plan, [])
                line.append((int(context[2]), row))
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    color = {plan: f"C{index}" for index, plan in enumerate(found["held"])}
    for plan, points in found["held"].items():
        tokens, size = zip(*sorted((at, float(row["bytes"]) / 1e9) for at, row in points), strict=True)
        left.plot(tokens, size, color=color[plan], label=plan)
    for plan, points in found["resident"].items():
        size = [float(row["bytes"]) / 1e9 for _, row in points]
        left.plot([at for at, _ in points], size, "o", color=color[plan], label=f"{plan}, resident memory")
    for budget in _BUDGETS:
        left.axhline(budget, color="gray", linewidth=0.8, linestyle=":")
        left.text(1.0, budget, f" {budget} GB", transform=left.get_yaxis_transform(), va="center", fontsize="small")
    for plan, points in found["decode"].items():
        points = sorted(points, key=lambda point: point[0])
        tokens, rows = [at for at, _ in points], [row for _, row in points]
        median, spread = ([float(row[column]) / 1e6 for row in rows] for column in ("median_us", "iqr_us"))
        half = [x / 2 for x in spread]
        right.errorbar(tokens, median, half, fmt="o-", color=color[plan], capsize=2, label=f"{plan}, measured")
        speed = {at: float(row["ceiling_gb_s"]) for at, row in points}
        for other, held in found["held"].items():
            if least := sorted((at, float(row["bytes"]) / 1e9 / speed[at]) for at, row in held if speed.get(at)):
                right.plot(*zip(*least, strict=True), "--", color=color[other], linewidth=1)
    if found["decode"]:
        right.plot([], [], "--", color="gray", label="the bytes on the left at the read bandwidth of the run")
    left.set_title("keys and values of the whole model")
    left.set_ylabel("GB")
    right.set_title("attention of one token in all layers")
    right.set_ylabel("s")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
            axes.legend(handles.values(), handles.keys(), fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(target, format="png", dpi=110)


def plot_results(path: Path, folder: Path) -> list[Path]:
    """The pictures of a results file: <machine>-<question>.png, and -contexts.png where cases have a context."""
    cases = latest(path)
    one = next(iter(next(iter(cases.values())).values()))
    most = max(int(row["threads"]) for rows in cases.values() for row in rows.values())
    title = f"{path.stem}: {one['machine']}, {one['isa']}, {most} threads"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if path.stem == "capacity":
        plot_capacity(cases, title, folder / f"{path.parent.name}-{path.stem}.png")
        return [folder / f"{path.parent.name}-{path.stem}.png"]
    others = {case: rows for case, rows in cases.items() if not _CONTEXT.fullmatch(case)}
    for suffix, draw, some in (("", plot_bars, others), ("-contexts", plot_contexts, cases)):
        if some and (suffix == "" or len(others) < len(cases)):
            made.append(folder / f"{path.parent.name}-{path.stem}{suffix}.png")
            draw(some, title, made[-1])
    return made


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--results", type=Path, default=RESULTS, help=f"folder of the CSV files (default: {RESULTS})")
    arguments = flags.parse_args(argv)
    # Tables with columns of their own have pictures of their own: scores.png, alibi_windows.png, plot_eval.py's.
    files = sorted(
        path
        for path in arguments.results.glob("*/*.csv")
        if not path.name.endswith(
            ("demo.csv", "methods.csv", "gates.csv", "quantised.csv", "answers.csv", "scale.csv", "vllm.csv")
        )
    )
    if not files:
        flags.error(f"--results: expected <machine>/<question>.csv in it, got none in {arguments.results}")
    for path in files:
        for made in plot_results(path, arguments.results / "plots"):
            print(made)


if __name__ == "__main__":
    main()
