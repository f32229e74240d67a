"""Load MMVP, 300 questions about pairs of pictures that CLIP confuses: `Questions.csv` and `MMVP Images/`.

Rows 1 and 2, 3 and 4, and so on, ask the same about two pictures, and a pair is right if both answers are:
the data set's metric is `pair_accuracy`. Paper: https://arxiv.org/abs/2401.06209. Data:
https://huggingface.co/datasets/MMVP/MMVP; scoring: `scripts/gpt_grader.py` of https://github.com/tsb0601/MMVP
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import Example, check_test_only
from mmcoconut.data.json_steps import field_error, read_text
from mmcoconut.data.public import (
    FindImages,
    check_choices,
    choice_of_letter,
    from_rows,
    image_under,
    lettered,
    no_images,
    numbered,
    sample_puzzles,
    save_picture,
    text_of,
)
from mmcoconut.errors import UsageError


FILE, IMAGES = "Questions.csv", "MMVP Images"
FIELDS = ("Index", "Question", "Options", "Correct Answer")


def _rows(folder: Path) -> list[dict]:
    file = folder / FILE
    rows = list(csv.DictReader(io.StringIO(read_text(file))))
    if not rows or not {*FIELDS} <= rows[0].keys():
        found = list(rows[0]) if rows else "no rows"
        raise UsageError(f"{file}: found {found}; the first line must name the columns {', '.join(FIELDS)}")
    return rows


def _number(row: Mapping[str, Any], row_id: str) -> int:
    number = text_of(row, "Index", row_id).strip()
    if not number.isdecimal() or int(number) < 1:
        raise field_error(row_id, "Index", number, "write the number of the picture, from 1")
    return int(number)


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike) -> list[dict]:
    return image_under(image_root, f"{_number(row, row_id)}.jpg", row_id)


def _examples(row: Mapping[str, Any], row_id: str, *, images: FindImages) -> Iterator[Example]:
    options = text_of(row, "Options", row_id)
    choices = check_choices(lettered(options, r"(?i:\({}\))"), "Options", options, row_id)
    letter = text_of(row, "Correct Answer", row_id).strip().strip("()").upper()
    yield Example(
        images=images(row, row_id),
        question=text_of(row, "Question", row_id).strip(),
        choices=choices,
        steps=[],
        answers=[choice_of_letter(letter, "Correct Answer", choices, row_id)],
        row_id=row_id,
        pair=str((_number(row, row_id) + 1) // 2),
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write arrow mazes as pairs, `num_rows` rows and one more if that is odd; return the options for `load`.

    In each pair the first option answers the question for the first picture, the second for the second.
    """
    folder = Path(folder)
    num_pairs = (num_rows + 1) // 2
    rows, found = [], {}
    for puzzle in sample_puzzles("test", num_rows=40 * num_pairs, seed=seed):
        found.setdefault(puzzle["answer"], []).append(puzzle)
    colors = sorted(found, key=lambda color: len(found[color]))[-2:]
    for one, other in list(zip(*(found[color] for color in colors)))[:num_pairs]:
        for letter, puzzle in zip("ab", (one, other)):
            number = len(rows) + 1
            save_picture(folder / IMAGES / f"{number}.jpg", puzzle["picture"])
            options = f"(a) {one['answer']} (b) {other['answer']}"
            rows.append(dict(zip(FIELDS, (number, puzzle["question"], options, f"({letter})"))))
    with (folder / FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return {"folder": str(folder)}


def load(*, split: str, folder: str | os.PathLike, images_required: bool = True) -> Dataset:
    """Load the rows of `test`, the only split: one picture, a question, two choices, no steps, the pair's number.

    folder: holds `Questions.csv` and `MMVP Images/<number>.jpg`, as the Hub's repository `MMVP/MMVP` does.
    images_required: False reads no pictures and gives every row an empty list.
    """
    check_test_only("mmvp", split, published=FILE)
    folder = Path(folder)
    images = partial(_image, image_root=folder / IMAGES) if images_required else no_images
    return from_rows(numbered(_rows(folder), FILE), partial(_examples, images=images), source=folder / FILE)
