"""From a chain and a wish to a target that is ready to be made: its config, its anchors opened, its tensor source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cbd_hf._loading import plain_loading
from cbd_hf.alphas import by_group, check_alpha, recorded
from cbd_hf.chain import AdjacentPair, Anchor, DistillationChain
from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.families import check_same_family
from cbd_hf.initializers import INITIALIZERS, RANDOM, Blueprint, TensorSource
from cbd_hf.layout import Family, config_with_shape, count_parameters, meta_model, shape_of, weights_of
from cbd_hf.sizing import (
    corresponding_layers,
    default_alpha,
    format_size,
    neighbouring_sizes,
    plan_config,
    recorded_cut,
)
from cbd_hf.transforms import EXPANSIONS, SELECTIONS, Expansion, MostImportant, Trans
from cbd_hf.transforms.importance import Importance, measure_importance


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

FIRST = "first"
_FAR = 0.02  # of the wanted size; further off it is worth a warning
CONFIG_KEY = "cbd"
"""The one key under which a target's config records how it was made."""


@dataclass(frozen=True)
class Wish:
    """
    What a target is to be; see [`CBDModel.from_chain`] for the meaning of each.

    Raises:
        ValueError: a value that is not allowed; names it, the choices and the option.
    """

    n_params: float | None = None
    config: PretrainedConfig | None = None
    alpha: float | Mapping[str, float] | str | None = None
    initializer: str = "chain"
    expansion: Expansion = "identity"
    selection: str = "first"
    dtype: torch.dtype | str | None = None
    seed: int = 0
    calibration: Any = None

    def __post_init__(self) -> None:
        if (self.n_params is None) == (self.config is None):
            raise ValueError("Give either n_params, such as 138e6, or config, and not both.")
        check_alpha(self.alpha)
        object.__setattr__(self, "dtype", resolve_dtype(self.dtype))
        known = sorted([*INITIALIZERS, RANDOM])
        if self.initializer not in known:
            raise ValueError(f"initializer={self.initializer!r} is unknown; choose one of {known}.")
        if self.expansion not in EXPANSIONS:
            raise ValueError(f"expansion={self.expansion!r} is unknown; choose one of {list(EXPANSIONS)}.")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection={self.selection!r} is unknown; choose one of {list(SELECTIONS)}.")
        if self.alpha == "auto" and self.initializer != "chain":
            raise ValueError(f"alpha='auto' searches for initializer='chain', not {self.initializer!r}.")
        if self.calibration is None:
            for name, values in (
                ("alpha", ("auto",)),
                ("selection", ("importance",)),
                ("initializer", ("importance", "weight_subcloning")),
            ):
                if (value := getattr(self, name)) in values:
                    raise ValueError(
                        f"{name}={value!r} runs text through a model: give calibration, some texts or token ids."
                    )


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """
    A dtype by its name, `"bfloat16"` or `"torch.bfloat16"`; `None` and `"auto"` stay open.

    Raises:
        ValueError: it is none of float16, bfloat16, float32 and float64.
    """
    import torch

    if dtype is None or isinstance(dtype, str) and dtype == "auto":
        return None
    known = {
        str(each).removeprefix("torch."): each
        for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={dtype!r} is not one that weights can have; choose one of {sorted(known)}.")
    return found


@dataclass
class Target:
    """
    A target that can be made.

    Args:
        config (`PretrainedConfig`): its config, with the record of its making.
        dtype (`torch.dtype` or `str`): of its weights.
        family (`Family`): its layout.
        pair (`AdjacentPair`): the anchors it lies between.
        blueprint (`Blueprint`, *optional*): what its initialiser gets; `None` for a random start.
        source (`TensorSource`, *optional*): its weights; likewise.
        default_alpha (`float`): by relative size.
        layer_of (`Mapping[int, int]`): target layer -> the larger anchor's, the order in which files are read.
    """

    config: PretrainedConfig
    dtype: torch.dtype | str
    family: Family
    pair: AdjacentPair
    blueprint: Blueprint | None
    source: TensorSource | None
    default_alpha: float
    layer_of: Mapping[int, int] = field(default_factory=dict)

    def outline(self) -> PreTrainedModel:
        """The target's model without weights, in its dtype."""
        import torch

        dtype = getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return meta_model(self.config).to(dtype=dtype)  # type: ignore[call-arg]

    def use_alpha(self, alpha: Mapping[str, float]) -> None:
        """Make the weights with another alpha."""
        assert self.blueprint is not None
        self.blueprint = replace(self.blueprint, alpha=alpha)
        initializer = getattr(self.config, CONFIG_KEY)["initializer"]
        self.source = INITIALIZERS[initializer](self.blueprint)
        _set_eps(self.config, self.family, self.source, self.pair)
        getattr(self.config, CONFIG_KEY)["alpha"] = recorded(alpha)


@contextmanager
def open_target(chain: DistillationChain, wish: Wish) -> Iterator[Target]:
    """
    Plan a target and open the anchors it is made from; they are closed at the end.

    Raises:
        ValueError: the size is outside the chain, or the config does not belong to its family.
    """
    size = count_parameters(wish.config) if wish.config is not None else wish.n_params
    assert size is not None  # one of the two is given
    pair = chain.adjacent(size)
    small, large = pair
    family = check_same_family(small.config, large.config)
    kept, order = recorded_cut(small.cut, large.name)
    if wish.config is None:
        config = plan_config(small.config, large.config, size, kept, order)
    else:
        check_same_family(small.config, wish.config)
        # A copy: the caller's stays as it is.
        config = config_with_shape(wish.config, shape_of(wish.config, family), family)
    target = shape_of(config, family)
    n_target = count_parameters(config)
    if abs(n_target - size) > _FAR * size:
        _warn_far(size, n_target, neighbouring_sizes(small.config, large.config, size, kept, order))
    default = 1.0 if small is large else default_alpha(small.n_params, large.n_params, n_target)
    alpha = by_group(None if isinstance(wish.alpha, str) else wish.alpha, default)
    record: dict[str, Any] = {
        "initializer": wish.initializer,
        "alpha": recorded(alpha),
        "expansion": wish.expansion,
        "small": {"name": small.name, "n_params": small.n_params},
        "large": {"name": large.name, "n_params": large.n_params},
        "n_params": n_target,
    }
    if wish.selection != "first":
        record["selection"] = wish.selection
    setattr(config, CONFIG_KEY, record)
    outlines = [meta_model(anchor.config) for anchor in pair]
    with (
        CheckpointReader(small.path, model=outlines[0]) as small_reader,
        CheckpointReader(large.path, model=outlines[1]) as large_reader,
    ):
        dtype = small_reader.dtype(_embedding_name(outlines[0])) if wish.dtype is None else wish.dtype
        assert not isinstance(dtype, str)  # resolved by the wish
        if wish.initializer == RANDOM:
            del record["alpha"]
            yield Target(config, dtype, family, pair, None, None, default)
            return
        maps = corresponding_layers(small.config, large.config, config, family, kept, order)
        importance = _Measured(large, family, wish.calibration, chain)
        selection = MostImportant(importance()) if wish.selection == "importance" else SELECTIONS[wish.selection]()
        sides = [
            Trans(reader, family, shape_of(anchor.config, family), target, layers, wish.expansion, rule)
            for reader, anchor, layers, rule in zip(
                (small_reader, large_reader), pair, maps, (SELECTIONS[FIRST](), selection), strict=True
            )
        ]
        blueprint = Blueprint(
            config, family, sides[0], sides[1], alpha, wish.seed, importance if wish.calibration is not None else None
        )
        source = INITIALIZERS[wish.initializer](blueprint)
        if wish.initializer in ("expand", "cut"):
            record["alpha"] = 1.0 if wish.initializer == "expand" else 0.0
        elif wish.initializer != "chain":
            del record["alpha"]
        _set_eps(config, family, source, pair)
        yield Target(config, dtype, family, pair, blueprint, source, default, dict(enumerate(maps[1].sources)))


def _warn_far(wanted: float, made: int, possible: tuple[int, int]) -> None:
    below, above = (f"{count:,} ({format_size(count)})" for count in possible)
    logger.warning(
        "n_params=%s: the model made has %s parameters, %.1f %% %s; between these anchors the possible sizes next to "
        "it are %s below and %s above.",
        f"{wanted:,.0f}", f"{made:,}", 100 * abs(made - wanted) / wanted, "more" if made > wanted else "fewer",
        below, above,
    )  # fmt: skip


@dataclass
class _Measured:
    """The larger anchor's importance, measured at most once and only if it is asked for."""

    anchor: Anchor
    family: Family
    calibration: Any
    chain: DistillationChain
    result: Importance | None = None

    def __call__(self) -> Importance:
        from cbd_hf.alphas import calibration_batches

        if self.result is None:
            with plain_loading():
                model = self.anchor.load_model()
            batches = calibration_batches(
                self.calibration, self.chain.load_tokenizer(), calibration_length(model.config)
            )
            self.result = measure_importance(model, self.family, batches)
        return self.result


def calibration_length(config: PretrainedConfig) -> int:
    """Tokens of a row of calibration text: 512, or as many as the model takes."""
    limit = getattr(config, "max_position_embeddings", None)
    return min(512, limit) if isinstance(limit, int) and limit > 0 else 512


def _set_eps(config: PretrainedConfig, family: Family, source: TensorSource, pair: AdjacentPair) -> None:
    """The norms' epsilon, scaled like the variance it is added to and blended like the gains."""
    for name in family.eps_fields:
        values = {}
        for index, trans in enumerate(source.trans):
            directory = getattr(trans.reader, "directory", None)
            anchor = next(anchor for anchor in pair if anchor.path == directory)
            values[index] = getattr(anchor.config, name)
        setattr(config, name, source.eps(values))


def _embedding_name(outline: PreTrainedModel) -> str:
    embedding = outline.get_input_embeddings().weight
    return next(name for name, weight in weights_of(outline).items() if weight is embedding)


__all__ = ["CONFIG_KEY", "Target", "Wish", "calibration_length", "open_target"]
