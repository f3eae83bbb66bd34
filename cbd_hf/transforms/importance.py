"""What a model's own activations say about its layers, channels, heads and FFN units (Minitron, arXiv 2407.14679)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbd_hf.layout import Family, shape_of


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass
class Importance:
    """
    Scores of a model's parts on calibration text; larger is more important.

    Args:
        hidden (`torch.Tensor`): float64, shape (hidden,); one score per channel of the residual stream.
        kv_heads (`list[torch.Tensor | None]`): per layer, float64, shape (kv_heads,); a key/value head with its query
            heads. `None` in a layer without attention.
        ffn (`list[torch.Tensor | None]`): per layer, float64, shape (ffn,). `None` in a layer of experts.
        angles (`torch.Tensor`): float64, shape (layers + 1, layers + 1); `[i, j]` is the mean angle, in units of pi,
            between the stream before layer i and before layer j (after the last layer for j = layers).
    """

    hidden: torch.Tensor
    kv_heads: list[torch.Tensor | None]
    ffn: list[torch.Tensor | None]
    angles: torch.Tensor


def measure_importance(model: PreTrainedModel, family: Family, batches: Iterable[torch.Tensor]) -> Importance:
    """
    Run calibration text through a model and score its parts.

    Channels by the mean square of the residual stream (each norm's input scaled to unit mean square, so that late,
    large layers do not drown early ones); heads and FFN units by the mean square of what they feed into their output
    projection, times the squared length of that projection's column.

    Args:
        model (`PreTrainedModel`): of a supported family.
        family (`Family`): its layout.
        batches (`Iterable[torch.Tensor]`): token ids, int64, shape (rows, length), without padding.
    """
    import torch

    shape = shape_of(model.config, family)
    sums: dict[str, torch.Tensor] = {}
    angles = torch.zeros(shape.layers + 1, shape.layers + 1, dtype=torch.float64)
    count = 0
    with torch.inference_mode(), _recorded_inputs(model, family, sums):
        for tokens in batches:
            # A hook sees the stream before the last norm; hidden_states[-1] is already normalised.
            outputs = model(input_ids=tokens.to(model.device), output_hidden_states=True, use_cache=False)
            stream = [*outputs.hidden_states[:-1], sums.pop("last_stream")]
            unit = [torch.nn.functional.normalize(state.double(), dim=-1).cpu() for state in stream]
            for i, one in enumerate(unit):
                for j in range(i + 1, len(unit)):
                    cosine = (one * unit[j]).sum(-1).clamp(-1, 1)
                    angles[i, j] += torch.arccos(cosine).sum() / torch.pi
            count += tokens.numel()
    hidden = torch.stack([value for name, value in sums.items() if name.startswith("norm ")]).sum(0)
    heads, ffn = ([sums.get(f"{role} {layer}") for layer in range(shape.layers)] for role in ("query", "ffn"))
    kv_heads = [value.view(shape.kv_heads, -1).sum(-1) if value is not None else None for value in heads]
    return Importance(hidden, kv_heads, ffn, angles / count)


@contextmanager
def _recorded_inputs(model: PreTrainedModel, family: Family, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """Sum, under `"norm <module>"`, `"query <layer>"` and `"ffn <layer>"`, the squared inputs of those modules."""

    modules = dict(model.named_modules())
    names = [name for name, _ in model.named_parameters() if name.endswith(".weight")]
    gains = [name for name in names if (norm := family.spec(name).norm) is not None and norm.role == "hidden"]
    if not gains:
        raise ValueError(
            f"{family.model_type} has norms without weights, whose inputs cannot be scored: choose a selection or an "
            "initializer that needs no importance."
        )
    last_norm = [name for name in gains if family.split(name)[0] is None][-1]
    handles = []

    def add(key: str, value: torch.Tensor) -> None:
        sums[key] = sums.get(key, 0) + value.double().cpu()

    for name in names:
        spec, (layer, _) = family.spec(name), family.split(name)
        module = modules[name.removesuffix(".weight")]
        if name in gains:

            def on_norm(module: torch.nn.Module, args: tuple, name: str = name) -> None:
                energy = args[0].detach().float().flatten(0, -2).square()
                add(f"norm {name}", (energy / energy.mean(-1, keepdim=True)).sum(0))
                if name == last_norm:
                    sums["last_stream"] = args[0].detach()

            handles.append(module.register_forward_pre_hook(on_norm))
        elif spec.block_output and len(spec.axes) == 2:
            dim = next((index for index, axis in enumerate(spec.axes) if axis.side == "in"), None)
            role = spec.axes[dim].roles[0] if dim is not None else ""
            if dim is None or role not in ("query", "ffn"):  # experts, and what is not one head or unit each
                continue
            length = module.weight.detach().float().square().sum(1 - dim)

            def on_output(
                module: torch.nn.Module,
                args: tuple,
                key: str = f"{role} {layer}",
                length: torch.Tensor = length,
            ) -> None:
                add(key, args[0].detach().float().flatten(0, -2).square().sum(0) * length)

            handles.append(module.register_forward_pre_hook(on_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least_important_layers(importance: Importance, count: int) -> list[int]:
    """
    `count` consecutive layers whose removal turns the residual stream least, in an order of removal that keeps the
    removed layers consecutive (arXiv 2403.17887), the first and the last layer excepted.

    Raises:
        ValueError: fewer than two layers would stay.
    """
    layers = importance.angles.shape[0] - 1
    if not 0 <= count <= layers - 2:
        raise ValueError(
            f"Cannot remove {count} of {layers} layers: at most {layers - 2}, since the first and the last stay."
        )
    if count == 0:
        return []
    start = min(range(1, layers - count), key=lambda i: float(importance.angles[i, i + count]))
    low, high, order = start, start + count, []
    while low < high:
        # The outermost layer goes back first, on the side where the remaining gap turns the stream less.
        if high - low == 1 or importance.angles[low + 1, high] <= importance.angles[low, high - 1]:
            order.append(low)
            low += 1
        else:
            high -= 1
            order.append(high)
    return order[::-1]


def by_block_influence(importance: Importance) -> list[int]:
    """
    All layers in the order of their removal: the one that turns the residual stream least goes first (block influence,
    arXiv 2403.03853, by mean angle instead of mean 1 - cosine), the first and the last layer excepted.

    Unlike [`least_important_layers`] it judges every layer alone, with all others in place.
    """
    layers = importance.angles.shape[0] - 1
    return sorted(range(1, layers - 1), key=lambda layer: float(importance.angles[layer, layer + 1]))


__all__ = ["Importance", "by_block_influence", "least_important_layers", "measure_importance"]
