"""
What every size of a chain would be, from configs alone: shape, arithmetic and memory. No weights are read.

The formulas and their sources are in docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cbd_hf.families import check_same_family, get_family
from cbd_hf.layout import Shape, config_with_shape, meta_model, parameter_shapes, shape_of
from cbd_hf.sizing import check_n_params, default_alpha, lattice, lattice_config, plan_config, recorded_cut


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cbd_hf.layout import Family


BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one weight, or of one key or value in the cache."""

# Weights and gradients in float32, and AdamW's two moments; a type of two bytes adds the copy of the weights that
# autocast makes, while the float32 ones remain.
TRAINING_BYTES = {"float32": 4 + 4 + 8, "bfloat16": 4 + 2 + 4 + 8, "float16": 4 + 2 + 4 + 8}
"""Bytes per parameter to train with AdamW in a type of computation, without activations."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Workload:
    """
    What the models are planned for.

    Args:
        dtype (`str`, *optional*, defaults to `"float32"`): `"float32"`, `"bfloat16"` or `"float16"`; type of the
            weights and the cache when a model is served, and of the computation when it is trained.
        sequence_length (`int`, *optional*, defaults to 1024): tokens of a sequence, prompt and answer together.
        batch_size (`int`, *optional*, defaults to 1): sequences that are served at a time.

    Raises:
        ValueError: one of them is out of its range.
    """

    dtype: str = "float32"
    sequence_length: int = 1024
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in BYTES_PER_VALUE:
            raise ValueError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(BYTES_PER_VALUE)}.")
        for name in ("sequence_length", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


@dataclass(frozen=True)
class Counts:
    """
    Sizes of one model.

    Args:
        n_params (`int`): all parameters, tied ones once.
        matmul (`int`): those that one token is multiplied by: the output head also where it is tied, of the experts
            only the active ones; no embeddings, biases and norms.
    """

    n_params: int
    matmul: int


@dataclass(frozen=True)
class PlanAnchor:
    """An anchor as a plan sees it: its name, its config, what follows from that, and the record of its cut if any."""

    name: str
    config: PretrainedConfig
    family: Family
    counts: Counts
    cut: Mapping[str, Any] | None = None

    @property
    def shape(self) -> Shape:
        """Its dimensions."""
        return shape_of(self.config, self.family)

    @property
    def n_params(self) -> int:
        """Exact number of parameters."""
        return self.counts.n_params


@dataclass(frozen=True)
class PlannedModel:
    """
    One size of a chain. `dataclasses.asdict` makes a JSON object of it.

    Args:
        n_params (`int`): exact number of parameters, tied ones once.
        wanted (`float`, *optional*): the number that was asked for.
        difference_percent (`float`, *optional*): `n_params` over `wanted`, minus one, in percent.
        layers, hidden, heads, kv_heads, head_dim, ffn (`int`): see [`Shape`].
        forward_flops (`int`): per token, see [`forward_flops`].
        training_flops (`int`): per token, forward and backward: three times as many.
        weight_bytes (`int`): of all weights.
        cache_bytes (`int`): see [`cache_bytes`].
        serving_bytes (`int`): weights and cache.
        training_bytes (`int`): see [`TRAINING_BYTES`].
        alpha (`float`, *optional*): default weight of the smaller neighbour; `None` for an anchor, which stays as it
            is.
        small (`str`): name of the smaller neighbour.
        large (`str`): name of the larger neighbour; the same as `small` for an anchor.
    """

    n_params: int
    wanted: float | None
    difference_percent: float | None
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    forward_flops: int
    training_flops: int
    weight_bytes: int
    cache_bytes: int
    serving_bytes: int
    training_bytes: int
    alpha: float | None
    small: str
    large: str

    @property
    def is_anchor(self) -> bool:
        """Whether this is an anchor of the chain, and not something in between."""
        return self.small == self.large


def count_model(config: PretrainedConfig) -> Counts:
    """
    Count the model of `config` on the meta device.

    Raises:
        ValueError: it has experts, and the config does not say how many of them a token takes; or it has convolutions.
    """
    from torch import nn

    model = meta_model(config)
    matmul = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue  # a lookup; where it is tied, the head's own module counts the same weight
        if isinstance(module, nn.Conv1d):
            raise ValueError(f"This {config.model_type} has convolutions, whose arithmetic is not known here.")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and not name.endswith("bias"):
                matmul += parameter.numel()
            elif parameter.ndim == 3:  # experts, one behind the other
                matmul += parameter[0].numel() * _active_experts(config, len(parameter))
    return Counts(sum(parameter.numel() for parameter in model.parameters()), matmul)


def _active_experts(config: PretrainedConfig, experts: int) -> int:
    active = getattr(config.get_text_config(), "num_experts_per_tok", None)
    if not isinstance(active, int) or not 1 <= active <= experts:
        raise ValueError(
            f"This {config.model_type} has {experts} experts, but its num_experts_per_tok is {active!r}: set how many "
            f"of them a token takes, 1 to {experts}."
        )
    return active


def _attended(config: PretrainedConfig, sequence_length: int) -> list[int]:
    """For each layer the number of tokens that its last query sees, which is also what its cache holds."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    # As transformers' own caches read a config.
    types = getattr(text, "layer_types", None) or [_FULL if window is None else _SLIDING] * text.num_hidden_layers
    if unknown := set(types) - {_FULL, _SLIDING}:
        raise ValueError(
            f"This {config.model_type} has layers of type {', '.join(sorted(unknown))}; arithmetic and cache are "
            f"known here for {_FULL} and {_SLIDING} only."
        )
    capped = sequence_length if window is None else min(window, sequence_length)
    return [capped if kind == _SLIDING else sequence_length for kind in types]


def _heads(config: PretrainedConfig, shape: Shape | None) -> tuple[int, int, int]:
    """Query heads, key/value heads and channels per head: of the shape, or as most configs name them."""
    if shape is not None:
        return shape.heads, shape.kv_heads, shape.head_dim
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def forward_flops(
    config: PretrainedConfig, sequence_length: int, *, matmul: int | None = None, shape: Shape | None = None
) -> int:
    """
    Floating-point operations of one forward pass per token, the mean over a sequence.

    `2 x matmul + 4 x heads x head_dim x (sum over layers of the mean number of attended tokens)`, an addition and a
    multiplication counting two. The first term is every matrix that a token is multiplied by, with the output head and
    the active experts. The second is query x key and weights x value; the token at position `t` attends to `t` tokens,
    or to the window of a sliding layer if that is less, so a full layer has the mean `(sequence_length + 1) / 2`. That
    is Kaplan et al. 2020 (arXiv 2001.08361, Sec. 2.1): `2N + 2 x layers x context x width`. PaLM (arXiv 2204.02311,
    App. B) counts the masked half as well. Norms, activation functions, softmax and rotary embeddings are left out.

    Args:
        config (`PretrainedConfig`): of a causal LM; its family need not be one that a chain supports.
        sequence_length (`int`): tokens of the sequence.
        matmul (`int`, *optional*): [`Counts.matmul`] of the config, if it is known already.
        shape (`Shape`, *optional*): of the config, if its family is known; by default its heads are read under their
            usual names.

    Raises:
        ValueError: a layer is neither full nor sliding attention, or the number of active experts is not known.
    """
    matmul = count_model(config).matmul if matmul is None else matmul
    pairs = sum(
        seen * (seen + 1) // 2 + (sequence_length - seen) * seen for seen in _attended(config, sequence_length)
    )
    heads, _, head_dim = _heads(config, shape)
    return 2 * matmul + round(4 * heads * head_dim * pairs / sequence_length)


def cache_bytes(config: PretrainedConfig, workload: Workload, *, shape: Shape | None = None) -> int:
    """
    Bytes of the key/value cache that holds `batch_size` sequences of `sequence_length` tokens.

    `2 x kv_heads x head_dim x bytes x batch_size x (sum over layers of tokens kept)`; a sliding layer keeps no more
    tokens than its window, as in transformers' caches.

    Args:
        config (`PretrainedConfig`): of a causal LM; its family need not be one that a chain supports.
        workload (`Workload`): type and number of tokens.
        shape (`Shape`, *optional*): see [`forward_flops`].

    Raises:
        ValueError: a layer is neither full nor sliding attention.
    """
    _, kv_heads, head_dim = _heads(config, shape)
    tokens = sum(_attended(config, workload.sequence_length)) * workload.batch_size
    return 2 * kv_heads * head_dim * BYTES_PER_VALUE[workload.dtype] * tokens


def plan_anchors(
    configs: Mapping[str, PretrainedConfig], cuts: Mapping[str, Mapping[str, Any] | None] | None = None
) -> list[PlanAnchor]:
    """
    Anchors of the given names and configs, smallest first.

    Args:
        configs (`Mapping[str, PretrainedConfig]`): by name.
        cuts (`Mapping`, *optional*): name -> the chain's record of how that anchor was cut out of a larger one.

    Raises:
        ValueError: there are none, their family is not supported, they do not belong together, or two have one size.
    """
    if not configs:
        raise ValueError("A plan needs at least one anchor, got none.")
    families = {name: get_family(config) for name, config in configs.items()}
    anchors = sorted(
        (
            PlanAnchor(name, config, families[name], count_model(config), (cuts or {}).get(name))
            for name, config in configs.items()
        ),
        key=lambda anchor: anchor.n_params,
    )
    for small, large in zip(anchors, anchors[1:], strict=False):
        check_same_family(small.config, large.config)
        if small.n_params == large.n_params:
            raise ValueError(
                f"The anchors {small.name} and {large.name} both have {small.n_params:,} parameters; the anchors of a "
                "chain have different sizes. Leave one out."
            )
    return anchors


def plan_sizes(
    anchors: Sequence[PlanAnchor], sizes: Iterable[float], workload: Workload | None = None
) -> list[PlannedModel]:
    """
    What [`CBDModel.from_chain`] would make of each wanted size, in the given order.

    Args:
        anchors (`Sequence[PlanAnchor]`): from [`plan_anchors`].
        sizes (`Iterable[float]`): wanted numbers of parameters.
        workload (`Workload`, *optional*): what for; by default `Workload()`.

    Raises:
        ValueError: a size is outside the anchors' range, or the sequence is longer than the learned positions. All
            sizes are checked before the first is planned.
    """
    workload = workload or Workload()
    check_positions(anchors[0].config, workload.sequence_length, "sequence_length")
    wanted_sizes = list(sizes)
    for wanted in wanted_sizes:
        check_n_params(wanted, anchors[0].n_params, anchors[-1].n_params)
    return [_plan_size(anchors, wanted, workload) for wanted in wanted_sizes]


def _plan_size(anchors: Sequence[PlanAnchor], wanted: float, workload: Workload) -> PlannedModel:
    small = max((anchor for anchor in anchors if anchor.n_params <= wanted), key=lambda anchor: anchor.n_params)
    if small.n_params == wanted:
        return _row(small.config, small.counts, small, small, workload, wanted)
    large = min((anchor for anchor in anchors if anchor.n_params > wanted), key=lambda anchor: anchor.n_params)
    config = plan_config(small.config, large.config, wanted, *recorded_cut(small.cut, large.name))
    return _row(config, count_model(config), small, large, workload, wanted)


@dataclass(frozen=True)
class _Candidate:
    """A size that the chain has; no shape for an anchor."""

    n_params: int
    small: PlanAnchor
    large: PlanAnchor
    shape: Shape | None = None


def plan_every_size(
    anchors: Sequence[PlanAnchor],
    workload: Workload | None = None,
    *,
    every: int | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> list[PlannedModel]:
    """
    All sizes that a chain can be asked for, its anchors among them, smallest first.

    Of shapes of equal size there is only the widest, the one that [`plan_config`] takes.

    Args:
        anchors (`Sequence[PlanAnchor]`): from [`plan_anchors`].
        workload (`Workload`, *optional*): what for; by default `Workload()`.
        every (`int`, *optional*): only each so many-th size, and the anchors.
        limit (`int`, *optional*): at most so many sizes: the anchors, and the others as evenly as there are in the
            logarithm of the size.
        progress (`bool`, *optional*, defaults to `False`): show a bar if it takes more than three seconds.

    Raises:
        ValueError: `every` or `limit` is out of its range, or the sequence is longer than the learned positions.
    """
    from tqdm.auto import tqdm

    workload = workload or Workload()
    check_positions(anchors[0].config, workload.sequence_length, "sequence_length")
    if every is not None and every < 1:
        raise ValueError(f"every={every} must be at least 1: 1 keeps all sizes, 2 each second one.")
    if limit is not None and limit < len(anchors):
        raise ValueError(f"limit={limit} must be at least {len(anchors)}, the number of anchors, which are all shown.")
    candidates = [_Candidate(anchor.n_params, anchor, anchor) for anchor in anchors]
    counters: dict[str, _LayerCounts] = {}
    for small, large in zip(anchors, anchors[1:], strict=False):
        # The lattice leaves out what is not possible; if nothing is, this says why.
        plan_config(small.config, large.config, (small.n_params + large.n_params) / 2)
        counters[small.name] = _LayerCounts(small, large)
        shapes = tqdm(
            lattice(small.config, large.config, small.family, *recorded_cut(small.cut, large.name)),
            desc=f"Sizes {small.name} .. {large.name}",
            unit=" sizes",
            disable=not progress,
            delay=3,
            leave=False,
        )
        widest: dict[int, Shape] = {}
        for shape, n_params in shapes:
            known = widest.get(n_params)
            if small.n_params < n_params < large.n_params and (known is None or known.hidden < shape.hidden):
                widest[n_params] = shape
        candidates += [_Candidate(n_params, small, large, shape) for n_params, shape in widest.items()]
    candidates = _thin(sorted(candidates, key=lambda candidate: candidate.n_params), every, limit)
    return [
        _plan_candidate(candidate, counters, workload)
        for candidate in tqdm(candidates, desc="Plans", unit=" sizes", disable=not progress, delay=3, leave=False)
    ]


def _plan_candidate(candidate: _Candidate, counters: Mapping[str, _LayerCounts], workload: Workload) -> PlannedModel:
    small, large, shape = candidate.small, candidate.large, candidate.shape
    if shape is None:
        return _row(small.config, small.counts, small, small, workload)
    cut = recorded_cut(small.cut, large.name)
    config = lattice_config(small.config, large.config, shape, small.family, *cut)
    return _row(config, counters[small.name](config, shape), small, large, workload)


class _LayerCounts:
    """
    Counts at any depth between two anchors.

    Layers are mostly alike: two shallow models of a width then give all its depths. Where they are not, the anchors'
    own counts show it, and every model is counted in full.
    """

    def __init__(self, small: PlanAnchor, large: PlanAnchor) -> None:
        self._small = small
        self._widths: dict[Shape, tuple[Counts, Counts]] = {}
        try:
            self._alike = all(self._at_depth(anchor.shape) == anchor.counts for anchor in (small, large))
        except ValueError:  # no shallow model of mixed kinds of layers
            self._alike = False

    def __call__(self, config: PretrainedConfig, shape: Shape) -> Counts:
        """Counts of `config`, which has `shape`."""
        return self._at_depth(shape) if self._alike else count_model(config)

    def _at_depth(self, shape: Shape) -> Counts:
        width = replace(shape, layers=1)
        if width not in self._widths:
            self._widths[width] = (self._shallow(width, 1), self._shallow(width, 2))
        one, two = self._widths[width]
        more = shape.layers - 1
        return Counts(
            one.n_params + more * (two.n_params - one.n_params), one.matmul + more * (two.matmul - one.matmul)
        )

    def _shallow(self, width: Shape, layers: int) -> Counts:
        return count_model(config_with_shape(self._small.config, replace(width, layers=layers), self._small.family))


def _thin(candidates: Sequence[_Candidate], every: int | None, limit: int | None) -> list[_Candidate]:
    """The anchors, and of the others those that `every` and then `limit` leave; from and to ascending sizes."""
    kept = [
        candidate for index, candidate in enumerate(candidates) if candidate.shape is None or not index % (every or 1)
    ]
    if limit is None or len(kept) <= limit:
        return kept
    chosen = [candidate for candidate in kept if candidate.shape is None]
    free = [candidate for candidate in kept if candidate.shape is not None]
    low, high = math.log(kept[0].n_params), math.log(kept[-1].n_params)
    steps = limit - len(chosen)
    for step in range(1, steps + 1):
        place = low + step / (steps + 1) * (high - low)
        nearest = min(free, key=lambda candidate: abs(math.log(candidate.n_params) - place))
        free.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen, key=lambda candidate: candidate.n_params)


def check_positions(config: PretrainedConfig, length: int, option: str) -> None:
    """Raise a `ValueError` for more tokens than learned positions; rotary ones and biases go on, if not well."""
    learned = any("position" in name or name.endswith("wpe.weight") for name in parameter_shapes(config))
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if learned and positions and length > positions:
        raise ValueError(
            f"{option}={length:,} is longer than the {positions:,} learned positions of this {config.model_type}; "
            f"choose 1 to {positions:,}."
        )


def _row(
    config: PretrainedConfig,
    counts: Counts,
    small: PlanAnchor,
    large: PlanAnchor,
    workload: Workload,
    wanted: float | None = None,
) -> PlannedModel:
    shape = shape_of(config, small.family)
    forward = forward_flops(config, workload.sequence_length, matmul=counts.matmul, shape=shape)
    weights = counts.n_params * BYTES_PER_VALUE[workload.dtype]
    cache = cache_bytes(config, workload, shape=shape)
    values: dict[str, Any] = {
        name: getattr(shape, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn")
    }
    return PlannedModel(
        n_params=counts.n_params,
        wanted=wanted,
        difference_percent=None if wanted is None else 100 * (counts.n_params / wanted - 1),
        **values,
        forward_flops=forward,
        training_flops=3 * forward,
        weight_bytes=weights,
        cache_bytes=cache,
        serving_bytes=weights + cache,
        training_bytes=counts.n_params * TRAINING_BYTES[workload.dtype],
        alpha=None if small is large else default_alpha(small.n_params, large.n_params, counts.n_params),
        small=small.name,
        large=large.name,
    )


__all__ = [
    "BYTES_PER_VALUE",
    "TRAINING_BYTES",
    "Counts",
    "PlanAnchor",
    "PlannedModel",
    "Workload",
    "cache_bytes",
    "check_positions",
    "count_model",
    "forward_flops",
    "plan_anchors",
    "plan_every_size",
    "plan_sizes",
]
