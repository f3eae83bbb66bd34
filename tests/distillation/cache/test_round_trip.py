"""What is read is what the teacher says."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from trl import SFTConfig

from cbd_hf.distillation.cache import TeacherCache
from cbd_hf.distillation.cache.manifest import MANIFEST
from cbd_hf.distillation.preparation import prepare_rows

from ...models import VOCAB, answers_dataset, tiny_tokenizer
from .helpers import build, dense, save_teacher


TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}


def config(directory: Path, **options: object) -> SFTConfig:
    return SFTConfig(output_dir=str(directory), use_cpu=True, bf16=False, report_to="none", **options)


def prepared(directory: Path, dataset: Dataset | None = None, **options: object) -> Dataset:
    return prepare_rows(
        answers_dataset(20) if dataset is None else dataset, tiny_tokenizer(), config(directory, **options)
    )


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k(teacher: Path, tmp_path: Path, dtype: str, temperature: float) -> None:
    report = build(teacher, tmp_path / "cache", dtype=dtype, temperature=temperature)
    cache = TeacherCache.from_pretrained(tmp_path / "cache", verify="full")
    rows = prepared(tmp_path)
    order = [7, 19, 0, 7]
    expected = dense(teacher, rows.select(order), temperature)["log_probs"]
    batch = cache.batch([cache.locate(rows)[row] for row in order])
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in batch.items()} == {
        "teacher_token_ids": (torch.int64, (len(expected), 5)),
        "teacher_log_probs": (torch.float32, (len(expected), 5)),
        "teacher_tail": (torch.float32, (len(expected),)),
    }
    values, ids = expected.topk(5)
    assert torch.equal(batch["teacher_token_ids"], ids)
    tail = (1 - values.exp().sum(-1)).log()
    for found, wanted in ((batch["teacher_log_probs"], values), (batch["teacher_tail"], tail)):
        assert torch.allclose(found.double(), wanted, atol=1e-5, rtol=TOLERANCE[dtype])
    assert load_file(next((tmp_path / "cache").glob("*0.safetensors")))["token_ids"].dtype == torch.uint16
    assert (report.rows, report.new_rows, len(cache)) == (20, 20, 20)
    assert report.tokens == sum(label != -100 for row in rows for label in row["labels"][1:])
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert report.bytes == size and report.bytes_per_token == size / report.tokens


def test_whole_vocabulary_is_the_distribution(teacher: Path, tmp_path: Path) -> None:
    build(teacher, tmp_path / "cache", k=VOCAB, dtype="float32")
    cache, rows = TeacherCache.from_pretrained(tmp_path / "cache"), prepared(tmp_path)
    batch = cache.batch(cache.locate(rows))
    found = torch.empty(batch["teacher_log_probs"].shape).scatter_(
        1, batch["teacher_token_ids"], batch["teacher_log_probs"]
    )
    expected = dense(teacher, rows)["log_probs"]
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert (batch["teacher_tail"] < -23).all() and batch["teacher_tail"].isfinite().all()


@pytest.mark.parametrize("n_samples", [20, 300])
def test_sampled(teacher: Path, tmp_path: Path, n_samples: int) -> None:
    build(teacher, tmp_path / "cache", variant="sampled", n_samples=n_samples, dtype="float32")
    cache, rows = TeacherCache.from_pretrained(tmp_path / "cache"), prepared(tmp_path)
    batch = cache.batch(cache.locate(rows))
    ids, weights = batch["teacher_token_ids"], batch["teacher_weights"]
    present = weights > 0
    assert set(batch) == {"teacher_token_ids", "teacher_log_probs", "teacher_weights"}
    assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))
    assert torch.allclose(weights * n_samples, (weights * n_samples).round(), atol=1e-4)
    assert present.any(0).all() and present[:, 0].all() and not present.all()
    assert ((ids.diff() > 0) | ~present[:, 1:]).all(), "a token occurs twice"
    expected = dense(teacher, rows)["log_probs"].gather(1, ids)
    assert torch.allclose(batch["teacher_log_probs"].double()[present], expected[present], atol=1e-5)
    assert batch["teacher_log_probs"].isfinite().all()
    counts = load_file(tmp_path / "cache" / "shard-00000.safetensors")["counts"]
    assert counts.dtype == (torch.uint8 if n_samples < 256 else torch.int16)
    alone = [cache.batch([row])["teacher_weights"] for row in cache.locate(rows)]
    widened = [torch.nn.functional.pad(part, (0, weights.shape[1] - part.shape[1])) for part in alone]
    assert torch.equal(torch.cat(widened), weights)


def test_draws_do_not_depend_on_batches_and_files(teacher: Path, tmp_path: Path) -> None:
    rows, batches = prepared(tmp_path), []
    for name, options in {
        "one": {},
        "two": {"batch_size": 7, "shard_rows": 3},
        "three": {"dataset": answers_dataset(20).shuffle(seed=1)},
        "seed": {"seed": 1},
    }.items():
        build(teacher, tmp_path / name, variant="sampled", **options)
        cache = TeacherCache.from_pretrained(tmp_path / name)
        batches.append(cache.batch(cache.locate(rows)))
    for other in batches[1:3]:
        assert torch.equal(batches[0]["teacher_token_ids"], other["teacher_token_ids"])
        assert torch.equal(batches[0]["teacher_weights"], other["teacher_weights"])
    assert not torch.equal(batches[0]["teacher_token_ids"].sum(), batches[3]["teacher_token_ids"].sum())


@pytest.mark.parametrize("variant", ["top_k", "sampled"])
@pytest.mark.parametrize("hidden", ["float16", "bfloat16", "float32"])
def test_hidden_states(teacher: Path, tmp_path: Path, variant: str, hidden: str) -> None:
    build(teacher, tmp_path / "cache", variant=variant, hidden=hidden)
    cache, rows = TeacherCache.from_pretrained(tmp_path / "cache"), prepared(tmp_path)
    found = cache.batch(cache.locate(rows))["teacher_hidden"]
    assert found.dtype == getattr(torch, hidden)
    expected = dense(teacher, rows)["hidden"]
    assert torch.allclose(
        found.double(), expected, rtol=TOLERANCE[hidden] * 2, atol=1e-3 if hidden != "float32" else 1e-5
    )


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows(teacher: Path, tmp_path: Path, strategy: str) -> None:
    """Sequences that are packed whole do not see each other, as in a padding-free batch."""
    options = {"packing": True, "packing_strategy": strategy, "max_length": 24}
    rows = prepared(tmp_path, **options)
    assert ("seq_lengths" in rows.column_names) == (strategy == "bfd")
    build(teacher, tmp_path / "cache", config=config(tmp_path, **options), dtype="float32")
    cache = TeacherCache.from_pretrained(tmp_path / "cache")
    batch = cache.batch(cache.locate(rows))
    values, ids = dense(teacher, rows)["log_probs"].topk(5)
    assert torch.equal(batch["teacher_token_ids"], ids)
    assert torch.allclose(batch["teacher_log_probs"].double(), values, atol=1e-5)


def test_large_vocabularies_and_their_padding(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", vocab_size=70_000)
    build(teacher, tmp_path / "cache")
    assert load_file(tmp_path / "cache" / "shard-00000.safetensors")["token_ids"].dtype == torch.int32
    build(teacher, tmp_path / "cut", vocab_size=VOCAB + 6, dtype="float32")
    cache, rows = TeacherCache.from_pretrained(tmp_path / "cut"), prepared(tmp_path)
    batch = cache.batch(cache.locate(rows))
    assert cache.manifest.vocab_size == VOCAB + 6 and batch["teacher_token_ids"].max() < VOCAB + 6
    cut = dense(teacher, rows)["log_probs"][:, : VOCAB + 6].log_softmax(-1)
    assert torch.allclose(batch["teacher_log_probs"].double(), cut.topk(5).values, atol=1e-4)


def test_scaled_and_capped_logits(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    from ...models import random_model

    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    gemma = Gemma2Config(
        **shape, head_dim=8, intermediate_size=64, vocab_size=VOCAB, final_logit_softcapping=1.5, sliding_window=64
    )
    random_model(gemma).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    build(tmp_path / "teacher", tmp_path / "cache", dtype="float32")
    cache, rows = TeacherCache.from_pretrained(tmp_path / "cache"), prepared(tmp_path)
    batch = cache.batch(cache.locate(rows))
    values, _ = dense(tmp_path / "teacher", rows)["log_probs"].topk(5)
    assert torch.allclose(batch["teacher_log_probs"].double(), values, atol=1e-4)


class Collator:
    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return self.cache.batch(rows)


def test_data_loader_workers(cached: Path) -> None:
    cache = TeacherCache.from_pretrained(cached)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [cache.batch(order[i : i + 3]) for i in range(0, 20, 3)]
    loader = DataLoader(order, batch_size=3, num_workers=2, collate_fn=Collator(cache))
    for found, wanted in zip(loader, expected, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pickle_and_many_open_files(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbd_hf.distillation.cache.reader._OPEN_SHARDS", 1)
    cache = TeacherCache.from_pretrained(cached)
    rows = [0, 19, 8, 1]
    expected = cache.batch(rows)
    copied = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 20_000
    assert all(torch.equal(copied.batch(rows)[name], tensor) for name, tensor in expected.items())
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match="has 20 rows"):
            cache.batch([wrong])


@pytest.mark.parametrize("variant", ["top_k", "sampled"])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_labels(teacher: Path, tmp_path: Path, variant: str, dtype: str) -> None:
    """The log-probability of the token that follows, among the entries or not."""
    build(teacher, tmp_path / "cache", variant=variant, dtype=dtype, temperature=2.0, labels=True)
    cache, rows = TeacherCache.from_pretrained(tmp_path / "cache"), prepared(tmp_path)
    order = [7, 19, 0, 7]
    batch = cache.batch([cache.locate(rows)[row] for row in order])
    found, part = batch["teacher_labels"], rows.select(order)
    labels = torch.tensor([label for row in part for label in row["labels"][1:] if label != -100])
    expected = dense(teacher, part, 2.0)["log_probs"].gather(1, labels[:, None]).flatten()
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=TOLERANCE[dtype])
    among = (batch["teacher_token_ids"] == labels[:, None]).any(-1)
    assert among.any() and not among.all()
    build(teacher, tmp_path / "without", variant=variant, dtype=dtype, temperature=2.0)
    plain = TeacherCache.from_pretrained(tmp_path / "without")
    others = plain.batch([plain.locate(rows)[row] for row in order])
    assert batch.keys() - others.keys() == {"teacher_labels"}
    assert all(torch.equal(batch[name], value) for name, value in others.items())


def test_labels_of_packed_rows(teacher: Path, tmp_path: Path) -> None:
    """A sequence's first token follows nothing."""
    options = {"packing": True, "packing_strategy": "bfd", "max_length": 24}
    rows = prepared(tmp_path, **options)
    build(teacher, tmp_path / "cache", config=config(tmp_path, **options), dtype="float32", labels=True)
    cache = TeacherCache.from_pretrained(tmp_path / "cache")
    found = cache.batch(cache.locate(rows))["teacher_labels"]
    labels = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            labels += [label for label in row["labels"][start + 1 : start + length] if label != -100]
            start += length
    expected = dense(teacher, rows)["log_probs"].gather(1, torch.tensor(labels)[:, None]).flatten()
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_labels_are_a_setting_of_the_cache(teacher: Path, tmp_path: Path) -> None:
    """A cache is not gone on with in another way; one from before the setting has none."""
    build(teacher, tmp_path / "cache", labels=True)
    assert TeacherCache.from_pretrained(tmp_path / "cache").manifest.settings.labels
    with pytest.raises(ValueError, match="labels"):
        build(teacher, tmp_path / "cache", labels=False)
    build(teacher, tmp_path / "old")
    path = tmp_path / "old" / MANIFEST
    content = json.loads(path.read_text())
    del content["settings"]["labels"]
    path.write_text(json.dumps(content))
    assert not TeacherCache.from_pretrained(tmp_path / "old").manifest.settings.labels
    assert build(teacher, tmp_path / "old").new_rows == 0
