"""Predicted memory of a distillation stage on each device, from configs alone."""

from __future__ import annotations

from cbd_hf.training_memory.prediction import (
    DEVICES,
    PARTS,
    StageMemory,
    TrainingWorkload,
    check_divisions,
    predict_chain,
    predict_stage,
)


__all__ = [
    "DEVICES",
    "PARTS",
    "StageMemory",
    "TrainingWorkload",
    "check_divisions",
    "predict_chain",
    "predict_stage",
]
