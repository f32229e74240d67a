"""Exact match: the prediction is one of the gold answers, up to case and surrounding space."""

import datasets
import evaluate


_DESCRIPTION = """
The share of questions whose prediction equals one of the gold answers, up to case and surrounding space;
unlike SQuAD's, without any other normalisation.
"""

_CITATION = """
@inproceedings{rajpurkar2016squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2016}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one answer a question, e.g. the text after `###`. An empty answer is wrong.
    references (list of list of str): every accepted answer of each question, at least one.
Returns:
    exact_match (float): share of right predictions.
    scores (list of float): 1.0 (right) or 0.0 (wrong) for each question, in order.
    n (int): number of questions.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/exact_match")
    >>> metric.compute(
    ...     predictions=["Red ", "red or blue", ""],
    ...     references=[["red"], ["red", "blue"], ["red"]],
    ... )
    {'exact_match': 0.3333333333333333, 'scores': [1.0, 0.0, 0.0], 'n': 3}
"""


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    for row, (prediction, gold) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if not gold or None in gold or not all(answer.strip() for answer in gold):
            raise ValueError(f"row {row}: the references are {gold}; give one or more answers, none of them empty")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/1606.05250"],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        golds = [{answer.strip().lower() for answer in gold} for gold in references]
        scores = [float(prediction.strip().lower() in gold) for prediction, gold in zip(predictions, golds)]
        return {"exact_match": sum(scores) / len(scores), "scores": scores, "n": len(scores)}
