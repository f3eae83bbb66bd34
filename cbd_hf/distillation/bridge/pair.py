"""What a chain's source and bridge need of each other and of the data: found out before the source is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf._files import check_output_directory
from cbd_hf.distillation.answers.engines import check_engine
from cbd_hf.distillation.answers.manifest import MANIFEST, AnswersManifest
from cbd_hf.distillation.answers.prompts import check_chat_template, check_positions, encode_prompts, read_prompts
from cbd_hf.distillation.bridge.config import SEQUENCE
from cbd_hf.distillation.bridge.recipe import answer_filters, answers_settings, bridge_method, bridge_training
from cbd_hf.distillation.bridge.source_cache import collator_of
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.preparation import with_options
from cbd_hf.tokenization.limits import Limits
from cbd_hf.tokenization.vocabulary import VocabularyMap, begin_anew


if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 32  # that both models are tried on


def check_pair(
    bridge: Mapping[str, Any],
    training: StepwiseDistillationConfig,
    *,
    source: Path,
    student: Path,
    answers: Path,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """
    Check what [`~cbd_hf.distillation.bridge.stage.make_bridge`] will need, with the tokenizers alone.

    Args: as there.

    Raises:
        FileExistsError: the directory of the answers holds something else.
        ImportError: the engine or a filter of the answers needs a package that is missing.
        ValueError: the two models, the data or the options do not go together.
    """
    source_tokenizer = AutoTokenizer.from_pretrained(source)
    positions = [Limits.of(AutoConfig.from_pretrained(path)) for path in (student, source)]
    if bridge_method(bridge) == SEQUENCE:
        _check_answers(bridge, source_tokenizer, positions[1].positions, answers, dataset, tokenizer)
    else:
        _check_tokens(bridge, training, source_tokenizer, positions, dataset, tokenizer)


def _check_answers(
    bridge: Mapping[str, Any],
    source_tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    answers: Path,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    settings = answers_settings(bridge)
    check_engine(settings, PartialState().num_processes)
    if answer_filters(bridge).min_rouge_l is not None and importlib.util.find_spec("rouge_score") is None:
        raise ImportError("min_rouge_l needs rouge_score. Run: pip install 'cbd_hf[eval]', or leave it out.")
    prompts = read_prompts(dataset)
    check_chat_template(source_tokenizer, prompts, settings)
    check_positions(encode_prompts(prompts, source_tokenizer, settings)[1], settings, positions)
    templated = tokenizer.chat_template or (bridge.get("training") or {}).get("chat_template_path")
    if prompts.conversational and not templated:
        raise ValueError(
            "The bridge's tokenizer has no chat template, but the data are conversations: set chat_template_path in "
            "`bridge: training`, or use prompts that are text."
        )
    if not (answers / MANIFEST).is_file():
        check_output_directory(answers)
        return
    begun = AnswersManifest.read(answers)
    if begun.settings != settings or begun.data.digest != prompts.digest:
        raise ValueError(
            f"{answers} holds answers to other prompts or of other options (see its {MANIFEST}): move it away, or "
            "choose another output_dir."
        )


def _check_tokens(
    bridge: Mapping[str, Any],
    training: StepwiseDistillationConfig,
    source_tokenizer: PreTrainedTokenizerBase,
    limits: list[Limits],
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    config = bridge_training(training, bridge, "unused")
    if config.teacher_cache:
        TeacherCache.from_pretrained(config.teacher_cache).check(tokenizer=source_tokenizer)
    tokenizer = with_options(tokenizer, config)
    if config.make_span_objective().sees_ends:
        for one in (tokenizer, source_tokenizer):
            begin_anew(one)  # raises if it cannot
    VocabularyMap.from_tokenizers(tokenizer, source_tokenizer)
    collator_of(config, tokenizer, source_tokenizer, limits).encode(dataset[:_ROWS])


__all__ = ["check_pair"]
