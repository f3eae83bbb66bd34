"""The prompt's exact wording."""

from __future__ import annotations

import pytest

from cbd_hf.data.prompts import alpaca_prompt


def test_wording_without_input() -> None:
    assert alpaca_prompt("Name a colour.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\n"
    )


def test_wording_with_input() -> None:
    assert alpaca_prompt("Translate.", "Guten Tag") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n"
    )


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_blank_input_is_no_input(nothing: str | None) -> None:
    assert alpaca_prompt("Go.", nothing) == alpaca_prompt("Go.")


def test_braces_stay() -> None:
    assert "{input} {}" in alpaca_prompt("Fill {input} {}.")
