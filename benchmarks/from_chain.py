"""
Seconds and peak memory of `CBDModel.from_chain` against reading its input, and against the naive way.

    python benchmarks/from_chain.py [--json] [--cases gpt2-138m ...] [--repeats 3] [--warm] [--directory DIR]

Checkpoints of full shape with random weights are made once in the directory (20 GB for all cases). Every run is a
fresh process; the three ways take turns:

* read:   the anchors' tensors that the target is made from, read with safetensors and copied into memory;
* ours:   `CBDModel.from_chain`;
* saved:  `CBDModel.save_from_chain`, which writes shards of at most 256 MB and never holds the target;
* naive:  both anchors through `from_pretrained`, then mixed in float32, tensor by tensor.

Times are medians, without imports and without opening the chain; peaks are the largest resident memory above that of
the process after its imports. The files are dropped from the page cache before each run, so that they come from the
disk; with --warm they are read into it instead, and time/read then compares with copying memory.
`peak_over_target` is measured against the bytes of the target's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def gpt2(layers: int, hidden: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 64)


def pythia(layers: int, hidden: int) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        vocab_size=50304,
        tie_word_embeddings=False,
    )


def qwen3(hidden: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        num_hidden_layers=28,
        hidden_size=hidden,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3 * hidden,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    )


# Case -> anchors (name, config), their dtype, the target's size.
CASES: dict[str, tuple[tuple[tuple[str, Callable[[], Any]], ...], str, float]] = {
    "gpt2-138m": ((("gpt2-b", lambda: gpt2(12, 768)), ("gpt2-m", lambda: gpt2(24, 1024))), "float32", 138e6),
    "gpt2-537m": ((("gpt2-m", lambda: gpt2(24, 1024)), ("gpt2-l", lambda: gpt2(36, 1280))), "float32", 537e6),
    "pythia-114m": ((("pythia-70m", lambda: pythia(6, 512)), ("pythia-160m", lambda: pythia(12, 768))), "float32",
                    113_625_600),
    "qwen3-1.1b": ((("qwen3-0.6b", lambda: qwen3(1024)), ("qwen3-1.7b", lambda: qwen3(2048))), "bfloat16", 1.1e9),
}  # fmt: skip


def make_chain(case: str, directory: Path) -> Path:
    """The case's chain of random checkpoints, made if it is not there."""
    import torch
    from transformers import AutoModelForCausalLM

    from cbd_hf import DistillationChain

    anchors, dtype, _ = CASES[case]
    for name, config in anchors:
        if not (directory / name / "config.json").exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config(), dtype=dtype)
            model.save_pretrained(directory / name)
            del model
    chain = directory / f"{case}-chain"
    if not chain.exists():
        DistillationChain.from_anchors([str(directory / name) for name, _ in reversed(anchors)], chain)
    return chain


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` (the peak) of this process in bytes. Linux; ru_maxrss would start at the parent's."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def weight_files(chain: Path) -> list[Path]:
    """The anchors' weight files, wherever the chain's links lead."""
    return sorted({path.resolve() for path in chain.rglob("*.safetensors")})


def prepare_cache(chain: Path, cold: bool) -> None:
    """Bring the anchors' files into the page cache, or drop them from it."""
    for path in weight_files(chain):
        with open(path, "rb") as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def read(used: dict[Path, list[str]]) -> None:
    """Copy every tensor that the target is made from into memory."""
    from safetensors import safe_open

    for path, names in used.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                file.get_tensor(name).clone()


def used_tensors(loaded: Any, n_params: float) -> dict[Path, list[str]]:
    """File -> the tensors that the target needs of it."""
    from cbd_hf.layout import weights_of
    from cbd_hf.targets import Wish, open_target

    used: dict[Path, set[str]] = {}
    with open_target(loaded, Wish(n_params=n_params)) as target:
        assert target.source is not None
        for name in weights_of(target.outline()):
            for trans in target.source.trans:
                for path, stored in trans.reader.stored(trans.source_name(name)):
                    used.setdefault(path, set()).add(stored)
    return {path: sorted(names) for path, names in used.items()}


def ours(loaded: Any, n_params: float) -> Any:
    from cbd_hf import CBDModel

    return CBDModel.from_chain(loaded, n_params=n_params)


def saved(loaded: Any, n_params: float) -> Any:
    """Straight into a directory; returned without weights, for its size."""
    from cbd_hf import CBDModel
    from cbd_hf.layout import meta_model

    with tempfile.TemporaryDirectory(dir=loaded.path.parent) as directory:
        (config,) = CBDModel.save_from_chain(loaded, n_params, Path(directory) / "target", max_shard_size="256MB")
    return meta_model(config)


def naive(loaded: Any, n_params: float) -> Any:
    """What one would write: load both, mix, copy into a new model."""
    import torch
    from transformers import AutoModelForCausalLM

    from cbd_hf.alphas import by_group
    from cbd_hf.families import get_family
    from cbd_hf.layout import shape_of
    from cbd_hf.sizing import corresponding_layers, default_alpha, plan_config
    from cbd_hf.transforms import StateDict, Trans

    pair = loaded.adjacent(n_params)
    models = [AutoModelForCausalLM.from_pretrained(anchor.path) for anchor in pair]
    small, large = (model.config for model in models)
    config = plan_config(small, large, n_params)
    model = AutoModelForCausalLM.from_config(config, dtype=models[0].dtype)
    family = get_family(small)
    target = shape_of(config, family)
    maps = corresponding_layers(small, large, target.layers, family)
    sides = [
        Trans(StateDict(dict(anchor.named_parameters())), family, shape_of(anchor.config, family), target, layers)
        for anchor, layers in zip(models, maps, strict=True)
    ]
    alpha = by_group(None, default_alpha(pair.small.n_params, pair.large.n_params, model.num_parameters()))["ffn"]
    with torch.no_grad():
        mixed = {}
        for name, _ in model.named_parameters():
            from_large = sides[1].tensor(name)
            mixed[name] = alpha * sides[0].tensor(name, fill=from_large) + (1 - alpha) * from_large
        model.load_state_dict(mixed, strict=False)
    return model


MAKERS: dict[str, Callable[[Any, float], Any]] = {"ours": ours, "saved": saved, "naive": naive}
WAYS = ("read", *MAKERS)


def measure(case: str, way: str, directory: Path, cold: bool) -> dict[str, float | int]:
    """One run in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cbd_hf import DistillationChain

    _, dtype, n_params = CASES[case]
    chain = directory / f"{case}-chain"
    loaded = DistillationChain.from_pretrained(chain)
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(loaded.anchors[0].path))]  # its import
    used = used_tensors(loaded, n_params) if way == "read" else {}
    prepare_cache(chain, cold)
    before = resident("VmRSS")
    started = time.perf_counter()
    if way == "read":
        read(used)
        model = None
    else:
        model = MAKERS[way](loaded, n_params)
    seconds = time.perf_counter() - started
    result: dict[str, float | int] = {"seconds": seconds, "peak": resident("VmHWM") - before}
    if model is not None:
        result["parameters"] = model.num_parameters()
        result["bytes"] = model.num_parameters() * getattr(torch, dtype).itemsize
    return result


def run_case(case: str, directory: Path, repeats: int, cold: bool) -> dict[str, Any]:
    """Medians of every way, each run in a process of its own."""
    make_chain(case, directory)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", way, "--cases", case, "--directory", str(directory)]
            output = subprocess.run(
                [*command, *([] if cold else ["--warm"])], check=True, capture_output=True, text=True
            )
            runs[way].append(json.loads(output.stdout.splitlines()[-1]))
    seconds = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
    peak = {way: statistics.median(run["peak"] for run in found) for way, found in runs.items()}
    size = runs["ours"][0]["bytes"]
    return {
        "case": case,
        "time_over_read": round(seconds["ours"] / seconds["read"], 3),
        "peak_over_target": round(peak["ours"] / size, 3),
        "time_over_naive": round(seconds["ours"] / seconds["naive"], 3),
        "peak_over_naive": round(peak["ours"] / peak["naive"], 3),
        "saved_time_over_read": round(seconds["saved"] / seconds["read"], 3),
        "saved_peak_over_target": round(peak["saved"] / size, 3),
        "parameters": runs["ours"][0]["parameters"],
        "target_gib": round(size / 2**30, 3),
        "seconds": {way: round(value, 3) for way, value in seconds.items()},
        "peak_gib": {way: round(value / 2**30, 3) for way, value in peak.items()},
        "cold": cold,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="by default all")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each way of a case (default 3)")
    parser.add_argument("--warm", action="store_true", help="files in the page cache instead of on the disk")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are kept; by default a temporary one")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.cases[0], args.measure, args.directory, not args.warm)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        if not args.json:
            print(f"{'case':<12} {'parameters':>13}  time/read  peak/target  time/naive  peak/naive   seconds")
        for case in args.cases:
            row = run_case(case, directory, args.repeats, not args.warm)
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            ratios = ("time_over_read", "peak_over_target", "time_over_naive", "peak_over_naive")
            columns = "  ".join(
                f"{row[name]:>{width}.2f}" for name, width in zip(ratios, (9, 11, 10, 10), strict=True)
            )
            print(f"{case:<12} {row['parameters']:>13,}  {columns}   {row['seconds']}", flush=True)


if __name__ == "__main__":
    main()
