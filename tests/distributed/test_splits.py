"""One gradient, one loss and one result, over micro-batches, accumulation steps, processes and kinds of sharding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .cases import CASES, make_material
from .golden import PATH, difference, reference_runs, values_of
from .gradient_worker import relative_difference
from .launching import CONFIGS, run_cases


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TOLERANCE = 1e-5
SPLITS = ((4, 1), (2, 2), (1, 4))  # of 8 rows over two processes
# Config -> what must really split the student, and the teacher's placements to try.
BACKENDS = {
    "cpu_2proc": ("ddp", ("shard",)),
    "zero1": ("zero1", ()),
    "zero2": ("zero2", ("replicate", "shard", "offload")),
    "zero3": ("zero3", ("shard", "offload")),
    "fsdp2": ("fsdp2", ("replicate", "shard")),
}


def runs_of(config: str) -> dict[str, list[Any]]:
    """
    Every case in one split, another one for each config, so that all together have every case in every split.
    CBD_FULL_MATRIX=1 takes all splits everywhere.
    """
    number = list(BACKENDS).index(config)
    runs: dict[str, list[Any]] = {}
    for index, (name, case) in enumerate(CASES.items()):
        if case.watch or (config != "cpu_2proc" and not case.sharded):
            continue
        chosen = SPLITS if os.environ.get("CBD_FULL_MATRIX") else (SPLITS[(index + number) % len(SPLITS)],)
        runs |= {f"{name}-{rows}x{steps}": [name, rows, steps, {}] for rows, steps in chosen}
    for placement in BACKENDS[config][1]:
        runs[f"deep_teacher-{placement}"] = ["deep_teacher", 4, 1, {"teacher_placement": placement}]
    return runs


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("material")
    make_material(directory)
    return directory


@pytest.fixture(scope="module")
def reference(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """One process, the whole batch at once."""
    directory = tmp_path_factory.mktemp("reference")
    return directory, run_cases("cpu", reference_runs(), material, directory)


def compare(
    reference: tuple[Path, dict[str, dict[str, Any]]],
    output: Path,
    runs: dict[str, list[Any]],
    results: dict[str, dict[str, Any]],
    kind: str,
    processes: int,
) -> None:
    directory, expected = reference
    assert results.keys() == runs.keys()
    # A launch that quietly trained in another way would agree with the reference as well.
    assert {(result["kind"], result["processes"]) for result in results.values()} == {(kind, processes)}
    differences = {}
    for label, (name, *_) in runs.items():
        for key in expected[name].keys() - {"kind", "processes", "norm", "seconds", "teacher"}:
            differences[label, key] = difference(expected[name][key], results[label][key])
        for what in ("gradient", "weights") if CASES[name].weights else ("gradient",):
            files = (directory / f"{name}.{what}.safetensors", output / f"{label}.{what}.safetensors")
            differences[label, what] = relative_difference(*(load_file(file) for file in files))
    worst = max(differences, key=lambda key: differences[key])
    print(f"{kind}, {processes} processes: largest relative difference {differences[worst]:.1e} ({worst})")
    assert not {key: value for key, value in differences.items() if not value < TOLERANCE}


def test_golden_values(reference: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    golden, found = json.loads(PATH.read_text()), values_of(reference[1])
    assert golden.keys() == found.keys()
    differences = {name: difference(golden[name], found[name]) for name in golden}
    assert not {name: value for name, value in differences.items() if not value < TOLERANCE}


def test_cases_are_not_trivial(reference: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    norms = {name: result["norm"] for name, result in reference[1].items()}
    assert min(norms.values()) > 1e-2
    # Objectives that were mixed up would have equal ones; these two differ in how the same step is computed.
    alike = {"passes", "gradient_checkpointing"}
    assert all(norms[name] == pytest.approx(norms["reverse_kl"], rel=TOLERANCE) for name in alike)
    assert len({f"{norm:.4f}" for name, norm in norms.items() if name not in alike}) == len(norms) - len(alike)


def test_accumulation_in_one_process(
    reference: tuple[Path, dict[str, dict[str, Any]]], material: Path, tmp_path: Path
) -> None:
    runs = {
        f"{name}-{rows}x{8 // rows}": [name, rows, 8 // rows, {}]
        for index, (name, case) in enumerate(CASES.items())
        if not case.watch
        for rows in ((4, 2, 1)[index % 3],)
    }
    compare(reference, tmp_path, runs, run_cases("single", runs, material, tmp_path), "single", 1)


@pytest.mark.parametrize("config", BACKENDS)
def test_two_processes(
    config: str, reference: tuple[Path, dict[str, dict[str, Any]]], material: Path, tmp_path: Path
) -> None:
    kind, placements = BACKENDS[config]
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    runs = runs_of(config)
    results = run_cases(config, runs, material, tmp_path)
    compare(reference, tmp_path, runs, results, kind, 2)
    for placement in placements:
        teacher = results[f"deep_teacher-{placement}"]["teacher"]
        whole, half = teacher["total"], teacher["total"] / 2
        assert teacher["calls"] == 2 * 6  # steps x layers
        if placement == "shard" or kind == "zero3":
            ahead = 2 if kind == "zero3" else 1  # layers: DeepSpeed gathers one ahead
            assert half <= teacher["resident"] <= 1.01 * half
            assert half < teacher["peak"] <= 1.01 * half + ahead * teacher["layer"] + 2 * teacher["head"]
            assert teacher["after"] <= 1.01 * half
        else:
            assert teacher["resident"] == teacher["peak"] == whole


@pytest.mark.parametrize("config", ["ddp", "zero3_offload"])
def test_other_configs(
    config: str, reference: tuple[Path, dict[str, dict[str, Any]]], material: Path, tmp_path: Path
) -> None:
    if config == "zero3_offload":
        pytest.importorskip("deepspeed")
    runs = {"hidden": ["hidden", 2, 2, {}], "on_policy": ["on_policy", 4, 1, {}]}
    kind = {"ddp": "ddp", "zero3_offload": "zero3"}[config]
    compare(reference, tmp_path, runs, run_cases(config, runs, material, tmp_path), kind, 2)


def test_every_config_is_run() -> None:
    run = {"cpu", "single", "ddp", "zero3_offload", *BACKENDS}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == run
