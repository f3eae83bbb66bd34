"""The chain builder: stages, resuming after a kill at any moment, refusals."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cbd_hf import DistillationChain, StepwiseDistillationConfig
from cbd_hf.distillation.builder import build_chain
from cbd_hf.distillation.checkpoints import last_complete_checkpoint
from cbd_hf.distillation.claims import claimed
from cbd_hf.distillation.cutting import cut_config
from cbd_hf.distillation.guards import LossError, LossGuard
from cbd_hf.distillation.recipe import BuildArguments
from cbd_hf.distillation.stages import stage_record

from ..models import random_model, tiny_config, tiny_tokenizer, words
from .cache import helpers as cache_helpers


ROOT = Path(__file__).parents[2]
ANCHORS: list[dict[str, Any]] = [
    {"name": "mid", "num_hidden_layers": 4, "training": {"max_steps": 4}},
    {"name": "small", "num_hidden_layers": 3, "hidden_size": 24},
]


@pytest.fixture
def material(tmp_path: Path) -> dict[str, str]:
    """A source checkpoint and a text file, as a recipe names them."""
    source = tmp_path / "source"
    random_model(tiny_config("llama", layers=5), std=0.1).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    rng = random.Random(0)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": words(rng, 30)}) for _ in range(60)))
    return {"source": str(source), "dataset": str(text)}


def recipe(material: dict[str, str], output: Path, **changes: Any) -> dict[str, Any]:
    return {
        **material,
        "anchors": ANCHORS,
        "eval_documents": 4,
        "calibration_documents": 4,
        "output_dir": str(output),
        "max_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "save_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    } | changes


def build(values: dict[str, Any]) -> DistillationChain:
    names = BuildArguments.__dataclass_fields__
    args = BuildArguments(**{name: value for name, value in values.items() if name in names})
    training = StepwiseDistillationConfig(**{name: value for name, value in values.items() if name not in names})
    return build_chain(args, training)


def weights(chain: DistillationChain) -> list[dict[str, torch.Tensor]]:
    return [load_file(anchor.path / "model.safetensors") for anchor in chain]


def test_builds_and_records(material: dict[str, str], tmp_path: Path) -> None:
    chain = build(recipe(material, tmp_path / "chain", include_source=True))
    assert [anchor.name for anchor in chain] == ["source", "mid", "small"]
    assert chain.basis == "importance-sorted"
    small = chain["small"]
    assert (small.config.num_hidden_layers, small.config.hidden_size, small.config.num_attention_heads) == (
        3,
        24,
        4,
    )  # 1.5 key/value heads are none
    assert small.cut is not None and small.cut["from"] == "mid" and len(small.cut["layers"]) == 3
    assert small.stage["teacher"] == "mid"
    assert small.stage["steps"] == 3 and chain["mid"].stage["steps"] == 4
    assert set(small.stage["metrics"]) == {"bits_per_byte_before", "bits_per_byte_after"}
    assert not (tmp_path / "chain.build").exists()
    assert chain.load_tokenizer() is not None
    again = build(recipe(material, tmp_path / "chain", include_source=True))  # finished: nothing to do
    assert again.sizes == chain.sizes


def test_public_checkpoints_and_supervised_phase(material: dict[str, str], tmp_path: Path) -> None:
    public = tmp_path / "public"
    random_model(tiny_config("llama", layers=2), seed=5, std=0.1).save_pretrained(public)
    values = recipe(
        material,
        tmp_path / "chain",
        anchors=[{"name": "public", "checkpoint": str(public)}],
        supervised={"max_steps": 2, "learning_rate": 1e-2},
        max_steps=1,
    )
    chain = build(values)
    (anchor,) = chain
    assert anchor.stage["supervised"] == values["supervised"]
    assert anchor.cut is None
    before, after = load_file(public / "model.safetensors"), weights(chain)[0]
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved > 5e-3  # two supervised steps at 1e-2 move weights further than one step at 1e-3 can


@pytest.mark.parametrize("kind", ["text", "messages", "answers"])
def test_datasets_with_their_own_columns(kind: str, material: dict[str, str], tmp_path: Path) -> None:
    rng = random.Random(0)

    def row() -> dict[str, Any]:
        question, answer = words(rng, 5), words(rng, 6)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        columns = {"text": question, "prompt": question, "completion": " " + answer, "messages": turns}
        wanted = {"text": ["text"], "messages": ["messages"], "answers": ["prompt", "completion"]}[kind]
        return {name: columns[name] for name in wanted}

    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row()) for _ in range(30)))
    anchors = [{"name": "a", "num_hidden_layers": 3}]
    supervised = {"max_steps": 1, "learning_rate": "1e-3"}  # as YAML reads 1e-3
    changes = {"dataset": str(data), "data_format": "columns", "anchors": anchors, "max_steps": 1}
    (anchor,) = build(recipe(material, tmp_path / "chain", supervised=supervised, **changes))
    assert anchor.stage["metrics"]["bits_per_byte_after"] > 0


def test_killed_builds_resume_to_the_same_weights(material: dict[str, str], tmp_path: Path) -> None:
    undisturbed = build(recipe(material, tmp_path / "whole"))
    values = recipe(material, tmp_path / "killed")
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "recipes/build_chain.py"), "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    work = tmp_path / "killed.build"
    # Once with a stage half done, once between two stages.
    moments = (
        lambda: last_complete_checkpoint(work / "mid/trainer") is not None,
        lambda: (tmp_path / "killed/chain.json").exists(),
    )
    for happened in moments:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not happened() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resumed = build(values)
    torch.set_num_threads(threads)
    for one, other in zip(weights(undisturbed), weights(resumed), strict=True):
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, r"training\.learning_rate: was 0\.001, is 0\.002"),
        ({"anchors": [ANCHORS[0], ANCHORS[1] | {"hidden_size": 16}]}, r"anchors\[1\]\.hidden_size: was 24, is 16"),
        ({"seed": 7}, r"training\.seed: was 42, is 7"),
    ],
)
def test_changed_recipe_is_refused(
    material: dict[str, str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    build(recipe(material, tmp_path / "chain", max_steps=1))
    before = (tmp_path / "chain/chain.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        build(recipe(material, tmp_path / "chain", max_steps=1) | change)
    assert (tmp_path / "chain/chain.json").read_bytes() == before


def test_a_stop_by_a_bad_loss_says_how_to_go_on(
    material: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: LossGuard, loss: float, step: int, example_ids: Any) -> None:
        if step == 3 and self.factor == 100:
            raise LossError("bad")

    monkeypatch.setattr(LossGuard, "check", check)
    values = recipe(material, tmp_path / "chain", anchors=ANCHORS[:1], teacher_dtype="float32")
    with pytest.raises(LossError, match="(?s)bad.*stage, mid.*raise max_loss_ratio and run the same command again"):
        build(values)
    with pytest.raises(ValueError, match=r"(?s)learning_rate: was 0\.001, is 0\.002.*max_loss_ratio"):
        build(values | {"learning_rate": 2e-3})
    (anchor,) = build(values | {"max_loss_ratio": 1000.0})
    assert anchor.stage["steps"] == 4 and anchor.stage["teacher_dtype"] == "float32"


def test_the_first_stage_from_a_cache(material: dict[str, str], tmp_path: Path) -> None:
    rows = Dataset.from_json(material["dataset"])
    options = {"max_length": 32, "eval_documents": 0, "objective": "skew_forward_kl", "skew": 0.2}
    config = cache_helpers.training_config(tmp_path, max_length=32)
    cache_helpers.build(Path(material["source"]), tmp_path / "cache", rows, config=config)
    directory = str(tmp_path / "cache")
    anchors = [{"name": "mid", "num_hidden_layers": 4, "training": {"teacher_cache": directory}}]
    chain = build(recipe(material, tmp_path / "chain", anchors=anchors, **options))
    assert chain["mid"].stage["teacher_cache"] == directory
    assert chain["mid"].stage["objective"]["skew"] == 0.2
    with pytest.raises(ValueError, match="sorts the source's coordinates first"):
        build(recipe(material, tmp_path / "other", anchors=[anchors[0] | {"hidden_size": 24}], **options))
    other = cache_helpers.save_teacher(tmp_path / "teacher")
    cache_helpers.build(other, tmp_path / "cache of another", rows, config=config)
    anchors[0]["training"] = {"teacher_cache": str(tmp_path / "cache of another")}
    with pytest.raises(ValueError, match="are not those of the teacher cache"):
        build(recipe(material, tmp_path / "other", anchors=anchors, **options))
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.build").exists()


def test_records_of_the_loss(tmp_path: Path) -> None:
    def record(**options: Any) -> dict[str, Any]:
        config = StepwiseDistillationConfig(output_dir=str(tmp_path), report_to="none", **options)
        return stage_record("teacher", config, {}, {})

    plain = record()
    assert set(plain["objective"]) == {"name", "temperature", "cross_entropy_weight", "lmbda"}
    assert plain["teacher_cache"] is None
    assert record(objective="generalized_jsd", beta=0.3)["objective"]["beta"] == 0.3
    assert record(objective="adaptive_kl", adaptive_head_mass=0.4)["objective"]["head_mass"] == 0.4
    hidden = record(hidden_loss_weight=0.5, hidden_loss_layers=[2])["objective"]
    assert (hidden["hidden_loss_weight"], hidden["hidden_loss_layers"]) == (0.5, [2])


def test_changed_anchor_is_refused(material: dict[str, str], tmp_path: Path) -> None:
    values = recipe(material, tmp_path / "chain", max_steps=1)
    chain = build(values)
    path = chain["mid"].path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mid.*model\.safetensors"):
        build(values)


def test_existing_directory_is_left_alone(material: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "chain"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="chain"):
        build(recipe(material, output))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_second_run_is_refused(material: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "chain"
    with FileLock(f"{output}.lock"), pytest.raises(FileExistsError, match="Another run is writing to .*chain: wait"):
        build(recipe(material, output))
    assert not output.exists() and not Path(f"{output}.build").exists()


def test_a_late_mistake_does_not_keep_the_directory(material: dict[str, str], tmp_path: Path) -> None:
    """The recipe that is corrected is another one, but nothing has been learnt with the first."""
    values = recipe(material, tmp_path / "chain", max_steps=1)
    with pytest.raises(ValueError, match="learning rate"):
        build(values | {"learning_rate": -1.0})
    assert (tmp_path / "chain.build").exists()
    assert len(build(values | {"anchors": ANCHORS[:1]})) == 1


def test_an_anchor_with_other_tokens_is_refused(material: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    random_model(tiny_config("llama", layers=3)).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokens = {token: (number + 7) % 50 if number < 50 else number for token, number in tokenizer.get_vocab().items()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"], state["added_tokens"] = tokens, []
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))).save_pretrained(other)
    values = recipe(material, tmp_path / "chain", anchors=[{"name": "mid", "checkpoint": str(other)}])
    with pytest.raises(ValueError, match="tokenizer of anchor 'mid' .* is not the chain's .64 tokens."):
        build(values)
    assert not (tmp_path / "chain.build").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub=True has no meaning in a build; push the finished chain"),
        ({"resume_from_checkpoint": "last"}, "resume_from_checkpoint='last' has no meaning in a build"),
        ({"teacher_model_name_or_path": "gpt2"}, "teacher_model_name_or_path='gpt2' has no meaning in a build"),
        ({"eval_strategy": "steps"}, "do_eval=True has no meaning in a build; leave eval_strategy out"),
    ],
)
def test_options_without_meaning(
    options: dict[str, Any], message: str, material: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe(material, tmp_path / "chain", **options))
    assert not (tmp_path / "chain.build").exists()


def test_sources_that_do_not_do(material: dict[str, str], tmp_path: Path) -> None:
    source = Path(material["source"])
    config = json.loads((source / "config.json").read_text())
    for changed, message in (
        ({"model_type": "t5"}, "The source .* has model_type 't5' .* no causal language model class"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "The source .* has quantized weights"),
    ):
        (source / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            build(recipe(material, tmp_path / "chain"))
    (source / "config.json").write_text(json.dumps(config))
    for path in source.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match="The source .* has no tokenizer: save it beside the weights"):
        build(recipe(material, tmp_path / "chain"))


def test_positions(material: dict[str, str], tmp_path: Path) -> None:
    """Learned positions bound the rows of training and calibration; a larger length that was asked for is refused."""
    random_model(tiny_config("gpt2", layers=4, n_positions=48), std=0.1).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    rng = random.Random(0)
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"text": words(rng, 70)}) for _ in range(30)))
    source = {"source": str(tmp_path / "gpt2"), "dataset": str(tmp_path / "long.jsonl")}
    values = recipe(source, tmp_path / "chain", anchors=[{"name": "slim", "hidden_size": 24}], max_steps=1)
    with pytest.raises(ValueError, match="max_length=64 is more than the 48 positions"):
        build(values | {"max_length": 64})
    assert len(build({name: value for name, value in values.items() if name != "max_length"})) == 1


def test_a_chain_of_one_anchor(
    material: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    values = recipe(material, tmp_path / "chain", anchors=ANCHORS[:1], max_steps=1)
    build(values)
    assert "will have one anchor" in caplog.text
    assert "Stage 1 of 1: source -> mid" in capsys.readouterr().out


def test_without_locks_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with claimed(tmp_path / "chain", PartialState()):
        pass
    assert "cannot be locked" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ([], "no anchors"),
        ([{"name": "a", "layers": 3}], "unknown options"),
        ([{"num_hidden_layers": 3}], "needs a name"),
        ([{"name": "../a", "num_hidden_layers": 3}], "cannot be named"),
        ([{"name": "..", "num_hidden_layers": 3}], "cannot be named"),
        ([{"name": 1, "num_hidden_layers": 3}], "cannot be named"),
        ([{"name": "source-sorted", "num_hidden_layers": 3}], "cannot be named"),
        ([{"name": "a", "num_hidden_layers": 3, "supervised": {"lr": 1}}], "`supervised` has 'lr'"),
        ([{"name": "a", "num_hidden_layers": 3}, {"name": "b", "num_hidden_layers": 4}], "would grow"),
        ([{"name": "a"}], "either `checkpoint` or a shape"),
        ([{"name": "a", "num_hidden_layers": 3, "training": {"lr": 1}}], "is not an option of Stepwise"),
        ([{"name": "a", "num_hidden_layers": 3, "training": {"lmbda": 2}}], r"lmbda=2 is outside \[0, 1\]"),
        ([{"name": "a", "num_hidden_layers": 9}], "would grow"),
        ([{"name": "a", "num_hidden_layers": 5}], "as large as"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(
    material: dict[str, str], tmp_path: Path, anchors: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe(material, tmp_path / "chain", anchors=anchors))
    assert not (tmp_path / "chain").exists() and not (tmp_path / "chain.build").exists()


def test_cut_config_takes_the_other_dimensions_along() -> None:
    config = tiny_config("llama", layers=6, heads=4)
    assert cut_config(config, {"hidden_size": 16}).num_attention_heads == 2
    assert cut_config(config, {"hidden_size": 16}).intermediate_size == 64
    assert cut_config(config, {"hidden_size": 28}).num_attention_heads == 4  # three and a half heads are none
    by_size = cut_config(config, {"n_params": 60_000})
    assert by_size.hidden_size == 32 and by_size.num_hidden_layers < 6
