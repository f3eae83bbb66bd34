"""`CBDModel.from_chain`: a stock causal LM of any size between the anchors of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf.chain import AdjacentPair, Anchor, DistillationChain
from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.initializers import INITIALIZERS, RANDOM, Blueprint, assemble
from cbd_hf.layout import check_same_family, config_with_shape, count_parameters, meta_model, shape_of
from cbd_hf.sizing import default_alpha, plan_config
from cbd_hf.transforms import EXPANSIONS, Expansion, Trans, align_layers, resized_eps


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG_KEY = "cbd"
"""The one key under which a target's config records how it was made."""


class CBDModel:
    """Makes causal LMs from a chain. Not a model itself: what it returns are stock `transformers` models."""

    @classmethod
    def from_chain(
        cls,
        chain: DistillationChain | str | Path,
        n_params: float | None = None,
        *,
        config: PretrainedConfig | None = None,
        alpha: float | None = None,
        initializer: str = "chain",
        expansion: Expansion = "identity",
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> PreTrainedModel:
        """
        Build a model of a given size by interpolating the two neighbouring anchors (paper Eq. 3).

        The anchors' tensors are read one at a time, so neither anchor is ever held in memory.

        Args:
            chain (`DistillationChain`, `str` or `Path`): a chain, its directory, or its Hub id.
            n_params (`float`, *optional*): wanted parameters, such as `138e6`; the nearest shape of
                [`plan_config`] is built. Exactly an anchor's size gives that anchor.
            config (`PretrainedConfig`, *optional*): the target's config, instead of `n_params`.
            alpha (`float`, *optional*): weight of the smaller anchor, in [0, 1]. By default
                `(N_large - N_target) / (N_large - N_small)`.
            initializer (`str`, *optional*, defaults to `"chain"`): `"chain"` interpolates; for comparison `"expand"`
                (the smaller anchor alone), `"cut"` (the larger alone) and `"random"`.
            expansion (`str`, *optional*, defaults to `"identity"`): what stands in layers that an anchor lacks:
                `"identity"` blocks keep its function, `"replicate"` repeats the neighbouring layer (the paper's).
            dtype (`torch.dtype` or `str`, *optional*): of the target's weights. By default that of the anchors.
            seed (`int`, *optional*, defaults to `0`): for what an initialiser draws at random.
            revision (`str`, *optional*): of a chain on the Hub.
            token (`str` or `bool`, *optional*): for a private chain on the Hub.
            cache_dir (`str` or `Path`, *optional*): where a chain from the Hub is kept.

        Returns:
            `PreTrainedModel`: in evaluation mode, with the chain's generation config. Its `save_pretrained` writes the
            chain's tokenizer beside the weights unless the directory has one. `config.cbd` records its making. The
            epsilon of its norms is scaled with the width like the variance it is added to.

        Raises:
            ValueError: the size is outside the chain, `alpha` is outside [0, 1], or the config does not belong to the
                chain's family; for a damaged chain see [`DistillationChain.from_pretrained`].
        """
        _check_options(n_params, config, alpha, initializer, expansion)
        if not isinstance(chain, DistillationChain):
            chain = DistillationChain.from_pretrained(chain, revision=revision, token=token, cache_dir=cache_dir)
        size = count_parameters(config) if config is not None else n_params
        assert size is not None  # one of the two is given, checked above
        pair = chain.adjacent(size)
        if pair.small is pair.large and config is None and initializer != RANDOM:
            model = pair.small.load_model(dtype=dtype or "auto")
            model.config.cbd = {"anchor": pair.small.name}
        else:
            model = _build(pair, size, config, alpha, initializer, expansion, dtype, seed)
        _finish(model, pair, chain.load_tokenizer())
        return model


def _check_options(
    n_params: float | None, config: PretrainedConfig | None, alpha: float | None, initializer: str, expansion: str
) -> None:
    if (n_params is None) == (config is None):
        raise ValueError("Give either n_params, such as 138e6, or config, and not both.")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha} is outside [0, 1]. It weighs the smaller anchor: 1 takes it alone, 0 the larger one."
        )
    if initializer not in (*INITIALIZERS, RANDOM):
        raise ValueError(f"initializer={initializer!r} is unknown; choose one of {sorted([*INITIALIZERS, RANDOM])}.")
    if expansion not in EXPANSIONS:
        raise ValueError(f"expansion={expansion!r} is unknown; choose one of {list(EXPANSIONS)}.")


def _build(
    pair: AdjacentPair,
    size: float,
    config: PretrainedConfig | None,
    alpha: float | None,
    initializer: str,
    expansion: Expansion,
    dtype: torch.dtype | str | None,
    seed: int,
) -> PreTrainedModel:
    small, large = pair
    family = check_same_family(small.config, large.config)
    config = plan_config(small.config, large.config, size) if config is None else config
    check_same_family(small.config, config)
    target = shape_of(config, family)
    config = config_with_shape(config, target, family)  # a copy: the caller's stays as it is
    n_target = count_parameters(config)
    if alpha is None:
        alpha = 1.0 if small is large else default_alpha(small.n_params, large.n_params, n_target)
    shapes = [shape_of(anchor.config, family) for anchor in pair]
    eps = [
        resized_eps(getattr(anchor.config, family.eps_field), shape, target)
        for anchor, shape in zip(pair, shapes, strict=True)
    ]
    share = {"expand": 1.0, "cut": 0.0}.get(initializer, alpha)
    setattr(config, family.eps_field, share * eps[0] + (1 - share) * eps[1])
    setattr(
        config,
        CONFIG_KEY,
        {
            "initializer": initializer,
            "alpha": share,
            "expansion": expansion,
            "small": {"name": small.name, "n_params": small.n_params},
            "large": {"name": large.name, "n_params": large.n_params},
            "n_params": n_target,
        },
    )
    prefix = meta_model(config).base_model_prefix
    with CheckpointReader(small.path, prefix) as small_reader, CheckpointReader(large.path, prefix) as large_reader:
        if dtype in (None, "auto"):
            dtype = small_reader.dtype(_embedding_name(config))
        if initializer == RANDOM:
            return _random_model(config, dtype, seed)
        maps = align_layers(shapes[0].layers, shapes[1].layers, target.layers, *_correspondence(pair))
        small_side, large_side = (
            Trans(reader, family, shape, target, layers, expansion)
            for reader, shape, layers in zip((small_reader, large_reader), shapes, maps, strict=True)
        )
        blueprint = Blueprint(config, family, small_side, large_side, alpha, seed)
        return assemble(config, dtype, INITIALIZERS[initializer](blueprint))


def _correspondence(pair: AdjacentPair) -> tuple[list[int] | None, list[int] | None]:
    """(kept layers, removal order) recorded when the smaller anchor was cut out of the larger one."""
    cut = pair.small.cut
    if not cut or cut.get("from") != pair.large.name:
        return None, None
    return cut["layers"], cut.get("removed")


def _embedding_name(config: PretrainedConfig) -> str:
    model = meta_model(config)
    embedding = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is embedding)


def _random_model(config: PretrainedConfig, dtype: Any, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _finish(model: PreTrainedModel, pair: AdjacentPair, tokenizer: PreTrainedTokenizerBase | None) -> None:
    model.eval()
    generation = _generation_config(pair.small) or _generation_config(pair.large)
    if generation is not None:
        model.generation_config = generation
    if tokenizer is not None:
        # On the instance, where deepcopy and pickle take it along; the class stays the stock one.
        vars(model)["save_pretrained"] = _Saver(model, tokenizer)


def _generation_config(anchor: Anchor) -> Any:
    from transformers import GenerationConfig

    return (
        GenerationConfig.from_pretrained(anchor.path) if (anchor.path / "generation_config.json").is_file() else None
    )


@dataclass
class _Saver:
    """`save_pretrained` of one model as an attribute of it; unlike a bound method, pickle takes it along."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        _save_with_tokenizer(self.model, self.tokenizer, save_directory, *args, **kwargs)


def _save_with_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, save_directory: str | Path, *args: Any, **kwargs: Any
) -> None:
    """The stock `save_pretrained`, then the chain's tokenizer if the directory has none."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True) and not (Path(save_directory) / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(save_directory)


__all__ = ["CONFIG_KEY", "CBDModel"]
