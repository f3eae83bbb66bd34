"""Vocabulary transplant: what is copied is copied exactly, what is made is made as said, the rest is untouched."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cbd_hf.tokenization.splitting import split_texts
from cbd_hf.tokenization.transplant import METHODS, TransplantReport, transplant_checkpoint, transplant_vocabulary

from ..models import random_model, tiny_config
from .tokenizers import CORPUS, END, TURN, build, byte_level


STORIES = Path(os.environ.get("CBD_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "models"
# Tied; tied; untied; untied, with a bias of the output layer.
FAMILIES = ("gpt2", "llama", "mistral", "phi")


@pytest.fixture(scope="module")
def old() -> PreTrainedTokenizerFast:
    return byte_level(size=320)


@pytest.fixture(scope="module")
def new() -> PreTrainedTokenizerFast:
    return byte_level(size=460)


def config_of(family: str, vocabulary: int) -> PretrainedConfig:
    if family == "phi":
        return PhiConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    return tiny_config(family, layers=2, vocab_size=vocabulary)


def model_for(family: str, tokenizer: PreTrainedTokenizerBase, spare: int = 0, seed: int = 0) -> Any:
    return random_model(config_of(family, len(tokenizer) + spare), seed)


def matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """What has a row for every token: the embeddings, and an output layer of its own."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return [embeddings] if head.weight is embeddings else [embeddings, head.weight]


def permuted(tokenizer: PreTrainedTokenizerFast, order: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer; token i has the id `order[i]`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token: order[i] for token, i in tokenizer.get_vocab().items()}
    state["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    for token in state["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)


@pytest.mark.parametrize("method", ["mean", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_own_vocabulary_changes_nothing(family: str, method: Any, old: PreTrainedTokenizerFast) -> None:
    model = model_for(family, old)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert transplant_vocabulary(model, old, old, method=method, rescale=True, scale=0.5) is model
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_vocabulary_permutes_logits(family: str, old: PreTrainedTokenizerFast) -> None:
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(0))
    model = model_for(family, old, spare=5).double()
    untouched = {name: value for name, value in model.named_parameters() if value.shape[0] != len(old) + 5}
    tokens = torch.tensor([old(CORPUS[0])["input_ids"][:40]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[..., : len(old)]
        transplant_vocabulary(model, old, permuted(old, order.tolist()))
        found = model(input_ids=order[tokens]).logits
    assert found.shape[-1] == model.config.vocab_size == len(old)
    torch.testing.assert_close(found[..., order], expected)
    parameters = dict(model.named_parameters())
    assert len(untouched) > 10 and all(parameters[name] is value for name, value in untouched.items())


@pytest.mark.parametrize(("rescale", "scale"), [(False, 1.0), (True, 1.0), (False, 0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean(
    family: str, rescale: bool, scale: float, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
) -> None:
    model = model_for(family, old, spare=3)
    before = [matrix.detach().clone() for matrix in matrices(model)]
    bias = getattr(model.get_output_embeddings(), "bias", None)
    old_bias = None if bias is None else bias.detach().clone()
    transplant_vocabulary(model, old, new, rescale=rescale, scale=scale)
    known, vocabulary = old.get_vocab(), new.get_vocab()
    shared = torch.tensor([known[token] for token in vocabulary if token in known and token not in (END, TURN)])
    made = 0
    for token, new_id in vocabulary.items():
        # A regular expression splits texts before the merges do, but not these.
        pieces = [known[token]] if token in known else old(new.decode([new_id]))["input_ids"]
        if "�" in new.decode([new_id]) and token not in known:
            continue
        made += len(pieces) > 1
        for matrix, old_matrix in zip(matrices(model), before, strict=True):
            expected = old_matrix[pieces].mean(dim=0) * (1 if token in known else scale)
            if rescale and token not in known:
                expected *= old_matrix[shared].norm(dim=1).median() / expected.norm()
            torch.testing.assert_close(matrix[new_id], expected)
        if old_bias is not None:
            torch.testing.assert_close(
                model.get_output_embeddings().bias[new_id], old_bias[pieces].mean(), msg="a bias is not scaled"
            )
    assert made > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_omp_finds_the_combination(family: str, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
    model, donor = model_for(family, old), model_for(family, new, seed=1)
    known, vocabulary = old.get_vocab(), new.get_vocab()
    shared = [token for token in vocabulary if token in known and token not in (END, TURN)]
    made = [token for token in vocabulary if token not in known]
    before = [matrix.detach().clone() for matrix in matrices(model)]
    pairs = {token: (shared[i % 97], shared[100 + i % 89]) for i, token in enumerate(made)}
    # In the output layer other tokens resemble each other than in the embeddings.
    weights = [(1.0, 0.25), (0.5, -2.5)]
    with torch.no_grad():
        for matrix, (first, second) in zip(matrices(donor), weights, strict=False):
            for token, (one, other) in pairs.items():
                matrix[vocabulary[token]] = first * matrix[vocabulary[one]] + second * matrix[vocabulary[other]]
    transplant_vocabulary(model, old, new, method="omp", donor_model=donor, k=4)
    for matrix, old_matrix, (first, second) in zip(matrices(model), before, weights, strict=False):
        for token in shared:
            assert torch.equal(matrix[vocabulary[token]], old_matrix[known[token]])
        for token, (one, other) in pairs.items():
            expected = first * old_matrix[known[one]] + second * old_matrix[known[other]]
            torch.testing.assert_close(matrix[vocabulary[token]], expected, rtol=1e-3, atol=1e-3)


def test_random_follows_the_seed(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
    state = torch.get_rng_state()
    rows = []
    for seed in (0, 0, 1):
        model = random_model(tiny_config("gpt2", layers=1, vocab_size=len(old)))
        torch.manual_seed(7)
        rows.append(transplant_vocabulary(model, old, new, method="random", seed=seed).transformer.wte.weight)
        assert torch.initial_seed() == 7 and torch.equal(torch.rand(1), torch.rand(1, generator=_seeded(7)))
    torch.set_rng_state(state)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_between_kinds_of_tokenizers() -> None:
    """A SentencePiece model gets a byte-level vocabulary and the reverse; a token inside a word stays one."""
    for before, after in (("byte_fallback_prefix", "byte_level"), ("byte_level", "byte_fallback_prefix")):
        old, new = build(before), build(after)
        model = model_for("llama", old)
        rows = model.get_input_embeddings().weight.detach().clone()
        transplant_vocabulary(model, old, new)
        made = model.get_input_embeddings().weight
        for text in (b" the", b"the", b"ing", b" and they"):
            (pieces,), (new_pieces,) = split_texts(old, [text]), split_texts(new, [text])
            if len(pieces) == len(new_pieces) == 1:
                assert torch.equal(made[new_pieces[0]], rows[pieces[0]])
        assert made.isfinite().all()


def test_special_tokens_and_configs(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
    def with_specials(tokenizer: PreTrainedTokenizerFast, *names: str, **roles: str) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        result = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, **roles)
        result.add_special_tokens({"additional_special_tokens": list(names)})
        return result

    before = with_specials(old, "<tool>", pad_token="<blank>", bos_token="<start>")
    after = with_specials(new, "<image>", pad_token="<pad>", bos_token="<s>")
    model = model_for("llama", before)
    model.generation_config.update(
        eos_token_id=[before.eos_token_id, before.convert_tokens_to_ids(TURN), before.convert_tokens_to_ids("<tool>")],
        suppress_tokens=[3],
    )
    rows = model.get_input_embeddings().weight.detach().clone()
    model.get_input_embeddings().padding_idx = before.pad_token_id
    transplant_vocabulary(model, before, after, pad_to_multiple_of=64)
    embeddings = model.get_input_embeddings()
    assert model.config.vocab_size == embeddings.weight.shape[0] == 512
    assert embeddings.weight is model.get_output_embeddings().weight and model.config.tie_word_embeddings
    for one, other in (("<start>", "<s>"), ("<blank>", "<pad>"), (END, END), (TURN, TURN)):
        old_id, new_id = before.convert_tokens_to_ids(one), after.convert_tokens_to_ids(other)
        assert torch.equal(embeddings.weight[new_id], rows[old_id]), other
    for unknown in (after.convert_tokens_to_ids("<image>"), len(after), 511):
        torch.testing.assert_close(embeddings.weight[unknown], rows.mean(dim=0))
    assert embeddings.padding_idx == after.pad_token_id
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.pad_token_id) == (after.bos_token_id, after.pad_token_id)
    assert model.config.eos_token_id == after.eos_token_id
    assert model.generation_config.eos_token_id == [after.eos_token_id, after.convert_tokens_to_ids(TURN)]
    assert model.generation_config.suppress_tokens is None


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reloaded(
    family: str, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = model_for(family, old).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    old.save_pretrained(tmp_path / "model")
    new.save_pretrained(tmp_path / "tokenizer")
    report = transplant_checkpoint(tmp_path / "model", tmp_path / "tokenizer", tmp_path / "result")
    known = old.get_vocab()
    copied = sum(token in known for token in new.get_vocab())
    assert report == TransplantReport(rows=len(new), copied=copied, made=len(new) - copied, averaged=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    transplant_vocabulary(model, old, new)
    assert loaded.dtype == torch.bfloat16
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "result")
    tokens = tokenizer(CORPUS[1], return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [new(CORPUS[1])["input_ids"]]
    assert loaded.generate(tokens[:, :8], max_new_tokens=3, do_sample=False).max() < len(new)
    with pytest.raises(FileExistsError, match="not empty"):
        transplant_checkpoint(tmp_path / "model", tmp_path / "tokenizer", tmp_path / "result")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "result", "tokenizer"]


def test_omp_from_checkpoints(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, tokenizer in (("model", old), ("donor", new)):
        model_for("llama", tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = {"method": "omp", "donor": tmp_path / "donor", "k": 3, "dtype": "float32"}
    transplant_checkpoint(tmp_path / "model", tmp_path / "donor", tmp_path / "result", **options)
    expected = transplant_vocabulary(
        model_for("llama", old), old, new, method="omp", donor_model=model_for("llama", new), k=3
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    torch.testing.assert_close(loaded.state_dict(), expected.state_dict())


def test_bos_that_is_missed(
    old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Tokenizer.from_str(old.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single=f"{TURN} $A", special_tokens=[(TURN, backend.token_to_id(TURN))]
    )
    begins = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=TURN)
    with caplog.at_level(logging.WARNING, "cbd_hf"):
        transplant_vocabulary(model_for("llama", old), old, new)
        assert not caplog.records
        transplant_vocabulary(model_for("llama", old), begins, new)
    assert TURN in caplog.text and "BOS" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "method must be one of mean, omp, random; got 'median'"),
        ({"method": "omp"}, "needs a donor"),
        ({"method": "mean", "donor": 0}, 'for method="omp" only'),
        ({"method": "omp", "donor": 0, "k": 0}, r"k must be in \[1, 32\].*got 0"),
        ({"method": "omp", "donor": 0, "k": 33}, r"k must be in \[1, 32\].*got 33"),
        ({"method": "omp", "donor": -200}, "The new tokenizer has token ids up to 460, the donor has 262 embeddings"),
        ({"spare": -2}, "The tokenizer has token ids up to 320, the model has 320 embeddings"),
        ({"scale": 0.0}, "scale must be above 0 and finite, got 0.0"),
        ({"scale": float("inf")}, "scale must be above 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
    ],
)
def test_bad_options(
    options: dict[str, Any], message: str, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
) -> None:
    options = dict(options)
    model = model_for("llama", old, spare=options.pop("spare", 0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if (spare := options.pop("donor", None)) is not None:
        options["donor_model"] = model_for("llama", new, spare=spare)
    with pytest.raises(ValueError, match=message):
        transplant_vocabulary(model, old, new, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def with_images(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With an added token that is in texts and one that is not, as text models of a family with images have them."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    result = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    result.add_tokens([" walked on the moon"])
    result.add_tokens(["<image>"], special_tokens=True)
    return result


@pytest.mark.parametrize("method", METHODS)
def test_surplus_tokens(
    method: Any, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Added tokens that the model or the donor has no rows for change nothing else, and are named."""
    before, after = with_images(old), with_images(new)
    options = {"donor_model": model_for("mistral", new, seed=1), "k": 4} if method == "omp" else {}
    plain = transplant_vocabulary(model_for("mistral", old), old, new, method=method, **options)
    model = transplant_vocabulary(model_for("mistral", old), before, after, method=method, **options)
    assert "The model has 322 tokens and none of 2" in caplog.text and "<image>" in caplog.text
    assert ("The donor has" in caplog.text) == (method == "omp")
    for found, expected in zip(matrices(model), matrices(plain), strict=True):
        assert len(found) == len(expected) + 2
        if method != "random":  # whose draws depend on the number of rows
            assert torch.equal(found[: len(new)], expected)
        assert found.isfinite().all()


def test_embeddings_in_every_layer_are_refused(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast) -> None:
    model = model_for("llama", old)
    model.config.vocab_size_per_layer_input = len(old)
    with pytest.raises(ValueError, match="in every layer"):
        transplant_vocabulary(model, old, new)


def test_methods_are_listed() -> None:
    assert METHODS == ("mean", "omp", "random")


@pytest.mark.skipif(not (STORIES / "stories260k").is_dir(), reason="the real material is not here")
def test_mean_keeps_what_a_real_model_knows() -> None:
    from cbd_hf.evaluation.language_modeling import evaluate_language_modeling

    text = "Once upon a time, there was a little girl named Lily. She liked to play outside in the big park."
    path = STORIES / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = {}
    for method in ("mean", "random"):
        model = AutoModelForCausalLM.from_pretrained(path)
        other = byte_level(corpus=[text, *CORPUS], size=400)
        transplant_vocabulary(model, tokenizer, other, method=method)
        found[method] = evaluate_language_modeling(model, other, [text], progress=False).bits_per_byte
    assert found["mean"] < found["random"] - 0.1
