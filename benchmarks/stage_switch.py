"""What a stage switch does to the loss, and what each stage ends with: a line per run and stage, as CSV.

    python benchmarks/stage_switch.py benchmarks/results/smollm2/stage_switch.csv outputs/a outputs/b

loss_before, loss_after: the means over the last and the first logged updates around the switch (`logging_steps` of
them). Runs must have been saved with their log, in a checkpoint.
"""

import argparse
import csv
from pathlib import Path

import yaml
from measuring import history_of


SHOWN = ("markers", "thought_norm", "c_thought", "mode", "lora", "learning_rate", "seed")  # of the recipe


def rows_of(run: Path) -> list[dict]:
    """A row for every stage of a run."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    rows, last = {}, None
    for record in history_of(run):
        row = rows.setdefault(record["stage"], {"run": run.name, **{name: recipe.get(name) for name in SHOWN}})
        row |= {"stage": record["stage"], "updates_until": record["step"]}
        if "loss" in record:
            row.setdefault("loss_before", last)
            row.setdefault("loss_after", record["loss"])
            last = record["loss"]
        if "eval_accuracy" in record:
            row |= {"accuracy": record["eval_accuracy"], "n": record["eval_n"]}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="CSV file that is written")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of training runs")
    arguments = parser.parse_args()
    rows = [row for run in arguments.runs for row in rows_of(run)]
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    with arguments.file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items() if value is not None))


if __name__ == "__main__":
    main()
