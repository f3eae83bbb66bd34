"""Where the contents of a conversation lie in the text that a chat template makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cbd_hf.tokenization.rows import BEHIND, Reading


Message = dict[str, Any]
PLACEHOLDER = "CBD-{}-CONTENT"
REMEMBERED = 1024  # layouts of a template, one for each sequence of roles


@dataclass(frozen=True)
class _Layout:
    """
    What a template writes around the contents of conversations with the same roles.

    Args:
        literals (`tuple[str, ...]`): text before the first content, between contents, and behind the last.
        order (`tuple[int, ...]`): the message whose content comes next.
        folded (`str`, *optional*): what the system message and the first user message are joined with, if they are.
        turns (`dict[int, tuple[int, int]]`): bytes around a supervised message's content that belong to the turn.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    folded: str | None
    turns: dict[int, tuple[int, int]]


class ChatReader:
    """
    Reads conversations through a tokenizer's chat template.

    Contents may come out stripped of white space around them. The system message goes in front of the first user
    message, a blank line between them, where the template refuses or leaves out system messages.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        side (`str`): `"student"` or `"source"`, for messages of errors.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, side: str) -> None:
        if not tokenizer.chat_template:
            remedy = "give it one" + (" (in the training: chat_template_path=FILE.jinja)" if side == "student" else "")
            alternative = "source_prompt='same' with " if side == "source" else ""
            raise ValueError(
                f"The {side}'s tokenizer has no chat template, so it cannot read conversations: {remedy}, or use "
                f"{alternative}'prompt' and 'completion' columns that are strings."
            )
        self.tokenizer = tokenizer
        self.side = side
        self.layouts: dict[Any, _Layout] = {}

    def read(self, messages: Sequence[Message], prompt: int = 0, whole: bool = False) -> Reading:
        """
        The text of a conversation.

        Supervised is what the template adds between the generation prompt and the end of an assistant's turn, or only
        the content and the token behind it if the template renders the turn differently once others follow.

        Args:
            messages (`Sequence[dict]`): with `role` and `content`.
            prompt (`int`, *optional*, defaults to 0): with a number of messages everything behind them is supervised,
                with 0 every assistant turn.
            whole (`bool`, *optional*, defaults to `False`): supervise the whole text.

        Raises:
            ValueError: a content is not a string, nothing is to be supervised, or the template refuses the
                conversation or changes a content.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        self._check(messages, prompt, whole)
        contents = [message["content"] for message in messages]
        rest = [{key: value for key, value in message.items() if key != "content"} for message in messages]
        between = "\n\n" if all(content.strip() for content in contents[:2]) else ""
        key = (prompt, between, json.dumps(rest, sort_keys=True, default=str))
        layout = self.layouts.get(key) or self._layout(messages, prompt, between)
        text = self._render(messages, contents, layout.folded)
        found = _find(text, layout, contents)
        if found is None and key in self.layouts:  # a template may write the date, which is another one now
            layout = self._layout(messages, prompt, between)
            found = _find(text, layout, contents)
        if found is None:
            raise ValueError(
                f"The {self.side}'s chat template changes the content of a message beyond white space around it, so "
                f"its tokens cannot be aligned. The conversation starts with {contents[0][:80]!r}; its roles are "
                f"{[message['role'] for message in messages]}. Remove what the template treats apart (such as "
                "<think> sections), or use another template."
            )
        if len(self.layouts) >= REMEMBERED:
            self.layouts.clear()
        self.layouts[key] = layout
        passages, trimmed = found
        assistant = np.array([message["role"] == "assistant" for message in messages])
        ordered = list(layout.order) == sorted(layout.order)
        system = np.array([message["role"] == "system" for message in messages])
        return Reading(
            text=text,
            passages=passages,
            trimmed=trimmed,
            aligned=np.full(len(messages), True) if ordered else ~system,
            closed=assistant if whole else assistant & (np.arange(len(messages)) >= prompt),
            supervised=np.array([[0, BEHIND]]) if whole else _supervised(layout, passages, prompt, assistant),
            plain=False,
        )

    def _check(self, messages: list[Message], prompt: int, whole: bool) -> None:
        for index, message in enumerate(messages):
            if not isinstance(message.get("content"), str):
                raise ValueError(
                    f"Message {index} ({message.get('role')}) has a content of type "
                    f"{type(message.get('content')).__name__}; the bridge aligns strings."
                )
        if not messages or not (whole or prompt or any(message["role"] == "assistant" for message in messages)):
            raise ValueError("A conversation in 'messages' has no assistant turn, so there is nothing to supervise.")
        if prompt >= len(messages):
            raise ValueError("A conversation in 'prompt' and 'completion' has no message in its completion.")

    def _layout(self, messages: list[Message], prompt: int, between: str) -> _Layout:
        """The template's text around contents; see [`_Layout`]."""
        folded = None
        can_fold = len(messages) > 1 and [message["role"] for message in messages[:2]] == ["system", "user"]
        try:
            literals, order = self._parts(messages)
        except (TemplateError, ValueError) as refusal:
            try:
                if not can_fold:
                    raise
                folded = between
                literals, order = self._parts(messages, folded)
            except (TemplateError, ValueError):
                raise ValueError(
                    f"The {self.side}'s chat template refuses a conversation with the roles "
                    f"{[message['role'] for message in messages]}: {refusal}"
                ) from refusal
        others = [index for index in order if messages[index]["role"] != "system"]
        if others != sorted(others):
            raise ValueError(f"The {self.side}'s chat template changes the order of messages.")
        if prompt:
            wanted = [prompt]
        else:
            wanted = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        turns = {}
        for index in wanted if order == tuple(range(len(messages))) else []:
            before = self._edge(messages[:index], folded, literals[: index + 1], generation=True)
            after = 0 if prompt else self._edge(messages[: index + 1], folded, literals[: index + 2])
            if before is not None and after is not None:
                turns[index] = (len(literals[index].encode()) - before, after)
        return _Layout(literals, order, folded, turns)

    def _edge(
        self, messages: list[Message], folded: str | None, literals: tuple[str, ...], generation: bool = False
    ) -> int | None:
        """Bytes behind the last content of the first turns alone, or None if they are rendered differently then."""
        if not messages:
            return None
        try:
            alone, order = self._parts(messages, folded, generation)
        except (TemplateError, ValueError):
            return None
        same = alone[:-1] == literals[:-1] and literals[-1].startswith(alone[-1])
        return len(alone[-1].encode()) if same and order == tuple(range(len(messages))) else None

    def _parts(
        self, messages: list[Message], folded: str | None = None, generation: bool = False
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Literals and order of a [`_Layout`]."""
        marks = [PLACEHOLDER.format(index) for index in range(len(messages))]
        parts = re.split(PLACEHOLDER.format(r"(\d+)"), self._render(messages, marks, folded, generation))
        order = tuple(int(index) for index in parts[1::2])
        if sorted(order) != [*range(len(messages))]:
            lost = [index for index in range(len(messages)) if order.count(index) != 1]
            raise ValueError(f"it leaves out or repeats the messages {lost}")
        return tuple(parts[::2]), order

    def _render(
        self, messages: list[Message], contents: list[str], folded: str | None = None, generation: bool = False
    ) -> str:
        written = [message | {"content": content} for message, content in zip(messages, contents, strict=True)]
        if folded is not None:
            written[:2] = [written[1] | {"content": contents[0] + folded + contents[1]}]
        return str(self.tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=generation))


def _find(text: str, layout: _Layout, contents: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Passages and what has been trimmed of them, as in [`Reading`], or None if a content is not there."""
    passages = np.zeros((len(contents), 2), np.int64)
    trimmed = np.zeros((len(contents), 2), np.int64)
    if not text.startswith(layout.literals[0]):
        return None
    cursor, byte = len(layout.literals[0]), len(layout.literals[0].encode())
    for index, literal in zip(layout.order, layout.literals[1:], strict=True):
        content = contents[index]
        for form in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(form + literal, cursor):
                break
        else:
            return None
        lead = content.index(form)  # of white space only: everything is behind
        size = len(form.encode())
        passages[index] = byte, byte + size
        trimmed[index] = len(content[:lead].encode()), len(content[lead + len(form) :].encode())
        cursor += len(form) + len(literal)
        byte += size + len(literal.encode())
    return (passages, trimmed) if cursor == len(text) else None


def _supervised(layout: _Layout, passages: np.ndarray, prompt: int, assistant: np.ndarray) -> np.ndarray:
    """Supervised bytes, as in [`Reading`]."""
    if prompt:
        return np.array([[passages[prompt, 0] - layout.turns.get(prompt, (0, 0))[0], BEHIND]])
    answers = np.flatnonzero(assistant)
    around = [layout.turns.get(index, (0, 0)) for index in answers.tolist()]
    ranges = passages[answers] + [(-before, after) for before, after in around]
    ranges[1:, 0] = np.maximum(ranges[1:, 0], ranges[:-1, 1])
    return ranges


__all__ = ["ChatReader", "Message"]
