"""Multiple-choice accuracy of A-OKVQA: the prediction is the right choice's text, or its index, and nothing else."""

import datasets
import evaluate


_DESCRIPTION = """
Multiple-choice accuracy of A-OKVQA: the share of questions whose prediction is the text of the right choice, or its
index from 0. The whole prediction is compared, so one that names two choices, or a choice inside a sentence, is wrong.
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
    predictions (list of str): one answer a question, e.g. the text after `###`; surrounding space does not count.
        It names the choice whose text it is; failing that, the choice whose text it is up to case, if there is only
        one; failing that, the choice of that index ("0" for the first, as in the data; no letters, no brackets).
    references (list of dict): `choices` (list of str) and `correct_choice_idx` (int, from 0), as in the data. Where a
        text stands twice among the choices, either place is right if one is.
Returns:
    aokvqa_mc (float): share of right predictions.
    scores (list of float): 1.0 (right) or 0.0 (wrong) for each question, in order.
    n (int): number of questions.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/aokvqa_mc")
    >>> reference = {"choices": ["toothpick", "food", "cigarette", "straw"], "correct_choice_idx": 2}
    >>> metric.compute(predictions=["Cigarette", "2", "food or cigarette", "3"], references=[reference] * 4)
    {'aokvqa_mc': 0.5, 'scores': [1.0, 1.0, 0.0, 0.0], 'n': 4}
"""


def named_choice(prediction, choices):
    """The text of the one choice that the whole prediction is, or None.

    >>> named_choice("B", ["a", "b"]), named_choice("1", ["a", "b"]), named_choice("1", ["2", "1"])
    ('b', 'b', '1')
    >>> named_choice("ll", ["LL", "ll"]), named_choice("Ll", ["LL", "ll"]), named_choice("a b", ["a", "b"])
    ('ll', None, None)
    """
    prediction = prediction.strip()
    if not prediction:
        return None
    for same in (str, str.lower):
        named = {choice for choice in choices if same(choice) == same(prediction)}
        if len(named) == 1:
            return named.pop()
    by_index = {str(index): choice for index, choice in enumerate(choices)}
    return by_index.get(prediction)


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    for row, (prediction, reference) in enumerate(zip(predictions, references)):
        choices, correct = reference["choices"], reference["correct_choice_idx"]
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if not choices or None in choices:
            raise ValueError(f"row {row}: the choices are {choices}; give the texts that were shown")
        if correct is None or not 0 <= correct < len(choices):
            raise ValueError(
                f"row {row}: correct_choice_idx is {correct} for {len(choices)} choices; "
                f"give an index from 0 to {len(choices) - 1}"
            )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AokvqaMc(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "choices": datasets.Sequence(datasets.Value("string")),
                        "correct_choice_idx": datasets.Value("int64"),
                    },
                }
            ),
            homepage="https://github.com/allenai/aokvqa",
            reference_urls=["https://arxiv.org/abs/2206.01718"],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        scores = []
        for prediction, reference in zip(predictions, references):
            choices = [choice.strip() for choice in reference["choices"]]
            scores.append(float(named_choice(prediction, choices) == choices[reference["correct_choice_idx"]]))
        return {"aokvqa_mc": sum(scores) / len(scores), "scores": scores, "n": len(scores)}
