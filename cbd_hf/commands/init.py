"""`cbd init`: models of any size from a chain, saved as ordinary checkpoints."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf.alphas import AUTO, check_alpha
from cbd_hf.commands.arguments import chain_first, parse_options
from cbd_hf.initializers import INITIALIZERS, RANDOM
from cbd_hf.sizing import parse_size, size_name


@dataclass
class InitArguments:
    """
    Which models to make. Give `n_params`, one size or several, or `target_config`.

    Args:
        chain (`str`): directory or Hub id of a chain.
        output_dir (`str`): where to save; with several sizes, a folder for each in it.
        n_params (`str`, *optional*): sizes such as `138e6` or `138M`, separated by commas.
    """

    chain: str = field(metadata={"help": "Directory or Hub id of a chain; may stand first, without --chain."})
    output_dir: str = field(
        metadata={"help": "Where to save the model; with several sizes, each in a folder of its own in it."}
    )
    n_params: str | None = field(
        default=None, metadata={"help": "Wanted parameters, such as 138e6 or 138M; several separated by commas."}
    )
    target_config: str | None = field(
        default=None,
        metadata={
            "help": "Config of the wanted model, a config.json or the directory that holds it, instead of n_params. "
            "--config means the same unless its value is a .yaml recipe."
        },
    )
    alpha: str | None = field(
        default=None,
        metadata={
            "help": "Weight of the smaller anchor, in [0, 1]; by default from the sizes. By kind of part: "
            "embeddings=0.9,attention=0.5,ffn=0.5,norms=0.7. auto searches with forward passes on --calibration."
        },
    )
    initializer: str = field(
        default="chain",
        metadata={
            "help": "chain interpolates; the others are there for comparison (docs/initializers.md).",
            "choices": sorted([*INITIALIZERS, RANDOM]),
        },
    )
    expansion: str = field(
        default="identity",
        metadata={
            "help": "What stands in layers that an anchor lacks: identity keeps its function, replicate copies the "
            "neighbour (the paper's).",
            "choices": ["identity", "replicate"],
        },
    )
    selection: str = field(
        default="first",
        metadata={
            "help": "Which channels, heads and units of the larger anchor stay: the first, evenly spaced ones "
            "(stride), or the most important on --calibration.",
            "choices": ["first", "stride", "importance"],
        },
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "Text file for what is measured on text; its first 16 x 512 tokens are used."},
    )
    max_shard_size: str = field(
        default="1GB",
        metadata={"help": "Most of a weight file, such as 500MB; as much is held in memory, by all models together."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights; by default that of the anchors.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    seed: int = field(default=0, metadata={"help": "For what an initializer draws at random."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a chain on the Hub."})

    def __post_init__(self) -> None:
        if (self.n_params is None) == (self.target_config is None):
            raise ValueError("Give either n_params, such as 138e6, or target_config, and not both.")
        check_alpha(parse_alpha(self.alpha))

    @property
    def sizes(self) -> list[float]:
        """The wanted numbers of parameters; empty with `target_config`."""
        # A YAML file may give a number or a list.
        given = self.n_params if isinstance(self.n_params, list) else str(self.n_params or "").split(",")
        return [parse_size(str(size)) for size in given if str(size).strip()]


def parse_alpha(text: str | float | None) -> float | dict[str, float] | str | None:
    """
    An alpha as written on the command line: `0.3`, `auto`, or `attention=0.5,ffn=0.3`.

    Raises:
        ValueError: it is none of these.
    """
    if text is None or text == AUTO or isinstance(text, int | float):
        return text
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise ValueError(
            f"alpha={text!r} is not understood; write 0.3, auto, or groups such as attention=0.5,ffn=0.3."
        ) from None


def run(args: InitArguments) -> list[dict[str, Any]]:
    """
    Make the models in one pass over the anchors, straight into their directories, and print a table.

    Each model appears in its directory in one step, when it is complete; none is ever in memory.

    Returns:
        `list[dict[str, Any]]`: one row per model: `n_params`, `layers`, `hidden_size`, `heads`, `alpha`, `seconds`
        (each model's share of the time), `bytes` (on disk) and `directory`.

    Raises:
        FileExistsError: an output directory holds something; nothing was written.
        ValueError: a size outside the chain, or options that do not go together.
    """
    from cbd_hf._files import check_output_directory
    from cbd_hf.chain import DistillationChain
    from cbd_hf.modeling import CBDModel
    from cbd_hf.report.tables import format_table

    root = Path(args.output_dir)
    sizes = args.sizes
    names = [size_name(size) for size in sizes]
    if len(set(names)) < len(names):
        raise ValueError(f"n_params names a size twice: {', '.join(names)}.")
    directories = [root / name for name in names] if len(sizes) > 1 else [root]
    for directory in directories:
        check_output_directory(directory)
    config = _load_config(args.target_config) if args.target_config is not None else None
    chain = DistillationChain.from_pretrained(args.chain, revision=args.revision)
    options: dict[str, Any] = {
        "config": config,
        "alpha": parse_alpha(args.alpha),
        "initializer": args.initializer,
        "expansion": args.expansion,
        "selection": args.selection,
        "dtype": args.dtype,
        "seed": args.seed,
        "calibration": _calibration(args.calibration),
    }
    started = time.perf_counter()
    configs = CBDModel.save_from_chain(
        chain, sizes or None, directories, max_shard_size=args.max_shard_size, **options
    )
    seconds = (time.perf_counter() - started) / len(configs)
    rows = [_row(config, directory, seconds) for config, directory in zip(configs, directories, strict=True)]
    print(format_table([_shown(row) for row in rows]))
    return rows


def _calibration(path: str | None) -> str | None:
    if path is None:
        return None
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"calibration {path} is not a file; give a text file.")
    return found.read_text(encoding="utf-8")


def _load_config(path: str) -> Any:
    from transformers import AutoConfig

    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"target_config {path} does not exist; give a config.json or its directory.")
    return AutoConfig.from_pretrained(found, trust_remote_code=False)


def _row(config: Any, directory: Path, seconds: float) -> dict[str, Any]:
    from cbd_hf.families import get_family
    from cbd_hf.layout import count_parameters, shape_of

    record = config.cbd
    shape = shape_of(config, get_family(config))
    return {
        "n_params": record.get("n_params") or count_parameters(config),
        "layers": shape.layers,
        "hidden_size": shape.hidden,
        "heads": shape.heads,
        "alpha": record.get("alpha"),
        "start": record.get("initializer", f"anchor {record.get('anchor')}"),
        "seconds": round(seconds, 3),
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "directory": str(directory),
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    formats = {"n_params": ",", "bytes": ",", "alpha": ".3f", "seconds": ".2f"}
    return {
        name: "-" if value is None else str(value) if isinstance(value, dict) else format(value, formats.get(name, ""))
        for name, value in row.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Make models of one or several sizes from a chain, in seconds."""
    import sys

    (args,) = parse_options(
        InitArguments,
        chain_first(sys.argv[1:] if argv is None else argv, "--target_config"),
        lists=["n_params"],
        prog="cbd init",
        usage="cbd init CHAIN --n_params 138e6 --output_dir DIR ...",
        description=main.__doc__,
    )
    run(args)


__all__ = ["InitArguments", "main", "parse_alpha", "run"]
