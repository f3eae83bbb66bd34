"""The held-out loss equals the plain formula, however the work is divided."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel, PreTrainedTokenizerBase

from cbd_hf.evaluation import language_modeling
from cbd_hf.evaluation.language_modeling import evaluate_language_modeling

from ..test_clients import SENTENCES, VOCABULARY


TEXTS = [*SENTENCES, " ".join(SENTENCES), "é", "x", "", "日本語 and 🙂🙂 too"]


@torch.no_grad()
def slow_formula(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[float, int]:
    """Total nats in float64 and number of predicted tokens, one document at a time, from full logits."""
    model = model.double()
    nats, count = 0.0, 0
    for text in texts:
        tokens = torch.tensor([tokenizer(text)["input_ids"][:max_length]], dtype=torch.long)
        if tokens.shape[1] < 2:
            continue
        scores = model(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
        nats -= scores.gather(-1, tokens[0, 1:, None]).sum().item()
        count += tokens.shape[1] - 1
    model.float()
    return nats, count


@pytest.mark.parametrize("max_length", [2, 16, 512])
def test_equals_the_slow_formula(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    nats, tokens = slow_formula(model, tokenizer, TEXTS, max_length)
    result = evaluate_language_modeling(model, tokenizer, TEXTS, max_length=max_length, progress=False)
    assert result.tokens == tokens
    assert result.documents == 8
    assert math.isclose(result.nats_per_token, nats / tokens, rel_tol=1e-5)
    assert math.isclose(result.bits_per_byte, nats / math.log(2) / result.bytes, rel_tol=1e-5)
    assert math.isclose(result.to_dict()["perplexity"], math.exp(nats / tokens), rel_tol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    expected = evaluate_language_modeling(model, tokenizer, TEXTS, batch_size=2, progress=False)
    found = evaluate_language_modeling(model, tokenizer, TEXTS, batch_size=batch_size, progress=False)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-6)


def test_small_chunks_do_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_language_modeling(model, tokenizer, TEXTS, progress=False)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    monkeypatch.setattr(language_modeling, "LOGITS_BYTES", 4 * VOCABULARY * 9)
    found = evaluate_language_modeling(model, tokenizer, TEXTS, progress=False)
    assert max(sizes) <= VOCABULARY * 9 and len(sizes) > 20
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-6)


def test_bytes_are_those_of_the_predicted_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # In a byte-level vocabulary every character of a token stands for one byte.
    pieces = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:] for text in SENTENCES]
    result = evaluate_language_modeling(model, tokenizer, SENTENCES, progress=False)
    assert result.bytes == sum(len(piece) for text in pieces for piece in text)
    short = evaluate_language_modeling(model, tokenizer, SENTENCES[:4], max_length=5, progress=False)
    assert short.bytes == sum(len(piece) for text in pieces[:4] for piece in text[:4])


def test_characters_of_several_tokens_count_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "a🙂🙂"
    assert len(tokenizer(text)["input_ids"]) == 9
    assert evaluate_language_modeling(model, tokenizer, [text], progress=False).bytes == 8


def test_with_bos_every_byte_counts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    result = evaluate_language_modeling(model, tokenizer, SENTENCES, progress=False)
    assert result.bytes == sum(len(text.encode()) for text in SENTENCES)


def test_capped_logits_are_taken_from_the_model(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=1.0,
    )
    torch.manual_seed(0)
    capped = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        capped.lm_head.weight.mul_(50)
    nats, tokens = slow_formula(capped, tokenizer, TEXTS, 64)
    monkeypatch.setattr(language_modeling, "LOGITS_BYTES", 4 * VOCABULARY * 100)
    result = evaluate_language_modeling(capped, tokenizer, TEXTS, max_length=64, progress=False)
    assert math.isclose(result.nats_per_token, nats / tokens, rel_tol=1e-5)


def test_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    before = evaluate_language_modeling(model, tokenizer, SENTENCES, progress=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    found = evaluate_language_modeling(adapted, tokenizer, SENTENCES, progress=False)
    nats, tokens = slow_formula(adapted, tokenizer, SENTENCES, 512)
    assert found.nats_per_token != before.nats_per_token
    assert math.isclose(found.nats_per_token, nats / tokens, rel_tol=1e-5)


def test_autocast_is_close_and_mode_is_restored(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    exact = evaluate_language_modeling(model, tokenizer, SENTENCES, progress=False)
    model.train()
    half = evaluate_language_modeling(model, tokenizer, SENTENCES, dtype=torch.bfloat16, device="cpu", progress=False)
    assert model.training and model.dtype == torch.float32
    assert half.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.03)
    assert half.nats_per_token != exact.nats_per_token


def test_errors_say_what_to_do(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        evaluate_language_modeling(model, tokenizer, SENTENCES, max_length=1)
    with pytest.raises(ValueError, match="more than the model's 512 positions; lower max_length"):
        evaluate_language_modeling(model, tokenizer, SENTENCES, max_length=513)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate_language_modeling(model, tokenizer, SENTENCES, batch_size=0)
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate_language_modeling(model, tokenizer, ["", "x"])
    tokenizer.add_tokens("river")
    with pytest.raises(ValueError, match="tokenizer that belongs to the model"):
        evaluate_language_modeling(model, tokenizer, SENTENCES)
