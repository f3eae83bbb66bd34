"""Texts for property-based tests: all of Unicode, and what tokenizers trip over."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.tokenization.tokenizers import END, TURN


FRAGMENTS = [
    "the cat", " sat", "It's", " 2024", "A", "caf\u00e9", "cafe\u0301", "\ufb01ne", "\u00bd", "\u2126", "\u212b",
    " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u3000", "\u200b", "\u2009",
    "\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f",
    "\ud55c\uad6d\uc5b4", "\u1112\u1161\u11ab", "\u4f60\u597d",
    "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0e01\u0e33", "\u0928\u093f", "a\u0323\u0301", "\u0301", "\u1e9b\u0323", "\u0130", "\u00df",
    "\x00", "\x07", "\x7f", "\x85", "\ufeff", "\ufffd", "\u200e", "\U0010ffff",
    "\u2581", "\u2581the", "<0x41>", "<0xE4>", "##ing", "\u0120the", "\u010a",
    END, TURN, "<unk>", "[UNK]", "<tool>", " <mask>", "</s>", "<",
]  # fmt: skip

TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=6).map("".join),
)
