"""Small tokenizers with chat templates that differ."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.tokenization.tokenizers import build


# As SmolLM2's, with a system message of its own.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Gemma's: no system message, contents without white space around them.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Llama-2's without system messages, which it drops.
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen3's: what the last answer is rendered with is left out of earlier ones.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + ('<think>\n\n</think>\n\n' if loop.last and "
    "m['role'] == 'assistant' else '') + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKERS = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    GEMMA: ["<start_of_turn>", "<end_of_turn>"],
    THINKING: ["<|im_start|>", "<|im_end|>"],
}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def chat_tokenizer(kind: str, template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """
    One of the small tokenizers, with a chat template.

    Args:
        kind (`str`): a name in `BUILDERS`.
        template (`str`, *optional*): whose markers become special tokens.
        bos (`bool`, *optional*, defaults to `False`): the tokenizer puts `<s>` in front of texts.
    """
    tokenizer = copy.deepcopy(build(kind))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["<s>", *MARKERS.get(template or "", [])], special_tokens=True)
    if bos:
        tokenizer.bos_token = "<s>"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        )
    if template in (CHATML, THINKING):
        tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template
    return tokenizer
