"""Loads LLaVA-Instruct: a JSON list of conversations about COCO pictures, `{"id", "image", "conversations"}` a row.

Only the first turn of a conversation becomes a row: its question and its answer; later turns, which refer back to
earlier ones, are left out. The file has no splits, so a picture's conversations go to one by the hash of its name.
Paper: https://arxiv.org/abs/2304.08485
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, split_of
from mmcoconut.data.json_steps import answer_text, field_error, field_of, read_rows
from mmcoconut.data.public import (
    check_fractions,
    check_split,
    from_rows,
    image_under,
    numbered,
    objects_in,
    sample_puzzles,
    save_json,
    save_picture,
    text_of,
)


FRACTIONS = (0.98, 0.01, 0.01)  # train, validation, test
IMAGE_MARK = "<image>"
SPEAKERS = ("human", "gpt")


def _first_turn(row: Mapping[str, Any], row_id: str) -> tuple[str, str]:
    """The first question, with its mark for the picture, and its answer; what gpt says before it is left out."""
    turns = objects_in(row, "conversations", row_id)
    speakers = [text_of(turn, "from", row_id) for turn in turns]
    start = 1 if speakers[0] == "gpt" else 0
    if speakers[start : start + 2] != list(SPEAKERS):
        remedy = f"the first turns must be from {' and '.join(SPEAKERS)}"
        raise field_error(row_id, "conversations", speakers[:3], remedy)
    question, answer = (text_of(turn, "value", row_id) for turn in turns[start : start + 2])
    return question, answer


def _question(marked: str, image: str | None, row_id: str) -> str:
    """The question without `<image>`, which stands once, before or after it, where the row has a picture."""
    expected = 0 if image is None else 1
    if marked.count(IMAGE_MARK) != expected:
        remedy = f"the row has {expected} picture(s) in 'image', so write {IMAGE_MARK} {expected} time(s)"
        raise field_error(row_id, "conversations", marked, remedy)
    return text_of({"conversations": marked.replace(IMAGE_MARK, "").strip()}, "conversations", row_id)


def _examples(
    row: Mapping[str, Any],
    row_id: str,
    *,
    split: str,
    fractions: Sequence[float],
    image_root: str | os.PathLike | None,
    images_required: bool,
) -> Iterator[Example]:
    marked, answer = _first_turn(row, row_id)
    image = None if row.get("image") is None else text_of(row, "image", row_id)
    question = _question(marked, image, row_id)
    identity = answer_text(field_of(row, "id", row_id), "id", row_id) if image is None else image
    images = image_under(image_root, image, row_id) if image is not None and images_required else []
    if split_of(identity.encode(), fractions) == split:
        yield Example(images=images, question=question, choices=[], steps=[], answers=[answer], row_id=row_id)


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Writes `num_rows` arrow mazes a split as conversations of two turns; returns the options for `load`."""
    folder, rows = Path(folder), []
    for split in SPLITS:
        names = (f"{number:012}.jpg" for number in itertools.count(1))
        names = (name for name in names if split_of(name.encode(), FRACTIONS) == split)
        for name, puzzle in zip(names, sample_puzzles(split, num_rows=num_rows, seed=seed), strict=False):
            save_picture(folder / "images" / name, puzzle["picture"])
            turns = [f"{IMAGE_MARK}\n{puzzle['question']}", puzzle["answer"], "Why?", " ".join(puzzle["steps"])]
            turns = [{"from": SPEAKERS[index % 2], "value": value} for index, value in enumerate(turns)]
            rows.append({"id": Path(name).stem, "image": name, "conversations": turns})
    save_json(folder / "llava_instruct_150k.json", rows)
    return {"file": str(folder / "llava_instruct_150k.json"), "image_root": str(folder / "images")}


def load(
    *,
    split: str,
    file: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    fractions: Sequence[float] = FRACTIONS,
    images_required: bool = True,
) -> Dataset:
    """The rows of a split: one picture, or none, the first question and its answer.

    file: such as `llava_instruct_150k.json`; one file for all splits. image_root: holds the pictures that it names,
        for that file COCO's `train2017`.
    fractions: parts of train, validation and test; the same for every split you load.
    images_required: False reads no picture and gives every row an empty list.
    """
    check_split("llava_instruct", split)
    check_fractions(fractions)
    examples = partial(_examples, split=split, fractions=fractions)
    examples = partial(examples, image_root=image_root, images_required=images_required)
    file = Path(file)
    return from_rows(numbered(read_rows(file), file.name), examples, source=file)
