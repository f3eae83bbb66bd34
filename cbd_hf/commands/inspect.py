"""`cbd inspect`: a readable table of a chain."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from cbd_hf.chain import DistillationChain


def describe_chain(chain: DistillationChain) -> list[dict[str, Any]]:
    """One row per anchor, largest first: size, shape, provenance and measured loss."""
    rows = []
    for anchor in chain:
        config, stage = anchor.config.get_text_config(), anchor.stage or {}
        metrics = stage.get("metrics") or {}
        objective = stage.get("objective") or {}
        rows.append(
            {
                "name": anchor.name,
                "n_params": anchor.n_params,
                # A family may lack any of these: Mamba has no heads.
                "layers": getattr(config, "num_hidden_layers", None),
                "hidden_size": getattr(config, "hidden_size", None),
                "heads": getattr(config, "num_attention_heads", None),
                "teacher": stage.get("teacher"),
                "objective": objective.get("name") if isinstance(objective, dict) else objective,
                "steps": stage.get("steps"),
                "tokens": stage.get("tokens"),
                "bits_per_byte_before": metrics.get("bits_per_byte_before"),
                "bits_per_byte": metrics.get("bits_per_byte_after", chain.metadata.get("source_bits_per_byte"))
                if stage
                else chain.metadata.get("source_bits_per_byte"),
            }
        )
    return rows


def format_chain(chain: DistillationChain) -> str:
    """The rows of [`describe_chain`] as a table for a terminal."""
    from cbd_hf.report.tables import format_table
    from cbd_hf.sizing import format_size

    columns: dict[str, Callable[[Any], str]] = {
        "name": str,
        "n_params": lambda value: f"{value:,} ({format_size(value)})",
        "layers": str,
        "hidden_size": str,
        "heads": str,
        "teacher": str,
        "objective": str,
        "steps": str,
        "tokens": lambda value: f"{value:,}",
        "bits_per_byte_before": lambda value: f"{value:.4f}",
        "bits_per_byte": lambda value: f"{value:.4f}",
    }
    rows = [
        {name: "-" if row[name] is None else show(row[name]) for name, show in columns.items()}
        for row in describe_chain(chain)
    ]
    title = f"{chain.path}: {len(chain)} {chain.family['model_type']} anchors, basis {chain.basis}"
    return f"{title}\n{format_table(rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Show a chain's anchors, or what a teacher cache holds; with --verify, also check every file's hash."""
    parser = argparse.ArgumentParser(prog="cbd inspect", description=main.__doc__)
    parser.add_argument("chain", help="directory or Hub id of a chain, or directory of a teacher cache")
    parser.add_argument("--verify", action="store_true", help="check every weight file against its sha256")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--revision", help="of a chain on the Hub")
    args = parser.parse_args(argv)
    if (Path(args.chain) / "cache.json").is_file():
        _show_cache(Path(args.chain), args.verify, args.json)
        return

    from cbd_hf.chain import DistillationChain

    chain = DistillationChain.from_pretrained(
        args.chain, revision=args.revision, verify="full" if args.verify else "size"
    )
    if args.json:
        print(json.dumps(describe_chain(chain), indent=2))
        return
    print(format_chain(chain))
    if args.verify:
        print("All weight files match their sha256.")


def _show_cache(directory: Path, verify: bool, as_json: bool) -> None:
    import dataclasses

    from cbd_hf.commands.cache import format_manifest
    from cbd_hf.distillation.cache.manifest import CacheManifest

    manifest = CacheManifest.read(directory)
    manifest.check_shards(directory, "full" if verify else "size")
    print(json.dumps(dataclasses.asdict(manifest), indent=2) if as_json else format_manifest(manifest))
    if verify and not as_json:
        print("All files match their sha256.")


__all__ = ["describe_chain", "format_chain", "main"]
