"""On-policy distillation by policy gradient: reverse KL of whole samples (MiniLLM, the paper's second phase)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from cbd_hf._trl import pad, unwrap_model_for_generation
from cbd_hf.data.columns import EXAMPLE_ID, IGNORED
from cbd_hf.distillation.heads import unwrapped
from cbd_hf.distillation.minillm.advantages import mixture_log_probs
from cbd_hf.distillation.minillm.config import MiniLLMConfig
from cbd_hf.distillation.minillm.log_probs import selected_log_probs
from cbd_hf.distillation.minillm.loss import PolicyLoss, PolicyTargets
from cbd_hf.distillation.minillm.rollouts import (
    CachedDecoder,
    Completion,
    Rollout,
    load_rollouts,
    sample_mixture,
    save_rollouts,
    with_advantages,
)
from cbd_hf.distillation.minillm.schedule import RolloutSchedule, cycled_rows
from cbd_hf.distillation.on_policy import prompt_of
from cbd_hf.distillation.placement import choose_placement
from cbd_hf.distillation.predictions import DensePredictions
from cbd_hf.distillation.sources import LiveTeacher
from cbd_hf.distillation.student import LossParts
from cbd_hf.distillation.trainer import StepwiseDistillationTrainer


ROLLOUTS = "cbd_rollouts.safetensors"  # of a checkpoint, in the middle of a rollout batch
_MIXTURE, _ADVANTAGES = "rollout_mixture", "rollout_advantages"
_TEXT, _TEXT_LABELS = "text_input_ids", "text_labels"
_SETTINGS = ("seed", "data_seed", "rollout_batch_size", "inner_epochs", "teacher_mix", "temperature", "max_new_tokens")


class MiniLLMTrainer(StepwiseDistillationTrainer):
    """
    Distils by policy gradient on samples from a mixture of student and teacher (arXiv 2306.08543).

    `rollout_batch_size` prompts are answered at once, and the answers trained on `inner_epochs` times. The loss is the
    clipped policy term plus the reverse KL divergence over the whole vocabulary at every sampled token, summed over
    the samples' tokens of the global batch and divided by their number, however that batch is split; plus `lm_coef`
    times the loss per token of a text. `max_steps` counts optimizer steps, an epoch is `inner_epochs` times the
    prompts. Evaluation is that of the stepwise trainer: reverse KL divergence on the dataset's own answers.

    Args:
        model, teacher_model, args, train_dataset and all others: as in [`StepwiseDistillationTrainer`]; the dataset
            has prompts with answers, of which only the prompts are used, and is not an iterable one.
        args ([`MiniLLMConfig`], *optional*): options.
        text_dataset (`Dataset`, *optional*): trained on with weight `lm_coef`: columns as in
            [`StepwiseDistillationTrainer`], plain text among them.

    Raises:
        ValueError: as [`StepwiseDistillationTrainer`]; fewer prompts than `rollout_batch_size`, or that is no multiple
            of an optimizer step's rows; `lm_coef` without text or text without it; a teacher placed where it cannot be
            sampled from.
    """

    args: MiniLLMConfig

    _tag_names = ["trl", "minillm", "cbd"]
    _name = "MiniLLM"
    _paper = {
        "title": "MiniLLM: Knowledge Distillation of Large Language Models",
        "id": "2306.08543",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{gu2024minillm,
                title        = {{MiniLLM: Knowledge Distillation of Large Language Models}},
                author       = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
                year         = 2024,
                booktitle    = {The Twelfth International Conference on Learning Representations, {ICLR} 2024},
                url          = {https://openreview.net/forum?id=5h0qf7IBZZ},
            }"""),
    }

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: MiniLLMConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        *positional: Any,
        text_dataset: Dataset | None = None,
        **options: Any,
    ) -> None:
        args = MiniLLMConfig(output_dir="minillm") if args is None else args
        if not isinstance(args, MiniLLMConfig):
            raise ValueError(f"args is a {type(args).__name__}; give a MiniLLMConfig.")
        for dataset in (train_dataset, text_dataset):
            if isinstance(dataset, IterableDataset):
                raise ValueError("Rollout batches need a dataset whose rows can be looked up, not an iterable one.")
        if bool(args.lm_coef) != (text_dataset is not None):
            raise ValueError(
                f"lm_coef={args.lm_coef} and text_dataset={'none' if text_dataset is None else 'given'} do not go "
                "together: give both, or neither."
            )
        super().__init__(model, teacher_model, args, data_collator, train_dataset, *positional, **options)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("Tensor, context and sequence parallelism are not supported: use data parallelism.")
        self._teacher = self._check_teacher()
        student = self.accelerator.unwrap_model(self.model)
        vocabularies = (student.config, self._teacher_base().config)
        self._vocab = min(config.get_text_config().vocab_size for config in vocabularies)
        self._policy_loss = PolicyLoss(
            student,
            args.temperature,
            self._vocab,
            args.cliprange,
            args.policy_weight,
            args.single_step_weight,
            args.lm_kd_ratio,
        )
        self._text: Any = None
        if text_dataset is not None:
            self._text = self._prepare_dataset(text_dataset, self.processing_class, args, False, None, "text")
        self._schedule = self._make_schedule()
        self._rollouts: dict[int, Rollout] = {}
        self._drawn: int | None = None  # which rollout batch they are
        self._policy_sums: torch.Tensor | None = None
        self._text_tokens: torch.Tensor | None = None  # of the step, on all processes

    def _check_teacher(self) -> LiveTeacher:
        args, teacher = self.args, self.teacher
        assert isinstance(teacher, LiveTeacher)  # a cache is refused by the config
        placement = choose_placement(args.teacher_placement, self.accelerator)
        if args.teacher_mix and placement == "offload" and self.accelerator.device.type != "cpu":
            raise ValueError(
                f"teacher_mix={args.teacher_mix} runs the teacher once for every token of a sample, and "
                "teacher_placement='offload' would move all its weights to the device each time: choose 'replicate' "
                "or 'shard', or teacher_mix=0."
            )
        return teacher

    def _teacher_base(self) -> Any:
        return unwrapped(getattr(self._teacher.model, "module", self._teacher.model))

    def _make_schedule(self) -> RolloutSchedule:
        args, dataset = self.args, self.train_dataset
        return RolloutSchedule(
            len(dataset),  # type: ignore[arg-type]
            args.rollout_batch_size,
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.inner_epochs,
            args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self._schedule

    # Rollouts

    def _sample_batches(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """This process's micro-batches of the step. The loader's own say how many; the schedule says which."""
        args, step = self.args, self.state.global_step
        rollout = step // self._schedule.steps_per_rollout
        if rollout != self._drawn:
            self._rollouts, self._drawn = self._draw(rollout), rollout
        rows = self._schedule.step_rows(step)
        if args.sort_steps_by_length:
            rows.sort(key=lambda row: -len(self._rollouts[row].prompt) - len(self._rollouts[row].tokens))
        text: list[int] = []
        if self._text is not None:
            text = cycled_rows(len(self._text), step * len(rows), len(rows), self._schedule.seed)
        made = []
        for number in range(len(batches)):
            start = (number * args.world_size + args.process_index) * args.train_batch_size
            mine = slice(start, start + args.train_batch_size)
            made.append(self._batch([self._rollouts[row] for row in rows[mine]]) | self._text_batch(text[mine]))
        if self._text is not None:
            tokens = torch.stack([(batch[_TEXT_LABELS][..., 1:] != IGNORED).sum() for batch in made]).sum()
            self._text_tokens = self.accelerator.reduce(tokens.to(self.accelerator.device), "sum").clamp(min=1)
        return [self._prepare_inputs(batch) for batch in made]

    def _batch(self, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
        """Samples padded on the right, with what each of their tokens is trained on."""
        ids = [torch.cat([rollout.prompt, rollout.tokens]) for rollout in rollouts]
        labels = [torch.cat([torch.full_like(rollout.prompt, IGNORED), rollout.tokens]) for rollout in rollouts]
        return {
            "input_ids": self._padded(ids),
            "labels": pad(labels, padding_value=IGNORED, padding_side="right"),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right"),
            EXAMPLE_ID: torch.tensor([rollout.row for rollout in rollouts]),
            # Where the labels are, so that whoever splits a batch splits them alike.
            _MIXTURE: _at_labels(rollouts, "mixture"),
            _ADVANTAGES: _at_labels(rollouts, "advantages"),
        }

    def _text_batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        if self._text is None:
            return {}
        examples = [self._example(self._text, row) for row in rows]
        ids = self._padded([ids for ids, _ in examples])
        labels = pad([labels for _, labels in examples], padding_value=IGNORED, padding_side="right")
        # A text for each sample; of another number of axes, as it must not be cut to the samples' lengths.
        return {_TEXT: ids[:, None], _TEXT_LABELS: labels[:, None]}

    def _padded(self, ids: list[torch.Tensor]) -> torch.Tensor:
        return pad(ids, padding_value=self.processing_class.pad_token_id, padding_side="right")

    def _example(self, dataset: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels of a prepared row, as the collator makes them."""
        self._set_signature_columns_if_needed()
        known: set[str] = set(self._signature_columns or ())
        batch = self.data_collator([{name: value for name, value in dataset[row].items() if name in known}])
        mask = batch["attention_mask"][0].bool()
        return batch["input_ids"][0][mask], batch["labels"][0][mask]

    def _draw(self, rollout: int) -> dict[int, Rollout]:
        """The samples of a rollout batch, on every process all of them."""
        args = self.args
        rows = self._schedule.rollout_rows(rollout)
        mine = rows[args.process_index :: args.world_size]
        size = args.generation_batch_size or args.train_batch_size * args.gradient_accumulation_steps
        drawn: list[Rollout] = []
        gaps: list[torch.Tensor] = []
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            prompts = [self._prompt(row) for row in part]
            completions = self._complete(part, prompts, f"{args.seed} {rollout}")
            scored = self._score(part, prompts, completions)
            drawn += scored
            pairs = zip(completions, scored, strict=True)
            gaps += [(completion.mixture - result.mixture).abs() for completion, result in pairs]
        found = {sample.row: sample for sample in gather_object(drawn)}
        everything = with_advantages(
            [found[row] for row in rows],
            reward_scale=args.reward_scale,
            reward_clip=args.reward_clip,
            gamma=args.gamma,
            length_normalised=args.length_normalised,
            whiten=args.whiten,
        )
        tokens = sum(len(sample.tokens) for sample in everything)
        reward = sum(float((sample.teacher - sample.student).sum()) for sample in everything)
        metrics = self._metrics["train"]
        metrics["reward"].append(reward / tokens)
        metrics["completion_length"].append(tokens / len(everything))
        metrics["sampling_gap"].append(float(torch.cat(gaps).mean()))
        return {sample.row: sample for sample in everything}

    def _prompt(self, row: int) -> list[int]:
        ids, labels = self._example(self.train_dataset, row)
        prompt = prompt_of(ids.tolist(), labels.tolist(), self.args.max_prompt_length)
        if not prompt:
            raise ValueError(f"Example {row} has no prompt before its answer, and samples continue a prompt.")
        return prompt

    def _complete(self, rows: list[int], prompts: list[list[int]], seed: str) -> list[Completion]:
        args, teacher = self.args, self._teacher
        eos = self.model.generation_config.eos_token_id
        eos = self.processing_class.eos_token_id if eos is None else eos
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as student,
        ):
            student.eval()
            base = unwrapped(student)
            completions = sample_mixture(
                (
                    lambda ids, mask: CachedDecoder(base, base, ids, mask),
                    lambda ids, mask: CachedDecoder(teacher.model, self._teacher_base(), ids, mask),
                ),
                prompts,
                [f"{row} {prompt}" for row, prompt in zip(rows, prompts, strict=True)],
                teacher_mix=args.teacher_mix,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                pad_token_id=self.processing_class.pad_token_id,
                stops=set(eos if isinstance(eos, list) else [eos]) - {None},
                seed=seed,
                device=self.accelerator.device,
                vocab=self._vocab,
                unfinished=self._on_any_process,
            )
            student.train()
        return completions

    def _on_any_process(self, flag: bool) -> bool:
        if self.args.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)

    @torch.no_grad()
    def _score(self, rows: list[int], prompts: list[list[int]], completions: list[Completion]) -> list[Rollout]:
        """
        Log-probabilities as the training's own forward gives them: with reduced precision those of the token by token
        sampling are a little off.
        """
        empty = torch.zeros(0)
        samples = [
            Rollout(row, torch.tensor(prompt), completion.tokens, empty, empty, empty, empty)
            for row, prompt, completion in zip(rows, prompts, completions, strict=True)
        ]
        batch = self._prepare_inputs(self._batch(samples))
        inputs, labels = {"input_ids": batch["input_ids"]}, batch["labels"]
        chosen, targets = _supervised(labels)
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            predictions = self.teacher.predict(inputs, chosen, {})
            assert isinstance(predictions, DensePredictions)
            with predictions.open_head() as head:
                teacher = selected_log_probs(predictions.hidden, head, targets, self.temperature, self._vocab)
            student = self._policy_loss.score(self.model_wrapped, inputs, chosen, targets)
        self.model.train(was_training)
        mixture = mixture_log_probs(student, teacher, self.args.teacher_mix)
        lengths = [len(completion.tokens) for completion in completions]
        columns = [values.cpu().split(lengths) for values in (student, teacher, mixture)]
        return [
            Rollout(sample.row, sample.prompt, sample.tokens, own.clone(), other.clone(), mixed.clone(), empty)
            for sample, own, other, mixed in zip(samples, *columns, strict=True)
        ]

    # Loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Sum over this micro-batch's sampled tokens / their number in the global batch, plus `lm_coef` times the same of
        the text; of a batch that was not sampled, as in evaluation, the stepwise trainer's loss.
        """
        if _ADVANTAGES not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, labels = inputs["input_ids"], inputs["labels"]
        mixture, advantages = (inputs[name][:, 1:][labels[:, 1:] != IGNORED] for name in (_MIXTURE, _ADVANTAGES))
        seen, sampled = inputs["attention_mask"].sum(), len(advantages)
        if self._text is not None:
            ids = _stacked(ids, inputs[_TEXT][:, 0], self.processing_class.pad_token_id)
            labels = _stacked(labels, inputs[_TEXT_LABELS][:, 0], IGNORED)
        # Padding lies behind the last token, where no other looks under causal attention: no mask is needed.
        chosen, targets = _supervised(labels)
        with self.accelerator.autocast():
            predictions = self.teacher.predict({"input_ids": ids}, chosen, {})
            assert isinstance(predictions, DensePredictions)
            parts = self._policy_loss(
                model,
                {"input_ids": ids},
                chosen,
                PolicyTargets(targets, mixture, advantages, predictions),
            )
        processes = self.accelerator.num_processes
        tokens = sampled if num_items_in_batch is None else num_items_in_batch / processes
        loss = parts.total / tokens
        if self._text is not None:
            loss = loss + self.args.lm_coef * parts.text / (self._text_tokens / processes)
        self._count(LossParts(parts.total, parts.divergence, parts.total.new_zeros(())), sampled, seen)
        values = [parts.policy, parts.clipped, parts.text.detach()]
        counts = [torch.tensor(float(count)) for count in (sampled, len(targets) - sampled)]
        sums = torch.stack([value.to(self.accelerator.device, torch.float32) for value in (*values, *counts)])
        self._policy_sums = sums if self._policy_sums is None else self._policy_sums + sums
        if self.model.training:
            # The policy term has any sign and size: what explodes is the divergence.
            self._watch(torch.where(loss.detach().isfinite(), parts.divergence / tokens, loss.detach()))
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`StepwiseDistillationTrainer`], with the parts of the loss per token since the last log."""
        if self._policy_sums is not None and self.model.training:
            sums = self.accelerator.reduce(self._policy_sums, "sum").tolist()
            policy, clipped, text, tokens, text_tokens = sums
            self._policy_sums = None
            metrics = self._metrics["train"]
            metrics["policy_loss"] = [policy / max(tokens, 1)]
            metrics["clipped"] = [clipped / max(tokens, 1)]
            if self._text is not None:
                metrics["text_loss"] = [text / max(text_tokens, 1)]
        super().log(logs, start_time)

    # Checkpoints

    def _settings(self, rollout: int) -> dict[str, str]:
        return {"rollout": str(rollout)} | {name: str(getattr(self.args, name)) for name in _SETTINGS}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Here and not after _save_checkpoint, which ends with the removal of older checkpoints: one that is not yet
        # whole may be the only one then.
        if self.args.should_save and self._drawn is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_rollouts(Path(output_dir) / ROLLOUTS, list(self._rollouts.values()), self._settings(self._drawn))
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rollout, part = divmod(self.state.global_step, self._schedule.steps_per_rollout)
        if part:  # else the next step draws new ones
            rollouts = load_rollouts(Path(checkpoint) / ROLLOUTS, self._settings(rollout))
            self._rollouts, self._drawn = {sample.row: sample for sample in rollouts}, rollout


def _supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token is supervised, bool, shape (rows, length), and those tokens."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    chosen[:, :-1] = labels[:, 1:] != IGNORED
    return chosen, labels[:, 1:][chosen[:, :-1]]


def _at_labels(rollouts: list[Rollout], name: str) -> torch.Tensor:
    """Values of the samples' tokens in a matrix like that of the labels, 0 elsewhere."""
    rows = [torch.cat([torch.zeros(len(sample.prompt)), getattr(sample, name)]) for sample in rollouts]
    return pad(rows, padding_value=0, padding_side="right")


def _stacked(one: torch.Tensor, other: torch.Tensor, fill: Any) -> torch.Tensor:
    """Rows of two matrices below each other, padded on the right to the longer."""
    width = max(one.shape[1], other.shape[1])
    return torch.cat([F.pad(value, (0, width - value.shape[1]), value=fill) for value in (one, other)])


__all__ = ["ROLLOUTS", "MiniLLMTrainer"]
