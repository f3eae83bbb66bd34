"""Learngene: some layers of the larger anchor, and random ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cbd_hf.initializers.base import Blueprint, Rows, TensorSource
from cbd_hf.initializers.stacking import check_kinds
from cbd_hf.layout import meta_model, weights_of
from cbd_hf.transforms import LayerMap


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INHERITED = 3
"""Layers that are inherited; the paper's baselines have three (arXiv 2605.07783, Table 2)."""


def auto_learngene(blueprint: Blueprint) -> TensorSource:
    """
    The larger anchor's first three layers, then random ones: Auto-Learngene (arXiv 2305.02279) as arXiv 2605.07783,
    Table 2, compares it (there 3 + 0, 2 or 4 layers of GPT2-XL, at its full width).

    Embeddings, final norm and output head are inherited too. What is inherited is cut to the target's width as in
    [`cut`]; random values are those of the target's own class. The function is not kept.

    Raises:
        ValueError: the target or the larger anchor has fewer than three layers; one of these is of another kind.
    """
    return _learngene(blueprint, "auto_learngene", range(INHERITED), range(INHERITED))


def vanilla_learngene(blueprint: Blueprint) -> TensorSource:
    """
    Random layers, then the larger anchor's last three: Vanilla-Learngene (arXiv 2106.06788) as arXiv 2605.07783,
    Table 2, compares it. Otherwise like [`auto_learngene`].

    Raises:
        ValueError: see [`auto_learngene`].
    """
    have, want = blueprint.large.source.layers, blueprint.large.target.layers
    return _learngene(blueprint, "vanilla_learngene", range(have - INHERITED, have), range(want - INHERITED, want))


def _learngene(blueprint: Blueprint, name: str, theirs: Sequence[int], ours: Sequence[int]) -> TensorSource:
    family, large = blueprint.family, blueprint.large
    for owner, layers in (("the larger anchor", large.source.layers), ("the target", large.target.layers)):
        if layers < INHERITED:
            raise ValueError(
                f"initializer={name!r} inherits {INHERITED} layers, but {owner} has {layers}: choose a config and "
                f"anchors with at least {INHERITED}, or initializer='cut'."
            )
    sources = list(large.layers.sources)
    for layer, source in zip(ours, theirs, strict=True):
        sources[layer] = source
    # Random layers are read from nowhere; theirs keep the sources that are known to be of their kind.
    layer_map = LayerMap(tuple(sources), (False,) * len(sources))
    check_kinds(blueprint, name, large, layer_map, ours)
    cut, own = replace(large, layers=layer_map), OwnWeights(blueprint)

    def inherited(name: str) -> bool:
        layer, _ = family.split(name)
        return layer is None or layer in ours

    def make(name: str, rows: Rows | None) -> torch.Tensor:
        return cut.tensor(name, rows=rows) if inherited(name) else own.tensor(name)

    def splits(name: str) -> bool:
        return inherited(name) and cut.splits_by_rows(name)

    return TensorSource(make, splits, (cut,))


class OwnWeights:
    """
    What the target's class itself would start from, one tensor at a time.

    Args:
        blueprint (`Blueprint`): of the target; its seed and the tensor's name fix the values.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self._blueprint = blueprint

    @cached_property
    def _outline(self) -> PreTrainedModel:
        return meta_model(self._blueprint.config)

    @cached_property
    def head(self) -> frozenset[str]:
        """Names of the output head's parameters; none where it is tied to the embedding."""
        head = self._outline.get_output_embeddings()
        if head is None or head.weight is self._outline.get_input_embeddings().weight:
            return frozenset()
        own = {id(parameter) for parameter in head.parameters()}
        return frozenset(name for name, weight in weights_of(self._outline).items() if id(weight) in own)

    def tensor(self, name: str) -> torch.Tensor:
        """
        A parameter's value, float32.

        Raises:
            ValueError: the class says nothing of it.
        """
        import torch
        from transformers import PreTrainedModel

        parent, _, attribute = name.rpartition(".")
        modules = [self._outline]
        for part in parent.split("."):
            modules.append(getattr(modules[-1], part))
        owner, calls = self._outline, []
        for module in modules:
            owner = module if isinstance(module, PreTrainedModel) else owner
            calls.append((owner, module))
        holder = modules[-1]
        table: dict[str, Any] = holder._parameters if attribute in holder._parameters else holder._buffers
        meta = table[attribute]
        value = torch.zeros(meta.shape, dtype=torch.float32 if meta.is_floating_point() else meta.dtype)
        if value.is_floating_point():
            value.fill_(torch.nan)
        # All others stay on the meta device, where initialising costs nothing.
        table[attribute] = torch.nn.Parameter(value, requires_grad=False) if table is holder._parameters else value
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(self._blueprint.generator(name).initial_seed())
                # The module's own rule, then those of the modules around it, as transformers does.
                for owner, module in reversed(calls):
                    owner._init_weights(module)
        finally:
            table[attribute] = meta
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ValueError(
                f"{type(self._outline).__name__} has no rule for a random {name}: choose an initializer without "
                "random parts, such as 'cut'."
            )
        return value


__all__ = ["INHERITED", "OwnWeights", "auto_learngene", "vanilla_learngene"]
