"""The span objectives written out in float64, span by span, and random spans to try them on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cbd_hf.distillation.bridge.objectives import SpanObjective, Vocabularies
from cbd_hf.distillation.bridge.spans import MOST_JOINED, Alignment
from cbd_hf.tokenization.vocabulary import VocabularyMap

from ..helpers import cross_entropy, plain_divergence


SHARED, STUDENT_VOCAB, SOURCE_VOCAB = 6, 11, 14
LEAST = 1e-10  # what a cache knows nothing of is not less likely
NOTHING = 1e-37  # of a group without tokens
# (tokens of the student, tokens of the source) of spans and, with False, of what lies between them.
Segments = Sequence[tuple[bool, int, int]]
SEGMENTS: Segments = (
    (False, 2, 1),
    (True, 1, 1),
    (True, 2, 1),
    (True, 1, 3),
    (False, 0, 2),
    (True, 1, 1),
    (True, 2, 2),
    (False, 3, 0),
    (True, 3, 2),
    (True, 1, 1),
    (False, 1, 2),
)


def vocabulary_map(seed: int = 0) -> VocabularyMap:
    """Of random tokens, with some that are in no group on either side."""
    rng = random.Random(seed)
    ids, groups = [], []
    for vocab in (STUDENT_VOCAB, SOURCE_VOCAB):
        shared = rng.sample(range(vocab), SHARED)
        of_tokens = [rng.randrange(-1, SHARED) for _ in range(vocab)]
        of_tokens[next(token for token in range(vocab) if token not in shared)] = -1
        for group, token in enumerate(shared):
            of_tokens[token] = group
        ids.append(np.array(shared))
        groups.append(np.array(of_tokens))
    return VocabularyMap(*ids, *groups)


def nearest(seed: int = 0) -> np.ndarray:
    """A token of the student, or none, for each of the source's."""
    return np.random.default_rng(seed).integers(-1, STUDENT_VOCAB, SOURCE_VOCAB)


def boundaries(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Of random tokens of each side: whether they begin anew."""
    rng = np.random.default_rng(seed)
    student, source = rng.random(STUDENT_VOCAB) < 0.4, rng.random(SOURCE_VOCAB) < 0.4
    student[0] = source[0] = True
    return student, source


def make_spans(
    vocabularies: Vocabularies, segments: Segments = SEGMENTS, seed: int = 0, same: float = 0.7
) -> tuple[torch.Tensor, Alignment]:
    """Labels of the student and an alignment; spans begin in the same group on both sides in `same` of the cases."""
    rng = random.Random(seed)
    groups = [
        values[:vocab].tolist()
        for values, vocab in (
            (vocabularies.student_groups, STUDENT_VOCAB),
            (vocabularies.source_groups, SOURCE_VOCAB),
        )
    ]
    labels: list[list[int]] = [[], []]
    spans: list[list[int]] = [[], []]
    count = 0
    for is_span, *sizes in segments:
        group = rng.randrange(vocabularies.count) if rng.random() < same else None
        for side, size in enumerate(sizes):
            tokens = [rng.randrange(len(groups[side])) for _ in range(size)]
            if is_span and group is not None:
                tokens[0] = rng.choice([token for token, of in enumerate(groups[side]) if of == group])
            labels[side] += tokens
            spans[side] += [count if is_span else -1] * size
        count += is_span
    own, others = (torch.tensor(values, dtype=torch.int64) for values in labels)
    numbers = (torch.tensor(values, dtype=torch.int64) for values in spans)
    return own, Alignment(*numbers, others, count)


def expected_loss(
    student: torch.Tensor,
    source: torch.Tensor,
    labels: torch.Tensor,
    alignment: Alignment,
    vocabularies: Vocabularies,
    objective: SpanObjective,
    k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The whole objective and the part over spans.

    Args:
        student, source (`torch.Tensor`): float64 logits, shapes (positions, vocab).
        labels, alignment, vocabularies, objective: as in `tiled_span_loss`.
        k (`int`, *optional*): of the source only that many tokens of each position are known, and the labels'.
    """
    this = objective.objective
    q, p = (torch.softmax(logits / this.temperature, dim=-1) for logits in (student, source))
    own = [q[i, token] for i, token in enumerate(labels.tolist())]
    others = [p[i, token] for i, token in enumerate(alignment.source_labels.tolist())]
    known = torch.ones_like(p)
    if k is not None:
        known = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0)
    part = student.sum() * 0
    matched = set()
    shares = p * known / (p * known).sum(-1, keepdim=True)
    for here, there, ends in _spans(q, shares, alignment, vocabularies, objective):
        span_q, span_p = math.prod(own[i] for i in here), math.prod(others[i] for i in there)
        first, other = here[0], there[0]
        if objective.method == "alm":
            part = part + _alm(span_q * ends[0], span_p * ends[1], objective.alm_temperature)
        elif objective.method == "uld":
            part = part + _uld(q[first], p[other], objective.uld_tokens)
        elif objective.method == "mined":
            given = torch.zeros_like(q[first])
            for token, to in enumerate(vocabularies.nearest.tolist()):  # type: ignore[union-attr]
                if to >= 0:
                    given[to] += p[other, token] * known[other, token]
            if len(here) == len(there) == 1 and given.sum() > LEAST:
                matched.add(first)
                given = (given / given.sum()).clamp(min=LEAST)
                part = part + this.temperature**2 * plain_divergence(
                    given[None], q[first][None], this.name, **this.options
                )
        else:
            events = _events(
                q[first],
                p[other],
                known[other],
                vocabularies,
                (int(labels[first]), int(alignment.source_labels[other])),
                None if len(here) == len(there) == 1 else (span_q, span_p),
            )
            part = part + this.temperature**2 * plain_divergence(*events, this.name, **this.options)
    if objective.method == "mined":
        for i in set(range(len(labels))) - matched:
            part = part - this.temperature**2 * own[i].log()
    weight = this.cross_entropy_weight
    return (1 - weight) * part + weight * cross_entropy(student, labels), part.detach()


def _spans(
    q: torch.Tensor,
    p: torch.Tensor,
    alignment: Alignment,
    vocabularies: Vocabularies,
    objective: SpanObjective,
) -> Iterator[tuple[list[int], list[int], tuple[Any, Any]]]:
    """Positions of each span on both sides, and the probabilities that it ends there, joined if ALM asks for that."""
    sides = [alignment.spans.tolist(), alignment.source_spans.tolist()]
    follow = [
        [True] * len(numbers) if known is None else known.tolist()
        for numbers, known in zip(sides, (alignment.follows, alignment.source_follows), strict=True)
    ]
    before: list[list[int]] = [[], []]
    joined = 0
    for span in range(alignment.count):
        now = [[i for i, number in enumerate(numbers) if number == span] for numbers in sides]
        before = [first + more for first, more in zip(before, now, strict=True)]
        ends: tuple[Any, Any] = (1, 1)
        if objective.method == "alm" and objective.alm_debias:
            after = [places[-1] + 1 for places in now]
            there = [
                place < len(numbers) and follows[place - 1]
                for place, numbers, follows in zip(after, sides, follow, strict=True)
            ]
            if all(there):
                begins = (vocabularies.student_boundaries, vocabularies.source_boundaries)
                ends = tuple(  # type: ignore[assignment]
                    probs[place][tokens].sum() for probs, place, tokens in zip((q, p), after, begins, strict=True)
                )
                ends = (ends[0], ends[1].clamp(min=LEAST))
                next_one = all(numbers[place] == span + 1 for place, numbers in zip(after, sides, strict=True))
                joined += 1
                if next_one and ends[1] <= objective.alm_bias_threshold and joined % MOST_JOINED:
                    continue
        yield before[0], before[1], ends
        before, joined = [[], []], 0


def _alm(q: torch.Tensor, p: torch.Tensor, temperature: float) -> torch.Tensor:
    q, p = ((value ** (1 / temperature)).clamp(max=1 - 1e-6) for value in (q, p))
    return temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def _uld(q: torch.Tensor, p: torch.Tensor, tokens: int) -> torch.Tensor:
    pairs = max(len(q), len(p))
    q, p = (F.pad(value.sort(descending=True).values, (0, pairs - len(value))) for value in (q, p))
    return sum((abs(q[rank] - p[rank]) for rank in range(tokens or pairs)), q.new_zeros(()))


def _events(
    q: torch.Tensor,
    p: torch.Tensor,
    known: torch.Tensor,
    vocabularies: Vocabularies,
    first_tokens: tuple[int, int],
    span: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the source and of the student for the same events, shape (1, events); see the docstrings."""
    members = [
        F.one_hot(groups, vocabularies.count + 1).double()
        for groups in (vocabularies.student_groups, vocabularies.source_groups)
    ]
    has = (known @ members[1] > 0) if (known == 0).any() else torch.ones(vocabularies.count + 1, dtype=torch.bool)
    masses = [(q @ members[0]).clamp(min=NOTHING), (p * known @ members[1]).clamp(min=NOTHING)]
    rest = [masses[0][~has].sum(), (p * (1 - known)).sum()]
    groups = [int(matrix[token].argmax()) for matrix, token in zip(members, first_tokens, strict=True)]
    divided = span is not None and groups[0] == groups[1] < vocabularies.count and bool(has[groups[0]])
    events = []
    for side, mass in enumerate(masses):
        parts = [mass[has]]
        if divided:
            assert span is not None
            # A cache may know less of the group than of the span.
            own = torch.minimum(span[side], mass[groups[0]] * (1 - 1e-6))
            left = torch.arange(len(mass)) == groups[0]
            parts = [
                torch.where(left, mass[groups[0]] - own, mass)[has],
                own[None],
            ]
        if (known == 0).any():
            parts.append(rest[side].clamp(min=LEAST)[None])
        events.append(torch.cat(parts)[None])
    return events[1], events[0]
