"""Killed and several processes write the same files as one that is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from cbd_hf.distillation import rounds
from cbd_hf.distillation.answers import AnswersManifest
from cbd_hf.distillation.records import ShardRecord

from .helpers import build, files, questions


SCRIPT = """
import sys, time
from pathlib import Path
import cbd_hf.distillation.answers.build as module
from tests.distillation.answers.helpers import build, questions

source, directory, slow = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "slow"
if slow:
    real = module.atomic_write_text
    module.atomic_write_text = lambda *arguments: (time.sleep(1.0), real(*arguments))[1]
if __name__ == "__main__":
    build(source, directory, questions(45))
"""
ROOT = Path(__file__).parents[3]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "answers"
    build(source, directory, questions(45))
    return directory


@pytest.mark.distributed
def test_killed_process(source: Path, whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(source), str(directory), "slow"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (directory / "answers-00001.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    with pytest.raises(FileExistsError, match="Another run is writing to .*out: wait"):
        build(source, directory, questions(45))
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = AnswersManifest.read(directory).prompts
    assert 8 <= kept < 45
    assert build(source, directory, questions(45)).new_answers == 45 - kept
    assert files(directory) == files(whole)
    assert not Path(f"{directory}.lock").exists()


@pytest.mark.distributed
def test_two_processes_write_the_same_files(source: Path, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += [f"--config_file={ROOT / 'recipes/accelerate_configs/cpu_2proc.yaml'}", "--main_process_port=0"]
    command += [str(script), str(source), str(tmp_path / "two"), "fast"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path / "two") == files(whole)


class Listed:
    """A manifest in memory."""

    def __init__(self) -> None:
        self.shards: list[ShardRecord] = []
        self.written: list[int] = []

    def write(self, directory: Path) -> None:
        self.written.append(len(self.shards))


def test_shards_before_an_error_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four processes the third fails: what the first two made is kept, the fourth's would leave a gap."""
    others = [ShardRecord(f"shard-{number}", 1, 1, 1, "") for number in range(4)]

    class State:
        num_processes, process_index, is_main_process = 4, 0, True

    monkeypatch.setattr(rounds, "gather_object", lambda mine: [*mine, others[1], OSError("disk"), others[3]])
    manifest, state = Listed(), State()
    with pytest.raises(OSError, match="disk"):
        rounds.make_shards(
            state,  # type: ignore[arg-type]
            tmp_path,
            manifest,
            np.arange(8),
            1,
            lambda number, rows: others[number],
            description="",
            progress=False,
        )
    assert manifest.shards == others[:2] and manifest.written == [2]


def test_a_model_that_generates_is_whole_under_zero3(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import deepspeed

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    options, seen = Zero3(), []
    load = AutoModelForCausalLM.from_pretrained

    def spied(*arguments: object, **kwargs: object) -> object:
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return load(*arguments, **kwargs)

    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: options)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spied)
    monkeypatch.setattr(deepspeed, "set_hf_deepspeed_config", lambda config: seen.append(config))
    monkeypatch.setattr(
        deepspeed, "unset_hf_deepspeed_config", lambda: setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    )
    rounds.load_model(source, "float32", PartialState(), {})
    assert seen == [False, options]
