"""Models that are spread over devices, or whose head is not known."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from cbd_hf.distillation import heads
from cbd_hf.distillation.heads import picked
from cbd_hf.distillation.placement import place_teacher
from cbd_hf.distillation.predictions import DensePredictions, Head, SparsePredictions
from cbd_hf.distillation.sources import LiveTeacher

from ..models import random_tokens
from .helpers import make_trainer, student_model, teacher_model


@pytest.fixture
def spread(tmp_path: Path) -> Any:
    """Of which half lies on the disk: `device_map` with two devices, on a machine that has one."""
    teacher_model(tie_word_embeddings=False).save_pretrained(tmp_path / "teacher")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    places |= dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], "disk")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "offload"
    )


@pytest.mark.parametrize("placement", ["auto", "replicate"])
def test_a_spread_teacher_stays_where_it_is(placement: str, spread: Any) -> None:
    accelerator, tokens = Accelerator(cpu=True), random_tokens()
    chosen = torch.ones_like(tokens, dtype=torch.bool)
    plain = LiveTeacher(teacher_model(tie_word_embeddings=False), accelerator, layers=[1])
    teacher = LiveTeacher(spread, accelerator, placement, layers=[1])
    assert teacher.model is spread and spread.lm_head.weight.is_meta
    assert not any(parameter.requires_grad for parameter in spread.parameters())
    expected, found = (source.predict({"input_ids": tokens}, chosen, {}) for source in (plain, teacher))
    assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.layers[0], expected.layers[0])
    with expected.open_head() as one, found.open_head() as other:
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("placement", ["shard", "offload"])
def test_a_spread_teacher_is_not_moved(placement: str, spread: Any) -> None:
    with pytest.raises(ValueError, match=rf"teacher_placement='{placement}' cannot move .*\(cpu, disk\)"):
        place_teacher(spread, Accelerator(cpu=True), placement)


@pytest.mark.parametrize(("processes", "stage"), [(2, None), (1, 3)])
def test_a_spread_teacher_of_several_processes(processes: int, stage: int | None) -> None:
    teacher: Any = teacher_model()
    teacher.hf_device_map = {"model": 0, "lm_head": 1}
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=None)
    accelerator: Any = SimpleNamespace(num_processes=processes, state=state)
    with pytest.raises(ValueError, match=r"device_map over several devices \(0, 1\), which only one process"):
        place_teacher(teacher, accelerator)


def test_one_device_is_not_spread() -> None:
    teacher: Any = teacher_model()
    teacher.hf_device_map = {"": "cpu"}
    assert place_teacher(teacher, Accelerator(cpu=True)) is teacher


def test_everything_goes_to_the_device_of_the_loss() -> None:
    """With the device of no data in place of a second one."""
    meta, states = torch.device("meta"), torch.randn(2, 3, 4)
    dense = DensePredictions(states[0], Head(torch.ones(5, 4), torch.ones(5), 2.0, 30.0).open, (states[1],)).to(meta)
    assert dense.hidden.is_meta and dense.layers[0].is_meta
    with dense.open_head() as head:
        assert head.weight is not None and head.weight.is_meta and head.bias is not None and head.bias.is_meta
        assert (head.scale, head.softcap) == (2.0, 30.0)
    ids, values = torch.ones(3, 2, dtype=torch.long), torch.randn(3, 2)
    sparse = SparsePredictions(ids, values, values[:, 0], None, 64, (values,)).to(meta)
    assert all(value.is_meta for value in (sparse.token_ids, sparse.log_probs, sparse.tail, *sparse.layers))  # type: ignore[union-attr]
    assert sparse.weights is None and sparse.vocab == 64
    weight = torch.ones(5, 4)
    assert Head(weight).to(torch.device("cpu")).weight is weight
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(picked(states, mask), states[mask])
    assert torch.equal(picked(states, tuple(mask.nonzero(as_tuple=True))), states[mask])
    assert picked(states.to(meta), (torch.zeros(3, dtype=torch.long),) * 2).shape == (3, 4)


def test_a_head_that_is_not_known_is_announced_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], lora_dropout=0.0)
    student = student_model(tie_word_embeddings=False)
    with caplog.at_level(logging.WARNING, logger=heads.__name__):
        make_trainer(tmp_path, student=student, peft_config=lora, max_steps=2).train()
    (record,) = [record for record in caplog.records if record.name == heads.__name__]
    assert record.message.startswith("The student's logits are computed for all positions at once")
    assert record.message.endswith("an adapter lies on its head.")


def test_a_forward_of_its_own_is_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    teacher = teacher_model()
    teacher.__class__ = type("Louder", (type(teacher),), {"forward": lambda self, **inputs: None})
    LiveTeacher(teacher, Accelerator(cpu=True))
    assert "The teacher's logits" in caplog.text and "Louder is not known to multiply" in caplog.text
