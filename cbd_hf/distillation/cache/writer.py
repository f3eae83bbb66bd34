"""
One shard of a teacher cache: a safetensors file for a fixed number of rows.

Tensors (T supervised positions, E entries, in the order of rows and, in a row, of positions):

    keys uint8 (rows, 16); offsets int64 (rows + 1) of positions
    top_k:   token_ids (T, k), most likely first; log_probs (T, k); tail (T,), logarithm of the mass of all others
    sampled: token_ids (E,), ascending per position; log_probs (E,); counts (E,); unique (T,), entries of a position;
             entry_offsets int64 (rows + 1)
    hidden (T, hidden), labels (T,), log-probabilities of the tokens that follow, if asked for

`token_ids` are uint16 where the vocabulary has at most 65,536 entries, else int32. `counts` and `unique` are uint8 for
up to 255 draws, else int16.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import torch

from cbd_hf._files import is_staging, sha256_of, sync_directory
from cbd_hf.distillation.cache.keys import KEY_BYTES
from cbd_hf.distillation.cache.manifest import CacheSettings
from cbd_hf.distillation.records import ShardRecord


SHARD = "shard-{:05d}.safetensors"
# Logarithms of probabilities are not stored below this: -inf times a weight of 0 would not be 0.
SMALLEST_LOG_PROB = -1e4
LOG_OF_NOTHING = -23.025850929940457  # log(1e-10), for the tail where all the mass is among the k


class ShardBuffer:
    """
    The tensors of one shard while the teacher fills them, in any order of positions.

    Args:
        settings ([`CacheSettings`]): what is kept.
        keys (`np.ndarray`): uint8, shape (rows, 16).
        counts (`np.ndarray`): int64, shape (rows,), supervised positions of each row.
        vocab_size (`int`): the teacher's.
        hidden_size (`int`): the teacher's.
    """

    def __init__(
        self, settings: CacheSettings, keys: np.ndarray, counts: np.ndarray, vocab_size: int, hidden_size: int
    ) -> None:
        self.settings = settings
        self._ids_dtype = torch.uint16 if vocab_size <= 1 << 16 else torch.int32
        self._keys = torch.from_numpy(np.ascontiguousarray(keys)).reshape(-1, KEY_BYTES).clone()
        self.offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.from_numpy(counts), 0, out=self.offsets[1:])
        positions, width = int(self.offsets[-1]), settings.width
        log_dtype = getattr(torch, settings.dtype)
        self._token_ids = torch.zeros(positions, width, dtype=torch.int32)
        self._log_probs = torch.zeros(positions, width, dtype=log_dtype)
        self._tail = torch.zeros(positions, dtype=log_dtype) if settings.variant == "top_k" else None
        self._counts = None if settings.variant == "top_k" else torch.zeros(positions, width, dtype=torch.int16)
        self._hidden = None
        if settings.hidden is not None:
            self._hidden = torch.zeros(positions, hidden_size, dtype=getattr(torch, settings.hidden))
        self._labels = torch.zeros(positions, dtype=log_dtype) if settings.labels else None

    def put(
        self,
        positions: torch.Tensor,
        token_ids: torch.Tensor,
        log_probs: torch.Tensor,
        tail: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> None:
        """
        Take what the teacher says about some positions.

        Args:
            positions (`torch.Tensor`): int64, shape (n,), counted over the shard.
            token_ids (`torch.Tensor`): int, shape (n, k).
            log_probs (`torch.Tensor`): float, shape (n, k).
            tail (`torch.Tensor`, *optional*): float, shape (n,); for the most likely tokens.
            counts (`torch.Tensor`, *optional*): int, shape (n, k), 0 for no entry; for sampled tokens.
            hidden (`torch.Tensor`, *optional*): float, shape (n, hidden).
            labels (`torch.Tensor`, *optional*): float, shape (n,), log-probabilities of the tokens that follow.
        """
        log_probs = log_probs.clamp(min=SMALLEST_LOG_PROB)
        pairs = [(self._token_ids, token_ids), (self._log_probs, log_probs), (self._counts, counts)]
        pairs += [(self._tail, None if tail is None else tail.clamp(min=LOG_OF_NOTHING)), (self._hidden, hidden)]
        pairs += [(self._labels, None if labels is None else labels.clamp(min=SMALLEST_LOG_PROB))]
        for target, values in pairs:
            if target is not None and values is not None:
                target[positions] = values.cpu().to(target.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, by name."""
        made = {"keys": self._keys, "offsets": self.offsets}
        if self._counts is None:
            assert self._tail is not None
            made |= {"token_ids": self._token_ids.to(self._ids_dtype), "log_probs": self._log_probs}
            made["tail"] = self._tail
        else:
            small = torch.uint8 if self.settings.n_samples <= 255 else torch.int16
            present = self._counts > 0
            unique = present.sum(dim=1)
            ends = torch.cat([torch.zeros(1, dtype=torch.int64), unique.cumsum(0)])
            made |= {
                "token_ids": self._token_ids[present].to(self._ids_dtype),
                "log_probs": self._log_probs[present],
                "counts": self._counts[present].to(small),
                "unique": unique.to(small),
                "entry_offsets": ends[self.offsets],
            }
        if self._hidden is not None:
            made["hidden"] = self._hidden
        if self._labels is not None:
            made["labels"] = self._labels
        return made


def write_shard(directory: Path, index: int, buffer: ShardBuffer) -> ShardRecord:
    """Write a shard so that it is there whole or not at all, and describe it."""
    from safetensors.torch import save_file

    path = directory / SHARD.format(index)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    tensors = buffer.tensors()
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(directory)
    return ShardRecord(
        file=path.name,
        rows=len(tensors["keys"]),
        tokens=int(buffer.offsets[-1]),
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed process was writing."""
    for path in directory.iterdir():
        if is_staging(path):
            path.unlink()


__all__ = ["LOG_OF_NOTHING", "SHARD", "SMALLEST_LOG_PROB", "ShardBuffer", "remove_leftovers", "write_shard"]
