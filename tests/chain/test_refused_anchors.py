from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from cbd_hf.chain import DistillationChain
from cbd_hf.checkpoint import CheckpointError
from tests.chain.helpers import (
    LAYERS,
    assert_same_weights,
    edit_config,
    make_model,
    make_tokenizer,
)
from tests.models import VOCAB, tiny_config


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {}, "different architecture, model_type 'llama'.*'gpt2'"),
        ("gpt2", {"vocab_size": 80}, "vocab_size (80|64), but"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings (True|False), but"),
    ],
)
def test_other_family(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, overrides: dict[str, Any], message: str
) -> None:
    make_model(1, family, **overrides).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=message) as caught:
        DistillationChain.from_anchors([checkpoints["large"], tmp_path / "odd"], tmp_path / "out" / "chain")
    assert str(tmp_path / "odd") in str(caught.value) and str(checkpoints["large"]) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_tokenizer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    make_model(3).save_pretrained(tmp_path / "odd")
    make_tokenizer(VOCAB - 2).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="another tokenizer vocabulary"):
        DistillationChain.from_anchors([tmp_path / "odd", checkpoints["small"]], tmp_path / "chain")


def test_broken_tokenizer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoints["large"], tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer of anchor.*broken"):
        DistillationChain.from_anchors([broken, checkpoints["small"]], tmp_path / "chain")


def test_same_size(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both have .* parameters"):
        DistillationChain.from_anchors([checkpoints["large"], checkpoints["large"]], tmp_path / "chain")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(checkpoints: dict[str, Path], tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"at least two anchors.*got {count}"):
        DistillationChain.from_anchors([checkpoints["large"]][:count], tmp_path / "chain")


def test_one_path_instead_of_a_list(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two anchors"):
        DistillationChain.from_anchors(str(checkpoints["large"]), tmp_path / "chain")


@pytest.mark.parametrize("option", ["names", "stages", "cuts"])
def test_wrong_number_of_records(checkpoints: dict[str, Path], tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a list with one entry for each of the 2"):
        DistillationChain.from_anchors(
            [checkpoints["large"], checkpoints["small"]], tmp_path / "chain", **{option: ["a"]}
        )


def test_wrong_kinds(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    anchors: list[Any] = [checkpoints["large"], checkpoints["small"]]
    with pytest.raises(ValueError, match=r"anchors\[1\] is a int"):
        DistillationChain.from_anchors([anchors[0], 3], tmp_path / "chain")
    with pytest.raises(ValueError, match="basis must be"):
        DistillationChain.from_anchors(anchors, tmp_path / "chain", basis="")
    with pytest.raises(ValueError, match=r"metadata\['x'\]"):
        DistillationChain.from_anchors(anchors, tmp_path / "chain", metadata={"x": object()})
    with pytest.raises(ValueError, match="at least one anchor"):
        DistillationChain(tmp_path, [], family={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "remote code"),
        ({"model_type": "mine"}, "model_type 'mine', for which"),
        ({"model_type": "t5"}, "no causal language model class"),
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
        ({"n_layer": 9}, "lack .*transformer.h.4.* and .* more"),
        ({"n_embd": 64}, "has shape .* asks for"),
        ({"n_head": 3}, "no model can be built|cannot be read"),
    ],
)
def test_unusable_configs(checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    odd = Path(shutil.copytree(checkpoints["large"], tmp_path / "odd"))
    edit_config(odd, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        DistillationChain.from_anchors([odd, checkpoints["small"]], tmp_path / "chain")
    assert str(odd) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_stock_architecture_with_auto_map_is_fine(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoints["large"], tmp_path / "large"))
    edit_config(source, auto_map={"AutoModelForCausalLM": "mine.Mine"})
    chain = DistillationChain.from_anchors([source, checkpoints["small"]], tmp_path / "chain")
    assert_same_weights(chain[0].load_model(), make_model(LAYERS["large"]))


def test_no_config(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "odd").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        DistillationChain.from_anchors([tmp_path / "odd", checkpoints["small"]], tmp_path / "chain")
    (tmp_path / "odd" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter"):
        DistillationChain.from_anchors([tmp_path / "odd", checkpoints["small"]], tmp_path / "chain")
    (tmp_path / "odd" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json is not valid"):
        DistillationChain.from_anchors([tmp_path / "odd", checkpoints["small"]], tmp_path / "chain")


def test_pickled_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    odd = Path(shutil.copytree(checkpoints["large"], tmp_path / "odd"))
    (odd / "model.safetensors").rename(odd / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="odd.*only pickled weights"):
        DistillationChain.from_anchors([odd, checkpoints["small"]], tmp_path / "chain")


def test_damaged_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    odd = Path(shutil.copytree(checkpoints["large"], tmp_path / "odd"))
    weights = odd / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="odd.*truncated"):
        DistillationChain.from_anchors([odd, checkpoints["small"]], tmp_path / "chain")


def test_missing_and_outside_shards(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    make_model(3).save_pretrained(odd, max_shard_size="20KB")
    index_path = odd / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = sorted(odd.glob("*.safetensors"))[0]
    moved = shard.rename(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=shard.name):
        DistillationChain.from_anchors([odd, checkpoints["small"]], tmp_path / "chain")
    index["weight_map"] = {
        name: "../outside.safetensors" if file == shard.name else file for name, file in index["weight_map"].items()
    }
    index_path.write_text(json.dumps(index))
    assert moved.is_file()
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        DistillationChain.from_anchors([odd, checkpoints["small"]], tmp_path / "chain")


def test_unusable_models(tmp_path: Path) -> None:
    class MyConfig(type(tiny_config("llama"))):  # type: ignore[misc]
        model_type = "mine"

    small, odd = make_model(1, "llama"), make_model(2, "llama")
    odd.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"anchor 1 \(a LlamaForCausalLM\).*model.layers.2.* is missing"):
        DistillationChain.from_anchors([small, odd], tmp_path / "chain")
    odd.config.num_hidden_layers = 2
    odd.config.intermediate_size *= 2
    with pytest.raises(ValueError, match="has shape .* asks for shape"):
        DistillationChain.from_anchors([small, odd], tmp_path / "chain")
    mine = LlamaForCausalLM(MyConfig(**tiny_config("llama").to_dict()))
    with pytest.raises(ValueError, match=r"model_type 'llama' \(MyConfig\), for which"):
        DistillationChain.from_anchors([small, mine], tmp_path / "chain")
    adapted = make_model(3, "llama")
    adapted._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="PEFT adapters"):
        DistillationChain.from_anchors([small, adapted], tmp_path / "chain")


def test_missing_anchor(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/at/all"):
        DistillationChain.from_anchors([checkpoints["small"], "nowhere/at/all"], tmp_path / "chain")
    with pytest.raises(FileNotFoundError, match="config.json is a file"):
        DistillationChain.from_anchors(
            [checkpoints["small"], checkpoints["large"] / "config.json"], tmp_path / "chain"
        )
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*could not be downloaded"):
        DistillationChain.from_anchors([checkpoints["small"], "nobody/nothing"], tmp_path, cache_dir=tmp_path / "hub")
