"""Instruction files of every known layout become prompt and completion."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from cbd_hf.data.instructions import DOLLY, drop_long_prompts, load_instructions, split_instructions
from cbd_hf.data.prompts import alpaca_prompt

from ..test_clients import REAL_DATA, make_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_default_is_dolly_on_the_hub(hub: list[tuple[str, dict[str, Any]]]) -> None:
    dataset = load_instructions()
    assert hub == [(DOLLY, {"split": "train"})]
    assert dataset.column_names == ["prompt", "completion", "category"]
    assert dataset[1] == {"prompt": alpaca_prompt("Task 1"), "completion": "Answer 1", "category": "open_qa"}


def test_first_examples_of_the_hub_are_streamed(hub: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    dataset = load_instructions("someone/streamed-instructions", max_examples=2)
    assert dataset["completion"][:] == ["Answer 0", "Answer 1"]
    assert hub[0][1]["streaming"]


@pytest.mark.parametrize(
    ("row", "given", "answer"),
    [
        ({"instruction": "Do.", "context": "Here.", "response": "Done."}, "Here.", "Done."),
        ({"instruction": "Do.", "input": "Here.", "output": "Done."}, "Here.", "Done."),
        ({"instruction": "Do.", "response": "Done."}, "", "Done."),
    ],
)
def test_layouts(row: dict[str, str], given: str, answer: str, tmp_path: Path) -> None:
    dataset = load_instructions(write(tmp_path / "data.jsonl", [row]))
    assert dataset[:] == {"prompt": [alpaca_prompt("Do.", given)], "completion": [answer]}


def test_prompt_and_completion_are_taken_as_they_are(tmp_path: Path) -> None:
    dataset = load_instructions(write(tmp_path / "data.jsonl", [{"prompt": "Q: ", "completion": "A"}]))
    assert dataset[:] == {"prompt": ["Q: "], "completion": ["A"]}


def test_instances_with_the_same_input_are_references(tmp_path: Path) -> None:
    instances = [{"input": "a", "output": "1"}, {"input": "a", "output": "2"}, {"input": "b", "output": "3"}]
    dataset = load_instructions(write(tmp_path / "data.jsonl", [{"instruction": "Do.", "instances": instances}]))
    assert dataset["references"][:] == [["1", "2"], ["3"]]
    assert dataset["completion"][:] == ["1", "3"]
    assert dataset["prompt"][:] == [alpaca_prompt("Do.", "a"), alpaca_prompt("Do.", "b")]


def test_several_outputs_are_references(tmp_path: Path) -> None:
    dataset = load_instructions(write(tmp_path / "data.jsonl", [{"instruction": "Do.", "output": ["x", "y"]}]))
    assert dataset[0] == {"prompt": alpaca_prompt("Do."), "completion": "x", "references": ["x", "y"]}


@pytest.mark.parametrize("suffix", ["json", "jsonl.gz", "jsonl.xz", "parquet"])
def test_file_types(suffix: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"Do {i}.", "output": f"{i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        contents = {
            "json": json.dumps(rows).encode(),
            "jsonl.gz": gzip.compress(lines),
            "jsonl.xz": lzma.compress(lines),
        }
        path.write_bytes(contents[suffix])
    assert load_instructions(path)["completion"][:] == ["0", "1", "2"]


def test_unanswered_examples_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": "a", "output": " "}, {"instruction": "b", "output": "yes"}]
    assert load_instructions(write(tmp_path / "data.jsonl", rows))["completion"][:] == ["yes"]
    assert "1 of 2" in caplog.text


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"question": "?", "answer": "!"}])
    with pytest.raises(ValueError, match=r"question, answer; needed are instruction and response"):
        load_instructions(path)


def test_no_answers_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No example"):
        load_instructions(write(tmp_path / "data.jsonl", [{"instruction": "a", "output": ""}]))


def test_split_shares_no_prompt_and_is_repeatable() -> None:
    rows = [{"prompt": f"p{i % 30}", "completion": f"c{i}"} for i in range(40)]
    dataset = Dataset.from_list(rows)
    train, held_out = split_instructions(dataset, 7, seed=3)
    assert (len(train), len(held_out)) == (33, 7)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert split_instructions(dataset, 7, seed=3)[1][:] == held_out[:]
    assert split_instructions(dataset, 7, seed=4)[1][:] != held_out[:]


@pytest.mark.parametrize("size", [0, 3, 9])
def test_impossible_split(size: int) -> None:
    dataset = Dataset.from_list([{"prompt": f"p{i}", "completion": "c"} for i in range(3)])
    with pytest.raises(ValueError, match=r"1 \.\.\. 2"):
        split_instructions(dataset, size)


def test_long_prompts_are_dropped() -> None:
    dataset = Dataset.from_list([{"prompt": "a", "completion": "c"}, {"prompt": "a b c d " * 20, "completion": "c"}])
    tokenizer = make_tokenizer()
    assert drop_long_prompts(dataset, 10, tokenizer)["prompt"][:] == ["a"]
    with pytest.raises(ValueError, match="longer than 0 tokens"):
        drop_long_prompts(dataset, 0, tokenizer)


@pytest.mark.skipif(not (REAL_DATA / "instruct").is_dir(), reason="no real instruction files; set CBD_TEST_DATA")
@pytest.mark.parametrize(
    ("file", "rows", "columns"),
    [
        ("dolly_3645.jsonl", 3645, ["prompt", "completion", "category"]),
        ("self_instruct_eval_242.jsonl", 242, ["prompt", "completion"]),
        ("self_instruct_user_oriented_252.jsonl", 252, ["prompt", "completion", "references"]),
    ],
)
def test_real_files(file: str, rows: int, columns: list[str]) -> None:
    dataset = load_instructions(REAL_DATA / "instruct" / file)
    assert (len(dataset), dataset.column_names) == (rows, columns)
