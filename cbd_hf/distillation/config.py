"""Options of stepwise distillation."""

from dataclasses import dataclass, field

import torch

from cbd_hf._trl import GKDConfig
from cbd_hf.distillation.objectives import DIVERGENCES, Objective
from cbd_hf.distillation.placement import PLACEMENTS


@dataclass
class StepwiseDistillationConfig(GKDConfig):
    """
    Options of [`StepwiseDistillationTrainer`]: those of `trl.SFTConfig` and `GKDConfig`, with the changes below.

    > What differs from `GKDConfig`

    Args:
        objective (`str`, *optional*, defaults to `"reverse_kl"`):
            `"reverse_kl"` (the paper's Eq. 1), `"forward_kl"`, `"generalized_jsd"` (then `beta` counts),
            `"skew_forward_kl"` or `"skew_reverse_kl"` (then `skew` counts), `"adaptive_kl"` (then
            `adaptive_head_mass` counts) or `"total_variation"`.
        skew (`float`, *optional*, defaults to `0.1`):
            Share, in [0, 1), of a distribution itself in the mixture that it is compared with.
        adaptive_head_mass (`float`, *optional*, defaults to `0.5`):
            Mass, in (0, 1), of the teacher's most likely tokens on which adaptive KL takes the forward divergence.
        hidden_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the distance of hidden states, through a learned projection, added to the loss: the squared
            difference per supervised token, mean over channels and layers.
        hidden_loss_layers (`list[int]`, *optional*):
            Student's layers, counted from 1, matched to those of the teacher at the same relative depth; by default
            the last.
        cross_entropy_weight (`float`, *optional*, defaults to `0.0`):
            Share w in [0, 1] of the cross-entropy with the data: loss = (1 - w) * divergence + w * cross-entropy.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of teacher and student in the loss, and of on-policy sampling.
        lmbda (`float`, *optional*, defaults to `0.0`):
            Share of optimizer steps on the student's own samples; 0 trains on the dataset alone. Drawn once per
            global batch, alike on all processes.
        max_prompt_length (`int`, *optional*, defaults to `256`):
            Tokens of a prompt kept (from its end) for on-policy sampling.
        teacher_placement (`str`, *optional*, defaults to `"auto"`):
            `"replicate"`, `"shard"` or `"offload"`: see [`place_teacher`]. `"auto"` shards where the student's weights
            are sharded (ZeRO-3, FSDP) and else replicates.
        teacher_dtype (`str`, *optional*):
            `"float32"`, `"bfloat16"`, `"float16"` or `"auto"` (as stored). By default the type that the student
            computes in; in float32 on a device other than the CPU as stored. The default is for a teacher given by
            path or Hub id: a model stays as it is, unless this is set, and is then converted itself, in place.
        teacher_cache (`str`, *optional*):
            Directory that `cbd cache` has written. The teacher is not loaded.
        sort_steps_by_length (`bool`, *optional*, defaults to `True`):
            Sort the rows of an optimizer step by length before they are split into micro-batches. Gradient and loss
            stay the same; there is less padding.
        tokens_per_pass (`int`, *optional*):
            Run a micro-batch through the models in parts of at most so many positions. Gradient and loss stay the
            same; activations take less memory. 0: at once. By default 2,048 on a CPU, whose caches then hold them, and
            at once elsewhere and where weights or gradients are sharded (DeepSpeed, FSDP).
        compile_layers (`bool`, *optional*, defaults to `False`):
            `torch.compile` the decoder layers of student and teacher.
        max_loss_ratio (`float`, *optional*, defaults to `100.0`):
            Stop when a step's loss is so many times the median of the last ones; 0 stops at NaN and infinity only.
        completion_only_loss (`bool`, *optional*):
            `None` supervises completions and assistant turns where the dataset has them and every token of plain
            text; `False` supervises every token.
        bf16 (`bool`, *optional*):
            By default on where the accelerator supports it, and off on a CPU.

    > Fixed so that the gradient does not depend on how a batch is split

        average_tokens_across_devices (`bool`): must stay `True`.

    > Not part of this loss

        router_aux_loss_coef (`float`, *optional*): left at `None`, or 0. Experts learn from the distillation alone.

    Raises:
        ValueError: an option is out of its range.
    """

    objective: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence to minimise: reverse_kl (the paper's), forward_kl, generalized_jsd (uses beta), "
            "skew_forward_kl, skew_reverse_kl (use skew), adaptive_kl (uses adaptive_head_mass), total_variation.",
            "choices": sorted(DIVERGENCES),
        },
    )
    skew: float = field(
        default=0.1,
        metadata={"help": "Share, in [0, 1), of a distribution itself in the mixture of the skew divergences."},
    )
    adaptive_head_mass: float = field(
        default=0.5,
        metadata={"help": "Mass, in (0, 1), of the teacher's likeliest tokens, for adaptive_kl."},
    )
    hidden_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance of hidden states, through a learned projection; 0: none."},
    )
    hidden_loss_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Student's layers whose hidden states are matched, counted from 1; by default the last."},
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
    teacher_placement: str = field(
        default="auto",
        metadata={
            "help": "Where the teacher lies: replicate (whole on every device), shard (a share on each), offload (in "
            "the CPU's memory, a layer at a time on the device), auto (shard under ZeRO-3 and FSDP, else replicate).",
            "choices": list(PLACEMENTS),
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16, float16 or auto (as stored); by default what the student computes in."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Directory written by `cbd cache`; the teacher itself is then not needed."},
    )
    sort_steps_by_length: bool = field(
        default=True,
        metadata={"help": "Sort each optimizer step's rows by length: same gradient, less padding."},
    )
    tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "Run a micro-batch in parts of at most so many positions: same gradient, less memory. 0: at once; "
            "by default 2048 on a CPU."
        },
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "torch.compile the decoder layers of student and teacher."}
    )
    max_loss_ratio: float = field(
        default=100.0,
        metadata={"help": "Stop when a step's loss is so many times the median of the last; 0: only at NaN."},
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
        self.make_objective()
        if self.hidden_loss_weight < 0:
            raise ValueError(f"hidden_loss_weight={self.hidden_loss_weight} must be at least 0; 0 leaves it out.")
        if self.hidden_loss_layers is not None and not self.hidden_loss_weight:
            raise ValueError("hidden_loss_layers has no effect without hidden_loss_weight; set it above 0.")
        if self.teacher_placement not in PLACEMENTS:
            raise ValueError(f"teacher_placement={self.teacher_placement!r} is unknown; choose one of {PLACEMENTS}.")
        if self.teacher_dtype not in (None, "auto", *_DTYPES):
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r} is unknown; choose auto or one of {_DTYPES}.")
        if self.teacher_cache and self.lmbda:
            raise ValueError(
                f"lmbda={self.lmbda} trains on the student's own samples, of which teacher_cache knows nothing: set "
                "lmbda=0, or leave teacher_cache out and give the teacher."
            )
        if self.tokens_per_pass is not None and self.tokens_per_pass < 0:
            raise ValueError(f"tokens_per_pass={self.tokens_per_pass} must be at least 1, or 0 to run all at once.")
        if self.max_loss_ratio and not self.max_loss_ratio > 1:
            raise ValueError(f"max_loss_ratio={self.max_loss_ratio} must be above 1, or 0 to stop at NaN only.")
        if self.torch_compile:
            raise ValueError("torch_compile=True compiles a forward that is not used here: set compile_layers=True.")
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
        if self.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: the load-balancing loss of experts is not part of "
                "this loss, so that it would have no effect; leave it out."
            )
        if self.seq_kd:
            raise ValueError(
                "seq_kd=True is not a stepwise objective: the paper uses sequence-level distillation for the bridge. "
                "Generate the teacher's answers once and train on them with cross_entropy_weight=1."
            )

    def make_objective(self) -> Objective:
        """The options of the loss by themselves."""
        return Objective(
            self.objective,
            beta=self.beta,
            skew=self.skew,
            head_mass=self.adaptive_head_mass,
            temperature=self.temperature,
            cross_entropy_weight=self.cross_entropy_weight,
        )

    def teacher_torch_dtype(self) -> torch.dtype | str:
        """`teacher_dtype` with its default resolved."""
        if self.teacher_dtype is not None:
            return "auto" if self.teacher_dtype == "auto" else getattr(torch, self.teacher_dtype)
        if self.bf16 or self.fp16:
            return torch.bfloat16 if self.bf16 else torch.float16
        return torch.float32 if self.use_cpu else "auto"


_DTYPES = ("float32", "bfloat16", "float16")

__all__ = ["StepwiseDistillationConfig"]
