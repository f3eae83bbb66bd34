"""
Seconds and peak memory of `CBDModel.from_chain`, on checkpoints of full shape with random weights.

    python benchmarks/from_chain.py [--json] [--directory DIR]

GPT-2 B (124M) and M (355M) are made once in the directory; the 138M target is then built from them in a fresh process,
so that the peak is its own. Compare it with the target's own bytes.
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


def run_case(chain: Path) -> dict[str, float | int]:
    """Time the target in this process; imports are not counted in the seconds, but are in the peak."""
    from cbd_hf import CBDModel, DistillationChain

    loaded = DistillationChain.from_pretrained(chain)
    started = time.perf_counter()
    parameters = CBDModel.from_chain(loaded, n_params=138e6).num_parameters()
    return {
        "parameters": parameters,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_gib": round(peak_gib(), 2),
        "target_gib": round(parameters * 4 / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are kept; by default a temporary one")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(run_case(args.directory / "chain")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        if not (directory / "chain").exists():
            make_chain(directory)
        command = [sys.executable, __file__, "--measure", "--directory", str(directory)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = json.loads(output.splitlines()[-1])
    print(
        json.dumps(row)
        if args.json
        else f"GPT-2 {row['parameters']:,} parameters in {row['seconds']:.2f} s, peak {row['peak_gib']:.2f} GiB with "
        f"python and torch; the target is {row['target_gib']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
