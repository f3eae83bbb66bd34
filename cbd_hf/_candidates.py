"""From a checkpoint or a model to an anchor on disk: what is checked first, and what is copied."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf._files import canonical_digest, sha256_of
from cbd_hf._hub import SMALL_FILE_PATTERNS
from cbd_hf.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointError, CheckpointReader, weight_files


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
# What changes with the library or the place a config was loaded from, not with the architecture.
_VOLATILE_KEYS = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
_RESAVE = "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new)"


@dataclass
class Candidate:
    """
    A checkpoint or model that may become an anchor.

    Args:
        label (`str`): how error messages name it.
        source (`Path` or `PreTrainedModel`): the checkpoint directory, or the model.
        config (`PretrainedConfig`): its config.
        n_params (`int`): exact number of parameters, tied weights once.
        has_tokenizer (`bool`): whether a tokenizer lies beside the weights.
        vocabulary (`dict`, *optional*): token to id of the tokenizer it has or will get.
        name (`str`, *optional*, defaults to `""`): its name in the chain.
        stage (`dict`, *optional*): provenance of its distillation.
        cut (`dict`, *optional*): how it was cut out of the previous anchor.
    """

    label: str
    source: Path | PreTrainedModel
    config: PretrainedConfig
    n_params: int
    has_tokenizer: bool = False
    vocabulary: dict[str, int] | None = None
    name: str = ""
    stage: dict[str, Any] | None = None
    cut: dict[str, Any] | None = None

    def family(self) -> dict[str, Any]:
        """What all anchors of one chain share."""
        return {
            "model_type": self.config.model_type,
            "vocab_size": self.config.get_text_config().vocab_size,
            "tie_word_embeddings": bool(getattr(self.config, "tie_word_embeddings", False)),
            "tokenizer_digest": None if self.vocabulary is None else canonical_digest(self.vocabulary),
        }


def config_digest(config: PretrainedConfig) -> str:
    """SHA-256 of what a config says about the architecture, the same before saving and after loading."""
    return canonical_digest(json_value(_without_volatile(config.to_diff_dict()), "config"))


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE_KEYS}
    return value


def json_value(value: Any, where: str) -> Any:
    """
    `value` as plain JSON data: paths as text, NumPy and PyTorch scalars as numbers, NaN and infinities as text.

    Raises:
        ValueError: something in it is not JSON data; names where it is.
    """
    if isinstance(value, Mapping):
        return {str(key): json_value(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        # Infinity and NaN are not JSON; a diverged loss should be recorded all the same.
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return json_value(value.item(), where)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which chain.json cannot hold. Use text, numbers, lists and dicts."
    )


def has_tokenizer(names: Sequence[str]) -> bool:
    """Whether a tokenizer can be loaded from a directory with files of these names."""
    return any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARY_FILES)


def read_tokenizer(directory: Path, label: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint directory, without running code that came with it.

    Raises:
        ValueError: it cannot be loaded that way.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # Damaged files raise whatever the tokenizer's own parser raises.
        raise ValueError(
            f"The tokenizer of {label} could not be loaded without running remote code ({error}). Repair its files, "
            "or replace them by those of a tokenizer class that Transformers has."
        ) from error


def inspect_directory(directory: Path, label: str) -> Candidate:
    """
    Read and check a checkpoint directory: its config, the headers of its weights, its tokenizer.

    Args:
        directory (`Path`): the checkpoint.
        label (`str`): how error messages name it.

    Raises:
        ValueError: no usable config, remote code, a tokenizer that cannot be loaded.
        CheckpointError: weights that are not safetensors, damaged, or do not fit the config.
    """
    config = read_config(directory, label)
    n_params, outline, shapes = _expected_parameters(config, label)
    _check_weights(directory, label, outline, shapes)
    candidate = Candidate(label=label, source=directory, config=config, n_params=n_params)
    if has_tokenizer([path.name for path in directory.iterdir()]):
        candidate.has_tokenizer = True
        candidate.vocabulary = read_tokenizer(directory, label).get_vocab()
    return candidate


def inspect_model(model: PreTrainedModel, label: str) -> Candidate:
    """
    Check a model in memory; what it is saved as is checked by [`write_candidate`].

    Args:
        model (`PreTrainedModel`): a stock model.
        label (`str`): how error messages name it.

    Raises:
        ValueError: its class is not one of Transformers', it carries adapters or quantized weights, or its
            parameters do not fit its config.
    """
    config = model.config
    _check_stock(config.model_type, type(config), getattr(config, "auto_map", None), label)
    _check_not_quantized(config, label)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{label} carries PEFT adapters. Merge them into the weights, or remove them, first.")
    n_params, _, shapes = _expected_parameters(config, label)
    have = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    for name, shape in shapes.items():
        found = have.get(name, have.get(name.removeprefix(prefix)))
        if found != shape:
            state = "is missing" if found is None else f"has shape {found}"
            raise ValueError(
                f"{label}: parameter {name} {state}, but its config asks for shape {shape}. Give a causal language "
                "model with all its parameters in one process, and change its config with its weights."
            )
    return Candidate(label=label, source=model, config=config, n_params=n_params)


def read_config(directory: Path, label: str) -> PretrainedConfig:
    """
    The config of a checkpoint directory that holds a stock causal language model.

    Raises:
        ValueError: no usable config, an adapter, quantized weights, remote code, or no causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = directory / "config.json"
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise ValueError(
                f"{label} is a PEFT adapter, not a model. Merge it (PeftModel.merge_and_unload) and save the result."
            )
        raise ValueError(f"{label} has no config.json, so it is not a Hugging Face checkpoint. Check the path.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
        auto_map = raw.get("auto_map")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{label}: config.json is not valid JSON ({error}). Copy the checkpoint again.") from error
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    _check_stock(model_type, CONFIG_MAPPING[model_type] if known else None, auto_map, label)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # Configs validate themselves with many kinds of errors.
        raise ValueError(f"{label}: config.json cannot be read as a {model_type!r} config ({error}).") from error
    _check_not_quantized(config, label)
    return config


def _check_stock(model_type: Any, config_class: type | None, auto_map: Any, label: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config_class is not None and config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    if auto_map:
        raise ValueError(
            f"{label} needs remote code: its model_type {model_type!r} has no causal language model class in "
            f"Transformers and its config names its own ({auto_map}). A chain holds only stock architectures."
        )
    of = "" if config_class is None else f" ({config_class.__name__})"
    raise ValueError(
        f"{label} has model_type {model_type!r}{of}, for which this version of Transformers has no causal language "
        "model class. Give a model that AutoModelForCausalLM can load."
    )


def _check_not_quantized(config: PretrainedConfig, label: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{label} has quantized weights, which cannot be interpolated. Save it dequantized first.")


def _expected_parameters(
    config: PretrainedConfig, label: str
) -> tuple[int, PreTrainedModel, dict[str, tuple[int, ...]]]:
    from cbd_hf.layout.meta import meta_model

    try:
        model = meta_model(config)
    except Exception as error:  # Whatever the architecture raises for dimensions that do not fit.
        raise ValueError(f"{label}: no model can be built from its config ({error}).") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return sum(map(math.prod, shapes.values())), model, shapes


def _check_weights(
    directory: Path, label: str, outline: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    try:
        # The names come from the index, which is data from elsewhere: opened only if they stay in the directory.
        for path in weight_files(directory):
            if path.parent != directory:
                raise CheckpointError(f"{INDEX_FILE} names {path}, outside the checkpoint; do not use this checkpoint")
        with CheckpointReader(directory, model=outline) as reader:
            missing = [name for name in shapes if name not in reader]
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise CheckpointError(
                    f"its weights lack {', '.join(missing[:3])}{more}, which its config asks for. Re-save it with "
                    f"{_RESAVE}"
                )
            for name, shape in shapes.items():
                reader.dtype(name)  # Raises for a dtype that cannot be interpolated.
                if reader.shape(name) != shape:
                    raise CheckpointError(
                        f"tensor {name} has shape {reader.shape(name)}, but its config asks for {shape}. Give the "
                        "config.json that belongs to these weights"
                    )
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {str(error).rstrip('.')}.") from error


def safe_name(name: str) -> str:
    """`name` as the name of a directory on any file system; never empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:80] or "anchor"


def unique_names(names: Sequence[str]) -> list[str]:
    """Names made different from each other, regardless of case, by a counter."""
    taken: set[str] = set()
    result = []
    for name in names:
        unique, count = name, 1
        while unique.lower() in taken:
            count += 1
            unique = f"{name}-{count}"
        taken.add(unique.lower())
        result.append(unique)
    return result


def write_candidate(
    candidate: Candidate, directory: Path, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, dict[str, Any]]:
    """
    Copy or save an anchor into an empty directory.

    Args:
        candidate (`Candidate`): the anchor, already checked.
        directory (`Path`): where to; created if needed.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved if the anchor has none of its own.

    Returns:
        `dict`: size and sha256 of every file written, by name.

    Raises:
        CheckpointError: a model was saved in a form that does not fit its config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(candidate.source, Path):
        for path in _checkpoint_files(candidate.source):
            shutil.copyfile(path, directory / path.name)
    else:
        _save_untouched(candidate.source, directory)
        # Some architectures are saved under other tensor names than their parameters'.
        _, outline, shapes = _expected_parameters(candidate.config, candidate.label)
        _check_weights(directory, candidate.label, outline, shapes)
    if tokenizer is not None and not candidate.has_tokenizer:
        tokenizer.save_pretrained(directory)
    return describe_files(directory)


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _checkpoint_files(directory: Path) -> list[Path]:
    weights = weight_files(directory)
    small = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SMALL_FILE_PATTERNS)
    ]
    index = [] if weights == [directory / SINGLE_FILE] else [directory / INDEX_FILE]
    return [*small, *index, *weights]


def _save_untouched(model: PreTrainedModel, directory: Path) -> None:
    # save_pretrained writes the dtype and the class name into the config of the model it saves.
    configs = [config for config in (model.config, getattr(model, "generation_config", None)) if config is not None]
    before = [dict(config.__dict__) for config in configs]
    try:
        # The class's method: CBDModel gives its instances one that also writes a tokenizer.
        type(model).save_pretrained(model, directory)
    finally:
        for config, state in zip(configs, before, strict=True):
            config.__dict__.clear()
            config.__dict__.update(state)


__all__ = [
    "Candidate",
    "config_digest",
    "describe_files",
    "has_tokenizer",
    "inspect_directory",
    "inspect_model",
    "json_value",
    "read_tokenizer",
    "safe_name",
    "unique_names",
    "write_candidate",
]
