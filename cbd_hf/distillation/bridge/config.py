"""Options of bridge distillation."""

from dataclasses import dataclass, field

from cbd_hf.data.columns import SOURCE_PROMPTS
from cbd_hf.distillation.bridge.objectives import METHODS, SpanObjective
from cbd_hf.distillation.config import StepwiseDistillationConfig


SEQUENCE = "sequence"


@dataclass
class BridgeDistillationConfig(StepwiseDistillationConfig):
    """
    Options of [`BridgeDistillationTrainer`]: those of [`StepwiseDistillationConfig`], with the changes below. What is
    said there of the teacher is true of the source.

    > The loss

    Args:
        method (`str`, *optional*, defaults to `"overlap_kl"`):
            What is compared over spans: `"overlap_kl"` (then `objective` counts), `"alm"` (then `alm_temperature`
            counts), `"uld"` or `"mined"` (then `objective` counts); see [`SpanObjective`]. `"sequence"`, the paper's
            way (Eq. 2), compares nothing: the bridge is trained by cross-entropy on the source's answers, by `cbd
            bridge` or a recipe.
        objective (`str`, *optional*, defaults to `"forward_kl"`):
            Divergence of `"overlap_kl"` and `"mined"`.
        alm_temperature (`float`, *optional*, defaults to `100.0`):
            Of `"alm"`.
        alm_debias (`bool`, *optional*, defaults to `True`):
            Of `"alm"`: compare likelihoods of texts that end where something new begins, as published; see
            [`SpanObjective`].
        alm_bias_threshold (`float`, *optional*, defaults to `0.1`):
            Of `alm_debias`: spans are joined until the source expects an end with more than this probability.
        uld_tokens (`int`, *optional*, defaults to `0`):
            Of `"uld"`: compare the largest probabilities only, so many; 0: all, whose sorting takes long.
        cross_entropy_weight (`float`, *optional*, defaults to `0.5`):
            Share w in [0, 1] of the cross-entropy with the data: loss = (1 - w) * method + w * cross-entropy, both
            summed and divided by the student's supervised tokens.

    > The rows

    Args:
        source_prompt (`str`, *optional*, defaults to `"same"`):
            What the source reads in place of `prompt`: the `"same"` text, or its `"chat"` template with the prompt as
            the user's message.
        source_max_length (`int`, *optional*):
            Tokens of a row on the source's side; by default twice `max_length`, or the source's positions if these are
            fewer. Both sides are cut at the same byte.
        max_length (`int`, *optional*, defaults to 1024):
            Tokens of a row on the student's side. 1024 and `None` are lowered to the student's positions; any other
            value above them is an error.
        chat_template_path (`str`, *optional*):
            A `.jinja` file, for the student.

    > Fixed

        lmbda (`float`): 0: rows are the dataset's.
        packing, padding_free (`bool`): `False`.

    Raises:
        ValueError: an option is out of its range.
    """

    method: str = field(
        default="overlap_kl",
        metadata={
            "help": "What is compared over spans of the same bytes: overlap_kl (uses objective), alm (uses "
            "alm_temperature), uld (uses uld_tokens), mined (uses objective); or sequence, the paper's: nothing is "
            "compared, and the source's answers are the data.",
            "choices": sorted([*METHODS, SEQUENCE]),
        },
    )
    objective: str = field(
        default="forward_kl", metadata={"help": "Divergence of overlap_kl and mined; as in stepwise distillation."}
    )
    alm_temperature: float = field(default=100.0, metadata={"help": "Temperature of alm, above 0."})
    alm_debias: bool = field(
        default=True,
        metadata={"help": "Of alm: compare likelihoods of texts that end where something new begins, as published."},
    )
    alm_bias_threshold: float = field(
        default=0.1,
        metadata={
            "help": "Of alm_debias: join spans until the source expects an end with more than this probability."
        },
    )
    uld_tokens: int = field(
        default=0, metadata={"help": "Of uld: compare the largest probabilities only, so many; 0: all."}
    )
    cross_entropy_weight: float = field(
        default=0.5, metadata={"help": "Share in [0, 1] of the cross-entropy with the data; the method has the rest."}
    )
    source_prompt: str = field(
        default="same",
        metadata={
            "help": "What the source reads in place of `prompt`: the same text, or its chat template with the prompt "
            "as the user's message.",
            "choices": list(SOURCE_PROMPTS),
        },
    )
    source_max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a row on the source's side; by default twice max_length, or its positions."},
    )

    def check(self) -> None:
        super().check()
        if self.method != SEQUENCE:
            self.make_span_objective()
        if self.lmbda:
            raise ValueError(f"lmbda={self.lmbda} is not possible with a bridge, whose rows are the dataset's: set 0.")
        if self.packing or self.padding_free:
            raise ValueError("packing and padding_free are not possible with a bridge: set both to False.")
        if self.source_prompt not in SOURCE_PROMPTS:
            raise ValueError(f"source_prompt={self.source_prompt!r} is unknown; choose one of {SOURCE_PROMPTS}.")
        if self.source_max_length is not None and self.source_max_length < 2:
            raise ValueError(f"source_max_length={self.source_max_length} must be at least 2.")
        if self.cross_entropy_weight == 1:
            raise ValueError(
                "cross_entropy_weight=1 would not use the source: train with SFTTrainer, or set it below 1."
            )
        if self.teacher_cache and self.method == "uld" and not self.uld_tokens:
            raise ValueError(
                "method='uld' compares whole distributions, of which teacher_cache has the largest probabilities: set "
                "uld_tokens to at most the k of the cache, or leave the cache out."
            )

    def make_span_objective(self) -> SpanObjective:
        """The options of the loss by themselves."""
        return SpanObjective(
            self.method,
            self.make_objective(),
            self.alm_temperature,
            self.uld_tokens,
            self.alm_debias,
            self.alm_bias_threshold,
        )


__all__ = ["SEQUENCE", "BridgeDistillationConfig"]
