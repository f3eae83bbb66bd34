"""Checkpoints that transformers stores in another form than it keeps the model in, read tensor by tensor."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from cbd_hf import checkpoint
from cbd_hf._conversion import Recipe
from cbd_hf.checkpoint import SINGLE_FILE, CheckpointError, CheckpointReader, weight_files
from cbd_hf.layout import meta_model


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Twelve experts: the tenth comes after the second, whatever the alphabet says.
MOE: dict[str, Any] = {"moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_experts": 12}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 32, "n_positions": 32},
    "llama": SIZES,
    "llama-tied": SIZES | {"tie_word_embeddings": True},
    "phi3": SIZES,
    "gpt_neox": SIZES,
    "mixtral": SIZES | {"num_local_experts": 12},
    "olmoe": SIZES | {"num_experts": 4},
    "qwen3_moe": SIZES | MOE | {"head_dim": 4},
    "deepseek_v3": SIZES
    | MOE
    | LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 12, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    # A renaming fits a name of the model too.
    "axk1": SIZES
    | MOE
    | LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 12, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    # One stored tensor is several of the model's.
    "hrm_text": SIZES | {"num_key_value_heads": 4, "head_dim": 4, "num_layers_per_stack": 1},
    # Several are one, without being stacked, and of different sizes.
    "olmo_hybrid": SIZES
    | {"num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    | LINEAR
    | {"linear_value_head_dim": 16},
    # Its checkpoints may have a prefix more.
    "qwen3_5_text": SIZES | LINEAR | {"linear_value_head_dim": 8, "head_dim": 4},
}
CONVERTED = ("gpt_neox", "mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "axk1", "hrm_text", "olmo_hybrid")


def config_of(name: str) -> PretrainedConfig:
    return AutoConfig.for_model(name.removesuffix("-tied"), **MODELS[name])


def scrambled_model(name: str) -> PreTrainedModel:
    """A model of one of `MODELS` with no two numbers of its state alike."""
    model = AutoModelForCausalLM.from_config(config_of(name)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor))
    return model


def stored_names(directory: Path) -> set[str]:
    return {name for file in weight_files(directory) for name in load_file(file)}


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = scrambled_model("mixtral")
    model.save_pretrained(tmp_path / "mixtral")
    return model, tmp_path / "mixtral"


@pytest.mark.parametrize("original", [True, False], ids=["as saved", "as the model"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_under_the_models_name(name: str, original: bool, tmp_path: Path) -> None:
    model = scrambled_model(name)
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size="10KB")
    state = model.state_dict()
    assert len(weight_files(tmp_path)) > 1
    assert (not stored_names(tmp_path) <= set(state)) == (original and name in CONVERTED)
    with CheckpointReader(tmp_path, model=meta_model(model.config)) as reader:
        for key, tensor in state.items():
            assert key in reader
            assert torch.equal(reader.read(key), tensor), key
            assert reader.shape(key) == tuple(tensor.shape)
            assert reader.dtype(key) == torch.float32
            assert reader.num_bytes(key) == tensor.nbytes
            for start, stop in ((1, 3), (None, 2), (-1, None), (3, 99), (2, 2)):
                assert torch.equal(reader.read(key, start, stop), tensor[start:stop]), key


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen3_moe"])
def test_backbone_alone(name: str, tmp_path: Path) -> None:
    model = scrambled_model(name)
    model.base_model.save_pretrained(tmp_path)
    assert not stored_names(tmp_path) <= set(model.state_dict())
    with CheckpointReader(tmp_path, model=meta_model(model.config)) as reader:
        for key, parameter in model.base_model.named_parameters(prefix=model.base_model_prefix):
            assert torch.equal(reader.read(key), parameter), key
        # Only the tied head is in the backbone.
        assert ("lm_head.weight" in reader) == (name == "gpt2")


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_of_two_tied_weights(stored: str, tmp_path: Path) -> None:
    weight = torch.randn(32, 16)
    save_file({stored: weight}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path, model=meta_model(config_of("llama-tied"))) as reader:
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(reader.read(key, 2, 5), weight[2:5])
    with CheckpointReader(tmp_path, model=meta_model(config_of("llama"))) as reader:
        assert ("lm_head.weight" in reader) + ("model.embed_tokens.weight" in reader) == 1


def test_text_part_of_a_larger_checkpoint(tmp_path: Path) -> None:
    """Prefixes that the model lacks, and tensors that it has no use for."""
    model = scrambled_model("qwen3_5_text")
    state = {key.replace("model.", "model.language_model.", 1): value for key, value in model.state_dict().items()}
    save_file(state | {"model.visual.patch_embed.proj.weight": torch.ones(2)}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path, model=meta_model(model.config)) as reader:
        for key, parameter in model.named_parameters():
            assert torch.equal(reader.read(key), parameter), key
        assert not any("visual" in key or "language_model" in key for key in reader._sources)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the stored tensors that readers have opened."""
    names: list[str] = []
    load = CheckpointReader._load

    def record(self: CheckpointReader, wanted: Any, *args: Any) -> Any:
        wanted = list(wanted)
        names.extend(wanted)
        return load(self, wanted, *args)

    monkeypatch.setattr(CheckpointReader, "_load", record)
    yield names


def test_only_what_is_needed_is_read(mixtral: tuple[PreTrainedModel, Path], loaded: list[str]) -> None:
    model, directory = mixtral
    expert = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    with CheckpointReader(directory, model=meta_model(model.config)) as reader:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        assert reader.shape(name) == (12, 48, 16) and reader.num_bytes(name) and not loaded
        reader.read(name)
        assert sorted(loaded) == sorted(expert.format(i, w) for i in range(12) for w in ("w1", "w3"))
        loaded.clear()
        assert torch.equal(reader.read(name, 9, 11), model.get_parameter(name)[9:11])
        assert sorted(loaded) == sorted(expert.format(i, w) for i in (9, 10) for w in ("w1", "w3"))
        loaded.clear()
        reader.read("model.layers.1.mlp.gate.weight", 0, 2)
        assert loaded == ["model.layers.1.block_sparse_moe.gate.weight"]


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 5, 2]], ids=["one by one", "by fives"])
def test_experts_in_blocks(
    sizes: list[int], mixtral: tuple[PreTrainedModel, Path], loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = mixtral
    monkeypatch.setattr(checkpoint, "_BLOCK", sizes[0] * 48 * 16 * 4)
    made = []
    make = CheckpointReader._make
    monkeypatch.setattr(CheckpointReader, "_make", lambda *args: made.append(make(*args)) or made[-1])
    with CheckpointReader(directory, model=meta_model(model.config)) as reader:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert torch.equal(reader.read(name), model.get_parameter(name))
    outline, *blocks = made
    assert outline.is_meta and len(loaded) == 24
    assert [len(block) for block in blocks] == sizes


@pytest.mark.parametrize(
    ("operations", "rows"),
    [
        ([MergeModulelist(0)], True),
        ([MergeModulelist(0), Concatenate(1)], True),
        ([MergeModulelist(0), Concatenate(0)], False),
        ([MergeModulelist(1)], False),
        ([MergeModulelist(0), Transpose(0, 1)], False),
        ([Concatenate(0)], False),
    ],
)
def test_when_rows_can_be_made_alone(operations: list[ConversionOps], rows: bool) -> None:
    sources = [("a.*.x", "a.0.x"), ("a.*.x", "a.1.x"), ("a.*.y", "a.0.y"), ("a.*.y", "a.1.y")]
    recipe = Recipe("a", WeightConverter(["a.*.x", "a.*.y"], "a", operations), sources, "a")
    assert recipe.row_sources == ([[sources[0], sources[2]], [sources[1], sources[3]]] if rows else None)


@pytest.mark.parametrize("missing", [("w1", "w3"), ("w1",)], ids=["an expert", "half an expert"])
def test_missing_expert(missing: tuple[str, ...], mixtral: tuple[PreTrainedModel, Path]) -> None:
    model, directory = mixtral
    state = load_file(directory / SINGLE_FILE)
    for weight in missing:
        del state[f"model.layers.0.block_sparse_moe.experts.4.{weight}.weight"]
    save_file(state, directory / SINGLE_FILE)
    with CheckpointReader(directory, model=meta_model(model.config)) as reader:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        for ask in (reader.read, reader.shape, lambda name: reader.read(name, 0, 1)):
            with pytest.raises(CheckpointError, match=rf"{name} (has shape \[12, 48, 16\]|cannot be made by \[Merge)"):
                ask(name)
        other = "model.layers.1.mlp.experts.gate_up_proj"
        assert torch.equal(reader.read(other, 4, 5), model.get_parameter(other)[4:5])


@pytest.mark.parametrize(
    ("name", "key", "operation"),
    [
        ("mixtral", "model.layers.0.mlp.experts.down_proj", MergeModulelist),
        ("hrm_text", "model.H_module.layers.0.mlp.up_proj.weight", Chunk),
    ],
)
def test_operation_that_cannot_be_applied(
    name: str, key: str, operation: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled_model(name)
    model.save_pretrained(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("needs the whole checkpoint")

    monkeypatch.setattr(operation, "convert", refuse)
    with CheckpointReader(tmp_path, model=meta_model(model.config)) as reader:
        with pytest.raises(
            CheckpointError, match=rf"{key} cannot be made by \[{operation.__name__}.*whole checkpoint"
        ):
            reader.read(key)
        assert torch.equal(reader.read("lm_head.weight"), model.lm_head.weight)


def test_quantized_experts_are_refused(mixtral: tuple[PreTrainedModel, Path]) -> None:
    model, directory = mixtral
    state = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(directory / SINGLE_FILE).items()}
    save_file(state, directory / SINGLE_FILE)
    with CheckpointReader(directory, model=meta_model(model.config)) as reader:
        for ask in (reader.read, reader.dtype, reader.shape):
            with pytest.raises(CheckpointError, match="w2.weight in .* has dtype F8_E4M3"):
                ask("model.layers.0.mlp.experts.down_proj")


def resident(field: str) -> int:
    """Bytes of memory that this process has in use (`VmRSS`), or had at most (`VmHWM`)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def peak_memory(action: Any) -> int:
    """Bytes by which an action makes this process grow at most; more than it needs, for what malloc keeps."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and seem to cost nothing
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pytest.skip("the peak of resident memory cannot be measured here")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def measure_reading(directory: str) -> None:
    """Print the peaks of reading all tensors of a checkpoint, and of reading one tensor's experts one by one."""
    checkpoint._BLOCK = checkpoint._KEPT = 2 << 20
    model = meta_model(AutoConfig.from_pretrained(directory))

    def read_all() -> None:
        with CheckpointReader(directory, model=model) as reader:
            for name in model.state_dict():
                reader.read(name).sum()

    def read_experts() -> None:
        with CheckpointReader(directory, model=model) as reader:
            for expert in range(16):
                reader.read("model.layers.0.mlp.experts.gate_up_proj", expert, expert + 1).sum()

    read_all()  # whatever is allocated once
    print(json.dumps([peak_memory(read_all), peak_memory(read_experts)]))


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """In a process of its own, whose malloc gives back what is freed: what it keeps varies from run to run."""
    config = AutoConfig.for_model(
        "qwen3_moe", **SIZES | MOE | {"hidden_size": 512, "num_experts": 16, "moe_intermediate_size": 512}
    )
    largest = 16 * 2 * 512 * 512 * 4  # 32 MiB
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    total = (tmp_path / SINGLE_FILE).stat().st_size
    assert total > 3 * largest
    code = f"from tests.test_conversion import measure_reading; measure_reading({str(tmp_path)!r})"
    root = Path(__file__).parents[1]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | malloc, capture_output=True, text=True
    )
    if "Skipped" in made.stderr:
        pytest.skip("the peak of resident memory cannot be measured here")
    assert made.returncode == 0, made.stderr
    everything, experts = json.loads(made.stdout.splitlines()[-1])
    # Stacking all at once takes three times the largest, and keeping the file's pages its whole size.
    assert largest < everything < 1.4 * largest
    assert largest / 16 < experts < 0.4 * largest
