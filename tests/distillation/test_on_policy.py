"""The student's own samples: what is drawn, and what a step on them learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessorList, PreTrainedModel

from cbd_hf.distillation.on_policy import KeyedSampling, draw_on_policy, prompt_of, sample_completions

from ..models import VOCAB, random_model, tiny_config
from .helpers import (
    ANSWER_ROWS,
    CONVERSATION_IDS,
    CONVERSATION_ROW,
    EOS,
    KINDS,
    W0,
    Row,
    dense_mean,
    everything,
    make_trainer,
    student_model,
    supervised,
    teacher_model,
)


PROMPTS = [[W0 + 1], [W0 + 2, W0 + 3, W0 + 4, W0 + 5], [W0 + 6, W0 + 7], [W0 + 8, W0 + 9, W0 + 9]]


def samples(model: PreTrainedModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return sample_completions(
        model,
        prompts,
        **{"max_new_tokens": 8, "temperature": 1.0, "pad_token_id": EOS, "eos_token_id": EOS, "seed": "0 0"} | options,
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_samples_do_not_depend_on_the_batch(family: str) -> None:
    model = random_model(tiny_config(family, layers=1), seed=1, std=0.1)
    together = samples(model, PROMPTS)
    assert [samples(model, [prompt])[0] for prompt in PROMPTS] == together
    assert samples(model, PROMPTS[::-1]) == together[::-1]
    torch.manual_seed(7)
    assert samples(model, PROMPTS) == together


def test_samples_differ_by_step_and_prompt() -> None:
    model = student_model()
    together = samples(model, PROMPTS, seed="0 0")
    assert len({tuple(completion) for completion in together}) == len(PROMPTS)
    for seed in ("0 1", "1 0"):
        assert all(a != b for a, b in zip(together, samples(model, PROMPTS, seed=seed), strict=True))


def test_samples_end_behind_their_first_end_token() -> None:
    model = student_model()
    stops = list(range(2, VOCAB, 4))  # many, so that some samples end early and some do not
    found = samples(model, PROMPTS + [[W0 + index] for index in range(20, 40)], eos_token_id=stops)
    lengths = {len(completion) for completion in found}
    assert len(lengths) > 2 and max(lengths) <= 8
    for completion in found:
        assert not set(completion[:-1]) & set(stops)
        assert len(completion) == 8 or completion[-1] in stops


@pytest.mark.parametrize("adapter", [False, True])
def test_the_models_generation_config_does_not_bend_the_samples(adapter: bool) -> None:
    """A checkpoint's repetition penalty or banned tokens would make samples of another distribution."""
    base = student_model()
    expected = samples(base, PROMPTS)
    own = base.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 9.0, 1, 2
    own.suppress_tokens = expected[0][:1]
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])) if adapter else base
    assert samples(model, PROMPTS) == expected
    assert base.generation_config is own and own.num_beams == 2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("position", [0, 3])
def test_keyed_sampling_draws_from_the_softmax(temperature: float, position: int) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -0.5])
    draws = 6000
    keyed = KeyedSampling([[index] for index in range(draws)], "seed", 1, temperature)
    tokens = torch.zeros(draws, 1 + position, dtype=torch.int64)
    chosen = LogitsProcessorList([keyed])(tokens, scores.expand(draws, -1)).argmax(-1)
    counts = torch.bincount(chosen, minlength=len(scores)).double()
    expected = draws * torch.softmax(scores.double() / temperature, dim=-1)
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: one seed in a thousand exceeds it


def test_positions_are_drawn_independently() -> None:
    keyed = KeyedSampling([[index] for index in range(500)], "seed", 1, 1.0)
    first, second = (
        keyed(torch.zeros(500, 1 + position, dtype=torch.int64), torch.zeros(500, 4)).argmax(-1) for position in (0, 1)
    )
    assert 0.15 < float((first == second).double().mean()) < 0.35


def test_share_of_on_policy_steps() -> None:
    for lmbda in (0.0, 0.3, 1.0):
        share = sum(draw_on_policy(lmbda, 0, step) for step in range(2000)) / 2000
        assert share == pytest.approx(lmbda, abs=0.04 if 0 < lmbda < 1 else 0)
    assert any(draw_on_policy(0.5, 0, step) != draw_on_policy(0.5, 1, step) for step in range(20))


@pytest.mark.parametrize(
    ("row", "max_length", "expected"),
    [
        (CONVERSATION_ROW, 99, CONVERSATION_IDS[:11]),
        (CONVERSATION_ROW, 3, CONVERSATION_IDS[8:11]),
        (ANSWER_ROWS[1], 99, [W0 + 5]),
        (everything(CONVERSATION_IDS), 99, []),
    ],
)
def test_prompt_of(row: Row, max_length: int, expected: list[int]) -> None:
    ids, labels = (list(part) for part in row)
    assert prompt_of(ids, labels, max_length) == expected


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_an_on_policy_step(temperature: float, tmp_path: Path) -> None:
    """Its loss is over the sampled answers, and so is the number of tokens that divides it."""
    data, _, rows = KINDS["answers"]
    trainer = make_trainer(
        tmp_path,
        Dataset.from_list(data),
        lmbda=1.0,
        temperature=temperature,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    prompts = [prompt_of(list(ids), list(labels), 99) for ids, labels in rows]
    options = {"max_new_tokens": 6, "temperature": temperature, "seed": f"{trainer.args.seed} 0"}
    drawn = samples(student_model(), prompts, keys=[f"{i} {prompt}" for i, prompt in enumerate(prompts)], **options)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert count == sum(map(len, drawn))
    assert sum(map(len, drawn)) != sum(label != -100 for _, labels in rows for label in labels)
    seen = sorted(batch["input_ids"][0].tolist() for batch in batches)
    assert seen == sorted(prompt + answer for prompt, answer in zip(prompts, drawn, strict=True))
    trainer.train()
    expected = dense_mean(
        student_model(),
        teacher_model(),
        [supervised(prompt, answer) for prompt, answer in zip(prompts, drawn, strict=True)],
        VOCAB,
        temperature=temperature,
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def on_policy_rows(directory: Path, data: list[dict[str, Any]], micro_batch: int, **options: Any) -> list[list[int]]:
    """The sampled rows of the first step, in the order of the dataset."""
    trainer = make_trainer(
        directory,
        Dataset.from_list(data),
        lmbda=1.0,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(data) // micro_batch,
        **options,
    )
    batches, _ = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), len(data) // micro_batch, torch.device("cpu")
    )
    rows = {}
    for batch in batches:
        for example, ids, mask in zip(batch["example_id"], batch["input_ids"], batch["attention_mask"], strict=True):
            rows[int(example)] = ids[mask.bool()].tolist()
    return [rows[example] for example in sorted(rows)]


def test_one_prompt_twice_has_two_samples(tmp_path: Path) -> None:
    """However the step is split."""
    data = [{"prompt": "w1 w2 w3", "completion": " w4"}] * 3 + [{"prompt": "w5", "completion": " w6"}]
    together = on_policy_rows(tmp_path, data, 4)
    assert len({tuple(row) for row in together[:3]}) == 3
    assert on_policy_rows(tmp_path, data, 1) == together


def test_a_prompt_without_an_answer_stays_whole(tmp_path: Path) -> None:
    """max_length may have cut the answer off; what is trimmed of other batches must not reach the prompt."""
    long, short = [W0 + index for index in range(1, 9)], [W0 + 20, W0 + 21, EOS]
    data = [
        {"input_ids": long, "labels": [-100] * 8},
        {"input_ids": short, "labels": [-100, *short[1:]]},
    ]
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    together = on_policy_rows(tmp_path, data, 2, **options)
    assert together[0][:8] == long and len(together[0]) > 8
    assert on_policy_rows(tmp_path, data, 1, **options) == together


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("text", {}, "lmbda=1.0 samples answers to prompts, but the dataset is plain text"),
        ("answers", {"packing": True}, "packing joins several prompts"),
    ],
)
def test_on_policy_needs_prompts(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, Dataset.from_list(KINDS[kind][0]), lmbda=1.0, **options)


def test_on_policy_names_an_empty_prompt(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Dataset.from_list(KINDS["tokens"][0]), lmbda=1.0)
    with pytest.raises(ValueError, match="needs a prompt in every example"):
        trainer.train()
