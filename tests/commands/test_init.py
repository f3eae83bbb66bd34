"""`cbd init`: ordinary checkpoints of any size, written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf import CBDModel, DistillationChain, plan_config
from cbd_hf.cli import main as cbd
from cbd_hf.commands.init import InitArguments, main, parse_alpha
from cbd_hf.shards import ShardWriter
from cbd_hf.sizing import parse_size, size_name
from tests.chain.helpers import assert_same_weights


ROOT = Path(__file__).parents[2]


def sizes(chain: Path) -> tuple[float, float]:
    """Two sizes within the chain, to two digits."""
    large, small = DistillationChain.from_pretrained(chain).sizes
    return tuple(float(f"{small + share * (large - small):.2g}") for share in (0.4, 0.7))  # type: ignore[return-value]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cbd(["init", *arguments]) == 2
    return capsys.readouterr().err


def test_one_size(tiny_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size, _ = sizes(tiny_chain)
    main([str(tiny_chain), "--n-params", str(size), "--output-dir", str(tmp_path / "target")])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    expected = CBDModel.from_chain(tiny_chain, size)
    assert type(saved) is type(expected)
    assert_same_weights(saved, expected)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "target")) == 64
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.split() == "n_params layers hidden_size heads alpha start seconds bytes directory".split()
    assert row.split()[0] == f"{saved.num_parameters():,}"
    assert row.split()[4] == f"{expected.config.cbd['alpha']:.3f}"
    written = sum(path.stat().st_size for path in (tmp_path / "target").iterdir())
    assert row.split()[7] == f"{written:,}"


def test_several_sizes(tiny_chain: Path, tmp_path: Path) -> None:
    both = sizes(tiny_chain)
    arguments = ["--chain", str(tiny_chain), "--n_params", ",".join(map(str, both)), "--output_dir", str(tmp_path)]
    main([*arguments, "--initializer", "cut", "--dtype", "bfloat16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(size_name, both))
    for size in both:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / size_name(size))
        assert model.dtype == torch.bfloat16 and model.config.cbd["initializer"] == "cut"
    with pytest.raises(FileExistsError):
        main(arguments)


def test_an_anchor_itself(tiny_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, small = DistillationChain.from_pretrained(tiny_chain)
    main([str(tiny_chain), "--n_params", str(small.n_params), "--output_dir", str(tmp_path / "small")])
    assert "anchor small" in capsys.readouterr().out
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), small.load_model())


def test_options_reach_the_model(tiny_chain: Path, tmp_path: Path) -> None:
    size, _ = sizes(tiny_chain)
    arguments = ["--n_params", str(size), "--alpha", "0.25", "--expansion", "replicate", "--seed", "3"]
    main([str(tiny_chain), *arguments, "--output_dir", str(tmp_path / "target")])
    expected = CBDModel.from_chain(tiny_chain, size, alpha=0.25, expansion="replicate", seed=3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert_same_weights(saved, expected)
    assert saved.config.cbd == expected.config.cbd


@pytest.mark.parametrize("as_file", [False, True])
def test_target_config(as_file: bool, tiny_chain: Path, tmp_path: Path) -> None:
    large, small = DistillationChain.from_pretrained(tiny_chain)
    plan_config(small.config, large.config, sizes(tiny_chain)[0]).save_pretrained(tmp_path / "wanted")
    wanted = tmp_path / "wanted" / "config.json" if as_file else tmp_path / "wanted"
    main([str(tiny_chain), "--config", str(wanted), "--output_dir", str(tmp_path / "target")])
    made = json.loads((tmp_path / "target" / "config.json").read_text())
    shape = json.loads((tmp_path / "wanted" / "config.json").read_text())
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"):
        assert made[name] == shape[name]


def test_existing_directory_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    # The chain does not even exist: nothing of it was looked at.
    error = error_of(["absent/chain", "--n_params", "138e6", "--output_dir", str(target)], capsys)
    assert str(target) in error and "not empty" in error
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    (tmp_path / "both" / "2M").mkdir(parents=True)
    (tmp_path / "both" / "2M" / "mine.txt").write_text("mine")
    error = error_of(["absent/chain", "--n_params", "1e6,2e6", "--output_dir", str(tmp_path / "both")], capsys)
    assert "2M" in error and not (tmp_path / "both" / "1M").exists()


def test_bad_input_writes_nothing(tiny_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = DistillationChain.from_pretrained(tiny_chain)
    inside = str(sizes(tiny_chain)[0])
    output = ["--output_dir", str(tmp_path / "target")]
    error = error_of([str(tiny_chain), "--n_params", f"{inside},9e9", *output], capsys)
    assert "outside the chain's range" in error and f"{chain.sizes[0]:,}" in error and f"{chain.sizes[1]:,}" in error
    for wrong, message in {
        "--n_params=many": "n_params='many' is not a number",
        f"--n_params={inside},{inside}": "twice",
        "--n_params=nan": "n_params",
    }.items():
        assert message in error_of([str(tiny_chain), wrong, *output], capsys)
    good = [str(tiny_chain), "--n_params", inside, *output]
    assert "alpha=1.5 is outside [0, 1]" in error_of([*good, "--alpha", "1.5"], capsys)
    assert "not both" in error_of([*good, "--target_config", "x"], capsys)
    assert "does not exist" in error_of([str(tiny_chain), "--config", str(tmp_path / "x"), *output], capsys)
    assert "not both" in error_of([str(tiny_chain), *output], capsys)
    assert "absent" in error_of([str(tmp_path / "absent"), *good[1:]], capsys)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing(tiny_chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter) -> None:
        (self.directory / "half.safetensors").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_flush", full)
    with pytest.raises(OSError, match="No space"):
        main([str(tiny_chain), "--n_params", str(sizes(tiny_chain)[0]), "--output_dir", str(tmp_path / "target")])
    assert list(tmp_path.iterdir()) == []


def test_recipe(tiny_chain: Path, tmp_path: Path) -> None:
    """The recipe with a YAML file, an option over it, and a second process that must not write as well."""
    first, second = sizes(tiny_chain)
    config = tmp_path / "init.yaml"
    config.write_text(yaml.safe_dump({"chain": str(tiny_chain), "n_params": first, "output_dir": str(tmp_path / "a")}))
    command = [sys.executable, str(ROOT / "recipes" / "init_from_chain.py"), "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for rank, option in (("1", []), ("0", ["--n-params", str(second)])):
        subprocess.run([*command, *option], env=environment | {"RANK": rank}, check=True, timeout=120, cwd=tmp_path)
        assert (tmp_path / "a").exists() == (rank == "0")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert made.num_parameters() == CBDModel.from_chain(tiny_chain, second).num_parameters()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("138e6", "138_000_000", " 138M", "1.7B", "250k")] == [
        138e6,
        138e6,
        138e6,
        1.7e9,
        250e3,
    ]
    assert [size_name(size) for size in (138e6, 1.7e9, 292_800, 138_615_552)] == ["138M", "1.7B", "292.8k", "138.616M"]
    # As a YAML file gives them: a number, a text, a list.
    for given in (138e6, "138e6", [138e6]):
        assert InitArguments(chain="c", output_dir="o", n_params=given).sizes == [138e6]  # type: ignore[arg-type]


def test_alphas() -> None:
    assert [parse_alpha(text) for text in (None, "auto", "0.3", 0.3, "attention=0.5, ffn=0.25")] == [
        None,
        "auto",
        0.3,
        0.3,
        {"attention": 0.5, "ffn": 0.25},
    ]
    with pytest.raises(ValueError, match="alpha='half' is not understood"):
        parse_alpha("half")
    with pytest.raises(ValueError, match=r"unknown group\(s\) \['mlp'\]"):
        InitArguments(chain="c", output_dir="o", n_params="1e6", alpha="mlp=0.5")


def test_groups_and_calibration(tiny_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = str(sizes(tiny_chain)[0])
    common = [str(tiny_chain), "--n_params", size, "--output_dir"]
    main([*common, str(tmp_path / "groups"), "--alpha", "attention=0.5,ffn=1"])
    expected = CBDModel.from_chain(tiny_chain, float(size), alpha={"attention": 0.5, "ffn": 1.0})
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "groups")
    assert_same_weights(made, expected)
    assert made.config.cbd["alpha"]["attention"] == 0.5

    with pytest.raises(ValueError, match="alpha='auto' runs text through a model: give calibration"):
        main([*common, str(tmp_path / "none"), "--alpha", "auto"])
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 40)
    main([*common, str(tmp_path / "auto"), "--alpha", "auto", "--calibration", str(text)])
    record = json.loads((tmp_path / "auto" / "config.json").read_text())["cbd"]
    trials = record["alpha_search"]["trials"]
    assert len(trials) >= 6
    assert record["alpha"] == min(trials, key=lambda trial: trial[1])[0]
