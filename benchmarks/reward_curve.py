"""The curve of runs by reward: what answers earned while they learnt, and held-out accuracy; a CSV file and a picture.

python benchmarks/reward_curve.py benchmarks/results/rewards/curve outputs/quickstart_grpo [more runs]
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
from measuring import history_of  # noqa: E402


COLUMNS = ("run", "seed", "update", "reward", "accuracy")


def rows_of(run: Path) -> list[dict]:
    """A row for every logged update: the mean reward since the last one, and the accuracy where it was evaluated."""
    rows, seed = {}, json.loads((run / "results.json").read_text())["seed"]
    for record in history_of(run):
        row = rows.setdefault(record["step"], {"run": run.name, "seed": seed, "update": record["step"]})
        row |= {"reward": record["reward"]} if "reward" in record else {}
        row |= {"accuracy": record["eval_accuracy"]} if "eval_accuracy" in record else {}
    return [rows[step] for step in sorted(rows) if rows[step].keys() & {"reward", "accuracy"}]


def draw(runs: list[list[dict]], file: Path) -> None:
    """Rewards as thin lines, accuracies as thick ones, a colour a run."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for number, rows in enumerate(runs):
        for name, style in (("reward", {"alpha": 0.4}), ("accuracy", {"marker": "o", "markersize": 3})):
            points = [(row["update"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points), color=f"C{number}", label=f"{name}, seed {rows[0]['seed']}", **style)
    axes.set(xlabel="update", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(argv: list[str]) -> None:
    out, *folders = map(Path, argv)
    runs = [rows_of(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for rows in runs for row in rows)
    draw(runs, out.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
