"""Load VQAv2 as published: a file of questions, a file of annotations and COCO 2014 pictures, or the Hub's copy.

The ten answers of a question are kept with repetitions, because the official accuracy counts them;
the most frequent one is the training target. There are no steps. The public test questions have no annotations, so
they cannot be loaded. Paper: https://arxiv.org/abs/1612.00837
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import Example, check_split
from mmcoconut.data.hub import from_published, read_published
from mmcoconut.data.json_steps import field_error
from mmcoconut.data.public import (
    FindImages,
    check_not_beside_path,
    check_source,
    from_rows,
    image_under,
    integer_of,
    most_frequent_first,
    no_images,
    numbered,
    objects_in,
    read_object,
    sample_puzzles,
    save_json,
    save_picture,
    text_of,
)


FILES = {"train": "train2014", "validation": "val2014", "test": "test2015"}
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"


def _annotations(file: Path) -> dict[int, dict]:
    """Return annotations by question, each with its name as `annotation`."""
    rows = numbered(objects_in(read_object(file), "annotations", file.name), file.name)
    return {integer_of(row, "question_id", row_id): {**row, "annotation": row_id} for row_id, row in rows}


def _questions(folder: Path, split: str) -> Iterator[tuple[str, dict]]:
    """Yield every question with its annotation's fields."""
    annotations = _annotations(folder / ANNOTATIONS.format(FILES[split]))
    file = folder / QUESTIONS.format(FILES[split])
    for row_id, question in numbered(objects_in(read_object(file), "questions", file.name), file.name):
        annotation = annotations.get(integer_of(question, "question_id", row_id))
        if annotation is None:
            remedy = "there is no annotation with this id; take both files from one download"
            raise field_error(row_id, "question_id", question["question_id"], remedy)
        if annotation.get("image_id") != question.get("image_id"):
            remedy = f"its annotation has {annotation.get('image_id')!r}; take both files from one download"
            raise field_error(row_id, "image_id", question.get("image_id"), remedy)
        yield row_id, {**annotation, **question}


def _image(row: Mapping[str, Any], row_id: str, *, image_root: str | os.PathLike | None, split: str) -> list[dict]:
    name = f"COCO_{FILES[split]}_{integer_of(row, 'image_id', row_id):012}.jpg"
    return image_under(image_root, f"{FILES[split]}/{name}", row_id)


def _examples(row: Mapping[str, Any], row_id: str, *, images: FindImages) -> Iterator[Example]:
    answers_id = row.get("annotation", row_id)
    answers = [text_of(answer, "answer", answers_id) for answer in objects_in(row, "answers", answers_id)]
    yield Example(
        images=images(row, row_id),
        question=text_of(row, "question", row_id),
        choices=[],
        steps=[],
        answers=most_frequent_first(answers),
        row_id=row_id,
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes per split as the published files and COCO pictures; return the options for `load`.

    Here the test questions have annotations too."""
    folder = Path(folder)
    for split, name in FILES.items():
        questions, annotations = [], []
        for index, puzzle in enumerate(sample_puzzles(split, num_rows=num_rows, seed=seed)):
            save_picture(folder / "coco" / name / f"COCO_{name}_{index:012}.jpg", puzzle["picture"])
            ids = {"image_id": index, "question_id": index * 1000}
            questions.append({**ids, "question": puzzle["question"]})
            given = [puzzle["answer"]] * 9 + ["arrow"]
            answers = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(given, 1)
            ]
            annotations.append({**ids, "multiple_choice_answer": puzzle["answer"], "answers": answers})
        save_json(folder / QUESTIONS.format(name), {"questions": questions})
        save_json(folder / ANNOTATIONS.format(name), {"annotations": annotations})
    return {"folder": str(folder), "image_root": str(folder / "coco")}


def load(
    *,
    split: str,
    folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    path: str | os.PathLike | None = None,
    images_required: bool = True,
) -> Dataset:
    """Load the rows of a split: one picture, an open question, the ten answers.

    folder: holds `v2_OpenEnded_mscoco_train2014_questions.json`, `v2_mscoco_train2014_annotations.json` and the same
        for `val2014`. image_root: holds COCO's `train2014` and `val2014`.
    path: instead of these, a Hub id such as `lmms-lab/VQAv2`, or a folder as `hub.read_published` reads it.
    images_required: False reads no pictures and gives every row an empty list.
    """
    check_split("vqav2", split)
    check_source("vqav2", folder=folder, path=path)
    check_not_beside_path("vqav2", path, image_root=image_root)
    if path is not None:
        examples, images = partial(_examples, images=no_images), "required" if images_required else "none"
        return from_published(read_published(path, split), path, split, examples=examples, images=images)
    images = partial(_image, image_root=image_root, split=split) if images_required else no_images
    return from_rows(_questions(Path(folder), split), partial(_examples, images=images), source=folder)
