"""Stepwise distillation: the teacher of each stage is the next larger model of the chain (paper Sec. 3.1, Eq. 1)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cbd_hf._loading import plain_loading
from cbd_hf._trl import (
    DataCollatorForLanguageModeling,
    GKDTrainer,
    disable_dropout_in_model,
    unwrap_model_for_generation,
)
from cbd_hf.distillation.columns import IGNORED, dataset_kind, supervise_turns
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.objectives import distillation_loss
from cbd_hf.distillation.on_policy import draw_on_policy, on_policy_examples, prompt_of, sample_completions
from cbd_hf.distillation.teacher import check_same_vocabulary, find_tokenizer, load_teacher, prepare_teacher


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import EvalPrediction, TrainerCallback

AnyDataset: TypeAlias = Dataset | IterableDataset


class StepwiseDistillationTrainer(GKDTrainer):
    """
    Distils a teacher into a student of the same vocabulary.

    A `GKDTrainer` whose gradient is that of one global batch, however it is split over micro-batches, accumulation
    steps and processes: the loss is the sum over supervised tokens divided by their number in the global batch, and
    with `lmbda` > 0 the student's samples are drawn before that number is counted. Datasets with `text`, `prompt` and
    `completion`, `messages` (every assistant turn is supervised), or `input_ids` and `labels` are prepared like
    `SFTTrainer` does. Only the columns of the batch that hold a supervised position are projected to the vocabulary.

    Args:
        model (`PreTrainedModel` or `str`): the student; a path or Hub id is loaded.
        teacher_model (`PreTrainedModel` or `str`, *optional*): defaults to `args.teacher_model_name_or_path`.
        args ([`StepwiseDistillationConfig`], *optional*): options.
        data_collator (`Callable`, *optional*): by default right-padding.
        train_dataset (`Dataset` or `IterableDataset`): see above.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): likewise.
        processing_class (`PreTrainedTokenizerBase`, *optional*): by default loaded from where the student was.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the teacher's tokenizer, for the check that
            it is the student's; by default loaded from where the teacher was, if there is one.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics, formatting_func: as in `SFTTrainer`.
        peft_config (`PeftConfig`, *optional*): train an adapter; [`save_anchor`] merges it.

    Raises:
        ValueError: no teacher, a teacher of another tokenizer, or a dataset without the needed columns.
    """

    args: StepwiseDistillationConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase

    _tag_names = ["trl", "gkd", "cbd"]
    _name = "Stepwise Distillation"
    # The loss is already divided by the tokens of the whole accumulated batch.
    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: StepwiseDistillationConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        args = StepwiseDistillationConfig(output_dir="stepwise-distillation") if args is None else args
        teacher_model = teacher_model or args.teacher_model_name_or_path
        if teacher_model is None:
            raise ValueError("No teacher: pass teacher_model, or set teacher_model_name_or_path in the config.")
        if train_dataset is None:
            raise ValueError("train_dataset is required.")
        self._check_datasets(args, train_dataset, eval_dataset, formatting_func)
        student_path = model if isinstance(model, str) else model.config._name_or_path
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(student_path, trust_remote_code=args.trust_remote_code)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if args.lmbda > 0 and data_collator is None:
            # Samples replace whole examples, which a padding-free collator could not take apart.
            data_collator = DataCollatorForLanguageModeling(
                pad_token_id=processing_class.pad_token_id,
                pad_to_multiple_of=args.pad_to_multiple_of,  # type: ignore[arg-type]
            )
        # Not GKDTrainer's own __init__: it skips the dataset's preparation, refuses padded vocabularies and reads
        # temperature as a sampling option only.
        super(GKDTrainer, self).__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        if isinstance(teacher_model, str):
            teacher_path: str | None = teacher_model
            teacher_model = load_teacher(teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code)
        else:
            teacher_path = teacher_model.config._name_or_path
            if args.teacher_model_init_kwargs:
                raise ValueError("teacher_model_init_kwargs only applies to a teacher given by path or Hub id.")
        teacher_processing_class = teacher_processing_class or find_tokenizer(teacher_path)
        check_same_vocabulary(self.model, teacher_model, processing_class, teacher_processing_class)
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.teacher_model = prepare_teacher(teacher_model, self.accelerator)
        self.lmbda = args.lmbda
        self.beta = args.beta
        self.temperature = args.temperature
        student = self.accelerator.unwrap_model(self.model)
        self._keeps_columns = "logits_to_keep" in inspect.signature(type(_base_model(student)).forward).parameters

    @staticmethod
    def _check_datasets(
        args: StepwiseDistillationConfig,
        train_dataset: AnyDataset,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None,
        formatting_func: Callable[[dict], str] | None,
    ) -> None:
        if formatting_func is not None:
            return  # makes the text column itself
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (train_dataset, *evaluated):
            if dataset is None:
                continue
            kind = dataset_kind(list(dataset.column_names or next(iter(dataset))), args.dataset_text_field)
            if kind == "text" and args.lmbda > 0:
                raise ValueError(
                    f"lmbda={args.lmbda} samples answers to prompts, but the dataset is plain text. Use one with "
                    "'prompt' and 'completion' or 'messages', or set lmbda=0."
                )
        if args.lmbda > 0 and args.packing:
            raise ValueError("packing joins several prompts in one row, so it cannot be used with lmbda > 0.")

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> AnyDataset:
        columns = list(dataset.column_names or next(iter(dataset)))
        kind = "text" if formatting_func else dataset_kind(columns, args.dataset_text_field)
        # SFTTrainer would supervise the user's turns too, or need {% generation %} markers in the template.
        if kind == "messages" and args.completion_only_loss is not False and not args.assistant_only_loss:
            options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            with args.main_process_first(desc="tokenizing conversations"):
                dataset = supervise_turns(dataset, processing_class, **options)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """The micro-batches of one step and the number of supervised tokens in all of them, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if draw_on_policy(self.lmbda, self.args.seed, self.state.global_step):
            batches = self._sample_batches(batches)
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            tokens = self.accelerator.reduce(tokens, "sum")
        tokens = tokens / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())  # ranks with the same batch
        return batches, tokens.clamp(min=1)

    def _sample_batches(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """The same micro-batches with each answer replaced by one that the student sampled."""
        prompts = [
            [
                prompt_of(row[mask.bool()].tolist(), labels[mask.bool()].tolist(), self.args.max_prompt_length)
                for row, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
            ]
            for batch in batches
        ]
        if any(not prompt for rows in prompts for prompt in rows):
            raise ValueError("lmbda > 0 needs a prompt in every example, but one has none before its answer.")
        eos = self.model.generation_config.eos_token_id
        options = {
            "max_new_tokens": self.args.max_new_tokens,
            "temperature": self.temperature,
            "pad_token_id": self.processing_class.pad_token_id,
            "eos_token_id": self.processing_class.eos_token_id if eos is None else eos,
            "seed": f"{self.args.seed} {self.state.global_step}",
        }
        with (
            torch.no_grad(),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as student,
        ):
            student.eval()
            sampled = [
                self.data_collator(on_policy_examples(rows, sample_completions(student, rows, **options)))
                for rows in prompts
            ]
            student.train()
        return [self._prepare_inputs(batch) for batch in sampled]

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch. Not GKDTrainer's, which would sample again, after the tokens have been counted."""
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Sum of the objective over this micro-batch's supervised tokens / their number in the global batch.

        With several processes the loss is multiplied by their number, since their gradients are averaged.
        """
        mode = "train" if self.model.training else "eval"
        labels = inputs["labels"][:, 1:]
        forward = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        supervised = labels != IGNORED
        if self._keeps_columns and not return_outputs:
            columns = supervised.any(dim=0).nonzero().flatten()
            columns = columns if len(columns) else columns.new_zeros(1)
            forward["logits_to_keep"] = columns
        else:
            columns = torch.arange(labels.shape[1], device=labels.device)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_model(**forward).logits
        outputs = model(**forward)
        chosen = supervised[:, columns]
        here = slice(None, len(columns))  # full logits have one position more, which predicts nothing
        total, divergence = distillation_loss(
            outputs.logits[:, here][chosen],
            teacher_logits[:, here][chosen],
            labels[:, columns][chosen],
            objective=self.args.objective,
            beta=self.beta,
            temperature=self.temperature,
            cross_entropy_weight=self.args.cross_entropy_weight,
        )
        tokens = supervised.sum()
        if num_items_in_batch is None:
            loss = total / tokens.clamp(min=1)
        else:
            loss = total / num_items_in_batch * (self.accelerator.num_processes // self.get_tp_size())
        self._count(mode, inputs, divergence, tokens)
        return (loss, outputs) if return_outputs else loss

    def _count(self, mode: str, inputs: dict[str, Any], divergence: torch.Tensor, tokens: torch.Tensor) -> None:
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        seen = torch.as_tensor(seen, device=divergence.device)
        divergence, tokens, seen = self.accelerator.reduce(torch.stack([divergence, tokens, seen]).float(), "sum")
        if self.args.cross_entropy_weight < 1:
            self._metrics[mode]["divergence"].append((divergence / tokens.clamp(min=1)).item())
        if mode == "train":
            self._total_train_tokens += int(seen)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def save_anchor(self, output_dir: str | Path) -> None:
        """
        Save the student as a plain checkpoint with its tokenizer; an adapter is merged. Call it on every process.

        The weights are gathered into a fresh model: the trained one's forward is patched by TRL, so that copies of it
        would still run this model's weights.
        """
        student = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            config = type(student.config).from_dict(student.config.to_dict() | {"use_cache": True})
            with plain_loading():
                base: Any = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
            base.generation_config = student.generation_config
            if hasattr(student, "peft_config"):
                from peft import get_peft_model

                merged: Any = get_peft_model(base, student.active_peft_config, autocast_adapter_dtype=False)
                merged.load_state_dict(state)
                base = merged.merge_and_unload()
            else:
                loaded = base.load_state_dict(state, strict=False)  # a tied head may be missing, nothing else
                missing = {name for name, _ in base.named_parameters()} & set(loaded.missing_keys)
                if missing or loaded.unexpected_keys:
                    raise RuntimeError(f"Gathering the student lost {missing} and added {loaded.unexpected_keys}.")
            base.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)
        self.accelerator.wait_for_everyone()


def _base_model(model: Any) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["StepwiseDistillationTrainer"]
