"""
Seconds and peak memory of `CBDModel.from_chain`, on checkpoints of full shape with random weights.

    python benchmarks/from_chain.py [--json] [--directory DIR]

Each case runs in a fresh process, so that the peak is its own: GPT-2 B (124M) and M (355M) are made once in the
directory, then the 138M target is built from them, and, for comparison, both anchors are loaded the plain way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make_chain(directory: Path) -> None:
    """A chain of random GPT-2 M and B checkpoints in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from cbd_hf import DistillationChain

    torch.manual_seed(0)
    anchors = []
    for name, shape in (("M", (24, 1024, 16)), ("B", (12, 768, 12))):
        layers, hidden, heads = shape
        AutoModelForCausalLM.from_config(GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads)).save_pretrained(
            directory / name
        )
        anchors.append(str(directory / name))
    DistillationChain.from_anchors(anchors, directory / "chain")


def peak_gib() -> float:
    """Largest resident memory of this program so far, in GiB. Linux; ru_maxrss would start at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def run_case(case: str, chain: Path) -> dict[str, float | str | int]:
    """Time one case in this process; imports are not counted in the seconds, but are in the peak."""
    from transformers import AutoModelForCausalLM

    from cbd_hf import CBDModel, DistillationChain

    loaded = DistillationChain.from_pretrained(chain)
    before, started = peak_gib(), time.perf_counter()
    if case == "from_chain 138M":
        parameters = CBDModel.from_chain(loaded, n_params=138e6).num_parameters()
    else:
        models = [AutoModelForCausalLM.from_pretrained(anchor.path) for anchor in loaded]
        parameters = sum(model.num_parameters() for model in models)
    seconds = time.perf_counter() - started
    return {
        "case": case,
        "parameters": parameters,
        "seconds": round(seconds, 2),
        "peak_gib": round(peak_gib(), 2),
        "peak_above_imports_gib": round(peak_gib() - before, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON per case")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are kept; by default a temporary one")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.directory / "chain")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        if not (directory / "chain").exists():
            make_chain(directory)
        for case in ("from_chain 138M", "load both anchors"):
            output = subprocess.run(
                [sys.executable, __file__, "--case", case, "--directory", str(directory)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            row = json.loads(output.splitlines()[-1])
            print(
                json.dumps(row)
                if args.json
                else f"{row['case']:20} {row['parameters']:>13,} parameters  {row['seconds']:6.2f} s  "
                f"peak {row['peak_gib']:.2f} GiB ({row['peak_above_imports_gib']:.2f} above the imports)"
            )


if __name__ == "__main__":
    main()
