"""Models made straight into directories: what `save_pretrained` would have written, whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cbd_hf import CBDModel, DistillationChain
from cbd_hf.checkpoint import CheckpointReader, weight_files

from .families.configs import family_config
from .models import random_model, tiny_config, tiny_tokenizer


def make_chain(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> DistillationChain:
    models = []
    for n in (2, 4):
        config = (
            tiny_config(family, layers=n, heads=n)
            if family in ("gpt2", "llama")
            else family_config(family, num_hidden_layers=n, moe_intermediate_size=12 * n)
        )
        model = random_model(config, seed=n).to(dtype)
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1, max_new_tokens=10 + n)
        models.append(model)
    return DistillationChain.from_anchors(models, directory, names=["small", "large"], tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> DistillationChain:
    return make_chain(tmp_path_factory.mktemp("chains") / "chain", "gpt2")


def size_of(chain: DistillationChain, share: float = 0.5) -> float:
    return chain.sizes[1] + share * (chain.sizes[0] - chain.sizes[1])


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Everything that is stored, whatever the file."""
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        part = load_file(path)
        assert not part.keys() & found.keys()
        found |= part
    return found


def contents(directory: Path) -> dict[str, Any]:
    """Every file, by its path; JSON as what it says."""
    return {
        str(path.relative_to(directory)): json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "dtype": "bfloat16"},
        {"alpha": {"ffn": 0.9, "norms": 0.1}, "expansion": "replicate", "selection": "stride"},
        {"initializer": "expand", "seed": 7},
        {"initializer": "cut"},
        {"initializer": "random", "seed": 3},
    ],
    ids=["plain", "bfloat16", "groups", "expand", "cut", "random"],
)
def test_it_is_what_save_pretrained_writes(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    chain = make_chain(tmp_path / "chain", family)
    size = size_of(chain)
    CBDModel.from_chain(chain, size, **options).save_pretrained(tmp_path / "model")
    (config,) = CBDModel.save_from_chain(chain, size, tmp_path / "made", **options)
    expected, actual = contents(tmp_path / "model"), contents(tmp_path / "made")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == value, name
    assert config.cbd == expected["config.json"]["cbd"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe"])
def test_shards(family: str, tmp_path: Path) -> None:
    """Cut in the order of reading, so that which shard holds what may differ; nothing else does."""
    chain = make_chain(tmp_path / "chain", family)
    CBDModel.from_chain(chain, size_of(chain)).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    CBDModel.save_from_chain(chain, size_of(chain), tmp_path / "made", max_shard_size="20KB")
    expected, actual = tensors(tmp_path / "model"), tensors(tmp_path / "made")
    assert len(weight_files(tmp_path / "made")) > 2 and actual.keys() == expected.keys()
    assert all(
        torch.equal(value, actual[name]) and value.dtype == actual[name].dtype for name, value in expected.items()
    )
    for path in weight_files(tmp_path / "made"):
        part = load_file(path)
        assert len(part) == 1 or sum(value.numel() * value.element_size() for value in part.values()) <= 20_000
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("made", "model")]
    assert all(torch.equal(value, loaded[1][name]) for name, value in loaded[0].items())


def test_it_loads(chain: DistillationChain, tmp_path: Path) -> None:
    (config,) = CBDModel.save_from_chain(chain.path, size_of(chain), tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    expected = CBDModel.from_chain(chain, size_of(chain))
    assert model.config.n_layer == config.n_layer == expected.config.n_layer
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.generation_config.max_new_tokens == 12
    assert AutoTokenizer.from_pretrained(tmp_path / "made").get_vocab() == tiny_tokenizer().get_vocab()


def test_a_family_in_one_pass(chain: DistillationChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [size_of(chain, share) for share in (0.8, 0.2, 0.5)]
    places = [tmp_path / f"model-{i}" for i in range(3)]
    read: list[tuple[Path, str]] = []
    real = CheckpointReader.read

    def recording(self: CheckpointReader, name: str, *args: Any) -> torch.Tensor:
        read.append((self.directory, name))
        return real(self, name, *args)

    monkeypatch.setattr(CheckpointReader, "read", recording)
    configs = CBDModel.save_from_chain(chain, sizes, places)
    counts = [config.cbd["n_params"] for config in configs]
    assert counts[1] < counts[2] < counts[0]
    # The targets take turns on each tensor of the larger anchor.
    of_large = [name for directory, name in read if directory == chain["large"].path]
    runs = [name for i, name in enumerate(of_large) if i == 0 or of_large[i - 1] != name]
    assert max(Counter(runs).values()) == 1
    monkeypatch.undo()
    for size, place, config in zip(sizes, places, configs, strict=True):
        alone = tmp_path / f"alone-{place.name}"
        CBDModel.from_chain(chain, size).save_pretrained(alone)
        assert contents(place) == contents(alone)
        assert config.cbd["n_params"] == AutoModelForCausalLM.from_pretrained(place).num_parameters()


def test_auto_alpha(chain: DistillationChain, tmp_path: Path) -> None:
    options = {"alpha": "auto", "calibration": torch.randint(2, 60, (2, 8))}
    CBDModel.from_chain(chain, size_of(chain), **options).save_pretrained(tmp_path / "model")
    CBDModel.save_from_chain(chain, size_of(chain), tmp_path / "made", **options)
    assert contents(tmp_path / "made") == contents(tmp_path / "model")


def test_an_anchors_own_size(chain: DistillationChain, tmp_path: Path) -> None:
    CBDModel.save_from_chain(chain, chain.sizes[1], tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert all(
        torch.equal(value, made.state_dict()[n]) for n, value in chain["small"].load_model().state_dict().items()
    )


@pytest.mark.parametrize("taken", [0, 1])
def test_a_directory_that_holds_something(taken: int, chain: DistillationChain, tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    places[taken].mkdir()
    (places[taken] / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        CBDModel.save_from_chain(chain, [size_of(chain, 0.3), size_of(chain, 0.7)], places)
    assert [path.name for path in tmp_path.iterdir()] == [places[taken].name]
    assert contents(places[taken]) == {"mine.txt": b"mine"}


def test_an_empty_directory_is_taken(chain: DistillationChain, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    CBDModel.save_from_chain(chain, size_of(chain), tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").is_file()


@pytest.mark.parametrize("at", ["made", "commit_directory"])
def test_nothing_is_left_after_an_error(
    at: str, chain: DistillationChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbd_hf import saving

    calls = 0
    real = getattr(saving, at)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (20 if at == "made" else 1):
            raise OSError("disk full")
        return real(*args)

    monkeypatch.setattr(saving, at, failing)
    with pytest.raises(OSError, match="disk full"):
        CBDModel.save_from_chain(chain, [size_of(chain, 0.3), size_of(chain, 0.7)], [tmp_path / "a", tmp_path / "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "places", "message"),
    [
        ([1.0, 2.0], ["a"], r"2 size\(s\) need as many directories in save_directory, got 1"),
        (1.0, "", "need as many directories"),
        ("middle", ["a", "b"], r"1 size\(s\)"),
        (["middle", "middle"], ["a", "a"], "twice, or within another"),
        (["middle", 1.0], ["a", "b"], "outside the chain's range"),
    ],
)
def test_refusals(
    sizes: Any, places: Any, message: str, chain: DistillationChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are found possible before anything is written."""
    monkeypatch.chdir(tmp_path)
    middle = size_of(chain)
    sizes = [middle if size == "middle" else size for size in sizes] if isinstance(sizes, list) else sizes
    with pytest.raises(ValueError, match=message):
        CBDModel.save_from_chain(chain, middle if sizes == "middle" else sizes, places)
    assert list(tmp_path.iterdir()) == []


def test_directories_within_each_other(chain: DistillationChain, tmp_path: Path) -> None:
    for places in ([tmp_path / "a", tmp_path / "a" / "b"], [tmp_path / "a", tmp_path / "b" / ".." / "a"]):
        with pytest.raises(ValueError, match="twice, or within another"):
            CBDModel.save_from_chain(chain, [size_of(chain, 0.3), size_of(chain, 0.6)], places)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_config_of_its_own(tmp_path: Path) -> None:
    """Where no anchor brings one, both ways write the model's own."""
    anchors = []
    for index, heads in enumerate((6, 4)):
        random_model(tiny_config("gpt2", heads=heads), index).save_pretrained(tmp_path / str(index))
        (tmp_path / str(index) / "generation_config.json").unlink()
        anchors.append(str(tmp_path / str(index)))
    chain = DistillationChain.from_anchors(anchors, tmp_path / "chain")
    CBDModel.save_from_chain(chain, size_of(chain), tmp_path / "streamed")
    CBDModel.from_chain(chain, size_of(chain)).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "saved")
    assert (tmp_path / "streamed" / "generation_config.json").is_file()
