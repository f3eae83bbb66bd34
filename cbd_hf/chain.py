"""A distillation chain: a few anchors of one family, largest first, in one verified directory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from cbd_hf._anchor import Anchor
from cbd_hf._candidates import (
    Candidate,
    config_digest,
    inspect_directory,
    inspect_model,
    json_value,
    safe_name,
    unique_names,
    write_candidate,
)
from cbd_hf._family import check_appended, check_cut, common_family
from cbd_hf._files import (
    atomic_write_text,
    check_output_directory,
    commit_directory,
    is_staging,
    staging_directory,
)
from cbd_hf._hub import anchor_directory, local_directory
from cbd_hf._manifest import ANCHORS, MANIFEST, new_manifest, read_manifest, write_manifest
from cbd_hf.checkpoint import CheckpointError


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


CARD = "README.md"
_ANCHOR_DIRECTORY = re.compile(r"\d+-.+")


class AdjacentPair(NamedTuple):
    """The two neighbouring anchors around a size; twice the same anchor for exactly its size."""

    small: Anchor
    large: Anchor


class DistillationChain:
    """
    Ordered anchors of one family with their provenance, saved as one directory.

    Make one with [`DistillationChain.from_anchors`] or the chain builder; load one with
    [`DistillationChain.from_pretrained`]. Indexing takes a position (0 is the largest) or a name.

    Args:
        path (`Path`): the chain's directory.
        anchors (`Sequence[Anchor]`): largest first.
        family (`dict`): `model_type`, `vocab_size`, `tie_word_embeddings` and `tokenizer_digest` of all anchors.
        basis (`str`, *optional*, defaults to `"as-is"`): how the anchors' hidden spaces relate to each other.
        metadata (`dict`, *optional*): free provenance; `license`, `language`, `datasets` and `base_model` also go to
            the model card.
        created_with (`dict`, *optional*): package versions.
    """

    def __init__(
        self,
        path: str | Path,
        anchors: Sequence[Anchor],
        *,
        family: Mapping[str, Any],
        basis: str = "as-is",
        metadata: Mapping[str, Any] | None = None,
        created_with: Mapping[str, str] | None = None,
    ) -> None:
        if not anchors:
            raise ValueError("A chain needs at least one anchor, got none.")
        self.path = Path(path)
        self.anchors: tuple[Anchor, ...] = tuple(sorted(anchors, key=lambda anchor: -anchor.n_params))
        self.family: dict[str, Any] = dict(family)
        self.basis = basis
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.created_with: dict[str, str] = dict(created_with or {})

    @classmethod
    def from_anchors(
        cls,
        anchors: Sequence[str | os.PathLike[str] | PreTrainedModel],
        save_directory: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        names: Sequence[str] | None = None,
        stages: Sequence[dict[str, Any] | None] | None = None,
        cuts: Sequence[dict[str, Any] | None] | None = None,
        basis: str = "as-is",
        metadata: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> DistillationChain:
        """
        Make a chain of models that already exist.

        Everything is checked before anything is written. Checkpoints are copied file by file, without loading their
        weights, and the chain appears in `save_directory` in one step.

        Args:
            anchors (`Sequence`): local checkpoint directories, Hub ids or models, in any order.
            save_directory (`str` or `os.PathLike`): where to; it must not exist, or be empty.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): saved with every anchor that has none of its own.
            names (`Sequence[str]`, *optional*): one name per anchor. Defaults to the directory's or repository's
                name, and to the size for models. Made unique and safe for file systems.
            stages (`Sequence[dict]`, *optional*): one distillation record, or `None`, per anchor.
            cuts (`Sequence[dict]`, *optional*): one record of how it was cut out of a larger anchor, or `None`, per
                anchor: `from` (that anchor's name), `layers` (its layers that were kept) and, if known, `removed` (the
                others in the order of their removal).
            basis (`str`, *optional*, defaults to `"as-is"`): how the anchors' hidden spaces relate to each other.
            metadata (`dict`, *optional*): free provenance.
            revision (`str`, *optional*): branch, tag or commit of the anchors that are Hub ids.
            token (`str` or `bool`, *optional*): Hub token.
            cache_dir (`str` or `os.PathLike`, *optional*): Hub cache.

        Raises:
            FileExistsError: `save_directory` exists and is not empty.
            FileNotFoundError: an anchor is neither a directory nor a repository that can be downloaded.
            ValueError: fewer than two anchors, or anchors that cannot be in one chain; names the anchor.
            CheckpointError: weights that are missing, damaged, pickled or do not fit their config.
        """
        final = check_output_directory(save_directory)
        if isinstance(anchors, str | os.PathLike) or len(anchors) < 2:
            count = 1 if isinstance(anchors, str | os.PathLike) else len(anchors)
            raise ValueError(f"A chain needs at least two anchors of different size, got {count}. Add one to anchors.")
        for option, values in (("names", names), ("stages", stages), ("cuts", cuts)):
            if values is not None and (isinstance(values, str) or len(values) != len(anchors)):
                raise ValueError(
                    f"{option} must be a list with one entry for each of the {len(anchors)} anchors, got {values!r}."
                )
        _check_basis(basis)
        extra = json_value(dict(metadata or {}), "metadata")
        candidates = []
        for index, anchor in enumerate(anchors):
            candidate = _candidate(anchor, index, revision=revision, token=token, cache_dir=cache_dir)
            if names is not None:
                candidate.name = names[index]
            candidate.stage = _record(stages, index, "stages")
            candidate.cut = _record(cuts, index, "cuts")
            candidates.append(candidate)
        candidates.sort(key=lambda candidate: -candidate.n_params)
        family = common_family(candidates, tokenizer)
        larger: dict[str, str] = {}
        unique = unique_names([safe_name(candidate.name) for candidate in candidates])
        for candidate, name in zip(candidates, unique, strict=True):
            check_cut(candidate, larger)
            larger |= {candidate.name: name, name: name}
            candidate.name = name

        with staging_directory(final) as staging:
            entries = []
            for index, candidate in enumerate(candidates):
                directory = f"{ANCHORS}/{index}-{candidate.name}"
                entries.append(
                    _entry(candidate, directory, write_candidate(candidate, staging / directory, tokenizer))
                )
            manifest = new_manifest(family, _check_basis(basis), entries, extra)
            _write_texts(staging, manifest)
            commit_directory(staging, final)
        return cls._from_manifest(final, manifest)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        verify: Literal["size", "full"] | None = "size",
    ) -> DistillationChain:
        """
        Load a chain from a local directory or the Hub. No weights are read into memory.

        Args:
            path_or_repo (`str` or `os.PathLike`): the chain's directory, or `owner/name` on the Hub.
            revision (`str`, *optional*): branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): Hub token.
            cache_dir (`str` or `os.PathLike`, *optional*): Hub cache.
            verify (`str`, *optional*, defaults to `"size"`): `"size"` checks that every file is there with its
                recorded size, `"full"` also its sha256, `None` checks nothing.

        Raises:
            FileNotFoundError: no such directory or repository, or it is not a chain.
            ValueError: chain.json is invalid or too new.
            CheckpointError: a file is missing or changed; names it.
        """
        if verify not in ("size", "full", None):
            raise ValueError(f"verify must be 'size', 'full' or None, got {verify!r}.")
        path = local_directory(
            path_or_repo,
            what="Chain",
            allow_patterns=(MANIFEST, CARD, f"{ANCHORS}/*"),
            # Code is never run; there is no reason to fetch it.
            ignore_patterns=("*.py",),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
        )
        chain = cls._from_manifest(path, read_manifest(path))
        if verify is not None:
            chain.verify(full=verify == "full")
        return chain

    @classmethod
    def _from_manifest(cls, path: Path, manifest: Mapping[str, Any]) -> DistillationChain:
        anchors = [
            Anchor(
                name=entry["name"],
                path=path / entry["directory"],
                n_params=entry["n_params"],
                files=entry["files"],
                config_digest=entry["config_digest"],
                stage=entry["stage"],
                cut=entry["cut"],
            )
            for entry in manifest["anchors"]
        ]
        return cls(
            path,
            anchors,
            family=manifest["family"],
            basis=manifest["basis"],
            metadata=manifest["metadata"],
            created_with=manifest["created_with"],
        )

    @property
    def sizes(self) -> list[int]:
        """Exact parameter counts, largest first."""
        return [anchor.n_params for anchor in self.anchors]

    def __len__(self) -> int:
        return len(self.anchors)

    def __iter__(self) -> Iterator[Anchor]:
        return iter(self.anchors)

    @overload
    def __getitem__(self, key: int | str) -> Anchor: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[Anchor, ...]: ...

    def __getitem__(self, key: int | str | slice) -> Anchor | tuple[Anchor, ...]:
        if not isinstance(key, str):
            return self.anchors[key]
        for anchor in self.anchors:
            if anchor.name == key:
                return anchor
        raise KeyError(f"no anchor {key!r}; the chain has {', '.join(anchor.name for anchor in self.anchors)}")

    def __repr__(self) -> str:
        from cbd_hf.sizing import format_size

        anchors = " > ".join(f"{anchor.name} ({format_size(anchor.n_params)})" for anchor in self.anchors)
        return f"{type(self).__name__}({self.family.get('model_type')}: {anchors}, path={str(self.path)!r})"

    def adjacent(self, n_params: float) -> AdjacentPair:
        """
        The two neighbouring anchors around a size.

        Args:
            n_params (`float`): number of parameters, such as `138e6`.

        Returns:
            `AdjacentPair`: `small.n_params < n_params < large.n_params`; twice the same anchor for exactly its size.

        Raises:
            ValueError: not a positive finite number, or outside the chain's range; names the range.
        """
        from cbd_hf.sizing import check_n_params

        check_n_params(n_params, self.sizes[-1], self.sizes[0])
        for anchor in self.anchors:
            if anchor.n_params == n_params:
                return AdjacentPair(anchor, anchor)
        large = min((a for a in self.anchors if a.n_params > n_params), key=lambda a: a.n_params)
        small = max((a for a in self.anchors if a.n_params < n_params), key=lambda a: a.n_params)
        return AdjacentPair(small, large)

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the largest anchor that has one; `None` if none has."""
        for anchor in self.anchors:
            if (tokenizer := anchor.load_tokenizer()) is not None:
                return tokenizer
        return None

    def check_files(self, full: bool = False) -> list[str]:
        """
        One line per file that is missing or differs from what the chain recorded; see [`Anchor.check_files`].

        Args:
            full (`bool`, *optional*, defaults to `False`): also compare sha256 and the parameter counts.
        """
        problems = []
        for anchor in self.anchors:
            broken = anchor.check_files(full)
            problems += broken
            if full and not broken:
                from cbd_hf.layout.meta import count_parameters

                if (count := count_parameters(anchor.config)) != anchor.n_params:
                    problems.append(
                        f"{anchor.path / 'config.json'} describes {count:,} parameters instead of {anchor.n_params:,}"
                    )
        return problems

    def verify(self, full: bool = True) -> None:
        """
        Check every file of the chain.

        Args:
            full (`bool`, *optional*, defaults to `True`): compare sha256, which reads every file; otherwise sizes.

        Raises:
            CheckpointError: lists every broken file.
        """
        if problems := self.check_files(full):
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(
                f"The chain {self.path} is damaged:\n{listed}\nCopy or download these files again, or rebuild the "
                "chain."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> DistillationChain:
        """
        Copy the chain to another directory, which appears in one step.

        Args:
            save_directory (`str` or `os.PathLike`): where to; it must not exist, or be empty.

        Returns:
            `DistillationChain`: the copy.

        Raises:
            FileExistsError: `save_directory` exists and is not empty.
            CheckpointError: a file of this chain is missing or has another size than recorded.
        """
        final = check_output_directory(save_directory)
        self.verify(full=False)
        manifest = read_manifest(self.path)
        with staging_directory(final) as staging:
            for entry in manifest["anchors"]:
                for name in entry["files"]:
                    target = staging / entry["directory"] / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.path / entry["directory"] / name, target)
            _write_texts(staging, manifest)
            commit_directory(staging, final)
        return self._from_manifest(final, manifest)

    save = save_pretrained

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload distillation chain",
    ) -> CommitInfo:
        """
        Upload the chain, after all its hashes have been checked.

        Args:
            repo_id (`str`): `owner/name`; created if it does not exist.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str` or `bool`, *optional*): Hub token.
            revision (`str`, *optional*): branch, created if it does not exist. Defaults to the main branch.
            commit_message (`str`, *optional*, defaults to `"Upload distillation chain"`): message of the commit.

        Returns:
            `CommitInfo`: the commit, a `str` with its URL.

        Raises:
            CheckpointError: a file is missing or changed; nothing is uploaded.
        """
        from huggingface_hub import HfApi

        self.verify(full=True)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # Only what chain.json lists: leftovers of an interrupted build stay here.
        files = [
            (anchor.path / name).relative_to(self.path).as_posix() for anchor in self.anchors for name in anchor.files
        ]
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=self.path,
            revision=revision,
            commit_message=commit_message,
            allow_patterns=[MANIFEST, CARD, *files],
        )


def append_anchor(
    chain_directory: str | os.PathLike[str],
    checkpoint_directory: str | os.PathLike[str],
    *,
    name: str,
    stage: dict[str, Any] | None = None,
    cut: dict[str, Any] | None = None,
    basis: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DistillationChain:
    """
    Add one finished anchor to a chain that is being built, the largest first.

    The checkpoint is copied, then chain.json is replaced in one step: a process that is killed at any point leaves
    the chain with or without the new anchor. Directories that such a process left behind are removed by the next call.
    Only one process may call this for a chain at a time.

    Args:
        chain_directory (`str` or `os.PathLike`): the chain; made by the first call.
        checkpoint_directory (`str` or `os.PathLike`): the finished checkpoint, outside the chain's `anchors`.
        name (`str`): the anchor's name, not yet in the chain.
        stage (`dict`, *optional*): provenance of its distillation.
        cut (`dict`, *optional*): how it was cut out of a larger anchor: `from`, `layers` and, if known, `removed`; see
            [`DistillationChain.from_anchors`].
        basis (`str`, *optional*): how the anchors' hidden spaces relate; `"as-is"` if the first call gives none. Later
            calls must give the same, or none.
        metadata (`dict`, *optional*): free provenance, merged into the chain's.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved with the anchor if it has none of its own.

    Returns:
        `DistillationChain`: the chain with the new anchor.

    Raises:
        FileNotFoundError: no such checkpoint directory.
        ValueError: the anchor does not belong to the chain, is not smaller than its last anchor, or its name is taken.
        CheckpointError: weights that are missing, damaged, pickled or do not fit their config.
    """
    root, source = Path(chain_directory).resolve(), Path(checkpoint_directory).resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"The checkpoint directory {checkpoint_directory} of anchor {name!r} does not exist.")
    if source.is_relative_to(root / ANCHORS):
        raise ValueError(
            f"The checkpoint {checkpoint_directory} lies in the chain's own {ANCHORS} directory, which is cleaned of "
            "unfinished anchors. Save it elsewhere, then append it."
        )
    candidate = inspect_directory(source, f"anchor {name!r} ({checkpoint_directory})")
    candidate.name = safe_name(name)
    candidate.stage = json_value(stage, "stage")
    candidate.cut = json_value(cut, "cut")
    extra = json_value(dict(metadata or {}), "metadata")

    manifest = read_manifest(root) if (root / MANIFEST).is_file() else None
    if manifest is None:
        family = common_family([candidate], tokenizer)
        manifest = new_manifest(family, _check_basis("as-is" if basis is None else basis), [], extra)
    else:
        check_appended(candidate, manifest, tokenizer)
        if basis is not None and basis != manifest["basis"]:
            raise ValueError(
                f"anchor {name!r}: basis {basis!r} differs from the chain's, {manifest['basis']!r}. Give the same "
                "one, or build another chain."
            )
        manifest["metadata"] = {**manifest["metadata"], **extra}
    check_cut(candidate, {entry["name"]: entry["name"] for entry in manifest["anchors"]})
    _remove_leftovers(root, manifest)

    directory = f"{ANCHORS}/{len(manifest['anchors'])}-{candidate.name}"
    with staging_directory(root / directory) as staging:
        files = write_candidate(candidate, staging, tokenizer)
        commit_directory(staging, root / directory)
    manifest["anchors"].append(_entry(candidate, directory, files))
    _write_texts(root, manifest)
    return DistillationChain._from_manifest(root, manifest)


def _candidate(
    anchor: str | os.PathLike[str] | PreTrainedModel,
    index: int,
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Candidate:
    from transformers import PreTrainedModel

    from cbd_hf.sizing import format_size

    if isinstance(anchor, PreTrainedModel):
        candidate = inspect_model(anchor, f"anchor {index} (a {type(anchor).__name__})")
        candidate.name = format_size(candidate.n_params)
        return candidate
    if not isinstance(anchor, str | os.PathLike):
        raise ValueError(
            f"anchors[{index}] is a {type(anchor).__name__}; give a checkpoint directory, a Hub id or a model."
        )
    source = anchor_directory(anchor, revision=revision, token=token, cache_dir=cache_dir)
    candidate = inspect_directory(source, f"anchor {os.fspath(anchor)!r}")
    # A path such as "." has a name only once it is resolved; a Hub id's snapshot is named after its commit.
    candidate.name = source.resolve().name if os.path.isdir(anchor) else os.fspath(anchor).rsplit("/", 1)[-1]
    return candidate


def _record(records: Sequence[dict[str, Any] | None] | None, index: int, option: str) -> dict[str, Any] | None:
    record = None if records is None else records[index]
    if record is not None and not isinstance(record, Mapping):
        raise ValueError(f"{option}[{index}] must be a dict or None, got {record!r}.")
    return json_value(record, f"{option}[{index}]")


def _check_basis(basis: str) -> str:
    if not isinstance(basis, str) or not basis:
        raise ValueError(f"basis must be a non-empty text such as 'as-is', got {basis!r}.")
    return basis


def _entry(candidate: Candidate, directory: str, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "directory": directory,
        "n_params": candidate.n_params,
        "config_digest": config_digest(candidate.config),
        "files": files,
        "cut": candidate.cut,
        "stage": candidate.stage,
    }


def _write_texts(directory: Path, manifest: Mapping[str, Any]) -> None:
    from cbd_hf.report.card import chain_card

    # The card first: a build that is killed in between writes both again.
    atomic_write_text(directory / CARD, chain_card(DistillationChain._from_manifest(directory, manifest)))
    write_manifest(directory, manifest)


def _remove_leftovers(root: Path, manifest: Mapping[str, Any]) -> None:
    listed = {Path(entry["directory"]) for entry in manifest["anchors"]}
    leftovers = [
        path
        for path in (root / ANCHORS).glob("*")
        if path.is_dir()
        and path.relative_to(root) not in listed
        and (is_staging(path) or _ANCHOR_DIRECTORY.fullmatch(path.name))
    ]
    # A killed first call leaves "0-..." at most; more of them are finished anchors whose chain.json was lost.
    finished = sorted(path.name for path in leftovers if not is_staging(path) and not path.name.startswith("0-"))
    if not listed and finished:
        raise ValueError(
            f"{root} has no {MANIFEST}, but its {ANCHORS} directory holds {', '.join(finished)}. Restore {MANIFEST}, "
            "or choose an empty chain directory."
        )
    for path in leftovers:
        shutil.rmtree(path)
    for path in root.glob(".*"):
        if path.is_file() and is_staging(path):
            path.unlink()


__all__ = ["AdjacentPair", "Anchor", "DistillationChain", "append_anchor"]
