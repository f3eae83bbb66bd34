"""Students of other classes and with quantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from cbd_hf.distillation.anchors import write_anchor

from ..models import logits, tiny_config
from .helpers import make_trainer, student_model


class Shifted(LlamaForCausalLM):
    """Not what the auto classes make of its config."""

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.extra = nn.Linear(4, 4)
        self.post_init()


def test_an_anchor_is_of_the_students_own_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Shifted(tiny_config("llama", layers=1))
    trainer = make_trainer(tmp_path, student=student)
    trainer.train()
    trainer.save_anchor(tmp_path / "anchor")
    saved = Shifted.from_pretrained(tmp_path / "anchor")
    assert torch.equal(saved.extra.weight, student.extra.weight)
    assert torch.equal(logits(saved), logits(student))


def test_the_class_that_fully_shard_makes_is_not_built(tmp_path: Path) -> None:
    student = student_model()
    student.__class__ = type("FSDPLlamaForCausalLM", (FSDPModule, LlamaForCausalLM), {})
    state = {name: value.detach().clone() for name, value in student.state_dict().items()}
    write_anchor(student, state, tmp_path)
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(saved), logits(student_model()))
    assert saved.config.architectures == ["LlamaForCausalLM"]


def quantized() -> PreTrainedModel:
    student = student_model()
    student.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return student


def test_a_quantized_student_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student's weights are quantized \(quantization_config\)"):
        make_trainer(tmp_path, student=quantized())
