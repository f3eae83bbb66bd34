"""Options of stepwise distillation."""

from dataclasses import dataclass, field

import torch

from cbd_hf._trl import GKDConfig
from cbd_hf.distillation.objectives import DIVERGENCES


@dataclass
class StepwiseDistillationConfig(GKDConfig):
    """
    Options of [`StepwiseDistillationTrainer`]: those of `trl.SFTConfig` and `GKDConfig`, with the changes below.

    > What differs from `GKDConfig`

    Args:
        objective (`str`, *optional*, defaults to `"reverse_kl"`):
            `"reverse_kl"` (the paper's Eq. 1), `"forward_kl"` or `"generalized_jsd"` (then `beta` counts).
        cross_entropy_weight (`float`, *optional*, defaults to `0.0`):
            Share w in [0, 1] of the cross-entropy with the data: loss = (1 - w) * divergence + w * cross-entropy.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of teacher and student in the loss, and of on-policy sampling.
        lmbda (`float`, *optional*, defaults to `0.0`):
            Share of optimizer steps on the student's own samples; 0 trains on the dataset alone. Drawn once per
            global batch, alike on all processes.
        max_prompt_length (`int`, *optional*, defaults to `256`):
            Tokens of a prompt kept (from its end) for on-policy sampling.
        completion_only_loss (`bool`, *optional*):
            `None` supervises completions and assistant turns where the dataset has them and every token of plain
            text; `False` supervises every token.
        bf16 (`bool`, *optional*):
            By default on where the accelerator supports it, and off on a CPU.

    > Fixed so that the gradient does not depend on how a batch is split

        average_tokens_across_devices (`bool`): must stay `True`.

    Raises:
        ValueError: an option is out of its range.
    """

    objective: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence to minimise: reverse_kl (the paper's), forward_kl or generalized_jsd (uses beta).",
            "choices": sorted(DIVERGENCES),
        },
    )
    cross_entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Share in [0, 1] of the cross-entropy with the data; the divergence has the rest."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of teacher and student in the loss, and of on-policy sampling."},
    )
    lmbda: float = field(
        default=0.0,
        metadata={"help": "Share of optimizer steps, in [0, 1], that train on the student's own samples."},
    )
    max_prompt_length: int = field(
        default=256,
        metadata={"help": "Tokens of a prompt kept, from its end, for on-policy sampling."},
    )

    def __post_init__(self) -> None:
        has_accelerator = torch.accelerator.is_available()
        if not has_accelerator:
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_accelerator and not self.use_cpu
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for an option out of its range; again where options are changed later."""
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda={self.lmbda} is outside [0, 1]: 0 trains on the dataset alone.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} is outside [0, 1]: 0 is forward KL, 1 reverse KL.")
        if self.objective not in DIVERGENCES:
            raise ValueError(f"objective={self.objective!r} is unknown; choose one of {sorted(DIVERGENCES)}.")
        if not 0 <= self.cross_entropy_weight <= 1:
            raise ValueError(
                f"cross_entropy_weight={self.cross_entropy_weight} is outside [0, 1]: 0 trains on the teacher alone, "
                "1 on the data alone."
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be greater than 0; 1 leaves the logits as they are."
            )
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length={self.max_prompt_length} must be at least 1.")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False makes the gradient depend on how the batch is split over "
                "processes; leave it True."
            )
        if self.label_smoothing_factor or self.loss_type != "nll":
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} and loss_type={self.loss_type!r} belong to "
                "SFTTrainer's own loss, which is not used here: leave them at 0 and 'nll'."
            )
        if self.seq_kd:
            raise ValueError(
                "seq_kd=True is not a stepwise objective: the paper uses sequence-level distillation for the bridge. "
                "Generate the teacher's answers once and train on them with cross_entropy_weight=1."
            )


__all__ = ["StepwiseDistillationConfig"]
