"""Tiny models and tokenizers for chains, and ways to damage a chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.models import VOCAB, random_model, tiny_config


LAYERS = {"small": 1, "medium": 2, "large": 4}


def make_tokenizer(words: int = VOCAB) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(words)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def make_model(layers: int, family: str = "gpt2", **overrides: Any) -> PreTrainedModel:
    return random_model(tiny_config(family, layers=layers, heads=2, head_dim=16, **overrides))


def edit_manifest(chain: Path, **changes: Any) -> None:
    manifest = json.loads((chain / "chain.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del manifest[key]
        else:
            manifest[key] = value
    (chain / "chain.json").write_text(json.dumps(manifest))


def edit_anchor(chain: Path, index: int, **changes: Any) -> None:
    anchors = json.loads((chain / "chain.json").read_text())["anchors"]
    anchors[index].update(changes)
    edit_manifest(chain, anchors=anchors)


def edit_config(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config.update(changes)
    (checkpoint / "config.json").write_text(json.dumps(config))


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def assert_same_weights(first: PreTrainedModel, second: PreTrainedModel) -> None:
    one, other = dict(first.named_parameters()), dict(second.named_parameters())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
