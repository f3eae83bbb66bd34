"""From a config to its layout: probe, look, decide the packings, prove."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cbd_hf._loading import plain_loading
from cbd_hf.families import store
from cbd_hf.families.infer import Draft, Key, assemble_family, draft
from cbd_hf.families.packings import SCALINGS, Scaling
from cbd_hf.families.probes import Probes, changed, is_eps, probe
from cbd_hf.families.proof import (
    TOLERANCE,
    Bench,
    bench,
    depth_error,
    more_heads_keep_stream,
    permutation_error,
    random_model,
    width_error,
    without_influence,
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
        small = changed(small, _for_proof(small))
        # Depth and width differ between the anchors of one chain, their miniatures seldom do.
        shared = store.describe(small)
        if shared not in _KNOWN:
            try:
                _KNOWN[shared] = _learn_anywhere(small)
            except LayoutError as error:
                _KNOWN[shared] = error
            except Exception as error:  # an architecture unlike any that was foreseen must not be guessed at
                raise LayoutError(
                    f"{config.model_type} cannot be examined, so it is not supported "
                    f"({type(error).__name__}: {error})."
                ) from error
        found = _KNOWN[key] = _KNOWN[shared]
        if not isinstance(found, LayoutError):
            store.save(config, found[0], found[1].errors)
    known = _KNOWN[key]
    if isinstance(known, LayoutError):
        raise known
    return known


def _for_proof(small: PretrainedConfig) -> dict[str, Any]:
    """Attributes changed for the proof: one epsilon for all targets, windows shorter than the proof's tokens."""
    values: dict[str, Any] = {}
    for name, value in small.to_dict().items():
        if is_eps(name) and isinstance(value, float):
            values[name] = 1e-5  # a target's follows its width
        elif name in WINDOWS and type(value) is int and value > SHORT:
            values[name] = SHORT
    return values


def _learn_anywhere(small: PretrainedConfig) -> tuple[Family, Proof]:
    """[`_learn`] on the CPU of this process with gradients, whatever the caller has set: the proof needs them."""
    import torch

    # A ZeRO-3 launch would shard the small models.
    with plain_loading(), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        return _learn(small)


def _learn(small: PretrainedConfig) -> tuple[Family, Proof]:
    probes = None
    try:
        probes = probe(small, dimension_fields(small))
        return _prove(probes)
    except Exception as first:
        if probes is not None and probes.heads_fill_hidden:
            raise
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
        torch.default_generator.manual_seed(0)
        own = changed(small, {})
        model = AutoModelForCausalLM.from_config(own, dtype=torch.float32, attn_implementation="eager").eval()
    sketch = draft(probes, model)
    try:
        trial = bench(random_model(small, sketch.seen.norms, sketch.seen.stream_norms, torch.float64))
    except RuntimeError:  # it knows no float64
        trial = bench(random_model(small, sketch.seen.norms, sketch.seen.stream_norms, torch.float32))
    if not bool(torch.isfinite(trial.expected).all()):
        raise LayoutError(
            f"{small.model_type}: a small random model gives no finite logits, so nothing can be checked."
        )
    errors: dict[str, float] = {}
    decided, _ = _decide(sketch, trial, "ffn", {}, errors)
    decided, scaling = _decide(sketch, trial, "heads", decided, errors)
    family = assemble_family(sketch, decided, scaling)
    roles = ("hidden", "ffn") if family.alibi else ("hidden", "ffn", "kv_heads", "group")
    for name, check in (
        ("depth", lambda: depth_error(trial, family)),
        ("order", lambda: permutation_error(trial, family, roles)),
    ):
        errors[name] = check()
        _require(small, name, errors[name])
    if silent := without_influence(trial, family):
        raise LayoutError(
            f"{small.model_type}: {', '.join(silent)} cannot be checked, since a small random model computes the same "
            "without: its layout is not proved, so it is not supported."
        )
    return family, Proof(errors)


def _decide(
    sketch: Draft,
    trial: Bench,
    role: str,
    decided: dict[Key, tuple[Segment, ...]],
    errors: dict[str, float],
) -> tuple[dict[Key, tuple[Segment, ...]], Scaling]:
    """The first answer to the questions of one kind under which expansion preserves the function."""
    said = "width" if role == "heads" else role
    checks = ("ffn",) if role == "ffn" else ("heads", "hidden")
    smallest = math.inf
    size = sum(tensor.numel() for tensor in trial.tensors.values())
    left = max(4, MOST_WORK // size)
    for packings in sketch.answers(role, decided):
        others = {q.key: q.options[0] for q in sketch.questions if q.key not in packings}
        for scaling in SCALINGS if role == "heads" else SCALINGS[:1]:
            if left == 0:
                break
            left -= 1
            family = assemble_family(sketch, packings | others, scaling)
            apart = role == "heads" and more_heads_keep_stream(trial, family)
            worst = 0.0
            for name in checks[1:] if apart and scaling != SCALINGS[0] else checks:
                worst = max(worst, width_error(trial, family, name))
                if worst > TOLERANCE:
                    break
            smallest = min(smallest, worst)
            if worst <= TOLERANCE:
                errors[said] = worst
                return packings, scaling
            if scaling == SCALINGS[0] and (apart and name == "heads" or worst > HOPELESS):
                break  # no scaling mends a packing
    _require(sketch.probes.config, said, smallest, sketch.fused)
    raise AssertionError("unreachable")


MOST_WORK = 100_000_000
"""Parameters of the models of all trials of one kind together; some ten seconds."""

HOPELESS = 2.0
"""An error that no scaling mends."""

WINDOWS = (
    *("sliding_window", "attention_chunk_size", "local_attention", "window_size", "attention_window_size"),
    "index_topk",
)
SHORT = 8
"""What a token sees is less than the proof's twelve, so that what chooses it has an influence."""

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
