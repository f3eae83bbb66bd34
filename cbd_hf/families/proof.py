"""
The test that a layout must pass before any weights are touched: Trans leaves a small model's function unchanged.

A small random model of the architecture is expanded along every dimension, its channels, heads and units are permuted,
and its logits are compared. A tensor whose axes are misunderstood gets zeros or units in wrong places, and the logits
differ by their own size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cbd_hf.checkpoint import CheckpointError
from cbd_hf.families.packings import NEVER_RUN
from cbd_hf.layout import (
    Axis,
    Family,
    LayoutError,
    Shape,
    config_with_shape,
    layer_kinds,
    meta_model,
    shape_of,
    weights_of,
)
from cbd_hf.layout.axes import HEAD_ROLES
from cbd_hf.transforms import LayerMap, StateDict, Trans
from cbd_hf.transforms.basis import permuted
from cbd_hf.transforms.width import resized_eps


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 1e-3
"""Largest difference of the logits, in units of their standard deviation. Right layouts reach 1e-5 (many norms compute
in float32), wrong ones differ by about 1."""


@dataclass
class Bench:
    """
    A small random model and its logits.

    Args:
        config (`PretrainedConfig`): the model's.
        tensors (`dict[str, torch.Tensor]`): its parameters and persistent buffers.
        expected (`torch.Tensor`): its logits, float64, shape (2, 12, vocab).
        dtype (`torch.dtype`): that it computes in.
    """

    config: PretrainedConfig
    tensors: dict[str, torch.Tensor]
    expected: torch.Tensor
    dtype: torch.dtype


def random_model(
    config: PretrainedConfig, norms: dict[str, tuple[str, float]], constant: set[str], dtype: torch.dtype
) -> PreTrainedModel:
    """
    A small model whose every parameter matters and whose activations stay of order one.

    Args:
        config (`PretrainedConfig`): its config.
        norms (`dict[str, tuple[str, float]]`): modules that normalise, with their gain's offset.
        constant (`set[str]`): norms that write the stream, whose gain is kept uniform: with any other gain no
            expansion under LayerNorm is exact (docs/families.md states the error).
        dtype (`torch.dtype`): of its weights.
    """
    import torch

    model = build(config, dtype)
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    embeddings = {id(model.get_input_embeddings())}
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in weights_of(model).items():
            parent, _, attribute = name.rpartition(".")
            if not parameter.is_floating_point():
                continue
            if parent in norms and attribute == "weight":
                spread = 0.0 if parent in constant else 0.2
                parameter.copy_(1 - norms[parent][1] + spread * noise(parameter))
            elif id(modules[parent]) in embeddings:
                parameter.copy_(noise(parameter) + 0.2)
            elif parameter.dim() < 2:
                parameter.copy_(parameter + 0.2 * noise(parameter))
            else:
                inputs = parameter.shape[-1] if parameter.dim() == 2 else max(parameter.shape[1:])
                parameter.copy_(noise(parameter) / math.sqrt(inputs) + 0.02)
    return model


def build(
    config: PretrainedConfig, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """
    The config's model with eager attention: with these weights, or initialised by its own rules with a
    fixed seed.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    copy = type(config).from_dict(config.to_dict())
    copy._experts_implementation = "eager"  # the grouped kernels know no float64
    with torch.random.fork_rng(devices=[]), nullcontext() if tensors is None else no_init_weights():
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy, dtype=dtype, attn_implementation="eager")
    if tensors is not None:
        model.tie_weights()
        with torch.no_grad():
            for name, parameter in weights_of(model).items():
                parameter.copy_(tensors[name])
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits on fixed tokens, float64, shape (2, 12, vocab)."""
    import torch

    with torch.inference_mode():
        return _run(model).double()


def _run(model: PreTrainedModel) -> torch.Tensor:
    import torch

    vocab = int(model.config.vocab_size)
    tokens = torch.randint(3, min(vocab, 60), (2, 12), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, use_cache=False).logits


def bench(model: PreTrainedModel) -> Bench:
    """Take a small model's weights and logits."""
    tensors = {name: parameter.detach().clone() for name, parameter in weights_of(model).items()}
    return Bench(model.config, tensors, logits(model), model.dtype)


def error(bench: Bench, tensors: dict[str, torch.Tensor], config: PretrainedConfig) -> float:
    """Largest difference of the logits of a model with these weights, in units of the logits' deviation."""
    difference = (logits(build(config, bench.dtype, tensors)) - bench.expected).abs().max() / bench.expected.std()
    return float(difference) if math.isfinite(difference) else math.inf


def expansion_error(bench: Bench, family: Family, target: Shape, layers: LayerMap | None = None) -> float:
    """[`error`] of the model expanded to `target`, free new coordinates filled at random."""
    import torch

    source = shape_of(bench.config, family)
    layers = layers or LayerMap(tuple(range(source.layers)), (False,) * source.layers)
    config = config_with_shape(bench.config, target, family, layers=layers.sources)
    for name in family.eps_fields:
        setattr(config, name, resized_eps(getattr(config, name), source, target))
    trans = Trans(StateDict(bench.tensors), family, source, target, layers)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    wanted = weights_of(meta_model(config))
    trans.check(wanted)
    for name, like in wanted.items():
        fill = torch.randn(like.shape, generator=generator, dtype=torch.float64) / 8
        tensors[name] = trans.tensor(name, fill=fill, dtype=torch.float64)
        if tensors[name].shape != like.shape:
            return math.inf
    return error(bench, tensors, config)


def permutation_error(bench: Bench, family: Family, roles: tuple[str, ...]) -> float:
    """[`error`] after the parts of some roles are permuted: `"hidden"`, `"kv_heads"`, `"group"`, `"ffn"`."""
    import torch

    generator = torch.Generator().manual_seed(3)
    orders: dict[tuple[str, int | None], torch.Tensor] = {}

    def order(role: str, layer: int | None, count: int) -> torch.Tensor:
        if role.partition(":")[0] not in roles:
            return torch.arange(count)
        key = (role, None if role == "hidden" else layer)
        if key not in orders:
            orders[key] = torch.randperm(count, generator=generator)
        return orders[key]

    shape = shape_of(bench.config, family)
    tensors = {name: permuted(tensor, name, family, shape, order) for name, tensor in bench.tensors.items()}
    return error(bench, tensors, bench.config)


def wider(shape: Shape, family: Family, role: str) -> list[list[Shape]]:
    """
    Shapes with more of one role than `shape`, as the family allows them. Of each list one is to be tried: the first
    that a model can be built and run with (some need an even number of heads, or a multiple of four).
    """
    if role == "ffn":
        if family.ffn_per_hidden and "ffn" not in family.fields:
            return []
        extra = tuple((name, count + 24) for name, count in shape.extra)
        return [[replace(shape, ffn=shape.ffn + 24 if "ffn" in family.fields else shape.ffn, extra=extra)]]
    if role == "heads":
        if "heads" not in family.fields:
            return []
        kv_heads, group = shape.kv_heads, shape.group
        grown = [[(kv_heads + 1, group), (2 * kv_heads, group)]]
        if "kv_heads" in family.fields:
            grown.append([(kv_heads, group + 1), (kv_heads, 2 * group)])
        return [
            sorted(
                (_filled(replace(shape, heads=kv * group, kv_heads=kv), family) for kv, group in choices),
                key=lambda new: not family.heads_fill_hidden and new.hidden != shape.hidden,
            )
            for choices in grown
        ]
    if family.heads_fill_hidden:
        return []
    step = math.lcm(2, shape.heads)
    more = step * math.ceil(shape.hidden / (4 * step))  # enough for a wrong power of the hidden size to show
    return [[_filled(replace(shape, hidden=shape.hidden + more), family), replace(shape, hidden=2 * shape.hidden)]]


def more_heads_keep_stream(bench: Bench, family: Family) -> bool:
    """Whether [`width_error`] of `"heads"` leaves the hidden size as it is."""
    shape = shape_of(bench.config, family)
    return all(choices[0].hidden == shape.hidden for choices in wider(shape, family, "heads"))


def _filled(shape: Shape, family: Family) -> Shape:
    if family.heads_fill_hidden:
        shape = replace(shape, hidden=shape.heads * shape.head_dim)
    elif shape.hidden % shape.heads:  # some configs want whole heads although they need none
        shape = replace(shape, hidden=math.lcm(2, shape.heads) * (shape.hidden // math.lcm(2, shape.heads) + 1))
    if family.ffn_per_hidden and "ffn" not in family.fields:
        shape = replace(shape, ffn=family.ffn_per_hidden * shape.hidden)
    return shape


def depth_error(bench: Bench, family: Family) -> float:
    """
    [`error`] of the model with inserted layers that change nothing: one after every layer, or, where the kind of a
    layer follows from its index, behind the last.
    """
    source = shape_of(bench.config, family)
    layers = source.layers
    everywhere = LayerMap(tuple(i // 2 for i in range(2 * layers)), (False, True) * layers)
    try:
        return expansion_error(bench, family, replace(source, layers=2 * layers), everywhere)
    except (CheckpointError, LayoutError):  # the config gives the new layers other parameters
        target = replace(source, layers=layers + 1)
        wanted = config_with_shape(bench.config, target, family, layers=(*range(layers), layers - 1))
        have, want = layer_kinds(bench.config, family), layer_kinds(wanted, family)
        if want[:-1] != have or want[-1] not in have:
            raise LayoutError(
                f"{bench.config.model_type}: the kinds of its layers follow from their number in a way that is not "
                "understood, so its depth cannot be changed."
            ) from None
        last = max(index for index, kind in enumerate(have) if kind == want[-1])
        return expansion_error(bench, family, target, LayerMap((*range(layers), last), (False,) * layers + (True,)))


def width_error(bench: Bench, family: Family, role: str) -> float:
    """The largest [`error`] of the model expanded in one role, `"ffn"`, `"heads"` or `"hidden"`."""
    worst = 0.0
    for choices in wider(shape_of(bench.config, family), family, role):
        found, failure = None, None
        for shape in choices:
            try:
                found = expansion_error(bench, family, shape)
                break
            except Exception as problem:  # a shape that the architecture does not allow
                failure = problem
        if found is None:
            assert failure is not None
            raise failure
        worst = max(worst, found)
        if worst > TOLERANCE:
            break
    return worst


def without_influence(bench: Bench, family: Family) -> list[str]:
    """
    Kinds of tensors that do not reach the small model's logits, so that nothing proves what their axes mean.

    One backward pass finds those that do; the others, such as what only chooses experts, are replaced by noise in all
    layers at once. Vectors are left out: a key's bias never reaches the logits, by the softmax.
    """
    import torch

    model = build(bench.config, bench.dtype, bench.tensors)
    result = _run(model)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(4), dtype=result.dtype)
    result.backward(direction)
    parameters = weights_of(model)
    head_dim = shape_of(bench.config, family).head_dim
    reached = {family.split(name)[1] for name, tensor in parameters.items() if _moves(tensor.grad)}
    silent = []
    for local in dict.fromkeys(family.split(name)[1] for name, tensor in parameters.items() if tensor.dim() > 1):
        axes = family.tensors[local].axes
        if local in reached or all(axis.is_fixed for axis in axes):
            continue
        if any(part in local for part in NEVER_RUN) and not any(_is_fused(axis, head_dim) for axis in axes):
            continue
        alike = {name: tensor for name, tensor in parameters.items() if family.split(name)[1] == local}
        with torch.no_grad():
            for tensor in alike.values():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5), dtype=bench.dtype))
        if float((logits(model) - bench.expected).abs().max()) < 1e-9 * float(bench.expected.std()):
            silent.append(local)
        with torch.no_grad():
            for name, tensor in alike.items():
                tensor.copy_(bench.tensors[name])
    return silent


def _is_fused(axis: Axis, head_dim: int) -> bool:
    """Whether an axis may hold several parts, whose order only a proof can tell."""
    return len(axis.segments) > 1 or any(
        segment.unit > (head_dim if segment.role in HEAD_ROLES else 1)
        for segment in axis.segments
        if segment.role != "fixed"
    )


def _moves(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().max() > 1e-9)


__all__ = [
    "TOLERANCE",
    "Bench",
    "bench",
    "build",
    "depth_error",
    "expansion_error",
    "more_heads_keep_stream",
    "permutation_error",
    "random_model",
    "wider",
    "width_error",
    "without_influence",
]
