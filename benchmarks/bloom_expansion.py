"""
Logit error of expanding a BLOOM-like model, whose embedding norm writes the stream, by the spread of that norm's gain.

    python benchmarks/bloom_expansion.py

A random model of 3 layers, 4 heads and 64 channels in float64 is expanded to 5, 6 and 8 heads. Errors are the largest
difference of any logit, in units of the logits' standard deviation. With a uniform gain expansion is exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, BloomConfig

from cbd_hf.families import get_family
from cbd_hf.families.modules import observe
from cbd_hf.families.proof import bench, expansion_error, random_model
from cbd_hf.layout import shape_of


SPREADS = (0.0, 0.02, 0.05, 0.1, 0.2)
HEADS = (5, 6, 8)


def main() -> None:
    config = BloomConfig(hidden_size=64, n_head=4, n_layer=3, vocab_size=96)
    family, shape = get_family(config), shape_of(config, get_family(config))
    seen = observe(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), shape.layers)
    print("deviation of the gain  " + "  ".join(f"64 -> {16 * heads:<4}" for heads in HEADS))
    for spread in SPREADS:
        model = random_model(config, seen.norms, seen.stream_norms, torch.float64)
        noise = torch.randn(64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        with torch.no_grad():
            model.transformer.word_embeddings_layernorm.weight.copy_(1 + spread * noise)
        start = bench(model)
        errors = [
            expansion_error(start, family, replace(shape, heads=n, kv_heads=n, hidden=n * 16, ffn=n * 64))
            for n in HEADS
        ]
        print(f"{spread:>21}  " + "  ".join(f"{error:<10.2g}" for error in errors))


if __name__ == "__main__":
    main()
