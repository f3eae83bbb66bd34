"""Training from a teacher's cache: the live teacher's gradient, without the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from cbd_hf.distillation.cache import CacheSettings, TeacherCache, build_cache
from cbd_hf.distillation.sources import CachedTeacher

from ..models import VOCAB, answers_dataset, tiny_tokenizer
from .helpers import KINDS, assert_same_gradients, make_config, make_trainer, student_model, teacher_model, train
from .test_batches import family_model


def save_teacher(directory: Path, **options: Any) -> Path:
    teacher_model(**options).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def build(directory: Path, name: str, dataset: Dataset | None = None, config: Any = None, **settings: Any) -> str:
    values = {"k": VOCAB, "dtype": "float32"} | settings
    dataset = answers_dataset() if dataset is None else dataset
    options = {"config": config, "progress": False}
    build_cache(directory / "teacher", dataset, directory / name, CacheSettings(**values), **options)
    return str(directory / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of all tokens, with hidden states, at another temperature, of few tokens and sampled."""
    directory = tmp_path_factory.mktemp("caches")
    save_teacher(directory / "teacher")
    build(directory, "whole", hidden="float32")
    build(directory, "warm", temperature=2.0)
    build(directory, "few", k=8)
    build(directory, "sampled", variant="sampled", n_samples=4000)
    save_teacher(directory / "teacher", vocab_size=VOCAB + 8)
    build(directory, "wide")
    shutil.rmtree(directory / "teacher")  # nothing here needs it again
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "forward_kl", "cross_entropy_weight": 0.3},
        {"objective": "generalized_jsd", "beta": 0.3, "temperature": 2.0},
        {"objective": "adaptive_kl"},
        {"objective": "skew_reverse_kl"},
        {"objective": "total_variation"},
        {"hidden_loss_weight": 0.5},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 6},
        {"dataloader_num_workers": 2},
    ],
)
def test_all_tokens_are_the_live_teacher(options: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """On shuffled rows, also of an incomplete batch."""
    cache = str(made / ("warm" if "temperature" in options else "whole"))
    losses, gradients, trainer = train(tmp_path, learning_rate=1e-4, **options)
    others, cached, other = train(tmp_path, learning_rate=1e-4, **{"teacher_cache": cache} | options)
    assert isinstance(other.teacher, CachedTeacher)
    assert others == pytest.approx(losses, rel=1e-4)
    for live, stored in zip(gradients[:2], cached[:2], strict=True):
        assert_same_gradients(live, stored, 1e-3)
    assert_same_gradients(gradients[0], cached[0], 1e-4)
    logs = [[entry for entry in t.state.log_history if "divergence" in entry] for t in (trainer, other)]
    for name in {"divergence", "hidden_loss"} & set(logs[0][0]):
        assert logs[1][0][name] == pytest.approx(logs[0][0][name], rel=1e-4)


def test_samples_approach_the_live_teacher(made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"objective": "forward_kl", "per_device_train_batch_size": 16}
    losses, (live,), _ = train(tmp_path, **options)
    others, (sampled,), _ = train(tmp_path, teacher_cache=str(made / "sampled"), **options)
    assert others == pytest.approx(losses, rel=0.05)
    assert_same_gradients(live, sampled, 0.2)


def test_few_tokens_train(made: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, teacher_cache=str(made / "few"), max_steps=20, lr_scheduler_type="constant")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_any_part_of_the_rows_in_any_order(made: Path, tmp_path: Path) -> None:
    part = answers_dataset().select([5, 3, 3, 11])
    found = [train(tmp_path, dataset=part, **teacher) for teacher in ({}, {"teacher_cache": str(made / "whole")})]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same_gradients(found[0][1][0], found[1][1][0], 1e-4)


def test_evaluation(made: Path, tmp_path: Path) -> None:
    part = answers_dataset().select([1, 2, 9])
    live, cached = (
        make_trainer(tmp_path, eval_dataset=part, per_device_eval_batch_size=2, **teacher).evaluate()
        for teacher in ({}, {"teacher_cache": str(made / "whole")})
    )
    assert cached["eval_loss"] == pytest.approx(live["eval_loss"], rel=1e-4)
    assert cached["eval_divergence"] == pytest.approx(live["eval_divergence"], rel=1e-4)


def test_evaluation_of_datasets_that_come_later(made: Path, tmp_path: Path) -> None:
    part = make_trainer(tmp_path).train_dataset.remove_columns("example_id").select([1, 2, 9])
    live, cached = (make_trainer(tmp_path, **teacher) for teacher in ({}, {"teacher_cache": str(made / "whole")}))
    expected = live.evaluate(part)["eval_loss"]
    assert cached.evaluate(part)["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert cached.evaluate({"late": part})["eval_late_loss"] == pytest.approx(expected, rel=1e-4)
    assert cached.predict(part).metrics["test_loss"] == pytest.approx(expected, rel=1e-4)
    foreign = make_trainer(tmp_path, answers_dataset(4, seed=5)).train_dataset
    with pytest.raises(ValueError, match="4 of 4 rows are not in the teacher cache.*`cbd cache --append true`"):
        cached.evaluate(foreign)


def test_a_cache_of_a_teacher_that_is_spread_over_devices(made: Path, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head"], "cpu")
    places |= {"model.layers.1": "disk", "model.norm": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    settings = CacheSettings(k=VOCAB, dtype="float32", hidden="float32")
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    build_cache(teacher, answers_dataset(), cache, settings, model_init_kwargs=options, progress=False)
    found, expected = (TeacherCache.from_pretrained(directory).batch([0, 3]) for directory in (cache, made / "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_prepared_rows_are_looked_up(made: Path, tmp_path: Path) -> None:
    prepared = make_trainer(tmp_path).train_dataset.remove_columns("example_id")
    options: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    losses, _, _ = train(tmp_path, dataset=prepared, teacher_cache=str(made / "whole"), **options)
    assert losses == pytest.approx(train(tmp_path)[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_packed_rows(kind: str, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    data = Dataset.from_list(KINDS[kind][0] * 3)
    options: dict[str, Any] = {"packing": True, "max_length": 32}
    cache = build(tmp_path, "cache", data, make_config(tmp_path, **options))
    found = [train(tmp_path, dataset=data, **options, **teacher) for teacher in ({}, {"teacher_cache": cache})]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert_same_gradients(found[0][1][0], found[1][1][0], 1e-4)


def test_a_teacher_with_more_padding_rows(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", vocab_size=VOCAB + 8)
    live = train(tmp_path, teacher=teacher_model(vocab_size=VOCAB + 8))
    cache = build(tmp_path, "cache", vocab_size=VOCAB)
    cached = train(tmp_path, teacher_cache=cache)
    assert cached[0] == pytest.approx(live[0], rel=1e-4)
    assert_same_gradients(live[1][0], cached[1][0], 1e-4)


def test_a_teacher_given_as_well(made: Path, tmp_path: Path) -> None:
    """Only to be compared with: it is not loaded."""
    cache = str(made / "whole")
    same, other = save_teacher(tmp_path / "same"), save_teacher(tmp_path / "other", num_key_value_heads=1)
    trainer = make_trainer(tmp_path, teacher=str(same), teacher_cache=cache)
    assert isinstance(trainer.teacher, CachedTeacher)
    with pytest.raises(ValueError, match="are not those of the teacher cache"):
        make_trainer(tmp_path, teacher=str(other), teacher_cache=cache)


def other_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    return tokenizer


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whole", {"dataset": answers_dataset(4, seed=5)}, "4 of 4 rows are not in the teacher cache"),
        ("whole", {"eval_dataset": answers_dataset(4, seed=5)}, "4 of 4 rows are not in the teacher cache"),
        ("whole", {"completion_only_loss": False}, "rows are not in the teacher cache"),
        ("whole", {"temperature": 2.0}, "temperature=2.0 of the loss is not that of the teacher cache"),
        ("sampled", {}, "objective='reverse_kl' does not go with the sampled teacher cache"),
        ("few", {"hidden_loss_weight": 1.0}, "are not in the cache"),
        ("whole", {"lmbda": 0.5}, "lmbda=0.5 trains on the student's own samples"),
        ("none", {}, "none"),
        ("whole", {"tokenizer": other_tokenizer()}, "another vocabulary"),
        ("whole", {"dataset": answers_dataset().to_iterable_dataset()}, "rows can be looked up first"),
        ("whole", {"student": lambda: student_model(vocab_size=VOCAB - 1)}, "student has vocab_size 63"),
        ("wide", {}, "The cached teacher predicts 72 tokens, but the student has 64"),
    ],
)
def test_what_does_not_suit_is_refused_before_training(
    name: str, options: dict[str, Any], message: str, made: Path, tmp_path: Path
) -> None:
    options = {key: value() if callable(value) and key == "student" else value for key, value in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_trainer(tmp_path, teacher_cache=str(made / name), **options)


def test_hidden_states_of_the_last_layer_only(made: Path, tmp_path: Path) -> None:
    two_layers = family_model("llama", 2, 1)
    options: dict[str, Any] = {"hidden_loss_weight": 1.0, "hidden_loss_layers": [1]}
    with pytest.raises(ValueError, match=r"hidden_loss_layers=\[1\] are not in the cache .*match layer 2 only"):
        make_trainer(tmp_path, student=two_layers, teacher_cache=str(made / "whole"), **options)
