from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Model, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import cbd_hf.chain as chain_module
from cbd_hf.chain import DistillationChain
from cbd_hf.checkpoint import CheckpointError
from cbd_hf.layout.meta import count_parameters
from tests.chain.helpers import (
    LAYERS,
    assert_same_weights,
    make_model,
    make_tokenizer,
    snapshot,
)
from tests.models import VOCAB


def test_from_anchors_sorts_copies_and_records(
    checkpoints: dict[str, Path], saved: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chain = DistillationChain.from_pretrained(saved, verify="full")
    assert [anchor.name for anchor in chain] == ["large", "medium", "small"]
    assert chain.sizes == sorted((count_parameters(anchor.config) for anchor in chain), reverse=True)
    assert len(chain) == 3
    assert chain[0] is chain["large"] is chain.anchors[0]
    assert [anchor.name for anchor in chain[1:]] == ["medium", "small"]
    assert chain.family["model_type"] == "gpt2"
    assert chain.family["vocab_size"] == VOCAB
    assert chain.basis == "as-is"
    assert chain.path == saved
    assert chain.created_with["transformers"]
    for anchor in chain:
        assert anchor.path.parent == saved / "anchors"
        assert anchor.config.n_layer == LAYERS[anchor.name]
        source = snapshot(checkpoints[anchor.name])
        assert {name: (anchor.path / name).read_bytes() for name in anchor.files} == source
    loaded = chain.load_tokenizer()
    assert loaded is not None and loaded.get_vocab() == tokenizer.get_vocab()
    assert "gpt2: large" in repr(chain)
    with pytest.raises(KeyError, match="huge.*large, medium, small"):
        chain["huge"]
    with pytest.raises(IndexError):
        chain[3]


def test_load_model_is_the_anchor(checkpoints: dict[str, Path], saved: Path) -> None:
    anchor = DistillationChain.from_pretrained(saved)["medium"]
    model = anchor.load_model()
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert_same_weights(model, make_model(LAYERS["medium"]))
    assert model.num_parameters() == anchor.n_params
    assert anchor.load_model(dtype=torch.bfloat16).dtype == torch.bfloat16


def test_models_are_saved_untouched(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    models = [make_model(1, "llama"), make_model(3, "llama")]
    before = [dict(model.config.__dict__) for model in models]
    chain = DistillationChain.from_anchors(
        models,
        tmp_path / "chain",
        tokenizer=tokenizer,
        stages=[{"teacher": "big"}, None],
        basis="shared",
        metadata={"license": "mit"},
    )
    assert [model.config.__dict__ for model in models] == before
    for model, anchor in zip(reversed(models), chain, strict=True):
        assert_same_weights(model, anchor.load_model())
        assert anchor.load_tokenizer() is not None
    assert [anchor.stage for anchor in chain] == [None, {"teacher": "big"}]
    again = DistillationChain.from_pretrained(tmp_path / "chain")
    assert again.basis == "shared" and again.metadata == {"license": "mit"}
    assert all(anchor.name.endswith("k") for anchor in again)


def test_models_with_their_own_way_of_saving(tmp_path: Path) -> None:
    # As CBDModel makes them: the tokenizer written there has not been compared with the chain's.
    models = [make_model(1), make_model(2)]
    for model in models:
        model.save_pretrained = lambda directory: make_tokenizer(3).save_pretrained(directory)  # type: ignore[method-assign]
    chain = DistillationChain.from_anchors(models, tmp_path / "chain")
    assert chain.load_tokenizer() is None
    assert_same_weights(chain[0].load_model(), models[1])


def test_models_without_tokenizer(tmp_path: Path) -> None:
    chain = DistillationChain.from_anchors([make_model(1), make_model(2)], tmp_path / "chain")
    assert chain.load_tokenizer() is None
    assert chain[0].load_tokenizer() is None
    assert chain.family["tokenizer_digest"] is None


def test_tokenizer_goes_to_anchors_that_have_none(
    checkpoints: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_model(3).save_pretrained(tmp_path / "bare")
    anchors = [tmp_path / "bare", checkpoints["small"]]
    without = DistillationChain.from_anchors(anchors, tmp_path / "without")
    assert without["bare"].load_tokenizer() is None
    assert without.load_tokenizer() is not None
    assert without.family["tokenizer_digest"] is not None
    given = DistillationChain.from_anchors(anchors, tmp_path / "given", tokenizer=tokenizer)
    loaded = given["bare"].load_tokenizer()
    assert loaded is not None and loaded.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="another tokenizer vocabulary"):
        DistillationChain.from_anchors(anchors, tmp_path / "other", tokenizer=make_tokenizer(VOCAB - 1))
    with pytest.raises(ValueError, match=f"ids up to {VOCAB}.*vocab_size is {VOCAB}"):
        DistillationChain.from_anchors(anchors, tmp_path / "more", tokenizer=make_tokenizer(VOCAB + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "given", "without"]


def test_shards_and_backbone_only_checkpoints(tmp_path: Path) -> None:
    sharded, backbone = make_model(2), make_model(1)
    sharded.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert isinstance(backbone.base_model, GPT2Model)
    backbone.base_model.save_pretrained(tmp_path / "backbone")
    chain = DistillationChain.from_anchors([tmp_path / "sharded", tmp_path / "backbone"], tmp_path / "chain")
    chain.verify()
    assert_same_weights(chain["sharded"].load_model(), sharded)
    assert_same_weights(chain["backbone"].load_model(), backbone)


def test_only_what_belongs_to_a_checkpoint_is_copied(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoints["large"], tmp_path / "large"))
    for name in ("optimizer.pt", "training_args.bin", "modeling.py", "adapter_model.safetensors", "notes.txt"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("MIT")
    chain = DistillationChain.from_anchors([source, checkpoints["small"]], tmp_path / "chain")
    names = {path.name for path in chain["large"].path.iterdir()}
    assert names == {path.name for path in checkpoints["large"].iterdir()} | {"LICENSE"}


def test_names_are_safe_and_unique_and_cuts_follow(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    anchors = [checkpoints[name] for name in ("small", "medium", "large")]
    chain = DistillationChain.from_anchors(
        anchors,
        tmp_path / "chain",
        names=["x", "X", "../my model"],
        cuts=[{"from": "X", "layers": [1], "removed": [0]}, {"from": "../my model", "layers": [0, 3]}, None],
    )
    assert [anchor.name for anchor in chain] == ["my-model", "X", "x-2"]
    assert chain["X"].cut == {"from": "my-model", "layers": [0, 3]}
    assert chain["x-2"].cut == {"from": "X", "layers": [1], "removed": [0]}
    assert {path.name for path in (tmp_path / "chain" / "anchors").iterdir()} == {"0-my-model", "1-X", "2-x-2"}


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"layers": [0]}, "from=None.*large"),
        ({"from": "small", "layers": [0]}, "from='small'"),
        ({"from": "large"}, "layers=None"),
        ({"from": "large", "layers": [-1]}, "indices"),
        ({"from": "large", "layers": [0, 1]}, "must list 1 different"),
    ],
)
def test_wrong_cuts(checkpoints: dict[str, Path], tmp_path: Path, cut: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationChain.from_anchors(
            [checkpoints["large"], checkpoints["small"]], tmp_path / "chain", cuts=[None, cut]
        )


def test_records_become_plain_json(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    anchors = [checkpoints["large"], checkpoints["small"]]
    stage = {
        "loss": float("nan"),
        "last": torch.tensor(1.5),
        "data": Path("data"),
        "split": (1, 2),
    }
    chain = DistillationChain.from_anchors(anchors, tmp_path / "chain", stages=[stage, None])
    assert chain[0].stage == {"loss": "nan", "last": 1.5, "data": "data", "split": [1, 2]}
    assert DistillationChain.from_pretrained(tmp_path / "chain")[0].stage == chain[0].stage
    with pytest.raises(ValueError, match=r"stages\[1\]\['model'\] is a object"):
        DistillationChain.from_anchors(anchors, tmp_path / "no", stages=[None, {"model": object()}])
    with pytest.raises(ValueError, match=r"stages\[0\] must be a dict"):
        DistillationChain.from_anchors(anchors, tmp_path / "no", stages=["a", None])  # type: ignore[list-item]


def test_config_digest_is_stable(checkpoints: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    chain = DistillationChain.from_pretrained(saved)
    from_models = DistillationChain.from_anchors([anchor.load_model() for anchor in chain], tmp_path / "chain")
    fresh = DistillationChain.from_anchors([make_model(LAYERS[anchor.name]) for anchor in chain], tmp_path / "fresh")
    digests = [anchor.config_digest for anchor in chain]
    assert [anchor.config_digest for anchor in from_models] == digests
    assert [anchor.config_digest for anchor in fresh] == digests
    assert len(set(digests)) == 3


def test_existing_output_is_left_alone(checkpoints: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    anchors = [checkpoints["large"], checkpoints["small"]]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists and is not empty.*Choose another"):
        DistillationChain.from_anchors(anchors, out)
    with pytest.raises(FileExistsError, match="not empty"):
        DistillationChain.from_pretrained(saved).save_pretrained(out)
    with pytest.raises(FileExistsError, match="existing file"):
        DistillationChain.from_anchors(anchors, out / "mine.txt")
    assert snapshot(tmp_path) == {"out/mine.txt": b"mine"}


def test_empty_output_is_used(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    DistillationChain.from_anchors([checkpoints["large"], checkpoints["small"]], tmp_path / "out")
    assert len(DistillationChain.from_pretrained(tmp_path / "out")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staging_is_removed_on_error(
    checkpoints: dict[str, Path], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chain_module, "write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        DistillationChain.from_anchors([checkpoints["large"], checkpoints["small"]], tmp_path / "chain")
    with pytest.raises(KeyboardInterrupt):
        DistillationChain.from_pretrained(saved).save_pretrained(tmp_path / "chain")
    assert list(tmp_path.iterdir()) == []


def test_saved_form_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model(1, "llama"), make_model(2, "llama")]
    save = LlamaForCausalLM.save_pretrained

    def save_renamed(self: PreTrainedModel, directory: Path) -> None:
        state = {name.replace("mlp", "renamed"): tensor for name, tensor in self.state_dict().items()}
        save(self, directory, state_dict=state)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_renamed)
    with pytest.raises(CheckpointError, match="weights lack model.layers.0.mlp"):
        DistillationChain.from_anchors(models, tmp_path / "chain")
    assert list(tmp_path.iterdir()) == []


def test_save_pretrained_copies(saved: Path, tmp_path: Path) -> None:
    chain = DistillationChain.from_pretrained(saved)
    copy = chain.save(tmp_path / "copy")
    assert copy.path == tmp_path / "copy"
    assert snapshot(copy.path) == snapshot(saved)
    copy.verify()
