"""`cbd build`: distil a chain of anchors from a source model."""

from collections.abc import Sequence
from pathlib import Path

from cbd_hf.commands.arguments import parse_options
from cbd_hf.distillation.builder import build_chain, make_sizes, models_directory
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.recipe import BuildArguments


def main(argv: Sequence[str] | None = None) -> None:
    """Build the chain of `--config recipe.yaml`, with overrides on the command line; run again to resume."""
    from cbd_hf.commands.inspect import format_chain

    classes = (BuildArguments, StepwiseDistillationConfig)
    args, training = parse_options(classes, argv, prog="cbd build", description=main.__doc__)
    chain = build_chain(args, training)
    models = make_sizes(chain, args.sizes, models_directory(Path(str(training.output_dir))))  # only where they are
    if training.process_index == 0:
        print(format_chain(chain))
        for model in models:
            print(f"made {model}")


__all__ = ["main"]
