"""Whether a model keeps sequences apart that lie one behind the other in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from cbd_hf._files import canonical_digest
from cbd_hf._loading import plain_loading
from cbd_hf.layout.miniature import miniature


if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from trl import SFTConfig

_LENGTHS = (3, 4)


def check_packing(args: SFTConfig, **configs: PretrainedConfig | None) -> None:
    """
    Raise if batches are one row without padding and a model does not keep apart the sequences in it, which are told
    apart by their `position_ids` alone. ("wrapped" packing joins its texts on purpose.)

    Models that make their own masks or positions, or carry a state along, let them: OPT, BLOOM and Mamba do. Flash
    attention gets the lengths from `position_ids` by itself; for all else a very small random model of the same
    architecture shows it.

    Args:
        args (`SFTConfig`): options.
        configs (`PretrainedConfig`, *optional*): of models, by what they are called in the message.

    Raises:
        ValueError: they see each other, or that they do not could not be shown.
    """
    if not (args.padding_free or (args.packing and args.packing_strategy != "wrapped")):
        return
    for role, config in configs.items():
        flash = "flash" in str(getattr(config, "_attn_implementation", None))
        if config is not None and not flash and not _keeps_apart(config):
            raise ValueError(
                f"packing and padding_free lay several sequences in one row, which the {role}'s architecture "
                f"({config.model_type}) is not known to keep apart: each would see those before it. Set packing=False "
                "and padding_free=False; sort_steps_by_length=True leaves little padding."
            )


_shown: dict[str, bool] = {}


def _keeps_apart(config: PretrainedConfig) -> bool:
    key = canonical_digest([type(config).__qualname__, config.to_json_string()])
    if key not in _shown:
        with torch.random.fork_rng(devices=[]), plain_loading(), torch.device("cpu"), torch.no_grad():
            torch.default_generator.manual_seed(0)
            try:
                _shown[key] = _same_alone(miniature(config))
            except (ValueError, RuntimeError, AttributeError, TypeError, KeyError, IndexError, ImportError):
                _shown[key] = False
    return _shown[key]


def _same_alone(small: PretrainedConfig) -> bool:
    model: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.5)
    row = torch.arange(1, sum(_LENGTHS) + 1)[None]
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    together = model(input_ids=row, position_ids=positions, use_cache=False).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in row.split(_LENGTHS, dim=1)]
    return torch.allclose(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


__all__ = ["check_packing"]
