"""Every span objective against its formula written out in float64, with gradients: of logits, heads and caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from cbd_hf.distillation import tiles
from cbd_hf.distillation.bridge.objectives import SpanObjective, Vocabularies, likelihood_matching
from cbd_hf.distillation.bridge.spans import MOST_JOINED, Alignment, join_spans
from cbd_hf.distillation.bridge.tiles import tiled_span_loss
from cbd_hf.distillation.objectives import DIVERGENCES, Objective
from cbd_hf.distillation.predictions import DensePredictions, Head, Predictions, SparsePredictions
from cbd_hf.distillation.tiles import tiled_loss
from cbd_hf.tokenization.vocabulary import VocabularyMap

from ..test_objectives import project, randn, random_head
from .plain import (
    SEGMENTS,
    SOURCE_VOCAB,
    STUDENT_VOCAB,
    Segments,
    boundaries,
    expected_loss,
    make_spans,
    nearest,
    vocabulary_map,
)


WIDTHS = (6, 9)
METHODS: dict[str, dict[str, Any]] = {
    "overlap_kl forward_kl": {},
    "overlap_kl reverse_kl": {},
    "overlap_kl generalized_jsd": {"beta": 0.3},
    "overlap_kl skew_forward_kl": {"skew": 0.2},
    "overlap_kl skew_reverse_kl": {"skew": 0.2},
    "overlap_kl adaptive_kl": {"head_mass": 0.4},
    "overlap_kl total_variation": {},
    "alm": {"alm_debias": False},
    "alm to a likely end": {"alm_bias_threshold": 0.35},
    "alm to any end": {"alm_bias_threshold": 0.0},
    "uld": {},
    "uld of 3": {"uld_tokens": 3},
    "mined forward_kl": {},
    "mined reverse_kl": {},
}


def make_objective(method: str, **options: float) -> SpanObjective:
    name, divergence = method.split()[0], method.split()[-1]
    options = {**METHODS[method], **options}
    of_spans: dict[str, Any] = {key: options.pop(key) for key in list(options) if key.startswith(("alm", "uld"))}
    return SpanObjective(
        name, Objective(divergence if divergence in DIVERGENCES else "forward_kl", **options), **of_spans
    )


@dataclass(frozen=True)
class Way:
    """What goes into the loss."""

    heads: bool = True  # hidden states and heads; else logits in place of hidden states
    tile: int = 10**6
    student: tuple[int, float, float | None, bool] = (0, 1.0, None, False)  # padding rows, scale, softcap, bias
    source: tuple[int, float, float | None, bool] = (0, 1.0, None, False)
    k: int | None = None  # of a cache
    segments: Segments = field(default=SEGMENTS)


_ONE_SPAN, _SOME = 1, 5 * (STUDENT_VOCAB + SOURCE_VOCAB)
WAYS = {
    "one tile": Way(),
    "a tile for each span": Way(tile=_ONE_SPAN),
    "some tiles": Way(tile=_SOME),
    "logits": Way(heads=False, tile=_SOME),
    "bias, scale and softcap": Way(student=(0, 0.3, 2.0, True), source=(0, 1.5, 4.0, True), tile=_SOME),
    "padding rows": Way(student=(3, 1.0, None, True), source=(5, 1.0, None, True), tile=_SOME),
    "no spans": Way(tile=_SOME, segments=[(False, 7, 4)]),
    "nothing but spans": Way(tile=_SOME, segments=[segment for segment in SEGMENTS if segment[0]]),
    "spans of one token": Way(tile=_SOME, segments=[(True, 1, 1)] * 6),
    "all tokens of a cache": Way(tile=_SOME, k=SOURCE_VOCAB),
    "top 4": Way(tile=_ONE_SPAN, k=4),
    "top 1, padding rows": Way(student=(3, 0.5, 3.0, True), source=(5, 1.0, None, True), tile=_SOME, k=1),
    "top 4 of logits": Way(heads=False, k=4),
}
# ULD compares the largest probabilities, of which a cache has k.
PAIRS = [
    (method, way)
    for method in METHODS
    for way, this in WAYS.items()
    if this.k is None or method[:3] != "uld" or this.k >= METHODS[method].get("uld_tokens", SOURCE_VOCAB + 1)
]


def vocabularies_of(way: Way) -> Vocabularies:
    rows = STUDENT_VOCAB + way.student[0], SOURCE_VOCAB + way.source[0]
    return Vocabularies.of(vocabulary_map(), *rows, nearest(), boundaries())


def predictions_of(
    logits: torch.Tensor, hidden: torch.Tensor, head: Head, alignment: Alignment, k: int | None, temperature: float
) -> Predictions:
    if k is None:
        return DensePredictions(hidden, head.open)
    log_p = torch.log_softmax(logits.detach().double() / temperature, dim=-1)
    ids = log_p.topk(k).indices
    rest = log_p.exp().scatter(-1, ids, 0.0).sum(-1).log()
    labels = log_p.gather(-1, alignment.source_labels[:, None]).flatten()
    return SparsePredictions(
        ids, log_p.gather(-1, ids).float(), tail=rest.float(), vocab=logits.shape[-1], labels=labels.float()
    )


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.3), (2.0, 0.0), (2.0, 0.3)])
@pytest.mark.parametrize(("method", "way"), PAIRS)
def test_formula(method: str, way: str, temperature: float, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    this = WAYS[way]
    objective = make_objective(method, temperature=temperature, cross_entropy_weight=weight)
    monkeypatch.setitem(tiles._TILE_VALUES, "cpu", this.tile)
    vocabularies = vocabularies_of(this)
    labels, alignment = make_spans(vocabularies, this.segments)
    sizes = (len(labels), len(alignment.source_labels))
    vocabs = (len(vocabularies.student_groups), len(vocabularies.source_groups))
    if this.heads:
        hidden, theirs = (
            randn(size, width, seed=seed) for seed, (size, width) in enumerate(zip(sizes, WIDTHS, strict=True))
        )
        head, other = (
            random_head(vocab, width, *options[1:], seed=seed)
            for seed, (vocab, width, options) in enumerate(
                zip(vocabs, WIDTHS, (this.student, this.source), strict=True), start=5
            )
        )
    else:
        hidden, theirs = (2 * randn(size, vocab, seed=vocab) for size, vocab in zip(sizes, vocabs, strict=True))
        head, other = Head(), Head()
    trained = [value.requires_grad_() for value in (hidden, head.weight, head.bias) if value is not None]

    student, source = project(hidden, head), project(theirs, other).detach()
    expected, part = expected_loss(student, source, labels, alignment, vocabularies, objective, this.k)
    gradients = torch.autograd.grad(expected, trained)
    assert float(part) > 0.1 or not alignment.count

    predictions = predictions_of(source, theirs, other, alignment, this.k, temperature)
    arguments = (hidden, head, predictions, labels, alignment, vocabularies, objective)
    total, found = tiled_span_loss(*arguments)
    assert total.dtype == found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), part, rtol=1e-5, atol=1e-5)
    for value, gradient in zip(torch.autograd.grad(total, trained), gradients, strict=True):
        torch.testing.assert_close(value, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # as evaluation calls it
        again, found_again = tiled_span_loss(*arguments)
    assert not again.requires_grad and torch.equal(again, total) and torch.equal(found_again, found)


class Recorder(Objective):
    """Keeps the events that it compares."""

    events: tuple[torch.Tensor, torch.Tensor]

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        object.__setattr__(self, "events", (student, teacher))
        return super().divergence(student, teacher)


@pytest.mark.parametrize("k", [None, 4, SOURCE_VOCAB])
@pytest.mark.parametrize("seed", range(3))
def test_events_add_up_to_one(k: int | None, seed: int) -> None:
    """On both sides, and a span of several tokens with the rest of its group is the group."""
    vocabularies = Vocabularies.of(vocabulary_map(seed), STUDENT_VOCAB, SOURCE_VOCAB)
    recorder = Recorder("forward_kl")
    hidden, theirs = 2 * randn(17, STUDENT_VOCAB, seed=seed), 2 * randn(16, SOURCE_VOCAB, seed=seed + 10)
    found = []
    for segments in (SEGMENTS, [(is_span, *(min(n, 1) if is_span else n for n in ns)) for is_span, *ns in SEGMENTS]):
        labels, alignment = make_spans(vocabularies, segments, seed, same=1.0)
        own, others = hidden[: len(labels)], theirs[: len(alignment.source_labels)]
        predictions = predictions_of(others, others, Head(), alignment, k, 1.0)
        objective = SpanObjective("overlap_kl", recorder)
        tiled_span_loss(own, Head(), predictions, labels, alignment, vocabularies, objective)
        found.append([event.exp() for event in recorder.events])
        for event in found[-1]:
            torch.testing.assert_close(event.sum(-1), torch.ones(alignment.count), rtol=1e-5, atol=1e-5)
    # Both begin with a span of one token at the same position; the second, of several, has an event of its own.
    divided, plain = found
    known = vocabularies.count + (1 if k is None else 2)
    for several, single in zip(divided, plain, strict=True):
        assert several.shape[-1] == known + 1 and single.shape[-1] == known
        torch.testing.assert_close(several[0, :-1], single[0])
        assert several[0, -1] == 0 and (several[1, -1] > 0 or k == 4)


def test_joined_spans() -> None:
    """Until an end is likely; never over a gap, a row's end or the last token."""
    spans = torch.tensor([-1, 0, 1, 2, 2, -1, 3, 4, 5, 6])
    others = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])
    follows = torch.ones(10, dtype=torch.bool)
    follows[7] = False  # the row ends behind span 4
    single = Alignment(spans, others, torch.zeros(8, dtype=torch.int64), 7, follows)
    # Of the source's positions: behind span 0, 1, 2 and so on.
    ends = torch.tensor([9.0, 0.05, 9.0, 0.3, 0.05, 0.01, 0.02, 0.03]).clamp(max=1).log()
    joined = join_spans(single, ends, 0.1)
    # 0 is joined with 1, behind which an end is likely; 2 and 3 do not touch; 4 ends its row; 5 with 6, the last.
    assert joined.spans.tolist() == [-1, 0, 0, 1, 1, -1, 2, 2, 3, 3] and joined.count == 4
    assert joined.source_spans.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert joined.ended is not None and joined.ended.tolist() == [True, True, False, False]
    assert joined.source_ends is not None
    torch.testing.assert_close(joined.source_ends.exp(), torch.tensor([0.3, 0.05, 1.0, 1.0]))
    for impossible in (ends, torch.full_like(ends, -torch.inf)):
        none = join_spans(single, impossible, 0.0)
        assert none.count == 7 and torch.equal(none.spans, spans)


@pytest.mark.parametrize("before", [0, 3])
def test_no_more_spans_are_joined(before: int) -> None:
    """In text without white space, wherever it begins in a batch."""
    count = 2 * MOST_JOINED + 5
    spans = torch.arange(before + count)
    ends = torch.full((before + count,), 1e-3)
    ends[1 : before + 1] = 1.0  # behind a span is the next position
    joined = join_spans(Alignment(spans, spans, spans, len(spans)), ends.log(), 0.1)
    sizes = torch.bincount(joined.spans).tolist()
    assert sizes[:before] == [1] * before and sizes[before:] == [MOST_JOINED, MOST_JOINED, 5]


def test_ends_from_a_cache_are_not_less_likely() -> None:
    """A student that agrees with the source learns next to nothing from what a cache leaves out."""
    vocab, positions, k = 3000, 40, 64
    ids = np.arange(vocab)
    begins = ids % 3 == 0
    vocabularies = Vocabularies.of(VocabularyMap(ids, ids, ids, ids), vocab, vocab, None, (begins, begins))
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(positions)])
    logits = -torch.log1p(order.float())  # Zipf's law: 64 tokens have a bit more than half
    labels = logits.topk(3).indices[:, 2]
    alignment = Alignment(torch.arange(positions), torch.arange(positions), labels, positions)
    predictions = predictions_of(logits, logits, Head(), alignment, k, 1.0)
    assert isinstance(predictions, SparsePredictions) and 0.4 < float(predictions.tail.exp().mean())  # type: ignore[union-attr]
    student = logits.clone().requires_grad_()
    objective = SpanObjective("alm", Objective("forward_kl"))
    total, _ = tiled_span_loss(student, Head(), predictions, labels, alignment, vocabularies, objective)
    assert float(total.detach()) < 0.005 * positions


def test_a_source_that_rules_a_span_out() -> None:
    student = torch.tensor([-2.0], requires_grad=True)
    value = likelihood_matching(student, torch.tensor([-torch.inf]), 100.0).sum()
    value.backward()
    assert torch.isfinite(value) and value > 0 and torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def same_vocabularies(vocab: int = STUDENT_VOCAB) -> Vocabularies:
    ids = np.arange(vocab)
    return Vocabularies.of(VocabularyMap(ids, ids, ids, ids), vocab, vocab, ids, (ids % 3 == 0, ids % 3 == 0))


def same_text(vocabularies: Vocabularies, segments: Segments) -> tuple[torch.Tensor, Alignment]:
    labels, alignment = make_spans(vocabularies, segments)
    labels = labels % STUDENT_VOCAB
    return labels, Alignment(alignment.spans, alignment.spans, labels, alignment.count)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "method", ["overlap_kl forward_kl", "overlap_kl reverse_kl", "alm", "alm to a likely end", "uld"]
)
@pytest.mark.parametrize("tokens", [1, 2])
def test_identical_models(method: str, temperature: float, tokens: int) -> None:
    vocabularies = same_vocabularies()
    labels, alignment = same_text(vocabularies, [(False, 1, 1), *[(True, tokens, tokens)] * 5, (False, 2, 2)])
    hidden, head = randn(len(labels), 6).requires_grad_(), random_head(STUDENT_VOCAB, 6, 1.0, None, True, seed=5)
    predictions = DensePredictions(hidden.detach().clone(), head.open)
    objective = make_objective(method, temperature=temperature)
    total, _ = tiled_span_loss(hidden, head, predictions, labels, alignment, vocabularies, objective)
    assert abs(float(total.detach())) < 1e-5
    (gradient,) = torch.autograd.grad(total, hidden)
    assert float(gradient.abs().max()) < 1e-5
    other = DensePredictions(hidden.detach() + 0.3, head.open)
    assert float(tiled_span_loss(hidden, head, other, labels, alignment, vocabularies, objective)[0].detach()) > 1e-4


@pytest.mark.parametrize("objective", DIVERGENCES)
@pytest.mark.parametrize("seed", range(5))
def test_divergences_are_not_negative(objective: str, seed: int) -> None:
    """Of whatever distributions, cached ones included."""
    vocabularies = Vocabularies.of(vocabulary_map(seed), STUDENT_VOCAB, SOURCE_VOCAB)
    this = SpanObjective("overlap_kl", Objective(objective))
    for is_span, *sizes in SEGMENTS:
        if not is_span:
            continue
        labels, alignment = make_spans(vocabularies, [(True, *sizes)], seed, same=1.0)
        hidden = 4 * randn(len(labels), STUDENT_VOCAB, seed=seed)
        theirs = 4 * randn(len(alignment.source_labels), SOURCE_VOCAB, seed=seed + 20)
        for k in (None, 3, 1):
            predictions = predictions_of(theirs, theirs, Head(), alignment, k, 1.0)
            total, _ = tiled_span_loss(hidden, Head(), predictions, labels, alignment, vocabularies, this)
            assert float(total) > -1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("objective", DIVERGENCES)
@pytest.mark.parametrize("method", ["overlap_kl", "mined"])
def test_one_vocabulary_is_the_stepwise_objective(method: str, objective: str, temperature: float) -> None:
    vocabularies = same_vocabularies()
    labels, alignment = same_text(vocabularies, [(True, 1, 1)] * 7)
    hidden, theirs = (3 * randn(7, STUDENT_VOCAB, seed=seed) for seed in range(2))
    hidden.requires_grad_()
    plain = Objective(objective, temperature=temperature, cross_entropy_weight=0.3)
    predictions = DensePredictions(theirs, Head().open)
    expected, part = tiled_loss(hidden, Head(), predictions, labels, plain)
    arguments = (hidden, Head(), predictions, labels, alignment, vocabularies, SpanObjective(method, plain))
    total, found = tiled_span_loss(*arguments)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, part, rtol=1e-5, atol=1e-5)
    one, other = (torch.autograd.grad(value, hidden)[0] for value in (total, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 7.0, 100.0])
def test_likelihood_matching_has_the_published_gradient(temperature: float) -> None:
    """That of the binary cross-entropy of p^(1/t) and q^(1/t), times t; and it is 0 at its least."""
    student = -randn(20, seed=1).abs().double() * 5 - 0.1
    source = -randn(20, seed=2).abs().double() * 5 - 0.1
    student.requires_grad_()
    q, p = ((value / temperature).exp() for value in (student, source))
    published = -(p * q.log() + (1 - p) * (1 - q).log()).sum() * temperature
    found = likelihood_matching(student, source, temperature)
    one, other = (torch.autograd.grad(value, student)[0] for value in (found.sum(), published))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert bool((found >= 0).all())
    torch.testing.assert_close(likelihood_matching(source, source, temperature), torch.zeros(20).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_is_computed_in_float32(method: str, dtype: torch.dtype) -> None:
    """Only what goes in and the gradients that come out are rounded, and those once, after they are scaled."""
    vocabularies = vocabularies_of(Way())
    labels, alignment = make_spans(vocabularies)
    sizes, vocabs = (len(labels), len(alignment.source_labels)), (STUDENT_VOCAB, SOURCE_VOCAB)
    hidden, theirs = (randn(size, width, seed=width).to(dtype) for size, width in zip(sizes, WIDTHS, strict=True))
    head, other = (
        Head(randn(vocab, width, seed=width + 1).to(dtype)) for vocab, width in zip(vocabs, WIDTHS, strict=True)
    )
    assert head.weight is not None
    objective = make_objective(method, temperature=2.0, cross_entropy_weight=0.5)
    low = [value.clone().requires_grad_() for value in (hidden, head.weight)]
    full = [value.double().requires_grad_() for value in (hidden, head.weight)]
    predictions = DensePredictions(theirs, other.open)
    total, part = tiled_span_loss(low[0], Head(low[1]), predictions, labels, alignment, vocabularies, objective)
    assert total.dtype == part.dtype == torch.float32
    student, source = full[0] @ full[1].T, project(theirs, other)
    expected, of_spans = expected_loss(student, source, labels, alignment, vocabularies, objective)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.double(), of_spans, rtol=1e-5, atol=1e-5)
    factor = 2.0**-9
    found = torch.autograd.grad(total * factor, low)
    for one, another in zip(found, torch.autograd.grad(expected * factor, full), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), another, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"method='kl' is unknown; choose one of \['alm', 'mined'"):
        SpanObjective("kl")
    with pytest.raises(ValueError, match="uld_tokens=-1 must be at least 1, or 0"):
        SpanObjective("uld", uld_tokens=-1)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alm_temperature=.* must be greater than 0"):
            SpanObjective("alm", alm_temperature=temperature)
    for threshold in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="alm_bias_threshold=.* must be at least 0, which joins no spans"):
            SpanObjective("alm", alm_bias_threshold=threshold)


def test_what_a_method_needs() -> None:
    vocabularies = Vocabularies.of(vocabulary_map(), STUDENT_VOCAB, SOURCE_VOCAB)
    labels, alignment = make_spans(vocabularies)
    hidden, theirs = randn(len(labels), STUDENT_VOCAB), randn(len(alignment.source_labels), SOURCE_VOCAB)

    def loss(predictions: Predictions, method: str) -> None:
        arguments = (hidden, Head(), predictions, labels, alignment, vocabularies)
        tiled_span_loss(*arguments, make_objective(method))

    dense = DensePredictions(theirs, Head().open)
    with pytest.raises(ValueError, match="alm_debias needs the tokens that begin anew"):
        loss(dense, "alm to any end")
    with pytest.raises(ValueError, match="mined needs the nearest tokens"):
        loss(dense, "mined forward_kl")
    kept = predictions_of(theirs, theirs, Head(), alignment, 3, 1.0)
    assert isinstance(kept, SparsePredictions)
    without = SparsePredictions(kept.token_ids, kept.log_probs, kept.tail, vocab=SOURCE_VOCAB)
    with pytest.raises(ValueError, match="no log-probabilities of the labels"):
        loss(without, "alm")
    sampled = SparsePredictions(kept.token_ids, kept.log_probs, vocab=SOURCE_VOCAB, labels=kept.labels)
    with pytest.raises(ValueError, match="needs a cache of the top k"):
        loss(sampled, "overlap_kl forward_kl")


@pytest.mark.parametrize("method", ["overlap_kl forward_kl", "overlap_kl adaptive_kl", "alm", "mined forward_kl"])
@pytest.mark.parametrize("width", [1, 3])
def test_a_student_that_is_very_wrong_learns(method: str, width: int) -> None:
    """Its probability of what the source is sure of is 1e-13 a token, and that of a span of three 1e-39."""
    vocabularies = vocabularies_of(Way())
    labels, alignment = make_spans(vocabularies, [(True, width, 1)], same=1.0)
    student = torch.zeros(width, STUDENT_VOCAB, dtype=torch.float64)
    student[torch.arange(width), labels] = -30.0
    alike = vocabularies.student_groups[:STUDENT_VOCAB] == vocabularies.student_groups[labels[0]]
    student[0, alike] = -30.0
    source = torch.zeros(1, SOURCE_VOCAB, dtype=torch.float64)
    source[0, alignment.source_labels] = 12.0
    objective = make_objective(method)
    logits = [values.requires_grad_() for values in (student.clone(), student.float().clone())]
    expected, _ = expected_loss(logits[0], source, labels, alignment, vocabularies, objective)
    expected.backward()
    predictions = DensePredictions(source.float(), Head().open)
    value, _ = tiled_span_loss(logits[1], Head(), predictions, labels, alignment, vocabularies, objective)
    value.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1].grad.double(), logits[0].grad, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    assert float(logits[0].grad[0, alike].sum()) < -0.005  # type: ignore[index]


@pytest.mark.parametrize("temperature", [1.0, 5.0, 100.0])
def test_likelihood_matching_of_an_unlikely_span(temperature: float) -> None:
    student = torch.tensor([-60.0], requires_grad=True)
    value = likelihood_matching(student, torch.tensor([-1.0]), temperature).sum()
    value.backward()
    q, p = (torch.tensor(x / temperature, dtype=torch.float64).exp() for x in (-60.0, -1.0))
    expected = temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    assert abs(value.item() - float(expected)) < 1e-4
    assert abs(float(student.grad) - float((q - p) / (1 - q))) < 1e-4  # type: ignore[arg-type]
