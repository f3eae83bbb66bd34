"""What a teacher says about the supervised positions of a batch, in full or in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Head:
    """
    How a model turns hidden states into logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Args:
        weight (`torch.Tensor`, *optional*): shape (vocab, hidden). `None`: the hidden states are the logits.
        bias (`torch.Tensor`, *optional*): shape (vocab,).
        scale (`float`, *optional*, defaults to 1.0): of the logits.
        softcap (`float`, *optional*): of the logits.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def open(self) -> AbstractContextManager[Head]:
        """A context with this head; a sharded model has one of its own, which gathers the weights."""
        return nullcontext(self)

    def to(self, device: torch.device) -> Head:
        """On another device; the same tensors if they are there already."""
        return replace(self, weight=_moved(self.weight, device), bias=_moved(self.bias, device))


@dataclass(frozen=True)
class DensePredictions:
    """
    The teacher's whole distributions, as the hidden states and the head that they come from.

    Args:
        hidden (`torch.Tensor`): any float dtype, shape (positions, teacher hidden).
        open_head (`Callable`): makes a context with the teacher's [`Head`], whole if the teacher is sharded.
        layers (`tuple[torch.Tensor, ...]`, *optional*): hidden states to match, each of shape (positions, teacher
            hidden).
    """

    hidden: torch.Tensor
    open_head: Callable[[], AbstractContextManager[Head]]
    layers: tuple[torch.Tensor, ...] = ()

    def to(self, device: torch.device) -> DensePredictions:
        """On another device, where its head is put when it is opened."""

        @contextmanager
        def opened() -> Iterator[Head]:
            with self.open_head() as head:
                yield head.to(device)

        layers = tuple(layer.to(device) for layer in self.layers)
        return DensePredictions(self.hidden.to(device), opened, layers)


@dataclass(frozen=True)
class SparsePredictions:
    """
    A part of the teacher's distributions, as a cache keeps it.

    Args:
        token_ids (`torch.Tensor`): int64, shape (positions, k).
        log_probs (`torch.Tensor`): float32, shape (positions, k), of these tokens in the softmax over the vocabulary.
        tail (`torch.Tensor`, *optional*): float32, shape (positions,), logarithm of the mass of all other tokens; for
            the k most likely tokens.
        weights (`torch.Tensor`, *optional*): float32, shape (positions, k), the share of each among the tokens that
            were sampled from the teacher; 0 where there were fewer than k.
        vocab (`int`, *optional*): entries of the teacher's softmax.
        layers (`tuple[torch.Tensor, ...]`, *optional*): as in [`DensePredictions`].
        labels (`torch.Tensor`, *optional*): float32, shape (positions,), log-probabilities of the tokens that follow.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    vocab: int | None = None
    layers: tuple[torch.Tensor, ...] = ()
    labels: torch.Tensor | None = None

    def to(self, device: torch.device) -> SparsePredictions:
        """On another device."""
        return self._each(lambda value: value.to(device))

    def rows(self, positions: slice) -> SparsePredictions:
        """Those of some positions."""
        return self._each(lambda value: value[positions])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> SparsePredictions:
        def of(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else change(value)

        return replace(
            self,
            token_ids=change(self.token_ids),
            log_probs=change(self.log_probs),
            tail=of(self.tail),
            weights=of(self.weights),
            layers=tuple(change(layer) for layer in self.layers),
            labels=of(self.labels),
        )


def _moved(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if value is None else value.to(device)


Predictions = DensePredictions | SparsePredictions

__all__ = ["DensePredictions", "Head", "Predictions", "SparsePredictions"]
