"""Engines: padding is no part of a prompt, and vLLM is asked for the same thing."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import cbd_hf.distillation.answers.build as module
from cbd_hf.distillation.answers import AnswersManifest, AnswersSettings
from cbd_hf.distillation.answers.engines import TransformersEngine, check_engine, cut
from cbd_hf.distillation.answers.prompts import sample_keys

from ...models import tiny_tokenizer
from .helpers import build, files, questions, rows


@pytest.mark.parametrize("ngram", [1, 2])
def test_padding_is_part_of_no_ngram(ngram: int, source: Path) -> None:
    """Padded with the very tokens that the model likes best, which a rule over n-grams would ban."""
    prompts = [[7, 1], [8, 9, 10, 11, 12, 7, 1], [1], [9, 7, 7]]
    model = AutoModelForCausalLM.from_pretrained(source)
    settings = AnswersSettings(no_repeat_ngram_size=ngram, max_new_tokens=8, temperature=0.0)

    def answers(batch_size: int, pad: int) -> list[list[int]]:
        engine = TransformersEngine(model, settings, [], pad, batch_size)
        return engine.answer(prompts, ["key"] * len(prompts))

    alone = answers(1, 1)
    for pad in {answer[0] for answer in alone} | {prompt[-1] for prompt in prompts}:
        assert answers(4, pad) == alone
    for prompt, answer in zip(prompts, alone, strict=True):
        tokens = prompt + answer
        added = [tuple(tokens[i : i + ngram]) for i in range(max(0, len(prompt) - ngram + 1), len(tokens) - ngram + 1)]
        assert len(answer) == 8 and len(set(added)) == len(added)


def test_only_the_settings_count(source: Path, tmp_path: Path) -> None:
    """A checkpoint's own penalties and limits would make answers of another distribution."""
    build(source, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(source)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.do_sample = 9.0, 1, True
    own.temperature, own.top_k, own.max_new_tokens = 0.1, 2, 3
    other = tmp_path / "other"
    model.save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    build(other, tmp_path / "bent")
    assert rows(tmp_path / "bent") == rows(tmp_path / "plain")


def test_cut() -> None:
    assert cut([5, 6, 7, 6], [7, 6]) == [5, 6]
    assert cut([5], [6]) == [5] and cut([], [6]) == [] and cut([5, 6], []) == [5, 6]


def test_keys() -> None:
    first, second, again = sample_keys([[1, 2], [3], [1, 2]], 2)
    assert len({*first, *second, *again}) == 6
    assert sample_keys([[3], [1, 2]], 3)[1][:2] == first


class FakeVllm(types.ModuleType):
    """The part of vLLM's interface that is used, answered by the words 10, 11, ... and a token that ends."""

    __version__ = "0.99.1"

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        self.made: list[dict[str, Any]] = []
        self.asked: list[tuple[list[int], Any]] = []
        fake = self

        @dataclasses.dataclass(kw_only=True)
        class SamplingParams:
            n: int = 1
            temperature: float = 1.0
            top_p: float = 1.0
            top_k: int = 0
            seed: int | None = None
            stop_token_ids: list[int] | None = None
            max_tokens: int | None = 16
            detokenize: bool = True

        class LLM:
            def __init__(self, model: str, **options: Any) -> None:
                fake.made.append({"model": model, **options})

            def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool = True) -> list[Any]:
                fake.asked += [
                    (prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, sampling_params, strict=True)
                ]
                return [self.output(len(prompt["prompt_token_ids"])) for prompt in prompts]

            def output(self, length: int) -> Any:
                tokens = [10 + index for index in range(length)] + ([1, 9] if length % 2 else [])
                completion = types.SimpleNamespace(token_ids=tuple(tokens), text="", finish_reason="stop")
                return types.SimpleNamespace(outputs=[completion])

        self.SamplingParams, self.LLM = SamplingParams, LLM


def test_vllm(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    options = {"engine": "vllm", "n": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    build(source, tmp_path / "out", **options, model_init_kwargs={"tensor_parallel_size": 2, "max_model_len": 99})
    (made,) = fake.made
    assert made == {
        "model": str(source),
        "dtype": "float32",
        "seed": 0,
        "max_model_len": 99,
        "trust_remote_code": False,
        "tensor_parallel_size": 2,
    }
    prompts = [tiny_tokenizer()(text)["input_ids"] for text in questions()["prompt"]]
    assert [prompt for prompt, _ in fake.asked] == [prompt for prompt in prompts for _ in range(2)]
    parameters = [asked for _, asked in fake.asked]
    assert len({asked.seed for asked in parameters}) == 40
    assert all(isinstance(asked.seed, int) and 0 <= asked.seed < 1 << 63 for asked in parameters)
    ends = AnswersManifest.read(tmp_path / "out").end_token_ids
    for asked in parameters:
        assert (asked.n, asked.temperature, asked.top_p, asked.top_k, asked.max_tokens) == (1, 0.7, 0.9, 5, 10)
        assert asked.stop_token_ids == ends and 1 in ends
    made_rows = rows(tmp_path / "out")
    for row, prompt in zip(made_rows, (prompt for prompt in prompts for _ in range(2)), strict=True):
        said = list(range(10, 10 + len(prompt)))
        end = next((index for index, token in enumerate(said) if token in ends), None)
        finished = end is not None or len(prompt) % 2 == 1
        assert row["finish"] == ("eos" if finished else "length")
        assert tiny_tokenizer()(row["completion"])["input_ids"] == said[:end]
    assert AnswersManifest.read(tmp_path / "out").packages["vllm"] == "0.99.1"
    # The seed of an answer is the same after an interruption.
    real, seeds = module.atomic_write_text, {asked.seed for asked in parameters}

    def killed(path: Path, text: str) -> None:
        if "00001" in path.name:
            raise KeyboardInterrupt
        real(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "atomic_write_text", killed)
        build(source, tmp_path / "again", **options)
    fake.asked.clear()
    build(source, tmp_path / "again", **options)
    assert len(fake.asked) == 24 and {asked.seed for _, asked in fake.asked} < seeds
    assert files(tmp_path / "again") == files(tmp_path / "out")
    with pytest.raises(ValueError, match="engine: vllm, not transformers"):
        build(source, tmp_path / "out", **options | {"engine": "transformers"})


def test_vllm_that_cannot_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no rule against repeated n-grams.*engine=transformers"):
        AnswersSettings(engine="vllm", no_repeat_ngram_size=6)
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm())
    with pytest.raises(ValueError, match="there are 2 processes.*tensor_parallel_size"):
        check_engine(AnswersSettings(engine="vllm"), 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install vllm"):
        build(source, tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()
