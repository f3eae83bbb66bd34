"""The only file that imports what TRL does not export publicly; each name says why it is needed."""

from __future__ import annotations


try:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.models.utils import _ForwardRedirection as ForwardRedirection
    from trl.models.utils import unwrap_model_for_generation
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import disable_dropout_in_model, maybe_gather_lm_head_ctx, pad
except ImportError as error:  # trl.experimental moves between minor releases
    import trl

    raise ImportError(
        f"cbd_hf needs names that trl {trl.__version__} does not have ({error}). Install a tested version: "
        'pip install "trl>=1.16,<1.17".'
    ) from error


__all__ = [
    "DataCollatorForLanguageModeling",
    "ForwardRedirection",
    "GKDConfig",
    "GKDTrainer",
    "disable_dropout_in_model",
    "maybe_gather_lm_head_ctx",
    "pad",
    "unwrap_model_for_generation",
]
