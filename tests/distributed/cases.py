"""What is trained over every split: objectives, on- and off-policy, cached, with hidden states, adapters, bridges."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, Model, WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from cbd_hf.tokenization.pieces import LOW_LINE

from ..models import VOCAB, random_model, tiny_config, tiny_tokenizer, words


@dataclass(frozen=True)
class Case:
    """
    Args:
        options (`dict`): of the trainer's config.
        student (`str`): `"tied"` or `"untied"`.
        teacher (`str`): `"teacher"`, `"deep"` with an untied head, or `"source"`, of other tokens: then the case is a
            bridge.
        cache (`str`, *optional*): the teacher's cache in place of the teacher: `"top_k"`, `"sampled"` or
            `"source_top_k"`.
        lora (`bool`): train an adapter.
        rows (`int`): of the dataset.
        weights (`bool`): keep the final weights.
        sharded (`bool`): possible where gradients are sharded (DeepSpeed, FSDP).
        watch (`bool`): count the teacher's elements on the main process.
        spaced (`bool`): both tokenizers keep spaces.
    """

    options: dict[str, Any] = field(default_factory=dict)
    student: str = "tied"
    teacher: str = "teacher"
    cache: str | None = None
    lora: bool = False
    rows: int = 16
    weights: bool = False
    sharded: bool = True
    watch: bool = False
    spaced: bool = False

    @property
    def bridge(self) -> bool:
        """Whether the teacher has other tokens."""
        return self.teacher == "source"


# Below this epsilon AdamW's first steps are the gradient's sign, which for a gradient close to 0 is that of rounding.
_EPOCH = {"max_steps": -1, "num_train_epochs": 1, "adam_epsilon": 1e-3}

CASES = {
    "reverse_kl": Case(),
    "forward_kl": Case({"objective": "forward_kl"}, student="untied"),
    "skew_forward_kl": Case({"objective": "skew_forward_kl"}),
    "skew_reverse_kl": Case({"objective": "skew_reverse_kl"}, student="untied"),
    "generalized_jsd": Case({"objective": "generalized_jsd", "temperature": 2.0, "cross_entropy_weight": 0.5}),
    "adaptive_kl": Case({"objective": "adaptive_kl"}),
    "total_variation": Case({"objective": "total_variation"}),
    "cross_entropy": Case({"cross_entropy_weight": 1.0}, student="untied"),
    "hidden": Case({"hidden_loss_weight": 0.5, "hidden_loss_layers": [1, 2]}, student="untied"),
    "on_policy": Case({"lmbda": 1.0}),
    "top_k": Case({"hidden_loss_weight": 0.5}, cache="top_k"),
    "sampled": Case({"objective": "forward_kl"}, student="untied", cache="sampled"),
    "lora": Case({"hidden_loss_weight": 0.5}, lora=True),
    "gradient_checkpointing": Case({"gradient_checkpointing": True}),
    "passes": Case({"tokens_per_pass": 30}, sharded=False),
    # Two steps: DeepSpeed gathers weights ahead once it has seen the order of the layers.
    "deep_teacher": Case({"max_steps": 2}, teacher="deep", watch=True),
    # 13 rows in steps of 8: the second step of an epoch is not whole.
    "epochs": Case(
        _EPOCH | {"num_train_epochs": 2, "learning_rate": 1e-2, "include_num_input_tokens_seen": "non_padding"},
        rows=13,
        weights=True,
    ),
    "epochs_on_policy": Case(_EPOCH | {"lmbda": 1.0}, rows=9, weights=True),
    "epochs_cached": Case(_EPOCH | {"sort_steps_by_length": False}, cache="top_k", rows=9, weights=True),
    # Rows of text, of which the second token already is in a span: blank ones must have none.
    "bridge": Case(_EPOCH | {"hidden_loss_weight": 0.5}, teacher="source", rows=13, weights=True),
    # The tokenizers drop spaces, so no token says where a word ends.
    "bridge_alm": Case(
        _EPOCH | {"method": "alm", "alm_debias": False}, student="untied", teacher="source", rows=13, weights=True
    ),
    # A threshold that joins some spans and not others, up to the end of their row.
    "bridge_alm_joined": Case(
        _EPOCH | {"method": "alm", "alm_bias_threshold": 0.4}, teacher="source", rows=13, weights=True, spaced=True
    ),
    "bridge_cached": Case(_EPOCH, teacher="source", cache="source_top_k", rows=9, weights=True),
}


def make_dataset(rows: int = 16) -> Dataset:
    """`input_ids` and `labels` with 1 to 12 supervised tokens."""
    rng = random.Random(0)
    examples = []
    for _ in range(rows):
        prompt, answer = ([rng.randrange(6, VOCAB) for _ in range(rng.randint(1, most))] for most in (9, 12))
        examples.append({"input_ids": [*prompt, *answer, 1], "labels": [-100] * len(prompt) + [*answer, 1]})
    return Dataset.from_list(examples)


def student_tokenizer(spaced: bool) -> PreTrainedTokenizerFast:
    """[`tiny_tokenizer`], or one with the same ids whose words begin with a space."""
    plain = tiny_tokenizer()
    if not spaced:
        return plain
    words = {f"{LOW_LINE}{word}" if word[0] == "w" else word: index for word, index in plain.get_vocab().items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=_spaced(WordLevel(words, unk_token="<unk>")), eos_token="<eos>", unk_token="<unk>"
    )


def source_tokenizer(spaced: bool = False) -> PreTrainedTokenizerFast:
    """Words of [`student_tokenizer`] in pieces: `w1` to `w5`, which both share, and single digits."""
    first = f"{LOW_LINE}w" if spaced else "w"
    pieces = ["<end of text>", "<unknown>", "w", *map(str, range(10)), *(f"{first}{digit}" for digit in range(1, 6))]
    pieces += [LOW_LINE, first] * spaced
    merges = [(LOW_LINE, "w")] * spaced + [(first, str(digit)) for digit in range(1, 6)]
    model = BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unknown>")
    tokenizer = _spaced(model) if spaced else Tokenizer(model)
    if not spaced:
        tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end of text>", unk_token="<unknown>")


def _spaced(model: Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def make_text(rows: int = 16) -> Dataset:
    """`text` of 2 to 14 words."""
    rng = random.Random(0)
    return Dataset.from_list([{"text": words(rng, rng.randint(2, 14))} for _ in range(rows)])


def make_material(directory: Path) -> None:
    """The models and caches of all cases."""
    from cbd_hf.distillation.bridge.source_cache import source_rows
    from cbd_hf.distillation.cache import CacheSettings, build_cache
    from cbd_hf.tokenization.collator import BridgeDataCollator

    random_model(tiny_config("llama", layers=2), seed=1, std=0.1).save_pretrained(directory / "tied")
    random_model(tiny_config("llama", layers=2, tie_word_embeddings=False), seed=1, std=0.1).save_pretrained(
        directory / "untied"
    )
    random_model(tiny_config("llama", layers=3, heads=6), seed=2, std=0.3).save_pretrained(directory / "teacher")
    # Matrices of more than 100,000 elements: DeepSpeed keeps smaller ones whole.
    deep = tiny_config("llama", layers=6, heads=8, head_dim=48, tie_word_embeddings=False, num_key_value_heads=8)
    random_model(deep, seed=2, std=0.02).save_pretrained(directory / "deep")
    tiny_tokenizer().save_pretrained(directory / "teacher")
    tiny_tokenizer().save_pretrained(directory / "deep")
    for name, settings in {
        "top_k": CacheSettings(k=8, dtype="float32", hidden="float32"),
        "sampled": CacheSettings("sampled", n_samples=8, dtype="float32"),
    }.items():
        build_cache(directory / "teacher", make_dataset(), directory / name, settings, progress=False)
    source = source_tokenizer()
    config = tiny_config("gpt2", layers=3, heads=6, vocab_size=len(source) + 3)
    random_model(config, seed=2, std=0.3).save_pretrained(directory / "source")
    source.save_pretrained(directory / "source")
    collator = BridgeDataCollator(tiny_tokenizer(), source)
    rows = source_rows(Dataset.from_dict(collator.encode(list(make_text()))))
    settings = CacheSettings(k=6, dtype="float32", labels=True)
    build_cache(directory / "source", rows, directory / "source_top_k", settings, progress=False)
