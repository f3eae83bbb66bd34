"""
`cbd plan`: what each size of a chain would be, and with `--train` what distilling the chain takes, before any is made.
Only chain.json and configs are read.
"""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf.commands.arguments import chain_first, parse_options


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cbd_hf.planning import PlanAnchor, PlannedModel, Workload
    from cbd_hf.training_memory import StageMemory, TrainingWorkload

_FIGURES = (".png", ".pdf", ".svg")


@dataclass
class PlanArguments:
    """
    Which chain, which sizes, and what for. Give `chain`, or `configs` of models that might become one.

    Args:
        chain (`str`, *optional*): directory or Hub id of a chain.
        configs (`str`, *optional*): config files, or directories that hold one, separated by commas.
        n_params (`str`, *optional*): sizes such as `138e6` or `138M`, separated by commas; by default all.
        train (`bool`, *optional*, defaults to `False`): instead of sizes, the memory of each stage of distillation.
    """

    chain: str | None = field(
        default=None,
        metadata={
            "help": "Directory or Hub id of a chain; may stand first, without --chain. Its weights are neither read "
            "nor downloaded."
        },
    )
    configs: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a chain: the anchors' config.json files, or directories that hold one, in any order, "
            "separated by commas. --config means the same unless its value is a .yaml file with these options."
        },
    )
    n_params: str | None = field(
        default=None,
        metadata={
            "help": "Wanted parameters, such as 138e6 or 138M; several separated by commas. By default every size "
            "that the chain has."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of weights and cache in serving, and of the computation in training, where bfloat16 and "
            "float16 mean mixed precision with float32 master weights. By default that of the anchors' configs, "
            "float32 if they name none or several; with train on cuda bfloat16, as in a build.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    sequence_length: int = field(
        default=1024, metadata={"help": "Tokens of a sequence, prompt and answer together: for FLOPs and cache."}
    )
    batch_size: int = field(default=1, metadata={"help": "Sequences that are served at a time: for the cache."})
    every: int | None = field(
        default=None, metadata={"help": "Of all sizes show each so many-th, and the anchors. Not with n_params."}
    )
    limit: int | None = field(
        default=None,
        metadata={
            "help": "Of all sizes show at most so many: the anchors, the rest spread evenly over the logarithm of the "
            "size. Not with n_params."
        },
    )
    json: str | None = field(
        default=None,
        metadata={"help": "Write the plan to this JSON file, which must not exist; - prints it instead of the table."},
    )
    figure: str | None = field(
        default=None,
        metadata={
            "help": "Draw size against layers and width to this .png, .pdf or .svg file, which must not exist. Needs "
            "matplotlib."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a chain on the Hub."})
    train: bool = field(
        default=False,
        metadata={
            "help": "Instead of sizes: memory per device of every stage of distillation. Each anchor is the teacher "
            "of the next smaller one."
        },
    )
    source: str | None = field(
        default=None,
        metadata={
            "help": "With train: config file, or directory that holds one, of the model that the largest anchor is "
            "distilled from. By default the source that the chain's recipe names, if it is here."
        },
    )
    zero_stage: str = field(
        default="0,2,3",
        metadata={"help": "With train: 0 (one device, or DDP), 1, 2, 3, fsdp2; several separated by commas."},
    )
    world_size: str = field(
        default="8", metadata={"help": "With train: number of devices; several separated by commas."}
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "With train: sequences of a device's micro-batch."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "With train: micro-batches of a step."})
    max_length: int = field(default=1024, metadata={"help": "With train: tokens of a sequence, prompt and answer."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "With train: compute layers again in the backward pass, as builds do."}
    )
    teacher_placement: str = field(
        default="auto",
        metadata={
            "help": "With train: where the teacher lies, as in a build. auto: shard under ZeRO-3 and FSDP2, else "
            "replicate.",
            "choices": ["auto", "offload", "replicate", "shard"],
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "With train: float32, bfloat16, float16 or auto (that of its config); by default what the student "
            "computes in."
        },
    )
    device: str = field(
        default="cuda",
        metadata={
            "help": "With train: cpu or cuda. The loss has larger tiles on a GPU, and buffers count in full there.",
            "choices": ["cpu", "cuda"],
        },
    )

    def __post_init__(self) -> None:
        if (self.chain is None) == (self.configs is None):
            raise ValueError("Give either a chain, its directory or Hub id, or configs, and not both.")
        if self.n_params is not None and (self.every is not None or self.limit is not None):
            raise ValueError("every and limit thin out the list of all sizes; leave them out with n_params.")
        if self.train and (self.n_params is not None or self.every or self.limit or self.figure is not None):
            raise ValueError("train plans the stages between anchors: leave out n_params, every, limit and figure.")
        if self.source is not None and not self.train:
            raise ValueError("source is the first stage's teacher: it needs train.")
        if self.figure is not None and Path(self.figure).suffix not in _FIGURES:
            raise ValueError(f"figure={self.figure!r} must end in {', '.join(_FIGURES[:-1])} or {_FIGURES[-1]}.")
        for option in ("json", "figure"):
            path = getattr(self, option)
            if path not in (None, "-") and Path(path).exists():
                raise FileExistsError(f"{path} exists; choose another file for {option} or move it away.")

    @property
    def sizes(self) -> list[float]:
        """The wanted numbers of parameters; empty for all."""
        from cbd_hf.sizing import parse_size

        return [parse_size(size) for size in _listed(self.n_params)]


def _listed(given: Any) -> list[str]:
    """The items of a text with commas; a YAML file may give a number or a list."""
    items = given if isinstance(given, list) else str("" if given is None else given).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def run(args: PlanArguments) -> "list[PlannedModel] | list[StageMemory]":
    """
    Plan the sizes or stages, print a table, and write the JSON file and the figure that are asked for.

    Returns:
        `list[PlannedModel]`: one per size; wanted sizes in their order, all sizes from the smallest. With `train`
        `list[StageMemory]`: one per stage, world size and ZeRO stage, in this order.

    Raises:
        FileNotFoundError: no such chain or config.
        FileExistsError: an output file exists; nothing was written.
        ValueError: a size outside the chain, or anchors that do not belong together.
    """
    from cbd_hf.planning import Workload, plan_every_size, plan_sizes

    if args.train:
        return _run_training(args)
    if args.n_params is not None and not args.sizes:
        raise ValueError(f"n_params={args.n_params!r} names no size; write 138e6 or 138M, or leave it out for all.")
    if args.figure is not None:
        _check_matplotlib()
    # Refused for its numbers before a chain is looked for; the default type is only known with the anchors.
    workload = Workload(args.dtype or "float32", args.sequence_length, args.batch_size)
    anchors = _chain_anchors(args.chain, args.revision) if args.chain is not None else _config_anchors(args.configs)
    if args.dtype is None:
        workload = Workload(_common_dtype(anchors), args.sequence_length, args.batch_size)
    if args.sizes:
        models = plan_sizes(anchors, args.sizes, workload)
    else:
        models = plan_every_size(anchors, workload, every=args.every, limit=args.limit, progress=True)
    text = _json(models, anchors, workload)
    _show(text, format_plan(models, anchors, workload), args.json)
    if args.figure is not None:
        from dataclasses import asdict

        from cbd_hf.report.figures import plot_plan

        Path(args.figure).parent.mkdir(parents=True, exist_ok=True)
        plot_plan([asdict(model) for model in models], [_described(anchor) for anchor in anchors], args.figure)
    return models


def _show(text: str, table: str, json: str | None) -> None:
    from cbd_hf._files import atomic_write_text

    print(text if json == "-" else table)
    if json is not None and json != "-":
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(json, text + "\n")


def _run_training(args: PlanArguments) -> "list[StageMemory]":
    import json
    from dataclasses import asdict

    from cbd_hf.training_memory import TrainingWorkload, check_divisions, predict_chain

    stages, sizes = _listed(args.zero_stage), [_world_size(size) for size in _listed(args.world_size)]
    options = {
        name: getattr(args, name)
        for name in (
            "max_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "teacher_placement",
            "teacher_dtype",
            "device",
        )
    }
    check_divisions(stages, sizes, TrainingWorkload(args.dtype or "float32", **options))
    anchors = _chain_anchors(args.chain, args.revision) if args.chain is not None else _config_anchors(args.configs)
    # On a GPU builds compute in bfloat16 unless they are told otherwise.
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else _common_dtype(anchors))
    workload = TrainingWorkload(dtype, **options)
    configs = {anchor.name: anchor.config for anchor in reversed(anchors)}
    configs = _source(args, anchors[-1]) | configs
    memories = predict_chain(configs, workload, zero_stages=stages, world_sizes=sizes)
    plan = {"workload": asdict(workload), "stages": [asdict(memory) for memory in memories]}
    _show(json.dumps(plan, indent=2, allow_nan=False), format_training(memories, workload), args.json)
    return memories


def _world_size(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"world_size={text!r} must be a whole number of at least 1.")
    return int(text)


def _source(args: PlanArguments, largest: "PlanAnchor") -> "dict[str, PretrainedConfig]":
    """The teacher of the largest anchor: as given, or as the chain's recipe names it, if its config is here."""
    from transformers import AutoConfig

    from cbd_hf._hub import local_directory
    from cbd_hf._manifest import MANIFEST
    from cbd_hf.chain import DistillationChain
    from cbd_hf.families import check_same_family
    from cbd_hf.layout import count_parameters

    given = args.source
    if given is None and args.chain is not None:
        directory = local_directory(args.chain, what="Chain", allow_patterns=(MANIFEST,), revision=args.revision)
        recipe = DistillationChain.from_pretrained(directory, verify=None).metadata.get("recipe")
        named = recipe.get("source") if isinstance(recipe, dict) else None
        given = named if isinstance(named, str) and (Path(named) / "config.json").is_file() else None
    if given is None:
        return {}
    path = Path(given).expanduser()
    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise FileNotFoundError(f"source: {given} is neither a config file nor a directory with a config.json.")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if count_parameters(config) <= largest.n_params:
        if args.source is None:
            return {}  # the source is the largest anchor itself
        raise ValueError(f"source={given!r} is not larger than {largest.name}, the largest anchor.")
    check_same_family(largest.config, config)
    return {"source": config}


def _chain_anchors(name: str, revision: str | None) -> "list[PlanAnchor]":
    from cbd_hf._hub import local_directory
    from cbd_hf._manifest import ANCHORS, MANIFEST
    from cbd_hf.chain import DistillationChain
    from cbd_hf.planning import plan_anchors

    patterns = (MANIFEST, f"{ANCHORS}/*/config.json")
    directory = local_directory(name, what="Chain", allow_patterns=patterns, revision=revision)
    # Not verified: the weights need not be there.
    chain = DistillationChain.from_pretrained(directory, verify=None)
    for anchor in chain:
        if not (anchor.path / "config.json").is_file():
            raise FileNotFoundError(f"{anchor.path / 'config.json'} is missing; copy or download the chain again.")
    configs = {anchor.name: anchor.config for anchor in chain}
    anchors = plan_anchors(configs, {anchor.name: anchor.cut for anchor in chain})
    for found in anchors:
        recorded = chain[found.name].n_params
        if found.n_params != recorded:
            raise ValueError(
                f"{chain[found.name].path / 'config.json'} describes {found.n_params:,} parameters, but {MANIFEST} "
                f"records {recorded:,} for {found.name}. Copy or download the chain again."
            )
    return anchors


def _config_anchors(given: Any) -> "list[PlanAnchor]":
    from transformers import AutoConfig

    from cbd_hf.planning import plan_anchors

    configs = {}
    for name in _listed(given):
        path = Path(name).expanduser()
        if not (path / "config.json" if path.is_dir() else path).is_file():
            raise FileNotFoundError(f"configs: {name} is neither a config file nor a directory with a config.json.")
        # resolved: "." and "config.json" have a directory's name as well
        directory = path.resolve() if path.is_dir() else path.resolve().parent
        label = directory.name if path.is_dir() or path.name == "config.json" else path.stem
        configs[name if label in configs else label] = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return plan_anchors(configs)


def _common_dtype(anchors: "Sequence[PlanAnchor]") -> str:
    from cbd_hf.planning import BYTES_PER_VALUE

    named = {str(anchor.config.dtype).removeprefix("torch.") for anchor in anchors}
    (only,) = named if len(named) == 1 else ("float32",)
    return only if only in BYTES_PER_VALUE else "float32"


def _check_matplotlib() -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--figure needs matplotlib: pip install "cbd_hf[report]", or leave it out.')


def _described(anchor: "PlanAnchor") -> dict[str, Any]:
    shape = anchor.shape
    return {"name": anchor.name, "n_params": anchor.n_params, "layers": shape.layers, "hidden": shape.hidden}


def _json(models: "Sequence[PlannedModel]", anchors: "Sequence[PlanAnchor]", workload: "Workload") -> str:
    import json
    from dataclasses import asdict

    plan = {
        "workload": asdict(workload),
        "anchors": [_described(anchor) for anchor in anchors],
        "models": [asdict(model) for model in models],
    }
    return json.dumps(plan, indent=2, ensure_ascii=False, allow_nan=False)


def format_plan(models: "Sequence[PlannedModel]", anchors: "Sequence[PlanAnchor]", workload: "Workload") -> str:
    """The plan as a table for a terminal, with what its numbers are for."""
    from cbd_hf.planning import TRAINING_BYTES
    from cbd_hf.report.tables import format_table
    from cbd_hf.sizing import format_size

    listed = " < ".join(f"{anchor.name} ({format_size(anchor.n_params)})" for anchor in anchors)
    title = f"{anchors[0].config.model_type}: {listed}; {len(models)} sizes"
    notes = (
        f"FLOPs: per token, mean over {workload.sequence_length:,} tokens. serve: {workload.dtype} weights and the "
        f"cache of {workload.batch_size} x {workload.sequence_length:,} tokens.\n"
        f"train: weights, gradients and AdamW's moments, {TRAINING_BYTES[workload.dtype]} bytes per parameter "
        f"({'float32' if workload.dtype == 'float32' else f'{workload.dtype} over float32 weights'}). "
        "Activations are not included."
    )
    return f"{title}\n{format_table(_shown(models))}\n{notes}"


def _shown(models: "Sequence[PlannedModel]") -> list[dict[str, str]]:
    costs = {
        "forward": _column([model.forward_flops for model in models], 1000, _FLOPS),
        "fwd+bwd": _column([model.training_flops for model in models], 1000, _FLOPS),
        "serve": _column([model.serving_bytes for model in models], 1024, _BYTES),
        "train": _column([model.training_bytes for model in models], 1024, _BYTES),
    }
    rows = []
    for index, model in enumerate(models):
        row = {"n_params": f"{model.n_params:,}"}
        if model.wanted is not None:
            row |= {"wanted": f"{model.wanted:,.0f}", "off": f"{model.difference_percent:+.2f}%"}
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn"):
            row[name] = str(getattr(model, name))
        row |= {f"{name} {unit}": values[index] for name, (unit, values) in costs.items()}
        row["alpha"] = "-" if model.alpha is None else f"{model.alpha:.3f}"
        row["between"] = f"anchor {model.small}" if model.is_anchor else f"{model.small} .. {model.large}"
        rows.append(row)
    return rows


def format_training(memories: "Sequence[StageMemory]", workload: "TrainingWorkload") -> str:
    """Memory per device as a table for a terminal: one row per stage, world size and ZeRO stage."""
    from cbd_hf.report.tables import format_table

    columns = {
        "student": ("student_weights", "gathered_weights", "autocast_copies"),
        "gradients": ("gradients",),
        "optimizer": ("optimizer",),
        "teacher": ("teacher_weights", "teacher_activations"),
        "activations": ("activations",),
        "loss": ("loss",),
        "buffers": ("communication",),
    }
    shown = {
        name: [sum(memory.parts[part] for part in parts) for memory in memories] for name, parts in columns.items()
    } | {"total": [memory.total for memory in memories]}
    # One unit for all, so that a row adds up.
    unit, totals = _column(shown["total"], 1024, _BYTES)
    scale = 1024 ** _BYTES.index(unit)
    rows = []
    for index, memory in enumerate(memories):
        row = {
            "stage": f"{memory.teacher} -> {memory.student}",
            "ZeRO": memory.zero_stage,
            "devices": str(memory.world_size),
        }
        row |= {f"{name} {unit}": f"{values[index] / scale:,.2f}" for name, values in shown.items() if name != "total"}
        rows.append(row | {f"total {unit}": totals[index], "most in": memory.phase})
    checkpointing = "with" if workload.gradient_checkpointing else "without"
    notes = (
        f"Per device, at the moment of a step when it is most: {workload.per_device_train_batch_size} x "
        f"{workload.max_length:,} tokens, {workload.dtype}, {checkpointing} gradient checkpointing, "
        f"{workload.device}.\n"
        "student: weights, gathered ones and autocast's copies; teacher: weights and activations. The framework "
        "itself and fragmentation come on top."
    )
    return f"{format_table(rows)}\n{notes}"


_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def _column(values: Sequence[int], step: int, units: Sequence[str]) -> tuple[str, list[str]]:
    """The largest unit that leaves no value below 1, so that a column can be compared, and the values in it."""
    power = 0
    while min(values) >= step ** (power + 1) and power < len(units) - 1:
        power += 1
    return units[power], [f"{value / step**power:,.{2 if power else 0}f}" for value in values]


def main(argv: Sequence[str] | None = None) -> None:
    """
    Show what each size of a chain would be: shape, FLOPs per token, memory to serve and to train, alpha, neighbours.

    With --train: memory per device of each stage of distillation. Everything is computed from configs; no weights are
    needed. docs/planning.md has the formulas.
    """
    import sys

    (args,) = parse_options(
        PlanArguments,
        chain_first(sys.argv[1:] if argv is None else argv, "--configs"),
        lists=["configs", "n_params", "zero_stage", "world_size"],
        prog="cbd plan",
        usage="cbd plan CHAIN [--n_params 138e6,220e6] ...",
        description=main.__doc__,
    )
    run(args)


__all__ = ["PlanArguments", "format_plan", "format_training", "main", "run"]
