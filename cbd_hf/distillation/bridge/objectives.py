"""
What a student is told about spans: groups of tokens of both models that cover the same bytes.

In front of a span both models have read the same text, so there their next-token distributions can be compared. Over a
span each model's probability is the product of its tokens' (the chain rule). p is the source's, q the student's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from cbd_hf.distillation.objectives import Objective, bounded
from cbd_hf.distillation.predictions import SparsePredictions


if TYPE_CHECKING:
    from cbd_hf.tokenization.vocabulary import VocabularyMap

METHODS = ("alm", "mined", "overlap_kl", "uld")
_LEAST_PROBABILITY = 1e-10
LEAST_LOG = math.log(_LEAST_PROBABILITY)
_LEAST_SUM = 1e-37  # just above what float32 has no number for
_LARGEST_LOG = 1e4
_LEAST_GAP = 1e-6  # of logarithms: between a span and its group; between ALM's probabilities and 1


class Side(NamedTuple):
    """
    One model's predictions in a tile of spans.

    Args:
        log_probs (`torch.Tensor`): float32, shape (positions, vocab), at the objective's temperature, as all others.
        token_log_probs (`torch.Tensor`): float32, shape (positions,), of the tokens that follow.
        spans (`torch.Tensor`): int64, shape (positions,), the span of each of these tokens, ascending; -1 for none.
        starts (`torch.Tensor`): int64, shape (spans,), the position of each span's first token.
        groups (`torch.Tensor`): int64, shape (spans,), the group (see [`Vocabularies`]) of each span's first token.
        counts (`torch.Tensor`): int64, shape (spans,), tokens of each span.
        kept ([`SparsePredictions`], *optional*): what a cache has of the positions, in place of `log_probs`.
        ends (`torch.Tensor`, *optional*): float32, shape (spans,), log-probabilities that the text then begins anew.
    """

    log_probs: torch.Tensor
    token_log_probs: torch.Tensor
    spans: torch.Tensor
    starts: torch.Tensor
    groups: torch.Tensor
    counts: torch.Tensor
    kept: SparsePredictions | None = None
    ends: torch.Tensor | None = None

    def span_log_probs(self) -> torch.Tensor:
        """The chain rule: shape (spans,), the sum over each span's tokens."""
        inside = self.spans >= 0
        sums = self.token_log_probs.new_zeros(len(self.starts))
        return sums.index_add(0, self.spans[inside], self.token_log_probs[inside])


@dataclass(frozen=True)
class Vocabularies:
    """
    How the tokens of the two models correspond, on the models' device.

    A group is a shared token with every token of either vocabulary whose text begins with it; the last group has what
    belongs to none. In front of a span, the probability of a group is that of the next text beginning so.

    Args:
        student_groups, source_groups (`torch.Tensor`): int64, shape (vocab,): from 0 to `count` inclusive.
        count (`int`): shared tokens.
        nearest (`torch.Tensor`, *optional*): int64, shape (source vocab,): the student's token nearest to each of the
            source's; -1 for none. For `"mined"`.
        student_boundaries, source_boundaries (`torch.Tensor`, *optional*): bool, shape (vocab,): the tokens that begin
            anew, see [`~cbd_hf.tokenization.vocabulary.begin_anew`]. For `"alm"` with `alm_debias`.
    """

    student_groups: torch.Tensor
    source_groups: torch.Tensor
    count: int
    nearest: torch.Tensor | None = None
    student_boundaries: torch.Tensor | None = None
    source_boundaries: torch.Tensor | None = None

    @classmethod
    def of(
        cls, shared: VocabularyMap, student_vocab: int, source_vocab: int, nearest: Any = None, boundaries: Any = None
    ) -> Vocabularies:
        """
        For models with that many rows, those behind the tokenizers' tokens included.

        Args:
            shared ([`VocabularyMap`]): of the tokenizers.
            student_vocab, source_vocab (`int`): rows of the models' heads.
            nearest (`np.ndarray`, *optional*): see above, for the tokenizer's tokens.
            boundaries (`tuple[np.ndarray, np.ndarray]`, *optional*): the student's and the source's, likewise.
        """
        count = len(shared.student_ids)

        def of_rows(values: Any, rows: int, blank: int) -> torch.Tensor:
            made = torch.full((rows,), blank, dtype=torch.int64)
            known = torch.as_tensor(values)[:rows]
            made[: len(known)] = torch.where(known < 0, blank, known)
            return made

        return cls(
            of_rows(shared.student_groups, student_vocab, count),
            of_rows(shared.source_groups, source_vocab, count),
            count,
            None if nearest is None else of_rows(nearest, source_vocab, -1),
            *(
                of_rows(side.astype(int), rows, 0).bool()
                for side, rows in zip(boundaries or (), (student_vocab, source_vocab), strict=False)
            ),
        )

    def to(self, device: torch.device) -> Vocabularies:
        """On another device."""
        if self.student_groups.device == device:
            return self
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def student_log_probs(self, log_probs: torch.Tensor) -> torch.Tensor:
        """
        The student's probabilities summed over each group.

        Args:
            log_probs (`torch.Tensor`): float32, shape (positions, vocab).

        Returns:
            `torch.Tensor`: float32, shape (positions, count + 1), logarithms, at least log 1e-37.
        """
        return self._summed(log_probs, self.student_groups.expand_as(log_probs)).clamp(min=_LEAST_SUM).log()

    def source_log_probs(self, log_probs: torch.Tensor) -> torch.Tensor:
        """The source's, likewise."""
        return self._summed(log_probs, self.source_groups.expand_as(log_probs)).clamp(min=_LEAST_SUM).log()

    def kept_log_probs(self, kept: SparsePredictions, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The source's, as far as a cache knows them.

        Args:
            kept ([`SparsePredictions`]): of the k most likely tokens.
            rows (`torch.Tensor`): int64, shape (positions,): which of its positions.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: float32, shape (positions, count + 2): logarithms, -inf for a group
            without any of the k tokens, the mass of all other tokens behind them; and which groups have one: bool,
            shape (positions, count + 1).
        """
        if kept.tail is None:
            raise ValueError("A bridge needs a cache of the top k: tokens sampled from the source do not do.")
        log_probs = kept.log_probs[rows]
        sums = self._summed(log_probs, self.source_groups[kept.token_ids[rows]])
        found = sums > 0
        logs = torch.where(found, sums.clamp(min=_LEAST_SUM).log(), -torch.inf)
        return torch.cat([logs, kept.tail[rows, None].clamp(min=LEAST_LOG)], dim=-1), found

    def _summed(self, log_probs: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        sums = log_probs.new_zeros(len(log_probs), self.count + 1)
        return sums.scatter_add(1, groups, log_probs.exp())


@dataclass(frozen=True)
class SpanObjective:
    """
    What is minimised: `(1 - w) * method over spans + w * cross-entropy over tokens`, both summed.

    Args:
        method (`str`, *optional*, defaults to `"overlap_kl"`): one of

            - `"overlap_kl"`: the divergence of `objective` between the two distributions over groups of tokens in
              front of every span; where a span has several tokens on a side, its group is divided into this span and
              the rest, by the chain rule;
            - `"alm"`: approximate likelihood matching (arXiv 2503.20083): the binary cross-entropy of the spans'
              likelihoods `p^(1/t)` and `q^(1/t)` with t = `alm_temperature`, less its entropy, times t; see
              `alm_debias`;
            - `"uld"`: universal logit distillation (arXiv 2402.12030): the L1 distance of the two sorted
              distributions in front of every span;
            - `"mined"`: FuseLLM's minimum edit distance (arXiv 2401.10491): the divergence between the student and
              the source's probabilities given to the nearest of the student's tokens, where one token stands against
              one; cross-entropy with the data at all other tokens, at the objective's temperature and times its
              square as well.
        objective ([`Objective`], *optional*): divergence, temperature and w.
        alm_temperature (`float`, *optional*, defaults to 100.0): above 0.
        alm_debias (`bool`, *optional*, defaults to `True`): as published, likelihoods are those of a span and a token
            behind it that begins anew (with white space, or a special one), and spans are joined until the source
            gives such a token a probability above `alm_bias_threshold`.
        alm_bias_threshold (`float`, *optional*, defaults to 0.1): in [0, 1); 0 joins nothing.
        uld_tokens (`int`, *optional*, defaults to 0): of `"uld"`: compare the largest probabilities only, so many; 0:
            all of them.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    method: str = "overlap_kl"
    objective: Objective = field(default_factory=lambda: Objective("forward_kl"))
    alm_temperature: float = 100.0
    uld_tokens: int = 0
    alm_debias: bool = True
    alm_bias_threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {list(METHODS)}.")
        if not self.alm_temperature > 0:
            raise ValueError(f"alm_temperature={self.alm_temperature} must be greater than 0; the paper's is 100.")
        if not 0 <= self.alm_bias_threshold < 1:
            raise ValueError(
                f"alm_bias_threshold={self.alm_bias_threshold} must be at least 0, which joins no spans, and below 1."
            )
        if self.uld_tokens < 0:
            raise ValueError(f"uld_tokens={self.uld_tokens} must be at least 1, or 0 to compare all probabilities.")

    @property
    def every_token(self) -> bool:
        """Whether tokens without a span count too."""
        return self.method == "mined"

    @property
    def sees_ends(self) -> bool:
        """Whether it counts what follows a span."""
        return self.method == "alm" and self.alm_debias

    def over_spans(self, student: Side, source: Side, vocabularies: Vocabularies) -> torch.Tensor:
        """The method summed over a tile's spans, without weight; a float32 scalar."""
        if self.method == "alm":
            q, p = student.span_log_probs(), source.span_log_probs()
            if student.ends is not None and source.ends is not None:
                q, p = q + student.ends, p + source.ends
            return likelihood_matching(q, p, self.alm_temperature).sum()
        if self.method == "uld":
            return sorted_distance(
                student.log_probs[student.starts], source.log_probs[source.starts], self.uld_tokens
            ).sum()
        if self.method == "mined":
            return nearest_divergence(student, source, vocabularies, self.objective)
        return group_divergence(student, source, vocabularies, self.objective).sum()


def group_divergence(student: Side, source: Side, vocabularies: Vocabularies, objective: Objective) -> torch.Tensor:
    """
    The divergence over groups in front of every span, with spans of several tokens as events of their own.

    Both models' probabilities of a group cover the same texts, whatever tokens they cut them into, as far as each
    model is consistent. A span of several tokens on a side lies within the group of its first token: that group's
    probability is divided into the span's, by the chain rule, and the rest.

    Args:
        student, source ([`Side`]): of the same spans.
        vocabularies ([`Vocabularies`]): how tokens correspond.
        objective ([`Objective`]): the divergence.

    Returns:
        `torch.Tensor`: float32, shape (spans,).
    """
    q = vocabularies.student_log_probs(student.log_probs[student.starts])
    divided = ((student.counts > 1) | (source.counts > 1)) & (student.groups == source.groups)
    divided &= student.groups < vocabularies.count
    if source.kept is None:
        p = vocabularies.source_log_probs(source.log_probs[source.starts])
    else:
        p, found = vocabularies.kept_log_probs(source.kept, source.starts)
        # Of groups that the cache knows nothing of, only the sum is compared.
        unknown = torch.where(found, -torch.inf, q).logsumexp(-1, keepdim=True)
        q = torch.cat([torch.where(found, q, -torch.inf), unknown.clamp(min=LEAST_LOG)], dim=-1)
        divided &= found.gather(-1, source.groups[:, None]).flatten()
    events = [_events(groups, side, divided) for groups, side in ((q, student), (p, source))]
    return objective.divergence(*(bounded(event) for event in events))


def _events(groups: torch.Tensor, side: Side, divided: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of groups, with the span's own behind them where its group is divided; else nothing there."""
    if not bool(divided.any()):
        return groups
    own = groups.gather(-1, side.groups[:, None])
    span = torch.minimum(side.span_log_probs()[:, None], own - _LEAST_GAP)
    # A difference of two large numbers can be 0 in float32.
    rest = own + torch.log(-torch.expm1((span - own).clamp(max=-_LEAST_GAP)))
    nothing = torch.full_like(span, -torch.inf)
    column = torch.where(divided[:, None], span, nothing)
    left = torch.where(divided[:, None], rest, own)
    return torch.cat([groups.scatter(-1, side.groups[:, None], left), column], dim=-1)


def likelihood_matching(student: torch.Tensor, source: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    ALM: the Bernoulli KL divergence of `p^(1/t)` and `q^(1/t)`, times t.

    It has the gradient of the published binary cross-entropy times t, so that its size does not shrink with t.
    Probabilities above 1 - 1e-6 count as that, as published.

    Args:
        student, source (`torch.Tensor`): log-probabilities of spans, shape (spans,).
        temperature (`float`): t.

    Returns:
        `torch.Tensor`: shape (spans,).
    """
    # From above as published, where the gradient has a pole; not from below, where it is the student that is wrong.
    # A source may rule a span out: 0 times infinity is no number.
    log_q, log_p = (
        (value / temperature).clamp(max=-_LEAST_GAP) for value in (student, source.clamp(min=-_LARGEST_LOG))
    )
    p, against_q, against_p = log_p.exp(), torch.log(-torch.expm1(log_q)), torch.log(-torch.expm1(log_p))
    return (p * (log_p - log_q) + (1 - p) * (against_p - against_q)) * temperature


def sorted_distance(student: torch.Tensor, source: torch.Tensor, tokens: int = 0) -> torch.Tensor:
    """
    ULD: the L1 distance of two distributions, each sorted, the shorter one filled up with zeros.

    Args:
        student, source (`torch.Tensor`): log-probabilities, shapes (spans, student vocab) and (spans, source vocab).
        tokens (`int`, *optional*, defaults to 0): compare only so many of the largest; 0: all.

    Returns:
        `torch.Tensor`: shape (spans,).
    """
    q, p = (_largest(log_probs.exp(), tokens) for log_probs in (student, source))
    width = max(q.shape[-1], p.shape[-1])
    return (F.pad(q, (0, width - q.shape[-1])) - F.pad(p, (0, width - p.shape[-1]))).abs().sum(-1)


def _largest(probs: torch.Tensor, tokens: int) -> torch.Tensor:
    """Probabilities in falling order."""
    if not tokens:
        return probs.sort(dim=-1, descending=True).values
    return probs.topk(min(tokens, probs.shape[-1]), dim=-1).values


def nearest_divergence(student: Side, source: Side, vocabularies: Vocabularies, objective: Objective) -> torch.Tensor:
    """
    MinED: the divergence at spans of one token on each side, and cross-entropy at all other tokens; summed.

    The source's probabilities go to the nearest tokens of the student's vocabulary; what goes to none is left out, and
    the rest normalised. If nothing is left, the token counts among the others.

    Args:
        student, source, vocabularies, objective: as in [`group_divergence`]; `vocabularies` has `nearest`.
    """
    if vocabularies.nearest is None:
        raise ValueError("mined needs the nearest tokens.")
    single = (student.counts == 1) & (source.counts == 1)
    rows = source.starts[single]
    q = student.log_probs[student.starts[single]]
    if source.kept is None:
        probs, tokens = source.log_probs[rows].exp(), vocabularies.nearest
    else:
        probs, tokens = source.kept.log_probs[rows].exp(), vocabularies.nearest[source.kept.token_ids[rows]]
    # What goes to none is added up behind the last token.
    tokens = torch.where(tokens < 0, q.shape[-1], tokens)
    p = probs.new_zeros(len(probs), q.shape[-1] + 1).scatter_add(1, tokens.expand_as(probs), probs)[:, :-1]
    mass = p.sum(-1, keepdim=True)
    some = mass[:, 0] > _LEAST_PROBABILITY
    p = (p[some] / mass[some]).clamp(min=_LEAST_PROBABILITY)
    value = objective.divergence(bounded(q[some]), p.log()).sum()
    alone = torch.zeros_like(student.spans, dtype=torch.bool)
    alone[student.starts[single][some]] = True
    return value - student.token_log_probs[~alone].sum() * objective.temperature**2


__all__ = [
    "LEAST_LOG",
    "METHODS",
    "Side",
    "SpanObjective",
    "Vocabularies",
    "group_divergence",
    "likelihood_matching",
    "nearest_divergence",
    "sorted_distance",
]
