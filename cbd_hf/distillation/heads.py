"""A causal LM taken apart: the backbone that makes hidden states, and the head that makes logits of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cbd_hf._files import canonical_digest
from cbd_hf._loading import plain_loading
from cbd_hf._trl import maybe_gather_lm_head_ctx
from cbd_hf.distillation.predictions import Head
from cbd_hf.layout.miniature import miniature


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """
    Args:
        model (`nn.Module`): the causal LM itself, without an adapter's wrapper.
        backbone (`nn.Module`): `backbone(input_ids, attention_mask).last_hidden_state` is what the head reads.
        head (`nn.Module`): the module with the output matrix.
        scale (`float`): of the logits.
        softcap (`float`, *optional*): of the logits.
    """

    model: nn.Module
    backbone: nn.Module
    head: nn.Module
    scale: float
    softcap: float | None

    def head_of(self, module: Any) -> Head:
        """The head that reads from `module`'s weights as they are now."""
        return Head(module.weight, getattr(module, "bias", None), self.scale, self.softcap)

    @contextmanager
    def open_head(self) -> Iterator[Head]:
        """A context with the whole head, also of a model that is sharded or offloaded; outside of its forward."""
        module: Any = self.head
        weights: list[Any] = [module.weight, getattr(module, "bias", None)]
        with (
            maybe_gather_lm_head_ctx(*weights),
            align_module_device(module),
            torch.no_grad(),
        ):
            weight, bias = (
                value.full_tensor() if isinstance(value, DTensor) else value
                for value in (module.weight, getattr(module, "bias", None))
            )
            yield Head(weight, bias, self.scale, self.softcap)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a causal LM, also after `fully_shard` has given them classes of its own; by their class's name."""
    base: Any = unwrapped(model)
    names = set(base._no_split_modules or ())
    return [module for module in base.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def unwrapped(model: Any) -> nn.Module:
    """The model below an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_parts(model: nn.Module) -> Parts | None:
    """
    The parts of a causal LM; `None` if its logits are not known to be a head's product with hidden states.

    Scale and softcap are read from the config and proved on a very small random model of the same architecture; a
    class with another forward than transformers' own for that config has none.
    """
    base: Any = unwrapped(model)
    if _obstacle(base):
        return None
    found = _scale_and_softcap(base)
    return None if found is None else Parts(base, base.base_model, base.get_output_embeddings(), *found)


def parts_or_warning(model: nn.Module, role: str) -> Parts | None:
    """[`find_parts`], with a warning that says why `role` ("student", "teacher") has none."""
    parts = find_parts(model)
    if parts is None:
        base: Any = unwrapped(model)
        why = _obstacle(base) or (
            f"{type(base).__name__} is not known to multiply its last hidden states with its head and do no more"
        )
        logger.warning(
            f"The {role}'s logits are computed for all positions at once, which takes more memory and time: {why}."
        )
    return parts


def _obstacle(base: Any) -> str | None:
    head = base.get_output_embeddings()
    if head is None:
        return f"{type(base).__name__} does not name its head"
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        return "an adapter lies on its head"
    if not isinstance(getattr(head, "weight", None), torch.Tensor) or not head.weight.is_floating_point():
        return "the weights of its head are quantized"
    return f"{type(base).__name__} has no backbone of its own" if base.base_model is base else None


_proved: dict[str, tuple[float, float | None] | None] = {}


def _scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None] | None:
    config, forward = model.config, type(model).forward
    key = canonical_digest([type(config).__qualname__, config.to_json_string(), repr(forward)])
    if key not in _proved:
        values = _read(config)
        _proved[key] = values if _holds(config, forward, *values) else None
    return _proved[key]


def _read(config: PretrainedConfig) -> tuple[float, float | None]:
    """As TRL's `add_fused_lm_head` reads a config."""
    text: Any = config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(text, name, None)) is not None), None)
    scaling = getattr(text, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
    return 1.0 if scale is None else scale, getattr(text, "final_logit_softcapping", None)


def _holds(config: PretrainedConfig, forward: Callable[..., Any], scale: float, softcap: float | None) -> bool:
    with torch.random.fork_rng(devices=[]), plain_loading(), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)
        try:
            small = miniature(config)
            model: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            if type(model).forward is not forward:
                return False
            tokens = torch.arange(1, 7)[None]
            module = model.get_output_embeddings()
            module.weight.normal_(std=1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
            logits = model(input_ids=tokens, use_cache=False).logits
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            expected = nn.functional.linear(hidden, module.weight, getattr(module, "bias", None)) * scale
            if softcap is not None:
                expected = torch.tanh(expected / softcap) * softcap
            return torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
        except (ValueError, RuntimeError, AttributeError, TypeError, KeyError, IndexError):
            return False  # of an architecture without a miniature, or with a forward of its own kind


def picked(states: torch.Tensor, chosen: Any) -> torch.Tensor:
    """
    Entries of `states`, on its device: that of the last layers, if a model is split over devices.

    Args:
        states (`torch.Tensor`): shape (rows, length, ...).
        chosen (`torch.Tensor` or `tuple`): bool, shape (rows, length); or indices of rows and of positions.
    """
    if isinstance(chosen, tuple):
        return states[tuple(index.to(states.device) for index in chosen)]
    return states[chosen.to(states.device)]


def run_backbone(parts: Parts, inputs: dict[str, Any], layers: tuple[int, ...] = ()) -> tuple[torch.Tensor, ...]:
    """
    The last hidden state, and behind it those after each of `layers` (counted from 1; the last layer's is the last
    hidden state, with the final norm); shape (rows, length, hidden) each.
    """
    options = {"output_hidden_states": True} if any(layer < _depth(parts) for layer in layers) else {}
    outputs: Any = parts.backbone(**inputs, use_cache=False, **options)
    last = outputs.last_hidden_state
    states = [last if layer == _depth(parts) else outputs.hidden_states[layer] for layer in layers]
    return last, *states


def _depth(parts: Parts) -> int:
    config: Any = parts.model.config
    return config.get_text_config().num_hidden_layers


__all__ = ["Parts", "decoder_layers", "find_parts", "parts_or_warning", "picked", "run_backbone", "unwrapped"]
