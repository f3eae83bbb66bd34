"""Facts about an architecture that need no weights: the model built on the meta device from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbd_hf._loading import plain_loading


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The `AutoModelForCausalLM` of `config` on the meta device: shapes and names, no memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with plain_loading(), no_init_weights(), torch.device("meta"):
        # A copy: from_config writes the attention implementation and dtype into the config it is given.
        model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), trust_remote_code=False)
    model.tie_weights()
    return model


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Name -> tensor of everything a checkpoint holds: the parameters, a tied one once, and persistent buffers (such as
    the expert biases that DeepSeek-V3 learns without a gradient).
    """
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


def weight_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of [`weights_of`] `config`'s model."""
    return {name: tuple(tensor.shape) for name, tensor in weights_of(meta_model(config)).items()}


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `config`'s model, a tied weight once, under its first name."""
    return {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}


def count_parameters(config: PretrainedConfig) -> int:
    """Exact number of parameters of `config`'s model, tied weights counted once."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


__all__ = ["count_parameters", "meta_model", "parameter_shapes", "weight_shapes", "weights_of"]
