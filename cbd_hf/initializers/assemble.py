"""A stock model whose parameters come from a tensor source, without holding anything twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cbd_hf._loading import plain_loading
from cbd_hf.initializers.base import TensorSource


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_PROGRESS_FROM = 500_000_000  # parameters; smaller models take seconds


def assemble(config: PretrainedConfig, dtype: Any, source: TensorSource) -> PreTrainedModel:
    """
    Allocate `config`'s model without initialising it, then write its parameters in place, one at a time.

    Args:
        config (`PretrainedConfig`): the model's; its `dtype` is set.
        dtype (`torch.dtype` or `str`): of the parameters.
        source (`TensorSource`): gives each parameter's value.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with plain_loading(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    parameters = list(model.named_parameters())
    size = sum(parameter.numel() for _, parameter in parameters)
    progress = tqdm(total=size, desc="Initialising", unit="param", unit_scale=True, disable=size < _PROGRESS_FROM)
    with torch.no_grad(), progress as bar:
        for name, parameter in parameters:
            parameter.copy_(source(name))
            bar.update(parameter.numel())
    return model.eval()


__all__ = ["assemble"]
