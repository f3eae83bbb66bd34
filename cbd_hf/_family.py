"""Whether checkpoints can be anchors of one chain: architecture, vocabulary, tokenizer, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cbd_hf._candidates import Candidate


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_family(candidate: Candidate, family: Mapping[str, Any], reference: str) -> None:
    """
    Raise a `ValueError` unless an anchor belongs to a chain's family.

    Args:
        candidate (`Candidate`): the anchor.
        family (`Mapping`): the chain's [`Candidate.family`].
        reference (`str`): the anchor that `family` was taken from, for the message.
    """
    mine = candidate.family()
    advice = {
        "model_type": "All anchors of a chain have the same architecture; another one is reached by a bridge.",
        "vocab_size": "Resize the embeddings of one (model.resize_token_embeddings), or choose anchors that share it.",
        "tie_word_embeddings": "Choose anchors that all tie their output embedding to the input's, or all do not.",
    }
    for key, hint in advice.items():
        if mine[key] != family[key]:
            what = "a different architecture, model_type" if key == "model_type" else key
            raise ValueError(
                f"{candidate.label} has {what} {mine[key]!r}, but {reference} has {family[key]!r}. {hint}"
            )
    known = family.get("tokenizer_digest")
    if mine["tokenizer_digest"] is not None and known is not None and mine["tokenizer_digest"] != known:
        raise ValueError(
            f"{candidate.label} has another tokenizer vocabulary ({len(candidate.vocabulary or ()):,} entries) than "
            f"{reference}. Anchors must map the same tokens to the same ids: use the tokenizer that the chain's "
            "models were trained with, or reach the other vocabulary by a bridge."
        )


def common_family(candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    reference = candidates[0]
    family = reference.family()
    for candidate in candidates[1:]:
        check_family(candidate, family, reference.label)
        # The first vocabulary that is known is the one that the rest is compared with.
        if family["tokenizer_digest"] is None and (digest := candidate.family()["tokenizer_digest"]) is not None:
            family["tokenizer_digest"] = digest
            reference = candidate
    for larger, smaller in zip(candidates, candidates[1:], strict=False):
        if larger.n_params == smaller.n_params:
            raise ValueError(
                f"{larger.label} and {smaller.label} both have {larger.n_params:,} parameters. The anchors of a chain "
                "must have different sizes: leave one out."
            )
    _give_tokenizer(candidates, tokenizer, family, reference.label)
    return family


def _give_tokenizer(
    candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase | None, family: dict[str, Any], reference: str
) -> None:
    if tokenizer is None:
        return
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=0)
    if highest >= family["vocab_size"]:
        raise ValueError(
            f"The tokenizer has token ids up to {highest}, but the anchors' vocab_size is {family['vocab_size']}. "
            "Give the tokenizer that the anchors were trained with, or resize their embeddings first."
        )
    for candidate in candidates:
        if not candidate.has_tokenizer:
            candidate.vocabulary = vocabulary
            candidate.label += " (with the given tokenizer)"
        check_family(candidate, family, reference)
        if family["tokenizer_digest"] is None:
            family["tokenizer_digest"] = candidate.family()["tokenizer_digest"]


def check_appended(candidate: Candidate, manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    entries, family = manifest["anchors"], manifest["family"]
    last = entries[-1]
    taken = {entry["name"].lower() for entry in entries}
    if candidate.name.lower() in taken:
        raise ValueError(
            f"The chain already has an anchor named {candidate.name!r} (it has "
            f"{', '.join(entry['name'] for entry in entries)}). Choose another name."
        )
    check_family(candidate, family, "the chain")
    _give_tokenizer([candidate], tokenizer, family, "the chain")
    if family["tokenizer_digest"] is None:
        family["tokenizer_digest"] = candidate.family()["tokenizer_digest"]
    if candidate.n_params >= last["n_params"]:
        raise ValueError(
            f"{candidate.label} has {candidate.n_params:,} parameters, but an anchor that is appended must be smaller "
            f"than the chain's last one, {last['name']!r} with {last['n_params']:,}. Append the largest first."
        )


def check_cut(candidate: Candidate, larger: Mapping[str, str]) -> None:
    """
    Check the record of how an anchor was cut out of a larger one, and give it that anchor's name in the chain.

    Args:
        candidate (`Candidate`): the anchor; its `cut` may be `None`.
        larger (`Mapping[str, str]`): what the record may call the larger anchors, to their names in the chain.

    Raises:
        ValueError: the record names no larger anchor of the chain, or its layers do not fit the anchor's.
    """
    cut = candidate.cut
    if cut is None:
        return
    if cut.get("from") not in larger:
        raise ValueError(
            f"{candidate.label}: its cut record has from={cut.get('from')!r}, but it must name a larger anchor of the "
            f"chain ({', '.join(larger.values()) or 'there is none'})."
        )
    layers, wanted = cut.get("layers"), candidate.config.get_text_config().num_hidden_layers
    if not isinstance(layers, list) or not all(isinstance(layer, int) and layer >= 0 for layer in layers):
        raise ValueError(
            f"{candidate.label}: its cut record has layers={layers!r}, but it must list the indices of the larger "
            "anchor's layers that were kept."
        )
    if len(layers) != wanted or layers != sorted(set(layers)):
        raise ValueError(
            f"{candidate.label}: its cut record keeps layers {layers}, but it must list {wanted} different layers, as "
            "many as the anchor has, in rising order."
        )
    candidate.cut = {**cut, "from": larger[cut["from"]]}


__all__ = ["check_appended", "check_cut", "check_family", "common_family"]
