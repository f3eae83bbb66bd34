"""Figures; matplotlib is the optional extra `report`."""

from __future__ import annotations

from collections.abc import Mapping
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


__all__ = ["STARTS", "plot_quickstart"]
