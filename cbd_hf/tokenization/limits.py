"""What a model has room for: tokens that have a row in its embeddings, and positions."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 1024
_NAMED = 5  # surplus tokens in a message


@dataclass(frozen=True)
class Limits:
    """
    Of one model; `None` where it is not known.

    Args:
        tokens (`int`, *optional*): rows of its embeddings.
        positions (`int`, *optional*): the longest row that it can read.
    """

    tokens: int | None = None
    positions: int | None = None

    @classmethod
    def of(cls, config: PretrainedConfig | None) -> Limits:
        """Of a model with this config."""
        if config is None:
            return cls()
        text: Any = config.get_text_config()
        return cls(text.vocab_size, getattr(text, "max_position_embeddings", None) or None)


def fixed_positions(*configs: PretrainedConfig) -> int | None:
    """The fewest positions behind which one of these models has none; `None` if all go on, as with rotary ones."""
    known = []
    for config in configs:
        text: Any = config.get_text_config()
        if getattr(text, "rope_parameters", None) is None and (positions := Limits.of(config).positions):
            known.append(positions)
    return min(known, default=None)


def within_positions(max_length: int | None, positions: int | None) -> int | None:
    """
    Most tokens of a row within the models' positions.

    Args:
        max_length (`int`, *optional*): the default (1024) is lowered to the positions; `None` cuts no row, and stays.
        positions (`int`, *optional*): from [`fixed_positions`].

    Raises:
        ValueError: a length that was asked for is more than the positions.
    """
    if positions is None or max_length is None or max_length <= positions:
        return max_length
    if max_length != DEFAULT_MAX_LENGTH:
        raise ValueError(f"max_length={max_length} is more than the {positions} positions of the models: lower it.")
    logger.info("max_length is %d, the positions of the models.", positions)
    return positions


def needed_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Rows that the embeddings of a tokenizer's model cannot be without.

    Not counted are added tokens behind all others, unless they begin, end, pad a text or stand for what is unknown:
    text models have no rows for some that a family's tokenizer has for images (Gemma 3's `<image_soft_token>`).
    """
    added = tokenizer.added_tokens_decoder
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    ordinary = max((token for token in tokenizer.get_vocab().values() if token not in added), default=-1)
    return 1 + max(ordinary, *(-1 if token is None else token for token in roles))


def warn_of_surplus_tokens(role: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Name the added tokens that a model with so many rows does not have."""
    names = [str(token) for number, token in sorted(tokenizer.added_tokens_decoder.items()) if number >= rows]
    if names:
        shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        logger.warning(
            f"The {role} has {rows} tokens and none of {len(names)} that its tokenizer was given besides: {shown}. "
            "Texts must not contain them."
        )


def bridge_lengths(
    max_length: int | None, source_max_length: int | None, student: Limits, source: Limits
) -> tuple[int | None, int | None]:
    """
    Most tokens of a row on both sides, within the models' positions.

    Args:
        max_length (`int`, *optional*): the student's. The default (1024) and `None` are lowered to its positions.
        source_max_length (`int`, *optional*): the source's; by default twice the student's, or its positions if these
            are fewer.
        student, source ([`Limits`]): of the models.

    Raises:
        ValueError: a length that was asked for is more than the model's positions.
    """
    if student.positions is not None and (max_length is None or max_length > student.positions):
        if max_length not in (None, DEFAULT_MAX_LENGTH):
            raise ValueError(
                f"max_length={max_length} is more than the {student.positions} positions of the student: lower it."
            )
        logger.info("max_length is %d, the positions of the student.", student.positions)
        max_length = student.positions
    if source_max_length is None:
        double = None if max_length is None else 2 * max_length
        source_max_length = min((length for length in (double, source.positions) if length is not None), default=None)
    elif source.positions is not None and source_max_length > source.positions:
        raise ValueError(
            f"source_max_length={source_max_length} is more than the {source.positions} positions of the source: "
            "lower it, or leave it out."
        )
    return max_length, source_max_length


__all__ = [
    "DEFAULT_MAX_LENGTH",
    "Limits",
    "bridge_lengths",
    "fixed_positions",
    "needed_rows",
    "warn_of_surplus_tokens",
    "within_positions",
]
