"""Tokens drawn from the teacher estimate its distribution, and the forward divergence's gradient, without bias."""

from __future__ import annotations

import torch

from cbd_hf.distillation.cache.entries import drawn, most_likely, uniforms_of


VOCABULARY, DRAWS = 40, 8


def distributions(count: int, seed: int = 0) -> torch.Tensor:
    """Log-probabilities, some very uneven, some tokens impossible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, VOCABULARY, generator=generator) * torch.linspace(0.5, 4, count)[:, None]
    logits[:, 7] = -torch.inf
    return logits.log_softmax(-1)


def estimates(log_probs: torch.Tensor, rows: int) -> torch.Tensor:
    """Estimated probabilities from many caches' worth of draws: float64, shape (rows, positions, vocab)."""
    made = []
    for row in range(rows):
        token_ids, _, counts = drawn(log_probs, uniforms_of(row.to_bytes(16, "little"), 0, len(log_probs), DRAWS))
        made.append(torch.zeros(log_probs.shape, dtype=torch.int64).scatter_add_(1, token_ids, counts))
    return torch.stack(made).double() / DRAWS


def z_scores(samples: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Deviation of the mean over the first axis, in its standard errors; 0 where both are exact."""
    error, deviation = samples.std(0) / len(samples) ** 0.5, (samples.mean(0) - expected).abs()
    return torch.where(deviation < 1e-7, 0, deviation / error)


def test_expectations_are_exact() -> None:
    log_probs = distributions(6)
    values = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimates(log_probs, 4000)
    assert torch.equal(found.sum(-1), torch.ones(4000, 6, dtype=torch.float64))
    assert not found[..., 7].any(), "an impossible token was drawn"
    assert (z_scores(found @ values, log_probs.double().exp() @ values) < 4).all()
    likely = log_probs.exp() > 1e-3
    scores = z_scores(found, log_probs.double().exp())[likely]
    assert (scores < 4.5).all() and 0.7 < scores.square().mean() < 1.4


def test_draws_are_independent() -> None:
    """The variance of an estimate is that of independent draws, p (1 - p) / n."""
    log_probs = distributions(4)
    found, p = estimates(log_probs, 4000), log_probs.double().exp()
    likely = p > 0.05
    assert torch.allclose(found.var(0)[likely], (p * (1 - p) / DRAWS)[likely], rtol=0.15)


def test_gradient_of_the_forward_divergence_is_unbiased() -> None:
    log_probs = distributions(5)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64)

    def gradient(p: torch.Tensor) -> torch.Tensor:
        """Of -sum p log q by the student's head: what is left of KL(p, q)."""
        own = weight.clone().requires_grad_()
        loss = -(p * (hidden @ own.T).log_softmax(-1)).sum()
        return torch.autograd.grad(loss, own)[0]

    exact = gradient(log_probs.double().exp())
    samples = torch.stack([gradient(p) for p in estimates(log_probs, 1500)])
    # Of a token that is almost never drawn, the mean is not normally distributed yet.
    likely = log_probs.exp().sum(0) > 3e-3
    scores = z_scores(samples, exact)[likely]
    assert likely.sum() > 30 and (scores < 4.5).all() and 0.6 < scores.square().mean() < 1.6
    # What top-k alone, normalised again, would do.
    top = log_probs.topk(4).indices
    kept = torch.zeros_like(log_probs).scatter_(1, top, log_probs.exp().gather(1, top)).double()
    assert (z_scores(samples, gradient(kept / kept.sum(-1, keepdim=True))) > 10).any()


def test_draws_depend_on_row_and_seed() -> None:
    one, other = bytes(range(16)), bytes(range(1, 17))
    assert torch.equal(uniforms_of(one, 0, 3, 4), uniforms_of(one, 0, 3, 4))
    assert not torch.equal(uniforms_of(one, 0, 3, 4), uniforms_of(one, 1, 3, 4))
    assert not torch.equal(uniforms_of(one, 0, 3, 4), uniforms_of(other, 0, 3, 4))
    assert ((uniforms_of(one, 0, 100, 100) >= 0) & (uniforms_of(one, 0, 100, 100) < 1)).all()


def test_extreme_uniform_numbers() -> None:
    log_probs = torch.tensor([[0.25, 0.75, 0.0]]).log()
    ends = torch.tensor([[0.0, 0.26, 1 - 2**-53]], dtype=torch.float64)
    token_ids, values, counts = drawn(log_probs, ends)
    assert token_ids.tolist() == [[0, 1, 0]] and counts.tolist() == [[1, 2, 0]]
    assert values.isfinite().all()


def test_tail_is_not_lost_to_rounding() -> None:
    logits = torch.tensor([[30.0, 0.0, -1.0, -2.0]])
    expected = logits.double().log_softmax(-1)
    _, _, tail = most_likely(logits.log_softmax(-1), 2)
    assert torch.allclose(tail.double(), expected[:, 2:].logsumexp(-1), atol=1e-5)
    assert most_likely(logits.log_softmax(-1), 4)[2].tolist() == [-torch.inf]
