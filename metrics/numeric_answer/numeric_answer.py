"""Numeric accuracy of written-out answers: the number after the last `###` is equal to the gold number."""

import decimal
import re

import datasets
import evaluate


_DESCRIPTION = """
Numeric accuracy: the share of predictions whose text after the last `###` is a number equal to the gold one (GSM8k and
data sets in its format; `####` works as well). Commas, a currency sign, a percent sign and a trailing period do not
count, and decimals are compared by value: 3 is 3.0. A prediction without `###` is wrong, and so is one with anything
else beside the number, a second number included.
"""

_CITATION = """
@article{cobbe2021training,
  title = {Training Verifiers to Solve Math Word Problems},
  author = {Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo and Kaiser, Lukasz
    and Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and Nakano, Reiichiro and Hesse, Christopher
    and Schulman, John},
  journal = {arXiv preprint arXiv:2110.14168},
  year = {2021}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the whole text written for each question, `###` included.
    references (list of str): the gold number of each question, alone or as a solution that ends in `### number`.
Returns:
    numeric_answer (float): share of right predictions.
    scores (list of float): 1.0 (right) or 0.0 (wrong) for each question, in order.
    n (int): number of questions.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/numeric_answer")
    >>> metric.compute(
    ...     predictions=["2 * 600 = 1200 ### $1,200.00", "### 3.", "1200", "### 12 or 13"],
    ...     references=["1200", "3.0", "1200", "12"],
    ... )
    {'numeric_answer': 0.5, 'scores': [1.0, 1.0, 0.0, 0.0], 'n': 4}
"""

_MARKER = "###"
_NUMBER = re.compile(r"([-+]?)\s*[$€£¥]?\s*([-+]?)([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*[%$€£¥]?\s*\.?")


def read_number(text):
    """The number that the whole text is, or None.

    >>> read_number("-$1,234.50"), read_number("50 %."), read_number("12 apples")
    (Decimal('-1234.50'), Decimal('50'), None)
    """
    found = _NUMBER.fullmatch(text.replace(",", "").strip())
    if found is None or (found[1] and found[2]):
        return None
    return decimal.Decimal(found[1] + found[2] + found[3])


def is_right(prediction, gold):
    """Return True if the text after the last marker is a number, and equal to `gold`."""
    _, marker, answer = prediction.rpartition(_MARKER)
    return bool(marker) and read_number(answer) == gold


def read_gold(references):
    """The gold numbers; ValueError, with the row and what to do, for a reference that is not one."""
    gold = []
    for row, reference in enumerate(references):
        number = None if reference is None else read_number(reference.rpartition(_MARKER)[2])
        if number is None:
            raise ValueError(
                f"row {row}: the reference is {reference!r}; give a number, or a text that ends in '{_MARKER} number'"
            )
        gold.append(number)
    return gold


def check_predictions(predictions):
    """Raises ValueError, with the row and what to do, for predictions that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    if None in predictions:
        row = predictions.index(None)
        raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class NumericAnswer(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2110.14168"],
        )

    def _compute(self, predictions, references):
        check_predictions(predictions)
        gold = read_gold(references)
        scores = [float(is_right(prediction, number)) for prediction, number in zip(predictions, gold)]
        return {"numeric_answer": sum(scores) / len(scores), "scores": scores, "n": len(scores)}
