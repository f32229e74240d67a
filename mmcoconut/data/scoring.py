"""The metric of each data set, and the references that each metric takes from the rows."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import mmcoconut
from mmcoconut.data import nearest


def correct_choice(row: Mapping) -> dict:
    """Return the row in the format of `aokvqa_mc`.

    Raises:
        ValueError: the answer of a row is none of its choices.
    """
    choices, answer = row["choices"], row["answers"][0]
    if answer not in choices:
        raise ValueError(
            f"{row['row_id']}: the answer {answer!r} is none of the choices {choices}. Use another metric than "
            "aokvqa_mc, or correct the row."
        )
    return {"choices": choices, "correct_choice_idx": choices.index(answer)}


# Metrics in metrics/, and the reference that each takes from a row.
REFERENCES = {
    # Rows have no mark of difficult questions: the loader drops them (skip_difficult).
    # Generated answers come without surrounding space, and are compared character by character.
    "aokvqa_da": lambda row: {
        "direct_answers": [answer.strip() for answer in row["answers"]],
        "difficult_direct_answer": False,
    },
    "aokvqa_mc": correct_choice,
    "captions": lambda row: row["answers"],
    "exact_match": lambda row: row["answers"],
    "medical_vqa": lambda row: row["answers"][0],
    "numeric_answer": lambda row: row["answers"][0],
    "pair_accuracy": lambda row: {"answers": row["answers"], "pair": row.get("pair", "")},
    "vqa_accuracy": lambda row: row["answers"],
}
# These also score a row by another row's answer, so they cannot be rewards.
OF_SEVERAL_ROWS = ("pair_accuracy",)
# These read the whole generated text, not the answer after `###`.
READ_WHOLE_TEXT = ("numeric_answer",)
METRIC_OF_DATASET = {
    "flickr30k": "captions",
    "gsm8k_aug": "numeric_answer",
    "mmvp": "pair_accuracy",
    "path_vqa": "medical_vqa",
    "vqa_rad": "medical_vqa",
    "vqav2": "vqa_accuracy",
}


def default_metric(dataset: str, row: Mapping) -> str:
    """Return the default metric of a data set in `mmcoconut.data.DATASETS`, given one of its rows."""
    if dataset == "aokvqa":
        return "aokvqa_mc" if row["choices"] else "aokvqa_da"
    return METRIC_OF_DATASET.get(dataset, "exact_match")


def metric_folder(name: str) -> Path:
    """Return the folder of a metric's module: in the repository's metrics/, or in the installed package.

    Raises:
        ValueError: an unknown name.
    """
    if name not in REFERENCES:
        raise ValueError(f"unknown metric {name!r}; {nearest(name, REFERENCES)}")
    return next(folder for root in mmcoconut.__path__ if (folder := Path(root, "metrics", name)).is_dir())


@functools.cache
def load_metric(name: str):
    """Return the `evaluate.EvaluationModule` of a metric."""
    import evaluate  # here, because it imports all of transformers' pipelines

    return evaluate.load(str(metric_folder(name)), keep_in_memory=True)


def references_of(name: str, rows: Iterable[Mapping]) -> list:
    """Return a metric's references; raise ValueError for a row that it cannot score."""
    return [REFERENCES[name](row) for row in rows]


def score(name: str, outputs: Sequence[str], answers: Sequence[str], *, rows: Sequence[Mapping]) -> dict:
    """Return a metric's results for generated texts and the answers in them, each (n,); `scores` is (n,)."""
    predictions = outputs if name in READ_WHOLE_TEXT else answers
    return load_metric(name).compute(predictions=list(predictions), references=references_of(name, rows))


def figures_of(results: Mapping) -> dict[str, float]:
    """Return the figures of a metric for all rows together, by name; a mean over no rows (None) is left out.

    >>> figures_of({"medical_vqa": 0.5, "scores": [1.0, 0.0], "n": 2, "yes_no_accuracy": 0.5, "open_f1": None})
    {'medical_vqa': 0.5, 'n': 2, 'yes_no_accuracy': 0.5}
    """
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def commonest_answer(rows: Sequence[Mapping], metric: str) -> tuple[str, float]:
    """Return the most common gold answer, and the accuracy of always giving it."""
    answer, _ = Counter(text for row in rows for text in dict.fromkeys(row["answers"])).most_common(1)[0]
    always = [answer] * len(rows)
    scores = score(metric, always, always, rows=rows)["scores"]
    return answer, sum(scores) / len(scores)
