"""Load BLINK, 14 tasks of visual perception with one to four pictures per question: parquet, a configuration per task.

The rows are those of the published `val`; the answers of the published `test` are withheld. The question is the
published prompt, which names the pictures, without its list of options; these are the choices. The letter
in `answer` becomes the text of its choice. Paper: https://arxiv.org/abs/2404.12390. Data:
https://huggingface.co/datasets/BLINK-Benchmark/BLINK; scoring: `eval/evaluate.py` of
https://github.com/zeyofu/BLINK_Benchmark, whose total is the mean of the tasks' accuracies
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from mmcoconut.data import Example, check_test_only, nearest
from mmcoconut.data.hub import from_published, read_benchmark, save_published
from mmcoconut.data.public import check_choices, choice_of_letter, no_images, sample_puzzles, text_of, texts_of
from mmcoconut.errors import UsageError


TASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)
COLUMNS = ("image_1", "image_2", "image_3", "image_4")
LIST = re.compile(r"\s*Select from the following (?:choices|options)\b.*", re.DOTALL)


def _examples(row: Mapping[str, Any], row_id: str) -> Iterator[Example]:
    choices = check_choices(texts_of(row, "choices", row_id), "choices", row["choices"], row_id)
    letter = text_of(row, "answer", row_id).strip().strip("()")
    yield Example(
        images=no_images(row, row_id),
        question=LIST.sub("", text_of(row, "prompt", row_id)).strip() or text_of(row, "question", row_id),
        choices=choices,
        steps=[],
        answers=[choice_of_letter(letter, "answer", choices, row_id)],
        row_id=row_id,
        category=text_of(row, "sub_task", row_id),
    )


def _check_tasks(tasks: Sequence[str]) -> list[str]:
    if isinstance(tasks, str) or not tasks:
        raise UsageError(f"the option tasks is {tasks!r}; write a list of tasks, or leave it out for all {len(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"blink has no task {task!r}; {nearest(task, TASKS)}")
    return list(dict.fromkeys(tasks))


def _load_task(path: str | os.PathLike, task: str) -> Dataset:
    """Return the rows of a task: of its own folder below `path`, or of the configuration of its name."""
    below = Path(path) / task
    if below.is_dir():
        dataset, path = read_benchmark(below), below
    else:
        dataset = read_benchmark(path, config=task)
    return from_published(dataset, path, f"{task} val", examples=_examples, columns=COLUMNS)


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes: questions with one picture as Counting, with two as Jigsaw; return the options."""
    rows = {"Counting": [], "Jigsaw": []}
    puzzles = list(sample_puzzles("test", num_rows=2 * num_rows, seed=seed))
    for number, (puzzle, other) in enumerate(zip(puzzles[:num_rows], puzzles[num_rows:])):
        task = "Counting" if number % 2 == 0 else "Jigsaw"
        letters = [f"({letter})" for letter in "ABCD"]
        options = "\n".join(f"{letter} {choice}" for letter, choice in zip(letters, puzzle["choices"]))
        rows[task].append(
            {
                "idx": f"val_{task}_{len(rows[task]) + 1}",
                "sub_task": task,
                "question": puzzle["question"],
                "image_1": puzzle["picture"],
                "image_2": other["picture"] if task == "Jigsaw" else None,
                "image_3": None,
                "image_4": None,
                "choices": puzzle["choices"],
                "answer": letters[puzzle["choices"].index(puzzle["answer"])],
                "prompt": f"{puzzle['question']}\nSelect from the following choices.\n{options}",
            }
        )
    tasks = [task for task, found in rows.items() if found]
    for task in tasks:
        save_published(folder, "val", rows[task], columns=COLUMNS, below=task)
    return {"path": str(folder), "tasks": tasks}


def load(*, split: str, path: str | os.PathLike, tasks: Sequence[str] = TASKS) -> Dataset:
    """Load the rows of `test`, published as val: one to four pictures, a question, its choices, no steps.

    path: the Hub id `BLINK-Benchmark/BLINK`, or a folder that holds one folder per task.
    tasks: names of configurations, such as `Jigsaw`; all by default. The category of a row is its task.
    """
    check_test_only("blink", split, published="val")
    return concatenate_datasets([_load_task(path, task) for task in _check_tasks(tasks)])
