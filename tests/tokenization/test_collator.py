"""Rows of every kind between tokenizers of different kinds, in batches, and against the student's usual rows."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from cbd_hf.distillation.preparation import prepare_rows
from cbd_hf.tokenization.collator import BridgeDataCollator, end_of_turn_pair
from cbd_hf.tokenization.limits import Limits
from cbd_hf.tokenization.rows import COLUMNS, alignment_statistics, check_rows
from tests.distillation.cache.helpers import training_config
from tests.tokenization.chats import CHATML, GEMMA, LLAMA, THINKING, chat_tokenizer, turn
from tests.tokenization.texts import TEXTS


TEXT = {"text": "The cat sat on the mat, and the naïve café 你好 \U0001f600 was not thinking."}
ANSWER = {"prompt": "What sat there?\n", "completion": "The cat, on a mat. It's small."}
CHAT = {
    "messages": [
        turn("system", "Be brief."),
        turn("user", "user"),
        turn("assistant", "The cat sat."),
        turn("user", " and the other?\n"),
        turn("assistant", "It sat there\n\ntoo. 你好"),
    ]
}
CHAT_ANSWER = {"prompt": CHAT["messages"][:4], "completion": CHAT["messages"][4:]}
ROWS = [TEXT, ANSWER, CHAT, CHAT_ANSWER]
KINDS = {
    "chatml": ("byte_level", CHATML, False),
    "thinking": ("byte_level_nfc", THINKING, False),
    "gemma": ("byte_fallback", GEMMA, True),
    "llama": ("byte_fallback_prefix", LLAMA, True),
}
PAIRS = [("chatml", "gemma"), ("gemma", "chatml"), ("chatml", "llama"), ("llama", "gemma"), ("gemma", "thinking")]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return chat_tokenizer(*KINDS[name])


def collator(student: str = "chatml", source: str = "gemma", **options: Any) -> BridgeDataCollator:
    return BridgeDataCollator(tokenizer(student), tokenizer(source), **options)


plain_collator = cache(collator)  # making one tries its tokenizers out


def encode(made: BridgeDataCollator, row: dict[str, Any]) -> dict[str, list[int]]:
    return {name: value[0] for name, value in made.encode([row]).items()}


def read(made: BridgeDataCollator, row: dict[str, list[int]]) -> list[tuple[bytes, bytes]]:
    """What both sides read in each numbered span."""
    sides = []
    for prefix, encoder in zip(("", "source_"), made.encoders, strict=True):
        texts: dict[int, bytes] = {}
        for token, label, span in zip(*(row[prefix + n] for n in ("input_ids", "labels", "spans")), strict=True):
            if span >= 0:
                assert label == token and span in (len(texts) - 1, len(texts))
                texts[span] = texts.get(span, b"") + encoder.pieces.join([token])
        sides.append([*texts.values()])
    assert len(sides[0]) == len(sides[1])
    return list(zip(*sides, strict=True))


@pytest.mark.parametrize(("student", "source"), PAIRS)
@pytest.mark.parametrize("row", ROWS, ids=["text", "answer", "chat", "chat answer"])
def test_spans_read_the_same(student: str, source: str, row: dict[str, Any]) -> None:
    made = collator(student, source)
    spans = read(made, encode(made, row))
    ends = {"chatml": b"<|im_end|>", "thinking": b"<|im_end|>", "gemma": b"<end_of_turn>", "llama": b"<|end|>"}
    pair = (ends[student], ends[source])
    if row in (TEXT, ANSWER):
        pair = (made.tokenizer.eos_token.encode(), made.source_tokenizer.eos_token.encode())
    spaced = "llama" in (student, source) and row in (CHAT, CHAT_ANSWER)  # Llama's end stands behind a space
    assert spans.count(pair) == (0 if spaced else 2 if row is CHAT else 1) and (spaced or spans[-1] == pair)
    contents = [one for one in spans if one != pair]
    if student == "llama" and row is TEXT:  # its prefix is none of the text
        contents[0] = contents[0][0].removeprefix(b" "), contents[0][1]
    assert all(first == second for first, second in contents)
    together = b"".join(first for first, _ in contents).decode(errors="ignore")
    if row is TEXT:
        assert len(together) > 50 and TEXT["text"].endswith(together)
    elif row is ANSWER:
        assert together == ANSWER["completion"]
    elif spaced:
        assert together.endswith(" there\n\ntoo. 你好")  # the first word's token begins before the content
    else:
        assert together == "The cat sat." * (row is CHAT) + "It sat there\n\ntoo. 你好"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text(data: st.DataObject) -> None:
    """Whatever the text, the bytes of a span are the same on both sides."""
    pair = data.draw(st.sampled_from([("chatml", "gemma"), ("gemma", "chatml")]))
    first, second, third = (data.draw(TEXTS) for _ in range(3))
    row = data.draw(
        st.sampled_from(
            [
                {"text": first},
                {"prompt": first, "completion": second},
                {
                    "messages": [
                        turn("user", first),
                        turn("assistant", second),
                        turn("user", third),
                        turn("assistant", first),
                    ]
                },
                {"prompt": [turn("system", first), turn("user", second)], "completion": [turn("assistant", third)]},
            ]
        )
    )
    options = {
        "max_length": data.draw(st.sampled_from([None, 4, 16, 64])),
        "source_max_length": data.draw(st.sampled_from([None, 4, 16, 64])),
        "completion_only_loss": data.draw(st.booleans()),
        "source_prompt": data.draw(st.sampled_from(["same", "chat"])),
    }
    made = copy.copy(plain_collator(*pair))
    vars(made).update(options)
    encoded = encode(made, row)
    ends = {b"<|im_end|>", b"<end_of_turn>", b"<|end|>"}
    for one, other in read(made, encoded):
        # The low line is a space to one of them, wherever it comes from.
        assert one.replace("▁".encode(), b" ") == other.replace("▁".encode(), b" ") or {one, other} <= ends
    for name, limit in (("input_ids", made.max_length), ("source_input_ids", made.source_max_length)):
        assert limit is None or len(encoded[name]) <= limit
    assert len({len(encoded[name]) for name in COLUMNS[:3]}) == len({len(encoded[name]) for name in COLUMNS[3:]}) == 1


@pytest.mark.parametrize("student", ["chatml", "gemma", "llama"])
@pytest.mark.parametrize("completion_only_loss", [None, False])
@pytest.mark.parametrize("kind", ["text", "answer", "chat", "chat answer"])
def test_student_rows_are_the_usual(
    student: str, completion_only_loss: bool | None, kind: str, tmp_path: Path
) -> None:
    """Ids and labels are those that the student gets without a bridge; the first label is never used."""
    rows = {
        "text": [TEXT, {"text": ""}],
        "answer": [ANSWER],
        "chat": [{"messages": CHAT["messages"][1:]}, {"messages": CHAT["messages"][1:3]}],
        "chat answer": [{"prompt": CHAT["messages"][1:4], "completion": CHAT["messages"][4:]}],
    }[kind]
    options = {} if completion_only_loss is None or kind == "text" else {"completion_only_loss": False}
    usual = prepare_rows(Dataset.from_list(rows), tokenizer(student), training_config(tmp_path, **options))
    encoded = collator(student, "chatml", completion_only_loss=completion_only_loss).encode(rows)
    assert encoded["input_ids"] == usual["input_ids"][:]
    assert [row[1:] for row in encoded["labels"]] == [row[1:] for row in usual["labels"]]
    assert any(label != -100 for label in encoded["labels"][0])


def test_repeated_end_is_one() -> None:
    made = collator()
    assert encode(made, {"text": "The cat<|im_end|>"}) == encode(made, {"text": "The cat"})
    assert encode(made, ANSWER) == encode(made, ANSWER | {"completion": ANSWER["completion"] + "<|im_end|>"})


def test_source_reads_a_chat() -> None:
    """The student reads plain text, the source its own template; they meet in the completion and at its end."""
    for source, end in (("gemma", "<end_of_turn>"), ("chatml", "<|im_end|>")):
        made = collator("chatml", source, source_prompt="chat")
        encoded = encode(made, ANSWER)
        assert read(made, encoded)[-1] == (b"<|im_end|>", end.encode())
        assert b"".join(first for first, _ in read(made, encoded)[:-1]).decode() == ANSWER["completion"]
        same = collator("chatml", source).encode([ANSWER])
        assert encoded["input_ids"] == same["input_ids"][0] and encoded["labels"] == same["labels"][0]
        turns = [turn("user", ANSWER["prompt"]), turn("assistant", ANSWER["completion"])]
        chat = made.source_tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        assert encoded["source_input_ids"] == chat["input_ids"]
    whole = collator(source_prompt="chat", completion_only_loss=False)
    spans = read(whole, encode(whole, ANSWER))
    assert b"".join(first for first, _ in spans[:-1]).decode() == "hat sat there?" + ANSWER["completion"]


@pytest.mark.parametrize("source", ["gemma", "chatml"])
@pytest.mark.parametrize("row", ROWS, ids=["text", "answer", "chat", "chat answer"])
def test_truncation(source: str, row: dict[str, Any]) -> None:
    """Both sides end at the same byte, at most one span before either limit, without an end."""
    full = encode(collator("chatml", source), row)
    long = [len(full["input_ids"]), len(full["source_input_ids"])]
    for lengths in ((long[0] - 6, long[1]), (long[0], long[1] - 6), (long[0] - 5, long[1] - 5)):
        made = collator("chatml", source, max_length=lengths[0], source_max_length=lengths[1])
        cut = encode(made, row)
        assert all(full[name][: len(cut[name])] == cut[name] for name in COLUMNS)
        assert cut["spans"][-1] == cut["source_spans"][-1] == max(cut["spans"]) < max(full["spans"])
        following = max(cut["spans"]) + 1
        stops = [len(full[n]) - full[n][::-1].index(following) for n in ("spans", "source_spans")]
        assert stops[0] > lengths[0] or stops[1] > lengths[1]
        assert read(made, cut) == read(made, full)[:following]
        if row in (TEXT, ANSWER):
            sides = zip(made.encoders, (cut["input_ids"], cut["source_input_ids"]), strict=True)
            first, second = (encoder.pieces.join(ids).removeprefix(b"<s>") for encoder, ids in sides)
            assert first == second


def test_prompts_without_room() -> None:
    made = collator(max_length=6, source_prompt="chat")
    assert check_rows([encode(collator(), ANSWER)]) is None
    rows = made.encode([ANSWER] * 2)
    assert all(set(part) == {-100} for part in rows["labels"]) and all(set(part) == {-1} for part in rows["spans"])
    with pytest.raises(ValueError, match="2 of 2 rows .* max_length=6 and source_max_length=12.*takes 6 tokens"):
        check_rows(Dataset.from_dict(rows), made.max_length, made.source_max_length)


def test_batch() -> None:
    """Raw and prepared rows make the same batch, each side with its own length."""
    made = collator(pad_to_multiple_of=8)
    rows = [row | {"example_id": index} for index, row in enumerate(ROWS)]
    prepared = [encode(made, row) | {"example_id": row["example_id"]} for row in rows]
    batch, again = made(rows), made(prepared)
    assert batch.keys() == again.keys() == {*COLUMNS, "attention_mask", "source_attention_mask", "example_id"}
    assert all(torch.equal(batch[name], again[name]) and batch[name].dtype == torch.int64 for name in batch)
    assert batch["example_id"].tolist() == [0, 1, 2, 3]
    for prefix, pad in (("", made.tokenizer.pad_token_id), ("source_", made.source_tokenizer.pad_token_id)):
        mask = batch[f"{prefix}attention_mask"]
        longest = max(len(row[f"{prefix}input_ids"]) for row in prepared)
        assert mask.shape == (4, -(-longest // 8) * 8)
        for name, filler in (("input_ids", pad), ("labels", -100), ("spans", -1)):
            tensor = batch[prefix + name]
            assert tensor.shape == mask.shape and (tensor[mask == 0] == filler).all()
            assert [tensor[i][mask[i] == 1].tolist() for i in range(4)] == [row[prefix + name] for row in prepared]
    assert batch["labels"].shape != batch["source_labels"].shape
    assert "example_id" not in made(ROWS)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers(context: str, workers: int) -> None:
    made, rows = collator("gemma", "chatml"), ROWS * 2
    alone = [made(rows[start : start + 2]) for start in range(0, 8, 2)]
    loader = DataLoader(rows, batch_size=2, collate_fn=made, num_workers=workers, multiprocessing_context=context)
    for batch, expected in zip(loader, alone, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_fingerprint() -> None:
    """The same before and after use, so that `Dataset.map` finds what it has done; another for other options."""
    made = collator()
    fingerprint = Hasher.hash(made.encode)
    made.encode(ROWS)
    assert Hasher.hash(made.encode) == fingerprint == Hasher.hash(collator().encode)
    assert Hasher.hash(collator(max_length=512).encode) != fingerprint


def test_dataset_map() -> None:
    made = collator()
    rows = Dataset.from_list([TEXT, {"text": "The cat."}, {"text": "A dog sat there."}])
    mapped = rows.map(made.encode, batched=True, batch_size=2, remove_columns=rows.column_names)
    assert mapped[:] == {name: [encode(made, row)[name] for row in rows] for name in COLUMNS}
    assert pickle.loads(pickle.dumps(made)).encode(list(rows)) == mapped[:]


def test_statistics_of_equal_tokenizers() -> None:
    rows = Dataset.from_dict(collator("chatml", "chatml").encode([ANSWER, CHAT]))
    statistics = alignment_statistics(rows)
    assert statistics["span_tokens"] == statistics["source_span_tokens"] == 1
    spans = sum(max(row) + 1 for row in rows["spans"])
    assert statistics["align_ratio"] == spans / sum(label != -100 for row in rows["labels"] for label in row)


def test_ends_of_turns() -> None:
    def ids(student: str, source: str) -> tuple[int, int]:
        found = [tokenizer("chatml").convert_tokens_to_ids(student), tokenizer("gemma").convert_tokens_to_ids(source)]
        return found[0], found[1]

    assert end_of_turn_pair(collator()) == ids("<|im_end|>", "<end_of_turn>")
    assert end_of_turn_pair(collator(), conversational=False) == ids("<|im_end|>", "<|end|>")
    assert end_of_turn_pair(collator(source_prompt="chat")) == ids("<|im_end|>", "<end_of_turn>")
    assert end_of_turn_pair(collator("chatml", "llama")) is None  # a space stands before it
    plain = BridgeDataCollator(chat_tokenizer("byte_level"), tokenizer("gemma"), source_prompt="chat")
    assert end_of_turn_pair(plain) == (plain.tokenizer.eos_token_id, ids("", "<end_of_turn>")[1])


def test_mistakes() -> None:
    plain = chat_tokenizer("byte_level")
    with pytest.raises(ValueError, match="source's tokenizer has no chat template"):
        BridgeDataCollator(tokenizer("chatml"), plain, source_prompt="chat")
    with pytest.raises(ValueError, match="source's tokenizer has no chat template"):
        BridgeDataCollator(tokenizer("chatml"), plain).encode([CHAT])
    with pytest.raises(ValueError, match="student's tokenizer has no chat template"):
        BridgeDataCollator(plain, tokenizer("chatml")).encode([CHAT_ANSWER])
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        collator(max_length=1)
    with pytest.raises(ValueError, match="pad_to_multiple_of=0 must be at least 1"):
        collator(pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="source_prompt='chats' must be 'same' or 'chat'"):
        collator(source_prompt="chats")
    with pytest.raises(ValueError, match="'input_ids' already"):
        collator().encode([{"input_ids": [1], "labels": [1]}])
    with pytest.raises(ValueError, match="both be strings, or both lists"):
        collator().encode([CHAT_ANSWER | {"completion": "x"}])
    with pytest.raises(ValueError, match="dataset_text_field names another column"):
        collator().encode([{"body": "x"}])
    assert encode(collator(text_field="body"), {"body": TEXT["text"]}) == encode(collator(), TEXT)
    assert collator().source_max_length == 2048 and collator(max_length=None).source_max_length is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "Row 7: 'text' is None, of type NoneType; it must be a string"),
        ({"messages": None}, "Row 7: 'messages' is None.* must be a list of messages"),
        ({"prompt": 3, "completion": "x"}, "Row 7: 'prompt' is 3, of type int; it must be a string or a list of mes"),
        ({"text": "a \ud800"}, "Row 7: .*surrogates not allowed"),
        (CHAT | {"tools": [{"name": "f"}]}, "Row 7: The column 'tools' is not handed to the chat templates"),
        (CHAT_ANSWER | {"chat_template_kwargs": {"enable_thinking": True}}, "Row 7: .* 'chat_template_kwargs' is not"),
        ({"messages": [turn("user", "x")]}, "Row 7: A conversation in 'messages' has no assistant turn"),
    ],
)
def test_the_row_is_named(row: dict[str, Any], message: str) -> None:
    good = {name: {"text": "x", "prompt": "x", "completion": "y"}.get(name, CHAT.get(name)) for name in row}
    good |= {"prompt": CHAT_ANSWER["prompt"], "completion": CHAT_ANSWER["completion"]} if "completion" in row else {}
    with pytest.raises(ValueError, match=message):
        collator().encode([good, row], [3, 7])


def test_the_row_of_a_text_that_cannot_be_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = collator()
    encode_texts = made.encoders[1].encode

    def refuse(texts: list[str]) -> Any:
        if "odd" in texts:
            raise ValueError("it changes the text")
        return encode_texts(texts)

    monkeypatch.setattr(made.encoders[1], "encode", refuse)
    with pytest.raises(ValueError, match="Row 1: it changes the text"):
        made.encode([TEXT, {"text": "odd"}, TEXT])


def test_columns_of_options_may_be_empty() -> None:
    assert encode(collator(), CHAT | {"tools": None, "chat_template_kwargs": {}}) == encode(collator(), CHAT)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_a_model_cannot_read(side: int, prepared: bool) -> None:
    """A token without a row in the embeddings, or more tokens than positions; what just fits is taken."""
    row = encode(collator(), ANSWER)
    ids = row[("input_ids", "source_input_ids")[side]]
    given = [TEXT | {"text": "x"}, {"text": ANSWER["prompt"] + ANSWER["completion"]}]
    if prepared:
        given = [encode(collator(), one) for one in given]
    role = ("student", "source")[side]

    def limited(limits: Limits) -> BridgeDataCollator:
        both = [Limits(), Limits()]
        both[side] = limits
        return collator().within(*both)

    fits = Limits(max(ids) + 1, len(ids))
    assert all(torch.equal(value, collator()(given)[name]) for name, value in limited(fits)(given).items())
    for limits, message in (
        # BOS or EOS, which both rows have.
        (Limits(max(ids), None), rf"Row 0 has the token .* \({max(ids)}\), but the {role} has {max(ids)} tokens"),
        (Limits(None, len(ids) - 1), rf"Row 1 has {len(ids)} tokens of the {role}, which has {len(ids) - 1} pos"),
    ):
        with pytest.raises(ValueError, match=message):
            limited(limits)(given)


def test_batch_of_empty_texts() -> None:
    """At least two columns, of which the second can be predicted, also without BOS and EOS."""
    plain = copy.deepcopy(tokenizer("chatml"))
    plain.eos_token = None
    made = BridgeDataCollator(plain, plain)
    assert made.encode([{"text": ""}])["input_ids"] == [[]]
    batch = made([{"text": ""}])
    assert all(value.shape == (1, 2) for value in batch.values())
    assert (batch["labels"] == -100).all() and not batch["attention_mask"].any()
