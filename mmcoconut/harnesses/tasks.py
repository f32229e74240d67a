"""What task files name: the rows of a data set, what a model is asked about one, and the data set's own metric.

The question is the one that the model is trained on and that `python -m mmcoconut.evaluation` asks, pictures first;
the score is that of the metric in metrics/, computed over all rows at once, so that pairs and captions count too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from PIL import Image

from mmcoconut.chat_template_mmcoconut import parse_answer
from mmcoconut.data import load_examples, question_text
from mmcoconut.data.images import open_images
from mmcoconut.data.scoring import default_metric, score
from mmcoconut.errors import UsageError


IMAGE_PLACEHOLDER = "<image>"  # which lm-eval looks for in a text, whatever the model's own is
SPLIT = "test"
NOT_SCORED = ("images", "boxes", "helper_image", "dataset")
NEW_TOKENS = 64  # where a task does not say how many
# What else of a task's generation_kwargs goes to `generate`; `until` is applied to the text.
PASSED_ON = ("do_sample", "num_beams", "temperature", "top_p")


def load(dataset: str, **metadata: Any) -> dict[str, Dataset]:
    """Return the rows of a data set, with its name in a column, under `test`.

    metadata: what `--metadata` gives; its entry of the data set's name holds the options of its `load`, as in
        `{"mmvp": {"folder": "data/mmvp"}}`, and `split` where that is not `test`. Entries for other data sets, and
        what else a program adds, are ignored.

    Raises:
        UsageError: no such entry, or another mistake in the options.
    """
    options = metadata.get(dataset)
    if not isinstance(options, Mapping):
        raise UsageError(
            f"the task of {dataset} was given {sorted(metadata)} and no options of its data; pass them, such as "
            f'--metadata \'{{"{dataset}": {{"folder": "…"}}}}\''
        )
    rows = load_examples(dataset, **{"split": SPLIT, **options})
    return {SPLIT: rows.add_column("dataset", [dataset] * len(rows))}


def images_of(doc: Mapping) -> list[Image.Image]:
    """Return the pictures of a row, upright and RGB."""
    return open_images(doc)


def text_of(doc: Mapping) -> str:
    """Return the question of a row behind a placeholder for each of its pictures."""
    return IMAGE_PLACEHOLDER * len(doc["images"]) + question_text(doc)


def target_of(doc: Mapping) -> str:
    """Return the first accepted answer, which no model is shown."""
    return doc["answers"][0]


def outcome_of(doc: Mapping, results: Sequence[str]) -> dict[str, dict]:
    """Return a row without pictures, and what was written for it, under `score`, which `mean_score` reads."""
    row = {name: value for name, value in doc.items() if name not in NOT_SCORED}
    return {"score": {"dataset": doc["dataset"], "row": row, "output": results[0]}}


def mean_score(outcomes: Sequence[Mapping]) -> float:
    """Return what the metric of the rows' data set gives for all outcomes together, each of `outcome_of`."""
    rows, outputs = [outcome["row"] for outcome in outcomes], [outcome["output"] for outcome in outcomes]
    metric = default_metric(outcomes[0]["dataset"], rows[0])
    return score(metric, outputs, [parse_answer(output) for output in outputs], rows=rows)[metric]


def generation_options(task_options: dict) -> tuple[dict, list[str]]:
    """Return the options of `generate` in generation_kwargs of lmms-eval, and the texts that end an answer.

    >>> generation_options({"max_new_tokens": 16, "temperature": 0, "top_p": None, "until": "\\n"})
    ({'do_sample': False, 'max_new_tokens': 16}, ['\\n'])
    """
    until = task_options.get("until") or []
    options = {name: task_options[name] for name in PASSED_ON if task_options.get(name) is not None}
    if not options.setdefault("do_sample", options.get("temperature", 0) > 0):
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
    options["max_new_tokens"] = task_options.get("max_new_tokens", NEW_TOKENS)
    return options, [until] if isinstance(until, str) else list(until)
