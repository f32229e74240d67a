"""Pair accuracy of MMVP: a pair of questions is right where both answers are, up to case and surrounding space."""

from collections import Counter

import datasets
import evaluate


_DESCRIPTION = """
The share of pairs whose two answers are both right. A prediction is right where it is one of the gold answers, up to
case and surrounding space. MMVP asks the same question about two pictures that look alike to CLIP and have different
answers, so that an answer given without a look at the picture makes no pair right.
"""

_CITATION = """
@inproceedings{tong2024eyes,
  title = {Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal {LLM}s},
  author = {Tong, Shengbang and Liu, Zhuang and Zhai, Yuexiang and Ma, Yi and LeCun, Yann and Xie, Saining},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one answer a question, e.g. the text after `###`. An empty answer is wrong.
    references (list of dict): `answers` (list of str), every accepted answer of the question, at least one, and `pair`
        (str), which exactly two questions share, wherever they are in the list.
Returns:
    pair_accuracy (float): share of pairs with two right answers.
    question_accuracy (float): share of right answers.
    scores (list of float): 1.0 for both questions of a pair with two right answers, else 0.0, in order.
    n (int): number of questions, twice that of pairs.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/pair_accuracy")
    >>> references = [{"answers": [answer], "pair": pair} for pair in ("1", "2") for answer in ("open", "closed")]
    >>> metric.compute(predictions=["Open", "closed", "open", "open"], references=references)
    {'pair_accuracy': 0.5, 'question_accuracy': 0.75, 'scores': [1.0, 1.0, 0.0, 0.0], 'n': 4}
"""


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    sizes = Counter(reference["pair"] for reference in references)
    for row, (prediction, reference) in enumerate(zip(predictions, references)):
        gold, pair = reference["answers"], reference["pair"]
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if not gold or None in gold or not all(answer.strip() for answer in gold):
            raise ValueError(f"row {row}: the answers are {gold}; give one or more answers, none of them empty")
        if not pair or sizes[pair] != 2:
            raise ValueError(
                f"row {row}: the pair is {pair!r}, which {sizes[pair]} rows share; give both rows of each pair and no "
                "others (an even number of rows), or score the questions alone by exact_match"
            )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PairAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "answers": datasets.Sequence(datasets.Value("string")),
                        "pair": datasets.Value("string"),
                    },
                }
            ),
            homepage="https://github.com/tsb0601/MMVP",
            reference_urls=["https://arxiv.org/abs/2401.06209"],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        golds = [{answer.strip().lower() for answer in reference["answers"]} for reference in references]
        right = [prediction.strip().lower() in gold for prediction, gold in zip(predictions, golds)]
        counts = Counter(reference["pair"] for reference, is_right in zip(references, right) if is_right)
        scores = [float(counts[reference["pair"]] == 2) for reference in references]
        return {
            "pair_accuracy": sum(scores) / len(scores),
            "question_accuracy": sum(right) / len(right),
            "scores": scores,
            "n": len(scores),
        }
