"""Tables of results in Markdown: stages of a run, modes of a comparison."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mmcoconut.records import markdown_table
from mmcoconut.statistics import Estimate, percent, points


# Keys of an evaluation during training; other keys are figures of the metric and of the objective.
SPEED = ("runtime", "samples_per_second", "steps_per_second")


def stage_row(record: Mapping) -> dict:
    """Return the results of an evaluation, without its speed, under the names in results.json."""
    measured = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
    return {name: value for name, value in measured.items() if name not in SPEED}


def stage_rows(log_history: list[dict]) -> list[dict]:
    """Return the last evaluation of every stage, out of the trainer's log."""
    rows = {record["eval_stage"]: stage_row(record) for record in log_history if "eval_accuracy" in record}
    return [rows[stage] for stage in sorted(rows)]


def stage_table(rows: list[dict]) -> str:
    """Format one line per stage: latents per prompt, mean new tokens per answer, accuracy, rows evaluated."""
    cells = [
        (row["stage"], row["num_latents"], f"{row['generated_tokens']:.1f}", percent(row["accuracy"]), row["n"])
        for row in rows
    ]
    return markdown_table(["stage", "latents", "generated tokens", "accuracy", "n"], (map(str, row) for row in cells))


def against_baseline(difference: dict | None) -> str:
    return "" if difference is None else points(Estimate.of(difference))


def seconds_text(record: Mapping) -> str:
    seconds = record["train_seconds"]
    return "resumed" if seconds is None else f"{seconds:.1f}"


# Columns of a table of modes: heading, the text for a record, the required key of a record.
MAIN_COLUMNS = (
    ("mode", lambda record: f"`{record['mode']}`", "mode"),
    ("accuracy", lambda record: str(Estimate.of(record["accuracy"])), "accuracy"),
    ("by seed, %", lambda record: " / ".join(f"{100 * x:.1f}" for x in record["accuracy_by_seed"].values()), "mode"),
    ("against `coconut`", lambda record: against_baseline(record["difference_to_coconut"]), "mode"),
    ("tokens written", lambda record: f"{record['generated_tokens']:.1f}", "mode"),
    ("latents", lambda record: f"{record['num_latents']:g}", "mode"),
    ("decoder passes", lambda record: f"{record['decoder_passes']:.1f}", "mode"),
    ("s per answer", lambda record: f"{record['seconds_per_answer']:.4f}", "mode"),
    ("updates", lambda record: str(record["train_steps"]), "mode"),
    ("s of training", seconds_text, "mode"),
    ("s per update", lambda record: f"{record['seconds_per_update']:.4f}", "seconds_per_update"),
    ("MB in training", lambda record: f"{record['train_peak_memory_mb']:.0f}", "train_peak_memory_mb"),
    ("answer on thoughts", lambda record: counted(record["verdicts"]), "verdicts"),
    ("thoughts alone", lambda record: necessity_text(record["necessity"]), "necessity"),
    ("positions alone", lambda record: counted(record["positions"]), "positions"),
    ("probe", lambda record: percent(record["probe_accuracy"]), "probe_accuracy"),
)


def counted(labels: Sequence[str]) -> str:
    """Return how often each label occurs, if there are several.

    >>> counted(["depends", "depends", "cannot be told"]), counted(["depends"])
    ('depends (2), cannot be told (1)', 'depends')
    """
    counts = Counter(labels)
    if len(labels) == 1:
        return labels[0]
    return ", ".join(f"{label} ({number})" for label, number in counts.items())


def necessity_text(necessity: Mapping) -> str:
    """Return the accuracy of answers that see only the thoughts, if measured, and the audit's verdict on it."""
    accuracy = necessity["accuracy"]
    return ": ".join([*([] if accuracy is None else [percent(accuracy)]), counted(necessity["labels"])])


def main_table(records: list[dict]) -> str:
    """Format one line per mode; columns that no record has, as in older comparisons, are left out."""
    columns = [column for column in MAIN_COLUMNS if any(record.get(column[2]) is not None for record in records)]
    rows = [[text(record) if record.get(key) is not None else "–" for _, text, key in columns] for record in records]
    return markdown_table([head for head, _, _ in columns], rows)


def intervals(num_seeds: int) -> str:
    """Explain the numbers in brackets."""
    if num_seeds == 1:
        return "In brackets: 95 % bootstrap intervals over rows, paired for differences; other seeds may differ more."
    return (
        "Accuracy is the mean over seeds. In brackets: bootstrap intervals over seeds and rows, paired for "
        "differences. With so few seeds they are too narrow (in simulations three of four hold the truth): read the "
        "seeds too."
    )
