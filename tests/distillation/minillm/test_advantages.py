"""Rewards, returns, whitening, weights and the clipped loss, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from cbd_hf.distillation.minillm.advantages import (
    clipped_policy_loss,
    future_returns,
    importance_weights,
    mixture_log_probs,
    token_rewards,
    whitened,
)
from cbd_hf.distillation.minillm.rollouts import Rollout, with_advantages


LENGTHS = [4, 1, 7, 3]


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_rewards(clip: float) -> None:
    teacher, student = noise(3, 5), noise(3, 5, seed=1)
    rewards = token_rewards(teacher, student, 0.5, clip)
    for row in range(3):
        for position in range(5):
            expected = (float(teacher[row, position]) - float(student[row, position])) / 0.5
            if clip:
                expected = min(max(expected, -clip), clip)
            assert float(rewards[row, position]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.95, 1.0])
@pytest.mark.parametrize("length_normalised", [True, False])
def test_returns(gamma: float, length_normalised: bool, mask: torch.Tensor) -> None:
    rewards = noise(*mask.shape)  # with values behind the ends, which must not count
    returns = future_returns(rewards, mask, gamma, length_normalised)
    for row, length in enumerate(LENGTHS):
        for position in range(mask.shape[1]):
            expected = 0.0
            for later in range(position, length):
                expected += gamma ** (later - position) * float(rewards[row, later])
            if length_normalised and position < length:
                expected /= length - position
            assert float(returns[row, position]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_whitening(mask: torch.Tensor) -> None:
    values = 3 * noise(*mask.shape) + 2
    numbers = [float(values[row, position]) for row, length in enumerate(LENGTHS) for position in range(length)]
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    result = whitened(values, mask)
    for row, length in enumerate(LENGTHS):
        for position in range(mask.shape[1]):
            expected = (float(values[row, position]) - mean) / math.sqrt(variance + 1e-8) if position < length else 0.0
            assert float(result[row, position]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_importance_weights(share: float) -> None:
    q, p = noise(2, 6).softmax(-1), noise(2, 6, seed=1).softmax(-1)
    mixture = mixture_log_probs(q.log(), p.log(), share)
    weights = importance_weights(q.log(), mixture)
    for row in range(2):
        for token in range(6):
            drawn_with = (1 - share) * float(q[row, token]) + share * float(p[row, token])
            assert float(mixture[row, token].exp()) == pytest.approx(drawn_with, rel=1e-5)
            assert float(weights[row, token]) == pytest.approx(float(q[row, token]) / drawn_with, rel=1e-5)


def test_clipped_loss() -> None:
    log_probs, mixture, advantages = noise(40), noise(40, seed=1), noise(40, seed=2)
    log_probs.requires_grad_()
    losses = clipped_policy_loss(log_probs, mixture, advantages, 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    clipped = 0
    for index in range(40):
        ratio = math.exp(float(log_probs[index].detach()) - float(mixture[index]))
        advantage = float(advantages[index])
        expected = -min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.2))
        assert float(losses[index]) == pytest.approx(expected, rel=1e-5)
        # Nothing is gained beyond the range, but the way back to it stays open.
        stopped = ratio > 1.2 if advantage > 0 else ratio < 0.8
        clipped += stopped
        assert float(gradient[index]) == pytest.approx(0.0 if stopped else -advantage * ratio, rel=1e-4)
    assert 5 < clipped < 35


def test_whole_batches(mask: torch.Tensor) -> None:
    """Advantages of a rollout batch are those of its matrix, whitened over all samples together."""
    teacher, student = noise(*mask.shape), noise(*mask.shape, seed=1)
    empty = torch.zeros(0)
    rollouts = [
        Rollout(row, torch.tensor([3]), torch.arange(n), student[row, :n], teacher[row, :n], empty, empty)
        for row, n in enumerate(LENGTHS)
    ]
    found = with_advantages(rollouts, gamma=0.9)
    expected = whitened(future_returns(token_rewards(teacher, student), mask, 0.9), mask)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row].advantages, expected[row, :length])
    everything = torch.cat([sample.advantages for sample in found])
    assert float(everything.mean()) == pytest.approx(0, abs=1e-6)
    assert float(everything.var(correction=0)) == pytest.approx(1, rel=1e-4)
