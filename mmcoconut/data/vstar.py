"""Load V*Bench, 191 questions about small things in large pictures: `test_questions.jsonl`, annotations and pictures.

The repository holds the questions twice. `test_questions.jsonl` has short options with letters, in the order in which
scores by letter are published. The JSON file of each picture has options that are whole sentences, the
right one always first; the paper compares their likelihoods. In that order they would reveal the answer, so
they are sorted by the SHA-256 of picture and option: the same order in every run, whatever else is in the folder.
Paper: https://arxiv.org/abs/2312.14135. Data: https://huggingface.co/datasets/craigwu/vstar_bench; scoring:
`vstar_bench_eval.py` of https://github.com/penghao-wu/vstar
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import Example, check_test_only, nearest
from mmcoconut.data.json_steps import field_error, read_rows
from mmcoconut.data.public import (
    FindImages,
    check_choices,
    choice_of_letter,
    from_rows,
    image_under,
    lettered,
    no_images,
    numbered,
    read_object,
    sample_puzzles,
    save_json,
    save_picture,
    text_of,
    texts_of,
)
from mmcoconut.errors import UsageError


KINDS = ("direct_attributes", "relative_position")
FILE = "test_questions.jsonl"
SOURCES = ("questions", "annotations")
# The file's instruction after the options, for models that answer by letter.
INSTRUCTION = re.compile(r"\n\s*Answer with the option's letter[^\n]*$")
FIRST_OPTION = re.compile(r"\s*\n\s*(?=\(A\))")
MARK = r"(?:^|\n)\s*\({}\)"


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike) -> list[dict]:
    return image_under(image_root, text_of(row, "image", row_id), row_id)


def _of_questions(row: Mapping[str, Any], row_id: str, *, images: FindImages) -> Iterator[Example]:
    text = INSTRUCTION.sub("", text_of(row, "text", row_id).rstrip())
    first = FIRST_OPTION.search(text)
    if first is None:
        raise field_error(row_id, "text", text, "no line begins with (A); write the options as published")
    choices = check_choices(lettered(text[first.end() :], MARK), "text", text, row_id)
    yield Example(
        images=images(row, row_id),
        question=text[: first.start()].strip(),
        choices=choices,
        steps=[],
        answers=[choice_of_letter(text_of(row, "label", row_id).strip(), "label", choices, row_id)],
        row_id=row_id,
        category=text_of(row, "category", row_id),
    )


def _of_annotations(row: Mapping[str, Any], row_id: str, *, images: FindImages) -> Iterator[Example]:
    options = check_choices(texts_of(row, "options", row_id), "options", row.get("options"), row_id)

    def place(option: str) -> bytes:
        return hashlib.sha256(f"{row['image']}\n{option}".encode()).digest()

    yield Example(
        images=images(row, row_id),
        question=text_of(row, "question", row_id).strip(),
        choices=sorted(options, key=place),
        steps=[],
        answers=options[:1],
        row_id=row_id,
        category=row["category"],
    )


def _annotations(folder: Path) -> Iterator[tuple[str, dict]]:
    """Yield name and content of each JSON file, with its category, and the picture's name there."""
    for kind in KINDS:
        pictures = {file.stem: file for file in sorted((folder / kind).glob("*")) if file.suffix != ".json"}
        files = sorted((folder / kind).glob("*.json"))
        if not files:
            raise UsageError(
                f"{folder / kind}: no *.json file in it; give the folder that holds {' and '.join(KINDS)}"
            )
        for file in files:
            if file.stem not in pictures:
                raise UsageError(f"{file}: it has no picture of the same name; download it again")
            image = f"{kind}/{pictures[file.stem].name}"
            yield f"{kind}/{file.name}", {**read_object(file), "image": image, "category": kind}


def _sample_rows(puzzle: Mapping[str, Any], number: int, kind: str) -> tuple[dict, dict]:
    """Return a line of test_questions.jsonl and the annotation of a maze."""
    wrong = [choice for choice in puzzle["choices"] if choice != puzzle["answer"]]
    choices = puzzle["choices"] if kind == KINDS[0] else sorted([puzzle["answer"], wrong[0]])
    lines = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices))
    text = f"{puzzle['question']}\n{lines}\nAnswer with the option's letter from the given choices directly."
    label = "ABCD"[choices.index(puzzle["answer"])]
    line = {"text": text, "category": kind, "label": label, "question_id": str(number)}
    options = [f"The color of the cell is {c}." for c in (puzzle["answer"], *(c for c in choices if c in wrong))]
    about = {"target_object": ["cell"], "bbox": [[0, 0, 16, 16]]}  # x, y, width, height
    return line, {**about, "question": puzzle["question"], "options": options}


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes, in both kinds and both forms of the questions; return the options for `load`."""
    folder, lines = Path(folder), []
    for number, puzzle in enumerate(sample_puzzles("test", num_rows=num_rows, seed=seed)):
        kind = KINDS[number % 2]
        line, annotation = _sample_rows(puzzle, number, kind)
        image = f"{kind}/sa_{number}.jpg"
        save_picture(folder / image, puzzle["picture"])
        save_json((folder / image).with_suffix(".json"), annotation)
        lines.append(json.dumps({"image": image, **line}))
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"folder": str(folder)}


def load(*, split: str, folder: str | os.PathLike, source: str = "questions", images_required: bool = True) -> Dataset:
    """Load the rows of `test`, the only split: one picture, a question, two or four choices, no steps, the category.

    folder: holds `test_questions.jsonl`, `direct_attributes/` and `relative_position/`, as the Hub's repository
        `craigwu/vstar_bench` does.
    source: `questions`, short options in the published order, or `annotations`, the paper's sentences in sorted
        order.
    images_required: False reads no pictures and gives every row an empty list.
    """
    check_test_only("vstar", split, published=FILE)
    if source not in SOURCES:
        raise UsageError(f"the option source is {source!r}; {nearest(source, SOURCES)}")
    folder = Path(folder)
    images = partial(_image, image_root=folder) if images_required else no_images
    if source == "annotations":
        return from_rows(_annotations(folder), partial(_of_annotations, images=images), source=folder)
    rows = numbered(read_rows(folder / FILE), FILE)
    return from_rows(rows, partial(_of_questions, images=images), source=folder / FILE)
