"""A model directory works in the tools people use, none of which knows this package: TRL, a pipeline, lm_eval."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cbd_hf import DistillationChain, cli
from cbd_hf.distillation.cutting import cut_checkpoint, cut_config


REAL_DATA = Path(os.environ.get("CBD_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
STORIES = REAL_DATA / "models" / "stories260k"
VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SENTENCES = [
    "The river runs past the old mill and down to the sea.",
    "A small lamp stood on the table beside the open window.",
    "She counted seven ships in the harbour before breakfast.",
    "Nobody knew why the clock had stopped at noon.",
    "Das Café öffnet früh; the naïve visitor waits outside.",
]
REFUSE_CBD = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cbd_hf":
            raise ImportError("cbd_hf is not to be imported here")


sys.meta_path.insert(0, Refuse())
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with EOS, no BOS, and a chat template, trained on a few sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_target(directory: Path) -> Path:
    """A target between two tiny random Llamas with a tokenizer, made by `cbd init`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    anchors: list[str | PreTrainedModel] = []
    for layers in (3, 1):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # the usual start gives nearly equal logits, between which tests cannot tell
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10)
        anchors.append(model)
    chain = directory.with_name(f"{directory.name}-chain")
    sizes = DistillationChain.from_anchors(anchors, chain, tokenizer=tokenizer).sizes
    return run_cbd_init(chain, sum(sizes) / 2, directory)


def make_stories_target(directory: Path) -> Path:
    """A target between stories260k and a cut of it, made by `cbd init`: real weights and a SentencePiece tokenizer."""
    config = AutoConfig.from_pretrained(STORIES)
    small, chain = directory.with_name("stories-small"), directory.with_name("stories-chain")
    tokens = torch.arange(512).view(2, 256)
    cut_checkpoint(STORIES, cut_config(config, {"num_hidden_layers": 3}), [tokens], small)
    sizes = DistillationChain.from_anchors([str(STORIES), str(small)], chain).sizes
    return run_cbd_init(chain, sum(sizes) / 2, directory)


def run_cbd_init(chain: Path, n_params: float, directory: Path) -> Path:
    """`cbd init`, in this process."""
    cli.main(["init", str(chain), "--n-params", str(n_params), "--output-dir", str(directory)])
    return directory


@pytest.fixture(scope="module", params=["target", "stories260k"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "target":
        return make_target(tmp_path_factory.mktemp("made") / "target")
    if not STORIES.is_dir():
        pytest.skip(f"no stories260k in {STORIES.parent}; set CBD_TEST_DATA to the directory that holds models/")
    return make_stories_target(tmp_path_factory.mktemp("made") / "stories")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An offline environment in which importing cbd_hf fails."""
    guard = tmp_path_factory.mktemp("guard")
    (guard / "sitecustomize.py").write_text(REFUSE_CBD)
    return os.environ | {
        "PYTHONPATH": str(guard),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


def run(command: list[str], environment: dict[str, str], directory: Path) -> str:
    """Output of a command of this Python's environment; fails the test with both streams if the command fails."""
    program = Path(sys.executable).with_name(command[0])
    finished = subprocess.run(
        [str(program), *command[1:]], env=environment, cwd=directory, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_guard_refuses_cbd_hf(environment: dict[str, str], tmp_path: Path) -> None:
    code = "try:\n    import cbd_hf\nexcept ImportError as error:\n    print(error)"
    assert "not to be imported" in run(["python", "-c", code], environment, tmp_path)


@pytest.mark.slow
def test_trl_sft_trains_it(target: Path, environment: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "Say: ", "completion": sentence} for sentence in SENTENCES]
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    command = ["trl", "sft", "--model_name_or_path", str(target), "--dataset_name", str(tmp_path / "data")]
    command += ["--output_dir", "trained", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    command += ["--use_cpu", "True", "--bf16", "False", "--gradient_checkpointing", "False"]
    command += ["--learning_rate", "1e-3", "--max_length", "64", "--report_to", "none"]
    run(command, environment, tmp_path)
    before, after = load_file(target / "model.safetensors"), load_file(tmp_path / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "trained")("The river")["input_ids"]


@pytest.mark.slow
def test_pipeline_generates_with_it(target: Path, environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys; from transformers import pipeline\n"
        "generate = pipeline('text-generation', model=sys.argv[1], device='cpu')\n"
        "answer = generate('Once upon a time', max_new_tokens=8, do_sample=False)[0]['generated_text']\n"
        "assert answer.startswith('Once upon a time') and len(answer) > 16, answer\n"
    )
    run(["python", "-c", code, str(target)], environment, tmp_path)


@pytest.mark.slow
def test_lm_eval_scores_it(target: Path, environment: dict[str, str], tmp_path: Path) -> None:
    rows = [dict(zip(("text", "target"), sentence.rsplit(" ", 1), strict=True)) for sentence in SENTENCES]
    write_lines(tmp_path / "cloze.jsonl", rows)
    task = {
        "task": "tiny_cloze",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "cloze.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{target}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_cloze.yaml").write_text(yaml.safe_dump(task))
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={target},dtype=float32"]
    command += ["--tasks", "tiny_cloze", "--include_path", "tasks", "--device", "cpu", "--batch_size", "2"]
    run([*command, "--output_path", "results"], environment, tmp_path)
    (file,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["tiny_cloze"]["perplexity,none"]
    assert math.isclose(math.log(found), -cloze_log_likelihood(target, rows), rel_tol=1e-3)


@torch.no_grad()
def cloze_log_likelihood(directory: Path, rows: list[dict[str, str]]) -> float:
    """Mean log-likelihood of the targets, one at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    total = 0.0
    for row in rows:
        context = len(tokenizer(row["text"])["input_ids"])
        tokens = torch.tensor([tokenizer(f"{row['text']} {row['target']}")["input_ids"]])
        scores = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])
        total += scores[context - 1 :].sum().item()
    return total / len(rows)
