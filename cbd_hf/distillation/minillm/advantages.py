"""
MiniLLM's policy gradient as pure functions (arXiv 2306.08543, Sec. 2.2).

p is the teacher's distribution, q the student's when the samples were drawn, and m = (1 - a) q + a p what they were
drawn from. Matrices have one row a sample, shape (rows, length), and a bool mask that is true on the tokens of each
sample, from the first column on.
"""

from __future__ import annotations

import math

import torch


def token_rewards(
    teacher: torch.Tensor, student: torch.Tensor, scale: float = 0.5, clip: float = 100.0
) -> torch.Tensor:
    """
    `(log p - log q) / scale`, cut to [-clip, clip].

    Args:
        teacher (`torch.Tensor`): log p of the sampled tokens, any shape.
        student (`torch.Tensor`): log q of them.
        scale (`float`, *optional*, defaults to 0.5): above 0.
        clip (`float`, *optional*, defaults to 100.0): 0 cuts nothing.
    """
    rewards = (teacher - student) / scale
    return rewards.clamp(-clip, clip) if clip else rewards


def future_returns(
    rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 0.95, length_normalised: bool = True
) -> torch.Tensor:
    """
    `sum_{k >= t} gamma^(k - t) r_k`, divided by the number of tokens from t on; 0 outside of the mask.

    Args:
        rewards (`torch.Tensor`): float, shape (rows, length).
        mask (`torch.Tensor`): bool, the same shape.
        gamma (`float`, *optional*, defaults to 0.95): in (0, 1].
        length_normalised (`bool`, *optional*, defaults to `True`): whether to divide.
    """
    rewards = rewards * mask
    returns = torch.empty_like(rewards)
    ahead = rewards.new_zeros(len(rewards))
    for position in reversed(range(rewards.shape[1])):
        ahead = rewards[:, position] + gamma * ahead
        returns[:, position] = ahead
    if length_normalised:
        remaining = mask.flip(1).cumsum(1).flip(1)
        returns = returns / remaining.clamp(min=1)
    return returns * mask


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shifted and scaled to mean 0 and variance 1 over all that the mask marks; 0 elsewhere."""
    chosen = values[mask]
    if not len(chosen):
        return values * mask
    variance, mean = torch.var_mean(chosen, correction=0)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def mixture_log_probs(student: torch.Tensor, teacher: torch.Tensor, teacher_mix: float) -> torch.Tensor:
    """`log((1 - a) q + a p)` from log q, log p and a in [0, 1)."""
    if not teacher_mix:
        return student
    return torch.logaddexp(student + math.log1p(-teacher_mix), teacher + math.log(teacher_mix))


def importance_weights(student: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """`q / m` of each token; with the policy's ratio `q_now / q` it makes `q_now / m`."""
    return (student - mixture).exp()


def clipped_policy_loss(
    log_probs: torch.Tensor, mixture: torch.Tensor, advantages: torch.Tensor, cliprange: float = 0.2
) -> torch.Tensor:
    """
    `max(-A rho, -A clip(rho, 1 - cliprange, 1 + cliprange))` of each token, `rho = q_now / m`.

    Args:
        log_probs (`torch.Tensor`): log q_now of the sampled tokens, any shape; differentiable.
        mixture (`torch.Tensor`): log m of them.
        advantages (`torch.Tensor`): A of them.
        cliprange (`float`, *optional*, defaults to 0.2): in (0, 1).
    """
    ratio = (log_probs - mixture).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


__all__ = [
    "clipped_policy_loss",
    "future_returns",
    "importance_weights",
    "mixture_log_probs",
    "token_rewards",
    "whitened",
]
