"""The student's side of the policy gradient, inside the forward of whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from cbd_hf._trl import ForwardRedirection
from cbd_hf.distillation.heads import find_parts, picked, run_backbone
from cbd_hf.distillation.minillm.advantages import clipped_policy_loss
from cbd_hf.distillation.minillm.log_probs import selected_log_probs, tiled_token_loss
from cbd_hf.distillation.objectives import Objective
from cbd_hf.distillation.predictions import DensePredictions, Head
from cbd_hf.distillation.tiles import tiled_loss


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PolicyTargets:
    """
    What a micro-batch is trained on. Its supervised positions are those of the samples, then those of the text.

    Args:
        labels (`torch.Tensor`): int64, shape (positions,): the next token of each.
        mixture (`torch.Tensor`): float32, shape (sampled,): log m of the samples' tokens.
        advantages (`torch.Tensor`): float32, shape (sampled,).
        predictions ([`DensePredictions`]): of the teacher, at all positions.
    """

    labels: torch.Tensor
    mixture: torch.Tensor
    advantages: torch.Tensor
    predictions: DensePredictions


@dataclass(frozen=True)
class PolicyParts:
    """
    Sums over the positions of a micro-batch; float32 scalars, of which only the first two have a gradient.

    Args:
        total (`torch.Tensor`): policy and single-step terms with their weights, over the samples' tokens.
        text (`torch.Tensor`): the loss on text, over its tokens.
        policy (`torch.Tensor`): the policy term without its weight.
        divergence (`torch.Tensor`): the single-step term without its weight: reverse KL divergence.
        clipped (`torch.Tensor`): number of tokens whose ratio lies outside of the clipping range.
    """

    total: torch.Tensor
    text: torch.Tensor
    policy: torch.Tensor
    divergence: torch.Tensor
    clipped: torch.Tensor


class PolicyLoss:
    """
    Runs a student on samples and text.

    Args:
        model (`nn.Module`): the student without what accelerate wraps around it; an adapter's wrapper stays.
        temperature (`float`): of all distributions over samples.
        vocab (`int`): entries of the distributions: those that student and teacher share.
        cliprange, policy_weight, single_step_weight, lm_kd_ratio: as in `MiniLLMConfig`.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        vocab: int,
        cliprange: float,
        policy_weight: float,
        single_step_weight: float,
        lm_kd_ratio: float,
    ) -> None:
        self.model = model
        self.parts = find_parts(model)
        self.temperature = temperature
        self.vocab = vocab
        self.cliprange = cliprange
        self.policy_weight = policy_weight
        self.single_step_weight = single_step_weight
        self.single_step = Objective("reverse_kl", temperature=temperature)
        self.text = Objective("forward_kl", cross_entropy_weight=1 - lm_kd_ratio)

    def __call__(
        self, wrapped: nn.Module, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, targets: PolicyTargets
    ) -> PolicyParts:
        """
        Args:
            wrapped (`nn.Module`): what accelerate made of the student.
            inputs (`dict[str, torch.Tensor]`): of its forward, shape (rows, length) each.
            chosen (`torch.Tensor`): bool, shape (rows, length): positions whose next token is supervised.
            targets ([`PolicyTargets`]): for these positions.
        """
        return PolicyParts(
            *self._at_head(wrapped, inputs, chosen, lambda hidden, head: self._terms(hidden, head, targets))
        )

    @torch.no_grad()
    def score(
        self, wrapped: nn.Module, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """The student's log-probabilities of `labels`, float32, shape (positions,); arguments as above."""

        def selected(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            return selected_log_probs(hidden, head, labels, self.temperature, self.vocab)

        return self._at_head(wrapped, inputs, chosen, selected)

    def _at_head(
        self,
        wrapped: nn.Module,
        inputs: dict[str, torch.Tensor],
        chosen: torch.Tensor,
        compute: Callable[[torch.Tensor, Head], _Result],
    ) -> _Result:
        """`compute(hidden, head)` at the chosen positions, where the weights of a sharded student are whole."""
        parts = self.parts
        if parts is None:  # the model's own forward makes the logits
            return compute(picked(wrapped(**inputs, use_cache=False).logits, chosen), Head())

        def inside(**kwargs: Any) -> _Result:
            hidden = picked(run_backbone(parts, kwargs)[0], chosen)
            # By the head's own call, whose hooks gather the weights of a sharded student.
            return ForwardRedirection()(
                parts.head, parts.head, lambda states: compute(states, parts.head_of(parts.head)), hidden
            )

        return ForwardRedirection()(wrapped, self.model, inside, **inputs)

    def _terms(self, hidden: torch.Tensor, head: Head, targets: PolicyTargets) -> tuple[torch.Tensor, ...]:
        sampled = len(targets.advantages)
        labels, teacher = targets.labels[:sampled], targets.predictions
        states = hidden[:sampled]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.single_step_weight > 0):
            single, divergence = tiled_loss(
                states, head, DensePredictions(teacher.hidden[:sampled], teacher.open_head), labels, self.single_step
            )

        def policy_loss(log_probs: torch.Tensor, rows: slice) -> torch.Tensor:
            return clipped_policy_loss(log_probs, targets.mixture[rows], targets.advantages[rows], self.cliprange)

        with torch.set_grad_enabled(torch.is_grad_enabled() and self.policy_weight > 0):
            policy, log_probs = tiled_token_loss(states, head, labels, policy_loss, self.temperature, self.vocab)
        # The distillation objective has the square of the temperature; the policy's gradient has not.
        total = self.policy_weight * policy + self.single_step_weight / self.temperature**2 * single
        clipped = ((log_probs - targets.mixture).exp() - 1).abs() > self.cliprange
        text = total.new_zeros(())
        if len(targets.labels) > sampled:
            text, _ = tiled_loss(
                hidden[sampled:],
                head,
                DensePredictions(teacher.hidden[sampled:], teacher.open_head),
                targets.labels[sampled:],
                self.text,
            )
        return total, text, policy.detach(), divergence, clipped.sum().float()


__all__ = ["PolicyLoss", "PolicyParts", "PolicyTargets"]
