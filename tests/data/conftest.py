"""Stand-ins for what is not on this disk: the Hub, and packages that are not installed."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Answers `load_dataset` with five Dolly-like rows and records how it was called."""
    calls: list[tuple[str, dict[str, Any]]] = []
    rows = [
        {
            "instruction": f"Task {i}",
            "context": "",
            "response": f"Answer {i}",
            "category": "open_qa",
            "text": f"Row {i}",
        }
        for i in range(5)
    ]

    def load_dataset(path: str, **options: Any) -> Any:
        calls.append((path, options))
        dataset = Dataset.from_list(rows)
        return dataset.to_iterable_dataset() if options.get("streaming") else dataset

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package is found."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
