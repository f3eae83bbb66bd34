"""From a config to its layout: probe, look, decide the packings, prove."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbd_hf.families import store
from cbd_hf.families.infer import Draft, Key, assemble_family, draft
from cbd_hf.families.packings import WIDTH_POWERS
from cbd_hf.families.probes import Probes, changed, probe
from cbd_hf.families.proof import (
    TOLERANCE,
    Bench,
    bench,
    depth_error,
    permutation_error,
    random_model,
    width_error,
)
from cbd_hf.layout import Family, LayoutError, Segment
from cbd_hf.layout.miniature import dimension_fields, miniature


if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Proof:
    """
    What [`learn`] measured: errors of the logits in units of their standard deviation.

    Args:
        errors (`dict[str, float]`): by what was changed.
    """

    errors: dict[str, float]

    @property
    def largest(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values())


_KNOWN: dict[str, tuple[Family, Proof] | LayoutError] = {}


def get_family(config: PretrainedConfig) -> Family:
    """
    The layout of `config`'s architecture, learned from the architecture itself and proved on a small random model.

    The answer for a config is kept for the life of the process.

    Raises:
        LayoutError: the architecture cannot be resized exactly, or its packing is unknown; says which tensor and what
            to declare.
    """
    return learn(config)[0]


def learn(config: PretrainedConfig) -> tuple[Family, Proof]:
    """[`get_family`], with the errors that the proof measured."""
    key = store.describe(config)
    if key not in _KNOWN and (stored := store.load(config)) is not None:
        _KNOWN[key] = stored[0], Proof(stored[1])
    if key not in _KNOWN:
        try:
            small = miniature(config)
        except LayoutError:
            raise
        except ValueError as error:
            raise LayoutError(str(error)) from error
        # Depth and width differ between the anchors of one chain, their miniatures seldom do.
        shared = store.describe(small)
        if shared not in _KNOWN:
            try:
                _KNOWN[shared] = _learn(small)
            except LayoutError as error:
                _KNOWN[shared] = error
            except Exception as error:  # an architecture unlike any that was foreseen must not be guessed at
                _KNOWN[shared] = LayoutError(
                    f"{config.model_type} cannot be examined, so it is not supported "
                    f"({type(error).__name__}: {error})."
                )
        found = _KNOWN[key] = _KNOWN[shared]
        if not isinstance(found, LayoutError):
            store.save(config, found[0], found[1].errors)
    known = _KNOWN[key]
    if isinstance(known, LayoutError):
        raise known
    return known


def _learn(small: PretrainedConfig) -> tuple[Family, Proof]:
    try:
        return _prove(probe(small, dimension_fields(small)))
    except Exception as first:
        # Some classes take any head_dim and then fail to run unless heads fill the hidden size.
        try:
            return _prove(probe(small, dimension_fields(small), filled=True))
        except Exception:
            raise first from None


def _prove(probes: Probes) -> tuple[Family, Proof]:
    import torch
    from transformers import AutoModelForCausalLM

    small = probes.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = changed(small, {})
        model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, attn_implementation="eager").eval()
    sketch = draft(probes, model)
    trial = bench(random_model(small, sketch.seen.norms, sketch.seen.stream_norms))
    if not bool(torch.isfinite(trial.expected).all()):
        raise LayoutError(
            f"{small.model_type}: a small random model gives no finite logits, so nothing can be checked."
        )
    errors: dict[str, float] = {}
    decided, _ = _decide(sketch, trial, "ffn", {}, (0.0,), errors)
    decided, power = _decide(sketch, trial, "heads", decided, WIDTH_POWERS, errors)
    family = assemble_family(sketch, decided, power)
    roles = ("hidden", "ffn") if family.alibi else ("hidden", "ffn", "kv_heads", "group")
    for name, check in (
        ("depth", lambda: depth_error(trial, family)),
        ("order", lambda: permutation_error(trial, family, roles)),
    ):
        errors[name] = check()
        _require(small, name, errors[name])
    return family, Proof(errors)


def _decide(
    sketch: Draft,
    trial: Bench,
    role: str,
    decided: dict[Key, tuple[Segment, ...]],
    powers: tuple[float, ...],
    errors: dict[str, float],
) -> tuple[dict[Key, tuple[Segment, ...]], float]:
    """The first answer to the questions of one kind under which expansion preserves the function."""
    said = "width" if role == "heads" else role
    smallest = math.inf
    for power in powers:
        for packings in sketch.answers(role, decided):
            others = {q.key: q.options[0] for q in sketch.questions if q.key not in packings}
            family = assemble_family(sketch, packings | others, power)
            checked = ("ffn",) if role == "ffn" else ("heads", "hidden")
            worst = max(width_error(trial, family, name) for name in checked)
            smallest = min(smallest, worst)
            if worst <= TOLERANCE:
                errors[said] = worst
                return packings, power
    names = sorted({question.subject for question in sketch.questions if question.role == role})
    _require(sketch.probes.config, said, smallest, names)
    raise AssertionError("unreachable")


_SAID = {
    "ffn": "more FFN units",
    "width": "more heads or a wider stream",
    "depth": "inserted layers with zero outputs",
    "order": "permuted channels, heads and units",
}


def _require(config: PretrainedConfig, what: str, error: float, packed: list[str] | None = None) -> None:
    if error <= TOLERANCE:  # not for NaN
        return
    hint = (
        f" Packed tensors whose order may be unknown: {', '.join(packed)}; declare it in PACKINGS of "
        "cbd_hf/families/packings.py."
        if packed
        else ""
    )
    raise LayoutError(
        f"{config.model_type} cannot be resized exactly: with {_SAID[what]} a small random model of it computes "
        f"something else (logits differ by {error:.2g} of their deviation), so its layout is not understood.{hint}"
    )


__all__ = ["Proof", "get_family", "learn"]
