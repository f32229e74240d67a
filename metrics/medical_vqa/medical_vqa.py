"""Accuracy on PathVQA and VQA-RAD: yes/no questions apart from open ones, these by exact match and by token F1."""

import collections
import re
import string

import datasets
import evaluate


_DESCRIPTION = """
Accuracy on medical visual questions with one gold answer (PathVQA, VQA-RAD). A question whose gold answer is yes or no
is a yes/no question; every other one is open. Yes/no questions are scored by exact match, open ones by exact match and
by token F1, all after the normalisation of SQuAD (case, punctuation, articles, white space).
"""

_CITATION = """
@article{he2020pathvqa,
  title = {{PathVQA}: 30000+ Questions for Medical Visual Question Answering},
  author = {He, Xuehai and Zhang, Yichen and Mou, Luntian and Xing, Eric and Xie, Pengtao},
  journal = {arXiv preprint arXiv:2003.10286},
  year = {2020}
}
@article{lau2018dataset,
  title = {A dataset of clinically generated visual questions and answers about radiology images},
  author = {Lau, Jason J. and Gayen, Soumya and Ben Abacha, Asma and Demner-Fushman, Dina},
  journal = {Scientific Data},
  volume = {5},
  year = {2018}
}
@inproceedings{rajpurkar2016squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2016}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): one answer a question, e.g. the text after `###`. An empty answer scores 0.
    references (list of str): the gold answer of each question.
Returns:
    medical_vqa (float): share of exact matches over all questions.
    scores (list of float): 1.0 (exact match) or 0.0 for each question, in order.
    n (int): number of questions.
    yes_no_accuracy (float): share of exact matches over the yes/no questions; None if there are none.
    n_yes_no (int): number of yes/no questions.
    open_exact_match (float): share of exact matches over the open questions; None if there are none.
    open_f1 (float): mean token F1 over the open questions; None if there are none.
    n_open (int): number of open questions.
    f1_scores (list of float): token F1 of each question, in order.
    is_yes_no (list of bool): whether each question is a yes/no question, in order.
Examples:

    >>> import evaluate
    >>> metric = evaluate.load("metrics/medical_vqa")
    >>> results = metric.compute(
    ...     predictions=["Yes.", "yes", "the liver", "left lower lobe"],
    ...     references=["yes", "no", "liver", "right lower lobe"],
    ... )
    >>> results["medical_vqa"], results["scores"], results["n"]
    (0.5, [1.0, 0.0, 1.0, 0.0], 4)
    >>> results["yes_no_accuracy"], results["open_exact_match"], round(results["open_f1"], 4)
    (0.5, 0.5, 0.8333)
"""


def answer_tokens(text):
    """Words after the normalisation of SQuAD; where that leaves none ("A", "+"), the words as they stand, lower case.

    >>> answer_tokens("The Liver, left-sided."), answer_tokens("A")
    (['liver', 'leftsided'], ['a'])
    """
    lowered = text.lower()
    unmarked = "".join(letter for letter in lowered if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", unmarked).split() or lowered.split()


def token_f1(prediction, gold):
    """2 * common / (number of predicted tokens + number of gold tokens): the harmonic mean of precision and recall.

    >>> token_f1(["left", "lobe"], ["left", "lower", "lobe"]), token_f1([], ["lobe"])
    (0.8, 0.0)
    """
    common = sum((collections.Counter(prediction) & collections.Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold))


def check_rows(predictions, references):
    """Raises ValueError, with the row and what to do, for rows that cannot be scored."""
    if not predictions:
        raise ValueError("no rows to score; add at least one prediction with its reference")
    for row, (prediction, gold) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"row {row}: the prediction is None; give '' where the model gave no answer")
        if gold is None or not gold.strip():
            raise ValueError(f"row {row}: the reference is {gold!r}; give the gold answer or leave the row out")


def mean(values):
    """The mean, or None of no values."""
    return sum(values) / len(values) if values else None


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MedicalVqa(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2003.10286", "https://doi.org/10.1038/sdata.2018.251"],
        )

    def _compute(self, predictions, references):
        check_rows(predictions, references)
        pairs = [(answer_tokens(text), answer_tokens(gold)) for text, gold in zip(predictions, references)]
        scores = [float(prediction == gold) for prediction, gold in pairs]
        f1_scores = [token_f1(prediction, gold) for prediction, gold in pairs]
        is_yes_no = [gold in (["yes"], ["no"]) for _, gold in pairs]
        return {
            "medical_vqa": mean(scores),
            "scores": scores,
            "n": len(scores),
            "yes_no_accuracy": mean([score for score, closed in zip(scores, is_yes_no) if closed]),
            "n_yes_no": sum(is_yes_no),
            "open_exact_match": mean([score for score, closed in zip(scores, is_yes_no) if not closed]),
            "open_f1": mean([score for score, closed in zip(f1_scores, is_yes_no) if not closed]),
            "n_open": len(scores) - sum(is_yes_no),
            "f1_scores": f1_scores,
            "is_yes_no": is_yes_no,
        }
