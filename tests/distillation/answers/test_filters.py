"""What each filter drops, and that none is on by default."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from cbd_hf.distillation.answers import AnswerFilters, filter_answers, load_answers
from cbd_hf.distillation.answers.filters import repetition

from .helpers import files, rows


ANSWERS = {
    "good": ("What is a cat?", "A small animal that purrs.", "eos", 6, ["A small animal that purrs"]),
    "cut": ("What is a dog?", "A large animal that", "length", 9, ["A large animal that barks"]),
    "short": ("Yes or no?", "Yes.", "eos", 2, ["Yes, it is"]),
    "loop": ("Say more.", "a b c d a b c d a b c d", "eos", 12, ["a b c d a b c d a b c d"]),
    "echo": ("Why is the sky blue?\n", " Why is the sky blue?", "eos", 6, ["Why is the sky blue"]),
    "off": ("Name a fruit.", "The weather is fine today.", "eos", 6, ["Apple"]),
    "alone": ("Name a bird.", "It is called a robin.", "eos", 6, []),
}


def answers(names: list[str] | None = None) -> Dataset:
    columns = ("prompt", "completion", "finish", "tokens", "references")
    chosen = ANSWERS if names is None else names
    return Dataset.from_list([dict(zip(columns, ANSWERS[name], strict=True)) for name in chosen])


def left(**options: Any) -> set[str]:
    """Names of the answers that the filters drop."""
    kept, dropped = filter_answers(answers(), AnswerFilters(**options))
    prompts = set(kept["prompt"])
    gone = {name for name, row in ANSWERS.items() if row[0] not in prompts}
    assert sum(dropped.values()) == len(gone) and set(dropped) <= set(options)
    return gone


def test_nothing_is_dropped_by_default() -> None:
    data = answers()
    kept, dropped = filter_answers(data, AnswerFilters())
    assert kept is data and dropped == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"drop_unfinished": True}, {"cut"}),
        ({"min_answer_tokens": 3}, {"short"}),
        ({"min_answer_tokens": 2}, set()),
        ({"max_answer_tokens": 9}, {"loop"}),
        ({"max_answer_tokens": 12}, set()),
        ({"max_repetition": 0.5}, {"loop"}),
        ({"max_repetition": 0.56}, set()),
        ({"max_repetition": 0.6, "repetition_ngram": 1}, {"loop"}),
        ({"drop_echoes": True}, {"echo"}),
        ({"drop_unfinished": True, "max_repetition": 0.0}, {"cut", "loop"}),
    ],
)
def test_filters(options: dict[str, Any], expected: set[str]) -> None:
    assert left(**options) == expected


def test_rouge_l() -> None:
    pytest.importorskip("rouge_score")
    assert left(min_rouge_l=10) == {"off"}
    assert left(min_rouge_l=100) == {"cut", "short", "off"}
    with pytest.raises(ValueError, match="min_rouge_l=10 compares.*has none"):
        filter_answers(answers(["alone"]), AnswerFilters(min_rouge_l=10))


def test_rouge_l_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    with pytest.raises(ImportError, match="cbd_hf\\[eval\\]"):
        left(min_rouge_l=10)


def test_conversations() -> None:
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a b a b a b"}]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}], "finish": "eos", "tokens": 1}
        for text in ("a b a b a b ", "c d c d c d", "e f")
    ]
    kept, dropped = filter_answers(
        Dataset.from_list(rows), AnswerFilters(drop_echoes=True, max_repetition=0.3, repetition_ngram=2)
    )
    assert dropped == {"drop_echoes": 1, "max_repetition": 1}
    assert kept["completion"][0][0]["content"] == "e f"


def test_stored_answers_stay(answered: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = files(answered)
    ended = [row for row in rows(answered) if row["finish"] == "eos"]
    with caplog.at_level(logging.INFO, "cbd_hf"):
        kept, dropped = load_answers(answered, AnswerFilters(drop_unfinished=True))
    assert dropped == {"drop_unfinished": 20 - len(ended)} and 0 < len(ended) < 20
    assert kept["completion"][:] == [row["completion"] for row in ended]
    assert f"Kept {len(ended)} of 20 answers; dropped by drop_unfinished {20 - len(ended)}." in caplog.text
    assert files(answered) == before
    with pytest.raises(ValueError, match="drop all 20 answers .*min_answer_tokens 20.*loosen"):
        load_answers(answered, AnswerFilters(min_answer_tokens=99))


@given(st.text(), st.integers(1, 5))
def test_repetition_is_a_share(text: str, n: int) -> None:
    share = repetition(text, n)
    assert 0 <= share < 1
    words = text.split()
    if len(words) == len(set(words)):
        assert share == 0
    if len(words) >= n:
        assert repetition(" ".join([*words, *words]), n) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_answer_tokens": -1}, "min_answer_tokens=-1"),
        ({"max_answer_tokens": -1}, "max_answer_tokens=-1"),
        ({"min_answer_tokens": 3, "max_answer_tokens": 2}, "min_answer_tokens=3 is more"),
        ({"max_repetition": 1.0}, "max_repetition=1.0"),
        ({"repetition_ngram": 0}, "repetition_ngram=0"),
        ({"min_rouge_l": 0.0}, "min_rouge_l=0.0"),
        ({"min_rouge_l": 101.0}, "min_rouge_l=101"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerFilters(**options)


def test_options_of_a_command() -> None:
    parser = HfArgumentParser([AnswerFilters])
    (filters,) = parser.parse_args_into_dataclasses(["--drop_unfinished", "--max_repetition", "0.4"])
    assert filters == AnswerFilters(drop_unfinished=True, max_repetition=0.4)
    assert parser.parse_args_into_dataclasses([]) == (AnswerFilters(),)
