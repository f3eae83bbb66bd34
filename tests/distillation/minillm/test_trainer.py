"""The trainer: its loss by hand, splits, learning, resuming, adapters and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers import trainer as trainer_module

from cbd_hf import MiniLLMConfig, MiniLLMTrainer, StepwiseDistillationConfig
from cbd_hf.distillation.guards import LossError, LossGuard
from cbd_hf.distillation.minillm.rollouts import CachedDecoder, sample_mixture
from cbd_hf.distillation.minillm.trainer import ROLLOUTS

from ...distributed.gradient_worker import relative_difference
from ...distributed.launching import launch
from ...models import answers_dataset, tiny_tokenizer
from .helpers import (
    gradient,
    make_material,
    make_trainer,
    save_trained,
    student_model,
    teacher_model,
    text_dataset,
)


@pytest.mark.parametrize("text", [False, True])
def test_micro_batches_and_accumulation(text: bool) -> None:
    whole = gradient(8, 1, text=text)
    assert sum(float(g.norm()) for g in whole["gradient"].values()) > 1e-3
    for micro_batch, accumulation in ((4, 2), (1, 8)):
        split = gradient(micro_batch, accumulation, text=text)
        assert split["rollouts"] == whole["rollouts"]
        assert relative_difference(whole["gradient"], split["gradient"]) < 1e-5
        for name in ("loss", "divergence", "policy_loss", "clipped"):
            assert split["log"][name] == pytest.approx(whole["log"][name], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_two_processes(config: str, tmp_path: Path) -> None:
    """Sampled and trained on two processes, the teacher sharded where the student is, as on one."""
    make_material(tmp_path)
    save_trained(str(tmp_path), str(tmp_path / "one"), 8, 1)
    options = {"material": tmp_path, "output": tmp_path / "two", "micro_batch": 2, "accumulation": 2}
    program = [f"--{name}={value}" for name, value in options.items()]
    launch(config, "-m", "tests.distillation.minillm.helpers", *program)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "student" / "model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


def by_hand(trainer: MiniLLMTrainer, rows: list[int], **weights: float) -> float:
    """The loss of a step from whole logits, before any training."""
    student, teacher, temperature = student_model(), teacher_model(), trainer.args.temperature
    total, tokens = 0.0, 0
    for row in rows:
        sample = trainer._rollouts[row]
        ids = torch.cat([sample.prompt, sample.tokens])
        start = len(sample.prompt) - 1
        with torch.no_grad():
            q, p = (
                F.log_softmax(model(input_ids=ids[None]).logits[0, start:-1] / temperature, -1)
                for model in (student, teacher)
            )
        at = sample.tokens[:, None]
        drawn = ((1 - trainer.args.teacher_mix) * q.exp() + trainer.args.teacher_mix * p.exp()).gather(-1, at)[:, 0]
        ratio = q.gather(-1, at)[:, 0].exp() / drawn
        gain = torch.minimum(sample.advantages * ratio, sample.advantages * ratio.clamp(0.8, 1.2))
        total += weights["policy"] * -float(gain.sum())
        total += weights["single_step"] * float((q.exp() * (q - p)).sum())
        tokens += len(sample.tokens)
        torch.testing.assert_close(sample.student, q.gather(-1, at)[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample.teacher, p.gather(-1, at)[:, 0], rtol=1e-4, atol=1e-4)
    return total / tokens


@pytest.mark.parametrize(
    ("policy", "single_step", "temperature"), [(1.0, 1.0, 1.0), (0.5, 2.0, 1.7), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)]
)
def test_the_first_loss(policy: float, single_step: float, temperature: float, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        policy_weight=policy,
        single_step_weight=single_step,
        temperature=temperature,
        sort_steps_by_length=False,
    )
    trainer.train()
    expected = by_hand(trainer, trainer._schedule.step_rows(0), policy=policy, single_step=single_step)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_text_term(tmp_path: Path) -> None:
    """The cross-entropy per token of the text's rows of the first step."""
    with_text = make_trainer(tmp_path, text_dataset=text_dataset(4), lm_coef=0.5)
    without = make_trainer(tmp_path)
    for trainer in (with_text, without):
        trainer.train()
    total, tokens = 0.0, 0
    for row in text_dataset(4)["text"]:
        ids = torch.tensor([tiny_tokenizer()(row)["input_ids"] + [1]])
        with torch.no_grad():
            logits = student_model()(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    log = with_text.state.log_history[0]
    assert log["text_loss"] == pytest.approx(total / tokens, rel=1e-4)
    expected = without.state.log_history[0]["loss"] + 0.5 * total / tokens
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def own_divergence(student: PreTrainedModel) -> float:
    """Reverse KL divergence per token of 256 samples from the student, exact at every position."""
    student.eval()
    prompts = [[6 + row % 50, 7 + row % 40] for row in range(256)]
    found = sample_mixture(
        [lambda ids, mask: CachedDecoder(student, student, ids, mask)],
        prompts,
        [str(row) for row in range(256)],
        teacher_mix=0.0,
        max_new_tokens=6,
        temperature=1.0,
        pad_token_id=1,
        stops=set(),
        seed="own",
        device=torch.device("cpu"),
    )
    ids = torch.tensor([prompt + sample.tokens.tolist() for prompt, sample in zip(prompts, found, strict=True)])
    q, p = (F.log_softmax(model(input_ids=ids).logits[:, 1:-1], -1) for model in (student, teacher_model()))
    return float((q.exp() * (q - p)).sum(-1).mean())


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"max_steps": 24}, 0.88), ({"max_steps": 32, "single_step_weight": 0.0, "learning_rate": 5e-3}, 0.95)],
    ids=["both terms", "policy term"],
)
def test_it_learns(options: dict[str, Any], limit: float, tmp_path: Path) -> None:
    """The student's own samples come nearer to the teacher's, also by the policy gradient alone; the teacher stays."""
    before = own_divergence(student_model())
    batches = {"per_device_train_batch_size": 32, "rollout_batch_size": 64, "dataset": answers_dataset(64)}
    trainer = make_trainer(tmp_path, lr_scheduler_type="constant", **batches, **options)
    trainer.train()
    assert own_divergence(trainer.model) < limit * before
    log = trainer.state.log_history
    assert sum("reward" in entry for entry in log) == options["max_steps"] / 4  # with each rollout batch
    assert max(entry["sampling_gap"] for entry in log if "sampling_gap" in entry) < 1e-4
    teacher = trainer._teacher_base()
    for name, parameter in teacher_model().named_parameters():
        assert torch.equal(teacher.get_parameter(name), parameter), name


@pytest.mark.parametrize("step", [4, 6])
def test_resuming(step: int, tmp_path: Path) -> None:
    """Between two rollout batches, and in the middle of one, whose samples the old weights had drawn."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": step}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)
    if step == 6:
        changed = make_trainer(tmp_path / "changed", **options | {"teacher_mix": 0.0})
        with pytest.raises(ValueError, match=r"other options: teacher_mix=0.2 \(now 0.0\)"):
            changed.train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / ROLLOUTS).unlink()
        with pytest.raises(ValueError, match="lacks cbd_rollouts.safetensors"):
            make_trainer(tmp_path / "lost", **options).train(resume_from_checkpoint=str(checkpoint))


def test_samples_are_saved_before_older_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def rotate(*args: Any, **options: Any) -> None:
        found.append(sorted(path.parent.name for path in tmp_path.glob(f"checkpoint-*/{ROLLOUTS}")))

    monkeypatch.setattr(trainer_module, "rotate_checkpoints", rotate)
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert found == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]


def test_the_guard_looks_at_the_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(LossGuard, "check", lambda self, loss, step, example_ids: seen.append(loss))
    trainer = make_trainer(tmp_path, max_steps=3, policy_weight=5.0, gradient_accumulation_steps=2)
    trainer.train()
    assert seen == pytest.approx([log["divergence"] for log in trainer.state.log_history if "divergence" in log])
    monkeypatch.undo()
    trainer = make_trainer(tmp_path / "bad", policy_weight=float("inf"), save_strategy="no")
    with pytest.raises(LossError, match="Step 1: the loss is (nan|inf|-inf)"):
        trainer.train()


def test_the_model_card_names_the_paper(tmp_path: Path) -> None:
    make_trainer(tmp_path).create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "2306.08543" in text and "gu2024minillm" in text and "2306.13649" not in text


def test_adapters_and_evaluation(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(tmp_path, peft_config=lora, eval_dataset=answers_dataset(seed=1), max_steps=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    trainer.save_anchor(tmp_path / "anchor")
    assert (tmp_path / "anchor" / "model.safetensors").is_file()


def test_padded_vocabularies(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=student_model(vocab_size=80), teacher=teacher_model(vocab_size=72))
    trainer.train()
    assert max(int(sample.tokens.max()) for sample in trainer._rollouts.values()) < 72


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_mix": 1.0}, r"teacher_mix=1.0 is outside \[0, 1\)"),
        ({"cliprange": 0.0}, r"cliprange=0.0 is outside \(0, 1\)"),
        ({"gamma": 1.5}, r"gamma=1.5 is outside \(0, 1\]"),
        ({"reward_scale": 0.0}, "reward_scale=0.0 must be greater than 0"),
        ({"reward_clip": -1.0}, "reward_clip=-1.0 must be at least 0"),
        ({"inner_epochs": 0}, "inner_epochs=0 must be at least 1"),
        ({"lmbda": 0.5}, "lmbda=0.5 must be 1 here"),
        ({"objective": "forward_kl"}, "objective='forward_kl'.*belong to the stepwise trainer"),
        ({"cross_entropy_weight": 0.5}, "cross_entropy_weight=0.5.*set lm_coef"),
        ({"teacher_cache": "somewhere"}, "teacher_cache knows nothing of new samples"),
        ({"policy_weight": 0.0, "single_step_weight": 0.0}, "leave nothing to learn"),
        ({"lm_kd_ratio": 2.0}, r"lm_kd_ratio=2.0 is outside \[0, 1\]"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        MiniLLMConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_batch_size": 6}, "rollout_batch_size=6 must be a multiple of the 4 rows"),
        ({"rollout_batch_size": 64}, "needs as many prompts, but the dataset has 16"),
        ({"lm_coef": 1.0}, "lm_coef=1.0 and text_dataset=none do not go together"),
        ({"text_dataset": text_dataset()}, "lm_coef=0.0 and text_dataset=given do not go together"),
        ({"dataset": answers_dataset().to_iterable_dataset()}, "not an iterable one"),
        ({"dataset": Dataset.from_list([{"text": "w1 w2"}] * 16)}, "the dataset is plain text"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_config_of_the_other_trainer(tmp_path: Path) -> None:
    args: Any = StepwiseDistillationConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="args is a StepwiseDistillationConfig; give a MiniLLMConfig"):
        MiniLLMTrainer(student_model(), teacher_model(), args, train_dataset=answers_dataset())
