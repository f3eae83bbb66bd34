"""Figures; matplotlib is the optional extra `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


STARTS = {
    "cbd": ("CBD: both anchors, interpolated", "#0b6e4f", "o"),
    "expand": ("small anchor expanded", "#c8553d", "^"),
    "cut": ("large anchor cut", "#3d5a80", "s"),
    "random": ("random", "#888888", "x"),
}


def plot_quickstart(report: Mapping[str, Any], path: str | Path) -> None:
    """
    Bits per byte against size, at step zero and after recovery, one line per start, the anchors as stars.

    Random starts lie far above; their range is written into the panel so that the others can be told apart.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    targets, anchors = report["targets"], report["chain"]["anchors"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for panel, (phase, title) in zip(
        panels, (("step0", "no training"), ("recovered", "after the recovery budget")), strict=True
    ):
        sizes = [target["n_params"] / 1e6 for target in targets]
        for start, (label, color, marker) in STARTS.items():
            values = [target["bits_per_byte"][phase][start] for target in targets]
            if start == "random":
                note = f"random: {min(values):.2f} to {max(values):.2f}, off the scale"
                panel.text(0.02, 0.98, note, transform=panel.transAxes, va="top", color=color, fontsize=9)
            else:
                panel.plot(sizes, values, color=color, marker=marker, label=label)
        panel.plot(
            [anchor["n_params"] / 1e6 for anchor in anchors],
            [anchor["bits_per_byte"] for anchor in anchors],
            linestyle="none",
            marker="*",
            markersize=12,
            color="#222222",
            label="anchors of the chain",
        )
        panel.set(title=title, xlabel="parameters (million)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out bits per byte (lower is better)")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high + 0.12 * (high - low))
    panels[1].legend(loc="upper right", fontsize=8)
    figure.suptitle(f"Targets made from the chain of {report['source']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_plan(models: Sequence[Mapping[str, Any]], anchors: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Layers and width against size, a mark for every model, the anchors as stars with their names.

    Args:
        models (`Sequence[Mapping]`): each with `n_params`, `layers` and `hidden`.
        anchors (`Sequence[Mapping]`): the same, and `name`.
        path (`str` or `Path`): the file; its ending decides the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    low, high = (limit(anchor["n_params"] for anchor in anchors) for limit in (min, max))
    figure, panels = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for panel, (dimension, label) in zip(panels, (("layers", "layers"), ("hidden", "hidden size")), strict=True):
        for rows, style in (
            (models, {"marker": "o", "markersize": 4, "color": "#0b6e4f", "label": "planned sizes"}),
            (anchors, {"marker": "*", "markersize": 13, "color": "#222222", "label": "anchors"}),
        ):
            sizes, values = [row["n_params"] for row in rows], [row[dimension] for row in rows]
            panel.plot(sizes, values, linestyle="none", **style)
        panel.set_ylabel(label)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    for anchor in anchors:
        # Up and to the left of an anchor there is nothing; only the smallest one stands at the edge.
        side = "center" if anchor["n_params"] == low else "right"
        place = (anchor["n_params"], anchor["layers"])
        panels[0].annotate(anchor["name"], place, xytext=(0, 9), textcoords="offset points", ha=side, fontsize=9)
    panels[0].margins(y=0.15)
    panels[0].legend(loc="lower right", fontsize=8)
    panels[1].set_xscale("log")
    # Powers of ten are too far apart for a chain: a few round numbers between its ends instead.
    ticks = [low * (high / low) ** (step / 6) for step in range(7)] if high > low else [low]
    digits = 2 if high > 2 * low else 3
    panels[1].set_xticks(sorted({float(f"{tick:.{digits}g}") for tick in ticks}))
    panels[1].xaxis.set_minor_locator(NullLocator())
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1e6:g}"))
    panels[1].set_xlabel("parameters (million, logarithmic)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


__all__ = ["STARTS", "plot_plan", "plot_quickstart"]
