"""When tensors are allocated and freed: a recording of operations that compute nothing and take no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cbd_hf.distillation.heads import decoder_layers


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parts of the memory, as far as operations allocate it.
ACTIVATIONS, COPIES, LOSS, TEACHER = "activations", "autocast_copies", "loss", "teacher_activations"
STUDENT_ROLE, TEACHER_ROLE = "student", "teacher"


@dataclass(frozen=True)
class Weights:
    """
    The parameters of a model, tied ones once.

    Args:
        numels (`tuple[int, ...]`): elements of each.
        itemsize (`int`): bytes of an element.
        units (`tuple[int, ...]`): the decoder layer that each belongs to, counted from 0; a negative number
            for what is gathered outside of them.
        uses (`tuple[tuple[int, ...], ...]`): parameters (by index) of each module that is run, in the order in which
            a step runs them, the backward pass included.
    """

    numels: tuple[int, ...]
    itemsize: int
    units: tuple[int, ...]
    uses: tuple[tuple[int, ...], ...] = ()

    @property
    def total(self) -> int:
        """Number of elements."""
        return sum(self.numels)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.total * self.itemsize


@dataclass(frozen=True)
class Event:
    """
    Something that changes what is in memory.

    Args:
        kind (`str`): `"phase"` (`name` begins), `"allocate"` and `"free"` (`key`, `size`, `name`: the part),
            `"gradient"` (of the student's parameter `key`; its bytes were allocated as `other`), `"use"` and `"used"`
            (a module of the model `name` runs, and has run).
    """

    kind: str
    name: str = ""
    key: int = -1
    size: int = 0
    other: int = -1
    members: tuple[int, ...] = ()


@dataclass
class Recording:
    """The events of a step and the weights of both models; weights are not among the events' allocations."""

    student: Weights
    teacher: Weights
    events: list[Event] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Writes down every storage that operations inside this context allocate, and when the last reference goes."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.part = ACTIVATIONS
        self._keys: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._weights: set[int] = set()
        self._next = 0
        self._running = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What autocast makes of a weight.
        copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, COPIES if copy and self.part == ACTIVATIONS else self.part)
        return result

    def know(self, tensor: torch.Tensor) -> None:
        """Take a tensor for a weight, whose storage is not written down."""
        self._weights.add(tensor.untyped_storage()._cdata)

    def _add(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._weights or address in self._keys:
            return
        key, size = self._next, storage.nbytes()
        self._next += 1
        self._keys[address] = key
        self.events.append(Event("allocate", part, key, size))

        def freed(_: Any) -> None:
            self._keys.pop(address, None)
            self._references.pop(key, None)
            if self._running:
                self.events.append(Event("free", part, key, size))

        self._references[key] = weakref.ref(storage, freed)

    @contextmanager
    def allocating(self, part: str) -> Iterator[None]:
        """A context whose allocations belong to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def phase(self, name: str) -> None:
        """A new phase of the step begins."""
        self.events.append(Event("phase", name))

    def gradient(self, index: int, parameter: torch.Tensor) -> None:
        """The gradient of a parameter is complete."""
        assert parameter.grad is not None
        key = self._keys[parameter.grad.untyped_storage()._cdata]
        self.events.append(Event("gradient", key=index, other=key))

    def use(self, role: str, members: tuple[int, ...]) -> None:
        """A module with these parameters is about to run."""
        self.events.append(Event("use", role, members=members))

    def used(self, role: str, members: tuple[int, ...]) -> None:
        """It has run."""
        self.events.append(Event("used", role, members=members))

    def stop(self) -> list[Event]:
        """The events so far; nothing is added afterwards."""
        self._running = False
        return self.events


def watch(model: PreTrainedModel, role: str, recorder: Recorder) -> Weights:
    """
    Let a recorder know a model's weights, the modules that use them, and the gradients that reach them.

    Returns:
        [`Weights`]: without `uses`.
    """
    parameters = list(model.parameters())
    numbers = {id(parameter): index for index, parameter in enumerate(parameters)}
    for tensor in (*parameters, *model.buffers()):
        recorder.know(tensor)
    units = [-1] * len(parameters)
    for layer, module in enumerate(decoder_layers(model)):
        for parameter in module.parameters():
            units[numbers[id(parameter)]] = layer
    if role == TEACHER_ROLE:  # as place_teacher divides it
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        if ends[1] is not None and ends[0].weight is not ends[1].weight:
            for unit, module in enumerate(ends, -3):
                for parameter in module.parameters():
                    units[numbers[id(parameter)]] = unit
    for module in model.modules():
        own = tuple(numbers[id(parameter)] for parameter in module.parameters(recurse=False))
        if own:
            _watch_module(module, role, own, recorder)
    for index, parameter in enumerate(parameters):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_with_index(recorder.gradient, index))
    return Weights(tuple(parameter.numel() for parameter in parameters), parameters[0].element_size(), tuple(units))


def _with_index(call: Callable[[int, torch.Tensor], None], index: int) -> Callable[[torch.Tensor], None]:
    return lambda parameter: call(index, parameter)


def _watch_module(module: nn.Module, role: str, own: tuple[int, ...], recorder: Recorder) -> None:
    module.register_forward_pre_hook(lambda *_: recorder.use(role, own))
    module.register_forward_hook(lambda *_: recorder.used(role, own))
    if role == STUDENT_ROLE:
        module.register_full_backward_pre_hook(lambda *_: recorder.use(role, own))


__all__ = [
    "ACTIVATIONS",
    "COPIES",
    "LOSS",
    "STUDENT_ROLE",
    "TEACHER",
    "TEACHER_ROLE",
    "Event",
    "Recorder",
    "Recording",
    "Weights",
    "watch",
]
