"""A name that a user gives, a local directory or a Hub repository, as a local directory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from cbd_hf.checkpoint import CheckpointError


TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)
SMALL_FILE_PATTERNS = ("config.json", "generation_config.json", *TOKENIZER_PATTERNS, "LICENSE*", "NOTICE*")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_directory(
    path_or_repo: str | os.PathLike[str],
    *,
    what: str,
    allow_patterns: Sequence[str],
    ignore_patterns: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """
    A local directory as it is; a Hub repository downloaded, without pickled files and code, to the cache.

    Args:
        path_or_repo (`str` or `os.PathLike`): the directory, or `owner/name` on the Hub.
        what (`str`): what it should be, for the error message.
        allow_patterns (`Sequence[str]`): files to download.
        ignore_patterns (`Sequence[str]`, *optional*, defaults to `()`): files to leave out, beside pickled ones.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): Hub token.
        cache_dir (`str` or `os.PathLike`, *optional*): Hub cache.

    Raises:
        FileNotFoundError: there is no such directory, and no such repository could be downloaded.
    """
    name = os.fspath(path_or_repo)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise FileNotFoundError(f"{what} {name} is a file; give the directory that holds it, or a Hub id.")
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{what} {name!r} is not an existing local directory, nor a Hub id of the form owner/name. Check the path."
        )

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionResolutionError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                allow_patterns=list(allow_patterns),
                ignore_patterns=[*PICKLE_PATTERNS, *ignore_patterns],
            )
        )
    except (HfHubHTTPError, HFValidationError, RevisionResolutionError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{what} {name!r} is not an existing local directory, and could not be downloaded from the Hub{at} "
            f"({type(error).__name__}: {error}). Check the spelling, the revision and, for a private or gated "
            "repository, the token."
        ) from error


def anchor_directory(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """
    The local directory of one checkpoint; see [`local_directory`] for the arguments.

    Raises:
        FileNotFoundError: see [`local_directory`].
        CheckpointError: the Hub repository has no safetensors weights.
    """
    directory = local_directory(
        path_or_repo,
        what="Checkpoint",
        allow_patterns=(*SMALL_FILE_PATTERNS, *WEIGHT_PATTERNS),
        # Only the top of the repository: other formats of the same weights often lie in folders beside it, and
        # Mistral-style repositories hold a second copy in "consolidated" files.
        ignore_patterns=("*/*", "consolidated*"),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
    )
    if not os.path.isdir(os.fspath(path_or_repo)) and not any(directory.glob("*.safetensors")):
        _refuse_repository_without_safetensors(os.fspath(path_or_repo), revision=revision, token=token)
    return directory


def _refuse_repository_without_safetensors(repo_id: str, *, revision: str | None, token: str | bool | None) -> None:
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except Exception:  # The listing only makes the message more exact.
        names = []
    pickled = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLE_PATTERNS))
    if pickled:
        raise CheckpointError(
            f"The Hub repository {repo_id!r} holds only pickled weights ({', '.join(pickled)}), which can run code "
            "when they are loaded. Convert them once in a place you trust, "
            "AutoModelForCausalLM.from_pretrained(repo).save_pretrained(new), and give the new directory."
        )
    raise CheckpointError(
        f"The Hub repository {repo_id!r} holds no safetensors weights at its top level; pickled weights, which can "
        "run code when they are loaded, are not read. Give a repository, a revision or a local directory with "
        "model.safetensors."
    )


__all__ = [
    "PICKLE_PATTERNS",
    "SMALL_FILE_PATTERNS",
    "TOKENIZER_PATTERNS",
    "WEIGHT_PATTERNS",
    "anchor_directory",
    "local_directory",
]
