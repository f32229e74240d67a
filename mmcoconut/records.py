"""How records are kept: JSON, JSON Lines, and tables in Markdown."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"  # of a training run, beside its weights


def write_json(file: Path, record) -> None:
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def json_line(record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_lines(file: Path, records: Iterable) -> None:
    """One record a line."""
    file.write_text("".join(map(json_line, records)), encoding="utf-8")


def read_lines(file: Path) -> list[dict]:
    """The complete lines of a JSON Lines file; a last line that was cut off in writing is left out."""
    # Bytes: a line may end inside a character, and splitlines() also cuts at characters inside a JSON string.
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
