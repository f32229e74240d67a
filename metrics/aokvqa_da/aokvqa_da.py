"""Direct-answer accuracy of A-OKVQA: min(1, matches / 3) over ten answers, difficult questions left out."""

import datasets
import evaluate


_DESCRIPTION = """
Direct-answer accuracy of A-OKVQA: the mean of min(1, matches / 3), where matches counts the answers people gave that
are equal to the prediction, letter by letter. Nothing is normalised. Questions marked `difficult_direct_answer` are
left out and counted.
"""

_CITATION = """
@inproceedings{schwenk2022aokvqa,
  title = {{A-OKVQA}: A Benchmark for Visual Question Answering using World Knowledge},
  author = {Schwenk, Dustin and Khandelwal, Apoorv and Clark, Christopher and Marino, Kenneth and Mottaghi, Roozbeh},
  booktitle = {European Conference on Computer Vision},
  year = {2022}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one answer a question, e.g. the text after `###`.
    references (list of dict): `direct_answers` (list of str, ten in the data) and `difficult_direct_answer` (bool),
        as in the data.
Returns:
    aokvqa_da (float): mean score of the questions that count, from 0 to 1.
    scores (list of float): the score of each question that counts, in order.
    n (int): number of questions that count.
    rows (list of int): where each score comes from: its position in the predictions.
    excluded (int): number of questions left out as difficult.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/aokvqa_da")
    >>> reference = {"direct_answers": ["kite"] * 3 + ["bird"] * 7, "difficult_direct_answer": False}
    >>> difficult = {"direct_answers": ["wind"] * 10, "difficult_direct_answer": True}
    >>> metric.compute(predictions=["kite", "wind", "Kite"], references=[reference, difficult, reference])
    {'aokvqa_da': 0.5, 'scores': [1.0, 0.0], 'n': 2, 'rows': [0, 2], 'excluded': 1}
"""


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    for row, (prediction, reference) in enumerate(zip(predictions, references)):
        answers, difficult = reference["direct_answers"], reference["difficult_direct_answer"]
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if difficult is None:
            raise ValueError(f"row {row}: difficult_direct_answer is None; give True or False, as the data does")
        if not difficult and (not answers or None in answers):
            raise ValueError(f"row {row}: direct_answers is {answers}; give one or more answers or leave the row out")
    if all(reference["difficult_direct_answer"] for reference in references):
        raise ValueError(
            f"no rows to score: all {len(references)} are marked difficult_direct_answer; add one that is not"
        )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AokvqaDa(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "direct_answers": datasets.Sequence(datasets.Value("string")),
                        "difficult_direct_answer": datasets.Value("bool"),
                    },
                }
            ),
            homepage="https://github.com/allenai/aokvqa",
            reference_urls=["https://arxiv.org/abs/2206.01718"],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        rows = [row for row, reference in enumerate(references) if not reference["difficult_direct_answer"]]
        scores = [min(1.0, references[row]["direct_answers"].count(predictions[row]) / 3) for row in rows]
        return {
            "aokvqa_da": sum(scores) / len(scores),
            "scores": scores,
            "n": len(scores),
            "rows": rows,
            "excluded": len(references) - len(rows),
        }
