"""Answers are what the source says, however they are made, and are finished after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from trl import SFTConfig

import cbd_hf.distillation.answers.build as module
from cbd_hf.data.instructions import load_instructions
from cbd_hf.data.sources import load_split
from cbd_hf.distillation.answers import AnswersManifest, AnswersSettings, load_answers
from cbd_hf.distillation.preparation import prepare_rows

from ...models import tiny_tokenizer
from .helpers import ENDS, build, completions, files, greedy, questions, rows, save_source


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("banned", [0, 2])
def test_greedy_answers_are_the_models(family: str, banned: int, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family=family)
    build(source, tmp_path / "out", temperature=0.0, no_repeat_ngram_size=banned)
    tokenizer = tiny_tokenizer()
    made = rows(tmp_path / "out")
    assert {row["finish"] for row in made} == {"eos", "length"}
    repeated = 0
    for row in made:
        prompt = tokenizer(row["prompt"])["input_ids"]
        expected = greedy(source, prompt, 10, banned)
        repeated += expected != greedy(source, prompt, 10)
        ended = expected[-1] in ENDS
        assert (row["finish"], row["tokens"]) == ("eos" if ended else "length", len(expected))
        said = [token for token in expected[: -1 if ended else None] if token not in tokenizer.all_special_ids]
        assert tokenizer(row["completion"])["input_ids"] == said
    assert bool(repeated) == bool(banned)


def test_rows(answered: Path) -> None:
    made, asked = rows(answered), questions()
    assert [row["prompt"] for row in made] == asked["prompt"]
    assert [row["references"] for row in made] == [[text] for text in asked["completion"]]
    assert [row["source_row"] for row in made] == list(range(20)) and {row["sample"] for row in made} == {0}
    manifest = AnswersManifest.read(answered)
    assert (manifest.prompts, manifest.answers, manifest.complete) == (20, 20, True)
    assert manifest.tokens == sum(row["tokens"] for row in made)
    assert [shard.rows for shard in manifest.shards] == [8, 8, 4]
    assert manifest.provenance()["settings"]["temperature"] == 1.0 and "torch" in manifest.provenance()["packages"]
    manifest.check_shards(answered, "full")
    # An answer goes on where the prompt ends: the two texts are joined as they are.
    assert all(row["completion"].startswith(" w") for row in made if row["tokens"] > 1)


def test_every_reader_finds_the_same_rows(answered: Path) -> None:
    expected = [(row["prompt"], row["completion"]) for row in rows(answered)]
    answers, dropped = load_answers(answered, verify="full")
    assert answers.column_names == ["prompt", "completion"] and dropped == {}
    for dataset in (answers, load_split(answered), load_dataset(str(answered), split="train")):
        assert list(zip(dataset["prompt"], dataset["completion"], strict=True)) == expected
    with_text = [pair for pair in expected if pair[1]]
    instructions = load_instructions(answered)
    assert list(zip(instructions["prompt"], instructions["completion"], strict=True)) == with_text
    config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    prepared: Any = prepare_rows(answers, tiny_tokenizer(), config)
    assert len(prepared) == 20


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_do_not_depend_on_batches_and_files(family: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family=family)
    for name, options in (("one", {"batch_size": 1}), ("many", {"batch_size": 50, "shard_rows": 30}), ("usual", {})):
        # A rule over n-grams sees the padding unless it is told of it.
        build(source, tmp_path / name, no_repeat_ngram_size=2, top_p=0.9, **options)
    assert completions(tmp_path / "one") == completions(tmp_path / "many") == completions(tmp_path / "usual")
    few = questions().select([3, 11, 4])
    build(source, tmp_path / "few", few, no_repeat_ngram_size=2, top_p=0.9)
    expected = completions(tmp_path / "usual")
    assert completions(tmp_path / "few") == [expected[row] for row in (3, 11, 4)]


def test_sampling(source: Path, answered: Path, tmp_path: Path) -> None:
    usual = completions(answered)
    assert usual[0] != usual[10]  # two answers to one prompt
    for options in ({"seed": 1}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.3}):
        build(source, tmp_path / str(options), **options)
        assert completions(tmp_path / str(options)) != usual
    build(source, tmp_path / "top", top_k=1)
    build(source, tmp_path / "cold", temperature=1e-3)
    build(source, tmp_path / "narrow", top_p=1e-6)
    build(source, tmp_path / "greedy", temperature=0.0)
    expected = completions(tmp_path / "greedy")
    assert all(completions(tmp_path / name) == expected for name in ("top", "cold", "narrow"))


def test_one_name_but_other_answers(source: Path, tmp_path: Path) -> None:
    """`datasets` must not answer from what it has cached of a directory of the same name."""
    for seed in (0, 1):
        directory = tmp_path / str(seed) / "answers"
        build(source, directory, seed=seed)
        expected = completions(directory)
        assert load_answers(directory)[0]["completion"][:] == expected
        assert load_split(directory)["completion"][:] == expected
    for path in (tmp_path / "0" / "answers").iterdir():
        path.unlink()
    build(source, tmp_path / "0" / "answers", seed=2)
    assert load_split(tmp_path / "0" / "answers")["completion"][:] == completions(tmp_path / "0" / "answers")


def test_several_answers(source: Path, answered: Path, tmp_path: Path) -> None:
    report = build(source, tmp_path / "three", n=3)
    made = rows(tmp_path / "three")
    assert (report.prompts, report.answers) == (20, 60)
    assert [(row["source_row"], row["sample"]) for row in made] == [(i, k) for i in range(20) for k in range(3)]
    assert [row["completion"] for row in made if row["sample"] == 0] == completions(answered)
    different = [len({row["completion"] for row in made if row["source_row"] == index}) for index in range(20)]
    assert sum(different) > 50


def test_chat(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "chat", source_prompt="chat", temperature=0.0)
    asked = questions()
    written = Dataset.from_dict({"prompt": [f"<user> {text} <end> <assistant> " for text in asked["prompt"]]})
    build(source, tmp_path / "written", written, temperature=0.0)
    made = rows(tmp_path / "chat")
    assert [row["completion"] for row in made] == [text.strip() for text in completions(tmp_path / "written")]
    assert [row["prompt"] for row in made] == asked["prompt"]
    # The same as conversations, once as prompt and completion and once as messages.
    turns = [[{"role": "user", "content": text}] for text in asked["prompt"]]
    replies = [[{"role": "assistant", "content": text}] for text in asked["completion"]]
    messages = [turn + reply for turn, reply in zip(turns, replies, strict=True)]
    pairs = Dataset.from_dict({"prompt": turns, "completion": replies})
    for name, dataset in (("pairs", pairs), ("messages", Dataset.from_dict({"messages": messages}))):
        build(source, tmp_path / name, dataset, temperature=0.0)
        found = rows(tmp_path / name)
        assert [row["prompt"] for row in found] == turns
        expected = [[{"role": "assistant", "content": row["completion"]}] for row in made]
        assert [row["completion"] for row in found] == expected
        assert [row["references"] for row in found] == [row["references"] for row in made]
        assert load_answers(tmp_path / name)[0]["completion"][:] == expected


def test_uneven_messages_are_read_back(source: Path, tmp_path: Path) -> None:
    """Fields and references that a first file has none of."""
    plain, reply = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    listed = [[plain]] * 2 + [[{"role": "user", "content": "w3", "name": "me"}, reply]]
    build(source, tmp_path / "out", Dataset.from_list([{"messages": row} for row in listed]), shard_rows=1)
    answers = load_split(tmp_path / "out")
    assert answers["references"][:] == [[], [], ["w2"]]
    assert [row[0]["name"] for row in answers["prompt"]] == [None, None, "me"]


def test_long_prompts_are_left_out(source: Path, tmp_path: Path) -> None:
    lengths = [len(prompt.split()) for prompt in questions()["prompt"]]
    report = build(source, tmp_path / "short", max_prompt_length=5)
    kept = [index for index, length in enumerate(lengths) if length <= 5]
    assert [row["source_row"] for row in rows(tmp_path / "short")] == kept and 0 < len(kept) < 20
    assert (report.prompts, report.long) == (len(kept), 20 - len(kept))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_resume(after: int, source: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written, directory = module.atomic_write_text, [], tmp_path / "out"

    def write(path: Path, text: str) -> None:
        if len(written) == after:
            (directory / f".{path.name}.tmp-123456789abc").write_bytes(b"half")
            raise Killed
        written.append(path)
        real(path, text)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "atomic_write_text", write)
        build(source, directory)
    assert AnswersManifest.read(directory).prompts == 8 * after
    with pytest.raises(ValueError, match=f"answers to {8 * after} of 20 prompts"):
        load_answers(directory)
    report = build(source, directory)
    assert report.new_answers == 20 - 8 * after
    assert files(directory) == files(answered)
    again = build(source, directory)
    assert (again.new_answers, again.answers) == (0, 20)
    assert files(directory) == files(answered)


def test_other_settings_are_refused(source: Path, answered: Path, tmp_path: Path) -> None:
    before = files(answered)
    for options, message in (
        ({"temperature": 0.5}, "temperature: 1.0, not 0.5"),
        ({"top_p": 0.5, "seed": 3}, "top_p: 1.0, not 0.5; seed: 0, not 3"),
        ({"n": 2}, "n: 1, not 2"),
        ({"max_new_tokens": 11}, "max_new_tokens: 10, not 11"),
        ({"shard_rows": 9}, "shard_rows: 8, not 9"),
        ({"source_prompt": "chat"}, "source_prompt: same, not chat"),
        ({"dtype": "float16"}, "source dtype: float32, not float16"),
        ({"dataset": questions(19)}, "prompts: "),
    ):
        with pytest.raises(ValueError, match=message):
            build(source, answered, **options)
    with pytest.raises(ValueError, match="source sha256"):
        build(save_source(tmp_path / "other", seed=7), answered)
    assert files(answered) == before


def test_broken_answers_are_refused(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    build(source, directory)
    shard, manifest = directory / "answers-00001.jsonl", directory / "answers.json"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"w1", b"w2"))
    load_answers(directory)
    with pytest.raises(ValueError, match="does not match its sha256"):
        load_answers(directory, verify="full")
    shard.write_bytes(content[:-9])
    for call in (lambda: load_answers(directory), lambda: build(source, directory)):
        with pytest.raises(ValueError, match="answers-00001.jsonl has .* bytes instead of"):
            call()
    with pytest.raises(ValueError, match="verify='half'"):
        load_answers(directory, verify="half")
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_answers(directory)
    valid = json.loads(manifest.read_text())
    for change, message in (
        ({"schema_version": 9}, "schema_version 9.*Upgrade"),
        ({"settings": {}}, "settings: the field"),
        ({"more": 1}, "more"),
        ({"source": valid["source"] | {"vocab_size": "many"}}, "vocab_size is 'many'"),
        ({"settings": valid["settings"] | {"top_p": 3.0}}, "settings: top_p=3.0"),
        ({"shards": [valid["shards"][0] | {"file": "../other"}]}, "leaves the directory"),
    ):
        manifest.write_text(json.dumps(valid | change))
        with pytest.raises(ValueError, match=message):
            AnswersManifest.read(directory)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        AnswersManifest.read(directory)
    with pytest.raises(FileNotFoundError, match="holds no answers"):
        load_answers(tmp_path)


def test_mistakes(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    asked = questions()
    for options, message in (
        ({"source_prompt": "raw"}, "source_prompt='raw'"),
        ({"engine": "tgi"}, "engine='tgi'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"n": 2, "temperature": 0.0}, "n=2 answers to a prompt would be alike"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 60}, "longest prompt, of 9 tokens.*60.*exceed the 64 positions"),
        ({"dataset": asked.select([])}, "no prompt"),
        ({"dataset": asked.remove_columns("prompt")}, "columns completion; .*data_format=instructions"),
        ({"dataset": Dataset.from_dict({"prompt": ["w1", ""]})}, "Row 1 .* empty prompt"),
        ({"dataset": Dataset.from_dict({"prompt": ["w1 " * 30]})}, "more than max_prompt_length=20.*has 30"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "no effect on texts.*source_prompt=chat"),
    ):
        with pytest.raises(ValueError, match=message):
            build(source, directory, **options)
    assert not directory.exists()
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no answers"):
        build(source, directory)


def test_sources_that_cannot_answer(source: Path, tmp_path: Path) -> None:
    other = save_source(tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (other / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="no chat template, but source_prompt=chat"):
        build(other, tmp_path / "out", source_prompt="chat")
    talk = Dataset.from_list([{"prompt": [{"role": "user", "content": "w1"}]}])
    with pytest.raises(ValueError, match="no chat template, but the prompts are conversations"):
        build(other, tmp_path / "out", talk)
    (other / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        build(other, tmp_path / "out")


def test_another_chat_template_is_refused(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    build(source, tmp_path / "out", source_prompt="chat")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(source)
    with pytest.raises(ValueError, match="chat template: "):
        build(source, tmp_path / "out", source_prompt="chat")


def test_settings_survive_the_file(answered: Path, tmp_path: Path) -> None:
    manifest = AnswersManifest.read(answered)
    manifest.settings = dataclasses.replace(
        manifest.settings, chat_template_kwargs={"date": "1 May"}, source_prompt="chat"
    )
    manifest.write(tmp_path)
    assert AnswersManifest.read(tmp_path) == manifest
    assert AnswersSettings(**dataclasses.asdict(manifest.settings)) == manifest.settings
