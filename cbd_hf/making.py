"""A planned target as a model in memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cbd_hf._loading import plain_loading
from cbd_hf.alphas import AUTO, by_group, calibration_batches, search_alpha
from cbd_hf.chain import Anchor, DistillationChain
from cbd_hf.initializers import RANDOM, assemble, fill_model
from cbd_hf.targets import CONFIG_KEY, Target, Wish, calibration_length


if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def exact_anchor(chain: DistillationChain, wish: Wish) -> Anchor | None:
    """The anchor whose size is exactly the wanted one; nothing is to be made then."""
    if wish.config is not None or wish.initializer == RANDOM:
        return None
    assert wish.n_params is not None
    pair = chain.adjacent(wish.n_params)
    return pair.small if pair.small is pair.large else None


def make_model(
    target: Target, wish: Wish, chain: DistillationChain, device: torch.device | str | None = None
) -> PreTrainedModel:
    """The target as a model in memory, in evaluation mode."""
    if target.source is None:
        return random_model(target.config, target.dtype, wish.seed, device)
    if wish.alpha == AUTO:
        choose_alpha(target, wish, chain, device)
    return assemble(target.config, target.dtype, target.source, device)


def choose_alpha(
    target: Target, wish: Wish, chain: DistillationChain, device: torch.device | str | None = None
) -> None:
    """Search the best alpha on the calibration text; set it in the target and record the search."""
    assert target.source is not None
    batches = calibration_batches(wish.calibration, chain.load_tokenizer(), calibration_length(target.config))
    model = assemble(target.config, target.dtype, target.source, device)

    def fill(alpha: float) -> None:
        target.use_alpha(by_group(alpha, alpha))
        assert target.source is not None
        fill_model(model, target.source)

    search = search_alpha(model, fill, batches, target.default_alpha)
    target.use_alpha(by_group(search.alpha, search.alpha))
    getattr(target.config, CONFIG_KEY)["alpha_search"] = search.record()
    logger.info(
        "alpha %.4f after %d trials on %d tokens in %.1f s (default %.4f).",
        search.alpha, len(search.losses), search.tokens, search.seconds, target.default_alpha,
    )  # fmt: skip


def random_model(
    config: PretrainedConfig, dtype: Any, seed: int, device: torch.device | str | None = None
) -> PreTrainedModel:
    """The architecture's own initialisation with a seed; the caller's random state stays."""
    import torch
    from transformers import AutoModelForCausalLM

    with plain_loading(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    return model if device is None else model.to(device)


def generation_config(anchor: Anchor) -> GenerationConfig | None:
    """The anchor's generation config, if it has one."""
    from transformers import GenerationConfig

    return (
        GenerationConfig.from_pretrained(anchor.path) if (anchor.path / "generation_config.json").is_file() else None
    )


__all__ = ["choose_alpha", "exact_anchor", "generation_config", "make_model", "random_model"]
