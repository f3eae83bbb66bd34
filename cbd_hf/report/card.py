"""The README.md of a chain, made from what the chain itself records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from cbd_hf.chain import Anchor, DistillationChain


_HUB_KEYS = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_REPO_KEYS = ("datasets", "base_model")
# The Hub refuses a card that names something else than a repository there.
_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_FILE_SUFFIXES = (".bin", ".csv", ".gguf", ".json", ".jsonl", ".parquet", ".safetensors", ".txt", ".yaml", ".yml")
# Of a recipe's training options, those that say most about what was learnt; chain.json has all of them.
_TRAINING_OPTIONS = (
    "objective",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "max_length",
    "packing",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "temperature",
    "lmbda",
    "cross_entropy_weight",
    "hidden_loss_weight",
    "hidden_loss_layers",
    "teacher_dtype",
    "bf16",
    "fp16",
    "seed",
)
_HEADER = (
    "Anchor",
    "Parameters",
    "Layers",
    "Width",
    "Heads",
    "Teacher",
    "Objective",
    "Steps",
    "Tokens",
    "Bits per byte (before → after)",
)


def chain_card(chain: DistillationChain) -> str:
    """
    Model card of a chain, with the Hub's YAML metadata.

    Args:
        chain (`DistillationChain`): the chain. `metadata` may hold `license`, `license_name`, `license_link`,
            `language`, `datasets` and `base_model` (of these two what is not on the Hub goes to the text only), a
            `title` and the `repo_id` it will have; an anchor's `stage["metrics"]` may hold `bits_per_byte_before` and
            `bits_per_byte_after`.

    Returns:
        `str`: the text of README.md.
    """
    parts = [
        _front_matter(chain),
        f"# {_text(chain.metadata.get('title'), 'Distillation chain')}",
        f"A distillation chain of {len(chain)} `{_text(chain.family.get('model_type'))}` "
        f"model{'s' if len(chain) > 1 else ''} (anchors), from which [`cbd_hf`](https://arxiv.org/abs/2605.07783) "
        "builds a causal language model of any size in between, by interpolating the parameters of the two "
        "neighbouring anchors.",
        "## Anchors",
        _table(chain),
        "## How to use",
        _usage(chain),
        "## Provenance",
        _provenance(chain),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(chain: DistillationChain) -> str:
    import yaml

    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cbd", "chain-based-distillation", str(chain.family.get("model_type"))],
    }
    for key in _HUB_KEYS:
        value = chain.metadata.get(key)
        if key in _REPO_KEYS:
            named = [name for name in _names(value) if _is_repo_id(name)]
            value = named if isinstance(value, list | tuple) else next(iter(named), None)
        if value:
            data[key] = value
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()}\n---"


def _names(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def _is_repo_id(name: Any) -> bool:
    """Whether a source looks like a repository on the Hub, and not like something on this machine."""
    return (
        isinstance(name, str)
        and _REPO_ID.fullmatch(name) is not None
        and not name.lower().endswith(_FILE_SUFFIXES)
        and not Path(name).exists()
    )


def _table(chain: DistillationChain) -> str:
    rows = [_HEADER, ("---", *["---:"] * 4, "---", "---", *["---:"] * 3), *(_row(anchor) for anchor in chain)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(anchor: Anchor) -> tuple[str, ...]:
    config = anchor.config.get_text_config()
    stage = anchor.stage or {}
    metrics = stage.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    before, after = metrics.get("bits_per_byte_before"), metrics.get("bits_per_byte_after")
    bits = "–" if before is None and after is None else f"{_text(before)} → {_text(after)}"
    return (
        _text(anchor.name),
        f"{anchor.n_params:,}",
        _text(getattr(config, "num_hidden_layers", None)),
        _text(getattr(config, "hidden_size", None)),
        _text(getattr(config, "num_attention_heads", None)),
        *(_text(stage.get(key)) for key in ("teacher", "objective", "steps", "tokens")),
        bits,
    )


def _usage(chain: DistillationChain) -> str:
    lines = [
        "```python",
        "from cbd_hf import CBDModel, DistillationChain",
        "",
        f'chain = DistillationChain.from_pretrained("{_text(chain.metadata.get("repo_id"), "path-or-hub-id")}")',
    ]
    if len(chain) > 1:
        small, large = chain.sizes[-1], chain.sizes[-2]
        lines.append(f"model = CBDModel.from_chain(chain, n_params={_size_between(small, large)})")
    else:
        lines[1] = "from cbd_hf import DistillationChain"
        lines.append("model = chain[0].load_model()")
    lines.append("tokenizer = chain.load_tokenizer()")
    return "\n".join([*lines, "```"])


def _size_between(small: int, large: int) -> str:
    """A short literal for a size strictly between two others."""
    middle = (small + large) / 2
    unit, suffix = (1e9, "e9") if middle >= 1e9 else (1e6, "e6")
    for literal in (f"{middle / unit:.3g}{suffix}", f"{middle / unit:.6g}{suffix}"):
        if small < float(literal) < large:
            return literal
    return str(int(middle))


def _provenance(chain: DistillationChain) -> str:
    lines = [f"- Basis of the anchors: {_text(chain.basis)}"]
    for anchor in chain:
        if anchor.cut:
            lines.append(f"- `{_text(anchor.name)}` was cut out: {_text(anchor.cut)}")
        details = {key: value for key, value in (anchor.stage or {}).items() if value is not None}
        if details:
            lines.append(f"- `{_text(anchor.name)}` was distilled: {_text(details)}")
    for key, label in (("base_model", "Base model"), ("datasets", "Data")):
        local = [name for name in _names(chain.metadata.get(key)) if not _is_repo_id(name)]
        if local:
            lines.append(f"- {label}: {', '.join(map(_local_name, local))}")
    extra = {key: value for key, value in chain.metadata.items() if key not in (*_HUB_KEYS, "title", "repo_id")}
    if isinstance(extra.get("recipe"), dict):
        lines += _recipe(extra.pop("recipe"))
    if extra:
        lines.append(f"- Notes: {_text(extra)}")
    if chain.created_with:
        lines.append(f"- Created with: {_text(chain.created_with)}")
    lines.append(
        "- `chain.json` records the exact parameter count of every anchor and the sha256 of every file; "
        '`DistillationChain.from_pretrained(..., verify="full")` checks them.'
    )
    return "\n".join(lines)


def _recipe(recipe: dict[str, Any]) -> list[str]:
    """A recipe's lines, without what is empty, has a digest in chain.json, or does not matter for what was learnt."""
    given = {
        key: value
        for key, value in recipe.items()
        if key != "training" and not key.endswith("_sha256") and value not in (None, "", [], {})
    }
    lines = [f"- Recipe: {_text(given)}"] if given else []
    training = recipe.get("training")
    if isinstance(training, dict):
        shown = {key: training[key] for key in _TRAINING_OPTIONS if training.get(key) not in (None, "", [], {}, 0, -1)}
        if "max_steps" in shown:
            shown.pop("num_train_epochs", None)  # the steps are what counts
        if shown:
            lines.append(f"- Training: {_text(shown)}; every option is in `chain.json`.")
    return lines


def _local_name(value: Any) -> str:
    """The last component of a path: where it lies on the machine that made the chain is nobody's business."""
    text = _text(value)
    return text if text.startswith("package:") else Path(text).name or text


def _text(value: Any, default: str = "–") -> str:
    """A recorded value as one line that cannot break out of a table cell."""
    if value is None or value == "":
        return default
    if isinstance(value, str) and value.startswith(("/", "./", "../", "~/")):
        text = Path(value).name or value  # a path on the machine that made the chain
    elif isinstance(value, bool | str):
        text = str(value)
    elif isinstance(value, int):
        text = f"{value:,}" if abs(value) >= 10_000 else str(value)
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, dict):
        # An objective is a name with options, such as {"name": "reverse_kl", "temperature": 1.0}.
        head = [_text(value["name"])] if isinstance(value.get("name"), str) else []
        text = ", ".join(head + [f"{key}: {_text(item)}" for key, item in value.items() if not head or key != "name"])
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(_text(item) for item in value) + "]"
    else:
        text = str(value)
    return " ".join(text.split()).replace("\\|", "|").replace("|", "\\|")


__all__ = ["chain_card"]
