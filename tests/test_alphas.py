"""The weight of the smaller anchor: what is allowed, by kind of part, and the search."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hf import CBDModel, DistillationChain
from cbd_hf.alphas import (
    GRID,
    REFINEMENTS,
    Search,
    by_group,
    calibration_batches,
    check_alpha,
    recorded,
    search_alpha,
)
from cbd_hf.layout import GROUPS

from .models import random_model, random_tokens, tiny_config, tiny_tokenizer


@pytest.mark.parametrize("alpha", [None, "auto", 0, 1, 0.5, 1.0, {"ffn": 0}, dict.fromkeys(GROUPS, 0.3)])
def test_allowed(alpha: Any) -> None:
    check_alpha(alpha)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (1.01, r"^alpha=1.01 is outside \[0, 1\]"),
        (-0.1, "outside"),
        (float("nan"), "outside"),
        (float("inf"), "outside"),
        (True, "outside"),
        ("best", "'best' is unknown; give a number"),
        ({}, "unknown group"),
        ({"heads": 0.5}, r"unknown group\(s\) \['heads'\]; choose from \['embeddings', 'attention', 'ffn', 'norms'\]"),
        ({"ffn": 2}, r"alpha\['ffn'\]=2 is outside"),
        ({"ffn": True}, r"alpha\['ffn'\]=True is outside"),
        ({"ffn": 0.5, "norms": "auto"}, r"alpha\['norms'\]=auto is outside"),
    ],
)
def test_refused(alpha: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_alpha(alpha)


def test_by_group() -> None:
    assert by_group(None, 0.7) == dict.fromkeys(GROUPS, 0.7)
    assert by_group(0, 0.7) == dict.fromkeys(GROUPS, 0.0)
    assert by_group({"ffn": 1, "norms": 0.2}, 0.7) == {"embeddings": 0.7, "attention": 0.7, "ffn": 1.0, "norms": 0.2}
    assert recorded(by_group(0.25, 0.7)) == 0.25
    assert recorded(by_group({"ffn": 1}, 0.5)) == {"embeddings": 0.5, "attention": 0.5, "ffn": 1.0, "norms": 0.5}


class Quadratic(torch.nn.Module):
    """Predicts the next token with cross-entropy 0.1 + (alpha - best) ** 2."""

    device = torch.device("cpu")

    def __init__(self, best: float) -> None:
        super().__init__()
        self.best, self.alpha, self.tried = best, -1.0, list[float]()

    def fill(self, alpha: float) -> None:
        self.alpha = alpha
        self.tried.append(alpha)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        right = torch.tensor(-(0.1 + (self.alpha - self.best) ** 2), dtype=torch.float64)
        wrong = torch.log1p(-right.exp())
        return SimpleNamespace(logits=torch.stack([right, wrong]).expand(*input_ids.shape, 2))


TOKENS = [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)]


@settings(deadline=None, max_examples=40)
@given(best=st.floats(0, 1), default=st.floats(0, 1))
def test_the_search_comes_near(best: float, default: float) -> None:
    model = Quadratic(best)
    found = search_alpha(model, model.fill, TOKENS, default)
    assert abs(found.alpha - best) <= GRID[1] / 2 ** (REFINEMENTS + 1) + 1e-6
    assert set(found.losses) >= {*GRID, round(default, 6)}
    assert model.tried == list(found.losses)  # none twice
    assert all(0 <= alpha <= 1 for alpha in model.tried)
    assert len(model.tried) <= len(GRID) + 1 + 2 * REFINEMENTS
    for alpha, loss in found.losses.items():
        assert loss == pytest.approx(0.1 + (alpha - best) ** 2, rel=1e-4)
    assert found.losses[found.alpha] == min(found.losses.values())


def test_equal_losses_take_the_smaller_alpha() -> None:
    model = Quadratic(0.5)
    found = search_alpha(model, lambda alpha: model.fill(0.5), TOKENS, 0.3)
    assert found.alpha == 0.0 and len(set(found.losses.values())) == 1


def test_what_is_recorded() -> None:
    model = Quadratic(0.3)
    found = search_alpha(model, model.fill, TOKENS, 0.4)
    assert found.tokens == 13 and found.seconds >= 0
    record = found.record()
    assert record["tokens"] == 13 and record["trials"] == sorted(record["trials"])
    assert {alpha for alpha, _ in record["trials"]} == set(found.losses)
    assert Search(0.5, {}, 1, seconds=1.0) == Search(0.5, {}, 1, seconds=2.0)  # the time is no property of it


class TestCalibration:
    def test_token_ids(self) -> None:
        tokens = random_tokens(5, 7)
        batches = calibration_batches(tokens, None, 512, rows=3)
        assert [tuple(batch.shape) for batch in batches] == [(1, 7)] * 3
        assert torch.equal(torch.cat(batches), tokens[:3])
        assert torch.equal(calibration_batches(tokens[0], None, 512)[0], tokens[:1])

    def test_several_tensors(self) -> None:
        given = [random_tokens(2, 5).int(), random_tokens(1, 9)[0]]
        batches = calibration_batches(given, None, 4)
        assert [tuple(batch.shape) for batch in batches] == [(1, 4)] * 3
        assert all(batch.dtype == torch.int64 for batch in batches)
        assert torch.equal(torch.cat(batches), torch.cat([given[0][:, :4].long(), given[1][None, :4]]))

    @pytest.mark.parametrize("tokens", [torch.zeros(0, 8), torch.zeros(3, 1)])
    def test_too_few_tokens(self, tokens: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="at least one row of two tokens"):
            calibration_batches(tokens.long(), None, 8)

    def test_texts(self) -> None:
        tokenizer = tiny_tokenizer()
        batches = calibration_batches(["w1 w2 w3", "w4 w5"], tokenizer, 4)
        ids = tokenizer("w1 w2 w3")["input_ids"] + [1] + tokenizer("w4 w5")["input_ids"] + [1]
        assert [batch.tolist() for batch in batches] == [[ids[:4]], [ids[4:]]]
        (one,) = calibration_batches("w1 w2 w3", tokenizer, 512)
        assert one.tolist() == [ids[:4]]

    def test_long_texts_are_cut(self) -> None:
        batches = calibration_batches([f"w{i % 50} w1 w2" for i in range(99)], tiny_tokenizer(), 6, rows=4)
        assert [tuple(batch.shape) for batch in batches] == [(1, 6)] * 4

    def test_no_row_is_a_single_token(self) -> None:
        """It would predict nothing."""
        batches = calibration_batches("w1 w2 w3 w4", tiny_tokenizer(), 4)
        assert [tuple(batch.shape) for batch in batches] == [(1, 4)]

    @pytest.mark.parametrize("calibration", ["", [], [""]])
    def test_no_text(self, calibration: Any) -> None:
        with pytest.raises(ValueError, match="holds no text"):
            calibration_batches(calibration, tiny_tokenizer(), 8)

    def test_no_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="no tokenizer, so calibration must be token ids"):
            calibration_batches("w1", None, 8)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> DistillationChain:
    models = [random_model(tiny_config("gpt2", layers=n, heads=n), seed=n, std=0.1) for n in (2, 4)]
    directory = tmp_path_factory.mktemp("chains") / "chain"
    return DistillationChain.from_anchors(models, directory, names=["small", "large"], tokenizer=tiny_tokenizer())


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def test_auto_takes_the_best_of_its_trials(chain: DistillationChain) -> None:
    size, tokens = sum(chain.sizes) / 2, random_tokens(4, 12)
    model = CBDModel.from_chain(chain, size, alpha="auto", calibration=tokens)
    record = model.config.cbd
    trials = dict(record["alpha_search"]["trials"])
    assert record["alpha_search"]["tokens"] == tokens.numel()
    assert record["alpha"] == min(trials, key=lambda alpha: (trials[alpha], alpha))
    default = CBDModel.from_chain(chain, size).config.cbd["alpha"]
    assert {*GRID, round(default, 6)} <= trials.keys()
    again = CBDModel.from_chain(chain, size, alpha=record["alpha"])
    assert all(torch.equal(value, weights_of(again)[name]) for name, value in weights_of(model).items())
    assert model.config.layer_norm_epsilon == again.config.layer_norm_epsilon
    # The recorded losses are those of the models.
    for alpha in (0.25, record["alpha"]):
        other = CBDModel.from_chain(chain, size, alpha=alpha)
        with torch.no_grad():
            loss = float(other(input_ids=tokens, labels=tokens).loss)
        assert trials[alpha] == pytest.approx(loss, abs=2e-5)


def test_auto_with_texts(chain: DistillationChain) -> None:
    model = CBDModel.from_chain(chain, sum(chain.sizes) / 2, alpha="auto", calibration=["w1 w2 w3 w4"] * 4)
    assert model.config.cbd["alpha_search"]["tokens"] == 20


def test_alpha_by_group(chain: DistillationChain) -> None:
    size = sum(chain.sizes) / 2
    ends = {alpha: weights_of(CBDModel.from_chain(chain, size, alpha=alpha)) for alpha in (0, 1)}
    alphas = {"embeddings": 1.0, "attention": 0.0, "norms": 1.0, "ffn": 0.0}
    model = CBDModel.from_chain(chain, size, alpha=alphas)
    assert model.config.cbd["alpha"] == alphas
    for name, value in weights_of(model).items():
        end = 0 if "attn" in name or "mlp" in name else 1
        assert torch.equal(value, ends[end][name]), name
    partly = CBDModel.from_chain(chain, size, alpha={"ffn": 0.5})
    default = CBDModel.from_chain(chain, size).config.cbd["alpha"]
    assert partly.config.cbd["alpha"] == dict.fromkeys(GROUPS, default) | {"ffn": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "auto"}, "alpha='auto' runs text through a model: give calibration"),
        ({"alpha": "auto", "initializer": "cut", "calibration": "w1"}, "searches for initializer='chain', not 'cut'"),
        ({"alpha": {"head": 1}}, "unknown group"),
        ({"selection": "importance"}, "give calibration"),
    ],
)
def test_refusals_of_from_chain(options: dict[str, Any], message: str, chain: DistillationChain) -> None:
    with pytest.raises(ValueError, match=message):
        CBDModel.from_chain(chain, sum(chain.sizes) / 2, **options)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    models = [random_model(tiny_config("gpt2", layers=n, heads=4), seed=n) for n in (2, 4)]
    chain = DistillationChain.from_anchors(models, tmp_path / "chain", names=["small", "large"])
    with pytest.raises(ValueError, match="calibration must be token ids"):
        CBDModel.from_chain(chain, sum(chain.sizes) / 2, alpha="auto", calibration="w1 w2")
    CBDModel.from_chain(chain, sum(chain.sizes) / 2, alpha="auto", calibration=random_tokens(2, 6))
