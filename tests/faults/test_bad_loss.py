"""A loss, gradient or weight that goes bad stops a training, which names all that is needed and then resumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf.distillation.checkpoints import is_complete, last_complete_checkpoint
from cbd_hf.distillation.guards import LossError
from cbd_hf.distillation.resuming import train_resumably

from ..models import answers_dataset, random_model, tiny_config, tiny_tokenizer


POISON = 63  # the token "w57"


def trainer(directory: Path, dataset: Dataset | None = None, **models: Any) -> StepwiseDistillationTrainer:
    args = StepwiseDistillationConfig(
        output_dir=str(directory),
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    return StepwiseDistillationTrainer(
        models.get("student") or random_model(tiny_config("llama", layers=2), seed=1, std=0.1),
        models.get("teacher") or random_model(tiny_config("llama", layers=3), seed=2, std=0.3),
        args,
        train_dataset=answers_dataset() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        callbacks=models.get("callbacks"),
    )


def final(trained: StepwiseDistillationTrainer, directory: Path) -> dict[str, torch.Tensor]:
    trained.save_anchor(directory)
    return load_file(directory / "model.safetensors")


class Spoil(TrainerCallback):
    """Breaks a weight (or its gradient) of the student when `event` happens after `step` steps."""

    def __init__(self, event: str, step: int, gradient: bool = False) -> None:
        self.step = step
        self.gradient = gradient
        setattr(self, event, self.spoil)

    def spoil(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            parameter = model.get_output_embeddings().weight
            if self.gradient:
                parameter.register_hook(lambda gradient: gradient * math.inf)
            else:
                with torch.no_grad():
                    parameter[5] = math.inf


@pytest.mark.parametrize(
    ("event", "gradient", "message"),
    [
        ("on_step_begin", False, r"Step 5: the loss is (nan|inf)"),
        ("on_step_begin", True, r"Step 5: the norm of the gradient is nan"),
        ("on_step_end", False, r"Step 4: weights are not finite any more \(.*embed_tokens\.weight"),
    ],
    ids=["loss", "gradient", "weights"],
)
def test_stops_and_resumes(event: str, gradient: bool, message: str, tmp_path: Path) -> None:
    undisturbed = trainer(tmp_path / "whole")
    train_resumably(undisturbed, own_directory=True)
    directory = tmp_path / "spoilt"
    with pytest.raises(LossError, match=message) as caught:
        train_resumably(trainer(directory, callbacks=[Spoil(event, 4, gradient)]), own_directory=True)
    good = 2 if event == "on_step_end" else 4  # one that was saved with bad weights is none
    assert f"Last good checkpoint: {directory / f'checkpoint-{good}'}." in str(caught.value)
    assert last_complete_checkpoint(directory) == str(directory / f"checkpoint-{good}")
    mended = trainer(directory)
    train_resumably(mended, own_directory=True)
    expected, actual = final(undisturbed, tmp_path / "one"), final(mended, tmp_path / "other")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_poisoned_row_is_among_the_named(tmp_path: Path) -> None:
    """A teacher that predicts NaN wherever one token is in the text."""
    clean = [{name: text.replace("w57", "w3") for name, text in row.items()} for row in answers_dataset()]
    rows = Dataset.from_list([*clean[:11], {"prompt": "w57 w4", "completion": " w5"}, *clean[11:]])
    teacher = random_model(tiny_config("llama", layers=3, tie_word_embeddings=False), seed=2, std=0.3)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[POISON] = math.nan
    with pytest.raises(LossError, match=r"Step (\d+): the loss is nan.*\nExamples of its global batch: ") as caught:
        train_resumably(trainer(tmp_path / "one", rows, teacher=teacher), own_directory=True)
    listed = str(caught.value).split("global batch: ")[1].split(".\n")[0]
    named = [int(example) for example in listed.split(", ")]
    assert len(named) == 4 and 11 in named
    mended = trainer(tmp_path / "two", Dataset.from_list(clean), teacher=teacher)
    train_resumably(mended, own_directory=True)
    assert mended.state.global_step == 6
    assert is_complete(tmp_path / "two" / "checkpoint-6")
