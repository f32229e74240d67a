"""Read and write records: JSON, JSON Lines, and tables in Markdown."""

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path


RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"  # of a training run, saved with its weights
COURSE_FILE = "course.json"  # of a checkpoint: how it was trained
ADAPTER_FOLDER = "adapter"  # saved with the merged weights
OBJECTIVES_FILE = "objectives.safetensors"  # of a checkpoint: weights of its run's objectives
OBJECTIVES_FOLDER = "objectives"  # of a training run: weights of each, for reading its thoughts


def sync(path: Path) -> None:
    """Flush a file to disk; Windows requires a file opened for writing, and is left to the system."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str) -> None:
    """Write a file that others find either unchanged or complete, even if this process is killed."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(file: Path, record) -> None:
    """Write a record as JSON, completely or not at all."""
    write_whole(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def json_line(record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_lines(file: Path, records: Iterable) -> None:
    """Write one record per line."""
    file.write_text("".join(map(json_line, records)), encoding="utf-8")


def read_lines(file: Path) -> list[dict]:
    """Return the complete lines of a JSON Lines file; a truncated last line is ignored."""
    # Bytes: a line may end inside a character, and splitlines() also cuts at characters inside a JSON string.
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def changed_settings(before: Mapping, now: Mapping, *, may_change: Container[str] = ()) -> str:
    """Return the differences between a folder's settings and the current ones; empty if there are none.

    >>> changed_settings({"split": "test", "seed": 1}, {"split": "train", "seed": 2, "n": 3}, may_change=["seed"])
    "split was 'test' and is 'train'; n was None and is 3"
    """
    now = json.loads(json.dumps(now))  # as `before` was read
    keys = [key for key in {**before, **now} if key not in may_change and before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table in Markdown.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
