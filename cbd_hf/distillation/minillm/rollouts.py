"""Samples from a mixture of student and teacher, and what is kept of them while they are trained on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from cbd_hf._trl import pad
from cbd_hf.distillation.minillm.advantages import future_returns, mixture_log_probs, token_rewards, whitened
from cbd_hf.distillation.on_policy import KeyedSampling


@dataclass(frozen=True)
class Completion:
    """
    A sampled answer.

    Args:
        tokens (`torch.Tensor`): int64, shape (length,), up to and with the first end-of-sequence token.
        student (`torch.Tensor`): float32, shape (length,): log-probability of each under the student.
        mixture (`torch.Tensor`): likewise under what it was drawn from.
    """

    tokens: torch.Tensor
    student: torch.Tensor
    mixture: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """
    A sample as it is trained on; all tensors on the CPU.

    Args:
        row (`int`): of the prompt's dataset.
        prompt (`torch.Tensor`): int64, shape (prompt length,).
        tokens (`torch.Tensor`): int64, shape (length,).
        student (`torch.Tensor`): float32, shape (length,): log q when it was drawn, by the forward that trains.
        teacher (`torch.Tensor`): log p, likewise.
        mixture (`torch.Tensor`): log m, likewise.
        advantages (`torch.Tensor`): float32, shape (length,).
    """

    row: int
    prompt: torch.Tensor
    tokens: torch.Tensor
    student: torch.Tensor
    teacher: torch.Tensor
    mixture: torch.Tensor
    advantages: torch.Tensor


class CachedDecoder:
    """
    A causal LM that is given one more token of each row at a time and remembers the rest in its KV cache.

    Args:
        forward (`Callable`): the model, or what wraps it.
        model (`nn.Module`): the model itself, whose forward says which arguments it takes.
        input_ids (`torch.Tensor`): int64, shape (rows, width): prompts, padded on the left.
        attention_mask (`torch.Tensor`): int64, the same shape.

    Raises:
        ValueError: the model has no KV cache.
    """

    def __init__(
        self, forward: Callable[..., Any], model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> None:
        accepted = set(inspect.signature(model.forward).parameters)
        self.name = type(model).__name__
        self.forward = forward
        self.tokens = input_ids
        self.attention_mask = attention_mask
        self.positions = (attention_mask.cumsum(-1) - 1).clamp(min=0) if "position_ids" in accepted else None
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache: Any = None

    def logits(self) -> torch.Tensor:
        """Of the next token; float32, shape (rows, vocab)."""
        positions = {} if self.positions is None else {"position_ids": self.positions}
        outputs = self.forward(
            input_ids=self.tokens,
            attention_mask=self.attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
            **self.options,
        )
        self.cache = getattr(outputs, "past_key_values", None)
        if self.cache is None:
            raise ValueError(f"{self.name} has no KV cache to sample with token by token; distil it with lmbda > 0.")
        return outputs.logits[:, -1].float()

    def append(self, tokens: torch.Tensor) -> None:
        """The next token of each row, int64, shape (rows,)."""
        self.tokens = tokens[:, None]
        self.attention_mask = F.pad(self.attention_mask, (0, 1), value=1)
        if self.positions is not None:
            self.positions = self.positions[:, -1:] + 1


@torch.no_grad()
def sample_mixture(
    make_decoders: Sequence[Callable[[torch.Tensor, torch.Tensor], CachedDecoder]],
    prompts: list[list[int]],
    keys: list[str],
    *,
    teacher_mix: float,
    max_new_tokens: int,
    temperature: float,
    pad_token_id: int,
    stops: set[int],
    seed: str,
    device: torch.device,
    vocab: int | None = None,
    unfinished: Callable[[bool], bool] = bool,
) -> list[Completion]:
    """
    One completion per prompt from `(1 - teacher_mix) student + teacher_mix teacher`, at `temperature` both.

    Args:
        make_decoders (`Sequence`): of the student and, unless `teacher_mix` is 0, of the teacher: each gets prompts
            and mask and returns a [`CachedDecoder`].
        prompts (`list[list[int]]`): token ids, none empty.
        keys (`list[str]`): one for each row; see [`KeyedSampling`]. A row's sample does not depend on the others.
        teacher_mix (`float`): in [0, 1).
        max_new_tokens (`int`): of a completion.
        temperature (`float`): of both distributions.
        pad_token_id (`int`): of the prompts.
        stops (`set[int]`): end-of-sequence tokens.
        seed (`str`): of the run and the rollout batch.
        device (`torch.device`): of the models' inputs.
        vocab (`int`, *optional*): entries of both distributions; by default those of the student.
        unfinished (`Callable`, *optional*): gets whether this process has unfinished rows, returns whether any has:
            all have to take the same number of forwards where weights are sharded.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = pad(rows, padding_value=pad_token_id, padding_side="left").to(device)
    mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(device)
    decoders = [make(input_ids, mask) for make in make_decoders[: 2 if teacher_mix else 1]]
    noise = KeyedSampling(keys, seed, input_ids.shape[1], 1.0)
    end = torch.tensor(sorted(stops), device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for _ in range(max_new_tokens):
        logs = [F.log_softmax(decoder.logits()[:, :vocab] / temperature, dim=-1) for decoder in decoders]
        student, mixture = logs[0], mixture_log_probs(logs[0], logs[-1], teacher_mix)
        chosen = noise(input_ids, mixture).argmax(-1).masked_fill(done, pad_token_id)
        at = chosen[:, None].clamp(max=mixture.shape[-1] - 1)
        found = (chosen, student.gather(-1, at)[:, 0], mixture.gather(-1, at)[:, 0], ~done)
        for column, value in zip(columns, found, strict=True):
            column.append(value)
        done = done | torch.isin(chosen, end)
        if not unfinished(not bool(done.all())):
            break
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        for decoder in decoders:
            decoder.append(chosen)
    tokens, student, mixture, kept = (torch.stack(column, dim=1).cpu() for column in columns)
    return [
        Completion(tokens[row][kept[row]], student[row][kept[row]], mixture[row][kept[row]])
        for row in range(len(rows))
    ]


def with_advantages(
    rollouts: list[Rollout],
    *,
    reward_scale: float = 0.5,
    reward_clip: float = 100.0,
    gamma: float = 0.95,
    length_normalised: bool = True,
    whiten: bool = True,
) -> list[Rollout]:
    """The whole rollout batch, of all processes, with its advantages; arguments as in `MiniLLMConfig`."""
    lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    teacher, student = (
        pad([getattr(rollout, name) for rollout in rollouts], padding_value=0, padding_side="right")
        for name in ("teacher", "student")
    )
    rewards = token_rewards(teacher, student, reward_scale, reward_clip)
    values = future_returns(rewards, mask, gamma, length_normalised)
    if whiten:
        values = whitened(values, mask)
    return [
        Rollout(**_values(rollout) | {"advantages": values[row, : lengths[row]]})
        for row, rollout in enumerate(rollouts)
    ]


def save_rollouts(path: Path, rollouts: list[Rollout], settings: dict[str, str]) -> None:
    """Write a rollout batch as safetensors, with `settings` that the reader compares."""
    tensors = {"row": torch.tensor([rollout.row for rollout in rollouts])}
    for field in fields(Rollout)[1:]:
        parts = [getattr(rollout, field.name) for rollout in rollouts]
        tensors[field.name] = torch.cat(parts)
    for name in ("prompt", "tokens"):
        tensors[f"{name}_lengths"] = torch.tensor([len(getattr(rollout, name)) for rollout in rollouts])
    save_file(tensors, path, metadata=settings)


def load_rollouts(path: Path, settings: dict[str, str]) -> list[Rollout]:
    """
    Read what [`save_rollouts`] has written.

    Raises:
        ValueError: there is no such file, or it was written with other `settings`.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.parent} was saved while a rollout batch was being trained on, but lacks {path.name}, which has "
            "its samples: resume from another checkpoint."
        )
    with safe_open(path, "pt") as file:
        found = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if found != settings:
        changed = sorted(name for name in settings if found.get(name) != settings[name])
        raise ValueError(
            f"{path.parent} was saved with other options: "
            + ", ".join(f"{name}={found.get(name)} (now {settings[name]})" for name in changed)
            + ". Resume with the same ones."
        )
    columns: dict[str, Sequence[torch.Tensor]] = {}
    for field in fields(Rollout)[1:]:
        lengths = tensors["prompt_lengths" if field.name == "prompt" else "tokens_lengths"].tolist()
        columns[field.name] = [part.clone() for part in tensors[field.name].split(lengths)]
    rows = tensors["row"].tolist()
    return [
        Rollout(row=row, **{name: column[index] for name, column in columns.items()}) for index, row in enumerate(rows)
    ]


def _values(rollout: Rollout) -> dict[str, Any]:
    return {field.name: getattr(rollout, field.name) for field in fields(rollout)}


__all__ = [
    "CachedDecoder",
    "Completion",
    "Rollout",
    "load_rollouts",
    "sample_mixture",
    "save_rollouts",
    "with_advantages",
]
