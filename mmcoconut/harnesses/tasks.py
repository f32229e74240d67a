"""Functions that task files name: the rows of a data set, the prompt of a row, and the data set's own metric.

The question is the same as in training and in `python -m mmcoconut.evaluation`, pictures first; the
score is that of the metric in metrics/, computed over all rows at once, so that pairs and captions count too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER, parse_answer
from mmcoconut.data import image_counts, load_examples, question_text
from mmcoconut.data.images import open_images
from mmcoconut.data.scoring import default_metric, score
from mmcoconut.errors import UsageError


IMAGE_PLACEHOLDER = "<image>"  # lm-eval looks for it in a text, regardless of the model's own
SPLIT = "test"
NOT_SCORED = ("images", "boxes", "helper_image", "dataset", "end")
NEW_TOKENS = 64  # if a task sets no number
# Other generation_kwargs of a task that are passed to `generate`; `until` is applied to the text.
PASSED_ON = ("do_sample", "num_beams", "temperature", "top_p")


def load(dataset: str, **metadata: Any) -> dict[str, Dataset]:
    """Return the rows of a data set, with its name in a column, under `test`.

    metadata: value of `--metadata`; its entry for the data set holds the options of its `load`, as in
        `{"mmvp": {"folder": "data/mmvp"}}`, and `split` if that is not `test`. Entries for other data sets, and
        other entries of a program, are ignored.

    Raises:
        UsageError: no such entry, or an invalid option.
    """
    options = metadata.get(dataset)
    if not isinstance(options, Mapping):
        raise UsageError(
            f"the task of {dataset} got the metadata {sorted(metadata)}, without options of its data; set them: "
            f'--metadata \'{{"{dataset}": {{"folder": "…"}}}}\''
        )
    rows = load_examples(dataset, **{"split": SPLIT, **options})
    return {SPLIT: rows.add_column("dataset", [dataset] * len(rows))}


def load_choices(dataset: str, pretrained: str, **metadata: Any) -> dict[str, Dataset]:
    """Return the rows of `load` with the end-of-text token of a checkpoint in the column `end`, for likelihoods.

    pretrained: folder or Hub id; lm-eval adds its `--model_args` to the metadata.

    Raises:
        UsageError: a row has pictures, for which lm-eval computes no likelihoods, or no choices.
    """
    rows = load(dataset, **metadata)[SPLIT]
    for row_id, num_images, choices in zip(rows["row_id"], image_counts(rows), rows["choices"]):
        if num_images:
            raise UsageError(
                f"{row_id} has {num_images} pictures, for which lm-eval computes no likelihoods: use "
                "`mmcoconut eval --score_by likelihood`"
            )
        if not choices:
            raise UsageError(f"{row_id} has no choices to compare: use the task mmcoconut_{dataset}, which generates")
    loading = {name: metadata[name] for name in ("revision", "trust_remote_code") if name in metadata}
    end = AutoTokenizer.from_pretrained(pretrained, **loading).eos_token
    return {SPLIT: rows.add_column("end", [end] * len(rows))}


def images_of(doc: Mapping) -> list[Image.Image]:
    """Return the pictures of a row, upright and RGB."""
    return open_images(doc)


def text_of(doc: Mapping) -> str:
    """Return the question of a row after one placeholder per picture."""
    return IMAGE_PLACEHOLDER * len(doc["images"]) + question_text(doc)


def target_of(doc: Mapping) -> str:
    """Return the first accepted answer, which is not shown to the model."""
    return doc["answers"][0]


def choices_of(doc: Mapping) -> list[str]:
    """Return the compared texts, one per choice, each ended as in training; for rows of `load_choices`."""
    return [f"{ANSWER_MARKER} {choice}{doc['end']}" for choice in doc["choices"]]


def chosen_outcome_of(doc: Mapping, results: Sequence[tuple[float, bool]]) -> dict[str, dict]:
    """Return `outcome_of` the choice with the largest log-probability; each result begins with one."""
    log_probs = [result[0] for result in results]
    return outcome_of(doc, [f"{ANSWER_MARKER} {doc['choices'][log_probs.index(max(log_probs))]}"])


def outcome_of(doc: Mapping, results: Sequence[str]) -> dict[str, dict]:
    """Return a row without pictures, with its output, under `score`, which `mean_score` reads."""
    row = {name: value for name, value in doc.items() if name not in NOT_SCORED}
    return {"score": {"dataset": doc["dataset"], "row": row, "output": results[0]}}


def mean_score(outcomes: Sequence[Mapping]) -> float:
    """Return the result of the data set's metric for all outcomes together, each from `outcome_of`."""
    rows, outputs = [outcome["row"] for outcome in outcomes], [outcome["output"] for outcome in outcomes]
    metric = default_metric(outcomes[0]["dataset"], rows[0])
    return score(metric, outputs, [parse_answer(output) for output in outputs], rows=rows)[metric]


def generation_options(task_options: dict) -> tuple[dict, list[str]]:
    """Return the `generate` options in lmms-eval's generation_kwargs, and the texts that end an answer.

    >>> generation_options({"max_new_tokens": 16, "temperature": 0, "top_p": None, "until": "\\n"})
    ({'do_sample': False, 'max_new_tokens': 16}, ['\\n'])
    """
    until = task_options.get("until") or []
    options = {name: task_options[name] for name in PASSED_ON if task_options.get(name) is not None}
    if not options.setdefault("do_sample", options.get("temperature", 0) > 0):
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
    options["max_new_tokens"] = task_options.get("max_new_tokens", NEW_TOKENS)
    return options, [until] if isinstance(until, str) else list(until)
