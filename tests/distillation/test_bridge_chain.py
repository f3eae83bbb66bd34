"""A heterogeneous chain from one recipe: source -> bridge -> anchors -> sizes, by text and by tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf import DistillationChain, StepwiseDistillationConfig
from cbd_hf.commands.build import main
from cbd_hf.distillation.builder import build_chain
from cbd_hf.distillation.recipe import BuildArguments

from ..models import random_model, tiny_config
from ..tokenization.tokenizers import byte_fallback_prefix, byte_level


WORDS = "the cat sat on a mat and saw some dogs run over green hills while rain fell slowly".split()


def sentence(rng: random.Random, count: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=count)) + "."


def save_model(directory: Path, family: str, tokenizer: PreTrainedTokenizerBase, layers: int, **shape: Any) -> str:
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens["pad_token_id"] = tokenizer.eos_token_id
    config = tiny_config(family, layers=layers, vocab_size=len(tokenizer), **shape, **tokens)
    random_model(config, std=0.1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    rng = random.Random(0)
    rows = [{"prompt": f"Question: {sentence(rng, 4)}\n", "completion": sentence(rng)} for _ in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return {
        "source": save_model(tmp_path / "source", "llama", byte_fallback_prefix(), 2, max_position_embeddings=256),
        "dataset": str(data),
        "data_format": "instructions",
        "bridge": {"checkpoint": save_model(tmp_path / "student", "gpt2", byte_level(), 4, n_positions=128)},
        "anchors": [
            {"name": "large", "num_hidden_layers": 3},
            {"name": "small", "num_hidden_layers": 2, "hidden_size": 24},
        ],
        "eval_documents": 4,
        "calibration_documents": 4,
        "output_dir": str(tmp_path / "chain"),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_length": 96,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def build(values: dict[str, Any]) -> DistillationChain:
    names = BuildArguments.__dataclass_fields__
    args = BuildArguments(**{name: value for name, value in values.items() if name in names})
    training = StepwiseDistillationConfig(**{name: value for name, value in values.items() if name not in names})
    return build_chain(args, training)


def test_by_tokens_from_one_file(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe["bridge"] |= {"method": "alm", "training": {"max_steps": 3, "learning_rate": "2e-3"}}
    counts = [AutoModelForCausalLM.from_pretrained(recipe["bridge"]["checkpoint"]).num_parameters()]
    recipe["sizes"] = [str(counts[0])]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    main(["--config", str(path)])
    chain = DistillationChain.from_pretrained(recipe["output_dir"], verify="full")
    assert [anchor.name for anchor in chain] == ["bridge", "large", "small"]
    stage = chain[0].stage
    assert stage is not None
    assert stage["teacher"] == recipe["source"] and stage["initial"] == recipe["bridge"]["checkpoint"]
    assert stage["objective"]["name"] == "alm" and stage["objective"]["alm_temperature"] == 100
    assert stage["objective"]["cross_entropy_weight"] == 0.5  # the bridge's own default, not the recipe's 0
    assert stage["steps"] == 3 and stage["learning_rate"] == 2e-3
    assert chain[1].stage is not None and chain[1].stage["teacher"] == "bridge"
    assert chain[1].stage["objective"]["cross_entropy_weight"] == 0
    assert chain[0].config.model_type == "gpt2" and not Path(f"{recipe['output_dir']}.build").exists()
    made = Path(f"{recipe['output_dir']}.models")
    (model,) = made.iterdir()
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() == counts[0]
    assert len(AutoTokenizer.from_pretrained(model)) == len(byte_level())
    assert str(model) in capsys.readouterr().out


def test_by_text(recipe: dict[str, Any]) -> None:
    recipe["bridge"] |= {
        "name": "anchor-zero",
        "method": "sequence",
        "supervised": {"max_steps": 1},
        "answers": {"max_new_tokens": 8, "temperature": "7e-1"},
        "training": {"max_steps": 2},
    }
    chain = build(recipe)
    assert [anchor.name for anchor in chain] == ["anchor-zero", "large", "small"]
    stage = chain[0].stage
    assert stage is not None and stage["objective"] == {"name": "sequence"}
    assert stage["answers"]["answers"] == stage["answers"]["kept"] == 20  # 24 rows, 4 held out
    assert stage["answers"]["settings"]["temperature"] == 0.7
    assert stage["supervised"] == {"max_steps": 1} and stage["training"] == {"max_steps": 2}


def test_resumes_behind_the_bridge(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from cbd_hf.distillation import builder

    undisturbed = build(recipe | {"output_dir": recipe["output_dir"] + "-once"})
    distil = builder.distil

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "distil", killed)
    with pytest.raises(KeyboardInterrupt):
        build(recipe)
    assert [anchor.name for anchor in DistillationChain.from_pretrained(recipe["output_dir"])] == ["bridge"]
    monkeypatch.setattr(builder, "distil", distil)
    monkeypatch.setattr(builder, "make_bridge", killed)  # it is not made again
    resumed = build(recipe)
    for one, other in zip(undisturbed, resumed, strict=True):
        assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("bridge", "changes", "message"),
    [
        ({"methd": "alm"}, {}, "unknown options"),
        ({"method": "gold"}, {}, "method='gold' is unknown"),
        ({"training": {"steps": 3}}, {}, "'steps'"),
        ({"training": {"alm_temperature": -1}}, {}, "alm_temperature=-1"),
        ({"answers": {"max_new_tokens": 8}}, {}, "only method: sequence"),
        ({"method": "sequence", "answers": {"top_p": 2}}, {}, "top_p=2"),
        ({"method": "sequence"}, {"data_format": "text"}, "prompts"),
        ({"name": "small"}, {}, "needs a name of its own"),
        ({"name": "../x"}, {}, "cannot be named"),
        ({"checkpoint": ""}, {}, "needs a checkpoint"),
        ({}, {"include_source": True}, "include_source"),
        ({}, {"sizes": ["900M"]}, "outside the chain's range"),
        ({}, {"sizes": ["many"]}, "not a number"),
    ],
)
def test_refused_before_any_work(
    recipe: dict[str, Any], bridge: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    recipe["bridge"] |= bridge
    with pytest.raises(ValueError, match=message):
        build(recipe | changes)
    assert not Path(recipe["output_dir"]).exists()
