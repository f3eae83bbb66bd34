"""What the modules of a small model say about their parameters: sides of an axis, norms, who reads what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cbd_hf.layout import LayoutError, weights_of


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "embedding", "norm", "other"]
NormKind = Literal["rms", "layer"]

# Names under which parameters without a module of their own (experts) write back to the stream.
_WRITERS = ("down", "output", "w2", "wo", "o_proj", "out_proj")


@dataclass
class Observed:
    """
    What one forward of a small model showed.

    Args:
        model (`PreTrainedModel`): the model.
        owner (`dict[str, tuple[str, torch.nn.Module, str]]`): parameter -> (module's name, module, attribute).
        layer_prefix (`str`): the name of the layer list, with a trailing dot.
        shared_input (`set[str]`): projections whose very input tensor another one reads as well.
        stream_norms (`set[str]`): modules whose output is the input of a layer.
        producer (`dict[str, str]`): norm -> the projection whose output it normalises.
        consumer (`dict[str, str]`): norm -> a projection that reads its output.
        norms (`dict[str, tuple[str, float]]`): module -> (kind, gain's offset), of those that normalise.
        bare_readers (`dict[str, NormKind]`): projection -> kind of the norm without a gain whose output it reads.
        tied (`bool`): the output head is the embedding.
    """

    model: PreTrainedModel
    owner: dict[str, tuple[str, torch.nn.Module, str]]
    layer_prefix: str
    shared_input: set[str] = field(default_factory=set)
    stream_norms: set[str] = field(default_factory=set)
    producer: dict[str, str] = field(default_factory=dict)
    consumer: dict[str, str] = field(default_factory=dict)
    norms: dict[str, tuple[str, float]] = field(default_factory=dict)
    bare_readers: dict[str, NormKind] = field(default_factory=dict)
    tied: bool = False


def kind_of(module: torch.nn.Module) -> Kind:
    """How a module uses its weight."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "other"


def observe(model: PreTrainedModel, layers: int) -> Observed:
    """
    Run a small model once and look at it.

    Args:
        model (`PreTrainedModel`): float32, CPU, in evaluation mode.
        layers (`int`): its number of layers.

    Raises:
        LayoutError: it has no list of layers, or cannot be run on token ids alone.
    """
    import torch

    modules = dict(model.named_modules())
    owner = {}
    for name in weights_of(model):
        parent, _, attribute = name.rpartition(".")
        owner[name] = (parent, modules[parent], attribute)
    seen = Observed(model, owner, _layer_prefix(model, layers))
    stack = modules[seen.layer_prefix[:-1]]
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    widths: dict[str, int] = {}
    layer_inputs: set[int] = set()
    alive: list[Any] = []  # while these live, no other tensor takes their address
    handles = []

    def on_layer(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        value = args[0] if args else kwargs.get("hidden_states")
        if isinstance(value, torch.Tensor):
            alive.append(value)
            layer_inputs.add(value.data_ptr())

    for layer in stack.children():
        handles.append(layer.register_forward_pre_hook(on_layer, with_kwargs=True))
    for name, module in modules.items():
        if next(module.children(), None) is None:

            def on_leaf(module: torch.nn.Module, args: tuple, output: Any, name: str = name) -> None:
                if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                    alive.extend([args[0], output])
                    inputs[name], outputs[name] = args[0].data_ptr(), output.data_ptr()
                    widths[name] = output.shape[-1]

            handles.append(module.register_forward_hook(on_leaf))
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(6).view(1, 6) + 3, use_cache=False)
    except Exception as error:
        raise LayoutError(
            f"{model.config.model_type} cannot be run on token ids alone ({type(error).__name__}: {error}), so its "
            "layout cannot be checked."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    projections = [name for name in inputs if kind_of(modules[name]) in ("linear", "conv1d")]
    counts: dict[int, int] = {}
    for name in projections:
        counts[inputs[name]] = counts.get(inputs[name], 0) + 1
    seen.shared_input = {name for name in projections if counts[inputs[name]] > 1}
    bare = {outputs[name]: kind for name in outputs if (kind := _bare_norm(modules[name], widths[name])) is not None}
    seen.bare_readers = {name: bare[inputs[name]] for name in projections if inputs[name] in bare}
    made = {outputs[name]: name for name in projections}
    read = {inputs[name]: name for name in projections}
    for parent, module, _ in owner.values():
        if parent not in seen.norms and (norm := _norm(module)) is not None:
            seen.norms[parent] = norm
            if inputs.get(parent) in made:
                seen.producer[parent] = made[inputs[parent]]
            if outputs.get(parent) in read:
                seen.consumer[parent] = read[outputs[parent]]
    # What the last layer writes is read by no further layer, so one norm speaks for its namesakes.
    local = {name: _local(name, seen.layer_prefix) for name in seen.norms}
    writing = {local[name] for name in seen.norms if outputs.get(name) in layer_inputs}
    seen.stream_norms = {name for name in seen.norms if local[name] in writing}
    head = model.get_output_embeddings()
    seen.tied = head is not None and head.weight is model.get_input_embeddings().weight
    return seen


def _local(name: str, layer_prefix: str) -> str:
    return name.removeprefix(layer_prefix).partition(".")[2] if name.startswith(layer_prefix) else name


def writes_by_name(attribute: str) -> bool:
    """Whether a parameter that is no module's weight is an output projection, going by its name."""
    return any(word in attribute for word in _WRITERS)


def _layer_prefix(model: PreTrainedModel, layers: int) -> str:
    import torch

    found = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers
    ]
    if not found:
        raise LayoutError(f"{model.config.model_type} has no list of {layers} layers, so its depth cannot be changed.")
    return max(found)[1] + "."


def _bare_norm(module: torch.nn.Module, width: int) -> NormKind | None:
    """Kind of a module without parameters that normalises its input's last axis; `None` for any other."""
    import torch

    if next(module.parameters(), None) is not None or isinstance(module, torch.nn.Identity):
        return None
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)) * 30 + 20
    kinds: tuple[tuple[NormKind, torch.Tensor], ...] = (("rms", x), ("layer", x - x.mean(-1, keepdim=True)))
    for kind, centred in kinds:
        try:
            with torch.no_grad():
                normal = torch.allclose(module(x), centred / centred.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3)
        except Exception:  # whatever a module says that wants other arguments
            return None
        if normal:
            return kind
    return None


def _norm(module: torch.nn.Module) -> tuple[str, float] | None:
    """(kind, offset of the gain) of a module that normalises its input's last axis; `None` for any other."""
    import torch

    weight = getattr(module, "weight", None)
    if weight is None or kind_of(module) != "other" or weight.dim() not in (1, 2):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *weight.shape, generator=generator) * 30  # large, so that epsilon does not matter
    bias = getattr(module, "bias", None)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    ones = zeros | {"weight": torch.ones_like(weight)}
    try:
        with torch.no_grad():
            call = torch.func.functional_call
            once, scaled, shifted = (call(module, ones, (value,)) for value in (x, 3 * x, x + 50))
            nothing = call(module, zeros, (x,))
            if not all(isinstance(value, torch.Tensor) for value in (once, scaled, shifted, nothing)):
                return None
    except Exception:  # whatever a module says that wants other arguments
        return None
    if once.shape != x.shape or not torch.allclose(once, scaled, rtol=1e-3, atol=1e-3):
        return None
    offset = 0.0 if nothing.abs().max() < 1e-6 else 1.0
    unit = once / (1 + offset)
    if not torch.allclose(nothing, unit * offset, rtol=1e-3, atol=1e-3):
        return None
    if not torch.allclose(unit.square().mean(-1), torch.ones(()), rtol=1e-2, atol=1e-2):
        return None
    centred = torch.allclose(once, shifted, rtol=1e-2, atol=1e-2)
    if not centred and bias is not None and unit.mean(-1).abs().max() < 1e-4:
        return None
    return ("layer" if centred else "rms"), offset


__all__ = ["Kind", "Observed", "kind_of", "observe", "writes_by_name"]
