"""answers.json: which answers a directory holds and how they were made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf._files import atomic_write_text, canonical_digest
from cbd_hf.data.columns import SOURCE_PROMPTS
from cbd_hf.distillation.records import (
    ShardRecord,
    TeacherRecord,
    check_files,
    check_names,
    read_manifest,
    read_record,
    write_manifest,
)


MANIFEST = "answers.json"
CARD = "README.md"
SHARD = "answers-{:05d}.jsonl"
SCHEMA_VERSION = 1
ENGINES = ("transformers", "vllm")
_REMEDY = "Copy the directory again, or generate the answers anew."


@dataclass(frozen=True)
class AnswersSettings:
    """
    How prompts are read and answers are drawn.

    Args:
        source_prompt (`str`, *optional*, defaults to `"same"`): what the source reads: `"same"`, the prompt as it is;
            `"chat"`, its chat template with the prompt as the user's message. Conversations always take the template.
        temperature (`float`, *optional*, defaults to 1.0): of the sampling; 0 takes the likeliest token.
        top_p (`float`, *optional*, defaults to 1.0): sample from the likeliest tokens of this total probability.
        top_k (`int`, *optional*, defaults to 0): sample from this many likeliest tokens; 0: from all.
        no_repeat_ngram_size (`int`, *optional*, defaults to 0): no run of this many tokens, those of the prompt
            included, occurs twice; 0: no rule.
        max_new_tokens (`int`, *optional*, defaults to 256): an answer ends there or at an end token.
        max_prompt_length (`int`, *optional*, defaults to 256): prompts of more tokens are left out.
        n (`int`, *optional*, defaults to 1): answers to each prompt.
        seed (`int`, *optional*, defaults to 0): of the sampling.
        engine (`str`, *optional*, defaults to `"transformers"`): what generates; or `"vllm"`.
        shard_rows (`int`, *optional*, defaults to 256): prompts of one file.
        chat_template_kwargs (`dict`, *optional*): passed to the chat template, such as `enable_thinking`.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    source_prompt: str = "same"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 256
    max_prompt_length: int = 256
    n: int = 1
    seed: int = 0
    engine: str = "transformers"
    shard_rows: int = 256
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.source_prompt not in SOURCE_PROMPTS:
            raise ValueError(f"source_prompt={self.source_prompt!r} is unknown; choose one of {list(SOURCE_PROMPTS)}.")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; choose one of {list(ENGINES)}.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        for name in ("top_k", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, which switches it off.")
        for name in ("max_new_tokens", "max_prompt_length", "n", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} answers to a prompt would be alike with temperature=0; raise it, or set n=1."
            )
        if self.engine == "vllm" and self.no_repeat_ngram_size:
            raise ValueError(
                f"vLLM has no rule against repeated n-grams: set no_repeat_ngram_size=0 (it is "
                f"{self.no_repeat_ngram_size}), or engine=transformers."
            )


@dataclass(frozen=True)
class PromptsRecord:
    """
    Args:
        name (`str`): of the dataset.
        digest (`str`): of its prompts and reference answers, in order.
        rows (`int`): prompts in it.
        asked (`int`): prompts of at most `max_prompt_length` tokens, to which there are answers.
    """

    name: str
    digest: str
    rows: int
    asked: int


@dataclass
class AnswersManifest:
    """
    The content of answers.json.

    Args:
        settings ([`AnswersSettings`]): how the answers are drawn.
        source ([`~cbd_hf.distillation.records.TeacherRecord`]): who answers.
        tokenizer_digest (`str`): of the source's vocabulary.
        chat_template_digest (`str` or `None`): of the source's chat template, if prompts are read through it.
        end_token_ids (`list[int]`): tokens that end an answer.
        data ([`PromptsRecord`]): the prompts.
        shards (`list[ShardRecord]`): files, in the order of their rows; `rows` are prompts, `tokens` the answers'.
        complete (`bool`): whether all prompts are answered.
        packages (`dict[str, str]`): versions of what made it.
    """

    settings: AnswersSettings
    source: TeacherRecord
    tokenizer_digest: str
    chat_template_digest: str | None
    end_token_ids: list[int]
    data: PromptsRecord
    shards: list[ShardRecord] = field(default_factory=list)
    complete: bool = False
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """Prompts that are answered."""
        return sum(shard.rows for shard in self.shards)

    @property
    def answers(self) -> int:
        """Answers in the files."""
        return self.settings.n * self.prompts

    @property
    def tokens(self) -> int:
        """Tokens of the answers, as the source counts them."""
        return sum(shard.tokens for shard in self.shards)

    def differences(self, other: AnswersManifest) -> list[str]:
        """What another manifest was made with that this one was not, as `name: this, not that`."""
        mine, others = self._made_with(), other._made_with()
        return [f"{name}: {mine[name]}, not {others[name]}" for name in mine if mine[name] != others[name]]

    def _made_with(self) -> dict[str, Any]:
        source = {f"source {name}": value for name, value in dataclasses.asdict(self.source).items()}
        del source["source name"]  # the same weights may lie elsewhere
        return dataclasses.asdict(self.settings) | source | {
            "tokenizer": self.tokenizer_digest,
            "chat template": self.chat_template_digest,
            "end tokens": self.end_token_ids,
            "prompts": self.data.digest,
        }  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """What the manifest of a model that learns these answers should say of them."""
        made = dataclasses.asdict(self)
        del made["shards"], made["complete"]
        return made | {"answers": self.answers, "tokens": self.tokens}

    def write(self, directory: Path) -> None:
        """Write answers.json in one step."""
        write_manifest(directory / MANIFEST, self, SCHEMA_VERSION)

    def write_card(self, directory: Path, prompt: Any) -> None:
        """
        Write README.md, by which `datasets` knows which files are the data and of which types they are.

        Without it `datasets` would take the manifest for data.

        Args:
            directory (`Path`): of the answers.
            prompt (`Any`): type of a prompt, as in a dataset's `features`.
        """
        from datasets import DatasetInfo, Features, List, Value
        from datasets.info import DatasetInfosDict
        from huggingface_hub import DatasetCardData

        text, number = Value("string"), Value("int64")
        features = Features(
            {
                "prompt": prompt,
                "completion": text if isinstance(prompt, Value) else List({"role": text, "content": text}),
                "source_row": number,
                "sample": number,
                "finish": text,
                "tokens": number,
                "references": List(text),
            }
        )
        config = {"config_name": "default", "data_files": SHARD.replace("{:05d}", "*")}
        # `datasets` finds what it has cached by this head and the directory's name, not by the files' content.
        config["description"] = canonical_digest([shard.sha256 for shard in self.shards])
        head = DatasetCardData(configs=[config])
        DatasetInfosDict({"default": DatasetInfo(features=features)}).to_dataset_card_data(head)
        content = _CARD.format(head=head, name=self.source.name, data=self.data.name, manifest=MANIFEST)
        atomic_write_text(directory / CARD, content)

    @classmethod
    def read(cls, directory: Path) -> AnswersManifest:
        """
        Read and check answers.json; the shards are not looked at.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another version, lacks a field, or names files outside the directory.
        """
        path = directory / MANIFEST
        missing = f"{directory} holds no answers: it has no {MANIFEST}. Give the output_dir of `cbd bridge generate`."
        content = read_manifest(path, SCHEMA_VERSION, missing, _REMEDY)
        names = {part.name for part in dataclasses.fields(cls)}
        if names != content.keys():
            wrong = sorted(names ^ content.keys())
            raise ValueError(f"{path}: the field(s) {', '.join(wrong)} are missing or unknown. {_REMEDY}")
        kinds = {"settings": AnswersSettings, "source": TeacherRecord, "data": PromptsRecord}
        records = {name: read_record(kind, content[name], f"{path}: {name}", _REMEDY) for name, kind in kinds.items()}
        shards = [
            read_record(ShardRecord, part, f"{path}: shards[{index}]", _REMEDY)
            for index, part in enumerate(content["shards"])
        ]
        check_names(shards, str(path), "directory")
        return cls(**{**content, **records, "shards": shards})

    def check_shards(self, directory: Path, verify: str = "size") -> None:
        """Check that every shard is there and whole; see [`~cbd_hf.distillation.records.check_files`]."""
        check_files(directory, self.shards, verify, _REMEDY)


_CARD = """---
{head}
---

# Answers of {name}

To the prompts of {data}, by `cbd bridge generate` of cbd_hf. How they were made:
`{manifest}`.

| column | |
|---|---|
| `prompt`, `completion` | the prompt and the source's answer: two texts, or two lists of messages |
| `source_row`, `sample` | row of the prompt in its dataset, and which of several answers to it |
| `finish` | `eos`: the source ended it; `length`: it was cut |
| `tokens` | of the answer, as the source counts them |
| `references` | the dataset's own answers, where it has some |
"""


__all__ = [
    "CARD",
    "ENGINES",
    "MANIFEST",
    "SCHEMA_VERSION",
    "SHARD",
    "AnswersManifest",
    "AnswersSettings",
    "PromptsRecord",
]
