"""Every objective against its formula written out in float64, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cbd_hf._trl import GKDTrainer
from cbd_hf.distillation import objectives
from cbd_hf.distillation.objectives import DIVERGENCES, distillation_loss


POSITIONS, VOCAB = 13, 11


def dense_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    objective: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> torch.Tensor:
    """Sum over positions of (1 - w) T^2 D + w CE; logits of one vocabulary, shape (positions, vocab)."""
    p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (teacher, student))
    m = beta * p + (1 - beta) * q
    if objective == "generalized_jsd":
        objective = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, objective)
    divergence = {
        "forward_kl": lambda: p * (p / q).log(),
        "reverse_kl": lambda: q * (q / p).log(),
        "generalized_jsd": lambda: beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }[objective]().sum()
    normalised = torch.exp(student) / torch.exp(student).sum(-1, keepdim=True)
    cross_entropy = -normalised[torch.arange(len(labels)), labels].log().sum()
    return (1 - cross_entropy_weight) * temperature**2 * divergence + cross_entropy_weight * cross_entropy


Row = tuple[Sequence[int], Sequence[int]]  # token ids, and labels with -100 where nothing is supervised


@torch.no_grad()
def dense_mean(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], vocab: int, **options: float | str
) -> float:
    """The objective over rows of tokens, each run alone, divided by the number of supervised tokens."""
    total, count = 0.0, 0
    for input_ids, row_labels in rows:
        labels = torch.tensor(row_labels[1:])
        chosen = labels != -100
        one, other = (
            model(input_ids=torch.tensor([input_ids])).logits[0, :-1, :vocab].double()[chosen]
            for model in (student, teacher)
        )
        total += float(dense_loss(one, other, labels[chosen], **options))  # type: ignore[arg-type]
        count += int(chosen.sum())
    return total / count


def random_logits(vocab: int = VOCAB, seed: int = 0, positions: int = POSITIONS) -> torch.Tensor:
    return torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def random_labels(vocab: int = VOCAB, positions: int = POSITIONS) -> torch.Tensor:
    return torch.randint(vocab, (positions,), generator=torch.Generator().manual_seed(9))


def value_and_gradient(
    loss: Any, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    student = student.to(dtype).requires_grad_()
    result = loss(student, teacher.to(dtype), random_labels(positions=student.shape[0]), **options)
    total, detail = result if isinstance(result, tuple) else (result, None)
    (gradient,) = torch.autograd.grad(total, student)
    return total.detach().double(), gradient.double(), detail


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        ("forward_kl", 0.5),
        ("reverse_kl", 0.5),
        *(("generalized_jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tile", [4, 512])
def test_formula(
    objective: str, beta: float, temperature: float, weight: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "_TILE_POSITIONS", tile)
    student, teacher = random_logits(seed=1), random_logits(seed=2)
    options = {"objective": objective, "beta": beta, "temperature": temperature, "cross_entropy_weight": weight}
    total, gradient, divergence = value_and_gradient(distillation_loss, student, teacher, torch.float32, **options)
    expected, expected_gradient, _ = value_and_gradient(dense_loss, student, teacher, torch.float64, **options)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert not divergence.requires_grad
    if weight < 1:
        alone, _, _ = value_and_gradient(
            dense_loss, student, teacher, torch.float64, **options | {"cross_entropy_weight": 0.0}
        )
        torch.testing.assert_close(divergence.double(), alone, rtol=1e-5, atol=1e-5)
    else:
        assert divergence == 0


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_the_jsd_is_trls(beta: float) -> None:
    student, teacher = random_logits(seed=1), random_logits(seed=2)
    total, _ = distillation_loss(student, teacher, random_labels(), "generalized_jsd", beta)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")
    torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_equal_distributions(objective: str) -> None:
    student = random_logits()
    total, gradient, _ = value_and_gradient(
        distillation_loss, student, student + 5, torch.float32, objective=objective
    )
    assert abs(float(total)) < 1e-4
    assert float(gradient.abs().max()) < 1e-5


def test_forward_and_reverse_are_mirror_images() -> None:
    student, teacher, labels = random_logits(seed=1), random_logits(seed=2), random_labels()
    forward, _ = distillation_loss(student, teacher, labels, "forward_kl")
    reverse, _ = distillation_loss(teacher, student, labels, "reverse_kl")
    torch.testing.assert_close(forward, reverse)
    assert not torch.allclose(forward, distillation_loss(student, teacher, labels, "reverse_kl")[0], rtol=0.05)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_gradient_keeps_its_size_at_high_temperature(objective: str) -> None:
    """T^2 times a divergence that falls like 1/T^2: the gradient tends to a limit that is not zero."""
    sizes, values = [], []
    for temperature in (1.0, 100.0, 1000.0):
        _, gradient, _ = value_and_gradient(
            distillation_loss,
            random_logits(seed=1).double(),
            random_logits(seed=2).double(),
            torch.float64,
            objective=objective,
            temperature=temperature,
        )
        sizes.append(float(gradient.norm()))
        values.append(gradient)
    assert sizes[2] == pytest.approx(sizes[1], rel=0.1)
    assert 0.02 < sizes[2] / sizes[0] < 50
    assert not torch.allclose(values[0], values[2], rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_low_precision_logits_are_computed_in_float32(dtype: torch.dtype, weight: float) -> None:
    student, teacher = (random_logits(seed=seed).to(dtype) for seed in (1, 2))
    options = {"objective": "reverse_kl", "cross_entropy_weight": weight, "temperature": 2.0}
    low, gradient, _ = value_and_gradient(distillation_loss, student, teacher, dtype, **options)
    full, full_gradient, _ = value_and_gradient(distillation_loss, student, teacher, torch.float32, **options)
    assert torch.equal(low, full)
    torch.testing.assert_close(gradient, full_gradient, rtol=1e-2, atol=1e-3)
    total, divergence = distillation_loss(student, teacher, random_labels())
    assert total.dtype == divergence.dtype == torch.float32


@pytest.mark.parametrize("padded", ["student", "teacher"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_padding_rows_are_cut(padded: str, weight: float) -> None:
    student, teacher = random_logits(seed=1), random_logits(seed=2)
    rows = torch.full((POSITIONS, 5), 50.0)
    expected, _ = distillation_loss(student, teacher, random_labels(), cross_entropy_weight=weight)
    wide = [
        torch.cat([logits, rows], dim=1) if name == padded else logits
        for name, logits in (("student", student), ("teacher", teacher))
    ]
    total, _ = distillation_loss(wide[0], wide[1], random_labels(), cross_entropy_weight=weight)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_no_positions(objective: str) -> None:
    total, gradient, divergence = value_and_gradient(
        distillation_loss, random_logits()[:0], random_logits()[:0], torch.float32, objective=objective
    )
    assert total == 0 and divergence == 0
    assert gradient.shape == (0, VOCAB)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_far_apart_distributions_stay_finite(objective: str) -> None:
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[0, 0], teacher[0, 1] = 300, 300
    total, gradient, _ = value_and_gradient(
        lambda s, t, labels, **options: distillation_loss(s, t, labels % 4, **options),
        student,
        teacher,
        torch.float32,
        objective=objective,
    )
    assert bool(torch.isfinite(total)) and total > 0.1
    assert bool(torch.isfinite(gradient).all())
