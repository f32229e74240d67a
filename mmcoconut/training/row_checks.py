"""Check every row before the first update: its tokens at each stage, its alignment text, its own answer by the metric.

Without this check, a mistake in a data file or recipe ends a run only when its stage begins or its split is evaluated.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from datasets import Dataset

from mmcoconut.chat_template_mmcoconut import ANSWER_MARKER, parse_answer
from mmcoconut.data import image_counts, without_pictures
from mmcoconut.data.scoring import REFERENCES, score
from mmcoconut.errors import UsageError
from mmcoconut.objectives.base import Objective
from mmcoconut.progress import progress
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.grouping import token_counts


logger = logging.getLogger("mmcoconut")

LONG = 5.0  # seconds; longer checks are logged with their duration
SCORED = ["question", "choices", "steps", "answers", "row_id"]
ANSWER_LINE = re.compile(rf"^{ANSWER_MARKER}", re.MULTILINE)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Log the duration of the block if it is long."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if seconds > LONG:
        logger.info("%s took %.0f s", what, seconds)


def check_lengths(rows: Dataset, collator: CurriculumCollator, *, room: int = 0) -> None:
    """Check that every row fits into the language model at every stage; pictures are decoded only if necessary.

    Args:
        room: maximum new tokens after a prompt; 0 for rows that are never generated from.

    Raises:
        ValueError: a row that takes more than `collator.max_length` tokens, or whose turns cannot be laid out.
    """
    pairs = progress(zip(without_pictures(rows), image_counts(rows), strict=True), total=len(rows), desc="row checks")
    for index, (row, num_images) in enumerate(pairs):
        collator.check_turns(row)
        if collator.max_length is not None:
            length, form = collator.measure(row, num_images, lambda index=index: rows[index], room=room)
            collator.check_length(row, length, form)


def check_alignment_texts(rows: Dataset, collator: CurriculumCollator) -> None:
    """Check that every row with pictures has an alignment text that the text encoder can read.

    Raises:
        ValueError: a row without such a text, or with one that is too long.
    """
    if collator.alignment is None:
        return
    counts = zip(without_pictures(rows), image_counts(rows), strict=True)
    texts = [(row["row_id"], collator.alignment.text(row)) for row, num_images in counts if num_images]
    lengths = token_counts(collator.processor.tokenizer, [text for _, text in texts], add_special_tokens=True)
    for row_id, text in texts:
        if collator.max_length is not None and lengths[text] > collator.max_length:
            raise UsageError(
                f"{row_id}: its alignment text takes {lengths[text]} tokens. The maximum of the language model, "
                f"or max_length, is {collator.max_length}. Set alignment_target to a shorter text."
            )


def check_objectives(rows: Dataset, objectives: Sequence[Objective], processor) -> None:
    """Check that rows have the fields that the objectives need.

    A row without steps or boxes has no target for a thought: its loss is 0. Only a split in which no row has a target
    is refused.

    Raises:
        ValueError: names the first row of a split that lacks a field, or that an objective cannot learn from.
    """
    for objective in objectives:
        for name in objective.fields:
            values = rows[name] if name in rows.column_names else [None] * len(rows)
            lacking = [index for index, value in enumerate(values) if value is None or not len(value)]
            if len(lacking) == len(rows):
                raise UsageError(
                    f"{rows['row_id'][lacking[0]]}, field {name!r}: found none, and objectives.{objective.name} needs "
                    f"it (none of {len(rows)} rows has it): take a data set or dataset_options with it, "
                    "or remove the objective."
                )
            if lacking:
                found = (name, len(lacking), len(rows), objective.name)
                logger.info("field %s: %d of %d rows have none; objectives.%s skips them", *found)
        if type(objective).check is not Objective.check:
            for row in rows:
                try:
                    objective.check(row, processor)
                except ValueError as error:
                    raise UsageError(str(error)) from error


def distinct(rows: Dataset) -> list[dict]:
    """Return one row of each group that the metric cannot distinguish, with the columns that it reads."""
    found = {}
    for row in rows.select_columns(SCORED):
        found.setdefault((tuple(row["answers"]), tuple(row["choices"])), row)
    return [*found.values()]


def check_steps(rows: Dataset) -> None:
    """Check that no written step is read as the answer, which follows the first line that begins with the marker.

    Raises:
        ValueError: a step with a line that begins with the marker.
    """
    for row in rows.select_columns(SCORED):
        for step in row["steps"]:
            if ANSWER_LINE.search(step):
                raise UsageError(
                    f"{row['row_id']}, field 'steps': found {step[:100]!r}, and the first line that begins with "
                    f"{ANSWER_MARKER} is read as the answer: write the step without {ANSWER_MARKER} at the beginning "
                    "of a line."
                )


def check_beginnings(rows: Sequence[Mapping]) -> None:
    """Check that evaluation finds each answer completely after the marker.

    Raises:
        ValueError: an answer that begins with the marker.
    """
    for row in rows:
        answer = row["answers"][0]
        found = parse_answer(f"{ANSWER_MARKER} {answer}")
        if found != answer.strip():
            raise UsageError(
                f"{row['row_id']}, field 'answers': found {answer!r}, which evaluation reads as {found!r}, because "
                f"{ANSWER_MARKER} precedes every answer: write it without {ANSWER_MARKER} at its beginning."
            )


def own_scores(metric: str, rows: Sequence[Mapping]) -> list[float]:
    """Return the score of each row's own first answer, as evaluation would find it in the target text.

    Raises:
        ValueError: a row that the metric cannot read.
    """
    texts = [f"{ANSWER_MARKER} {row['answers'][0]}" for row in rows]
    try:
        return score(metric, texts, [parse_answer(text) for text in texts], rows=rows)["scores"]
    except ValueError as error:  # raised again with the row's name
        if len(rows) == 1:
            raise UsageError(
                f"{rows[0]['row_id']}, field 'answers': found {rows[0]['answers']!r}, which the metric {metric} "
                f"cannot read ({str(error).removeprefix('row 0: ')}): correct the row, leave it out, or set `metric` "
                f"to another one of {', '.join(REFERENCES)}."
            ) from error
    half = len(rows) // 2
    return [*own_scores(metric, rows[:half]), *own_scores(metric, rows[half:])]


def check_answers(rows: Dataset, metric: str) -> None:
    """Check that every row's own answer is found in the target text and scores above 0 by the metric.

    Raises:
        ValueError: a step that is read as the answer, or an answer that begins with the marker; an answer that the
            metric cannot read, or scores 0.
    """
    check_steps(rows)
    answered = distinct(rows)
    check_beginnings(answered)
    for row, value in zip(answered, own_scores(metric, answered), strict=True):
        if value <= 0:
            raise UsageError(
                f"{row['row_id']}, field 'answers': found {row['answers']!r}; the metric {metric} scores the first "
                f"one, which is learnt, {value:g}. Correct the row, leave it out, or set `metric` to another one of "
                f"{', '.join(REFERENCES)}."
            )
