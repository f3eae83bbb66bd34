"""Which tokens and positions a model must have, and how long rows may be."""

from __future__ import annotations

import pytest
from transformers import OPTConfig, PretrainedConfig

from cbd_hf.tokenization.limits import Limits, bridge_lengths, needed_rows

from ..models import tiny_config
from .chats import CHATML, chat_tokenizer


def test_needed_rows() -> None:
    """Ordinary tokens and those with a role; an added one behind them is not needed until it has one."""
    tokenizer = chat_tokenizer("byte_level", CHATML)
    end, last = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_end|>"])
    assert tokenizer.eos_token == "<|im_end|>" and last == len(tokenizer) - 1
    assert needed_rows(tokenizer) == end + 1
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert needed_rows(tokenizer) == end + 1
    tokenizer.pad_token = "<image>"
    assert needed_rows(tokenizer) == end + 2 == len(tokenizer)


def test_limits_of_a_config() -> None:
    assert Limits.of(tiny_config("gpt2", vocab_size=50, n_positions=32)) == Limits(50, 32)
    assert Limits.of(OPTConfig(vocab_size=50, max_position_embeddings=16)) == Limits(50, 16)
    assert Limits.of(PretrainedConfig(vocab_size=9)) == Limits(9, None)
    assert Limits.of(None) == Limits()


@pytest.mark.parametrize(
    ("asked", "positions", "found"),
    [
        ((1024, None), (None, None), (1024, 2048)),
        ((1024, None), (2048, 1024), (1024, 1024)),
        ((1024, None), (512, None), (512, 1024)),
        ((300, None), (512, 512), (300, 512)),
        ((512, 400), (512, 400), (512, 400)),
        ((None, None), (None, None), (None, None)),
        ((None, None), (64, 96), (64, 96)),
        ((None, None), (None, 96), (None, 96)),
    ],
)
def test_lengths(
    asked: tuple[int | None, int | None],
    positions: tuple[int | None, int | None],
    found: tuple[int | None, int | None],
) -> None:
    limits = [Limits(None, most) for most in positions]
    assert bridge_lengths(*asked, *limits) == found


def test_lengths_that_a_model_cannot_read() -> None:
    few = Limits(None, 32)
    with pytest.raises(ValueError, match="max_length=33 is more than the 32 positions of the student"):
        bridge_lengths(33, None, few, Limits())
    with pytest.raises(ValueError, match="source_max_length=33 is more than the 32 positions of the source"):
        bridge_lengths(32, 33, Limits(), few)
