"""Samples come from exactly the mixture, whatever else is in their batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cbd_hf.distillation.minillm.rollouts import (
    CachedDecoder,
    Completion,
    Rollout,
    load_rollouts,
    sample_mixture,
    save_rollouts,
)

from ...models import random_model, tiny_config


SMALL = 5  # entries of the softmax, so that frequencies can be counted


def models(family: str = "llama", **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    student = random_model(tiny_config(family, layers=1, **options), seed=1)
    teacher = random_model(tiny_config(family, layers=2, **options), seed=2)
    return student, teacher


def complete(
    pair: tuple[PreTrainedModel, PreTrainedModel], prompts: list[list[int]], keys: list[str], **options: Any
) -> list[Completion]:
    makers = [lambda ids, mask, model=model: CachedDecoder(model, model, ids, mask) for model in pair]
    values = {
        "teacher_mix": 0.3,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "pad_token_id": 1,
        "stops": set(),
        "seed": "seed",
        "device": torch.device("cpu"),
    }
    return sample_mixture(makers, prompts, keys, **values | options)


@torch.no_grad()
def distributions(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float, vocab: int | None
) -> torch.Tensor:
    """At each token of the completion, by one forward without cache."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :vocab]
    return (logits / temperature).softmax(-1)


def test_frequencies() -> None:
    """Of two tokens drawn one after the other, each pair is as frequent as the mixture has it."""
    pair, draws, prompt, share = models(vocab_size=SMALL, eos_token_id=None), 6000, [3, 2], 0.3
    found = complete(
        pair,
        [prompt] * draws,
        [str(key) for key in range(draws)],
        max_new_tokens=2,
        temperature=1.5,
        teacher_mix=share,
    )
    counts = torch.zeros(SMALL, SMALL)
    for completion in found:
        counts[tuple(completion.tokens.tolist())] += 1
    expected = torch.zeros(SMALL, SMALL)
    alone = torch.zeros(SMALL, SMALL)
    for first in range(SMALL):
        q, p = (distributions(model, prompt, [first, 0], 1.5, None) for model in pair)
        mixed = (1 - share) * q + share * p
        expected[first] = mixed[0, first] * mixed[1]
        alone[first] = q[0, first] * q[1]
    assert (expected - alone).abs().sum() > 0.2  # else the test would not tell them apart
    # The mean of chi squared is its degrees of freedom, the standard deviation sqrt(2 * 24) = 7.
    assert float(((counts - draws * expected) ** 2 / (draws * expected)).sum()) < 24 + 5 * 7
    assert float(((counts - draws * alone) ** 2 / (draws * alone)).sum()) > 24 + 20 * 7


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_recorded_log_probs(family: str, share: float) -> None:
    """With a cache and padding on the left as without them."""
    pair, prompts = models(family), [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    found = complete(pair, prompts, ["a", "b", "c"], teacher_mix=share, temperature=0.7, vocab=60)
    for prompt, completion in zip(prompts, found, strict=True):
        tokens = completion.tokens.tolist()
        assert len(tokens) == 8 and max(tokens) < 60
        q, p = (distributions(model, prompt, tokens, 0.7, 60) for model in pair)
        at = completion.tokens[:, None]
        torch.testing.assert_close(completion.student, q.gather(-1, at)[:, 0].log(), rtol=1e-4, atol=1e-4)
        mixed = ((1 - share) * q + share * p).gather(-1, at)[:, 0].log()
        torch.testing.assert_close(completion.mixture, mixed, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_their_batch() -> None:
    pair, prompts, keys = models(), [[5, 6, 7], [8], [9, 10, 11, 12, 13]], ["a", "b", "c"]
    whole = complete(pair, prompts, keys)
    for row in range(3):
        (alone,) = complete(pair, [prompts[row]], [keys[row]])
        assert torch.equal(alone.tokens, whole[row].tokens)
    (other,) = complete(pair, [prompts[0]], ["another"])
    assert not torch.equal(other.tokens, whole[0].tokens)


def test_ends() -> None:
    """A sample ends with the first end-of-sequence token; the loop with the last sample, or where any process says."""
    pair, prompts, keys = models(), [[5, 6, 7], [8]], ["a", "b"]
    whole = complete(pair, prompts, keys)
    stop = int(whole[0].tokens[2])
    expected = []
    for completion in whole:
        tokens = completion.tokens.tolist()
        expected.append(tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
    asked: list[bool] = []

    def always(unfinished: bool) -> bool:
        asked.append(unfinished)
        return True

    for option in ({}, {"unfinished": always}):
        found = complete(pair, prompts, keys, stops={stop}, **option)
        assert [completion.tokens.tolist() for completion in found] == expected
        assert [len(completion.student) for completion in found] == [len(tokens) for tokens in expected]
    assert len(asked) == 8


def test_no_cache() -> None:
    class Forgetful(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
            return type("Outputs", (), {"logits": torch.zeros(*input_ids.shape, SMALL)})()

    model: Any = Forgetful()
    with pytest.raises(ValueError, match="Forgetful has no KV cache"):
        complete((model, model), [[1, 2]], ["a"])


def test_files(tmp_path: Path) -> None:
    path, rollouts = tmp_path / "rollouts.safetensors", []
    for row, length in ((4, 3), (2, 5)):
        values = [torch.randn(length) for _ in range(4)]
        rollouts.append(Rollout(row, torch.arange(row), torch.arange(length), *values))
    save_rollouts(path, rollouts, {"seed": "1", "rollout": "3"})
    found = load_rollouts(path, {"seed": "1", "rollout": "3"})
    for one, other in zip(rollouts, found, strict=True):
        assert one.row == other.row
        for name in ("prompt", "tokens", "student", "teacher", "mixture", "advantages"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    with pytest.raises(ValueError, match=r"saved with other options: seed=1 \(now 2\)"):
        load_rollouts(path, {"seed": "2", "rollout": "3"})
    with pytest.raises(ValueError, match=r"lacks nothing.safetensors"):
        load_rollouts(path.with_name("nothing.safetensors"), {})
