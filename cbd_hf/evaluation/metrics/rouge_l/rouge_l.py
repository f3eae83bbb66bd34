"""Rouge-L by the published instruction-following protocol, as a metric module of `evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from rouge_score import rouge_scorer


_DESCRIPTION = """
Rouge-L F-measure with stemming, times 100; of several references the best one counts; mean over the predictions.
"""

_CITATION = """
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    url = "https://aclanthology.org/W04-1013",
}
"""

_INPUTS = """
Args:
    predictions: list of strings.
    references: list of strings, or list of lists of strings where several answers are right.
Returns:
    rouge_l: mean score between 0 and 100.
    scores: score of each prediction (only with `use_aggregator=False`).
Examples:
    >>> rouge_l = evaluate.load("cbd_hf/evaluation/metrics/rouge_l")
    >>> rouge_l.compute(predictions=["the cat sat"], references=[["a dog ran", "the cats sat"]])
    {'rouge_l': 100.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class RougeL(evaluate.Metric):
    """Best Rouge-L over the references, mean over the predictions, 0 to 100."""

    def _info(self) -> evaluate.MetricInfo:
        prediction, reference = datasets.Value("string"), datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": prediction, "references": datasets.Sequence(reference)}),
                datasets.Features({"predictions": prediction, "references": reference}),
            ],
            reference_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(
        self, predictions: list[str], references: list[str] | list[list[str]], use_aggregator: bool = True
    ) -> dict[str, Any]:
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        scores = []
        for prediction, accepted in zip(predictions, references, strict=True):
            answers = [accepted] if isinstance(accepted, str) else accepted
            # score_multi keeps, for each rouge type, the reference with the best F-measure.
            scores.append(100.0 * scorer.score_multi(answers, prediction)["rougeL"].fmeasure)
        result: dict[str, Any] = {"rouge_l": sum(scores) / len(scores)}
        return result if use_aggregator else {**result, "scores": scores}
