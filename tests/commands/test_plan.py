"""`cbd plan`: a chain without its weights, or configs alone, as a table, JSON and a figure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd_hf.chain import DistillationChain
from cbd_hf.checkpoint import CheckpointError
from cbd_hf.cli import main as cbd
from cbd_hf.commands.plan import PlanArguments, main, run
from cbd_hf.planning import PlannedModel
from tests.models import tiny_config


OPTIONS = ["--sequence_length", "32"]


@pytest.fixture
def bare(tiny_chain: Path, tmp_path: Path) -> Path:
    """The chain with nothing but chain.json and the configs."""
    for path in ("chain.json", *(f"anchors/{name}/config.json" for name in ("0-large", "1-small"))):
        (tmp_path / "bare" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_chain / path, tmp_path / "bare" / path)
    return tmp_path / "bare"


@pytest.fixture
def configs(tmp_path: Path) -> list[Path]:
    for name, heads in (("one", 2), ("two", 4)):
        tiny_config("qwen3", layers=heads, heads=heads, dtype="bfloat16").save_pretrained(tmp_path / name)
    return [tmp_path / "one", tmp_path / "two" / "config.json"]


def plan_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main([*arguments, "--json", "-"])
    return json.loads(capsys.readouterr().out)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cbd(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cbd: error: ") and error.count("\n") == 1, error
    return error


def test_table_of_a_chain_without_weights(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError):
        DistillationChain.from_pretrained(bare)  # for others the check stays
    large, small = DistillationChain.from_pretrained(bare, verify=None).sizes
    middle = (large + small) // 2
    main([str(bare), "--n-params", f"{small},{middle}", *OPTIONS])
    title, header, _, *rows, flops, memory = capsys.readouterr().out.splitlines()
    assert title.startswith("llama: small (") and " < large (" in title and title.endswith("2 sizes")
    assert header.split()[:9] == "n_params wanted off layers hidden heads kv_heads head_dim ffn".split()
    assert header.split()[-2:] == ["alpha", "between"]
    assert rows[0].split()[:3] == [f"{small:,}", f"{small:,}", "+0.00%"] and rows[0].endswith("-      anchor small")
    assert rows[1].split()[1] == f"{middle:,}" and rows[1].endswith("small .. large")
    assert "32 tokens" in flops and "float32 weights" in flops
    assert "16 bytes per parameter" in memory and "Activations are not included." in memory


def test_json_is_the_plan(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, small = DistillationChain.from_pretrained(bare, verify=None)
    options = {"n_params": f"{(large.n_params + small.n_params) / 2}", "sequence_length": 32, "batch_size": 3}
    models = run(PlanArguments(chain=str(bare), json=str(tmp_path / "new" / "plan.json"), **options))  # type: ignore[arg-type]
    assert "alpha" in capsys.readouterr().out
    plan = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert [PlannedModel(**row) for row in plan["models"]] == models
    assert plan["workload"] == {"dtype": "float32", "sequence_length": 32, "batch_size": 3}
    assert plan["anchors"] == [
        {"name": "small", "n_params": small.n_params, "layers": 2, "hidden": 16},
        {"name": "large", "n_params": large.n_params, "layers": 4, "hidden": 32},
    ]
    (row,) = plan["models"]
    # Heads have 8 channels: keys and values of 3 x 32 tokens, 4 bytes each.
    assert row["cache_bytes"] == 2 * row["layers"] * row["kv_heads"] * 8 * 4 * 3 * 32
    assert row["serving_bytes"] == 4 * row["n_params"] + row["cache_bytes"]


def test_every_size(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan_of([str(bare), *OPTIONS], capsys)["models"]
    large, small = DistillationChain.from_pretrained(bare, verify=None).sizes
    assert [rows[0]["n_params"], rows[-1]["n_params"]] == [small, large]
    assert all(row["wanted"] is None for row in rows) and len(rows) > 4
    assert plan_of([str(bare), *OPTIONS, "--every", "3"], capsys)["models"] == [
        row for index, row in enumerate(rows) if index % 3 == 0 or row["small"] == row["large"]
    ]
    assert len(plan_of([str(bare), *OPTIONS, "--limit", "3"], capsys)["models"]) == 3


def test_configs(configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Directories and files, in any order, by either option; their type is the default."""
    given = ",".join(map(str, reversed(configs)))
    plan = plan_of(["--configs", given, *OPTIONS], capsys)
    assert [anchor["name"] for anchor in plan["anchors"]] == ["one", "two"]
    assert plan["workload"]["dtype"] == "bfloat16"
    first = plan["models"][0]
    assert first["weight_bytes"] == 2 * first["n_params"] and first["training_bytes"] == 18 * first["n_params"]
    assert plan_of(["--config", given, *OPTIONS], capsys) == plan
    other = plan_of(["--configs", given, "--dtype", "float32", *OPTIONS], capsys)["models"][0]
    assert other["weight_bytes"] == 4 * first["n_params"]
    # A YAML file, with lists.
    wanted = [first["n_params"], plan["models"][-1]["n_params"]]
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(yaml.safe_dump({"configs": list(map(str, configs)), "n_params": wanted, "sequence_length": 32}))
    models = plan_of(["--config", str(recipe)], capsys)["models"]
    assert [(row["wanted"], row["small"]) for row in models] == [(wanted[0], "one"), (wanted[1], "two")]
    # The type is float32 where the configs do not agree.
    tiny_config("qwen3", layers=2, heads=2, dtype="float16").save_pretrained(configs[0])
    assert plan_of(["--configs", given, *OPTIONS], capsys)["workload"]["dtype"] == "float32"


def test_names_of_configs(configs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(configs[1], tmp_path / "one" / "wide.json")
    shutil.copytree(configs[0], tmp_path / "other" / "one")
    tiny_config("qwen3", layers=3, heads=2).save_pretrained(tmp_path / "other" / "one")
    monkeypatch.chdir(tmp_path / "one")
    models = run(PlanArguments(configs=".,wide.json,../other/one", sequence_length=32, limit=3))
    assert [row.small for row in models] == ["one", "../other/one", "wide"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(suffix: str, bare: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "new" / f"plan.{suffix}"
    main([str(bare), *OPTIONS, "--figure", str(figure)])
    head = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert figure.read_bytes().startswith(head)


def test_figure_without_matplotlib(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = error_of([str(bare), "--figure", str(tmp_path / "plan.png")], capsys)
    assert "needs matplotlib" in error and "cbd_hf[report]" in error


def test_hub_chain_without_its_weights(
    bare: Path, tiny_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only chain.json and the configs are asked for."""
    from huggingface_hub.utils import filter_repo_objects

    fetched = []

    def download(repo_id: str, **kwargs: Any) -> str:
        files = [path.relative_to(tiny_chain).as_posix() for path in tiny_chain.rglob("*") if path.is_file()]
        fetched.extend(
            filter_repo_objects(
                files, allow_patterns=kwargs["allow_patterns"], ignore_patterns=kwargs["ignore_patterns"]
            )
        )
        assert (repo_id, kwargs["revision"]) == ("me/chain", "v1")
        return str(bare)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(["me/chain", "--revision", "v1", *OPTIONS], capsys)
    assert sorted(fetched) == ["anchors/0-large/config.json", "anchors/1-small/config.json", "chain.json"]
    monkeypatch.undo()
    assert plan == plan_of([str(bare), *OPTIONS], capsys)


def test_chain_that_is_not_whole(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = bare / "anchors" / "1-small" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"num_hidden_layers": 1}))
    error = error_of([str(bare)], capsys)
    large, small = DistillationChain.from_pretrained(bare, verify=None).sizes
    assert str(config) in error and f"records {small:,} for small" in error
    config.unlink()
    assert f"{config} is missing" in error_of([str(bare)], capsys)
    (bare / "chain.json").unlink()
    assert "has no chain.json" in error_of([str(bare)], capsys)


def test_bad_input(bare: Path, configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = str(bare)
    large, small = DistillationChain.from_pretrained(bare, verify=None).sizes
    error = error_of([chain, "--n_params", f"{small},9e9"], capsys)
    assert "9,000,000,000" in error and f"{small:,}" in error and f"{large:,}" in error
    for arguments, message in (
        ([], "Give either a chain"),
        ([chain, "--configs", str(configs[0])], "not both"),
        ([chain, "--n_params", "many"], "n_params='many' is not a number"),
        ([chain, "--n_params", ","], "n_params=',' names no size"),
        ([chain, "--n_params", "1e6", "--limit", "5"], "leave them out with n_params"),
        ([chain, "--limit", "1"], "limit=1 must be at least 2"),
        ([chain, "--every", "0"], "every=0 must be at least 1"),
        ([chain, "--sequence_length", "0"], "sequence_length=0 must be"),
        ([chain, "--batch_size", "-2"], "batch_size=-2 must be"),
        ([chain, "--figure", "plan.txt"], "figure='plan.txt' must end in .png, .pdf or .svg"),
        ([str(tmp_path / "absent")], "absent"),
        (["--configs", str(tmp_path / "absent")], "absent is neither a config file nor a directory"),
        (["--configs", str(tmp_path)], "is neither a config file"),
        (["--configs", ","], "at least one anchor"),
        (["--configs", f"{configs[0]},{configs[0]}"], "both have"),
        (["--configs", f"{configs[0]},{bare / 'anchors' / '0-large'}"], "one architecture"),
    ):
        assert message in error_of(arguments, capsys), arguments
    with pytest.raises(SystemExit):
        cbd(["plan", chain, "--dtype", "int8"])
    assert "float16" in capsys.readouterr().err


def test_output_that_exists_is_kept(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, name in (("json", "mine.json"), ("figure", "mine.png")):
        (tmp_path / name).write_text("mine")
        error = error_of(["absent/chain", f"--{option}", str(tmp_path / name)], capsys)
        assert f"{name} exists" in error and option in error
        assert (tmp_path / name).read_text() == "mine"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: cbd plan CHAIN" in printed and "docs/planning.md" in printed
    for option in (
        "configs",
        "n_params",
        "dtype",
        "sequence_length",
        "batch_size",
        "every",
        "limit",
        "json",
        "figure",
    ):
        assert f"--{option}" in printed


def test_training_memory(configs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ",".join(map(str, configs))
    options = ["--configs", given, "--train", "--max_length", "32", "--world_size", "1,8", "--zero_stage", "0,3"]
    main(options)
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["stage", "ZeRO", "devices"] and "total" in header
    assert [row.split()[:5] for row in rows[:4]] == [
        ["two", "->", "one", stage, size] for size in ("1", "8") for stage in ("0", "3")
    ]
    plan = plan_of(options, capsys)
    assert plan["workload"]["dtype"] == "bfloat16" and plan["workload"]["max_length"] == 32
    for path in tmp_path.glob("*/config.json"):  # builds on a GPU compute in bfloat16, however weights are stored
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    found = [plan_of([*options, *more], capsys) for more in ([], ["--device", "cpu"], ["--dtype", "float16"])]
    assert [plan["workload"]["dtype"] for plan in found] == ["bfloat16", "float32", "float16"]
    assert [stage["total"] for stage in plan["stages"]] == [sum(stage["parts"].values()) for stage in plan["stages"]]
    # The source is the first teacher.
    tiny_config("qwen3", layers=6, heads=6).save_pretrained(tmp_path / "large")
    stages = plan_of([*options, "--source", str(tmp_path / "large")], capsys)["stages"]
    assert [(stage["teacher"], stage["student"]) for stage in stages[::4]] == [("source", "two"), ("two", "one")]
    assert "leave out n_params" in error_of([*options, "--n_params", "1e6"], capsys)
    assert "needs train" in error_of(["--configs", given, "--source", given], capsys)
    assert "is not larger than two" in error_of([*options, "--source", str(configs[0])], capsys)
    assert "no/where is neither" in error_of([*options, "--source", "no/where"], capsys)
    assert "zero_stage='4' is unknown" in error_of([*options, "--zero_stage", "4"], capsys)
    assert "world_size='x' must be" in error_of([*options, "--world_size", "x"], capsys)
