"""The prompts that a source answers: out of a dataset's columns, as text or conversations, as tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cbd_hf._files import canonical_digest


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from cbd_hf.distillation.answers.manifest import AnswersSettings

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """
    Args:
        texts (`list[str]` or `list[list[dict]]`): all texts, or all conversations that end before the answer.
        references (`list[list[str]]`): the dataset's own answers to each, perhaps none.
        kind (`Any`): type of a prompt, as in the dataset's `features`.
    """

    texts: list[Prompt]
    references: list[list[str]]
    kind: Any

    @property
    def conversational(self) -> bool:
        """Whether prompts are lists of messages."""
        return not isinstance(self.texts[0], str)

    @property
    def digest(self) -> str:
        """Of all prompts and references, in order."""
        return canonical_digest([self.texts, self.references])


def read_prompts(dataset: Dataset) -> Prompts:
    """
    Prompts and reference answers of a dataset.

    Args:
        dataset (`Dataset`): `prompt` (text or messages) with or without `completion` or `references`; or `messages`,
            of which the last assistant message is the reference and what stands before it the prompt.

    Raises:
        ValueError: other columns, no rows, or a row without a prompt.
    """
    columns = dataset.column_names
    if "prompt" not in columns and "messages" not in columns:
        raise ValueError(
            f"The dataset has the columns {', '.join(columns)}; prompts are read from 'prompt' or 'messages'. Dolly's "
            "and Alpaca's own columns are read with data_format=instructions."
        )
    if not len(dataset):
        raise ValueError("The dataset has no prompt to answer.")
    if "prompt" in columns:
        answers = next((name for name in ("references", "completion") if name in columns), None)
        texts = list(dataset["prompt"])
        references = [_texts(value) for value in dataset[answers]] if answers else [[] for _ in texts]
    else:
        texts, references = [], []
        for messages in dataset["messages"]:
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            texts.append(messages[:-1] if answered else messages)
            references.append([messages[-1]["content"]] if answered else [])
    empty = next((index for index, text in enumerate(texts) if not text), None)
    if empty is not None:
        raise ValueError(f"Row {empty} of the dataset has an empty prompt; drop such rows first.")
    return Prompts(texts, references, dataset.features["prompt" if "prompt" in columns else "messages"])


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """What a chat template reads: without the empty fields that `datasets` gives to messages that lack them."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{name: value for name, value in message.items() if value is not None} for message in prompt]


def _texts(answers: Any) -> list[str]:
    if not answers or isinstance(answers, str):
        return [answers] if answers else []
    return [text if isinstance(text, str) else text["content"] for text in answers if text]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, settings: AnswersSettings) -> str | None:
    """
    Digest of the chat template if prompts are read through it, else None.

    Raises:
        ValueError: it is needed and the tokenizer has none, or `chat_template_kwargs` are given without need.
    """
    if not prompts.conversational and settings.source_prompt == "same":
        if settings.chat_template_kwargs:
            raise ValueError(
                f"chat_template_kwargs={settings.chat_template_kwargs} has no effect on texts that are read as they "
                "are; set source_prompt=chat, or leave it out."
            )
        return None
    if not tokenizer.chat_template:
        wanted = "the prompts are conversations" if prompts.conversational else "source_prompt=chat asks for one"
        raise ValueError(
            f"The source's tokenizer has no chat template, but {wanted}. Put a chat_template.jinja in its directory, "
            "or use text prompts with source_prompt=same."
        )
    return canonical_digest(tokenizer.chat_template)


def encode_prompts(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, settings: AnswersSettings
) -> tuple[list[int], list[list[int]]]:
    """
    Tokens of the prompts, with the special tokens that the tokenizer or its template puts in front.

    Args:
        prompts ([`Prompts`]): from [`read_prompts`].
        tokenizer (`PreTrainedTokenizerBase`): the source's.
        settings ([`AnswersSettings`]): `source_prompt`, `chat_template_kwargs` and `max_prompt_length`.

    Returns:
        `tuple[list[int], list[list[int]]]`: rows of at most `max_prompt_length` tokens, and the tokens of each.

    Raises:
        ValueError: all prompts are longer.
    """
    plain = not prompts.conversational and settings.source_prompt == "same"
    texts: Any = prompts.texts
    if not plain:
        texts = [
            tokenizer.apply_chat_template(
                _messages(text),
                tokenize=False,
                add_generation_prompt=True,
                **(settings.chat_template_kwargs or {}),
            )
            for text in texts
        ]
    encoded: Any = tokenizer(list(texts), add_special_tokens=plain, verbose=False)["input_ids"]
    if plain:
        encoded = _without_end(tokenizer, encoded)
    limit = settings.max_prompt_length
    kept = [row for row, tokens in enumerate(encoded) if 0 < len(tokens) <= limit]
    if not kept:
        raise ValueError(
            f"Every prompt has more than max_prompt_length={limit} tokens (or none); the shortest has "
            f"{min(map(len, encoded))}. Raise max_prompt_length."
        )
    return kept, [encoded[row] for row in kept]


def check_positions(encoded: Sequence[Sequence[int]], settings: AnswersSettings, positions: int | None) -> int:
    """
    Tokens of the longest prompt with its answer.

    Raises:
        ValueError: they are more than the source's `positions`.
    """
    prompt = max(map(len, encoded))
    if positions is not None and prompt + settings.max_new_tokens > positions:
        raise ValueError(
            f"The longest prompt, of {prompt} tokens, and max_new_tokens={settings.max_new_tokens} together exceed "
            f"the {positions} positions of the source; lower one of max_prompt_length and max_new_tokens."
        )
    return prompt + settings.max_new_tokens


def _without_end(tokenizer: PreTrainedTokenizerBase, encoded: list[list[int]]) -> list[list[int]]:
    """Some tokenizers close every text with an end token, behind which no answer would come."""
    probe: Any = tokenizer("a")["input_ids"]
    if tokenizer.eos_token_id is None or probe[-1] != tokenizer.eos_token_id:
        return encoded
    return [tokens[:-1] for tokens in encoded]


def sample_keys(encoded: Sequence[Sequence[int]], n: int) -> list[list[str]]:
    """
    What the randomness of each answer comes from: the prompt's tokens, how many equal prompts stand before it, and
    which of its `n` answers it is. It depends neither on batches, files and processes nor on the other prompts.
    """
    before: Counter[str] = Counter()
    keys = []
    for tokens in encoded:
        digest = hashlib.sha256(str(list(tokens)).encode()).hexdigest()
        keys.append([f"{digest} {before[digest]} {sample}" for sample in range(n)])
        before[digest] += 1
    return keys


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int], chat: bool) -> str:
    """
    An answer as text: after a chat template without surrounding white space, else exactly what continues the prompt.
    """
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text: Any = tokenizer.decode(answer, **options)
    if chat:
        return text.strip()
    # SentencePiece tokenizers drop the space before the first word of what they decode.
    begin: Any = tokenizer.decode(prompt, **options)
    whole: Any = tokenizer.decode(prompt + answer, **options)
    return whole[len(begin) :] if whole.startswith(begin) else text


__all__ = [
    "Prompt",
    "Prompts",
    "answer_text",
    "check_chat_template",
    "check_positions",
    "encode_prompts",
    "read_prompts",
    "sample_keys",
]
