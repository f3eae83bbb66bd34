"""
Which stored tensors make which of a model's and the reverse, as transformers itself loads and saves them.

transformers keeps some models in another form than their checkpoints: experts that are stored one by one are one
parameter, names differ. The rules are its own (`get_model_conversion_mapping`), and so are the functions that apply
them here; this module only decides, from names alone, which tensors belong together, so that they can be converted
when they are needed instead of all at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform


@dataclass(frozen=True)
class Recipe:
    """
    How one or several tensors are made out of others.

    Args:
        key (`str`): the name of the first tensor that is made, by which transformers knows the conversion.
        converter (`WeightConverter` or `None`): what makes them. `None` passes a single tensor on, under the name
            `key`.
        sources (`list[tuple[str, str]]`): the pattern of `converter` and the name of each tensor it needs, in
            transformers' order.
        output (`str`): the wanted one of the tensors that are made.
    """

    key: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)
    output: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the tensors that are needed."""
        return [name for _, name in self.sources]

    @property
    def row_sources(self) -> list[list[tuple[str, str]]] | None:
        """
        For each row of the result the sources that it alone is made of, if that is how it is made.

        So are experts stored one by one: each is a row of what they are stacked to, and what they are joined with is
        joined within the rows.
        """
        from transformers.core_model_loading import Concatenate, MergeModulelist

        if self.converter is None or len(self.converter.target_patterns) > 1:
            return None
        stack, *rest = self.converter.operations
        if type(stack) is not MergeModulelist or stack.dim != 0:
            return None
        if not all(type(operation) is Concatenate and operation.dim > 0 for operation in rest):
            return None
        by_pattern: dict[str, list[tuple[str, str]]] = {}
        for source in self.sources:
            by_pattern.setdefault(source[0], []).append(source)
        return [list(row) for row in zip(*by_pattern.values(), strict=True)]

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Make the tensors.

        Args:
            model (`PreTrainedModel`): the model, on any device; some operations ask it for shapes.
            tensors (`Mapping[str, torch.Tensor]`): those of `names`; on the meta device for shapes and dtypes alone.
        """
        if self.converter is None:
            return {self.key: tensors[self.sources[0][1]]}
        converter = deepcopy(self.converter)  # it collects what it converts
        for pattern, name in self.sources:
            converter.add_tensor(self.key, name, pattern, tensors[name])  # type: ignore[arg-type]
        made = converter.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _split(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = list(transforms)
    return (
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )


class _Recipes(dict[str, Recipe]):
    """Recipes by their key."""

    def __init__(self, converters: list[WeightConverter]) -> None:
        super().__init__()
        self._converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def collect(self, key: str, pattern: str | None, name: str) -> Recipe:
        """The recipe of `key`, with `name` added to what it needs."""
        recipe = self.get(key)
        if recipe is None:
            recipe = self[key] = Recipe(key, None if pattern is None else self._converters[pattern], output=key)
        elif recipe.converter is None:
            return recipe  # two names for one tensor: transformers takes the first
        recipe.sources.append((name if pattern is None else pattern, name))
        return recipe


def loading_recipes(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Recipe]:
    """
    How the tensors of `model.state_dict()` are made from a checkpoint's, for all that it has.

    A checkpoint in the model's own form is recognised too, and so is one of the backbone alone. Of tied weights it
    need hold only one.

    Args:
        model (`PreTrainedModel`): the model, on the meta device.
        stored (`Iterable[str]`): names of the checkpoint's tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _split(get_model_conversion_mapping(model))
    expected = model.state_dict()
    prefix = model.base_model_prefix
    recipes = _Recipes(converters)
    # As `convert_and_load_state_dict_in_model` does it. In this order: it is that of the experts, and renamings may
    # depend on what came before.
    for name in sorted(stored, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if key not in expected and name in expected:
            key, pattern = rename_source_key(name, [], [], prefix, expected)
        if key in expected:
            recipes.collect(key, pattern, name)
    found: dict[str, Recipe] = dict(recipes)
    for key, recipe in recipes.items():
        first, *others = recipe.converter.target_patterns if recipe.converter is not None else [key]
        for other in others:
            name = key.replace(first, other, 1)
            found.setdefault(name, replace(recipe, output=name))
    for names in tied_names(model) if len(found) < len(expected) else ():
        present = next((name for name in names if name in found), None)
        for name in names:
            if present is not None and name in expected:
                found.setdefault(name, found[present])
    return found


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """The groups of names under which the same parameter is in `model` more than once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


class SavedForm:
    """
    The form in which `save_pretrained` stores a model, one conversion at a time.

    Args:
        model (`PreTrainedModel`): the model, on the meta device. If it was loaded, the form of its checkpoint.

    Attributes:
        names (`list[str]`): what is stored of `model.state_dict()`: all but repetitions of tied weights and what the
            model's class leaves out.
        recipes (`dict[str, Recipe]`): for each of them the recipe that needs it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, apply_converters, apply_renamings, dot_natural_key
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        self._model = model
        ignored = model._keys_to_ignore_on_save or ()
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
        self.names = list(remove_tied_weights_from_state_dict(state, model))
        # From here on as `revert_weight_conversion` does it.
        transforms = getattr(model, "_weight_conversions", None)
        if transforms is None:
            transforms = get_model_conversion_mapping(model, add_legacy=False)
            transforms = [transform for transform in transforms if not isinstance(transform, PrefixChange)]
        self._renamings, converters = _split(transform.reverse_transform() for transform in transforms[::-1])
        by_key = _Recipes(converters)
        self.recipes: dict[str, Recipe] = {}
        for name in sorted(self.names, key=dot_natural_key):
            key, pattern = apply_converters(name, converters)
            if pattern is None:
                key = apply_renamings(name, self._renamings)
            self.recipes[name] = by_key.collect(key, pattern, name)

    def convert(self, recipe: Recipe, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors that one of `recipes` makes, under their stored names."""
        from transformers.core_model_loading import apply_renamings

        made = recipe.convert(self._model, tensors)
        if recipe.converter is None:
            return made
        return {apply_renamings(name, self._renamings): tensor for name, tensor in made.items()}


__all__ = ["Recipe", "SavedForm", "loading_recipes", "tied_names"]
