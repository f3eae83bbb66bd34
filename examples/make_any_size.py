"""
One chain, several sizes: make models between the anchors and generate with each. No training.

    python examples/make_any_size.py my-chain 90e6 110e6

Without sizes: three, evenly spaced between the chain's smallest and largest anchor.
"""

import argparse
import time

from cbd_hf import CBDModel, DistillationChain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", help="directory or Hub id of a chain")
    parser.add_argument("sizes", nargs="*", type=float, help="numbers of parameters, such as 110e6")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()

    chain = DistillationChain.from_pretrained(args.chain)
    tokenizer = chain.load_tokenizer()
    largest, smallest = chain.sizes[0], chain.sizes[-1]
    for size in args.sizes or [smallest + share * (largest - smallest) for share in (0.25, 0.5, 0.75)]:
        started = time.perf_counter()
        model = CBDModel.from_chain(chain, n_params=size)  # a stock model of the chain's own class
        seconds = time.perf_counter() - started
        # How it was made is in its config: the two anchors and the weight of the smaller one.
        print(f"\n{model.num_parameters():,} parameters in {seconds:.2f} s: {model.config.cbd}")
        inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
