"""Writing weights tensor by tensor gives what `save_pretrained` gives."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cbd_hf._conversion import SavedForm
from cbd_hf.checkpoint import INDEX_FILE, SINGLE_FILE, weight_files
from cbd_hf.layout import meta_model
from cbd_hf.shards import ShardWriter

from .test_conversion import CONVERTED, MODELS, SIZES, config_of, peak_memory, scrambled_model


def everything(directory: Path) -> dict[str, torch.Tensor]:
    """All stored tensors, each of which must be stored once."""
    files = [load_file(file) for file in weight_files(directory)]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    assert len(stored) == sum(map(len, files))
    return stored


def write(model: PreTrainedModel, directory: Path, seed: int | None = None, **options: Any) -> None:
    state = model.state_dict()
    with ShardWriter(directory, meta_model(model.config), **options) as writer:
        names = list(writer.names)
        if seed is not None:
            random.Random(seed).shuffle(names)
        for name in names:
            writer.add(name, state[name])


@pytest.mark.parametrize("seed", [None, 1], ids=["in order", "shuffled"])
@pytest.mark.parametrize("name", MODELS)
def test_like_save_pretrained(name: str, seed: int | None, tmp_path: Path) -> None:
    model = scrambled_model(name)
    model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    write(model, tmp_path / "written", seed, max_shard_size="8KB")
    saved, written = everything(tmp_path / "saved"), everything(tmp_path / "written")
    assert set(saved) == set(written)
    assert (not set(saved) <= set(model.state_dict())) == (name in CONVERTED)
    for key, tensor in saved.items():
        assert torch.equal(written[key], tensor), key
    indices = [json.loads((tmp_path / kind / INDEX_FILE).read_text()) for kind in ("saved", "written")]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    if seed is None and name not in CONVERTED:
        assert indices[0] == indices[1]
    assert set(indices[1]["weight_map"]) == set(saved)

    model.config.save_pretrained(tmp_path / "written")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_files_and_index(tmp_path: Path) -> None:
    model = scrambled_model("qwen3_moe")
    write(model, tmp_path, max_shard_size=8000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert sorted(os.listdir(tmp_path)) == sorted([*shards, INDEX_FILE])
    for shard in shards:
        with safe_open(tmp_path / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
            assert all(index["weight_map"][name] == shard for name in names)
            assert sum(file.get_tensor(name).nbytes for name in names) <= 8000
    assert index["metadata"]["total_parameters"] == model.num_parameters()


def test_single_file(tmp_path: Path) -> None:
    model = scrambled_model("llama-tied")
    write(model, tmp_path, metadata={"format": "pt", "made": "here"})
    assert os.listdir(tmp_path) == [SINGLE_FILE]
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}


def test_tensor_larger_than_a_shard(tmp_path: Path) -> None:
    model = scrambled_model("llama")
    write(model, tmp_path, max_shard_size=1)
    assert len(weight_files(tmp_path)) == len(model.state_dict())
    assert set(everything(tmp_path)) == set(model.state_dict())


@pytest.mark.parametrize("names", [("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")])
@pytest.mark.parametrize("turned", [False, True])
def test_tied_weights_are_stored_once(names: tuple[str, ...], turned: bool, tmp_path: Path) -> None:
    model = scrambled_model("llama-tied")
    state = model.state_dict()
    with ShardWriter(tmp_path, meta_model(model.config)) as writer:
        assert "lm_head.weight" not in writer.names and set(writer.names) < set(state)
        for name in writer.names:
            if name != "model.embed_tokens.weight":
                writer.add(name, state[name])
        for name in names[::-1] if turned else names:
            writer.add(name, state[name])
    assert torch.equal(everything(tmp_path)["model.embed_tokens.weight"], state["lm_head.weight"])


def test_buffers_are_expected(tmp_path: Path) -> None:
    """from_pretrained would otherwise find the routers' biases missing."""
    model = scrambled_model("deepseek_v3")
    with (
        pytest.raises(ValueError, match="1 of .* were not added: model.layers.1.mlp.gate.e_score_correction_bias"),
        ShardWriter(tmp_path, meta_model(model.config)) as writer,
    ):
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
    assert not os.listdir(tmp_path)


def test_form_of_the_loaded_checkpoint(tmp_path: Path) -> None:
    """A model that was loaded from another form than usual is saved in it, as `save_pretrained` does."""
    scrambled_model("mixtral").save_pretrained(tmp_path / "loaded", save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "loaded")
    model.save_pretrained(tmp_path / "saved")
    with ShardWriter(tmp_path / "written", model) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
    saved, written = everything(tmp_path / "saved"), everything(tmp_path / "written")
    assert "model.layers.0.mlp.experts.gate_up_proj" in saved
    assert set(saved) == set(written) and all(torch.equal(written[name], saved[name]) for name in saved)


def test_views_and_repetitions(tmp_path: Path) -> None:
    """Neither what shares its memory with another tensor nor what is a part of a larger one is refused or kept."""
    model = scrambled_model("llama")
    state = model.state_dict()
    large = torch.randn(4, *state["lm_head.weight"].shape)
    given = state | {"model.embed_tokens.weight": large[1], "lm_head.weight": large[1]}
    name = "model.layers.{}.mlp.down_proj.weight"
    given[name.format(0)] = given[name.format(1)] = torch.randn(state[name.format(0)].shape)
    name = "model.layers.0.mlp.up_proj.weight"
    given[name] = torch.randn(state[name].T.shape).T
    with ShardWriter(tmp_path, meta_model(model.config)) as writer:
        for key, tensor in given.items():
            writer.add(key, torch.nn.Parameter(tensor))
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in writer._shard.values())
    stored = everything(tmp_path)
    assert all(torch.equal(stored[key], tensor) for key, tensor in given.items())


def test_dtype_is_that_of_the_tensors(tmp_path: Path) -> None:
    model = scrambled_model("qwen3_moe").to(torch.bfloat16)
    write(model, tmp_path)
    assert {tensor.dtype for tensor in everything(tmp_path).values()} == {torch.bfloat16}


def test_wrong_tensors(tmp_path: Path) -> None:
    model = scrambled_model("llama")
    norm = model.model.norm.weight
    writer = ShardWriter(tmp_path, meta_model(model.config))
    with pytest.raises(ValueError, match="nothing is not among what is saved"):
        writer.add("nothing", norm)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[3\], the model's is \[16\]"):
        writer.add("model.norm.weight", torch.zeros(3))
    writer.add("model.norm.weight", norm)
    with pytest.raises(ValueError, match="model.norm.weight was added before"):
        writer.add("model.norm.weight", norm)
    with pytest.raises(ValueError, match=r"20 of 21 tensors .* model.embed_tokens.weight, .*, \.\.\."):
        writer.close()
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="model.norm.weight comes too late"):
        writer.add("model.norm.weight", norm)


@pytest.mark.parametrize("size", ["0GB", 0, -1, "much"])
def test_shard_size(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size|format"):
        ShardWriter(tmp_path / "new", meta_model(config_of("llama")), max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "model-00001-of-00002.safetensors"])
def test_existing_weights_are_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=f"already holds weights.*{name}"):
        ShardWriter(tmp_path, meta_model(config_of("llama")))
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("failure", ["caller", "disk full", "naming", "index"])
def test_nothing_is_left_after_a_failure(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled_model("mixtral")
    (tmp_path / "config.json").write_text("{}")
    calls = []

    def fail_at_the_third(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            real(*args, **kwargs)
            if len(calls) == 3:
                raise OSError("No space left on device")

        return call

    if failure == "disk full":
        monkeypatch.setattr(safetensors.torch, "save_file", fail_at_the_third(safetensors.torch.save_file))
    elif failure == "naming":
        monkeypatch.setattr(os, "replace", fail_at_the_third(os.replace))
    elif failure == "index":

        def refuse(path: Path, text: str) -> None:
            calls.extend(path.parent.glob("model-*"))
            raise OSError("No space left on device")

        monkeypatch.setattr("cbd_hf.shards.atomic_write_text", refuse)
    with (
        pytest.raises(OSError, match="No space left"),
        ShardWriter(tmp_path, meta_model(model.config), max_shard_size="8KB") as writer,
    ):
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        if failure == "caller":
            calls = list(tmp_path.iterdir())
            raise OSError("No space left on device")
    assert len(calls) >= 3
    assert os.listdir(tmp_path) == ["config.json"]


def test_files_have_no_final_name_before_the_end(tmp_path: Path) -> None:
    model = scrambled_model("llama")
    with ShardWriter(tmp_path, meta_model(model.config), max_shard_size="1KB") as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        files = os.listdir(tmp_path)
        assert files and all(name.startswith(".") and ".tmp-" in name for name in files)
    files = os.listdir(tmp_path)
    assert files and not any(name.startswith(".") for name in files)
    assert writer.close() == [] and os.listdir(tmp_path) == files


def test_room_is_made_before_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes copies, of which there must not be a shard already."""
    model = scrambled_model("qwen3_moe")
    held = []
    convert = SavedForm.convert

    def record(self: SavedForm, recipe: Any, tensors: dict[str, torch.Tensor]) -> Any:
        held.append((sum(t.nbytes for t in writer._shard.values()), sum(t.nbytes for t in tensors.values())))
        return convert(self, recipe, tensors)

    monkeypatch.setattr(SavedForm, "convert", record)
    with ShardWriter(tmp_path, meta_model(model.config), max_shard_size=20_000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
    assert any(shard for shard, _ in held)
    assert all(shard == 0 or shard + new <= 20_000 for shard, new in held)


def test_memory_is_that_of_one_shard(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = meta_model(AutoConfig.for_model("llama", **SIZES | sizes))
    shard = 16 << 20
    assert sum(parameter.nbytes for parameter in model.parameters()) > 7 * shard

    def run(directory: Path) -> None:
        with ShardWriter(directory, model, max_shard_size=shard) as writer:
            for name in writer.names:
                writer.add(name, torch.ones(model.get_parameter(name).shape))

    run(tmp_path / "first")  # whatever is allocated once
    assert 0.7 * shard < peak_memory(lambda: run(tmp_path / "second")) < 2.5 * shard
    assert len(weight_files(tmp_path / "second")) > 7
