"""Chain-based Distillation (CBD, arXiv 2605.07783) for Hugging Face."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from cbd_hf.chain import AdjacentPair, Anchor, DistillationChain
    from cbd_hf.distillation.bridge.config import BridgeDistillationConfig
    from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer
    from cbd_hf.distillation.builder import build_chain
    from cbd_hf.distillation.config import StepwiseDistillationConfig
    from cbd_hf.distillation.minillm.config import MiniLLMConfig
    from cbd_hf.distillation.minillm.trainer import MiniLLMTrainer
    from cbd_hf.distillation.trainer import StepwiseDistillationTrainer
    from cbd_hf.modeling import CBDModel
    from cbd_hf.sizing import plan_config
    from cbd_hf.tokenization.collator import BridgeDataCollator

__version__ = "0.1.0"

# Public name -> module. A module, and torch with it, is imported when one of its names is first used.
_MODULES = {
    "AdjacentPair": "cbd_hf.chain",
    "Anchor": "cbd_hf.chain",
    "BridgeDataCollator": "cbd_hf.tokenization.collator",
    "BridgeDistillationConfig": "cbd_hf.distillation.bridge.config",
    "BridgeDistillationTrainer": "cbd_hf.distillation.bridge.trainer",
    "CBDModel": "cbd_hf.modeling",
    "DistillationChain": "cbd_hf.chain",
    "MiniLLMConfig": "cbd_hf.distillation.minillm.config",
    "MiniLLMTrainer": "cbd_hf.distillation.minillm.trainer",
    "StepwiseDistillationConfig": "cbd_hf.distillation.config",
    "StepwiseDistillationTrainer": "cbd_hf.distillation.trainer",
    "build_chain": "cbd_hf.distillation.builder",
    "plan_config": "cbd_hf.sizing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


__all__ = [
    "AdjacentPair",
    "Anchor",
    "BridgeDataCollator",
    "BridgeDistillationConfig",
    "BridgeDistillationTrainer",
    "CBDModel",
    "DistillationChain",
    "MiniLLMConfig",
    "MiniLLMTrainer",
    "StepwiseDistillationConfig",
    "StepwiseDistillationTrainer",
    "build_chain",
    "plan_config",
]
