"""Load GSM8k-Aug, text-only arithmetic with equations as steps: `<split>.txt`, Coconut's JSON, or the Hub's copies.

A line of the text files is `question||<<16-3-4=9>> <<9*2=18>> #### 18`; it may have no equations. Coconut's files
`gsm_<split>.json` are those of `json_steps` without pictures. Papers: https://arxiv.org/abs/2405.14838 (the data),
https://arxiv.org/abs/2412.06769
"""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmcoconut.data import Example, check_split, json_steps
from mmcoconut.data.hub import from_published, read_published
from mmcoconut.data.json_steps import answer_text, check_list, check_text, field_error, field_of, read_text
from mmcoconut.data.public import check_source, from_rows, numbered, text_of


FILES = {"train": "train", "validation": "valid", "test": "test"}
LINE = "write `question||<<equation>> <<equation>> #### answer`"


def _parse(line: str, row_id: str) -> dict:
    question, bars, solution = line.partition("||")
    steps, hashes, answer = solution.partition("####")
    if not bars or "||" in solution:
        raise field_error(row_id, "question", line, LINE)
    if not hashes or "####" in answer:
        raise field_error(row_id, "answer", solution, LINE)
    return {"question": question.strip(), "steps": steps.split(), "answer": answer.strip()}


def _lines(file: Path) -> Iterator[tuple[str, dict]]:
    for row_id, line in numbered((line for line in read_text(file).split("\n") if line.strip()), file.name):
        yield row_id, _parse(line, row_id)


def _examples(row: Mapping[str, Any], row_id: str) -> Iterator[Example]:
    """Yield the example of a line, or of a Hub row, whose equations are a list `steps` or a text `cot`."""
    if "cot" in row and "steps" not in row:
        row = {**row, "steps": row["cot"].split() if isinstance(row["cot"], str) else row["cot"]}
    yield Example(
        images=[],
        question=text_of(row, "question", row_id),
        choices=[],
        steps=[check_text(s, "steps", row_id) for s in check_list(field_of(row, "steps", row_id), "steps", row_id)],
        answers=[answer_text(field_of(row, "answer", row_id), "answer", row_id)],
        row_id=row_id,
    )


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` sums per split as `<split>.txt`; return the options for `load`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in FILES.items():
        rng, lines = random.Random(f"gsm8k_aug {split} {seed}"), []
        for _ in range(num_rows):
            red, blue, price = (int(2 + 8 * rng.random()) for _ in range(3))
            question = f"Ann has {red} red and {blue} blue pens, each worth ${price}. How much are they worth?"
            pens, worth = red + blue, (red + blue) * price
            lines.append(f"{question}||<<{red}+{blue}={pens}>> <<{pens}*{price}={worth}>> #### {worth}")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"folder": str(folder)}


def load(*, split: str, folder: str | os.PathLike | None = None, path: str | os.PathLike | None = None) -> Dataset:
    """Load the rows of a split: no picture, an open question, one equation per step, the number.

    folder: holds `train.txt`, `valid.txt` and `test.txt`, or else `gsm_train.json`, `gsm_valid.json`, `gsm_test.json`.
    path: instead of folder, a Hub id such as `whynlp/gsm8k-aug`, or a folder as `hub.read_published` reads it.
    """
    check_split("gsm8k_aug", split)
    check_source("gsm8k_aug", folder=folder, path=path)
    if path is not None:
        return from_published(read_published(path, split), path, split, examples=_examples, images="none")
    file, coconut = Path(folder) / f"{FILES[split]}.txt", Path(folder) / f"gsm_{FILES[split]}.json"
    if coconut.is_file() and not file.is_file():
        return json_steps.load(split=split, file={split: str(coconut)}, images_required=False)
    return from_rows(_lines(file), _examples, source=file)
