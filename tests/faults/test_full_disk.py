"""A disk that is full while something is saved leaves what was saved before, and says what happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cbd_hf import DistillationChain, StepwiseDistillationConfig
from cbd_hf._files import DiskFullError
from cbd_hf.chain import append_anchor
from cbd_hf.distillation import resuming
from cbd_hf.distillation.builder import build_chain
from cbd_hf.distillation.checkpoints import last_complete_checkpoint
from cbd_hf.distillation.recipe import BuildArguments

from ..chain.helpers import snapshot
from ..models import random_model, tiny_config, tiny_tokenizer, words


resource = pytest.importorskip("resource")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse to write more than `size` bytes into any file, in the middle of whatever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(path)]
    able = sys.platform == "linux" and shutil.which("mount") is not None
    if not able or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own needs Linux and the right to mount one")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random_model(tiny_config("llama", layers=4), std=0.1).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    rng = random.Random(0)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": words(rng, 20)}) for _ in range(20)))
    return tmp_path / "source"


def build(source: Path, output: Path) -> DistillationChain:
    args = BuildArguments(
        source=str(source),
        dataset=str(source.with_name("text.jsonl")),
        anchors=[{"name": "mid", "num_hidden_layers": 3}],
        eval_documents=0,
        calibration_documents=2,
    )
    training = StepwiseDistillationConfig(
        output_dir=str(output),
        max_steps=4,
        save_steps=1,
        save_total_limit=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        max_length=32,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    return build_chain(args, training)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Do something before the checkpoint of a step is written."""
    prepare = resuming._WholeCheckpoints._prepare

    def prepared(self: Any, args: Any, state: Any, control: Any) -> None:
        prepare(self, args, state, control)
        if control.should_save and state.global_step == step:
            action()

    monkeypatch.setattr(resuming._WholeCheckpoints, "_prepare", prepared)


def weights(chain: DistillationChain) -> dict[str, Any]:
    return {name: value.tolist() for name, value in load_file(chain[0].path / "model.safetensors").items()}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_checkpoint_that_does_not_fit(
    file: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(build(source, tmp_path / "whole"))
    trainer = tmp_path / "chain.build/mid/trainer"
    with monkeypatch.context() as patch, largest_file(resource.RLIM_INFINITY):  # puts the limit back

        def fill() -> None:
            size = (trainer / "checkpoint-2" / file).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, resource.RLIM_INFINITY))

        at_step(patch, 3, fill)
        with pytest.raises(DiskFullError, match=r"/checkpoint-3 failed: .*bytes are free.* run the same"):
            build(source, tmp_path / "chain")
    assert last_complete_checkpoint(trainer) == str(trainer / "checkpoint-2")
    assert weights(build(source, tmp_path / "chain")) == expected


def test_build_on_a_full_disk(source: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(build(source, tmp_path / "whole"))
    ballast = small_disk / "ballast"
    trainer = small_disk / "chain.build/mid/trainer"

    def fill(left: int) -> None:
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - left)

    for left in (4096, 100_000, 300_000):  # not even a small file; part of the weights; part of the optimizer
        with monkeypatch.context() as patch:
            at_step(patch, 3, lambda left=left: fill(left))  # type: ignore[misc]
            with pytest.raises(DiskFullError, match=r"checkpoint-3.*bytes are free"):
                build(source, small_disk / "chain")
        assert last_complete_checkpoint(trainer) == str(trainer / "checkpoint-2")
        ballast.unlink()
    assert weights(build(source, small_disk / "chain")) == expected


@pytest.mark.parametrize("size", [200, 20_000])
def test_anchor_that_does_not_fit(size: int, source: Path, tmp_path: Path) -> None:
    """Not even its config, or not its weights."""
    chain = tmp_path / "chain"
    append_anchor(chain, source, name="large")
    random_model(tiny_config("llama", layers=2), std=0.1).save_pretrained(tmp_path / "small")
    before = snapshot(chain)
    with largest_file(size), pytest.raises(DiskFullError, match="bytes are free"):
        append_anchor(chain, tmp_path / "small", name="small")
    assert snapshot(chain) == before
    DistillationChain.from_pretrained(chain, verify="full")
    assert len(append_anchor(chain, tmp_path / "small", name="small")) == 2


@pytest.mark.parametrize(("after", "file"), [("1-small", r"README\.md"), ("README.md", r"chain\.json")])
def test_text_that_does_not_fit(
    after: str, file: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor is in its place, and the card or the manifest is not."""
    chain = tmp_path / "chain"
    append_anchor(chain, source, name="large")
    random_model(tiny_config("llama", layers=2), std=0.1).save_pretrained(tmp_path / "small")
    before = {name: data for name, data in snapshot(chain).items() if name.endswith(".json")}
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).name == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))

    with largest_file(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(DiskFullError, match=f"{file} is as it was"):
            append_anchor(chain, tmp_path / "small", name="small")
    assert before.items() <= snapshot(chain).items()
    assert len(DistillationChain.from_pretrained(chain, verify="full")) == 1
    assert len(append_anchor(chain, tmp_path / "small", name="small")) == 2
