"""Stepwise distillation: the teacher of each stage is the next larger model of the chain (paper Sec. 3.1, Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cbd_hf._loading import plain_loading
from cbd_hf._trl import (
    DataCollatorForLanguageModeling,
    GKDTrainer,
    disable_dropout_in_model,
    unwrap_model_for_generation,
)
from cbd_hf.distillation.batching import (
    EXAMPLE_ID,
    TEACHER_ROW,
    DistillationCollator,
    StepSampler,
    number_examples,
    row_lengths,
)
from cbd_hf.distillation.cache import TeacherCache
from cbd_hf.distillation.columns import IGNORED, dataset_kind
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.on_policy import draw_on_policy, on_policy_examples, prompt_of, sample_completions
from cbd_hf.distillation.preparation import supervise_conversations
from cbd_hf.distillation.sources import (
    TEACHER_PREFIX,
    CachedTeacher,
    LiveTeacher,
    TeacherSource,
    compile_decoder_layers,
)
from cbd_hf.distillation.student import PROJECTION, HiddenProjection, LossParts, StudentLoss
from cbd_hf.distillation.teacher import check_same_vocabulary, find_tokenizer, load_teacher


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
    `SFTTrainer` does. Only supervised positions reach the heads of teacher and student, tile by tile.

    Args:
        model (`PreTrainedModel` or `str`): the student; a path or Hub id is loaded.
        teacher_model (`PreTrainedModel` or `str`, *optional*): defaults to `args.teacher_model_name_or_path`. Not
            needed with `args.teacher_cache`; if a directory is given as well, its weights must be the cached ones.
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
            options or the data, or a dataset without the needed columns.
    """

    args: StepwiseDistillationConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    teacher: TeacherSource

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
        if teacher_model is None and not args.teacher_cache:
            raise ValueError(
                "No teacher: pass teacher_model, or set teacher_model_name_or_path or teacher_cache in the config."
            )
        if train_dataset is None:
            raise ValueError("train_dataset is required.")
        self._check_datasets(args, train_dataset, eval_dataset, formatting_func)
        student_path = model if isinstance(model, str) else model.config._name_or_path
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(student_path, trust_remote_code=args.trust_remote_code)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self._cache = _open_cache(args, processing_class, teacher_model)
        if isinstance(model, str):
            kwargs = dict(args.model_init_kwargs or {}) | {"trust_remote_code": args.trust_remote_code}
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        layers = self._prepare_hidden_loss(model, teacher_model, args, peft_config)
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
        self.data_collator = DistillationCollator(self.data_collator, self._cache, args.pad_to_multiple_of)
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        if self._cache is None:
            assert teacher_model is not None
            self.teacher = self._live_teacher(teacher_model, teacher_processing_class, layers[1])
        else:
            self.teacher = CachedTeacher(self._cache.manifest.vocab_size, layers=layers[1])
        self.lmbda = args.lmbda
        self.temperature = args.temperature
        student = self.accelerator.unwrap_model(self.model)
        self._student_loss = StudentLoss(student, args.make_objective(), layers[0], args.hidden_loss_weight)
        if args.compile_layers:
            compile_decoder_layers(student)
        self._sums: dict[str, torch.Tensor] = {}

    def _prepare_hidden_loss(
        self, model: Any, teacher: Any, args: StepwiseDistillationConfig, peft_config: PeftConfig | None
    ) -> tuple[list[int], list[int]]:
        """Give the student its projection; the layers to match, of student and teacher."""
        if not args.hidden_loss_weight:
            return [], []
        config = model.config.get_text_config()
        depth, layers = config.num_hidden_layers, args.hidden_loss_layers or [config.num_hidden_layers]
        if not all(1 <= layer <= depth for layer in layers):
            raise ValueError(f"hidden_loss_layers={layers} must be between 1 and {depth}, the student's layers.")
        if self._cache is not None:
            manifest = self._cache.manifest
            width = manifest.teacher.hidden_size if manifest.settings.hidden else 0
            if not width or layers != [depth]:
                raise ValueError(
                    f"hidden_loss_layers={layers} are not in the cache {args.teacher_cache}: build it with hidden "
                    f"states, which are the last layer's, and match layer {depth} only."
                )
            matched = [depth]
        else:
            other: Any = AutoConfig.from_pretrained(teacher) if isinstance(teacher, str) else teacher.config
            other = other.get_text_config()
            width = other.hidden_size
            matched = [max(1, round(layer * other.num_hidden_layers / depth)) for layer in layers]
        projection = HiddenProjection(config.hidden_size, width, len(layers), args.seed)
        model.add_module(PROJECTION, projection.to(model.device))
        if peft_config is not None:  # else the adapter's wrapper would freeze it and not save it
            peft_config.modules_to_save = [*(getattr(peft_config, "modules_to_save", None) or []), PROJECTION]
        return list(layers), matched

    def _live_teacher(
        self, teacher: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, layers: list[int]
    ) -> LiveTeacher:
        args = self.args
        if isinstance(teacher, str):
            path: str | None = teacher
            dtype = args.teacher_torch_dtype()
            teacher = load_teacher(teacher, args.teacher_model_init_kwargs, args.trust_remote_code, dtype)
        else:
            path = teacher.config._name_or_path
            if args.teacher_model_init_kwargs:
                raise ValueError("teacher_model_init_kwargs only applies to a teacher given by path or Hub id.")
            if args.teacher_dtype not in (None, "auto"):
                teacher = teacher.to(args.teacher_torch_dtype())  # type: ignore[arg-type]
        check_same_vocabulary(self.model, teacher, self.processing_class, tokenizer or find_tokenizer(path))
        return LiveTeacher(teacher, self.accelerator, args.teacher_placement, layers, args.compile_layers)

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
        dataset = supervise_conversations(dataset, processing_class, args, formatting_func)
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(dataset, IterableDataset):
            if self._cache is not None:
                raise ValueError(
                    "teacher_cache needs a dataset whose rows can be looked up first, not an iterable one."
                )
            return dataset
        return number_examples(dataset, None if self._cache is None else self._cache.locate(dataset))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, EXAMPLE_ID, TEACHER_ROW]))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        args = self.args
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        strategy = args.train_sampling_strategy
        sortable = isinstance(dataset, Dataset) and strategy in ("random", "sequential")
        if not args.sort_steps_by_length or not sortable or step_size == args.train_batch_size:
            return super()._get_train_sampler(train_dataset)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        return StepSampler(row_lengths(dataset), step_size, data_seed, shuffle=strategy == "random")

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
            sampled = []
            for rows, batch in zip(prompts, batches, strict=True):
                ids = batch[EXAMPLE_ID].tolist() if EXAMPLE_ID in batch else [""] * len(rows)
                keys = [f"{row} {prompt}" for row, prompt in zip(ids, rows, strict=True)]
                completions = sample_completions(student, rows, keys=keys, **options)
                sampled.append(self.data_collator(on_policy_examples(rows, completions)))
                if EXAMPLE_ID in batch:
                    sampled[-1][EXAMPLE_ID] = batch[EXAMPLE_ID]
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
        inputs = dict(inputs)
        labels, _ = inputs.pop("labels"), inputs.pop(EXAMPLE_ID, None)
        cached = {name: inputs.pop(name) for name in list(inputs) if name.startswith(TEACHER_PREFIX)}
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        if self._pads_right and "attention_mask" in inputs:
            # Behind the last token, where no other looks under causal attention: kernels are faster without a mask.
            del inputs["attention_mask"]
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        chosen[:, :-1] = labels[:, 1:] != IGNORED
        targets = labels[:, 1:][chosen[:, :-1]]
        with self.accelerator.autocast():
            predictions = self.teacher.predict(inputs, chosen, cached)
            parts = self._student_loss(model, inputs, chosen, targets, predictions)
        tokens = len(targets)
        if num_items_in_batch is None:
            loss = parts.total / max(tokens, 1)
        else:
            loss = parts.total / num_items_in_batch * (self.accelerator.num_processes // self.get_tp_size())
        self._count(parts, tokens, seen)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs, use_cache=False)

    def _count(self, parts: LossParts, tokens: int, seen: torch.Tensor | int) -> None:
        """Add to the sums that the next log divides; kept on the device until then."""
        mode = "train" if self.model.training else "eval"
        values = [parts.divergence, parts.hidden, torch.tensor(tokens), torch.as_tensor(seen)]
        sums = torch.stack([value.to(self.accelerator.device, torch.float32) for value in values])
        self._sums[mode] = self._sums.get(mode, 0) + sums.to(_summing_dtype(sums.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `SFTTrainer`, with `divergence` and `hidden_loss` per supervised token since the last log."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            divergence, hidden, tokens, seen = self.accelerator.reduce(sums, "sum").tolist()
            metrics = self._metrics[mode]
            if self.args.cross_entropy_weight < 1:
                metrics["divergence"] = [divergence / max(tokens, 1)]
            if self.args.hidden_loss_weight:
                metrics["hidden_loss"] = [hidden / max(tokens, 1)]
            if mode == "train":
                self._total_train_tokens += int(seen) // self.get_tp_size()
            metrics["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def save_anchor(self, output_dir: str | Path) -> None:
        """
        Save the student as a plain checkpoint with its tokenizer; an adapter is merged. Call it on every process.

        The weights are gathered into a fresh model: the trained one's forward is patched by TRL, so that copies of it
        would still run this model's weights.
        """
        student = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        state = {name: value for name, value in state.items() if PROJECTION not in name}
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


def _open_cache(
    args: StepwiseDistillationConfig, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel | str | None
) -> TeacherCache | None:
    if not args.teacher_cache:
        return None
    cache = TeacherCache.from_pretrained(args.teacher_cache)
    directory = teacher if isinstance(teacher, str) and Path(teacher).is_dir() else None
    cache.check(tokenizer=tokenizer, temperature=args.temperature, objective=args.objective, teacher=directory)
    return cache


def _summing_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


__all__ = ["StepwiseDistillationTrainer"]
