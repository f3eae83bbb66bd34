"""Stepwise distillation: the teacher of each stage is the next larger model of the chain (paper Sec. 3.1, Eq. 1)."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_hf._trl import (
    DataCollatorForLanguageModeling,
    GKDTrainer,
    unwrap_model_for_generation,
)
from cbd_hf.data.columns import EXAMPLE_ID, IGNORED
from cbd_hf.distillation.accounting import AccountingTrainer
from cbd_hf.distillation.anchors import check_savable, write_anchor
from cbd_hf.distillation.batching import (
    TEACHER_PREFIX,
    TEACHER_ROW,
    DistillationCollator,
    fills_steps,
    is_blank,
    numbered,
    split_batch,
    step_sampler,
    supervised_positions,
    with_blank_row,
)
from cbd_hf.distillation.columns import check_datasets
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.on_policy import draw_on_policy, on_policy_examples, prompt_of, sample_completions
from cbd_hf.distillation.packing import check_packing
from cbd_hf.distillation.preparation import supervise_conversations
from cbd_hf.distillation.sources import (
    CachedTeacher,
    LiveTeacher,
    TeacherSource,
    compile_decoder_layers,
)
from cbd_hf.distillation.student import StudentLoss, add_projection, disable_dropout
from cbd_hf.distillation.teacher import (
    check_same_vocabulary,
    config_of,
    find_tokenizer,
    load_model,
    load_tokenizer,
    open_cache,
)
from cbd_hf.tokenization.limits import fixed_positions, within_positions


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import EvalPrediction, TrainerCallback

AnyDataset: TypeAlias = Dataset | IterableDataset


class StepwiseDistillationTrainer(AccountingTrainer):
    """
    Distils a teacher into a student of the same vocabulary.

    A `GKDTrainer` whose gradient is that of one global batch, however it is split over micro-batches, accumulation
    steps and processes: the loss is the sum over supervised tokens divided by their number in the global batch, and
    with `lmbda` > 0 the student's samples are drawn before that number is counted. Datasets with `text`, `prompt` and
    `completion`, `messages` (every assistant turn is supervised), or `input_ids` and `labels` are prepared like
    `SFTTrainer` does. Only supervised positions reach the heads of teacher and student, tile by tile.

    Args:
        model (`PreTrainedModel` or `str`): the student; a path or Hub id is loaded.
        teacher_model (`PreTrainedModel` or `str`, *optional*): defaults to `args.teacher_model_name_or_path`. Not
            needed with `args.teacher_cache`; if a directory is given as well, its weights must be the cached ones. A
            model is used itself, not a copy: it is frozen and moved, and converted if `args.teacher_dtype` is set.
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
        ValueError: no teacher, a teacher of another tokenizer, a cache that does not belong to the tokenizer, the
            options or the data, a dataset without the needed columns, or a student with quantized weights.
    """

    processing_class: PreTrainedTokenizerBase
    teacher: TeacherSource

    _tag_names = ["trl", "gkd", "cbd"]
    _name = "Stepwise Distillation"
    _paper = {
        "title": "Chain-based Distillation",
        "id": "2605.07783",
        "citation": textwrap.dedent("""\
            @article{chain_based_distillation_2026,
                title        = {{Chain-based Distillation}},
                year         = 2026,
                journal      = {arXiv preprint arXiv:2605.07783},
                url          = {https://arxiv.org/abs/2605.07783},
            }"""),
    }
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
        if teacher_model is None and not args.teacher_cache:
            raise ValueError(
                "No teacher: pass teacher_model, or set teacher_model_name_or_path or teacher_cache in the config."
            )
        if train_dataset is None:
            raise ValueError("train_dataset is required.")
        if formatting_func is None:  # else it makes the text column itself
            check_datasets(args, train_dataset, eval_dataset)
        student_path = model if isinstance(model, str) else model.config._name_or_path
        if processing_class is None:
            kwargs = args.model_init_kwargs if isinstance(model, str) else None
            processing_class = load_tokenizer(student_path, kwargs, args.trust_remote_code)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self._cache = self._open_cache(args, processing_class, teacher_model)
        if isinstance(model, str):
            model = load_model(model, args.model_init_kwargs, args.trust_remote_code, torch.float32)
        check_savable(model)
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"peft_config of type {type(peft_config).__name__} learns prompts, which cannot be merged into an "
                "anchor: use LoRA or another adapter of weights."
            )
        teacher_config = config_of(teacher_model, args)
        if data_collator is None:
            configs = (model.config,) if teacher_config is None else (model.config, teacher_config)
            args.max_length = within_positions(args.max_length, fixed_positions(*configs))
        if args.lmbda == 0 and data_collator is None:
            check_packing(args, student=model.config, teacher=teacher_config)
        peft_config = copy.deepcopy(peft_config)  # gets the projection
        layers = add_projection(model, args, teacher_config, self._cache, peft_config)
        self._pads_right = data_collator is None
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
        self._leave_router_loss_out()
        # Not in _prepare_dataset, which an option skips.
        self.train_dataset = numbered(self.train_dataset, self._cache)
        self.eval_dataset = numbered(self.eval_dataset, self._cache)
        self.data_collator = DistillationCollator(
            self.data_collator,
            self._cache,
            args.pad_to_multiple_of,  # type: ignore[arg-type]
            trim=args.lmbda == 0,
        )
        if args.disable_dropout:
            disable_dropout(self.model)
        if self._cache is None:
            assert teacher_model is not None
            self.teacher = self._live_teacher(teacher_model, teacher_processing_class, layers[1])
        else:
            vocab = self._cache.manifest.vocab_size
            self._check_vocabulary(vocab, None)
            self.teacher = CachedTeacher(vocab, layers=layers[1])
        self.lmbda = args.lmbda
        self.temperature = args.temperature
        student = self.accelerator.unwrap_model(self.model)
        self._student_loss = self._make_student_loss(student, layers[0])
        if args.compile_layers:
            compile_decoder_layers(student)
        self._tokens_per_pass = self._choose_tokens_per_pass()
        self._start_accounting()

    # What a bridge, whose teacher has other tokens, does in another way.

    def _open_cache(self, args: Any, tokenizer: PreTrainedTokenizerBase, teacher: Any) -> Any:
        return open_cache(args, tokenizer, teacher)

    def _check_vocabulary(self, teacher: PreTrainedModel | int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Raise unless the teacher (or a cache of so many tokens) goes with the student."""
        check_same_vocabulary(self.model, teacher, self.processing_class, tokenizer)

    def _make_student_loss(self, student: torch.nn.Module, layers: list[int]) -> StudentLoss:
        return StudentLoss(student, self.args.make_objective(), layers, self.args.hidden_loss_weight)

    def _predictions(self, inputs: dict[str, Any], chosen: torch.Tensor, cached: dict[str, torch.Tensor]) -> Any:
        """What the teacher says at the `chosen` positions; takes out of `inputs` what is not the student's."""
        return self.teacher.predict(inputs, chosen, cached)

    def _live_teacher(self, teacher: Any, tokenizer: PreTrainedTokenizerBase | None, layers: list[int]) -> LiveTeacher:
        args = self.args
        kwargs = args.teacher_model_init_kwargs
        if isinstance(teacher, str):
            path: str | None = teacher
            teacher = load_model(teacher, kwargs, args.trust_remote_code, args.teacher_torch_dtype())
        else:
            path = teacher.config._name_or_path
            if kwargs:
                raise ValueError("teacher_model_init_kwargs only applies to a teacher given by path or Hub id.")
            if args.teacher_dtype not in (None, "auto"):
                teacher = teacher.to(args.teacher_torch_dtype())
        tokenizer = tokenizer or find_tokenizer(path, kwargs, args.trust_remote_code)
        self._check_vocabulary(teacher, tokenizer)
        return LiveTeacher(teacher, self.accelerator, args.teacher_placement, layers, args.compile_layers)

    def _leave_router_loss_out(self) -> None:
        # TRL has switched it on for a mixture of experts, whose config then also says so where it is saved.
        text = self.model.config.get_text_config()
        if hasattr(text, "output_router_logits"):
            text.output_router_logits = False
        self.aux_loss_enabled = False

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> AnyDataset:
        dataset = supervise_conversations(dataset, processing_class, args, formatting_func)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, EXAMPLE_ID, TEACHER_ROW]))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not fills_steps(dataset, self.args):
            return super()._get_train_sampler(train_dataset)
        return step_sampler(dataset, self.args)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        if self._cache is not None and TEACHER_ROW not in (getattr(dataset, "column_names", None) or ()):
            dataset = numbered(dataset, self._cache)  # of evaluate() or predict(), which may be given others
        taken = self.args.train_batch_size * self.args.world_size  # at once
        uneven = self.args.world_size > 1 and not self.args.dataloader_drop_last
        if kwargs.get("is_training") and fills_steps(dataset, self.args) and uneven and len(dataset) % taken:
            dataset = with_blank_row(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """The micro-batches of one step and the number of supervised tokens in all of them, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if draw_on_policy(self.lmbda, self.args.seed, self.state.global_step):
            batches = self._sample_batches(batches)
        self._begin_step(batches)
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
            sampled = []
            for rows, batch in zip(prompts, batches, strict=True):
                ids = batch[EXAMPLE_ID].tolist() if EXAMPLE_ID in batch else [""] * len(rows)
                keys = [f"{row} {prompt}" for row, prompt in zip(ids, rows, strict=True)]
                completions = sample_completions(student, rows, keys=keys, **options)
                sampled.append(self.data_collator(on_policy_examples(rows, completions)))
                if EXAMPLE_ID in batch:
                    sampled[-1][EXAMPLE_ID] = batch[EXAMPLE_ID]
                if is_blank(batch):  # drawn all the same, since processes must generate equally often
                    sampled[-1]["labels"].fill_(IGNORED)
            student.train()
        return [self._prepare_inputs(batch) for batch in sampled]

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch. Not GKDTrainer's, which would sample again, after the tokens have been counted."""
        run = super(GKDTrainer, self).training_step
        if not self._tokens_per_pass:
            return run(model, inputs, num_items_in_batch)
        *first, last = split_batch(self._prepare_inputs(inputs), self._tokens_per_pass)
        gradients = self.accelerator.gradient_state
        synchronize, loss = gradients.sync_gradients, torch.zeros((), device=self.args.device)
        gradients._set_sync_gradients(False)
        for part in first:
            with self.accelerator.no_sync(model):
                loss += run(model, part, num_items_in_batch)
        gradients._set_sync_gradients(synchronize)
        return loss + run(model, last, num_items_in_batch)

    def _choose_tokens_per_pass(self) -> int:
        tokens = self.args.tokens_per_pass
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if tokens and sharded:
            # Processes would reduce their gradients different numbers of times.
            raise ValueError(
                f"tokens_per_pass={tokens} is not possible where gradients are sharded (DeepSpeed, FSDP): lower "
                "per_device_train_batch_size and raise gradient_accumulation_steps, which has the same gradient."
            )
        if tokens is None:
            return 2048 if self.args.device.type == "cpu" and not sharded else 0
        return tokens

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
        inputs = dict(inputs) if self.model.training else self._without_repeated(dict(inputs))
        blank = is_blank(inputs)
        labels, _ = inputs.pop("labels"), inputs.pop(EXAMPLE_ID, None)
        cached = {name: inputs.pop(name) for name in list(inputs) if name.startswith(TEACHER_PREFIX)}
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        seen = 0 if blank else seen
        if self._pads_right and "attention_mask" in inputs:
            # Behind the last token, where no other looks under causal attention: kernels are faster without a mask.
            del inputs["attention_mask"]
        chosen = supervised_positions(labels)
        targets = labels[:, 1:][chosen[:, :-1]]
        with self.accelerator.autocast():
            predictions = self._predictions(inputs, chosen, cached)
            parts = self._student_loss(model, inputs, chosen, targets, predictions)
        tokens = len(targets)
        if num_items_in_batch is None:
            loss = parts.total / max(tokens, 1)
        else:
            loss = parts.total / num_items_in_batch * (self.accelerator.num_processes // self.get_tp_size())
        self._count(parts, tokens, seen)
        if self.model.training:
            self._watch(loss.detach())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs, use_cache=False)

    def save_anchor(self, output_dir: str | Path) -> None:
        """
        Save the student as a plain checkpoint with its tokenizer; an adapter is merged. Call it on every process.

        The weights are gathered into a fresh model: the trained one's forward is patched by TRL, so that copies of it
        would still run this model's weights.
        """
        student = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.accelerator.is_main_process:
            write_anchor(student, state, output_dir)
            self.processing_class.save_pretrained(output_dir)
        self.accelerator.wait_for_everyone()


__all__ = ["StepwiseDistillationTrainer"]
