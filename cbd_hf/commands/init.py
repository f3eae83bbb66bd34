"""`cbd init`: models of any size from a chain, saved as ordinary checkpoints."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


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
    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the smaller anchor, in [0, 1]; by default from the sizes."},
    )
    initializer: str = field(
        default="chain",
        metadata={
            "help": "chain interpolates; for comparison expand (smaller anchor alone), cut (larger alone), random.",
            "choices": ["chain", "cut", "expand", "random"],
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
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha={self.alpha} is outside [0, 1]. It weighs the smaller anchor: 1 takes it alone, 0 the larger."
            )

    @property
    def sizes(self) -> list[float]:
        """The wanted numbers of parameters; empty with `target_config`."""
        # A YAML file may give a number or a list.
        given = self.n_params if isinstance(self.n_params, list) else str(self.n_params or "").split(",")
        return [parse_size(str(size)) for size in given if str(size).strip()]


def parse_size(text: str) -> float:
    """
    A number of parameters: `138e6`, `138_000_000`, `138M`, `1.7B`, `250k`.

    Raises:
        ValueError: it is not a number.
    """
    number, unit = text.strip(), 1.0
    if number[-1:].upper() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].upper()]
    try:
        return float(number) * unit
    except ValueError:
        raise ValueError(f"n_params={text!r} is not a number of parameters; write 138e6 or 138M.") from None


def size_name(n_params: float) -> str:
    """The folder's name for a wanted size: `138M`, `1.7B`, `292.8k`."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n_params >= factor:
            return f"{n_params / factor:.6g}{unit}"
    return f"{n_params:g}"


def run(args: InitArguments) -> list[dict[str, Any]]:
    """
    Make the models, save them, and print a table.

    Each model appears in its directory in one step, when it is complete.

    Returns:
        `list[dict[str, Any]]`: one row per model: `n_params`, `layers`, `hidden_size`, `heads`, `alpha`, `seconds`
        (of the initialisation), `bytes` (on disk) and `directory`.

    Raises:
        FileExistsError: an output directory holds something; nothing was written.
        ValueError: a size outside the chain, or options that do not go together.
    """
    from cbd_hf._files import check_output_directory
    from cbd_hf.chain import DistillationChain
    from cbd_hf.report.tables import format_table
    from cbd_hf.sizing import plan_config

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
    for size in sizes:  # every size is found possible before the first one is made
        small, large = chain.adjacent(size)
        plan_config(small.config, large.config, size)
    wanted: list[float | None] = [*sizes] or [None]
    rows = [_make(args, chain, size, config, directory) for directory, size in zip(directories, wanted, strict=True)]
    print(format_table([_shown(row) for row in rows]))
    return rows


def _load_config(path: str) -> Any:
    from transformers import AutoConfig

    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"target_config {path} does not exist; give a config.json or its directory.")
    return AutoConfig.from_pretrained(found)


def _make(args: InitArguments, chain: Any, size: float | None, config: Any, directory: Path) -> dict[str, Any]:
    from cbd_hf._files import commit_directory, staging_directory
    from cbd_hf.modeling import CBDModel

    started = time.perf_counter()
    model: Any = CBDModel.from_chain(
        chain,
        size,
        config=config,
        alpha=args.alpha,
        initializer=args.initializer,
        expansion=args.expansion,  # type: ignore[arg-type]  # checked by the parser and by from_chain
        dtype=args.dtype,
        seed=args.seed,
    )
    seconds = time.perf_counter() - started
    with staging_directory(directory.resolve()) as staging:
        model.save_pretrained(staging)
        commit_directory(staging, directory)
    record = model.config.cbd
    return {
        "n_params": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "heads": model.config.num_attention_heads,
        "alpha": record.get("alpha"),
        "start": record.get("initializer", f"anchor {record.get('anchor')}"),
        "seconds": round(seconds, 3),
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "directory": str(directory),
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    formats = {"n_params": ",", "bytes": ",", "alpha": ".3f", "seconds": ".2f"}
    return {name: "-" if value is None else format(value, formats.get(name, "")) for name, value in row.items()}


def _arguments(argv: Sequence[str]) -> list[str]:
    """The chain may stand first without its name, and `--config` may name a model's config instead of a recipe."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--chain")
    for index, (option, value) in enumerate(zip(arguments, arguments[1:], strict=False)):
        if option == "--config" and not value.endswith((".yaml", ".yml")):
            arguments[index] = "--target_config"
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Make models of one or several sizes from a chain, in seconds."""
    import sys

    from trl import TrlParser

    arguments: Any = InitArguments  # the annotation of TrlParser accepts no class
    parser = TrlParser(
        arguments,
        prog="cbd init",
        usage="cbd init CHAIN --n_params 138e6 --output_dir DIR ...",
        description=main.__doc__,
    )
    (args,) = parser.parse_args_and_config(_arguments(sys.argv[1:] if argv is None else argv))
    # One process is enough: the others of an `accelerate launch` have nothing to do.
    if int(os.environ.get("RANK", "0")) == 0:
        run(args)


__all__ = ["InitArguments", "main", "parse_size", "run", "size_name"]
