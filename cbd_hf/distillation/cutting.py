"""Cut the next anchor out of the previous one: its start before distillation (research: "one basis")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.families import get_family
from cbd_hf.initializers import TensorSource, assemble
from cbd_hf.layout import Shape, config_with_shape, layer_kinds, meta_model, shape_of
from cbd_hf.sizing import parse_size, plan_cut
from cbd_hf.transforms import LayerMap, Trans, resized_eps
from cbd_hf.transforms.basis import sort_by_importance
from cbd_hf.transforms.importance import least_important_layers, measure_importance


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

SHAPE_OPTIONS = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "kv_heads",
}
"""Option of an anchor -> dimension; the standard names, for every family."""


def cut_config(config: PretrainedConfig, options: Mapping[str, Any]) -> PretrainedConfig:
    """
    The config of an anchor cut from one with `config`.

    Args:
        config (`PretrainedConfig`): of the anchor to cut.
        options (`Mapping`): any of `SHAPE_OPTIONS`, and `n_params`, which then sets the number of layers. A narrower
            `hidden_size` takes the FFN along in proportion, and the heads where they come out whole.

    Raises:
        ValueError: an unknown option, a dimension larger than the anchor's, or nothing to cut.
    """
    unknown = set(options) - set(SHAPE_OPTIONS) - {"n_params"}
    if unknown:
        raise ValueError(
            f"Unknown shape option(s) {sorted(unknown)}; an anchor is cut by {sorted([*SHAPE_OPTIONS, 'n_params'])}."
        )
    family = get_family(config)
    shape = shape_of(config, family)
    wanted = {SHAPE_OPTIONS[name]: _whole(name, value) for name, value in options.items() if name != "n_params"}
    if "layers" in wanted and "n_params" in options:
        raise ValueError("Give either num_hidden_layers or n_params for an anchor, and not both.")
    wanted = _narrowed(shape, wanted.get("hidden", shape.hidden), family.heads_fill_hidden) | wanted
    cut = replace(shape, **wanted)  # type: ignore[arg-type]  # all of these dimensions are numbers
    larger = [name for name, field in SHAPE_OPTIONS.items() if getattr(cut, field) > getattr(shape, field)]
    if larger:
        own, chosen = (getattr(one, SHAPE_OPTIONS[larger[0]]) for one in (shape, cut))
        raise ValueError(
            f"An anchor is cut from a larger one, but {larger[0]} would grow from {own} to {chosen}: choose at most "
            f"{own}."
        )
    if cut.layers != shape.layers and len(set(layer_kinds(config, family))) > 1:
        raise ValueError(
            f"This {config.model_type} mixes kinds of layers, so its depth cannot be cut: cut its width, or take a "
            "checkpoint for the anchor."
        )
    result = config_with_shape(config, cut, family)
    if "n_params" in options:
        result = plan_cut(result, parse_size(str(options["n_params"])))
    if shape_of(result, family) == shape:
        raise ValueError(f"The anchor {dict(options)} is as large as the one it is cut from: choose a smaller shape.")
    return result


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ValueError(f"{name}={value!r} of an anchor must be a whole number of at least 1.")
    return number


def _narrowed(shape: Shape, hidden: int, heads_fill_hidden: bool) -> dict[str, int]:
    if hidden == shape.hidden:
        return {}
    values = {"hidden": hidden, "ffn": round(shape.ffn * hidden / shape.hidden)}
    heads, kv_heads = (count * hidden / shape.hidden for count in (shape.heads, shape.kv_heads))
    if heads_fill_hidden or (heads.is_integer() and kv_heads.is_integer()):
        values |= {"heads": int(heads), "kv_heads": int(kv_heads)}
    return values


def changes_width(config: PretrainedConfig, options: Mapping[str, Any]) -> bool:
    """Whether an anchor with these shape options is narrower than `config`."""
    family = get_family(config)
    return replace(shape_of(cut_config(config, options), family), layers=0) != replace(
        shape_of(config, family), layers=0
    )


def sorted_checkpoint(checkpoint: str | Path, calibration: Iterable[torch.Tensor], output_dir: str | Path) -> None:
    """Save a checkpoint's model with its coordinates sorted by importance: the same function, cut by prefixes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    family = get_family(model.config)
    sort_by_importance(model, family, measure_importance(model, family, calibration))
    model.save_pretrained(output_dir)


def cut_checkpoint(
    checkpoint: str | Path, config: PretrainedConfig, calibration: Iterable[torch.Tensor], output_dir: str | Path
) -> dict[str, list[int]]:
    """
    Save the part of a checkpoint that fits a smaller config.

    The layers that turn the residual stream least on the calibration text go, consecutive ones in the middle; in
    width the first coordinates stay, which are the important ones where the source was sorted.

    Args:
        checkpoint (`str` or `Path`): a local directory.
        config (`PretrainedConfig`): of the result.
        calibration (`Iterable[torch.Tensor]`): token ids, int64, shape (rows, length).
        output_dir (`str` or `Path`): where to save.

    Returns:
        `dict[str, list[int]]`: `layers` that stayed, and `removed` ones, in the order of their removal.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    family = get_family(model.config)
    source, target = shape_of(model.config, family), shape_of(config, family)
    removed = least_important_layers(measure_importance(model, family, calibration), source.layers - target.layers)
    outline = meta_model(model.config)
    eps = {name: getattr(model.config, name) for name in family.eps_fields}
    del model
    kept = [layer for layer in range(source.layers) if layer not in removed]
    for name, value in eps.items():
        setattr(config, name, resized_eps(value, source, target))
    with CheckpointReader(checkpoint, model=outline) as reader:
        trans = Trans(reader, family, source, target, LayerMap(tuple(kept), (False,) * len(kept)))
        cut = TensorSource(lambda name, rows: trans.tensor(name, rows=rows), trans.splits_by_rows, (trans,))
        student = assemble(config, torch.float32, cut)
    if (Path(checkpoint) / "generation_config.json").is_file():
        student.generation_config = GenerationConfig.from_pretrained(checkpoint)
    student.save_pretrained(output_dir)
    return {"layers": kept, "removed": removed}


__all__ = ["SHAPE_OPTIONS", "changes_width", "cut_checkpoint", "cut_config", "sorted_checkpoint"]
