"""What of a recipe must stay the same for a build to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from cbd_hf import StepwiseDistillationConfig
from cbd_hf.distillation.answers import AnswersSettings
from cbd_hf.distillation.options import typed_options
from cbd_hf.distillation.recipe import BuildArguments, check_recipe, differences, recipe_record, what_is_learnt

from .cache import helpers as cache_helpers


ANCHORS: list[dict[str, Any]] = [
    {"name": "mid", "num_hidden_layers": 4, "training": {"per_device_train_batch_size": 4}},
    {"name": "small", "num_hidden_layers": 3, "supervised": {"max_steps": 5, "gradient_accumulation_steps": 3}},
]


def record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 1, anchors: Any = ANCHORS, **options: Any
) -> dict[str, Any]:
    monkeypatch.setattr(StepwiseDistillationConfig, "world_size", processes)
    values: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2} | options
    training = StepwiseDistillationConfig(output_dir=str(tmp_path), report_to="none", **values)
    args = BuildArguments(source="s", dataset="d", anchors=anchors, supervised={"max_steps": 1})
    return recipe_record(args, training, "source", "data")


def test_rows_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(tmp_path, monkeypatch)
    assert one["rows_per_step"] == {
        "supervised": 16,
        "mid": 8,
        "mid/supervised": 16,
        "small": 16,
        "small/supervised": 24,
    }
    assert ANCHORS[0]["training"] == {"per_device_train_batch_size": 4}  # the recipe itself is not changed
    lines = differences(one, record(tmp_path, monkeypatch, processes=2))
    assert "rows_per_step.mid: was 8, is 16" in lines and len(lines) == 5


def test_the_same_rows_may_be_split_in_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(tmp_path, monkeypatch)
    anchors = [ANCHORS[0] | {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}}]
    anchors += [ANCHORS[1] | {"supervised": {"max_steps": 5, "gradient_accumulation_steps": 3}}]
    two = record(tmp_path, monkeypatch, 2, anchors, per_device_train_batch_size=4)
    assert differences(one, two) == []
    three = record(tmp_path, monkeypatch, 2, anchors, per_device_train_batch_size=4, learning_rate=1e-3)
    assert [line.split(":")[0] for line in differences(one, three)] == ["training.learning_rate"]


def test_what_is_not_learnt_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {
        "compile_layers": True,
        "gradient_checkpointing": False,
        "max_loss_ratio": 0.0,
        "save_steps": 3,
        "sort_steps_by_length": False,
        "teacher_placement": "offload",
        "tokens_per_pass": 64,
    }
    one = record(tmp_path, monkeypatch)
    assert differences(one, record(tmp_path, monkeypatch, **changes)) == []
    anchors = [ANCHORS[0] | {"training": ANCHORS[0]["training"] | changes}, *ANCHORS[1:]]
    assert differences(one, record(tmp_path, monkeypatch, anchors=anchors)) == []
    # A build that was begun before they were left out of the record.
    older = one | {"training": one["training"] | {"max_loss_ratio": 7.0}}
    assert differences(what_is_learnt(older), one) == []


def cached(directory: Path, **options: Any) -> Path:
    cache_helpers.build(cache_helpers.save_teacher(directory / "teacher"), directory / "cache", **options)
    return directory / "cache"


def test_a_cache_belongs_to_one_stage(tmp_path: Path) -> None:
    anchors = [{"name": "mid", "num_hidden_layers": 4}, {"name": "small", "num_hidden_layers": 3}]
    cache = str(cached(tmp_path))

    def check(count: int = 2, own: bool = False, supervised: Any = None, **options: Any) -> None:
        first = anchors[0] | ({"training": {"teacher_cache": cache} | options} if own else {})
        shared = {} if own else {"teacher_cache": cache} | options
        training = StepwiseDistillationConfig(output_dir=str(tmp_path), report_to="none", **shared)
        args = BuildArguments("s", "d", anchors=[first, *anchors[1:]][:count], supervised=supervised)
        check_recipe(args, training)

    check(own=True)
    check(count=1)
    with pytest.raises(ValueError, match="each of the 2 stages has its own: give it in the `training`"):
        check()
    with pytest.raises(ValueError, match="`supervised` trains the source first"):
        check(own=True, supervised={"max_steps": 1})
    with pytest.raises(ValueError, match=r"temperature=2\.0 of the loss"):
        check(own=True, temperature=2.0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check(count=1, teacher_cache=str(tmp_path / "nowhere"))


def test_text_becomes_the_number_that_the_field_has() -> None:
    made = typed_options(AnswersSettings, {"n": "2", "seed": "1e2", "temperature": "1", "engine": "vllm"}, "answers")
    assert made == {"n": 2, "seed": 100, "temperature": 1.0, "engine": "vllm"}
    assert [type(value) for value in made.values()] == [int, int, float, str]
    made = typed_options(SFTConfig, {"learning_rate": "2e-4", "warmup_steps": "0.1", "max_length": "12"}, "supervised")
    assert made == {"learning_rate": 2e-4, "warmup_steps": 0.1, "max_length": 12}
    with pytest.raises(ValueError, match="`answers`: n is '1.5', but must be a whole number"):
        typed_options(AnswersSettings, {"n": "1.5"}, "answers")
    with pytest.raises(ValueError, match="`answers`: top_p is 'most', but must be a number"):
        typed_options(AnswersSettings, {"top_p": "most"}, "answers")


def test_how_a_source_runs_may_change() -> None:
    def answers(**options: Any) -> dict[str, Any]:
        record = {"supervised": None, "training": {}, "anchors": [], "bridge": {"answers": {"n": 2} | options}}
        return what_is_learnt(record)

    assert answers() == answers(batch_size=4, model_init_kwargs={"device_map": "auto"})
    lines = differences(answers(), answers(dtype="bfloat16"))
    assert lines == ["bridge.answers.dtype: was None, is 'bfloat16'"]
