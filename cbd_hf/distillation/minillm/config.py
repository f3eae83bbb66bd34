"""Options of on-policy distillation by policy gradient."""

from dataclasses import dataclass, field

from cbd_hf.distillation.config import StepwiseDistillationConfig


@dataclass
class MiniLLMConfig(StepwiseDistillationConfig):
    """
    Options of [`MiniLLMTrainer`]: those of [`StepwiseDistillationConfig`], with the changes below. Defaults are those
    of MiniLLM's scripts (arXiv 2306.08543), which the CBD paper names for its second phase.

    > Rollouts

    Args:
        rollout_batch_size (`int`, *optional*, defaults to `256`):
            Samples that are drawn together, one for each prompt, on all processes. A multiple of the rows of an
            optimizer step.
        inner_epochs (`int`, *optional*, defaults to `4`):
            How often each sample is trained on before new ones are drawn.
        teacher_mix (`float`, *optional*, defaults to `0.2`):
            a in [0, 1): tokens are drawn from `(1 - a) student + a teacher`. 0 draws from the student alone.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Of a sample.
        generation_batch_size (`int`, *optional*):
            Rows that a process samples side by side; by default those of its share of an optimizer step.

    > Policy gradient

    Args:
        cliprange (`float`, *optional*, defaults to `0.2`):
            In (0, 1): no gain from probability ratios outside of [1 - cliprange, 1 + cliprange].
        reward_scale (`float`, *optional*, defaults to `0.5`):
            Rewards `log p - log q` are divided by it.
        reward_clip (`float`, *optional*, defaults to `100.0`):
            Then cut to [-reward_clip, reward_clip]; 0 leaves them.
        gamma (`float`, *optional*, defaults to `0.95`):
            In (0, 1]: discount of a reward for each token that it lies ahead.
        length_normalised (`bool`, *optional*, defaults to `True`):
            Divide the sum of the rewards ahead by the number of tokens ahead.
        whiten (`bool`, *optional*, defaults to `True`):
            Shift and scale the advantages to mean 0 and variance 1 over all tokens of the rollout batch.
        policy_weight (`float`, *optional*, defaults to `1.0`):
            Of the policy term; 0 leaves the single-step term alone.
        single_step_weight (`float`, *optional*, defaults to `1.0`):
            Of the reverse KL divergence over the whole vocabulary at every token of a sample.

    > Text

    Args:
        lm_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the language-model loss on `text_dataset`; 1 in MiniLLM's scripts.
        lm_kd_ratio (`float`, *optional*, defaults to `0.0`):
            Share in [0, 1] of the forward KL divergence from the teacher in that loss, the cross-entropy having the
            rest; 0.5 in MiniLLM's scripts.

    > Differently

        max_loss_ratio (`float`, *optional*, defaults to `100.0`):
            Of the divergence, since the loss as a whole may have any sign; 0 stops at NaN and infinity only.

    > Fixed

        lmbda (`float`): 1: every step trains on samples.
        objective (`str`): `"reverse_kl"`; `temperature` is that of sampling, rewards and both terms.

    Raises:
        ValueError: an option is out of its range.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate."})
    lmbda: float = field(default=1.0, metadata={"help": "Fixed: every step trains on samples."})
    max_new_tokens: int = field(default=256, metadata={"help": "Largest number of tokens of a sample."})
    rollout_batch_size: int = field(
        default=256,
        metadata={"help": "Samples drawn together, on all processes; a multiple of an optimizer step's rows."},
    )
    inner_epochs: int = field(default=4, metadata={"help": "How often each sample is trained on."})
    teacher_mix: float = field(
        default=0.2, metadata={"help": "a in [0, 1): tokens are drawn from (1 - a) student + a teacher."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows that a process samples side by side; by default its share of an optimizer step."},
    )
    cliprange: float = field(default=0.2, metadata={"help": "In (0, 1): how far a probability ratio counts."})
    reward_scale: float = field(default=0.5, metadata={"help": "Rewards log p - log q are divided by it."})
    reward_clip: float = field(default=100.0, metadata={"help": "Largest size of a reward; 0: no limit."})
    gamma: float = field(default=0.95, metadata={"help": "Discount of later rewards, in (0, 1]."})
    length_normalised: bool = field(
        default=True, metadata={"help": "Divide the sum of the rewards ahead by the number of tokens ahead."}
    )
    whiten: bool = field(
        default=True, metadata={"help": "Advantages of mean 0 and variance 1 over the rollout batch's tokens."}
    )
    policy_weight: float = field(default=1.0, metadata={"help": "Weight of the policy term."})
    single_step_weight: float = field(
        default=1.0, metadata={"help": "Weight of the full-vocabulary reverse KL at every token of a sample."}
    )
    lm_coef: float = field(default=0.0, metadata={"help": "Weight of the language-model loss on text_dataset."})
    lm_kd_ratio: float = field(
        default=0.0, metadata={"help": "Share, in [0, 1], of the divergence from the teacher in that loss."}
    )

    def check(self) -> None:
        if self.teacher_cache:
            raise ValueError("teacher_cache knows nothing of new samples: leave it out and give the teacher itself.")
        if self.lmbda != 1:
            raise ValueError(f"lmbda={self.lmbda} must be 1 here, where every step trains on samples.")
        if self.objective != "reverse_kl" or self.cross_entropy_weight or self.hidden_loss_weight:
            raise ValueError(
                f"objective={self.objective!r}, cross_entropy_weight={self.cross_entropy_weight} and "
                f"hidden_loss_weight={self.hidden_loss_weight} belong to the stepwise trainer: leave them at "
                "'reverse_kl', 0 and 0. For a loss on text set lm_coef."
            )
        super().check()
        for name in ("rollout_batch_size", "inner_epochs", "max_new_tokens", "generation_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.teacher_mix < 1:
            raise ValueError(f"teacher_mix={self.teacher_mix} is outside [0, 1): 0 draws from the student alone.")
        if not 0 < self.cliprange < 1:
            raise ValueError(f"cliprange={self.cliprange} is outside (0, 1): MiniLLM uses 0.2.")
        if not self.reward_scale > 0:
            raise ValueError(f"reward_scale={self.reward_scale} must be greater than 0; 1 leaves rewards as they are.")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma} is outside (0, 1]: 1 does not discount.")
        for name in ("reward_clip", "policy_weight", "single_step_weight", "lm_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if not self.policy_weight and not self.single_step_weight:
            raise ValueError("policy_weight=0 and single_step_weight=0 leave nothing to learn; set one above 0.")
        if not 0 <= self.lm_kd_ratio <= 1:
            raise ValueError(f"lm_kd_ratio={self.lm_kd_ratio} is outside [0, 1]: 0 is the cross-entropy alone.")


__all__ = ["MiniLLMConfig"]
