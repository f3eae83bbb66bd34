"""Batches for a student and a source with another tokenizer: both models' inputs, and which tokens belong together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cbd_hf.data.columns import EXAMPLE_ID, IGNORED, SOURCE_PROMPTS, dataset_kind
from cbd_hf.tokenization.alignment import NO_SPAN
from cbd_hf.tokenization.chat import ChatReader, Message
from cbd_hf.tokenization.encoding import ByteEncoder, Encoded
from cbd_hf.tokenization.limits import DEFAULT_MAX_LENGTH, Limits
from cbd_hf.tokenization.rows import COLUMNS, Reading, SpecialIds, joined, plain_reading, tokens_of


_SIDES = (("", "student"), ("source_", "source"))
_NOT_READ = ("tools", "chat_template_kwargs")  # columns that trl hands to chat templates
_SHOWN = 80  # characters of a value in an error message


class BridgeDataCollator:
    """
    Makes batches of which a student and a source of another family read the same text.

    Rows have `text`; or `prompt` and `completion`, strings or lists of messages; or `messages`. Strings are read as
    they are by both models, BOS in front where a tokenizer adds it, EOS behind. Conversations are read by each model
    through its own chat template. See [`joined`] for a row's columns.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the student's.
        source_tokenizer (`PreTrainedTokenizerBase`): the source's.
        max_length (`int`, *optional*, defaults to 1024): most tokens of a row for the student.
        source_max_length (`int`, *optional*): most tokens of a row for the source; twice `max_length` by default.
        source_prompt (`str`, *optional*, defaults to `"same"`): `"chat"`: where prompt and completion are strings the
            source reads them as a user's message and its answer, through its chat template.
        completion_only_loss (`bool`, *optional*): `False` supervises prompts, users' and system messages too.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text.
        pad_to_multiple_of (`int`, *optional*): lengths of both sides' batches are multiples of it.

    Raises:
        ValueError: an option is out of range, a tokenizer cannot be aligned, or `source_prompt="chat"` without a chat
            template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source_tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = DEFAULT_MAX_LENGTH,
        source_max_length: int | None = None,
        source_prompt: Literal["same", "chat"] = "same",
        completion_only_loss: bool | None = None,
        text_field: str = "text",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if source_max_length is None and max_length is not None:
            source_max_length = 2 * max_length
        for name, length, least in (
            ("max_length", max_length, 2),
            ("source_max_length", source_max_length, 2),
            ("pad_to_multiple_of", pad_to_multiple_of, 1),
        ):
            if length is not None and length < least:
                raise ValueError(f"{name}={length} must be at least {least}, or None.")
        if source_prompt not in SOURCE_PROMPTS:
            raise ValueError(f"source_prompt={source_prompt!r} must be 'same' or 'chat'.")
        self.tokenizer = tokenizer
        self.source_tokenizer = source_tokenizer
        self.max_length = max_length
        self.source_max_length = source_max_length
        self.source_prompt = source_prompt
        self.completion_only_loss = completion_only_loss is not False
        self.text_field = text_field
        self.pad_to_multiple_of = pad_to_multiple_of
        self.encoders = (ByteEncoder(tokenizer), ByteEncoder(source_tokenizer))
        self.special = (special_ids(tokenizer), special_ids(source_tokenizer))
        self.limits = (Limits(), Limits())
        self.readers: list[ChatReader | None] = [None, None]
        if source_prompt == "chat":
            self._reader(1)

    def __getstate__(self) -> dict[str, Any]:
        # What has been learnt of chat templates is no part of the fingerprint of `Dataset.map`, nor sent to workers.
        return vars(self) | {"readers": [None, None]}

    def within(self, student: Limits, source: Limits) -> BridgeDataCollator:
        """The same for models of these limits: a row that one of them cannot read is an error."""
        made = copy.copy(self)
        made.limits = (student, source)
        return made

    def encode(
        self,
        examples: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        indices: Sequence[int] | None = None,
    ) -> dict[str, list]:
        """
        Prepared rows.

        Args:
            examples (`list[dict]` or `dict[str, list]`): raw rows, or their columns as `Dataset.map` gives them.
            indices (`list[int]`, *optional*): their numbers in the dataset, for messages of errors.

        Returns:
            `dict[str, list[list[int]]]`: the columns of [`joined`].

        Raises:
            ValueError: a row has none of the accepted columns or a value of another type, cannot be aligned, or is
                one that a model cannot read (see [`within`]).
        """
        if isinstance(examples, Mapping):
            columns = examples
            examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rows = self._encode(examples, indices)
        return {name: [row[name].tolist() for row in rows] for name in COLUMNS}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        A batch of raw rows, or of rows that `encode` has prepared.

        Returns:
            `dict[str, torch.Tensor]`: the columns of [`joined`] as int64 (rows, length), padded on the right, each
            side to its own length of at least 2, with `attention_mask` and `source_attention_mask`; `example_id`,
            int64 (rows,), if rows have it.
        """
        rows: Sequence[Mapping[str, Any]] = examples
        if set(COLUMNS) <= set(examples[0]):
            self.check(rows)
        else:
            rows = self._encode(examples)
        batch: dict[str, torch.Tensor] = {}
        for (prefix, _), tokenizer in zip(_SIDES, (self.tokenizer, self.source_tokenizer), strict=True):
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
            ids, labels, spans = (f"{prefix}{name}" for name in ("input_ids", "labels", "spans"))
            lengths = torch.tensor([len(row[ids]) for row in rows])
            multiple = self.pad_to_multiple_of or 1
            width = -(-max(2, int(lengths.max())) // multiple) * multiple  # the first token is not predicted
            for name, filler in ((ids, pad), (labels, IGNORED), (spans, NO_SPAN)):
                padded = np.full((len(rows), width), filler, np.int64)
                for index, row in enumerate(rows):
                    padded[index, : len(row[name])] = row[name]
                batch[name] = torch.from_numpy(padded)
            batch[f"{prefix}attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        if EXAMPLE_ID in examples[0]:
            batch[EXAMPLE_ID] = torch.tensor([row[EXAMPLE_ID] for row in examples])
        return batch

    def check(self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int] | None = None) -> None:
        """
        Raise unless both models can read prepared rows.

        Args:
            rows (`Sequence[dict]`): as [`encode`] gives them.
            indices (`list[int]`, *optional*): their numbers in the dataset, for messages of errors.

        Raises:
            ValueError: a row has a token or a length that is beyond [`within`]'s limits.
        """
        for (prefix, role), limits, tokenizer in zip(
            _SIDES, self.limits, (self.tokenizer, self.source_tokenizer), strict=True
        ):
            for number, row in zip(indices or range(len(rows)), rows, strict=True):
                ids = row[f"{prefix}input_ids"]
                if limits.positions is not None and len(ids) > limits.positions:
                    raise ValueError(
                        f"Row {number} has {len(ids)} tokens of the {role}, which has {limits.positions} positions: "
                        f"lower {prefix}max_length, or prepare the rows with it."
                    )
                largest = max(ids, default=-1) if isinstance(ids, list) else int(np.asarray(ids).max(initial=-1))
                if limits.tokens is not None and largest >= limits.tokens:
                    name = tokenizer.convert_ids_to_tokens(largest)
                    raise ValueError(
                        f"Row {number} has the token {name!r} ({largest}), but the {role} has {limits.tokens} tokens: "
                        "leave it out of the text, or give the rows and the tokenizer that belong to the model."
                    )

    def _encode(
        self, examples: Sequence[Mapping[str, Any]], indices: Sequence[int] | None = None
    ) -> list[dict[str, np.ndarray]]:
        numbers = indices or range(len(examples))
        readings = []
        for number, example in zip(numbers, examples, strict=True):
            try:
                readings.append(self._read(example))
            except ValueError as error:
                raise ValueError(f"Row {number}: {error}") from error
        sides = []
        for side, (encoder, special) in enumerate(zip(self.encoders, self.special, strict=True)):
            texts = [reading[side].text for reading in readings]
            try:
                encoded = encoder.encode(texts)
            except ValueError:
                encoded = [_encoded_alone(encoder, text, number) for text, number in zip(texts, numbers, strict=True)]
            sides.append(
                [tokens_of(reading[side], text, special) for reading, text in zip(readings, encoded, strict=True)]
            )
        rows = [
            joined(student, source, self.max_length, self.source_max_length)
            for student, source in zip(*sides, strict=True)
        ]
        self.check(rows, indices)
        return rows

    def _read(self, example: Mapping[str, Any]) -> tuple[Reading, Reading]:
        """What the student and what the source reads of a row."""
        kind = dataset_kind(list(example), self.text_field)
        if kind == "tokens":
            raise ValueError(
                "The rows have 'input_ids' already, which the source cannot read. Give 'text', 'prompt' and "
                "'completion', or 'messages'."
            )
        if kind == "messages":
            _check_type(example, "messages", list)
            _check_options(example)
            return self._read_chat(example["messages"])
        eos = self.tokenizer.eos_token or ""
        if kind == "text":
            _check_type(example, self.text_field, str)
            reading = plain_reading(example[self.text_field].removesuffix(eos))
            return reading, reading
        prompt, completion = example["prompt"], example["completion"]
        for name in ("prompt", "completion"):
            _check_type(example, name, str, list)
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("'prompt' and 'completion' must both be strings, or both lists of messages.")
        if not isinstance(prompt, str):
            _check_options(example)
            return self._read_chat([*prompt, *completion], len(prompt))
        completion = completion.removesuffix(eos)
        supervised_from = len(prompt.encode()) if self.completion_only_loss else 0
        if self.source_prompt == "same":
            reading = plain_reading(prompt + completion, supervised_from=supervised_from)
            return reading, reading
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return (
            plain_reading(prompt, completion, supervised_from=supervised_from),
            self._reader(1).read(turns, prompt=1, whole=not self.completion_only_loss),
        )

    def _read_chat(self, messages: Sequence[Message], prompt: int = 0) -> tuple[Reading, Reading]:
        student, source = (
            self._reader(side).read(messages, prompt, whole=not self.completion_only_loss) for side in range(2)
        )
        return student, source

    def _reader(self, side: int) -> ChatReader:
        reader = self.readers[side]
        if reader is None:
            tokenizer, name = ((self.tokenizer, "student"), (self.source_tokenizer, "source"))[side]
            reader = self.readers[side] = ChatReader(tokenizer, name)
        return reader


def _check_type(example: Mapping[str, Any], name: str, *kinds: type) -> None:
    value = example[name]
    if not isinstance(value, kinds):
        wanted = " or ".join("a string" if kind is str else "a list of messages" for kind in kinds)
        raise ValueError(f"{name!r} is {repr(value)[:_SHOWN]}, of type {type(value).__name__}; it must be {wanted}.")


def _check_options(example: Mapping[str, Any]) -> None:
    given = [name for name in _NOT_READ if example.get(name)]
    if given:
        raise ValueError(
            f"The column {given[0]!r} is not handed to the chat templates, which two models would read differently: "
            "render the conversations beforehand into 'prompt' and 'completion', or remove the column."
        )


def _encoded_alone(encoder: ByteEncoder, text: str, number: int) -> Encoded:
    try:
        return encoder.encode([text])[0]
    except ValueError as error:
        raise ValueError(f"Row {number}: {error}") from error


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """BOS, if the tokenizer puts it in front of texts, EOS, and all special and added tokens of a tokenizer."""
    first = next(iter(tokenizer("x").input_ids), None)  # one without byte fallback may drop unknown characters
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return SpecialIds(
        bos=first if first is not None and first == tokenizer.bos_token_id else None,
        eos=tokenizer.eos_token_id,
        added=np.array(sorted(added), np.int64),
    )


def end_of_turn_pair(collator: BridgeDataCollator, conversational: bool | None = None) -> tuple[int, int] | None:
    """
    The tokens with which student and source end an answer.

    Args:
        collator ([`BridgeDataCollator`]): between the two.
        conversational (`bool`, *optional*): whether rows are conversations; by default if `source_prompt="same"` and
            both tokenizers have chat templates.

    Returns:
        `tuple[int, int]`: student's and source's id; `None` if one of them has no token that ends a turn.
    """
    if conversational is None:
        templates = all(tokenizer.chat_template for tokenizer in (collator.tokenizer, collator.source_tokenizer))
        conversational = collator.source_prompt == "same" and templates
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    row = {"messages": turns} if conversational else {"prompt": "x", "completion": "y"}
    ends = []
    for reading, encoder, special in zip(collator._read(row), collator.encoders, collator.special, strict=True):
        tokens = tokens_of(reading, encoder.encode([reading.text])[0], special)
        if tokens.closing[-1] < 0:
            return None
        ends.append(int(tokens.ids[tokens.closing[-1]]))
    return ends[0], ends[1]


__all__ = ["BridgeDataCollator", "end_of_turn_pair", "special_ids"]
