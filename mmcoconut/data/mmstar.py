"""Load MMStar, 1,500 questions that need their picture: parquet with `image`, `question`, `answer` and categories.

The options are in the question's text, in one of two layouts: `…\\nOptions: A: …, B: …`, or lines that begin with
`(A)`, some after a hint about letters. Copies of the data have both also within one line. All become choices; the
letter in `answer` becomes the text of its choice. Options `nan`, which fill rows up to four, are dropped. Paper:
https://arxiv.org/abs/2403.20330. Data: https://huggingface.co/datasets/Lin-Chen/MMStar; scoring:
`eval/vlmeval/evaluate/mmstar.py` of https://github.com/MMStar-Benchmark/MMStar
"""

import os
import re
import string
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import Example, check_test_only, nearest
from mmcoconut.data.hub import from_published, read_benchmark, save_published
from mmcoconut.data.json_steps import field_error
from mmcoconut.data.public import check_choices, choice_of_letter, lettered, no_images, sample_puzzles, text_of
from mmcoconut.errors import UsageError


CATEGORIES = ("category", "l2_category")  # 6 abilities, and 18 that divide them
# The text between the question and its options: a line of its own, or the first option itself.
HEADER = re.compile(r"\n\s*(?:(?:Options|Choices):\s*|(?=\(A\)))")
HEADER_IN_LINE = re.compile(r"\s(?:(?:Options|Choices):\s*(?=A:|A\.\s|\(A\))|(?=\(A\)))")
MARK = r"(?:^|[,\n]\s*)(?:{0}:|{0}\.\s|\({0}\))"
MARK_IN_LINE = r"(?:^|,?\s)(?:{0}:\s|{0}\.\s|\({0}\))"
LAYOUTS = [(header, mark) for header in (HEADER, HEADER_IN_LINE) for mark in (MARK, MARK_IN_LINE)]
HINT = re.compile(r"^Hint:.*\nQuestion:\s*")
MISSING = "nan"
CATEGORIES_OF_SAMPLE = (("coarse perception", "image emotion"), ("logical reasoning", "diagram reasoning"))


def _headers_in(text: str) -> Iterator[tuple[re.Match, str]]:
    """Yield where the options of a text may begin, with how they would be marked, the published layouts first."""
    for header, mark in LAYOUTS:
        if (begin := header.search(text)) is not None:
            yield begin, mark


def _question_and_options(text: str, row_id: str) -> tuple[str, list[str]]:
    """Return the question and its options, by the first layout that finds two or more."""
    found = [(header, lettered(text[header.end() :].strip(), mark)) for header, mark in _headers_in(text)]
    if not found:
        raise field_error(
            row_id, "question", text, "there is no line `Options:` in it; write the options as published"
        )
    header, options = next((each for each in found if len(each[1]) > 1), found[0])
    question = HINT.sub("", text[: header.start()]).replace("<image 1>", "").strip()
    return question, check_choices(options, "question", text, row_id)


def _examples(row: Mapping[str, Any], row_id: str, *, categories: str) -> Iterator[Example]:
    question, options = _question_and_options(text_of(row, "question", row_id), row_id)
    answer = choice_of_letter(text_of(row, "answer", row_id).strip(), "answer", options, row_id)
    yield Example(
        images=no_images(row, row_id),
        question=question,
        choices=[option for option in options if option != MISSING or answer == MISSING],
        steps=[],
        answers=[answer],
        row_id=row_id,
        category=text_of(row, categories, row_id),
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` arrow mazes as the published parquet file, in two categories; return the options for `load`."""
    rows = []
    for index, puzzle in enumerate(sample_puzzles("test", num_rows=num_rows, seed=seed)):
        options = ", ".join(f"{letter}: {text}" for letter, text in zip(string.ascii_uppercase, puzzle["choices"]))
        category = CATEGORIES_OF_SAMPLE[index % 2]
        rows.append(
            {
                "index": index,
                "question": f"{puzzle['question']}\nOptions: {options}",
                "image": puzzle["picture"],
                "answer": string.ascii_uppercase[puzzle["choices"].index(puzzle["answer"])],
                "category": category[0],
                "l2_category": category[1],
            }
        )
    save_published(folder, "val", rows)
    return {"path": str(Path(folder))}


def load(*, split: str, path: str | os.PathLike, categories: str = "category") -> Dataset:
    """Load the rows of `test`, published as val: one picture, a question, its options as choices, no steps.

    path: the Hub id `Lin-Chen/MMStar`, or a folder as `hub.read_published` takes it.
    categories: the column for results per category: `category`, or the finer `l2_category`.
    """
    check_test_only("mmstar", split, published="val")
    if categories not in CATEGORIES:
        raise UsageError(f"the option categories is {categories!r}; {nearest(categories, CATEGORIES)}")
    return from_published(read_benchmark(path), path, "val", examples=partial(_examples, categories=categories))
