"""One model of a chain, as it lies on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf._candidates import has_tokenizer, read_tokenizer
from cbd_hf._files import sha256_of


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Anchor:
    """
    One model of a chain.

    Args:
        name (`str`): unique in the chain.
        path (`Path`): its Hugging Face checkpoint directory.
        n_params (`int`): exact number of parameters, tied weights once.
        files (`dict`): size and sha256 of every file of the checkpoint, by name.
        config_digest (`str`): sha256 of the architecture's config.
        stage (`dict`, *optional*): provenance of its distillation: teacher, objective, data fingerprint, steps,
            tokens, seed, package versions, measured metrics.
        cut (`dict`, *optional*): how it was cut out of the previous anchor before it was distilled.
    """

    name: str
    path: Path
    n_params: int
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    config_digest: str = field(repr=False)
    stage: dict[str, Any] | None = field(default=None, repr=False)
    cut: dict[str, Any] | None = field(default=None, repr=False)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The stock config, read from the anchor's own directory on first use."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=False)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """
        The anchor's model.

        Args:
            kwargs (`dict`, *optional*): passed to `AutoModelForCausalLM.from_pretrained`.
        """
        from transformers import AutoModelForCausalLM

        kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
        return AutoModelForCausalLM.from_pretrained(self.path, **kwargs)

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The anchor's tokenizer; `None` if none was saved with it."""
        if not has_tokenizer(list(self.files)):
            return None
        return read_tokenizer(self.path, f"anchor {self.name!r}")

    def check_files(self, full: bool = False) -> list[str]:
        """
        Compare the anchor's files with what the chain recorded.

        Args:
            full (`bool`, *optional*, defaults to `False`): also read every file and compare its sha256; otherwise
                compare sizes only.

        Returns:
            `list[str]`: one line per broken file, empty if all is well.
        """
        problems = []
        for name, entry in self.files.items():
            path = self.path / name
            if not path.is_file():
                problems.append(f"{path} is missing")
                continue
            try:
                size = path.stat().st_size
                if size != entry["size"]:
                    problems.append(f"{path} has {size:,} bytes instead of {entry['size']:,}")
                elif full and (found := sha256_of(path)) != entry["sha256"]:
                    problems.append(f"{path} has sha256 {found} instead of {entry['sha256']}")
            except OSError as error:
                problems.append(f"{path} cannot be read ({error})")
        return problems


__all__ = ["Anchor"]
