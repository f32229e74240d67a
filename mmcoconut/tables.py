"""Tables of results in Markdown: stages of a run, modes of a comparison."""

from collections.abc import Mapping

from mmcoconut.records import markdown_table
from mmcoconut.statistics import Estimate, percent, points


# Of an evaluation while training; what else it measures are the figures of the metric and of the objective.
SPEED = ("runtime", "samples_per_second", "steps_per_second")


def stage_row(record: Mapping) -> dict:
    """Return what an evaluation measured, without its speed, under the names of results.json."""
    measured = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
    return {name: value for name, value in measured.items() if name not in SPEED}


def stage_rows(log_history: list[dict]) -> list[dict]:
    """The last evaluation of every stage, out of the trainer's log."""
    rows = {record["eval_stage"]: stage_row(record) for record in log_history if "eval_accuracy" in record}
    return [rows[stage] for stage in sorted(rows)]


def stage_table(rows: list[dict]) -> str:
    """A line a stage: latents of a prompt, mean of new tokens an answer, accuracy, rows evaluated."""
    cells = [
        (row["stage"], row["num_latents"], f"{row['generated_tokens']:.1f}", percent(row["accuracy"]), row["n"])
        for row in rows
    ]
    return markdown_table(["stage", "latents", "generated tokens", "accuracy", "n"], (map(str, row) for row in cells))


def against_baseline(difference: dict | None) -> str:
    return "" if difference is None else points(Estimate.of(difference))


def main_table(records: list[dict]) -> str:
    header = ["mode", "accuracy", "by seed, %", "against `coconut`", "tokens written", "latents"]
    header += ["decoder passes", "s an answer", "updates", "s of training"]
    rows = []
    for record in records:
        seconds = record["train_seconds"]
        rows.append(
            [
                f"`{record['mode']}`",
                str(Estimate.of(record["accuracy"])),
                " / ".join(f"{100 * accuracy:.1f}" for accuracy in record["accuracy_by_seed"].values()),
                against_baseline(record["difference_to_coconut"]),
                f"{record['generated_tokens']:.1f}",
                f"{record['num_latents']:g}",
                f"{record['decoder_passes']:.1f}",
                f"{record['seconds_per_answer']:.4f}",
                str(record["train_steps"]),
                "resumed" if seconds is None else f"{seconds:.1f}",
            ]
        )
    return markdown_table(header, rows)


def intervals(num_seeds: int) -> str:
    """Return what the numbers in brackets are."""
    if num_seeds == 1:
        return "In brackets: 95 % bootstrap intervals over rows, paired for differences; other seeds may differ more."
    return (
        "Accuracy is the mean over seeds. In brackets: bootstrap intervals over seeds and rows, paired for "
        "differences. With so few seeds they are too narrow (in simulations three of four hold the truth): read the "
        "seeds too."
    )
