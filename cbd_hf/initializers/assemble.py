"""A stock model whose parameters come from a tensor source, without holding anything twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cbd_hf._loading import plain_loading
from cbd_hf.initializers.base import Rows, TensorSource
from cbd_hf.layout import weights_of


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


PROGRESS_FROM = 500_000_000  # parameters; smaller models take seconds
_BLOCK = 1 << 21  # elements made at a time: 8 MB of float32, small beside any model and near to a cache


def assemble(
    config: PretrainedConfig, dtype: Any, source: TensorSource, device: torch.device | str | None = None
) -> PreTrainedModel:
    """
    Allocate `config`'s model without initialising it, then write its parameters in place, a few rows at a time.

    Args:
        config (`PretrainedConfig`): the model's.
        dtype (`torch.dtype` or `str`): of the parameters.
        source (`TensorSource`): gives each parameter's value.
        device (`torch.device` or `str`, *optional*): where the model is made; by default the CPU.

    Raises:
        CheckpointError, ValueError: see [`fill_model`].
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with plain_loading(), no_init_weights(), torch.device(device or "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    fill_model(model, source)
    return model.eval()


def fill_model(model: PreTrainedModel, source: TensorSource) -> None:
    """
    Write every weight of a model in place.

    Raises:
        CheckpointError: an anchor lacks a tensor; nothing has been written then.
        ValueError: a stored shape does not fit its config.
    """
    import torch
    from tqdm.auto import tqdm

    weights = weights_of(model)
    for trans in source.trans:
        trans.check(weights)
    size = sum(weight.numel() for weight in weights.values())
    progress = tqdm(total=size, desc="Initialising", unit="param", unit_scale=True, disable=size < PROGRESS_FROM)
    with torch.no_grad(), progress as bar:
        for name, weight in weights.items():
            _write(weight, name, source)
            bar.update(weight.numel())


def made(name: str, like: torch.Tensor, source: TensorSource) -> torch.Tensor:
    """One weight in a new tensor with the shape and dtype of `like`, which may be on the meta device."""
    import torch

    weight = torch.empty(like.shape, dtype=like.dtype)
    _write(weight, name, source)
    return weight


def _write(weight: torch.Tensor, name: str, source: TensorSource) -> None:
    for rows in row_blocks(tuple(weight.shape), source.splits(name)):
        part = weight if rows is None else weight[rows[0] : rows[1]]
        value = source.make(name, rows, part) if source.in_place else source.make(name, rows)
        if value.shape != part.shape:
            raise ValueError(f"{name} was made with shape {tuple(value.shape)}, not {tuple(part.shape)}.")
        if value is not part:
            part.copy_(value)


def row_blocks(shape: tuple[int, ...], splits: bool) -> Iterator[Rows | None]:
    """The rows to make at a time, or `None` once for the whole parameter."""
    import math

    total = math.prod(shape)
    if not splits or total <= _BLOCK or shape[0] < 2:
        yield None
        return
    step = max(1, _BLOCK * shape[0] // total)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


__all__ = ["PROGRESS_FROM", "assemble", "fill_model", "made", "row_blocks"]
