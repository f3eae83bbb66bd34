"""The stepwise trainer: what is supervised, what is refused, adapters, and the student's own samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf.distillation.columns import tokenize_turns
from cbd_hf.distillation.on_policy import KeyedSampling, draw_on_policy, prompt_of, sample_completions

from ..distributed.gradient_worker import gradient, relative_difference
from ..models import VOCAB, answers_dataset, logits, random_model, tiny_config, tiny_tokenizer
from .test_objectives import Row, dense_mean


EOS, USER, ASSISTANT, END, W0 = 1, 2, 3, 4, 6  # ids of tiny_tokenizer: word w<i> is W0 + i


def student_model(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=1, **options), seed=1, std=0.1)


def teacher_model(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=2, **options), seed=2, std=0.2)


def make_config(directory: Path, **options: Any) -> StepwiseDistillationConfig:
    return StepwiseDistillationConfig(
        **{
            "output_dir": str(directory / "trainer"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_new_tokens": 6,
        }
        | options
    )


def make_trainer(
    directory: Path,
    dataset: Dataset | IterableDataset | None = None,
    student: PreTrainedModel | str | None = None,
    teacher: PreTrainedModel | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: LoraConfig | None = None,
    eval_dataset: Dataset | None = None,
    **options: Any,
) -> StepwiseDistillationTrainer:
    return StepwiseDistillationTrainer(
        student_model() if student is None else student,
        teacher_model() if teacher is None else teacher,
        make_config(directory, **options),
        train_dataset=answers_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=peft_config,
    )


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def supervised(prompt: list[int], answer: list[int]) -> Row:
    return prompt + answer, [-100] * len(prompt) + answer


def everything(ids: list[int]) -> Row:
    return ids, ids


CONVERSATION = [
    turn("user", "w1 w2"),
    turn("assistant", "w3"),
    turn("user", "w4"),
    turn("assistant", "w5 w6"),
]
CONVERSATION_IDS = [
    USER,
    W0 + 1,
    W0 + 2,
    END,
    ASSISTANT,
    W0 + 3,
    END,
    USER,
    W0 + 4,
    END,
    ASSISTANT,
    W0 + 5,
    W0 + 6,
    END,
]
ANSWERED = {5, 6, 11, 12, 13}  # both answers with their end-of-turn tokens
SHORT = [turn("user", "w7"), turn("assistant", "w8 w9 w1")]
SHORT_ROW = supervised([USER, W0 + 7, END, ASSISTANT], [W0 + 8, W0 + 9, W0 + 1, END])
CONVERSATION_ROW: Row = (
    CONVERSATION_IDS,
    [token if index in ANSWERED else -100 for index, token in enumerate(CONVERSATION_IDS)],
)
ANSWER_ROWS = [
    supervised([W0 + 1, W0 + 2, W0 + 3], [W0 + 4, EOS]),
    supervised([W0 + 5], [W0 + 6, W0 + 7, W0 + 8, EOS]),
]

# Kind of data -> (rows of the dataset, options, rows as token ids and labels by hand).
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[Row]]] = {
    "text": (
        [{"text": "w1 w2 w3"}, {"text": "w4"}],
        {},
        [everything([W0 + 1, W0 + 2, W0 + 3, EOS]), everything([W0 + 4, EOS])],
    ),
    "text column": (
        [{"body": "w1 w2 w3", "title": "w9"}],
        {"dataset_text_field": "body"},
        [everything([W0 + 1, W0 + 2, W0 + 3, EOS])],
    ),
    "answers": (
        [{"prompt": "w1 w2 w3", "completion": " w4"}, {"prompt": "w5", "completion": " w6 w7 w8"}],
        {},
        ANSWER_ROWS,
    ),
    "answers, all supervised": (
        [{"prompt": "w1 w2 w3", "completion": " w4"}],
        {"completion_only_loss": False},
        [everything([W0 + 1, W0 + 2, W0 + 3, W0 + 4, EOS])],
    ),
    "conversational answers": (
        [{"prompt": SHORT[:1], "completion": SHORT[1:]}],
        {},
        [SHORT_ROW],
    ),
    "messages": ([{"messages": CONVERSATION}, {"messages": SHORT}], {}, [CONVERSATION_ROW, SHORT_ROW]),
    "messages, all supervised": (
        [{"messages": CONVERSATION}],
        {"completion_only_loss": False},
        [everything(CONVERSATION_IDS)],
    ),
    "tokens with labels": (
        [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in (CONVERSATION_ROW, *ANSWER_ROWS)],
        {},
        [CONVERSATION_ROW, *ANSWER_ROWS],
    ),
    "tokens": ([{"input_ids": CONVERSATION_IDS}], {}, [everything(CONVERSATION_IDS)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss(kind: str, tmp_path: Path) -> None:
    """The logged loss is the objective over exactly the positions labelled by hand."""
    data, options, rows = KINDS[kind]
    trainer = make_trainer(tmp_path, Dataset.from_list(data), **options)
    before = trainer.model.get_parameter("model.norm.weight").detach().clone()
    trainer.train()
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(trainer.model.get_parameter("model.norm.weight"), before)


@pytest.mark.parametrize("known_columns", [True, False])
@pytest.mark.parametrize("kind", ["text", "answers", "messages"])
def test_streamed_data(kind: str, known_columns: bool, tmp_path: Path) -> None:
    data, options, rows = KINDS[kind]
    if known_columns:
        dataset = Dataset.from_list(data).to_iterable_dataset()
    else:
        dataset = IterableDataset.from_generator(lambda: iter(data))
    trainer = make_trainer(tmp_path, dataset, per_device_train_batch_size=len(data), **options)
    trainer.train()
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "forward_kl"},
        {"objective": "generalized_jsd", "beta": 0.2},
        {"temperature": 3.0},
        {"objective": "forward_kl", "cross_entropy_weight": 0.4, "temperature": 2.0},
        {"cross_entropy_weight": 1.0},
    ],
)
def test_options_reach_the_loss(options: dict[str, Any], tmp_path: Path) -> None:
    data, _, rows = KINDS["answers"]
    trainer = make_trainer(tmp_path, Dataset.from_list(data), eval_dataset=Dataset.from_list(data), **options)
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    log = trainer.state.log_history
    assert next(entry["loss"] for entry in log if "loss" in entry) == pytest.approx(expected, rel=1e-4)
    divergence = dense_mean(student_model(), teacher_model(), rows, VOCAB, **options | {"cross_entropy_weight": 0.0})
    logged = [entry["divergence"] for entry in log if "divergence" in entry]
    assert logged == ([] if options.get("cross_entropy_weight") == 1 else [pytest.approx(divergence, rel=1e-4)])


def test_long_rows_are_cut(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Dataset.from_list([{"text": "w1 w2 w3 w4 w5"}]), max_length=3)
    trainer.train()
    expected = dense_mean(student_model(), teacher_model(), [everything([W0 + 1, W0 + 2, W0 + 3])], VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_temperature_changes_the_gradient() -> None:
    one, two = (gradient(8, 1, temperature=temperature)["gradient"] for temperature in (1.0, 2.0))
    assert relative_difference(one, two) > 0.05


@pytest.mark.parametrize(
    ("objective", "temperature", "lmbda"),
    [("reverse_kl", 1.0, 0.0), ("forward_kl", 2.0, 0.0), ("reverse_kl", 1.0, 1.0)],
)
def test_the_divergence_falls(objective: str, temperature: float, lmbda: float, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=30, objective=objective, temperature=temperature, lmbda=lmbda, lr_scheduler_type="constant"
    )
    trainer.train()
    divergences = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    assert len(divergences) == 30
    assert sum(divergences[-5:]) < (0.85 if lmbda else 0.6) * sum(divergences[:5])
    assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())


def test_the_teacher_is_not_trained(tmp_path: Path) -> None:
    teacher = teacher_model()
    make_trainer(tmp_path, teacher=teacher).train()
    for name, parameter in teacher_model().named_parameters():
        assert torch.equal(teacher.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "columns", [["title", "body"], ["prompt"], ["completion", "title"], ["question", "answer"], ["labels"]]
)
@pytest.mark.parametrize("where", ["train", "eval", "eval dict"])
def test_wrong_columns_are_found_before_any_work(columns: list[str], where: str, tmp_path: Path) -> None:
    wrong, right = Dataset.from_list([dict.fromkeys(columns, "w1")]), answers_dataset()
    with pytest.raises(ValueError, match="The dataset has the columns") as caught:
        StepwiseDistillationTrainer(
            "./no-student",
            "./no-teacher",
            make_config(tmp_path),
            train_dataset=wrong if where == "train" else right,
            eval_dataset={"train": None, "eval": wrong, "eval dict": {"a": right, "b": wrong}}[where],
            processing_class=tiny_tokenizer(),
        )
    assert all(repr(name) in str(caught.value) for name in (*columns, "text", "completion", "messages", "input_ids"))


def test_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No teacher: pass teacher_model, or set teacher_model_name_or_path"):
        StepwiseDistillationTrainer(student_model(), args=make_config(tmp_path), train_dataset=answers_dataset())


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is required"):
        StepwiseDistillationTrainer(student_model(), teacher_model(), make_config(tmp_path))


def save(model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_models_by_path(by: str, tmp_path: Path) -> None:
    """The tokenizer comes with the student; the teacher needs none, and may be loaded in another dtype."""
    student = save(student_model(), tmp_path / "student", tiny_tokenizer())
    teacher = save(teacher_model(), tmp_path / "teacher", tiny_tokenizer() if by == "config" else None)
    options = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    if by == "config":
        options["teacher_model_name_or_path"] = teacher  # type: ignore[assignment]
    trainer = StepwiseDistillationTrainer(
        student,
        teacher if by == "argument" else None,
        make_config(tmp_path, **options),
        train_dataset=answers_dataset(),
    )
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    assert {parameter.dtype for parameter in trainer.teacher_model.parameters()} == {torch.bfloat16}
    assert not trainer.teacher_model.training
    trainer.train()


def other_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    return tokenizer


@pytest.mark.parametrize("given", ["directory", "argument"])
def test_a_teacher_of_another_tokenizer(given: str, tmp_path: Path) -> None:
    teacher = teacher_model(vocab_size=72)
    with pytest.raises(ValueError, match=r"teacher's tokenizer \(65 tokens\) is not the student's \(64"):
        if given == "directory":
            make_trainer(tmp_path, teacher=save(teacher, tmp_path / "teacher", other_tokenizer()))
        else:
            StepwiseDistillationTrainer(
                student_model(),
                teacher,
                make_config(tmp_path),
                train_dataset=answers_dataset(),
                processing_class=tiny_tokenizer(),
                teacher_processing_class=other_tokenizer(),
            )


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabularies(padded: str, tmp_path: Path) -> None:
    models: dict[str, Callable[..., PreTrainedModel]] = {"student": student_model, "teacher": teacher_model}
    student, teacher = (make(vocab_size=VOCAB + 8 * (name == padded)) for name, make in models.items())
    data, _, rows = KINDS["answers"]
    expected = dense_mean(student, teacher, rows, VOCAB)
    trainer = make_trainer(tmp_path, Dataset.from_list(data), student, teacher)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("short", ["student", "teacher"])
def test_a_vocabulary_smaller_than_the_tokenizer(short: str, tmp_path: Path) -> None:
    models = {"student": student_model(), "teacher": teacher_model()}
    models[short] = {"student": student_model, "teacher": teacher_model}[short](vocab_size=VOCAB - 1)
    with pytest.raises(ValueError, match=f"The {short} has vocab_size 63 but the tokenizer has 64 tokens"):
        make_trainer(tmp_path, **models)


def test_init_kwargs_of_a_loaded_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_model_init_kwargs only applies"):
        make_trainer(tmp_path, teacher_model_init_kwargs={"dtype": "float32"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mse"}, r"objective='mse' is unknown; choose one of \['forward_kl'"),
        ({"cross_entropy_weight": 1.5}, r"cross_entropy_weight=1.5 is outside \[0, 1\]"),
        ({"cross_entropy_weight": -0.1}, "cross_entropy_weight=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be greater than 0"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"lmbda": -0.5}, "lmbda"),
        ({"beta": 2.0}, "beta"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False makes the gradient depend"),
        ({"seq_kd": True}, "seq_kd=True is not a stepwise objective"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


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


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user", "w1")], "no assistant turn"),
        (
            [turn("user", "w1"), turn("assistant", "w2"), turn("user", "w3"), turn("assistant", "w4")],
            "renders turn 1 differently",
        ),
    ],
)
def test_conversations_that_cannot_be_supervised(messages: list[dict[str, str]], message: str) -> None:
    tokenizer = tiny_tokenizer()
    if "differently" in message:  # only the last turn ends with its marker
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + (' <end> ' if loop.last else ' ') }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
        )
    with pytest.raises(ValueError, match=message):
        tokenize_turns(messages, tokenizer)


def test_save_anchor(tmp_path: Path) -> None:
    student = student_model()
    student.generation_config.max_new_tokens = 77
    trainer = make_trainer(tmp_path, student=student, gradient_checkpointing=True)
    trainer.train()
    trainer.save_anchor(tmp_path / "anchor")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    for name, parameter in student_model().named_parameters():
        assert torch.equal(saved.get_parameter(name), trainer.model.get_parameter(name)), name
        assert not torch.equal(saved.get_parameter(name), parameter) or "norm" not in name
    assert torch.equal(logits(saved), logits(trainer.model))
    assert saved.config.use_cache and saved.generation_config.max_new_tokens == 77
    assert AutoTokenizer.from_pretrained(tmp_path / "anchor").get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_merged(tied: bool, tmp_path: Path) -> None:
    student = student_model(tie_word_embeddings=tied)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    start = logits(student_model(tie_word_embeddings=tied))
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj", "down_proj"], lora_dropout=0.0)
    trainer = make_trainer(tmp_path, student=student, peft_config=lora, max_steps=3)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    trainer.train()
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if name not in trainable
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())

    trainer.save_anchor(tmp_path / "anchor")
    assert not list((tmp_path / "anchor").glob("adapter*"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    assert type(saved) is type(student)
    assert {name for name, _ in saved.named_parameters()} == before.keys()
    trainer.model.eval()
    expected = logits(trainer.model)
    torch.testing.assert_close(logits(saved), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, start, rtol=1e-2, atol=1e-2)


# The student's own samples.

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
    drawn = samples(student_model(), prompts, max_new_tokens=6, temperature=temperature, seed=f"{trainer.args.seed} 0")
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
