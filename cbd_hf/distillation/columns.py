"""Which columns a distillation dataset has, and chat turns as supervised tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cbd_hf.data.columns import IGNORED, dataset_kind


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from cbd_hf.distillation.config import StepwiseDistillationConfig


NO_ROWS = "The dataset has no rows. Choose another split, or raise the limit on documents."


def check_datasets(args: StepwiseDistillationConfig, train: Any, evaluated: Any = None) -> None:
    """
    Raise unless datasets have columns that the options can work with.

    Args:
        args ([`StepwiseDistillationConfig`]): options.
        train (`Dataset` or `IterableDataset`): as it is given.
        evaluated (`Dataset`, `IterableDataset` or a `dict` of them, *optional*): likewise.

    Raises:
        ValueError: see [`dataset_kind`]; or on-policy steps are wanted, and there are no prompts to sample from.
    """
    for dataset in (train, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
        if dataset is None:
            continue
        if hasattr(dataset, "__len__") and not len(dataset):
            raise ValueError(NO_ROWS)
        kind = dataset_kind(list(dataset.column_names or next(iter(dataset))), args.dataset_text_field)
        if kind == "text" and args.lmbda > 0:
            raise ValueError(
                f"lmbda={args.lmbda} samples answers to prompts, but the dataset is plain text. Use one with "
                "'prompt' and 'completion' or 'messages', or set lmbda=0."
            )
    if args.lmbda > 0 and args.packing:
        raise ValueError("packing joins several prompts in one row, so it cannot be used with lmbda > 0.")


def tokenize_turns(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """
    One conversation as `input_ids` and `labels`, with every assistant turn supervised and all else `-100`.

    A turn is what the chat template adds between the generation prompt and the end of the turn, so the end-of-turn
    token is learnt; no `{% generation %}` markers are needed.

    Raises:
        ValueError: there is no assistant turn, or the template renders earlier turns differently once later ones
            follow, so that a turn cannot be told from the text.
    """

    def render(turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
        return list(encoded["input_ids"])

    input_ids = render(messages)
    labels = [IGNORED] * len(input_ids)
    assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistant:
        raise ValueError("A conversation in 'messages' has no assistant turn, so there is nothing to supervise.")
    for index in assistant:
        start = render(messages[:index], add_generation_prompt=True)
        end = render(messages[: index + 1])
        if input_ids[: len(start)] != start or input_ids[: len(end)] != end:
            raise ValueError(
                f"The chat template renders turn {index} differently inside the conversation than alone, so its "
                "tokens cannot be told apart. Give 'prompt' and 'completion' columns, or completion_only_loss=False."
            )
        labels[len(start) : len(end)] = input_ids[len(start) : len(end)]
    return {"input_ids": input_ids, "labels": labels}


def supervise_turns(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, **map_options: Any
) -> Dataset | IterableDataset:
    """[`tokenize_turns`] over a dataset with a `messages` column."""
    return dataset.map(
        lambda example: tokenize_turns(example["messages"], tokenizer),
        remove_columns=dataset.column_names,
        **map_options,
    )


__all__ = ["NO_ROWS", "check_datasets", "supervise_turns", "tokenize_turns"]
