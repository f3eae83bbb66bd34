"""Bridge distillation: a source of any architecture and any tokenizer teaches the chain's own family."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbd_hf.distillation.batching import SOURCE_PREFIX, supervised_positions
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig
from cbd_hf.distillation.bridge.objectives import Vocabularies
from cbd_hf.distillation.bridge.source_cache import SourceCache, collator_of, prepare_pairs
from cbd_hf.distillation.bridge.spans import Alignment, followed, number_spans
from cbd_hf.distillation.bridge.student import AlignedPredictions, BridgeStudentLoss
from cbd_hf.distillation.preparation import with_options
from cbd_hf.distillation.student import StudentLoss
from cbd_hf.distillation.teacher import find_tokenizer, load_config, load_tokenizer, open_cache
from cbd_hf.distillation.trainer import AnyDataset, StepwiseDistillationTrainer
from cbd_hf.tokenization.collator import BridgeDataCollator, end_of_turn_pair
from cbd_hf.tokenization.edit_distance import nearest_student_ids
from cbd_hf.tokenization.limits import Limits, needed_rows, warn_of_surplus_tokens
from cbd_hf.tokenization.rows import COLUMNS
from cbd_hf.tokenization.vocabulary import VocabularyMap, begin_anew


if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)

_SPANS, _SOURCE_SPANS, _SOURCE_LABELS = "spans", SOURCE_PREFIX + "spans", SOURCE_PREFIX + "labels"


class BridgeDistillationTrainer(StepwiseDistillationTrainer):
    """
    Distils a source into a student of another vocabulary, and of any architecture.

    Both models read the same text, each in its own tokens. The loss compares them over spans: groups of tokens that
    cover the same bytes; see [`SpanObjective`]. All else is as in [`StepwiseDistillationTrainer`]: the gradient of a
    global batch however it is split, heads on supervised positions only, tile by tile, sources live, sharded,
    offloaded or cached, adapters.

    Args:
        model (`PreTrainedModel` or `str`): the student, of the chain's family.
        teacher_model (`PreTrainedModel` or `str`, *optional*): the source; as in [`StepwiseDistillationTrainer`].
        args ([`BridgeDistillationConfig`], *optional*): options.
        data_collator ([`BridgeDataCollator`], *optional*): by default made of the two tokenizers and the options. One
            that is given brings its tokenizers and options.
        train_dataset (`Dataset` or `IterableDataset`): `text`, `prompt` and `completion`, or `messages`; or rows that
            [`BridgeDataCollator.encode`] has prepared.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): likewise.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's; by default from where the student was.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the source's; by default from where it was.
        all others: as in [`StepwiseDistillationTrainer`].

    Raises:
        ValueError: as there; no tokenizer for the source, or two that have nothing in common or cannot be aligned;
            tokenizers that are not the given collator's; a length or a row beyond a model's positions.
    """

    args: BridgeDistillationConfig

    _tag_names = ["trl", "bridge", "cbd"]
    _name = "Bridge Distillation"

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: BridgeDistillationConfig | None = None,
        data_collator: BridgeDataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        args = BridgeDistillationConfig(output_dir="bridge-distillation") if args is None else args
        if not isinstance(args, BridgeDistillationConfig):
            raise ValueError(f"args is a {type(args).__name__}; give a BridgeDistillationConfig.")
        if args.method == SEQUENCE:
            raise ValueError(
                "method='sequence' trains on the source's answers alone, without the source: use trl's SFTTrainer on "
                "them, or `cbd bridge train --method sequence`."
            )
        if options.get("formatting_func") is not None:
            raise ValueError("formatting_func is not possible with a bridge: map the dataset to 'text' first.")
        teacher_model = teacher_model or args.teacher_model_name_or_path
        if data_collator is not None:
            _check_collator(data_collator, args, processing_class, teacher_processing_class)
            processing_class, source = data_collator.tokenizer, data_collator.source_tokenizer
        else:
            source = teacher_processing_class or _source_tokenizer(teacher_model, args)
        kwargs = args.model_init_kwargs if isinstance(model, str) else None
        if processing_class is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            processing_class = load_tokenizer(path, kwargs, args.trust_remote_code)
        limits = (
            Limits.of(load_config(model, kwargs, args.trust_remote_code)),
            Limits.of(_source_config(teacher_model, source, args)),
        )
        if data_collator is None:
            processing_class = with_options(processing_class, args)
            data_collator = collator_of(args, processing_class, source, limits)
        for role, known, tokenizer in zip(("student", "source"), limits, (processing_class, source), strict=True):
            if known.tokens is not None:
                _check_tokens(role, known.tokens, tokenizer)
                warn_of_surplus_tokens(role, tokenizer, known.tokens)
        data_collator = data_collator.within(*limits)
        self._bridge_collator = data_collator
        pair = end_of_turn_pair(data_collator, _are_conversations(train_dataset))
        self.vocabulary_map = VocabularyMap.from_tokenizers(processing_class, source, [pair] if pair else [])
        if set(self.vocabulary_map.student_ids.tolist()) <= set(data_collator.special[0].added.tolist()):
            raise ValueError(
                "The student's and the source's tokenizers share no token of ordinary text, so their vocabularies "
                "cannot be compared: choose another source."
            )
        sees_ends = args.make_span_objective().sees_ends
        self._boundaries = (begin_anew(processing_class), begin_anew(source)) if sees_ends else None
        coverage = self.vocabulary_map.coverage()
        logger.info(
            "Shared tokens: %d, %.1f %% of the student's and %.1f %% of the source's.",
            len(self.vocabulary_map.student_ids),
            100 * coverage["student"],
            100 * coverage["source"],
        )
        self._aligned: dict[str, torch.Tensor] = {}
        super().__init__(
            model,
            teacher_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            teacher_processing_class=source,
            **options,
        )
        self._pads_right = True

    def _open_cache(self, args: Any, tokenizer: PreTrainedTokenizerBase, teacher: Any) -> Any:
        cache = open_cache(args, self._bridge_collator.source_tokenizer, teacher)
        if cache is None:
            return None
        k = cache.manifest.settings.k
        if args.method == "uld" and args.uld_tokens > k:
            raise ValueError(f"uld_tokens={args.uld_tokens} is more than the {k} tokens that the cache has: lower it.")
        return SourceCache(cache)

    def _check_vocabulary(self, teacher: PreTrainedModel | int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        rows = teacher if isinstance(teacher, int) else teacher.config.get_text_config().vocab_size
        self._source_vocab = rows
        student = self.model.config.get_text_config().vocab_size
        collator = self._bridge_collator
        for role, size, known in (
            ("student", student, collator.tokenizer),
            ("source", rows, collator.source_tokenizer),
        ):
            _check_tokens(role, size, known)

    def _make_student_loss(self, student: torch.nn.Module, layers: list[int]) -> StudentLoss:
        collator, nearest = self._bridge_collator, None
        if self.args.method == "mined":
            nearest = nearest_student_ids(collator.tokenizer, collator.source_tokenizer, self.vocabulary_map)
        size = self.model.config.get_text_config().vocab_size
        if nearest is not None:
            nearest = np.where(nearest < size, nearest, -1)
        return BridgeStudentLoss(
            student,
            self.args.make_span_objective(),
            Vocabularies.of(self.vocabulary_map, size, self._source_vocab, nearest, self._boundaries),
            layers,
            self.args.hidden_loss_weight,
        )

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> AnyDataset:
        with args.main_process_first(desc="aligning the tokens of both models"):
            return prepare_pairs(dataset, self._bridge_collator, args.dataset_num_proc, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys([*columns, *COLUMNS]))

    def _predictions(
        self, inputs: dict[str, Any], chosen: torch.Tensor, cached: dict[str, torch.Tensor]
    ) -> AlignedPredictions:
        spans = {name: inputs.pop(name) for name in (_SPANS, _SOURCE_SPANS)}
        labels = inputs.pop(_SOURCE_LABELS)
        source = {
            name.removeprefix(SOURCE_PREFIX): inputs.pop(name)
            for name in list(inputs)
            if name.startswith(SOURCE_PREFIX)
        }
        del source["attention_mask"]  # behind the last token, as in the student's
        there = supervised_positions(labels)
        own, others, count = number_spans(spans, chosen, there)
        alignment = Alignment(own, others, labels[:, 1:][there[:, :-1]], count, followed(chosen), followed(there))
        self._count_spans(alignment, chosen)
        return AlignedPredictions(self.teacher.predict(source, there, cached), alignment)

    def _count_spans(self, alignment: Alignment, chosen: torch.Tensor) -> None:
        """Add to the sums from which `align_ratio` is logged."""
        tokens = [
            torch.bincount(numbers[numbers >= 0], minlength=alignment.count)
            for numbers in (alignment.spans, alignment.source_spans)
        ]
        single = (tokens[0] == 1) & (tokens[1] == 1)
        mode = "train" if self.model.training else "eval"
        sums = torch.stack([single.sum(), tokens[0].sum(), chosen.sum()]).float()
        self._aligned[mode] = self._aligned.get(mode, 0) + sums

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in the stepwise trainer."""
        self._aligned.pop("eval", None)  # of predict(), which logs nothing
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        As in the stepwise trainer, where `divergence` is that over spans, per supervised token of the student; with
        `align_ratio`, the share of these tokens that stand one against one, and `span_ratio`, that in any span.
        """
        mode = "train" if self.model.training else "eval"
        sums = self._aligned.pop(mode, None)
        if sums is not None:
            single, inside, tokens = self.accelerator.reduce(sums, "sum").tolist()
            self._metrics[mode]["align_ratio"] = [single / max(tokens, 1)]
            self._metrics[mode]["span_ratio"] = [inside / max(tokens, 1)]
            if mode == "train":
                for side, share in self.vocabulary_map.coverage().items():
                    self._metrics[mode][f"vocabulary_coverage_{side}"] = [share]
        super().log(logs, start_time)


def _are_conversations(dataset: Any) -> bool | None:
    """Whether rows are read through chat templates on both sides; `None` if rows are prepared and do not say."""
    row = next(iter(dataset), None) if dataset is not None else None
    if row is None or set(COLUMNS) <= set(row):
        return None
    return "messages" in row or isinstance(row.get("prompt"), list)


def _check_tokens(role: str, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    needed = needed_rows(tokenizer)
    if rows < needed:
        raise ValueError(
            f"The {role} has vocab_size {rows}, but its tokenizer has tokens up to {needed - 1}, so they do not "
            "belong together. Give the tokenizer that the model was trained with."
        )


def _check_collator(
    collator: Any,
    args: BridgeDistillationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    source_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise unless a collator that is given goes with the other arguments."""
    if not isinstance(collator, BridgeDataCollator):
        raise ValueError(f"data_collator is a {type(collator).__name__}; give a BridgeDataCollator.")
    for name, given, own in (
        ("processing_class", tokenizer, collator.tokenizer),
        ("teacher_processing_class", source_tokenizer, collator.source_tokenizer),
    ):
        if given is not None and given is not own and given.get_vocab() != own.get_vocab():
            raise ValueError(
                f"{name} ({len(given)} tokens) has other tokens than that tokenizer of the data_collator ({len(own)} "
                f"tokens), which makes the rows: leave {name} out, or make the collator with it."
            )
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} comes too late for a data_collator that is given: change its "
                "tokenizer before the collator is made, or leave the collator out."
            )


def _source_config(
    source: PreTrainedModel | str | None, tokenizer: PreTrainedTokenizerBase, args: BridgeDistillationConfig
) -> PretrainedConfig | None:
    """By which rows are cut as for its cache; `None` where there is a cache only, made from who knows where."""
    if source is not None and not args.teacher_cache:
        return load_config(source, args.teacher_model_init_kwargs, args.trust_remote_code)
    place = source or tokenizer.name_or_path
    if isinstance(place, str) and not (place and (Path(place) / "config.json").is_file()):
        return None
    return load_config(place, None, args.trust_remote_code)


def _source_tokenizer(source: PreTrainedModel | str | None, args: BridgeDistillationConfig) -> PreTrainedTokenizerBase:
    path = source if isinstance(source, str) or source is None else source.config._name_or_path
    kwargs = args.teacher_model_init_kwargs if isinstance(source, str) else None
    found = find_tokenizer(path, kwargs, args.trust_remote_code)
    if found is None:
        raise ValueError(
            "The source's tokenizer is not known, and without it the two models' tokens cannot be aligned: give it as "
            "teacher_processing_class."
        )
    return found


__all__ = ["BridgeDistillationTrainer"]
