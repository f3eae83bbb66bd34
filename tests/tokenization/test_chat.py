"""Contents are found in whatever a chat template makes of them, or the template is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbd_hf.tokenization import chat
from cbd_hf.tokenization.chat import ChatReader
from cbd_hf.tokenization.rows import Reading
from tests.tokenization.chats import CHATML, GEMMA, LLAMA, THINKING, chat_tokenizer, turn


QUESTION, ANSWER = turn("user", "user"), turn("assistant", "a")  # found in the markers of roles, too
CONVERSATION = [QUESTION, ANSWER, turn("user", "  model é\n"), turn("assistant", "user\n")]
PARTS = "{{ '%s' }}{%% for m in messages %%}{{ '[' + m['role'] + ']' + %s + ';' }}{%% endfor %%}"


def reader(template: str, side: str = "student") -> ChatReader:
    return ChatReader(chat_tokenizer("byte_level", template, bos=True), side)


def passages(reading: Reading) -> list[str]:
    return [reading.text.encode()[first:last].decode() for first, last in reading.passages.tolist()]


def supervised(reading: Reading) -> list[str]:
    return [reading.text.encode()[first:last].decode() for first, last in reading.supervised.tolist()]


@pytest.mark.parametrize("template", [CHATML, GEMMA, LLAMA, THINKING])
def test_contents(template: str) -> None:
    reading = reader(template).read(CONVERSATION)
    contents = [message["content"] for message in CONVERSATION]
    stripped = template in (GEMMA, LLAMA)
    assert passages(reading) == [content.strip() if stripped else content for content in contents]
    assert reading.trimmed.tolist() == [[0, 0], [0, 0], [2, 1], [0, 1]] if stripped else not reading.trimmed.any()
    assert reading.closed.tolist() == [False, True, False, True] and reading.aligned.all() and not reading.plain


@given(st.lists(st.text(max_size=12), min_size=2, max_size=4), st.sampled_from([CHATML, GEMMA, LLAMA, THINKING]))
def test_any_contents(contents: list[str], template: str) -> None:
    messages = [turn(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]
    reading = READERS[template].read(messages)
    assert [passage.strip() for passage in passages(reading)] == [content.strip() for content in contents]
    for content, passage, trimmed in zip(contents, passages(reading), reading.trimmed.tolist(), strict=True):
        data = content.encode()
        assert data[trimmed[0] : len(data) - trimmed[1]].decode() == passage


READERS = {template: reader(template) for template in (CHATML, GEMMA, LLAMA, THINKING)}


def test_turns() -> None:
    """From behind the generation prompt to the end of the turn."""
    assert supervised(reader(CHATML).read(CONVERSATION)) == ["a<|im_end|>\n", "user\n<|im_end|>\n"]
    assert supervised(reader(GEMMA).read(CONVERSATION)) == ["a<end_of_turn>\n", "user<end_of_turn>\n"]
    assert supervised(reader(LLAMA).read(CONVERSATION)) == [" a <|end|>", " user <|end|>"]
    # The first answer is rendered differently when it is the last, so only its content is sure.
    assert supervised(reader(THINKING).read(CONVERSATION)) == ["a", "<think>\n\n</think>\n\nuser\n<|im_end|>\n"]
    reading = reader(CHATML).read([turn("assistant", "hello"), *CONVERSATION[:2]])
    assert supervised(reading) == ["hello", "a<|im_end|>\n"]


def test_answer_to_a_prompt() -> None:
    """Everything behind the prompt, earlier answers not."""
    for template in (CHATML, THINKING):
        reading = reader(template).read(CONVERSATION, prompt=3)
        assert supervised(reading) == [reading.text.rpartition("assistant\n")[2]]
    assert supervised(reader(CHATML).read(CONVERSATION, prompt=1)) == [
        "a<|im_end|>\n<|im_start|>user\n  model é\n<|im_end|>\n<|im_start|>assistant\nuser\n<|im_end|>\n"
    ]
    reading = reader(GEMMA).read(CONVERSATION[:1], whole=True)
    assert supervised(reading) == [reading.text]


@pytest.mark.parametrize("template", [GEMMA, LLAMA])
def test_system_message_is_folded(template: str) -> None:
    """Into the first user message where the template refuses it, and where it drops it."""
    reading = reader(template).read([turn("system", " be brief"), *CONVERSATION])
    assert passages(reading) == ["be brief", "user", "a", "model é", "user"]
    assert "be brief\n\nuser" in reading.text and reading.aligned.all()
    assert supervised(reading) == supervised(reader(template).read(CONVERSATION))
    with pytest.raises(ValueError, match=r"student's chat template refuses .*'system', 'assistant'"):
        reader(template).read([turn("system", "be brief"), turn("assistant", "a")])


def test_system_message_elsewhere() -> None:
    """Behind the others it is left out of the alignment; other messages keep their order."""
    last = "{% for m in messages[1:] + messages[:1] %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    reading = reader(last).read([turn("system", "s"), QUESTION, ANSWER])
    assert passages(reading) == ["s", "user", "a"] and reading.aligned.tolist() == [False, True, True]
    assert supervised(reading) == ["a"]
    with pytest.raises(ValueError, match="changes the order"):
        reader(last).read([turn("user", "s"), QUESTION, ANSWER])


@pytest.mark.parametrize("change", ["m['content'] | upper", "m['content'].split('</think>')[-1]", "m['content'][:4]"])
def test_changed_content(change: str) -> None:
    changing = reader(PARTS % ("", change), "source")
    with pytest.raises(ValueError, match=r"source's chat template (changes the content|refuses)"):
        changing.read([QUESTION, turn("assistant", "why</think>because")])


def test_repeated_content() -> None:
    with pytest.raises(ValueError, match=r"refuses .*leaves out or repeats the messages \[0, 1\]"):
        reader(PARTS % ("", "m['content'] + m['content']")).read([QUESTION, ANSWER])


def test_written_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a template writes besides the contents may change, and contents of other rows are not rendered again."""
    dated = reader(PARTS % ("Monday", "m['content']"))
    calls: list[Any] = []
    render = dated._render
    monkeypatch.setattr(dated, "_render", lambda *args, **options: calls.append(args) or render(*args, **options))
    dated.read([QUESTION, ANSWER])
    first = len(calls)
    assert passages(dated.read([turn("user", "x"), ANSWER])) == ["x", "a"] and len(calls) == first + 1
    dated.tokenizer.chat_template = PARTS % ("Tuesday", "m['content']")
    assert passages(dated.read([turn("user", "y"), ANSWER])) == ["y", "a"]
    assert dated.read([turn("user", "y"), ANSWER]).text.startswith("Tuesday")


def test_other_fields() -> None:
    """What else a message holds is rendered, and rows with other fields are not taken for the same."""
    named = reader("{% for m in messages %}{{ (m['name'] if 'name' in m else '-') + ':' + m['content'] }}{% endfor %}")
    for name in ("x", "yz", None):
        reading = named.read([QUESTION | {"name": name}, ANSWER])
        assert reading.text == f"{name or '-'}:user-:a" and passages(reading) == ["user", "a"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "REMEMBERED", 3)
    bounded = reader(CHATML)
    for count in range(1, 9):
        bounded.read([QUESTION, ANSWER] * count)
        assert len(bounded.layouts) <= 3


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="source's tokenizer has no chat template.*source_prompt='same'"):
        ChatReader(chat_tokenizer("byte_level"), "source")
    with pytest.raises(ValueError, match="student's tokenizer has no chat template.*chat_template_path"):
        ChatReader(chat_tokenizer("byte_level"), "student")
    with pytest.raises(ValueError, match=r"Message 1 \(assistant\) has a content of type list"):
        reader(CHATML).read([QUESTION, turn("assistant", [{"type": "text", "text": "a"}])])
    with pytest.raises(ValueError, match=r"Message 0 \(user\) has a content of type NoneType"):
        reader(CHATML).read([turn("user", None), ANSWER])
    with pytest.raises(ValueError, match="no assistant turn"):
        reader(CHATML).read([QUESTION])
    with pytest.raises(ValueError, match="no message in its completion"):
        reader(CHATML).read([QUESTION], prompt=1)
