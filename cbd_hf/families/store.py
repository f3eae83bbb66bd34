"""Learned layouts on disk, so that an architecture is examined once on a machine and not in every process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf._files import atomic_write_text
from cbd_hf.layout import Axis, Family, Norm, Segment, TensorSpec


if TYPE_CHECKING:
    from transformers import PretrainedConfig

VARIABLE = "CBD_LAYOUT_CACHE"
"""Environment variable: the directory of the store, or `off`. By default `cbd_hf/layouts` in the Hugging Face home."""


def load(config: PretrainedConfig) -> tuple[Family, dict[str, float]] | None:
    """The layout stored for `config` and the errors of its proof, or `None`."""
    path = _path(config)
    if path is None:
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return _family(stored["family"]), {name: float(value) for name, value in stored["errors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: it is learned


def save(config: PretrainedConfig, family: Family, errors: dict[str, float]) -> None:
    """Store a layout that was proved. A store that cannot be written to is no error."""
    path = _path(config)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps({"family": asdict(family), "errors": errors}, sort_keys=True) + "\n")


_BESIDE = ("_name_or_path", "architectures", "cbd", "dtype", "torch_dtype", "transformers_version")


def describe(config: PretrainedConfig) -> str:
    """All that a layout may depend on in a config, as JSON."""
    values = {name: value for name, value in config.to_dict().items() if name not in _BESIDE}
    kind = type(config)
    return json.dumps(values | {"class": f"{kind.__module__}.{kind.__qualname__}"}, sort_keys=True, default=str)


def _path(config: PretrainedConfig) -> Path | None:
    place = os.environ.get(VARIABLE)
    if place == "off" or not _is_stock(config):
        return None
    if not place:
        from huggingface_hub.constants import HF_HOME

        place = str(Path(HF_HOME) / "cbd_hf" / "layouts")
    digest = hashlib.sha256(f"{_code()}\n{describe(config)}".encode()).hexdigest()
    return Path(place).expanduser() / f"{config.model_type}-{digest[:32]}.json"


def _is_stock(config: PretrainedConfig) -> bool:
    """Whether config and model are classes of transformers, whose version says what they are."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    classes = [type(config), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)]
    return all(known is not None and known.__module__.startswith("transformers.") for known in classes)


@lru_cache
def _code() -> str:
    """What else a layout depends on: the libraries that build the model, and the code that examines it."""
    import torch
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    package = Path(__file__).parents[1]
    for folder in ("families", "layout", "transforms"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _family(values: dict[str, Any]) -> Family:
    tensors = {name: _spec(spec) for name, spec in values["tensors"].items()}
    lists = ("eps_fields", "follows_hidden", "inert")
    return Family(**values | {"tensors": tensors} | {name: tuple(values[name]) for name in lists})


def _spec(values: dict[str, Any]) -> TensorSpec:
    axes = tuple(
        Axis(tuple(Segment(**segment) for segment in axis["segments"]), axis["side"]) for axis in values["axes"]
    )
    norm = Norm(**values["norm"]) if values["norm"] is not None else None
    return TensorSpec(**values | {"axes": axes, "norm": norm})


__all__ = ["VARIABLE", "describe", "load", "save"]
