"""Reading a teacher cache: rows found by their content, tensors read from memory-mapped files."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbd_hf.distillation.cache.keys import KeyIndex, keys_of
from cbd_hf.distillation.cache.manifest import CacheManifest
from cbd_hf.distillation.cache.writer import LOG_OF_NOTHING
from cbd_hf.distillation.records import tokenizer_digest, weights_digest


_OPEN_SHARDS = 256
_SHOWN = 5
# The only objective that is linear in the teacher's probabilities, so that its mean over samples is the exact one.
UNBIASED_OBJECTIVES = ("forward_kl",)


class _Shard:
    """An open file: its tensors as slices, and the small ones read."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt")
        names = set(self._file.keys())
        self.slices = {name: self._file.get_slice(name) for name in names}
        self.offsets = self._file.get_tensor("offsets").tolist()
        self.entries = self._file.get_tensor("entry_offsets").tolist() if "entry_offsets" in names else []


class TeacherCache:
    """
    A teacher's predictions on disk, as [`build_cache`] writes them.

    Files are memory-mapped and opened when first needed in each process, so that an instance may be pickled or
    forked (`DataLoader` workers). Get one by [`TeacherCache.from_pretrained`].

    Attributes:
        manifest ([`CacheManifest`]): what it holds and what it was made with.
        directory (`Path`): where it is.
    """

    def __init__(self, directory: Path, manifest: CacheManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._starts = np.cumsum([0] + [shard.rows for shard in manifest.shards])
        self._index: KeyIndex | None = None
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._process = os.getpid()

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], verify: str = "size") -> TeacherCache:
        """
        Open a cache.

        Args:
            directory (`str` or `Path`): the `output_dir` of `cbd cache`.
            verify (`str`, *optional*, defaults to `"size"`): what is checked of every file: `"size"`, `"full"` (its
                sha256) or `"none"`.

        Raises:
            FileNotFoundError: it is no cache.
            ValueError: cache.json is not valid or of another version, or a shard is missing or broken.
        """
        path = Path(directory)
        manifest = CacheManifest.read(path)
        manifest.check_shards(path, verify)
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_index": None}

    def keys(self) -> np.ndarray:
        """The keys of all rows, uint8, shape (rows, 16)."""
        keys = [self._shard(number).slices["keys"][:].numpy() for number in range(len(self.manifest.shards))]
        return np.concatenate(keys) if keys else np.zeros((0, 16), dtype=np.uint8)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Rows with these keys (uint8, shape (n, 16)): int64, shape (n,), -1 for a key that is not cached."""
        if self._index is None:
            self._index = KeyIndex(self.keys())
        return self._index.find(keys)

    def locate(self, rows: Iterable[Mapping[str, Any]]) -> list[int]:
        """
        Where prepared rows are in the cache.

        Args:
            rows (`Dataset` or iterable of `dict`): with `input_ids`, `labels` and, where packed, `seq_lengths`; in any
                order, any part of what was cached, any number of times.

        Returns:
            `list[int]`: a row of the cache for each.

        Raises:
            ValueError: some are not cached. They were prepared in another way, or are other data.
        """
        keys = keys_of(rows).keys
        found = self.find(keys)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            first = ", ".join(str(row) for row in missing[:_SHOWN])
            names = ", ".join(record.name for record in self.manifest.data) or "nothing"
            raise ValueError(
                f"{len(missing)} of {len(keys)} rows are not in the teacher cache {self.directory} (first: {first}), "
                f"which holds {len(self):,} rows of {names}. Rows are found by their tokens and supervised positions: "
                "prepare them as for the cache (same tokenizer, max_length, packing with its seed, "
                "completion_only_loss), or add them with "
                f"`{self.manifest.command} --append true` and those options."
            )
        return found.tolist()

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """
        The teacher's predictions for some rows, position by position.

        Args:
            rows (sequence of `int`): rows of the cache, as from [`TeacherCache.locate`].

        Returns:
            `dict[str, torch.Tensor]`: for the supervised positions of all rows in this order (n in all):
            `teacher_token_ids` (int64, shape (n, k)); `teacher_log_probs` (float32, shape (n, k)), of the whole
            distribution at the cache's temperature; `teacher_tail` (float32, shape (n,)), the logarithm of the mass of
            all other tokens, or, where tokens were sampled, `teacher_weights` (float32, shape (n, k)), the shares of
            the draws, 0 where a position has fewer entries than k; and `teacher_hidden` (shape (n, hidden)) and
            `teacher_labels` (float32, shape (n,), log-probabilities of the tokens that follow) if they were kept.

        Raises:
            IndexError: there is no such row.
        """
        parts: dict[str, list[torch.Tensor]] = {}
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"Row {row} is outside the cache, which has {len(self)} rows.")
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            for name, tensor in self._read(number, int(row - self._starts[number])).items():
                parts.setdefault(name, []).append(tensor)
        if not parts:
            raise IndexError("batch() needs at least one row.")
        joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
        made = self._padded(joined) if self.manifest.settings.variant == "sampled" else joined
        batch = {"teacher_token_ids": made["token_ids"].long(), "teacher_log_probs": made["log_probs"].float()}
        for name in ("tail", "weights", "labels"):
            if name in made:
                batch[f"teacher_{name}"] = made[name].float()
        if "hidden" in joined:
            batch["teacher_hidden"] = joined["hidden"]
        return batch

    def _read(self, number: int, row: int) -> dict[str, torch.Tensor]:
        """Views of what one shard holds of one of its rows."""
        shard = self._shard(number)
        here = slice(shard.offsets[row], shard.offsets[row + 1])
        wanted = dict.fromkeys(("tail", "token_ids", "log_probs", "hidden", "labels", "unique"), here)
        if shard.entries:
            wanted |= dict.fromkeys(
                ("token_ids", "log_probs", "counts"), slice(shard.entries[row], shard.entries[row + 1])
            )
        return {name: shard.slices[name][part] for name, part in wanted.items() if name in shard.slices}

    def _padded(self, joined: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Entries of different numbers per position as rectangles."""
        unique = joined["unique"].long()
        present = torch.arange(int(unique.max()) if len(unique) else 1) < unique[:, None]
        made = {
            "token_ids": torch.zeros(present.shape, dtype=torch.int64),
            "log_probs": torch.full(present.shape, LOG_OF_NOTHING),
            "weights": torch.zeros(present.shape),
        }
        made["token_ids"][present] = joined["token_ids"].long()
        made["log_probs"][present] = joined["log_probs"].float()
        made["weights"][present] = joined["counts"].float() / self.manifest.settings.n_samples
        return made | {name: joined[name] for name in ("labels",) if name in joined}

    def _shard(self, number: int) -> _Shard:
        if self._process != os.getpid():
            self._process, self._open = os.getpid(), OrderedDict()
        if number not in self._open:
            path = self.directory / self.manifest.shards[number].file
            try:
                self._open[number] = _Shard(path)
            except Exception as error:
                raise ValueError(
                    f"Shard {path} cannot be read ({error}). Copy the cache again, or make it anew with "
                    f"`{self.manifest.command}`."
                ) from error
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def check(
        self,
        *,
        tokenizer: Any = None,
        temperature: float | None = None,
        objective: str | None = None,
        hidden: bool = False,
        teacher: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Raise unless the cache suits a training. What is not given is not checked.

        Args:
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the student's.
            temperature (`float`, *optional*): of the loss.
            objective (`str`, *optional*): of the loss.
            hidden (`bool`, *optional*, defaults to `False`): whether hidden states are needed.
            teacher (`str` or `Path`, *optional*): directory of a teacher, whose weight files are hashed.

        Raises:
            ValueError: what does not suit, and what to change.
        """
        manifest, settings = self.manifest, self.manifest.settings
        if tokenizer is not None and tokenizer_digest(tokenizer) != manifest.tokenizer_digest:
            raise ValueError(
                f"The teacher cache {self.directory} was made with another vocabulary than this tokenizer "
                f"({tokenizer.name_or_path!r}, {len(tokenizer)} tokens). Give the tokenizer of the cache's teacher "
                f"({manifest.teacher.name!r}), or make a cache with the right teacher."
            )
        if temperature is not None and temperature != settings.temperature:
            raise ValueError(
                f"temperature={temperature} of the loss is not that of the teacher cache {self.directory} "
                f"({settings.temperature}). Set temperature={settings.temperature}, or make another cache with "
                f"`{manifest.command} --temperature {temperature}`."
            )
        if objective is not None and settings.variant == "sampled" and objective not in UNBIASED_OBJECTIVES:
            raise ValueError(
                f"objective={objective!r} does not go with the sampled teacher cache {self.directory}: only "
                "'forward_kl' is linear in the teacher's probabilities, so that samples leave it unbiased. Set "
                "objective='forward_kl', or make a cache with `cbd cache --variant top_k`."
            )
        if hidden and settings.hidden is None:
            raise ValueError(
                f"The teacher cache {self.directory} has no hidden states. Make one with `{manifest.command} --hidden "
                "float16`, or leave hidden-state matching out."
            )
        if teacher is not None and weights_digest(teacher) != manifest.teacher.sha256:
            raise ValueError(
                f"The weights in {teacher} are not those of the teacher cache {self.directory}, which was made with "
                f"{manifest.teacher.name}. Leave the teacher out, or make a cache with it."
            )


__all__ = ["UNBIASED_OBJECTIVES", "TeacherCache"]
