"""Rooflines: what each kernel reaches, under the machine's ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # no display is needed

from matplotlib import pyplot as plt

_LABELLED = 4  # kernels of a step that are named: those that take longest


def plot_roofline(
    title: str, steps: list[dict[str, Any]], limits: dict[str, Any], out: Path
) -> None:
    """Draws every product and attention of `steps` (see `llmc bench --profile --json`) to `out`.

    x: operations per byte of weights and KV; y: operations a second.
    """
    figure, axes = plt.subplots(figsize=(8, 5))
    points = []
    for step in steps:
        kernels = [k for k in step["kernels"] if k["operations"] and k["memory_bytes"]]
        xs = [k["operations"] / k["memory_bytes"] for k in kernels]
        ys = [k["operations"] / k["us_per_call"] / 1e3 for k in kernels]  # Gop/s
        sizes = [20 + 400 * k["ms_per_step"] / step["kernels_ms"] for k in kernels]
        label = f"{step['entry_point']}, T = {step['num_tokens']}"
        axes.scatter(xs, ys, sizes, alpha=0.6, label=label)
        for x, y, kernel in list(zip(xs, ys, kernels, strict=True))[:_LABELLED]:
            axes.annotate(kernel["name"], (x, y), fontsize=7)
        points += xs
    if points:
        _draw_ceilings(axes, min(points) / 2, max(points) * 2, limits)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop/s", title=title)
    axes.legend(fontsize=7, title="area: share of the step's time", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def _draw_ceilings(axes: Any, left: float, right: float, limits: dict[str, Any]) -> None:  # noqa: ANN401
    slope = limits["memory_bytes_per_s"] / 1e9
    peaks = {name: value / 1e9 for name, value in limits["operations_per_s"].items()}
    top = max(peaks.values())
    ridge = top / slope
    axes.plot([left, min(right, ridge)], [left * slope, min(right, ridge) * slope], color="black")
    for name, peak in peaks.items():
        axes.plot([peak / slope, max(right, ridge)], [peak, peak], color="black", linewidth=0.8)
        axes.annotate(
            f"{name} peak", (max(right, ridge), peak), ha="right", va="bottom", fontsize=7
        )
    axes.annotate("memory", (left, left * slope), va="bottom", fontsize=7)


def plot_points(
    title: str,
    series: dict[str, list[tuple[float, float, str]]],
    bandwidth: float,
    peak: float,
    out: Path,
) -> None:
    """Draws (operations per byte, operations a second, name) of each series under two ceilings."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, points in series.items():
        axes.scatter([x for x, _, _ in points], [y / 1e9 for _, y, _ in points], label=label)
        for x, y, name in points:
            axes.annotate(name, (x, y / 1e9), fontsize=7)
    xs = [x for points in series.values() for x, _, _ in points]
    limits = {"memory_bytes_per_s": bandwidth, "operations_per_s": {"matrix": peak}}
    _draw_ceilings(axes, min(xs) / 2, max(xs) * 2, limits)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop/s", title=title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
