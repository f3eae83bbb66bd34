"""Prompts as tokens and answers as text, with tokenizers that add something at either end."""

from __future__ import annotations

import dataclasses

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from cbd_hf.distillation.answers import AnswersSettings
from cbd_hf.distillation.answers.prompts import answer_text, check_chat_template, encode_prompts, read_prompts

from ...models import tiny_tokenizer


def spaced_tokenizer(end: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's way with spaces, single letters; BOS in front, and an end token behind if asked for."""
    letters = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz."]
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{{ messages }}",
    )


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerFast, **options: object) -> list[list[int]]:
    settings = dataclasses.replace(AnswersSettings(), **options)
    return encode_prompts(read_prompts(Dataset.from_dict({"prompt": texts})), tokenizer, settings)[1]


def test_no_end_token_behind_a_prompt() -> None:
    plain = encoded(["ab c", "d"], spaced_tokenizer())
    assert plain == encoded(["ab c", "d"], spaced_tokenizer(end=True))
    assert all(tokens[0] == 0 and tokens[-1] != 1 for tokens in plain)


def test_a_template_brings_its_own_special_tokens() -> None:
    tokenizer = spaced_tokenizer()
    tokenizer.chat_template = "{{ bos_token + messages[0]['content'] + (mark or '') }}"
    found = encoded(["ab"], tokenizer, source_prompt="chat", chat_template_kwargs={"mark": "z"})
    assert found == [tokenizer("abz")["input_ids"]] and found[0].count(0) == 1


@pytest.mark.parametrize("answer", [" it is.", "it is.", "  two", "", "a b "])
def test_an_answer_is_what_continues_the_prompt(answer: str) -> None:
    tokenizer, prompt = spaced_tokenizer(), "where is it"
    first = tokenizer(prompt)["input_ids"]
    pieces = tokenizer.convert_tokens_to_ids([{" ": "▁"}.get(letter, letter) for letter in answer])
    assert answer_text(tokenizer, first, pieces, chat=False) == answer
    assert answer_text(tokenizer, first, pieces, chat=True) == answer.strip()
    # By itself it would lose its first space.
    assert answer != " it is." or tokenizer.decode(pieces) == "it is."


def test_columns() -> None:
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    for columns, texts, references in (
        ({"prompt": ["a"], "references": [["b", "c"]], "completion": ["d"]}, ["a"], [["b", "c"]]),
        ({"prompt": ["a"], "completion": ["d"]}, ["a"], [["d"]]),
        ({"prompt": ["a", "b"], "completion": ["", "d"]}, ["a", "b"], [[], ["d"]]),
        ({"prompt": ["a"]}, ["a"], [[]]),
        ({"prompt": [turns[:1]], "completion": [turns[1:]]}, [turns[:1]], [["w2"]]),
        ({"messages": [turns]}, [turns[:1]], [["w2"]]),
        ({"messages": [turns + turns[:1]]}, [turns + turns[:1]], [[]]),
        ({"messages": [turns + turns]}, [turns + turns[:1]], [["w2"]]),
    ):
        prompts = read_prompts(Dataset.from_dict(columns))
        assert (prompts.texts, prompts.references) == (texts, references)
        assert prompts.conversational == isinstance(texts[0], list)
    with pytest.raises(ValueError, match="Row 0 .* empty prompt"):
        read_prompts(Dataset.from_dict({"messages": [turns[1:]]}))


def test_conversations_take_the_template() -> None:
    tokenizer = tiny_tokenizer()
    prompts = read_prompts(Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1 w2"}]]}))
    assert check_chat_template(tokenizer, prompts, AnswersSettings()) is not None
    assert encode_prompts(prompts, tokenizer, AnswersSettings()) == (
        [0],
        [tokenizer("<user> w1 w2 <end> <assistant>", add_special_tokens=False)["input_ids"]],
    )
    text = read_prompts(Dataset.from_dict({"prompt": ["w1"]}))
    assert check_chat_template(tokenizer, text, AnswersSettings()) is None
