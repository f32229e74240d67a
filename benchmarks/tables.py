"""The tables of README.md and docs/, made from the CSV files and the comparisons in results/.

    python benchmarks/tables.py [--check]

A table stands between two comments, of which the first says what it shows:

    <!-- table: bench_latent_step_laptop-2c.csv rows=prompt,latents pivot=side value=ratio -->
    <!-- end of table -->

rows: what names a line. Either pivot and value: a column for each value of the one, filled with the other; or show:
columns of the file as they are. where=key:value keeps the lines with that value.

A comparison is `compare.json`, as `train_hf.py --compare` writes it. Its table has a line a variant and the columns of
COLUMNS that show names, of each folder that `in` names, with what the column's head calls it:

    <!-- table: compare.json in=mazes:objectives_mazes,graphs:objectives_graphs show=accuracy,passes -->
"""

import argparse
import csv
import json
import re
from collections import Counter
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent
TABLE = re.compile(r"(<!-- table: (\S+) (.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read_rows(file: Path, where: str | None = None) -> list[dict]:
    """The lines of a CSV file, or those where one column has a value."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    key, _, value = (where or "").partition(":")
    return [row for row in rows if not key or row[key] == value]


def table_of(file: Path, *, rows: str, pivot: str = "", value: str = "", show: str = "", where: str = "") -> str:
    """A Markdown table of a CSV file; see the top of this file.

    Raises:
        KeyError: a column that the file does not have.
    """
    names, lines = rows.split(","), {}
    columns = show.split(",") if show else []
    for row in read_rows(file, where):
        line = lines.setdefault(tuple(row[name] for name in names), {})
        if show:
            line.update((column, row[column]) for column in columns)
        else:
            line[row[pivot]] = row[value]
            columns += [row[pivot]] if row[pivot] not in columns else []
    text = ["| " + " | ".join([*names, *columns]) + " |", "|---" * (len(names) + len(columns)) + "|"]
    for key, line in lines.items():
        text.append("| " + " | ".join([*key, *(line.get(column, "") for column in columns)]) + " |")
    return "\n".join(text) + "\n"


def percent_of(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def counted(labels: list[str]) -> str:
    """Labels with how often each was given, where they differ; not mmcoconut's, whose import takes seconds."""
    counts = Counter(labels)
    return ", ".join(f"{label} ({number})" if len(counts) > 1 else label for label, number in counts.items())


# Of a record of compare.json: what its column says.
COLUMNS = {
    "accuracy": lambda record: percent_of(record["accuracy"]["mean"]),
    "seeds": lambda record: " / ".join(f"{100 * each:.1f}" for each in record["accuracy_by_seed"].values()),
    "tokens": lambda record: f"{record['generated_tokens']:.1f}",
    "passes": lambda record: f"{record['decoder_passes']:.1f}",
    "thoughts": lambda record: counted(record["verdicts"] or ["–"]),
    "alone": lambda record: percent_of((record["necessity"] or {}).get("accuracy")),
    "positions": lambda record: counted(record["positions"] or ["–"]),
    "probe": lambda record: percent_of(record["probe_accuracy"]),
}
HEADS = {"accuracy": "accuracy", "seeds": "by seed, %", "tokens": "tokens", "passes": "passes"}
HEADS |= {"thoughts": "answer on thoughts", "alone": "thoughts alone", "positions": "positions alone"}
HEADS |= {"probe": "probe"}


def comparison_of(folder: Path, **options: str) -> str:
    """A Markdown table of comparisons below a folder; see the top of this file."""
    named = [part.partition(":")[::2] for part in options["in"].split(",")]
    records = {
        name: {record["mode"]: record for record in json.loads((folder / where / "compare.json").read_text())["modes"]}
        for name, where in named
    }
    shown, names = options["show"].split(","), dict.fromkeys(mode for modes in records.values() for mode in modes)
    heads = [f"{name}: {HEADS[column]}" if name else HEADS[column] for name, _ in named for column in shown]
    lines = []
    for mode in names:
        cells = [
            COLUMNS[column](modes[mode]) if mode in modes else "–" for modes in records.values() for column in shown
        ]
        lines.append(f"| `{mode}` | " + " | ".join(cells) + " |")
    return "\n".join(["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|", *lines]) + "\n"


def with_tables(text: str, folder: Path) -> str:
    """The text with all its tables made anew."""

    def made(match: re.Match) -> str:
        options = dict(option.split("=", 1) for option in match[3].split())
        made_of = comparison_of(folder, **options) if match[2] == "compare.json" else None
        return match[1] + (made_of or table_of(folder / match[2], **options)) + match[4]

    return TABLE.sub(made, text)


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    arguments = parser.parse_args()
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before, HERE / "results")
        if arguments.check and before != after:
            raise SystemExit(f"{page.name} differs from benchmarks/results: run `python benchmarks/tables.py`.")
        page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
