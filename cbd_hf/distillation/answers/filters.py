"""
Quality filters of answers: all off by default.

`HfArgumentParser` reads [`AnswerFilters`] as it is.
"""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerFilters:
    """Which answers of a source are not trained on."""

    drop_unfinished: bool = field(default=False, metadata={"help": "Drop answers that were cut at max_new_tokens."})
    min_answer_tokens: int | None = field(
        default=None, metadata={"help": "Drop answers of fewer tokens, the end token included, as the source counts."}
    )
    max_answer_tokens: int | None = field(
        default=None, metadata={"help": "Drop answers of more tokens, the end token included, as the source counts."}
    )
    max_repetition: float | None = field(
        default=None,
        metadata={
            "help": "Drop answers of whose runs of repetition_ngram words more than this share occurred before."
        },
    )
    repetition_ngram: int = field(default=4, metadata={"help": "Words of a run, for max_repetition."})
    drop_echoes: bool = field(
        default=False, metadata={"help": "Drop answers that are their prompt, apart from white space at the ends."}
    )
    min_rouge_l: float | None = field(
        default=None,
        metadata={
            "help": "Drop answers whose best Rouge-L (0 to 100) to the dataset's own answers is lower; needs the eval "
            "extra. Prompts without an answer of their own are kept."
        },
    )

    def __post_init__(self) -> None:
        least, most = self.min_answer_tokens, self.max_answer_tokens
        for name, value in (("min_answer_tokens", least), ("max_answer_tokens", most)):
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be at least 0.")
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"min_answer_tokens={least} is more than max_answer_tokens={most}: nothing would be left."
            )
        if self.max_repetition is not None and not 0 <= self.max_repetition < 1:
            raise ValueError(f"max_repetition={self.max_repetition} is a share from 0 to below 1.")
        if self.repetition_ngram < 1:
            raise ValueError(f"repetition_ngram={self.repetition_ngram} must be at least 1 word.")
        if self.min_rouge_l is not None and not 0 < self.min_rouge_l <= 100:
            raise ValueError(f"min_rouge_l={self.min_rouge_l} must be above 0 and at most 100.")


def repetition(text: str, n: int) -> float:
    """Share of the runs of `n` words of a text that occurred in it before; 0 if there is no run."""
    words = text.split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def filter_answers(answers: "Dataset", filters: AnswerFilters) -> "tuple[Dataset, dict[str, int]]":
    """
    The answers that pass all filters, and how many each has dropped.

    An answer that fails several counts for the first. The numbers are logged.

    Args:
        answers (`Dataset`): with the columns of the files of [`~cbd_hf.distillation.answers.build_answers`].
        filters ([`AnswerFilters`]): what to drop.

    Returns:
        `tuple[Dataset, dict[str, int]]`: the rest, in order; name of the option -> answers dropped, for those set.

    Raises:
        ImportError: `min_rouge_l` is set and `rouge_score` is missing.
        ValueError: nothing is left, or `min_rouge_l` is set and no prompt has an answer of its own.
    """
    tests = _tests(filters)
    if not tests:
        return answers, {}
    if filters.min_rouge_l is not None and not any(answers["references"]):
        raise ValueError(
            f"min_rouge_l={filters.min_rouge_l} compares with the dataset's own answers, but it has none."
        )
    dropped = dict.fromkeys(tests, 0)
    kept = []
    for index, row in enumerate(answers):
        failed = next((name for name, fails in tests.items() if fails(row)), None)
        if failed is None:
            kept.append(index)
        else:
            dropped[failed] += 1
    counts = ", ".join(f"{name} {count}" for name, count in dropped.items())
    if not kept:
        raise ValueError(f"The filters drop all {len(answers)} answers ({counts}); loosen them.")
    logger.info("Kept %d of %d answers; dropped by %s.", len(kept), len(answers), counts)
    return answers.select(kept), dropped


def _tests(filters: AnswerFilters) -> dict[str, Callable[[Any], bool]]:
    """Name of each option that is set -> whether a row is dropped for it; the cheap ones first."""
    least, most, share = filters.min_answer_tokens, filters.max_answer_tokens, filters.max_repetition
    tests: dict[str, Callable[[Any], bool]] = {}
    if filters.drop_unfinished:
        tests["drop_unfinished"] = lambda row: row["finish"] != "eos"
    if least is not None:
        tests["min_answer_tokens"] = lambda row: row["tokens"] < least
    if most is not None:
        tests["max_answer_tokens"] = lambda row: row["tokens"] > most
    if filters.drop_echoes:
        tests["drop_echoes"] = lambda row: _text(row["completion"]).strip() == _text(row["prompt"]).strip()
    if share is not None:
        tests["max_repetition"] = (
            lambda row: repetition(_text(row["completion"]), filters.repetition_ngram) > share  # fmt: skip
        )
    if filters.min_rouge_l is not None:
        tests["min_rouge_l"] = _rouge_l_test(filters.min_rouge_l)
    return tests


def _rouge_l_test(least: float) -> Callable[[Any], bool]:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError("min_rouge_l needs rouge_score. Run: pip install 'cbd_hf[eval]'") from error
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def fails(row: Any) -> bool:
        if not row["references"]:
            return False
        score = scorer.score_multi(row["references"], _text(row["completion"]))["rougeL"]
        return 100 * score.fmeasure < least

    return fails


def _text(part: Any) -> str:
    """A text, or that of the last of several messages."""
    return part if isinstance(part, str) else part[-1]["content"]


__all__ = ["AnswerFilters", "filter_answers", "repetition"]
