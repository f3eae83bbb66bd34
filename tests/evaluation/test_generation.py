"""Sampling follows the protocol, is repeatable, and is scored by Rouge-L."""

from __future__ import annotations

import statistics
from typing import Any

import evaluate
import pytest
import torch
from datasets import Dataset
from rouge_score import rouge_scorer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_hf.evaluation import generation
from cbd_hf.evaluation.generation import ROUGE_L, evaluate_rouge_l, generate_answers

from ..test_clients import SENTENCES


PROMPTS = ["The", "A small lamp stood on", *SENTENCES]
SHORT = {"max_new_tokens": 12, "progress": False}


def test_same_seed_same_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    first = generate_answers(model, tokenizer, PROMPTS, seed=10, **SHORT)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert generate_answers(model, tokenizer, PROMPTS, seed=10, **SHORT) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate_answers(model, tokenizer, PROMPTS, seed=20, **SHORT) != first
    assert len(first) == len(PROMPTS)


def test_left_padding_does_not_change_greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    alone = generate_answers(model, tokenizer, PROMPTS, temperature=0, batch_size=1, **SHORT)
    together = generate_answers(model, tokenizer, PROMPTS, temperature=0, batch_size=7, **SHORT)
    assert alone == together


def test_greedy_answer_is_the_argmax(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    (answer,) = generate_answers(
        model, tokenizer, PROMPTS[:1], temperature=0, no_repeat_ngram_size=0, max_new_tokens=6, progress=False
    )
    tokens = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert answer == tokenizer.decode(tokens[0, -6:], skip_special_tokens=True).strip()


def test_checkpoint_settings_do_not_change_the_protocol(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = generate_answers(model, tokenizer, PROMPTS, seed=1, **SHORT)
    model.generation_config.update(repetition_penalty=5.0, temperature=0.1, top_k=3, top_p=0.2, do_sample=True)
    assert generate_answers(model, tokenizer, PROMPTS, seed=1, **SHORT) == expected


def test_end_token_of_the_checkpoint_ends_an_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = model(torch.tensor([tokenizer("The")["input_ids"]])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [first]
    (answer,) = generate_answers(model, tokenizer, ["The"], temperature=0, **SHORT)
    assert answer == tokenizer.decode([first], skip_special_tokens=True).strip()


def test_protocol_reaches_generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    calls: list[dict[str, Any]] = []
    generate = model.generate
    model.generate = lambda **options: calls.append(options) or generate(**options)
    generate_answers(model, tokenizer, ["The"], **SHORT)
    config = calls[0]["generation_config"]
    assert (config.no_repeat_ngram_size, config.temperature, config.top_p, config.top_k) == (6, 1.0, 1.0, 0)
    assert config.do_sample and config.max_new_tokens == 12


def test_long_prompts_keep_their_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = " ".join(SENTENCES)
    tail = tokenizer.decode(tokenizer(prompt)["input_ids"][-8:])
    cut = generate_answers(model, tokenizer, [prompt], seed=3, max_prompt_length=8, **SHORT)
    assert cut == generate_answers(model, tokenizer, [tail], seed=3, **SHORT)
    assert "1 of 1 prompts are cut to their last 8 tokens" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 300}, "exceed the model's 512 positions"),
    ],
)
def test_errors_say_what_to_do(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_answers(model, tokenizer, PROMPTS, **option)


def test_no_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate_answers(model, tokenizer, []) == []


def test_rouge_l_metric() -> None:
    metric = evaluate.load(str(ROUGE_L))
    predictions = ["The cats were running home.", "Blue"]
    references = [["A dog slept.", "the cat runs home"], ["red"]]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    best = max(scorer.score(answer, predictions[0])["rougeL"].fmeasure for answer in references[0])
    result = metric.compute(predictions=predictions, references=references, use_aggregator=False)
    assert result["scores"] == pytest.approx([100 * best, 0.0])
    assert result["rouge_l"] == pytest.approx(50 * best)
    assert metric.compute(predictions=["running"], references=["runs"]) == {"rouge_l": 100.0}


def test_mean_and_deviation_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {1: ["one two", "x"], 2: ["one two", "three"], 3: ["no", "no"]}
    monkeypatch.setattr(generation, "generate_answers", lambda *args, seed, **options: answers[seed])
    dataset = Dataset.from_dict({"prompt": ["p", "q"], "completion": ["one two", "three"]})
    result = evaluate_rouge_l(None, None, dataset, seeds=(1, 2, 3), num_samples=1)
    assert result.per_seed == {1: 50.0, 2: 100.0, 3: 0.0}
    assert result.mean == 50.0
    assert result.std == pytest.approx(statistics.stdev([50, 100, 0]))
    assert result.samples == [{"prompt": "p", "answer": "one two", "references": ["one two"], "rouge_l": 100.0}]


def test_real_answers_are_scored_against_all_references(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "completion": ["a", "b"], "references": [["a", "c"], ["b"]]})
    result = evaluate_rouge_l(model, tokenizer, dataset, seeds=(10,), **SHORT)
    assert 0 <= result.mean <= 100 and result.std == 0 and len(result.samples) == 2
    assert result.samples[0]["references"] == ["a", "c"]


def test_missing_columns() -> None:
    with pytest.raises(ValueError, match="has the columns prompt; needed are prompt, and references or completion"):
        evaluate_rouge_l(None, None, Dataset.from_dict({"prompt": ["p"]}))
    with pytest.raises(ValueError, match="at least one seed"):
        evaluate_rouge_l(None, None, Dataset.from_dict({"prompt": ["p"], "completion": ["c"]}), seeds=())
