"""Load ProsQA, text-only questions about paths in a graph of made-up words, from the files of Coconut's repository.

`prosqa_<split>.json` is the format of `json_steps` without pictures; its fields about the graph are not read. Paper:
https://arxiv.org/abs/2412.06769
"""

import os
import random
from pathlib import Path

from datasets import Dataset

from mmcoconut.data import check_split, json_steps
from mmcoconut.data.public import save_json


FILES = {"train": "train", "validation": "valid", "test": "test"}
WORDS = ("bompus", "dumpus", "gorpus", "hilpus", "jelpus", "kerpus", "lempus", "rompus", "shumpus", "yumpus")


def _sample_row(rng: random.Random) -> dict:
    """Return a row with a name, a chain of three words that apply to it, and another chain that does not."""
    words = sorted(WORDS, key=lambda word: rng.random())
    path, others = words[:3], words[3:6]
    edges = [*zip(path, path[1:], strict=False), *zip(others, others[1:], strict=False)]
    facts = ["Alex is a " + path[0] + ".", *(f"Every {a} is a {b}." for a, b in edges)]
    options = sorted((path[-1], others[-1]))
    question = " ".join(sorted(facts, key=lambda fact: rng.random()))
    return {
        "question": f"{question} Is Alex a {options[0]} or {options[1]}?",
        "answer": f"Alex is a {path[-1]}.",
        "steps": [facts[0], facts[1], facts[2]],
        "idx_to_symbol": ["Alex", *path, *others],
        "edges": [[0, 1], [1, 2], [2, 3], [4, 5], [5, 6]],
        "root": 0,
        "target": 3,
        "neg_target": 6,
    }


def write_sample(folder: str | os.PathLike, *, num_rows: int, seed: int) -> dict:
    """Write `num_rows` small graphs per split as the published files; return the options for `load`."""
    for split, name in FILES.items():
        rng = random.Random(f"prosqa {split} {seed}")
        save_json(Path(folder) / f"prosqa_{name}.json", [_sample_row(rng) for _ in range(num_rows)])
    return {"folder": str(folder)}


def load(*, split: str, folder: str | os.PathLike) -> Dataset:
    """Load the rows of a split: no picture, the facts and the question, one fact of the path per step, the answer.

    folder: holds `prosqa_train.json`, `prosqa_valid.json` and `prosqa_test.json`.
    """
    check_split("prosqa", split)
    file = Path(folder) / f"prosqa_{FILES[split]}.json"
    return json_steps.load(split=split, file={split: str(file)}, images_required=False)
