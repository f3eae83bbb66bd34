"""The weight of the smaller anchor: a number, one for each kind of part, or a search on calibration text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from cbd_hf.layout import GROUPS


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO = "auto"
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
REFINEMENTS = 3


def check_alpha(alpha: float | Mapping[str, float] | str | None) -> None:
    """
    Raise a `ValueError` unless `alpha` is `None`, `"auto"`, a number in [0, 1], or such a number for some of
    `cbd_hf.layout.GROUPS`.
    """
    if alpha is None or alpha == AUTO:
        return
    if isinstance(alpha, str):
        raise ValueError(f"alpha={alpha!r} is unknown; give a number in [0, 1], a mapping of groups, or 'auto'.")
    values = alpha if isinstance(alpha, Mapping) else {"alpha": alpha}
    if isinstance(alpha, Mapping):
        unknown = sorted(set(alpha) - set(GROUPS))
        if unknown or not alpha:
            raise ValueError(f"alpha has the unknown group(s) {unknown}; choose from {list(GROUPS)}.")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            label = "alpha" if name == "alpha" else f"alpha[{name!r}]"
            raise ValueError(
                f"{label}={value} is outside [0, 1]. It weighs the smaller anchor: 1 takes it alone, 0 the larger one."
            )


def by_group(alpha: float | Mapping[str, float] | None, default: float) -> dict[str, float]:
    """`alpha` for every one of `GROUPS`; those that are not given take `default`."""
    if isinstance(alpha, Mapping):
        return {group: float(alpha.get(group, default)) for group in GROUPS}
    return dict.fromkeys(GROUPS, default if alpha is None else float(alpha))


def recorded(alpha: Mapping[str, float]) -> float | dict[str, float]:
    """What a config says of it: one number where all groups share it."""
    values = set(alpha.values())
    return values.pop() if len(values) == 1 else dict(alpha)


@dataclass
class Search:
    """
    What [`search_alpha`] found.

    Args:
        alpha (`float`): the best.
        losses (`dict[float, float]`): every alpha tried -> mean cross-entropy, nats per token.
        tokens (`int`): calibration tokens of each trial.
        seconds (`float`): of the whole search.
    """

    alpha: float
    losses: dict[float, float]
    tokens: int
    seconds: float = field(compare=False)

    def record(self) -> dict[str, Any]:
        """For the target's config; without the time, which is no property of the model."""
        # What overflowed is left out: JSON knows no infinity.
        finite = {alpha: loss for alpha, loss in self.losses.items() if math.isfinite(loss)}
        trials = [[round(alpha, 6), round(loss, 6)] for alpha, loss in sorted(finite.items())]
        return {"tokens": self.tokens, "trials": trials}


def search_alpha(
    model: PreTrainedModel, fill: Callable[[float], None], tokens: Sequence[torch.Tensor], default: float
) -> Search:
    """
    Try alphas by forward passes: five evenly spaced and the default, then three halvings around the best.

    Args:
        model (`PreTrainedModel`): the target; left with the weights of the last trial.
        fill (`Callable[[float], None]`): writes its weights for an alpha.
        tokens (`Sequence[torch.Tensor]`): calibration batches, int64, shape (rows, length), without padding.
        default (`float`): the alpha of relative size.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    losses: dict[float, float] = {}
    total = len(GRID) + 1 + 2 * REFINEMENTS
    with tqdm(total=total, desc="Searching alpha", unit="trial") as bar:

        def attempt(alpha: float) -> None:
            alpha = round(min(max(alpha, 0.0), 1.0), 6)
            if alpha not in losses:
                fill(alpha)
                loss = _loss(model, tokens)
                losses[alpha] = loss if math.isfinite(loss) else math.inf
            bar.update()

        for alpha in (*GRID, default):
            attempt(alpha)
        step = GRID[1] / 2
        for _ in range(REFINEMENTS):
            best = min(losses, key=lambda alpha: (losses[alpha], alpha))
            attempt(best - step)
            attempt(best + step)
            step /= 2
    best = min(losses, key=lambda alpha: (losses[alpha], alpha))
    if losses[best] == math.inf:
        raise ValueError("No alpha gives a finite loss on the calibration text: give another dtype, such as float32.")
    count = sum(batch.numel() for batch in tokens)
    return Search(best, losses, count, time.perf_counter() - started)


def _loss(model: PreTrainedModel, tokens: Sequence[torch.Tensor]) -> float:
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in tokens:
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            total += float(loss)
            count += batch[:, 1:].numel()
    return total / count


def calibration_batches(
    calibration: str | Sequence[str] | torch.Tensor | Sequence[torch.Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    rows: int = 16,
) -> list[torch.Tensor]:
    """
    Calibration text as batches of token ids, int64, shape (1, length).

    Args:
        calibration: texts, which are joined by the end token; or token ids, shape (rows, length), in one tensor or
            several.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the chain's, for texts.
        length (`int`): tokens of a row.
        rows (`int`, *optional*, defaults to `16`): at most so many rows are used.

    Raises:
        ValueError: there is no text, or no tokenizer for it.
    """
    import torch

    given = [calibration] if isinstance(calibration, torch.Tensor) else calibration
    if not isinstance(given, str) and len(given) and isinstance(given[0], torch.Tensor):
        found = [row[None, :length].long() for ids in given for row in torch.atleast_2d(torch.as_tensor(ids))][:rows]
        if not found or min(row.shape[1] for row in found) < 2:
            raise ValueError("calibration must be token ids of shape (rows, length), at least one row of two tokens.")
        return found
    if tokenizer is None:
        raise ValueError(
            "The chain has no tokenizer, so calibration must be token ids: a tensor of shape (rows, length)."
        )
    texts = [calibration] if isinstance(calibration, str) else list(map(str, calibration))
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) >= rows * length:
            break
    if len(ids) < 2:
        raise ValueError("calibration holds no text; give some hundred sentences like those the model will see.")
    return [torch.tensor(ids[i : i + length])[None] for i in range(0, min(len(ids), rows * length) - 1, length)]


__all__ = ["AUTO", "Search", "by_group", "calibration_batches", "check_alpha", "recorded", "search_alpha"]
