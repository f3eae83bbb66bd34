"""`CBDModel.from_chain`: a stock causal LM of any size between the anchors of a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf._loading import plain_loading
from cbd_hf.chain import AdjacentPair, DistillationChain
from cbd_hf.making import exact_anchor, generation_config, make_model
from cbd_hf.saving import save_targets
from cbd_hf.sizing import parse_size
from cbd_hf.targets import CONFIG_KEY, Wish, open_target
from cbd_hf.transforms import Expansion


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class CBDModel:
    """Makes causal LMs from a chain. Not a model itself: what it returns are stock `transformers` models."""

    @classmethod
    def from_chain(
        cls,
        chain: DistillationChain | str | Path,
        n_params: float | str | None = None,
        *,
        config: PretrainedConfig | None = None,
        alpha: float | Mapping[str, float] | str | None = None,
        initializer: str = "chain",
        expansion: Expansion = "identity",
        selection: str = "first",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        calibration: str | Sequence[str] | torch.Tensor | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> PreTrainedModel:
        """
        Build a model of a given size by interpolating the two neighbouring anchors (paper Eq. 3).

        The anchors' tensors are read one at a time, so neither anchor is ever held in memory.

        Args:
            chain (`DistillationChain`, `str` or `Path`): a chain, its directory, or its Hub id.
            n_params (`float` or `str`, *optional*): wanted parameters, such as `138e6` or `"138M"`; the nearest shape
                of [`plan_config`] is built, with a warning if it is more than 2 % off. Exactly an anchor's size gives
                that anchor.
            config (`PretrainedConfig`, *optional*): the target's config, instead of `n_params`.
            alpha (`float`, `Mapping[str, float]` or `"auto"`, *optional*): weight of the smaller anchor, in [0, 1]. By
                default `(N_large - N_target) / (N_large - N_small)`. A mapping gives it by kind of part:
                `"embeddings"`, `"attention"`, `"ffn"`, `"norms"`. `"auto"` searches with forward passes on
                `calibration`.
            initializer (`str`, *optional*, defaults to `"chain"`): `"chain"` interpolates; the others of
                `cbd_hf.initializers.INITIALIZERS` are there for comparison, and `"random"`.
            expansion (`str`, *optional*, defaults to `"identity"`): what stands in layers that an anchor lacks:
                `"identity"` blocks keep its function, `"replicate"` repeats the neighbouring layer (the paper's).
            selection (`str`, *optional*, defaults to `"first"`): which channels, heads and units stay where the larger
                anchor is cut: the first, every so-manieth (`"stride"`), or the most important on `calibration`
                (`"importance"`).
            dtype (`torch.dtype` or `str`, *optional*): of the target's weights. By default that of the anchors.
            device (`torch.device` or `str`, *optional*): where the target is made. By default the CPU.
            seed (`int`, *optional*, defaults to `0`): for what an initialiser draws at random.
            calibration (`str`, `Sequence[str]` or `torch.Tensor`, *optional*): texts, or token ids of shape
                (rows, length), for what is measured on text. At most 16 rows of 512 tokens are used.
            revision (`str`, *optional*): of a chain on the Hub.
            token (`str` or `bool`, *optional*): for a private chain on the Hub.
            cache_dir (`str` or `Path`, *optional*): where a chain from the Hub is kept.

        Returns:
            `PreTrainedModel`: in evaluation mode, with the chain's generation config. Its `save_pretrained` writes the
            chain's tokenizer beside the weights unless the directory has one; trainers find that tokenizer through
            `config.name_or_path`. `config.cbd` records its making. The epsilon of its norms is scaled with the width
            like the variance it is added to.

        Raises:
            ValueError: the size is outside the chain, `alpha` is outside [0, 1], or the config does not belong to the
                chain's family; for a damaged chain see [`DistillationChain.from_pretrained`].
        """
        wish = Wish(_number(n_params), config, alpha, initializer, expansion, selection, dtype, seed, calibration)
        chain = _opened(chain, revision, token, cache_dir)
        anchor = exact_anchor(chain, wish)
        if anchor is not None:
            with plain_loading():
                model = anchor.load_model(dtype=wish.dtype or "auto")
            if device is not None:
                model = model.to(device=device)  # type: ignore[call-arg]
            model.config.cbd = {"anchor": anchor.name}
            _finish(model, AdjacentPair(anchor, anchor), chain.load_tokenizer())
            return model
        with open_target(chain, wish) as target:
            model = make_model(target, wish, chain, device)
        _finish(model, target.pair, chain.load_tokenizer())
        return model

    @classmethod
    def save_from_chain(
        cls,
        chain: DistillationChain | str | Path,
        n_params: float | str | Sequence[float | str] | None = None,
        save_directory: str | Path | Sequence[str | Path] = "",
        *,
        max_shard_size: int | str = "1GB",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> list[PretrainedConfig]:
        """
        Make one model or a whole family straight into directories, in one pass over the anchors.

        No model is in memory, only the tensor being made and shards that are not yet full. (What needs a whole model
        has one: `initializer="random"` and `alpha="auto"` the target, scores on calibration text the larger anchor.)
        The directories hold what `from_chain(...).save_pretrained(...)` writes, with tensors in the order of reading
        where there are several shards, and appear whole or not at all.

        Args:
            chain (`DistillationChain`, `str` or `Path`): see [`CBDModel.from_chain`].
            n_params (`float`, `str` or a sequence, *optional*): a size or several; or `config` in `options`.
            save_directory (`str` or `Path`, or a sequence): one for each size; must be empty or absent.
            max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`): most of a weight file. As much is held in
                memory, by all models together: with several their files are smaller.
            revision, token, cache_dir: see [`CBDModel.from_chain`].
            options: `config`, `alpha`, `initializer`, `expansion`, `selection`, `dtype`, `seed`, `calibration`; see
                [`CBDModel.from_chain`].

        Returns:
            `list[PretrainedConfig]`: of the models, in the order given.

        Raises:
            FileExistsError: a directory holds something; nothing was written.
            ValueError: see [`CBDModel.from_chain`].
        """
        if isinstance(n_params, str) or not (isinstance(n_params, Sequence) or bool(getattr(n_params, "ndim", 0))):
            n_params = [n_params]  # type: ignore[list-item]
        sizes = [_number(size) for size in n_params]  # type: ignore[union-attr]
        places = [save_directory] if isinstance(save_directory, str | Path) else list(save_directory)
        places = [place for place in places if str(place)]
        if len(places) != len(sizes):
            raise ValueError(f"{len(sizes)} size(s) need as many directories in save_directory, got {len(places)}.")
        wishes = [Wish(n_params=size, **options) for size in sizes]
        return save_targets(_opened(chain, revision, token, cache_dir), wishes, places, max_shard_size)


def _number(n_params: float | str | None) -> float | None:
    return parse_size(n_params) if isinstance(n_params, str) else n_params


def _opened(
    chain: DistillationChain | str | Path, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> DistillationChain:
    if isinstance(chain, DistillationChain):
        return chain
    return DistillationChain.from_pretrained(chain, revision=revision, token=token, cache_dir=cache_dir)


def _finish(model: PreTrainedModel, pair: AdjacentPair, tokenizer: PreTrainedTokenizerBase | None) -> None:
    model.eval()
    generation = generation_config(pair.small) or generation_config(pair.large)
    if generation is not None:
        model.generation_config = generation
    if tokenizer is not None:
        # Trainers without processing_class look for a tokenizer here; it is never written to config.json. Not in
        # `model.name_or_path`: peft would record the anchor as what an adapter belongs to.
        model.config.name_or_path = tokenizer.name_or_path
        # On the instance, where deepcopy and pickle take it along; the class stays the stock one.
        vars(model)["save_pretrained"] = _Saver(model, tokenizer)


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
