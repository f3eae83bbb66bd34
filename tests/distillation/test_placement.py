"""Where the teacher lies. With several processes: tests/distributed/test_splits.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload

from cbd_hf.distillation import sources
from cbd_hf.distillation.heads import decoder_layers
from cbd_hf.distillation.placement import choose_placement
from cbd_hf.distillation.sources import LiveTeacher

from ..models import random_model, random_tokens, tiny_config


def accelerator(zero_stage: int | None = None, fsdp: bool = False) -> Any:
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=object() if fsdp else None))


@pytest.mark.parametrize(
    ("stage", "fsdp", "expected"),
    [(None, False, "replicate"), (1, False, "replicate"), (2, False, "replicate"), (3, False, "shard")]
    + [(None, True, "shard")],
)
def test_auto(stage: int | None, fsdp: bool, expected: str) -> None:
    assert choose_placement("auto", accelerator(stage, fsdp)) == expected
    for placement in ("shard", "offload"):
        assert choose_placement(placement, accelerator(stage, fsdp)) == placement


def test_impossible_placements() -> None:
    with pytest.raises(ValueError, match="ZeRO-3"):
        choose_placement("replicate", accelerator(3))
    with pytest.raises(ValueError, match="nowhere"):
        choose_placement("nowhere", accelerator())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # gpt2 and llama have tied embeddings
def test_offloaded_teacher(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: weights on the meta device, but for the layer that runs."""
    tokens = random_tokens()
    chosen = torch.ones_like(tokens, dtype=torch.bool)
    plain = LiveTeacher(random_model(tiny_config(family)), Accelerator(cpu=True), "replicate", layers=[1])
    monkeypatch.setattr(
        sources, "place_teacher", lambda model, *_: cpu_offload(model, execution_device=torch.device("cpu"))
    )
    offloaded = LiveTeacher(random_model(tiny_config(family)), Accelerator(cpu=True), "offload", layers=[1])
    assert all(parameter.is_meta for parameter in offloaded.model.parameters())
    expected, found = (teacher.predict({"input_ids": tokens}, chosen, {}) for teacher in (plain, offloaded))
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.layers[0], expected.layers[0])
    with expected.open_head() as one, found.open_head() as other:
        assert not other.weight.is_meta
        assert torch.equal(one.weight, other.weight)
    assert all(parameter.is_meta for parameter in offloaded.model.parameters())


def test_decoder_layers_keep_their_name_under_fsdp() -> None:
    model = random_model(tiny_config("llama"))
    layers = decoder_layers(model)
    assert len(layers) == 3
    layers[0].__class__ = type("FSDPLlamaDecoderLayer", (type(layers[0]),), {})  # as fully_shard does
    assert decoder_layers(model) == layers
