"""The Alpaca-style prompt of the published Dolly protocol."""

from __future__ import annotations


PROMPT_COLUMN = "prompt"
COMPLETION_COLUMN = "completion"
REFERENCES_COLUMN = "references"

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, input: str | None = "") -> str:
    """
    The text that asks a model to follow `instruction`; the answer starts right after it.

    Args:
        instruction (`str`): what to do.
        input (`str`, *optional*, defaults to `""`): further context; empty, blank or `None` gives the shorter wording.
    """
    if input is None or not input.strip():
        return _WITHOUT_INPUT.format(instruction=instruction)
    return _WITH_INPUT.format(instruction=instruction, input=input)


__all__ = ["COMPLETION_COLUMN", "PROMPT_COLUMN", "REFERENCES_COLUMN", "alpaca_prompt"]
