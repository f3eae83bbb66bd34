"""Causal LMs taken apart: hidden states times head are the logits, or the model's own forward is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from cbd_hf.distillation import heads
from cbd_hf.distillation.heads import find_parts, run_backbone
from cbd_hf.distillation.sources import LiveTeacher
from cbd_hf.distillation.student import disable_dropout

from ..models import VOCAB, answers_dataset, random_model, random_tokens, tiny_config
from .helpers import assert_same_gradients, make_trainer, student_model, teacher_model, train
from .test_batches import SMALL, family_model


# Family -> what it changes, and the scale and the softcap of its logits.
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "gpt2": ({}, 1.0, None),
    "llama": ({}, 1.0, None),
    "olmo": ({}, 1.0, None),
    "gptj": ({"rotary_dim": 4, "n_embd": 32, "n_head": 4}, 1.0, None),  # its head has a bias
    "phi": ({}, 1.0, None),  # likewise
    "gemma2": ({"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "cohere": ({"logit_scale": 0.25}, 0.25, None),
    "granite": ({"logits_scaling": 4.0}, 0.25, None),
    "bloom": ({"n_head": 4}, 1.0, None),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 16}, 1.0, None),  # a projection before the head
    "gpt_neox": ({}, 1.0, None),
    "mixtral": ({"num_local_experts": 2}, 1.0, None),
}


def make(family: str) -> PreTrainedModel:
    if family in ("gpt2", "llama"):
        return family_model(family, 2, 2)
    layers = {"num_hidden_layers": 2, "n_layer": 2}
    return random_model(AutoConfig.for_model(family, **(SMALL | layers | FAMILIES[family][0])), seed=2)


@torch.no_grad()
def head_of_hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    parts = find_parts(model)
    assert parts is not None
    (hidden,) = run_backbone(parts, {"input_ids": tokens})
    with parts.open_head() as head:
        assert head.weight is not None
        logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
        return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_hidden_states_makes_the_logits(family: str) -> None:
    model, tokens = make(family), random_tokens()
    parts = find_parts(model)
    assert parts is not None and (parts.scale, parts.softcap) == FAMILIES[family][1:]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(head_of_hidden(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert (getattr(parts.head, "bias", None) is not None) == (family in ("gptj", "phi"))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_below_an_adapter(family: str) -> None:
    model: Any = get_peft_model(make(family), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    tokens = random_tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(head_of_hidden(model, tokens), expected, rtol=1e-5, atol=1e-5)
    base = find_parts(make(family))
    assert base is not None and not torch.allclose(expected, head_of_hidden(make(family), tokens), atol=1e-2)


def test_layers_of_the_backbone() -> None:
    model, tokens = family_model("llama", 3, 1), random_tokens()
    parts = find_parts(model)
    assert parts is not None
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
        last, *layers = run_backbone(parts, {"input_ids": tokens}, (1, 3, 2))
    assert torch.equal(last, states[-1])
    assert all(torch.equal(one, states[layer]) for one, layer in zip(layers, (1, 3, 2), strict=True))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "gptj"])
def test_what_the_config_says_is_proved(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale or softcap that were read wrongly would not pass."""
    model = make(family)
    monkeypatch.setattr(heads, "_proved", {})
    monkeypatch.setattr(heads, "_read", lambda config: (0.9, None))
    assert find_parts(model) is None


class OtherLogits(LlamaForCausalLM):
    """Adds to its logits what no head says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.linspace(-1, 1, outputs.logits.shape[-1])
        return outputs


def other_logits(model: PreTrainedModel) -> PreTrainedModel:
    other = OtherLogits(model.config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize(
    "options", [{}, {"objective": "adaptive_kl", "temperature": 2.0, "cross_entropy_weight": 0.3}, {"lmbda": 1.0}]
)
@pytest.mark.parametrize("who", [("student",), ("teacher",), ("student", "teacher")])
def test_a_model_without_parts_trains_alike(
    who: tuple[str, ...], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own forward."""
    models = {"student": student_model, "teacher": teacher_model}

    def run() -> Any:
        return train(tmp_path, **{name: make() for name, make in models.items()}, max_steps=2, **options)

    whole = run()
    known = heads._scale_and_softcap
    monkeypatch.setattr(
        heads,
        "_scale_and_softcap",
        lambda model: None if {1: "student", 2: "teacher"}[model.config.num_hidden_layers] in who else known(model),
    )
    losses, gradients, trainer = run()
    assert (trainer._student_loss.parts is None) == ("student" in who)
    assert isinstance(trainer.teacher, LiveTeacher) and (trainer.teacher.parts is None) == ("teacher" in who)
    assert losses == pytest.approx(whole[0], rel=1e-5)
    assert_same_gradients(whole[1][0], gradients[0])
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_logits_of_ones_own(tmp_path: Path) -> None:
    """A class that is not the config's is not what the proof was about."""
    model = other_logits(student_model())
    assert find_parts(model) is None
    trainer = make_trainer(tmp_path, student=model, teacher=other_logits(student_model()))
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-5


def test_hidden_states_of_an_unknown_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = heads._scale_and_softcap
    monkeypatch.setattr(
        heads, "_scale_and_softcap", lambda model: None if model.config.num_hidden_layers == 2 else known(model)
    )
    with pytest.raises(ValueError, match="hidden_loss_weight cannot be used with this llama"):
        make_trainer(tmp_path, hidden_loss_weight=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gptj"])
def test_dropout_is_off(family: str) -> None:
    """Modules, and numbers that are handed to functions."""
    names = {"llama": ["attention_dropout"], "opt": ["attention_dropout", "dropout"]}
    changes = dict.fromkeys(names.get(family, ["attn_pdrop", "resid_pdrop", "embd_pdrop"]), 0.5)
    if family in ("gpt2", "llama"):
        config = tiny_config(family, layers=2, **changes)
    else:
        sizes = SMALL | {"num_hidden_layers": 2, "n_layer": 2} | FAMILIES[family][0]
        config = AutoConfig.for_model(family, **(sizes | changes))
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        model.train()
        assert not torch.allclose(model(input_ids=tokens).logits, expected, atol=1e-3)
        disable_dropout(model)
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_an_untied_head(tmp_path: Path) -> None:
    """Its gradient is the head's own."""
    _, (gradients,), _ = train(
        tmp_path, dataset=answers_dataset(), student=student_model(tie_word_embeddings=False), teacher=teacher_model()
    )
    assert gradients["lm_head.weight"].shape == (VOCAB, 32) and bool(gradients["lm_head.weight"].any())
