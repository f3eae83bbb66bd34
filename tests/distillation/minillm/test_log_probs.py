"""Losses of selected log-probabilities in tiles, against whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cbd_hf.distillation import tiles
from cbd_hf.distillation.minillm.log_probs import selected_log_probs, tiled_token_loss
from cbd_hf.distillation.predictions import Head


@pytest.mark.parametrize("tile", [7, 10_000])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap", "temperature", "vocab"),
    [(False, 1.0, None, 1.0, None), (True, 0.5, 4.0, 2.0, None), (True, 1.0, None, 1.0, 9)],
)
def test_against_whole_logits(
    bias: bool,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int | None,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(tiles._TILE_VALUES, "cpu", 11 * tile)
    torch.manual_seed(0)
    hidden, weight, offset = torch.randn(20, 6), torch.randn(11, 6), torch.randn(11)
    labels, factors = torch.randint(0, vocab or 11, (20,)), torch.randn(20)
    leaves = [hidden, weight, *([offset] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    logits = F.linear(hidden, weight, offset if bias else None) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    whole = F.log_softmax(logits[:, :vocab] / temperature, -1).gather(-1, labels[:, None])[:, 0]
    expected = torch.autograd.grad((factors * whole.exp()).sum() * 3, leaves)

    head = Head(weight, offset if bias else None, scale, softcap)
    total, log_probs = tiled_token_loss(
        hidden, head, labels, lambda found, rows: factors[rows] * found.exp(), temperature, vocab
    )
    torch.testing.assert_close(total, (factors * whole.exp()).sum())
    torch.testing.assert_close(log_probs, whole.detach())
    assert not log_probs.requires_grad
    for found, value in zip(torch.autograd.grad(total * 3, leaves), expected, strict=True):
        torch.testing.assert_close(found, value)
    torch.testing.assert_close(selected_log_probs(hidden, head, labels, temperature, vocab), whole.detach())


def test_a_model_that_makes_its_own_logits() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.tensor([0, 3, 8, 2, 1])
    total, _ = tiled_token_loss(logits, Head(), labels, lambda found, rows: -found, vocab=9)
    expected = F.cross_entropy(logits[:, :9], labels, reduction="sum")
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], torch.autograd.grad(expected, logits)[0])
