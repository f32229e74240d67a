"""Rows that are longer than a model may read: whole turns go, from the end, and what went is counted.

A row whose first turn, or only one, is too long is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from mmcoconut.data import FEATURES


LONG_ROWS = ("error", "cut")
PICTURES = ["images", "row_id"]
TEXTS = [column for column in FEATURES if column not in PICTURES]


@dataclass
class Cut:
    """How many rows were too long, how many turns they lost, and how many rows were left out whole."""

    rows: int = 0
    turns: int = 0
    left_out: int = 0

    def asdict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.rows} rows too long: {self.turns} turns cut from their ends, {self.left_out} rows left out"


def without_last_turn(row: Mapping[str, Any]) -> dict:
    """A conversation that ends one turn earlier."""
    *history, last = row["history"]
    texts = {"question": last["question"], "answers": [last["answer"]], "choices": [], "steps": []}
    return {**row, **texts, "history": history}


def fit_rows(rows: Dataset, length_of: Callable[[Mapping[str, Any]], int], limit: int) -> tuple[Dataset, Cut]:
    """The rows of no more than `limit` tokens by `length_of`, whole turns being cut from the ends of longer ones.

    Raises:
        ValueError: not one row is left.
    """
    cut, kept, texts = Cut(), [], []
    for index, row in enumerate(rows):
        num_turns = 1 + len(row["history"])
        while (too_long := length_of(row) > limit) and row["history"]:
            row = without_last_turn(row)
        num_cut = num_turns - 1 - len(row["history"])
        cut.rows += num_cut > 0 or too_long
        cut.left_out += too_long
        cut.turns += 0 if too_long else num_cut
        if not too_long:
            kept.append(index)
            texts.append({column: row[column] for column in TEXTS})
    if not kept:
        raise ValueError(f"None of the {len(rows)} rows fits into {limit} tokens: raise max_length.")
    if not cut.rows:
        return rows, cut
    features = Features({column: FEATURES[column] for column in TEXTS})
    shortened = Dataset.from_dict({column: [text[column] for text in texts] for column in TEXTS}, features=features)
    return concatenate_datasets([rows.select(kept).select_columns(PICTURES), shortened], axis=1), cut
