"""Training from a cache of what a source says: the live source's gradient, without the source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from cbd_hf.distillation.bridge.source_cache import SourceCache, source_rows
from cbd_hf.distillation.cache import CacheSettings, TeacherCache, build_cache
from cbd_hf.distillation.sources import CachedTeacher
from cbd_hf.tokenization.collator import BridgeDataCollator

from ..helpers import assert_same_gradients
from .helpers import make_dataset, make_trainer, source_model, source_tokenizer, student_tokenizer, train


ALL = source_model().config.vocab_size


def prepared(rows: int = 12) -> Dataset:
    return Dataset.from_dict(
        BridgeDataCollator(student_tokenizer(), source_tokenizer()).encode(list(make_dataset(rows=rows)))
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of all tokens, at another temperature, of few tokens, sampled, and without labels."""
    directory = tmp_path_factory.mktemp("caches")
    source_model().save_pretrained(directory / "source")
    source_tokenizer().save_pretrained(directory / "source")
    rows = source_rows(prepared())
    for name, settings in {
        "whole": CacheSettings(k=ALL, dtype="float32", hidden="float32", labels=True),
        "warm": CacheSettings(k=ALL, dtype="float32", temperature=2.0, labels=True),
        "few": CacheSettings(k=8, labels=True),
        "unlabelled": CacheSettings(k=8),
        "sampled": CacheSettings("sampled", n_samples=8, labels=True),
    }.items():
        build_cache(directory / "source", rows, directory / name, settings, progress=False)
    shutil.rmtree(directory / "source")
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "generalized_jsd", "temperature": 2.0},
        {"method": "alm", "tokens_per_pass": 50},
        {"method": "mined"},
        {"method": "uld", "uld_tokens": 5},
        {"hidden_loss_weight": 0.5},
        {"dataloader_num_workers": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_all_tokens_are_the_live_source(options: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """On shuffled rows, of which each has its own predictions."""
    cache = str(made / ("warm" if "temperature" in options else "whole"))
    losses, (live,), trainer = train(tmp_path, **options)
    others, (cached,), other = train(tmp_path, teacher_cache=cache, **options)
    assert isinstance(other.teacher, CachedTeacher)
    assert others == pytest.approx(losses, rel=1e-4)
    assert_same_gradients(live, cached, 1e-4)
    logs = [t.state.log_history[0] for t in (trainer, other)]
    for name in {"divergence", "hidden_loss", "align_ratio"} & logs[0].keys():
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4)


@pytest.mark.parametrize("method", ["overlap_kl", "alm"])
def test_few_tokens_train(method: str, made: Path, tmp_path: Path) -> None:
    losses, _, _ = train(
        tmp_path, teacher_cache=str(made / "few"), max_steps=16, lr_scheduler_type="constant", method=method
    )
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_evaluation(made: Path, tmp_path: Path) -> None:
    part = make_dataset().select([1, 2, 9])
    live, cached = (
        make_trainer(tmp_path, eval_dataset=part, per_device_eval_batch_size=2, **source).evaluate()
        for source in ({}, {"teacher_cache": str(made / "whole")})
    )
    for name in ("eval_loss", "eval_divergence"):
        assert cached[name] == pytest.approx(live[name], rel=1e-4)


def test_rows_that_are_not_in_the_cache(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows are not in the teacher cache.*`cbd bridge cache --append true`"):
        make_trainer(tmp_path, make_dataset(seed=5), teacher_cache=str(made / "whole"))


@pytest.mark.parametrize("name", ["unlabelled", "sampled"])
def test_caches_that_do_not_do(name: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} does not do for a bridge"):
        SourceCache(TeacherCache.from_pretrained(made / name))
    with pytest.raises(ValueError, match=f"{name} does not do for a bridge"):
        make_trainer(tmp_path, teacher_cache=str(made / name))


def test_refusals(made: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"method": "uld", "teacher_cache": str(made / "whole")}, "uld_tokens to at most the k of the cache"),
        ({"method": "uld", "uld_tokens": 9, "teacher_cache": str(made / "few")}, "uld_tokens=9 is more than the 8"),
        ({"temperature": 2.0, "teacher_cache": str(made / "whole")}, "temperature"),
        (
            {"teacher_cache": str(made / "whole"), "teacher_processing_class": student_tokenizer()},
            "tokenizer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **options)  # type: ignore[arg-type]


def test_the_cached_labels_are_the_sources(made: Path) -> None:
    rows = source_rows(prepared())
    cache = TeacherCache.from_pretrained(made / "whole")
    found = cache.batch(cache.locate(rows))["teacher_labels"]
    model = source_model()
    expected = []
    with torch.no_grad():
        for row in rows:
            log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            expected += [float(log_p[i, t]) for i, t in enumerate(row["labels"][1:]) if t != -100]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
