"""Load A-OKVQA as published: `aokvqa_v1p0_<split>.json` and COCO 2017 pictures, or the Hub's copy.

The rationales of a question are alternatives by different people, not consecutive steps: one of them is
used, and its sentences are the steps. The public test file has no answers, so it cannot be loaded. Paper:
https://arxiv.org/abs/2206.01718
"""

import ast
import io
import os
import tokenize
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import SPLITS, Example, check_split, nearest
from mmcoconut.data.hub import from_published, read_published
from mmcoconut.data.json_steps import field_error, field_of, read_rows
from mmcoconut.data.public import (
    FindImages,
    check_not_beside_path,
    check_source,
    choice_at,
    from_rows,
    image_under,
    integer_of,
    most_frequent_first,
    no_images,
    numbered,
    sample_puzzles,
    save_json,
    save_picture,
    sentences,
    text_of,
    texts_of,
)


TASKS = ("multiple_choice", "direct_answer")
FILES = {"train": "train", "validation": "val", "test": "test"}


def _list_in(text: str, field: str, row_id: str) -> Any:
    """Return the list that a text spells as Python does.

    Raises:
        ValueError: no Python literal; strings without commas, as numpy prints them, which Python would join.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise field_error(row_id, field, text, "write a list of answers, ['a', 'b']") from error
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    num_strings = sum(token.type == tokenize.STRING for token in tokens)
    num_answers = len(value) if isinstance(value, list) else 1
    if num_strings > num_answers:
        remedy = f"it has {num_strings} strings for {num_answers} answers; write commas between them"
        raise field_error(row_id, field, text, remedy)
    return value


def _direct_answers(row: Mapping[str, Any], row_id: str) -> list[str]:
    """Return the ten answers; the Hub's copy writes the list as text, `"['a', 'b']"`."""
    value = field_of(row, "direct_answers", row_id)
    if isinstance(value, str):
        value = _list_in(value, "direct_answers", row_id)
    return most_frequent_first(texts_of({"direct_answers": value}, "direct_answers", row_id))


def _steps(row: Mapping[str, Any], rationale: int, row_id: str) -> list[str]:
    rationales = texts_of(row, "rationales", row_id)
    if not 0 <= rationale < len(rationales):
        remedy = f"the option rationale is {rationale} and these are {len(rationales)}; choose one of them, from 0"
        raise field_error(row_id, "rationales", rationales, remedy)
    return sentences(rationales[rationale])


def _is_difficult(row: Mapping[str, Any], row_id: str) -> bool:
    value = field_of(row, "difficult_direct_answer", row_id)
    if not isinstance(value, bool):
        raise field_error(row_id, "difficult_direct_answer", value, "write true or false")
    return value


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike | None, split: str) -> list[dict]:
    image_id = integer_of(row, "image_id", row_id)
    return image_under(image_root, f"{FILES[split]}2017/{image_id:012}.jpg", row_id)


def _examples(
    row: Mapping[str, Any], row_id: str, *, images: FindImages, task: str, rationale: int, skip_difficult: bool
) -> Iterator[Example]:
    if task == "multiple_choice":
        choices = texts_of(row, "choices", row_id)
        answers = [choice_at(row, "correct_choice_idx", choices, row_id)]
    else:
        choices, answers = [], _direct_answers(row, row_id)
    if skip_difficult and _is_difficult(row, row_id):
        return
    yield Example(
        images=images(row, row_id),
        question=text_of(row, "question", row_id),
        choices=choices,
        steps=_steps(row, rationale, row_id),
        answers=answers,
        row_id=row_id,
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as the published files and COCO pictures; return the options for `load`.

    Here the test file has answers too."""
    folder = Path(folder)
    for split in SPLITS:
        rows = []
        for index, puzzle in enumerate(sample_puzzles(split, num_rows=num_rows, seed=seed)):
            save_picture(folder / "coco" / f"{FILES[split]}2017" / f"{index:012}.jpg", puzzle["picture"])
            rows.append(_sample_row(puzzle, index))
        save_json(folder / f"aokvqa_v1p0_{FILES[split]}.json", rows)
    return {"folder": str(folder), "image_root": str(folder / "coco")}


def _sample_row(puzzle: Mapping[str, Any], index: int) -> dict:
    answer = puzzle["answer"]
    return {
        "image_id": index,
        "question_id": f"sample{index}",
        "question": puzzle["question"],
        "choices": puzzle["choices"],
        "correct_choice_idx": puzzle["choices"].index(answer),
        "direct_answers": [answer] * 9 + ["arrow"],
        "difficult_direct_answer": False,
        "rationales": [" ".join(puzzle["steps"]), puzzle["steps"][-1], f"It is {answer}."],
    }


def load(
    *,
    split: str,
    folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    task: str = "multiple_choice",
    rationale: int = 0,
    skip_difficult: bool = False,
    images_required: bool = True,
) -> Dataset:
    """Return the rows of a split: one picture, and as steps the sentences of one rationale.

    folder: holds `aokvqa_v1p0_{train,val,test}.json`. image_root: holds COCO's `train2017`, `val2017` and `test2017`.
    path: instead of them, a Hub id such as `HuggingFaceM4/A-OKVQA`, or a folder as `hub.read_published` takes it.
    task: "multiple_choice" gives the choices and the right one; "direct_answer" gives an open question and the ten
        answers, with repetitions, the most frequent first.
    rationale: index of the rationale to use, from 0.
    skip_difficult: drop questions marked as difficult for direct answers, as the official evaluation does.
    images_required: False reads no pictures and gives every row an empty list.
    """
    check_split("aokvqa", split)
    check_source("aokvqa", folder=folder, path=path)
    check_not_beside_path("aokvqa", path, image_root=image_root)
    if task not in TASKS:
        raise ValueError(f"the option task is {task!r}; {nearest(task, TASKS)}")
    examples = partial(_examples, task=task, rationale=rationale, skip_difficult=skip_difficult)
    if path is not None:
        examples = partial(examples, images=no_images)
        images = "required" if images_required else "none"
        return from_published(read_published(path, split), path, split, examples=examples, images=images)
    images = partial(_image, image_root=image_root, split=split) if images_required else no_images
    file = Path(folder) / f"aokvqa_v1p0_{FILES[split]}.json"
    return from_rows(numbered(read_rows(file), file.name), partial(examples, images=images), source=file)
