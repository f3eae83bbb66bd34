"""Every objective against its formula written out in float64, with gradients: of logits, hidden states and caches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cbd_hf._trl import GKDTrainer
from cbd_hf.distillation import tiles
from cbd_hf.distillation.objectives import DIVERGENCES, Objective, distillation_loss
from cbd_hf.distillation.predictions import DensePredictions, Head, SparsePredictions
from cbd_hf.distillation.tiles import tiled_loss

from .helpers import cross_entropy, dense_loss, plain_divergence


POSITIONS, VOCAB = 13, 11
WIDTHS = {"student": 6, "teacher": 9}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    **{f"generalized_jsd {beta}": {"beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0)},
    **{f"skew_{way}_kl {skew}": {"skew": skew} for way in ("forward", "reverse") for skew in (0.0, 0.1, 0.7)},
    **{f"adaptive_kl {mass}": {"head_mass": mass} for mass in (0.2, 0.5, 0.9)},
    "total_variation": {},
}


@dataclass(frozen=True)
class Way:
    """What goes into the loss."""

    heads: bool = True  # hidden states and heads; else logits in place of hidden states
    tile: int = 3 * VOCAB
    student: tuple[int, float, float | None, bool] = (VOCAB, 1.0, None, False)  # vocabulary, scale, softcap, bias
    teacher: tuple[int, float, float | None, bool] = (VOCAB, 1.0, None, False)
    k: int | None = None  # of a cache
    sampled: bool = False


WAYS = {
    "logits": Way(heads=False, tile=4 * VOCAB),
    "hidden states": Way(),
    "one tile": Way(tile=10**6),
    "bias, scale and softcap": Way(student=(VOCAB, 0.3, 2.0, True), teacher=(VOCAB, 1.5, 4.0, True), tile=1),
    "student scaled": Way(student=(VOCAB, 0.5, None, False)),
    "padded student": Way(student=(VOCAB + 3, 1.0, None, True)),
    "padded teacher": Way(teacher=(VOCAB + 5, 1.0, None, True)),
    "top 4": Way(k=4),
    "top 1 with bias, scale and softcap": Way(student=(VOCAB, 0.3, 2.0, True), k=1),
    "top 4, padded student": Way(student=(VOCAB + 3, 1.0, None, True), k=4),
    "top 4 of logits": Way(heads=False, k=4),
    "all tokens": Way(k=VOCAB),
    "sampled": Way(sampled=True),
    "sampled, bias, scale and softcap": Way(student=(VOCAB, 0.3, 2.0, True), sampled=True),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_logits(vocab: int = VOCAB, seed: int = 0, positions: int = POSITIONS) -> torch.Tensor:
    return randn(positions, vocab, seed=seed) * 3


def random_labels(vocab: int = VOCAB, positions: int = POSITIONS) -> torch.Tensor:
    return torch.randint(vocab, (positions,), generator=torch.Generator().manual_seed(9))


def random_head(vocab: int, width: int, scale: float, softcap: float | None, bias: bool, seed: int) -> Head:
    return Head(randn(vocab, width, seed=seed), randn(vocab, seed=seed + 1) if bias else None, scale, softcap)


def project(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """A head's logits in float64."""
    if head.weight is None:
        return hidden.double()
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def buckets(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mass of each of k tokens and of all others."""
    chosen = probabilities.gather(-1, ids)
    if ids.shape[-1] == probabilities.shape[-1]:
        return chosen
    others = torch.ones_like(probabilities).scatter(-1, ids, 0.0)
    return torch.cat([chosen, (probabilities * others).sum(-1, keepdim=True)], dim=-1)


def sampled_from(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and weights as a cache pads them: token 0 with weight 0 behind the last."""
    draws = torch.multinomial(p, 20, replacement=True, generator=torch.Generator().manual_seed(4))
    counts = torch.zeros_like(p).scatter_add_(-1, draws, torch.ones_like(draws, dtype=p.dtype))
    weights, ids = counts.sort(dim=-1, descending=True)
    return ids * (weights > 0), weights.float() / 20


def expected_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, objective: Objective, way: Way
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole objective and divergence by plain formulas, of float64 logits over the common vocabulary."""
    weight, temperature = objective.cross_entropy_weight, objective.temperature
    p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    if way.sampled:
        ids, weights = sampled_from(p)
        divergence = (weights.double() * (p.gather(-1, ids) / q.gather(-1, ids)).log()).sum()
    else:
        if way.k is not None:
            p, q = (buckets(x, p.topk(way.k).indices) for x in (p, q))
        divergence = plain_divergence(p, q, objective.name, **objective.options)
    divergence = temperature**2 * divergence
    return (1 - weight) * divergence + weight * cross_entropy(student, labels), divergence.detach()


def predictions_of(teacher: torch.Tensor, hidden: torch.Tensor, head: Head, way: Way, temperature: float) -> Any:
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    if way.sampled:
        ids, weights = sampled_from(log_p.exp())
        return SparsePredictions(ids, log_p.gather(-1, ids).float(), weights=weights, vocab=VOCAB)
    if way.k is None:
        return DensePredictions(hidden, head.open)
    ids = log_p.topk(way.k).indices
    rest = log_p.exp().scatter(-1, ids, 0.0).sum(-1).log()
    return SparsePredictions(ids, log_p.gather(-1, ids).float(), tail=rest.float(), vocab=VOCAB)


# Samples estimate what is linear in the teacher's probabilities, and that is the forward divergence only.
PAIRS = [(name, way) for name in OBJECTIVES for way in WAYS if not WAYS[way].sampled or name == "forward_kl"]


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (1.0, 0.3), (0.5, 0.3), (3.0, 0.0), (3.0, 1.0)])
@pytest.mark.parametrize(("objective", "way"), PAIRS)
def test_formula(objective: str, weight: float, temperature: float, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    this = WAYS[way]
    chosen = Objective(
        objective.split()[0], temperature=temperature, cross_entropy_weight=weight, **OBJECTIVES[objective]
    )
    monkeypatch.setitem(tiles._TILE_VALUES, "cpu", this.tile)
    labels = random_labels()
    if this.heads:
        hidden, theirs = (randn(POSITIONS, width, seed=seed) for seed, width in enumerate(WIDTHS.values()))
        head, other = (
            random_head(vocab, width, scale, softcap, bias, seed=seed)
            for seed, (width, (vocab, scale, softcap, bias)) in enumerate(
                zip(WIDTHS.values(), (this.student, this.teacher), strict=True), start=5
            )
        )
    else:
        hidden, theirs, head, other = random_logits(seed=1), random_logits(seed=2), Head(), Head()
    trained = [value.requires_grad_() for value in (hidden, head.weight, head.bias) if value is not None]

    student, teacher = project(hidden, head)[:, :VOCAB], project(theirs, other)[:, :VOCAB]
    expected, divergence = expected_loss(student, teacher, labels, chosen, this)
    gradients = torch.autograd.grad(expected, trained)

    losses = [tiled_loss(hidden, head, predictions_of(teacher, theirs, other, this, temperature), labels, chosen)]
    if way == "logits":
        losses.append(distillation_loss(hidden, theirs, labels, chosen))
    for total, part in losses:
        assert total.dtype == part.dtype == torch.float32 and not part.requires_grad
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.double(), divergence * (weight < 1), rtol=1e-5, atol=1e-5)
        for value, gradient in zip(torch.autograd.grad(total, trained), gradients, strict=True):
            torch.testing.assert_close(value, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # as evaluation calls it
        predictions = predictions_of(teacher, theirs, other, this, temperature)
        total, part = tiled_loss(hidden, head, predictions, labels, chosen)
    assert not total.requires_grad and torch.equal(total, losses[0][0]) and torch.equal(part, losses[0][1])


def test_only_what_is_trained_has_a_gradient() -> None:
    hidden, head = randn(POSITIONS, 6), random_head(VOCAB, 6, 1.0, None, True, seed=3)
    predictions = DensePredictions(randn(POSITIONS, 6, seed=7), head.open)
    loss, _ = tiled_loss(hidden.requires_grad_(), head, predictions, random_labels(), Objective())
    loss.backward()
    assert hidden.grad is not None and head.weight is not None and head.weight.grad is None
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()
    frozen = replace(head, weight=head.weight.clone().requires_grad_())
    tiled_loss(hidden.detach(), frozen, predictions, random_labels(), Objective())[0].mul(2.5).backward()
    (expected,) = torch.autograd.grad(
        2.5 * tiled_loss(hidden.detach(), frozen, predictions, random_labels(), Objective())[0], frozen.weight
    )
    torch.testing.assert_close(frozen.weight.grad, expected)


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("objective", ["forward_kl", "generalized_jsd", "skew_forward_kl", "adaptive_kl"])
def test_a_student_that_leaves_little_to_the_rest(objective: str, share: float) -> None:
    """The gradient of the k tokens does not drown in the rounding of the tail's."""
    teacher, student = torch.zeros(2, VOCAB), torch.zeros(2, VOCAB)
    teacher[:, :3] = torch.tensor([2.0, 1.0, 0.5])
    student[:, :3] = torch.tensor([0.3, 0.1, 0.2])
    student[:, 3:] += torch.log(torch.tensor(share))
    student.requires_grad_()
    this, chosen, labels = Way(heads=False, k=3), Objective(objective), torch.zeros(2, dtype=torch.int64)
    predictions = predictions_of(teacher.double(), teacher, Head(), this, 1.0)
    (found,) = torch.autograd.grad(tiled_loss(student, Head(), predictions, labels, chosen)[0], student)
    (expected,) = torch.autograd.grad(
        expected_loss(student.double(), teacher.double(), labels, chosen, this)[0], student
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [256, 300, 1000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
def test_long_heads(vocab: int, spread: float) -> None:
    """Of nearly even distributions, half the tokens; of even ones it does not matter which half."""
    teacher = randn(5, vocab, seed=1) * spread
    student = (randn(5, vocab, seed=2) * max(spread, 1.0)).requires_grad_()
    if not spread:  # two values of q, alternating, so that every head of half the tokens has equal gaps
        student = torch.tensor([1.0, -1.0]).repeat_interleave(vocab // 2).expand(5, -1).clone()
        p, q = torch.full((vocab,), 1 / vocab), torch.softmax(student[0], dim=-1)
        gap = (p - q).abs()
        torch.testing.assert_close(gap[:1], gap[-1:])
        student = student.requires_grad_()
    chosen = Objective("adaptive_kl", head_mass=0.4995)  # not at a tie of the sum
    labels = torch.zeros(5, dtype=torch.int64)
    expected = dense_loss(student.double(), teacher.double(), labels, "adaptive_kl", head_mass=0.4995)
    total, _ = distillation_loss(student, teacher, labels, chosen)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    one, other = (torch.autograd.grad(value, student)[0] for value in (total, expected))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_the_jsd_is_trls(beta: float) -> None:
    student, teacher = random_logits(seed=1), random_logits(seed=2)
    total, _ = distillation_loss(student, teacher, random_labels(), Objective("generalized_jsd", beta))
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")
    torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_tiles_are_trls_chunks(beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    monkeypatch.setitem(tiles._TILE_VALUES, "cpu", 3 * VOCAB)
    hidden, theirs = randn(POSITIONS, 6).requires_grad_(), randn(POSITIONS, 9, seed=1)
    head, other = random_head(VOCAB, 6, 0.5, 3.0, True, seed=5), random_head(VOCAB, 9, 2.0, None, False, seed=8)
    assert head.weight is not None and head.bias is not None
    trained = [hidden, head.weight.requires_grad_(), head.bias.requires_grad_()]
    objective = Objective("generalized_jsd", beta, temperature=temperature)
    ours, _ = tiled_loss(hidden, head, DensePredictions(theirs, other.open), random_labels(), objective)
    arguments = (hidden, head.weight, head.bias, theirs, other.weight, other.bias, beta, temperature, 0.5, 3.0, 2.0)
    expected = ChunkedDivergenceFunction.apply(*arguments, None)[0].sum() * temperature**2
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for one, another in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_equal_distributions(objective: str) -> None:
    student = random_logits().requires_grad_()
    total, _ = distillation_loss(student, student.detach() + 5, random_labels(), Objective(objective))
    assert abs(float(total.detach())) < 1e-4
    assert float(torch.autograd.grad(total, student)[0].abs().max()) < (
        0.5 if objective == "total_variation" else 1e-5
    )


def test_forward_and_reverse_are_mirror_images() -> None:
    student, teacher, labels = random_logits(seed=1), random_logits(seed=2), random_labels()
    forward, _ = distillation_loss(student, teacher, labels, Objective("forward_kl"))
    reverse, _ = distillation_loss(teacher, student, labels, Objective("reverse_kl"))
    torch.testing.assert_close(forward, reverse)
    assert not torch.allclose(forward, distillation_loss(student, teacher, labels)[0], rtol=0.05)


@pytest.mark.parametrize("objective", [name for name in DIVERGENCES if name != "total_variation"])
def test_gradient_keeps_its_size_at_high_temperature(objective: str) -> None:
    """T^2 times a divergence that falls like 1/T^2: the gradient tends to a limit that is not zero."""
    values = []
    for temperature in (1.0, 30.0, 100.0):
        student = random_logits(seed=1).requires_grad_()
        chosen = Objective(objective, temperature=temperature)
        total, _ = distillation_loss(student, random_logits(seed=2), random_labels(), chosen)
        values.append(torch.autograd.grad(total, student)[0])
    sizes = [float(value.norm()) for value in values]
    assert sizes[2] == pytest.approx(sizes[1], rel=0.1)
    assert 0.02 < sizes[2] / sizes[0] < 50
    assert not torch.allclose(values[0], values[2], rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", DIVERGENCES)
def test_low_precision_is_computed_in_float32(objective: str, dtype: torch.dtype) -> None:
    """Only what goes in and the gradients that come out are rounded, and those once, after they are scaled."""
    chosen = Objective(objective, temperature=2.0, cross_entropy_weight=0.5)
    hidden, theirs = (randn(POSITIONS, width, seed=width).to(dtype) for width in WIDTHS.values())
    head, other = (Head(randn(VOCAB, width, seed=width + 1).to(dtype)) for width in WIDTHS.values())
    student, teacher = (random_logits(seed=seed).to(dtype) for seed in (1, 2))
    factor = 2.0**-9  # as of a mean over many tokens; its product with a loss scaler's would be 2^7
    for inputs, loss in (
        ((student,), lambda x: distillation_loss(x, teacher.to(x.dtype), random_labels(), chosen)),
        (
            (hidden, head.weight),
            lambda x, w: tiled_loss(x, Head(w), DensePredictions(theirs, other.open), random_labels(), chosen),
        ),
    ):
        low = [value.detach().clone().requires_grad_() for value in inputs]  # type: ignore[attr-defined]
        full = [value.detach().double().requires_grad_() for value in inputs]  # type: ignore[attr-defined]
        total, divergence = loss(*low)
        assert total.dtype == divergence.dtype == torch.float32
        whole = (full[0], teacher.double()) if len(full) == 1 else (full[0] @ full[1].T, project(theirs, other))
        expected, part = expected_loss(*whole, random_labels(), chosen, Way())
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(divergence.double(), part, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(total * factor, low)
        for one, another in zip(found, torch.autograd.grad(expected * factor, full), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), another, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_loss_scaler_beyond_float16() -> None:
    """GradScaler starts at 65536, which float16 does not have."""
    hidden, head = randn(POSITIONS, 6).half().requires_grad_(), random_head(VOCAB, 6, 1.0, None, False, seed=5)
    predictions = DensePredictions(hidden.detach() + 0.001, head.open)
    total, _ = tiled_loss(hidden, head, predictions, random_labels(), Objective())
    (total * 65536.0).backward()
    assert hidden.grad is not None and bool(torch.isfinite(hidden.grad).all()) and bool(hidden.grad.abs().max() > 0)


@pytest.mark.parametrize("way", ["logits", "hidden states", "top 4", "sampled"])
@pytest.mark.parametrize("objective", DIVERGENCES)
def test_no_positions(objective: str, way: str) -> None:
    hidden, head = randn(0, 6).requires_grad_(), random_head(VOCAB, 6, 1.0, None, True, seed=3)
    labels, nothing = random_labels(positions=0), torch.zeros(0, 4)
    chosen = Objective("forward_kl" if way == "sampled" else objective, cross_entropy_weight=0.5)
    if way == "logits":
        hidden = randn(0, VOCAB).requires_grad_()
        total, divergence = distillation_loss(hidden, randn(0, VOCAB), labels, chosen)
    else:
        predictions: Any = DensePredictions(randn(0, 6), head.open)
        if way != "hidden states":
            other = {"tail": nothing[:, 0]} if way == "top 4" else {"weights": nothing}
            predictions = SparsePredictions(nothing.long(), nothing, **other, vocab=VOCAB)
        assert head.weight is not None
        head.weight.requires_grad_()
        total, divergence = tiled_loss(hidden, head, predictions, labels, chosen)
        assert bool((torch.autograd.grad(total, head.weight, retain_graph=True)[0] == 0).all())
        total, divergence = tiled_loss(hidden, head, predictions, labels, chosen)
    assert total == 0 and divergence == 0
    assert torch.autograd.grad(total, hidden)[0].shape == hidden.shape


@pytest.mark.parametrize("k", [None, 2, 4])
@pytest.mark.parametrize("objective", DIVERGENCES)
def test_far_apart_distributions_stay_finite(objective: str, k: int | None) -> None:
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[0, 0], teacher[0, 1] = 300, 300
    student.requires_grad_()
    labels = torch.tensor([2])
    if k is None:
        total, _ = distillation_loss(student, teacher, labels, Objective(objective))
    else:
        predictions = predictions_of(teacher, teacher, Head(), Way(k=k), 1.0)
        predictions = replace(predictions, log_probs=predictions.log_probs.clamp(min=-1e4), vocab=4)
        total, _ = tiled_loss(student, Head(), predictions, labels, Objective(objective))
    (gradient,) = torch.autograd.grad(total, student)
    assert bool(torch.isfinite(total)) and total > 0.1
    assert bool(torch.isfinite(gradient).all())


def ruled_out(*sides: str, seed: int = 0) -> dict[str, tuple[torch.Tensor, Head]]:
    """Hidden states and heads, of which those of `sides` rule the first two tokens out by their bias."""
    found = {}
    for number, (side, width) in enumerate(WIDTHS.items()):
        bias = randn(VOCAB, seed=seed + 20 + number)
        if side in sides:
            bias[:2] = -torch.inf
        found[side] = (randn(POSITIONS, width, seed=number), Head(randn(VOCAB, width, seed=number + 5), bias))
    return found


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("sides", [("student",), ("teacher",), ("student", "teacher")])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_tokens_that_a_model_rules_out(objective: str, sides: tuple[str, ...], k: int | None) -> None:
    """0 log 0 is 0, in a head's tiles, in those of logits, with a cache, and of whole logits."""
    models = ruled_out(*sides)
    chosen, labels = Objective(objective.split()[0], **OBJECTIVES[objective]), torch.full((POSITIONS,), VOCAB - 1)
    logits = {side: hidden @ head.weight.T + head.bias for side, (hidden, head) in models.items()}
    p, q = (torch.softmax(logits[side].double(), dim=-1) for side in ("teacher", "student"))
    ids = p.topk(VOCAB if k is None else k).indices
    p, q = (buckets(x, ids) for x in (p, q))
    # No 0 log 0 in the plain formulas; -690 times what the other model gives a token shows up in the sum.
    expected = float(plain_divergence(p.clamp(min=1e-300), q.clamp(min=1e-300), chosen.name, **chosen.options))
    infinite = expected > 200
    assert not (infinite and len(sides) == 2)
    teacher = predictions_of(logits["teacher"].double(), *models["teacher"], Way(k=k), 1.0)
    results = []
    for heads in (True, False):
        hidden, head = models["student"]
        given = hidden.clone() if heads else logits["student"].clone()
        given.requires_grad_()
        value, _ = tiled_loss(given, head if heads else Head(), teacher, labels, chosen)
        (gradient,) = torch.autograd.grad(value, given)
        assert torch.isfinite(gradient).all()
        results.append(value.detach())
    if k is None:
        results.append(distillation_loss(logits["student"], logits["teacher"], labels, chosen)[0])
    for value in results:
        assert torch.isfinite(value)
        torch.testing.assert_close(value, results[0], rtol=1e-4, atol=1e-4)
        assert float(value) > 1000 if infinite else float(value) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_only_a_bias_or_logits_can_rule_out() -> None:
    head = ruled_out("student")["student"][1]
    assert tiles.Projection(head, None, low=False).masks and tiles.Projection(Head(), None, low=False).masks
    for bias in (None, torch.zeros(VOCAB)):
        assert not tiles.Projection(Head(head.weight, bias), None, low=False).masks


def test_samples_estimate_the_forward_divergence_only() -> None:
    teacher = random_logits().double()
    predictions = predictions_of(teacher, teacher, Head(), Way(sampled=True), 1.0)
    with pytest.raises(ValueError, match="objective='reverse_kl' cannot be estimated from tokens sampled"):
        tiled_loss(random_logits(seed=3), Head(), predictions, random_labels(), Objective())


def test_a_cache_of_more_tokens_than_the_student_has() -> None:
    teacher = random_logits().double()
    predictions = predictions_of(teacher, teacher, Head(), Way(k=4), 1.0)
    with pytest.raises(ValueError, match="predicts 11 tokens, but the student has 9: .* vocab_size=9"):
        tiled_loss(random_logits(9), Head(), predictions, random_labels(9), Objective())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mse"}, "objective='mse' is unknown"),
        ({"beta": 1.1}, "beta=1.1 is outside"),
        ({"skew": 1.0}, "skew=1.0 is outside"),
        ({"head_mass": 0.0}, "head_mass=0.0 is outside"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"cross_entropy_weight": 2.0}, "cross_entropy_weight=2.0 is outside"),
    ],
)
def test_ranges(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)
