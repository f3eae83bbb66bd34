"""Caches are finished after an interruption, extended, and never mixed up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

import cbd_hf.distillation.cache.build as module
from cbd_hf.distillation.cache import CacheManifest, TeacherCache

from ...models import answers_dataset, tiny_tokenizer
from .helpers import build, files, save_teacher
from .test_round_trip import prepared


class Killed(BaseException):
    pass


def interrupted(
    after: int, monkeypatch: pytest.MonkeyPatch, teacher: Path, directory: Path, **options: object
) -> None:
    """Build until `after` shards are written."""
    real, written = module.write_shard, []

    def write(*arguments: Any) -> Any:
        if len(written) == after:
            (directory / ".shard-00009.safetensors.tmp-123456789abc").write_bytes(b"half")
            raise Killed
        written.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", write)
        with pytest.raises(Killed):
            build(teacher, directory, **options)


@pytest.mark.parametrize("variant", ["top_k", "sampled"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_resume(variant: str, after: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "cache"
    interrupted(after, monkeypatch, teacher, directory, variant=variant)
    if after:
        cache = TeacherCache.from_pretrained(directory, verify="full")
        assert len(cache) == 8 * after and not cache.manifest.data[0].complete
        with pytest.raises(ValueError, match="not in the teacher cache"):
            cache.locate(prepared(tmp_path))
    report = build(teacher, directory, variant=variant)
    assert report.new_rows == 20 - 8 * after
    build(teacher, tmp_path / "whole", variant=variant)
    assert files(directory) == files(tmp_path / "whole")
    again = build(teacher, directory, variant=variant)
    assert (again.new_rows, again.rows, again.tokens_per_second) == (0, 20, 0)
    assert files(directory) == files(tmp_path / "whole")


def test_resume_with_other_settings_is_refused(cached: Path, teacher: Path, tmp_path: Path) -> None:
    before = files(cached)
    for options, message in (
        ({"k": 6}, "k: 5, not 6"),
        ({"variant": "sampled"}, "variant: top_k, not sampled"),
        ({"temperature": 2.0}, "temperature: 1.0, not 2.0"),
        ({"dtype": "float32"}, "dtype: float16, not float32"),
        ({"hidden": "float16"}, "hidden: None, not float16"),
        ({"shard_rows": 9}, "shard_rows: 8, not 9"),
        ({"k": 6, "temperature": 2.0}, "k: 5, not 6; temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            build(teacher, cached, **options)
    with pytest.raises(ValueError, match="teacher sha256"):
        build(save_teacher(tmp_path / "other", seed=7), cached)
    with pytest.raises(ValueError, match="whose prepared rows are not those of more.*--append"):
        build(teacher, cached, answers_dataset(4, seed=1), name="more")
    build(teacher, cached, n_samples=3, seed=9)  # which top_k does not use
    assert files(cached) == before


def test_append(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "cache"
    build(teacher, directory, name="first")
    more = concatenate_datasets([answers_dataset(5), answers_dataset(12, seed=1)])
    interrupted(1, monkeypatch, teacher, directory, dataset=more, name="more", append=True)
    assert len(TeacherCache.from_pretrained(directory)) == 28
    report = build(teacher, directory, more, name="more", append=True)
    assert (report.rows, report.new_rows) == (32, 4)
    cache = TeacherCache.from_pretrained(directory, verify="full")
    assert [(data.name, data.rows, data.complete) for data in cache.manifest.data] == [
        ("first", 20, True),
        ("more", 17, True),
    ]
    assert [shard.rows for shard in cache.manifest.shards] == [8, 8, 4, 8, 4]
    assert cache.locate(prepared(tmp_path, more)) == [*range(5), *range(20, 32)]
    assert build(teacher, directory, more, append=True).new_rows == 0
    assert build(teacher, directory, name="first").new_rows == 0
    with pytest.raises(ValueError, match="k: 5, not 7"):
        build(teacher, directory, answers_dataset(3, seed=2), append=True, k=7)
    with pytest.raises(FileNotFoundError, match="not a teacher cache"):
        build(teacher, tmp_path / "nothing", append=True)


def test_equal_rows_are_kept_once(teacher: Path, tmp_path: Path) -> None:
    twice = concatenate_datasets([answers_dataset(3), answers_dataset(5)])
    report = build(teacher, tmp_path / "cache", twice)
    cache = TeacherCache.from_pretrained(tmp_path / "cache")
    assert (report.rows, cache.manifest.data[0].rows) == (5, 8)
    assert cache.locate(prepared(tmp_path, twice)) == [0, 1, 2, 0, 1, 2, 3, 4]


def test_rows_without_supervised_positions(teacher: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [9], "labels": [9]}, {"input_ids": [9, 8, 7], "labels": [9, 8, -100]}])
    report = build(teacher, tmp_path / "cache", rows)
    cache = TeacherCache.from_pretrained(tmp_path / "cache")
    assert (report.rows, report.tokens) == (2, 1)
    assert cache.batch(cache.locate(rows))["teacher_token_ids"].shape == (1, 5)


def test_manifest(cached: Path, teacher: Path) -> None:
    manifest = CacheManifest.read(cached)
    assert (manifest.teacher.name, manifest.teacher.dtype) == (str(teacher), "float32")
    assert (manifest.vocab_size, manifest.teacher.hidden_size) == (64, 32)
    assert [shard.rows for shard in manifest.shards] == [8, 8, 4]
    assert manifest.tokens == sum(shard.tokens for shard in manifest.shards) == manifest.data[0].tokens
    assert {"torch", "transformers", "cbd_hf"} <= set(manifest.packages)


def test_mistakes(teacher: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    for options, message in (
        ({"k": 65}, "k=65 is more than the vocab_size of 64"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"n_samples": 40_000, "variant": "sampled"}, "n_samples=40000 is outside"),
        ({"variant": "all"}, "variant='all' is unknown"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"hidden": "int8"}, "hidden='int8'"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater"),
        ({"shard_rows": 0}, "shard_rows=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"vocab_size": 65}, "vocab_size=65 is more than the 64 tokens"),
        ({"vocab_size": 60}, "less than the 64 tokens of the tokenizer"),
        ({"dataset": Dataset.from_list([{"text": "w1 " * 70}])}, "longest sequence has 71 tokens.*64 positions"),
        ({"dataset": Dataset.from_list([{"title": "w1"}])}, "distillation needs one of"),
        ({"dataset": Dataset.from_dict({"text": []})}, "no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            build(teacher, directory, **options)
    other = tiny_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match="need one vocabulary"):
        build(teacher, directory, tokenizer=other)
    assert not directory.exists()
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no teacher cache"):
        build(teacher, directory)


SCRIPT = """
import sys
from pathlib import Path
import cbd_hf.distillation.cache.build as module
from tests.distillation.cache.helpers import build
from tests.models import answers_dataset

teacher, directory, slow = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "slow"
if slow:
    import time
    real = module.write_shard
    module.write_shard = lambda *arguments: (time.sleep(1.0), real(*arguments))[1]
build(teacher, directory, answers_dataset(45), variant="sampled", hidden="float16")
"""
ROOT = Path(__file__).parents[3]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


@pytest.mark.distributed
def test_killed_process(teacher: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    command = [sys.executable, "-c", SCRIPT, str(teacher), str(directory)]
    process = subprocess.Popen([*command, "slow"], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (directory / "shard-00001.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    with pytest.raises(FileExistsError, match="Another run is writing to .*cache: wait"):
        build(teacher, directory, answers_dataset(45), variant="sampled", hidden="float16")
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = build(teacher, tmp_path / "whole", answers_dataset(45), variant="sampled", hidden="float16")
    kept = len(TeacherCache.from_pretrained(directory, verify="full"))
    assert 8 <= kept < 45
    report = build(teacher, directory, answers_dataset(45), variant="sampled", hidden="float16")
    assert report.new_rows == 45 - kept and report.bytes == whole.bytes
    assert files(directory) == files(tmp_path / "whole")
    assert not Path(f"{directory}.lock").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_the_same_files(teacher: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += [f"--config_file={ROOT / 'recipes/accelerate_configs/cpu_2proc.yaml'}", "--main_process_port=0"]
    command += [str(script), str(teacher), str(tmp_path / "two"), "fast"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, str(script), str(teacher), str(tmp_path / "one"), "fast"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(TeacherCache.from_pretrained(tmp_path / "two", verify="full")) == 45
