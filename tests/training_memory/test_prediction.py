"""Predicted memory: parts worked out by hand, and how they change with the options."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from cbd_hf.layout import count_parameters
from cbd_hf.training_memory import PARTS, StageMemory, TrainingWorkload, predict_chain, predict_stage
from tests.models import tiny_config


WORKLOAD = TrainingWorkload(max_length=32, per_device_train_batch_size=2, gradient_checkpointing=False, device="cpu")
STUDENT, TEACHER = tiny_config("llama", layers=3), tiny_config("llama", layers=4, heads=6)


def predict(stage: str = "0", world_size: int = 1, **options: Any) -> StageMemory:
    workload = replace(WORKLOAD, **options)
    (memory,) = predict_stage(TEACHER, STUDENT, workload, zero_stages=[stage], world_sizes=[world_size])
    return memory


def test_one_device_by_hand() -> None:
    memory = predict()
    student, teacher = count_parameters(STUDENT), count_parameters(TEACHER)
    assert list(memory.parts) == list(PARTS) and memory.total == sum(memory.parts.values())
    assert memory.parts["student_weights"] == 4 * student and memory.parts["optimizer"] == 8 * student
    assert memory.parts["teacher_weights"] == 4 * teacher and memory.teacher_placement == "replicate"
    assert memory.parts["communication"] == memory.parts["gathered_weights"] == 0


def test_shares() -> None:
    student, teacher = count_parameters(STUDENT), count_parameters(TEACHER)
    parts = {stage: predict(stage, 4).parts for stage in ("0", "1", "2", "3", "fsdp2")}
    assert parts["0"]["communication"] == 4 * student  # DDP's buckets
    for stage in ("1", "2", "3"):  # with float32 weights of its own
        assert parts[stage]["optimizer"] == 12 * student // 4
    assert parts["1"]["student_weights"] == parts["2"]["student_weights"] == 4 * student
    assert parts["3"]["student_weights"] == parts["fsdp2"]["student_weights"] == student
    # Parameters this small are never divided in use.
    assert parts["3"]["gathered_weights"] == 4 * student
    assert parts["3"]["teacher_weights"] == teacher + 4 * teacher
    assert parts["fsdp2"]["optimizer"] == 2 * student
    assert parts["fsdp2"]["gathered_weights"] < 4 * student


def test_options() -> None:
    plain = predict()
    assert predict(per_device_train_batch_size=4).parts["activations"] > 1.8 * plain.parts["activations"]
    checkpointed = predict(gradient_checkpointing=True, per_device_train_batch_size=8)
    assert checkpointed.parts["activations"] < 0.5 * predict(per_device_train_batch_size=8).parts["activations"]
    low = predict("2", 2, dtype="bfloat16")
    assert low.parts["student_weights"] == 2 * count_parameters(STUDENT)
    assert low.parts["teacher_weights"] == 2 * count_parameters(TEACHER)
    assert predict(teacher_dtype="float16").parts["teacher_weights"] == low.parts["teacher_weights"]
    # The trainer on a CPU runs 2,048 tokens at a time; then gradients of the first pass are there.
    split = predict(per_device_train_batch_size=128)
    assert split.parts["gradients"] >= 4 * count_parameters(STUDENT)
    assert split.parts["activations"] == predict(per_device_train_batch_size=64).parts["activations"]
    # A GPU's buffers count before they are written, and an offloaded teacher has one module there.
    assert predict("3", 2, device="cuda").parts["communication"] == 4 * 500_000_000
    offloaded = predict(device="cuda", teacher_placement="offload").parts["teacher_weights"]
    assert offloaded <= 4 * TEACHER.vocab_size * TEACHER.hidden_size


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_chain(family: str) -> None:
    configs = {str(heads): tiny_config(family, layers=heads, heads=heads) for heads in (6, 4, 2)}
    memories = predict_chain(configs, WORKLOAD, zero_stages=["0", "3"], world_sizes=[1, 2])
    assert [(m.teacher, m.student, m.world_size, m.zero_stage) for m in memories] == [
        (*names, size, stage) for names in (("6", "4"), ("4", "2")) for size in (1, 2) for stage in ("0", "3")
    ]
    assert [StageMemory(**json.loads(json.dumps(asdict(memory)))) for memory in memories] == memories


def test_refused() -> None:
    for name, value in (("dtype", "int8"), ("device", "tpu"), ("teacher_placement", "x"), ("teacher_dtype", "int4")):
        with pytest.raises(ValueError, match=f"{name}='{value}' is unknown; choose one of"):
            TrainingWorkload(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length=1 must be a whole number of at least 2"):
        TrainingWorkload(max_length=1)
    with pytest.raises(ValueError, match="zero_stage='4' is unknown; choose one or several of 0, 1, 2, 3, fsdp2"):
        predict("4")
    with pytest.raises(ValueError, match="world_size=0 must be"):
        predict(world_size=0)
    with pytest.raises(ValueError, match="not possible under ZeRO-3"):
        predict("3", 2, teacher_placement="replicate")
    with pytest.raises(ValueError, match="a teacher and a student, but there is only one"):
        predict_chain({"one": STUDENT})
    learned = {str(heads): tiny_config("gpt2", heads=heads) for heads in (4, 2)}
    with pytest.raises(ValueError, match="max_length=65 is longer than the 64 learned positions"):
        predict_chain(learned, replace(WORKLOAD, max_length=65))
