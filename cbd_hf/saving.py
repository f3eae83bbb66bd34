"""Planned targets straight into directories, in one pass over the anchors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cbd_hf._files import check_output_directory, commit_directory, staging_directory
from cbd_hf.alphas import AUTO
from cbd_hf.chain import DistillationChain
from cbd_hf.initializers import made
from cbd_hf.initializers.assemble import PROGRESS_FROM
from cbd_hf.layout import weights_of
from cbd_hf.making import choose_alpha, exact_anchor, generation_config, random_model
from cbd_hf.shards import ShardWriter
from cbd_hf.targets import CONFIG_KEY, Target, Wish, open_target


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def save_targets(
    chain: DistillationChain, wishes: Sequence[Wish], directories: Sequence[str | Path], max_shard_size: int | str
) -> list[PretrainedConfig]:
    """
    Make several targets, which take turns on the anchors' tensors, and save each whole or not at all.

    Args:
        chain (`DistillationChain`): the anchors.
        wishes (`Sequence[Wish]`): what is to be made.
        directories (`Sequence[str | Path]`): one for each; empty or absent.
        max_shard_size (`int` or `str`): of a weight file.

    Raises:
        FileExistsError: a directory holds something; nothing was written.
        ValueError: see [`open_target`].
    """
    from tqdm.auto import tqdm

    places = [Path(directory).expanduser().resolve() for directory in directories]
    anchors = [exact_anchor(chain, wish) for wish in wishes]
    wishes = [
        wish if anchor is None else Wish(n_params=wish.n_params, dtype=wish.dtype)
        for wish, anchor in zip(wishes, anchors, strict=True)
    ]
    for place in places:
        if places.count(place) > 1 or any(other in place.parents for other in places):
            raise ValueError(f"save_directory names {place} twice, or within another: give directories side by side.")
    for place in places:
        check_output_directory(place)
    tokenizer = chain.load_tokenizer()
    with ExitStack() as stack:
        targets = [stack.enter_context(open_target(chain, wish)) for wish in wishes]  # all found possible first
        for target, wish, anchor in zip(targets, wishes, anchors, strict=True):
            if anchor is not None:
                setattr(target.config, CONFIG_KEY, {"anchor": anchor.name})
            elif wish.alpha == AUTO:
                choose_alpha(target, wish, chain)
        stagings = [stack.enter_context(staging_directory(place)) for place in places]
        _write_weights(targets, wishes, stagings, max_shard_size, tqdm)
        for target, staging, place in zip(targets, stagings, places, strict=True):
            _write_config(target, staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
            commit_directory(staging, place)
    return [target.config for target in targets]


def _write_weights(
    targets: Sequence[Target], wishes: Sequence[Wish], places: Sequence[Path], max_shard_size: int | str, tqdm: type
) -> None:
    from transformers.utils.hub import convert_file_size_to_int

    work: list[tuple[tuple[str, int, str], Target, str, torch.Tensor, ShardWriter]] = []
    # Every writer holds a shard, so they share what is allowed.
    limit = max(1, convert_file_size_to_int(max_shard_size) // len(targets))
    with ExitStack() as writers:
        for target, wish, place in zip(targets, wishes, places, strict=True):
            if target.source is None:
                random_model(target.config, target.dtype, wish.seed).save_pretrained(
                    place, max_shard_size=max_shard_size
                )
                continue
            outline = target.outline()
            weights = weights_of(outline)
            for trans in target.source.trans:
                trans.check(weights)
            writer = writers.enter_context(ShardWriter(place, outline, limit))
            for name in writer.names:
                work.append((_reading_order(target, name), target, name, weights[name], writer))
        # Targets take turns on each of the larger anchor's tensors, so that the disk gives it once.
        work.sort(key=lambda item: item[0])
        total = sum(weight.numel() for *_, weight, _ in work)
        with tqdm(total=total, desc="Writing", unit="param", unit_scale=True, disable=total < PROGRESS_FROM) as bar:
            for _, target, name, weight, writer in work:
                assert target.source is not None
                writer.add(name, made(name, weight, target.source))
                bar.update(weight.numel())


def _reading_order(target: Target, name: str) -> tuple[str, int, str]:
    """Sorts tensors by where the larger anchor's files hold them."""
    layer, local = target.family.split(name)
    return target.pair.large.name, -1 if layer is None else target.layer_of[layer], local


def _write_config(target: Target, place: Path) -> None:
    outline = target.outline()
    if target.source is not None:
        config = target.config
        config.architectures = [type(outline).__name__]
        config.dtype = target.dtype if isinstance(target.dtype, str) else str(target.dtype).removeprefix("torch.")
        config.save_pretrained(place)
    generation = generation_config(target.pair.small) or generation_config(target.pair.large)
    if generation is None and outline.can_generate():
        generation = outline.generation_config
    if generation is not None:
        generation.save_pretrained(place)


__all__ = ["save_targets"]
