"""`cbd finetune`: TRL's trainer on instructions, saved as an ordinary checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf.commands.finetune import FinetuneConfig, main
from cbd_hf.distillation import resuming
from cbd_hf.distillation.checkpoints import COMPLETE

from ..test_clients import SENTENCES, make_target, write_lines


RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ["--max_steps", "3", "--per_device_train_batch_size", "2", "--max_length", "256", "--learning_rate", "1e-2"]
QUICK += [
    "--report_to",
    "none",
    "--gradient_checkpointing",
    "False",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "True",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetune")
    make_target(directory / "model")
    rows = [{"instruction": f"Say {i}.", "context": "", "response": text} for i, text in enumerate(SENTENCES)]
    write_lines(directory / "dolly.jsonl", rows)
    return directory


def command(files: Path, output: Path) -> list[str]:
    paths = {"model_name_or_path": files / "model", "dataset": files / "dolly.jsonl", "output_dir": output}
    return [*(part for name, path in paths.items() for part in (f"--{name}", str(path))), *QUICK]


def test_trains_and_saves(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained"
    main([*command(files, output), "--eval_size", "1", "--max_prompt_tokens", "256"])
    before, after = load_file(files / "model" / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert AutoTokenizer.from_pretrained(output).eos_token == "<|end|>"
    with pytest.raises(FileExistsError, match="choose another output_dir"):
        main(command(files, output))


def test_resumes(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "trained"
    saving = ["--save_strategy", "steps", "--save_steps", "3"]
    main([*command(files, output), *saving])
    more = ["--max_steps", "4", "--resume_from_checkpoint", "true"]
    main([*command(files, output), *saving, *more])
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_resumes_only_from_what_is_whole(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]
    main([*command(files, tmp_path / "whole"), *saving])
    output = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "save_whole", lambda *args, **kwargs: None)  # killed before the result is saved
        main([*command(files, output), *saving])
    assert {path.name for path in output.iterdir()} == {"checkpoint-2", "checkpoint-3", "README.md"}
    torn = output / "checkpoint-3" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    resumed = [*command(files, output), *saving, "--resume_from_checkpoint", "true"]
    for _ in range(2):  # the second time there is nothing left to train
        main(resumed)
        one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", output))
        assert all(torch.equal(one[name], other[name]) for name in one)
    for checkpoint in output.glob("checkpoint-*"):
        (checkpoint / COMPLETE).unlink()
    with pytest.raises(ValueError, match="nothing to resume from"):
        main(resumed)


def test_adapter_and_merged_model(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    main(
        [
            *command(files, output),
            "--use_peft",
            "--merge_adapter",
            "--lora_r",
            "2",
            "--lora_target_modules",
            "q_proj",
            "v_proj",
        ]
    )
    assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()
    adapted = AutoModelForCausalLM.from_pretrained(output)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    start = AutoModelForCausalLM.from_pretrained(files / "model")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        results = [model.eval()(tokens).logits for model in (adapted, merged, start)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[1], results[2], rtol=1e-4, atol=1e-4)
    assert merged.num_parameters() == start.num_parameters()


def test_loss_covers_the_completion_only(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTTrainer

    seen: list[str] = []

    def train(self: SFTTrainer, **options: object) -> None:
        batch = next(iter(self.get_train_dataloader()))
        labels = [row[row != -100] for row in batch["labels"]]
        seen.extend(self.processing_class.decode(row) for row in labels)
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        main(command(files, tmp_path / "trained"))
    assert len(seen) == 2 and set(seen) <= {f"{text}<|end|>" for text in SENTENCES}


def test_contradictions_are_named(files: Path, tmp_path: Path) -> None:
    arguments = command(files, tmp_path / "trained")
    with pytest.raises(ValueError, match="merge_adapter needs an adapter"):
        main([*arguments, "--merge_adapter"])
    with pytest.raises(ValueError, match="set eval_size"):
        main([*arguments, "--eval_strategy", "steps", "--eval_steps", "1"])
    with pytest.raises(ValueError, match="use trl sft"):
        main([*arguments, "--load_in_4bit", "--use_peft"])
    with pytest.raises(ValueError, match="set model_name_or_path"):
        main(arguments[2:])
    with pytest.raises(ValueError, match="No row of the dataset keeps a supervised token within max_length=3"):
        main([*arguments, "--max_length", "3"])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_without_accelerator_float32_on_the_cpu(tmp_path: Path) -> None:
    config = FinetuneConfig(output_dir=str(tmp_path))
    assert config.use_cpu and not config.bf16
    assert FinetuneConfig(output_dir=str(tmp_path), bf16=True).bf16


def test_recipe_has_the_published_values() -> None:
    recipe = yaml.safe_load((RECIPES / "configs" / "finetune_dolly.yaml").read_text())
    names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "dataset")
    assert [recipe[name] for name in names] == [10, 8, 1e-5, "databricks/databricks-dolly-15k"]


@pytest.mark.slow
def test_recipe_under_accelerate(files: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("accelerate")
    launch = [str(program), "launch", "--cpu", "--num_processes", "1", str(RECIPES / "finetune_dolly.py")]
    launch += ["--config", str(RECIPES / "configs" / "finetune_dolly.yaml"), "--eval_size", "1"]
    launch += command(files, tmp_path / "trained")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert (tmp_path / "trained" / "model.safetensors").is_file()
