"""A heterogeneous chain from one recipe: source -> bridge -> anchors -> sizes, by text and by tokens."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf import DistillationChain, StepwiseDistillationConfig
from cbd_hf.commands.build import main
from cbd_hf.distillation import stages
from cbd_hf.distillation.answers import AnswersManifest, load_answers
from cbd_hf.distillation.bridge.config import BridgeDistillationConfig
from cbd_hf.distillation.bridge.recipe import answers_run
from cbd_hf.distillation.bridge.stage import bridge_record
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
    assert stage["objective"]["alm_debias"] is True and stage["objective"]["alm_bias_threshold"] == 0.1
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
    made = stage["answers"]
    assert made["answers"] == made["kept"] == 20  # 24 rows, 4 held out
    assert made["settings"]["temperature"] == 0.7 and made["settings"]["max_new_tokens"] == 8
    assert made["filters"]["drop_unfinished"] is False and made["end_token_ids"]
    assert made["source"]["name"] == stage["teacher"] == recipe["source"]
    assert stage["supervised"] == {"max_steps": 1} and stage["training"] == {"max_steps": 2}
    assert stage["steps"] == 2 and stage["tokens"] > 0
    # The answers stay, and another chain of the same recipe could learn from them.
    rows, _ = load_answers(f"{recipe['output_dir']}.answers")
    assert len(rows) == 20 and AnswersManifest.read(Path(f"{recipe['output_dir']}.answers")).complete


def test_a_kill_behind_a_supervised_phase(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's fine-tuning is saved, its checkpoints are not removed yet: the bridge never goes on from them."""
    recipe["bridge"] |= {
        "method": "sequence",
        "supervised": {"max_steps": 2},
        "answers": {"max_new_tokens": 4},
        "training": {"max_steps": 2},
    }
    recipe["anchors"] = recipe["anchors"][:1]
    undisturbed = build(recipe | {"output_dir": recipe["output_dir"] + "-once"})
    remove = stages.shutil.rmtree

    def killed(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "source-supervised-trainer":
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build(recipe)
    left = Path(f"{recipe['output_dir']}.build") / "bridge"
    assert (left / "source-supervised").is_dir() and list(left.glob("*-trainer/checkpoint-2"))
    resumed = build(recipe)
    for one, other in zip(undisturbed, resumed, strict=True):
        assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


def test_sizes_from_python(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    count = AutoModelForCausalLM.from_pretrained(recipe["bridge"]["checkpoint"]).num_parameters()
    recipe |= {"sizes": [str(count)], "max_steps": 1, "anchors": recipe["anchors"][:1]}
    build(recipe)
    assert len(list(Path(f"{recipe['output_dir']}.models").iterdir())) == 1


def test_record_of_a_method(tmp_path: Path) -> None:
    config = BridgeDistillationConfig(
        output_dir=str(tmp_path), method="uld", uld_tokens=7, hidden_loss_weight=0.25, source_prompt="chat"
    )
    record = bridge_record("source", config, {}, {"steps": 1})
    assert record["objective"]["uld_tokens"] == 7 and record["objective"]["hidden_loss_weight"] == 0.25
    assert record["rows"]["source_prompt"] == "chat" and record["steps"] == 1


def test_type_of_the_source_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    run = answers_run({"answers": {"batch_size": "4", "n": 2}})
    assert run.options(tuned=False) == {"dtype": "auto", "batch_size": 4, "model_init_kwargs": None}
    for there, expected in ((True, "bfloat16"), (False, "auto")):
        monkeypatch.setattr("torch.accelerator.is_available", lambda there=there: there)
        assert run.options(tuned=True)["dtype"] == expected
    assert answers_run({"answers": {"dtype": "float16"}}).options(tuned=True)["dtype"] == "float16"


def test_how_the_source_answers(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spied(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr("cbd_hf.distillation.bridge.stage.build_answers", spied)
    recipe["bridge"] |= {
        "method": "sequence",
        "answers": {"max_new_tokens": 8, "dtype": "bfloat16", "model_init_kwargs": {"a": 1}},
    }
    with pytest.raises(KeyboardInterrupt):
        build(recipe)
    assert (seen["dtype"], seen["batch_size"], seen["model_init_kwargs"]) == ("bfloat16", 16, {"a": 1})


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
        ({"training": {"method": "sequence"}}, {}, "write it beside `training`"),
        ({"supervised": {"max_steps": 1}, "training": {"teacher_cache": "none"}}, {}, "trains the source first"),
        ({"training": {"teacher_cache": "none"}}, {}, "not a teacher cache"),
        ({"method": "sequence", "answers": {"dtype": "int8"}}, {}, "dtype='int8'"),
        ({"method": "sequence", "answers": {"batch_size": 0}}, {}, "batch_size=0"),
        ({"method": "sequence", "answers": {"source_prompt": "chat"}}, {}, "no chat template"),
        ({"method": "sequence", "answers": {"max_new_tokens": 300}}, {}, "256 positions"),
        ({"training": {"source_prompt": "chat"}}, {}, "no chat template"),
        ({"training": {"source_max_length": 300}}, {}, "256 positions"),
        ({}, {"include_source": True}, "include_source"),
        ({}, {"sizes": ["900M"]}, "outside the chain's range"),
        ({}, {"sizes": ["many"]}, "not a number"),
    ],
)
def test_refused_before_any_work(
    recipe: dict[str, Any], bridge: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    recipe["bridge"] |= bridge
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        build(recipe | changes)
    assert not list(Path(recipe["output_dir"]).parent.glob("chain*"))


@pytest.mark.parametrize(
    ("bridge", "missing"),
    [
        ({"method": "mined"}, "rapidfuzz"),
        ({"method": "sequence", "answers": {"engine": "vllm"}}, "vllm"),
        ({"method": "sequence", "filters": {"min_rouge_l": 20}}, "rouge_score"),
    ],
)
def test_missing_packages(
    recipe: dict[str, Any], bridge: dict[str, Any], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None if name == missing else find(name, *args))
    recipe["bridge"] |= bridge
    with pytest.raises((ImportError, ValueError), match=f"(?i)needs {missing}"):
        build(recipe)
    assert not list(Path(recipe["output_dir"]).parent.glob("chain*"))


TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def write_conversations(recipe: dict[str, Any], *last: str) -> None:
    """For a source that has a chat template and a student that has none; `last` are the roles of the last one."""
    source = AutoTokenizer.from_pretrained(recipe["source"])
    source.chat_template = TEMPLATE
    source.save_pretrained(recipe["source"])
    rng = random.Random(1)
    roles = [("user", "assistant")] * 11 + [last or ("user", "assistant")]
    rows = [[{"role": role, "content": sentence(rng)} for role in turns] for turns in roles]
    Path(recipe["dataset"]).write_text("\n".join(json.dumps({"messages": turns}) for turns in rows))


@pytest.mark.parametrize("method", ["alm", "sequence"])
def test_conversations_without_a_template(recipe: dict[str, Any], method: str) -> None:
    """The source has one, the student not: found before the source is fine-tuned or answers."""
    write_conversations(recipe)
    recipe["bridge"] |= {"method": method, "supervised": {"max_steps": 1}}
    if method == "sequence":
        recipe["bridge"]["answers"] = {"max_new_tokens": 8}
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        build(recipe | {"data_format": "columns"})
    assert not list(Path(recipe["output_dir"]).parent.glob("chain*"))


@pytest.mark.parametrize(
    ("template", "last", "message"),
    [
        (TEMPLATE, [], None),
        (None, [], "chat_template_path=.* must be a .jinja or .j2 file"),
        ("{% for m in messages %}{{ m['content'] }}", [], "student's chat template refuses"),
        (TEMPLATE, ["user"], "no assistant turn"),
    ],
    ids=["good", "absent", "broken", "bad row"],
)
def test_conversations_with_a_template_of_a_file(
    recipe: dict[str, Any],
    template: str | None,
    last: list[str],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows are tried with it, and the build's own tokenizer is left to the trainer."""
    write_conversations(recipe, *last)
    if template is not None:
        (tmp_path / "own.jinja").write_text(template)
    recipe["bridge"] |= {
        "supervised": {"max_steps": 1},
        "training": {"chat_template_path": str(tmp_path / "own.jinja")},
    }
    reached = []

    def make_bridge(*args: Any, **kwargs: Any) -> None:
        reached.append(kwargs["tokenizer"])
        raise InterruptedError

    monkeypatch.setattr("cbd_hf.distillation.builder.make_bridge", make_bridge)
    with pytest.raises(ValueError if message else InterruptedError, match=message):
        build(recipe | {"data_format": "columns"})
    assert [tokenizer.chat_template for tokenizer in reached] == ([] if message else [None])
    if message:
        assert not list(tmp_path.glob("chain*"))


def test_answers_of_something_else(recipe: dict[str, Any]) -> None:
    recipe["bridge"] |= {"method": "sequence", "supervised": {"max_steps": 1}, "answers": {"max_new_tokens": 8}}
    own = Path(f"{recipe['output_dir']}.answers")
    own.mkdir()
    (own / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="answers"):
        build(recipe)
    assert [path.name for path in own.iterdir()] == ["notes"] and not Path(f"{recipe['output_dir']}.build").exists()
