"""
The quickstart over several seeds: the table of README.md.

    for seed in 42 43 44; do
        cbd quickstart --config recipes/configs/quickstart.yaml --seed $seed --output_dir runs/qs$seed
    done
    python benchmarks/quickstart_seeds.py runs/qs42 runs/qs43 runs/qs44

A seed decides which documents are held out and the order of the others, so every seed has a chain of its own, and bits
per byte of its own texts. Starts are therefore compared within a seed: the last column is CBD's bits per byte less
those of the best other start, for each. Means and standard deviations over the seeds; below 0 CBD is ahead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any


STARTS = {"cbd": "CBD", "expand": "small expanded", "cut": "large cut", "random": "random"}
STAGES = {"step0": "no training", "recovered": "recovered"}


def table(reports: list[dict[str, Any]]) -> str:
    """
    Markdown of the targets of several quickstarts.

    Raises:
        ValueError: the reports are of different targets or settings.
    """
    settings = [
        (
            report["source"],
            report["recovery"],
            [(t["n_params"], t["layers"], t["hidden_size"]) for t in report["targets"]],
        )
        for report in reports
    ]
    if any(other != settings[0] for other in settings):
        raise ValueError("These quickstarts differ in more than their seed.")
    lines = [
        f"| target | layers x width | | {' | '.join(STARTS.values())} | CBD less the best other, by seed |",
        "|---|---|---|" + "---|" * (len(STARTS) + 1),
    ]
    for index, target in enumerate(reports[0]["targets"]):
        for stage, title in STAGES.items():
            scores = [report["targets"][index]["bits_per_byte"][stage] for report in reports]
            leads = [own["cbd"] - min(value for name, value in own.items() if name != "cbd") for own in scores]
            cells = [
                f"{mean(values):.3f} ± {stdev(values):.3f}" for values in ([own[s] for own in scores] for s in STARTS)
            ]
            first = [f"{target['n_params']:,}", f"{target['layers']} x {target['hidden_size']}"]
            row = [
                *(first if stage == "step0" else ["", ""]),
                title,
                *cells,
                ", ".join(f"{lead:+.3f}" for lead in leads),
            ]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of cbd quickstart, two or more")
    runs = parser.parse_args().runs
    if len(runs) < 2:
        parser.error(f"{len(runs)} run has no spread: give two or more.")
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    print(table(reports))
    print(f"\nSeeds {', '.join(str(report['environment']['seed']) for report in reports)}.")


if __name__ == "__main__":
    main()
