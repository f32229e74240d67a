"""Compare modes and objectives: train each with each seed on the same rows, order and updates, and write one table.

`python train_hf.py recipe.yaml --compare cot,no_cot,coconut,coconut+step_tokens --seeds 3` writes to the recipe's
output_dir

    coconut-seed1/              a run of train_hf.py; evaluation/ is written by mmcoconut.evaluation, audit/ a
                                brief audit of its thoughts
    coconut-seed1.yaml, .log    its recipe and its printed output
    compare.json, .md, .png     the table as JSON, Markdown and picture

Called again, also with more variants, it repeats only unfinished runs. Shapes: S runs of a variant, one per
seed; n examples.
"""

import json
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import yaml

from mmcoconut.data.scoring import commonest_answer
from mmcoconut.errors import UsageError
from mmcoconut.evaluation.evaluate import PREDICTIONS_FILE, RECORD_FILE
from mmcoconut.evaluation.matched_runs import (
    AUDITED_ROWS,
    Run,
    Runner,
    check_finished,
    check_folders,
    clear,
    device_of_runs,
    evaluation_options,
    plan_runs,
)
from mmcoconut.provenance import without_tokens
from mmcoconut.records import RESULTS_FILE, markdown_table, read_json, read_lines, write_json
from mmcoconut.statistics import Estimate, bootstrap_difference, bootstrap_runs, percent
from mmcoconut.tables import intervals, main_table


BASELINE = "coconut"
AUDIT_FILE = "audit.json"
# Keys of a recipe in which variants differ.
VARIED = ("mode", "thought_schedule", "jacobi_iterations", "objectives")
# Okabe and Ito's colours, distinguishable for the colour-blind, and a marker: constant per mode in all plots.
STYLES = {
    "coconut": {"color": "#0072B2", "marker": "o"},
    "jacobi": {"color": "#56B4E9", "marker": "o"},
    "cot": {"color": "#000000", "marker": "v"},
    "no_cot": {"color": "#D55E00", "marker": "s"},
    "no_thoughts": {"color": "#009E73", "marker": "^"},
    "icot": {"color": "#009E73", "marker": "<"},
    "markers": {"color": "#E69F00", "marker": "D"},
    "pause": {"color": "#CC79A7", "marker": "D"},
}


@dataclass(frozen=True)
class Finished:
    """The output of a finished run: results.json, evaluation.json, predictions by index, and audit.json, or None."""

    run: Run
    results: dict
    evaluation: dict
    predictions: list[dict]
    audit: dict | None = None

    @cached_property
    def rows(self) -> list[tuple]:
        """The rows of the evaluation; equal in all runs of a comparison."""
        return [(row["index"], row["row_id"], row["num_steps"]) for row in self.predictions]

    @cached_property
    def scores(self) -> list[float]:
        return [row["score"] for row in self.predictions]


def read_outcome(run: Run) -> Finished:
    return Finished(
        run=run,
        results=read_json(run.folder / RESULTS_FILE),
        evaluation=read_json(run.evaluation / RECORD_FILE),
        predictions=sorted(read_lines(run.evaluation / PREDICTIONS_FILE), key=lambda row: row["index"]),
        audit=read_json(run.audit / AUDIT_FILE) if (run.audit / AUDIT_FILE).exists() else None,
    )


def check_matched(outcomes: list[Finished]) -> None:
    """Raise ValueError unless all runs made equally many updates and answered the same rows."""
    first = outcomes[0]
    for other in outcomes[1:]:
        steps = first.results["train_steps"], other.results["train_steps"]
        if steps[0] != steps[1]:
            raise UsageError(
                f"{first.run} made {steps[0]} updates and {other.run} made {steps[1]}, so they do not compare. Did "
                "the training data change between them? Repeat the comparison with --overwrite true."
            )
        if first.rows != other.rows:
            unpaired = sorted({*first.rows} ^ {*other.rows}, key=str)
            raise UsageError(
                f"{first.run} was evaluated on {len(first.rows)} rows and {other.run} on {len(other.rows)}; "
                f"{len(unpaired)} of them are not the same, such as {unpaired[0]}: did the data change between them? "
                f"Delete {first.run.evaluation} and {other.run.evaluation}, and repeat the command."
            )


def commonest_gold(finished: Finished) -> dict:
    """Return the gold answer of most rows, and the accuracy of always giving it."""
    rows = [{**row, "answers": row["gold"]} for row in finished.predictions]
    answer, accuracy = commonest_answer(rows, finished.evaluation["metric"])
    return {"answer": answer, "accuracy": accuracy}


def training_seconds(outcomes: list[Finished]) -> float | None:
    """Return the mean over runs; None if all were resumed, since a resumed run only knows the time after resuming."""
    whole = [outcome for outcome in outcomes if "--resume_from_checkpoint" not in outcome.results["command"]]
    return float(np.mean([outcome.results["train_seconds"] for outcome in whole])) if whole else None


def mean_known(values) -> float | None:
    """Return the mean of the values that are not None.

    >>> mean_known([1.0, None, 2.0]), mean_known([None])
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def probe_accuracy(audit: dict) -> float | None:
    """Return the mean over thoughts of the accuracy of each thought's best probe target; None without probes."""
    best = [max((value for value in row if value is not None), default=None) for row in audit["probe"]["accuracy"]]
    return mean_known(best)


def audited(outcomes: list[Finished]) -> dict:
    """Return the results of the audits of a variant's runs, by seed or as means; None where no audit has them."""
    audits = [outcome.audit for outcome in outcomes if outcome.audit is not None]
    findings = [audit["necessity"] for audit in audits if "necessity" in audit]
    accuracy = mean_known((found.get("accuracy") or {}).get("mean") for found in findings)
    return {
        "verdicts": [audit["verdict"]["label"] for audit in audits] or None,
        "necessity": {"labels": [found["label"] for found in findings], "accuracy": accuracy} if findings else None,
        "positions": [audit["positions"]["label"] for audit in audits if "positions" in audit] or None,
        "probe_accuracy": mean_known(map(probe_accuracy, audits)),
    }


def mode_record(outcomes: list[Finished], baseline: list[Finished] | None) -> dict:
    """Return all figures of a variant from its runs; `baseline` holds the coconut runs with the same seeds."""
    scores = np.array([outcome.scores for outcome in outcomes])  # (S, n)
    num_steps = np.array([row["num_steps"] for row in outcomes[0].predictions])  # (n,)
    groups = {str(number): scores[:, num_steps == number] for number in np.unique(num_steps)}
    by_steps = {number: {**bootstrap_runs(group).asdict(), "n": group.shape[1]} for number, group in groups.items()}
    results = [outcome.results for outcome in outcomes]
    record = {
        "mode": outcomes[0].run.variant.name,
        "accuracy": bootstrap_runs(scores).asdict(),
        "accuracy_by_seed": {str(outcome.run.seed): float(np.mean(outcome.scores)) for outcome in outcomes},
        "difference_to_coconut": None,
        "by_num_steps": by_steps,
        "train_steps": results[0]["train_steps"],
        "train_seconds": training_seconds(outcomes),
        "seconds_per_update": mean_known(result.get("seconds_per_update") for result in results),
        "train_peak_memory_mb": mean_known(result.get("peak_memory_mb") for result in results),
        "parameters": results[0]["parameters"],
        "settings": settings_of(outcomes[0].run),
        **audited(outcomes),
    }
    if baseline is not None and record["mode"] != BASELINE:
        base = [outcome.scores for outcome in baseline]
        record["difference_to_coconut"] = bootstrap_difference(scores, base).asdict()
    for key in ("generated_tokens", "num_latents", "decoder_passes", "seconds_per_answer", "peak_memory_mb"):
        record[key] = float(np.mean([outcome.evaluation[key] for outcome in outcomes]))
    return record


def distinct(values) -> list:
    """Return the distinct values in order; a single one if all runs agree."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]


def settings_of(run: Run) -> dict:
    """Return the keys of a recipe that differ between variants, with the run's values."""
    values = yaml.safe_load(run.recipe)
    return {key: values.get(key) for key in VARIED}


def shared_recipe(run: Run) -> dict:
    """Return the recipe keys that all runs share."""
    own = ("seed", "output_dir", "run_name", *VARIED)
    return {key: value for key, value in yaml.safe_load(run.recipe).items() if key not in own}


def summarise(outcomes: list[Finished], *, command: str) -> dict:
    """Return the content of compare.json: one record per variant, in order, and the settings of the comparison."""
    by_mode: dict[str, list[Finished]] = {}
    for outcome in outcomes:
        by_mode.setdefault(outcome.run.variant.name, []).append(outcome)
    evaluations = [outcome.evaluation for outcome in outcomes]
    return {
        "modes": [mode_record(some, by_mode.get(BASELINE)) for some in by_mode.values()],
        "commonest_answer": commonest_gold(outcomes[0]),
        **{key: evaluations[0][key] for key in ("dataset", "split", "metric", "n")},
        "seeds": distinct(outcome.run.seed for outcome in outcomes),
        "command": command,
        "date": max(outcome.results["date"] for outcome in outcomes),
        "machine": distinct(outcome.results["machine"] for outcome in outcomes),
        "evaluation_machine": distinct(evaluation["machine"] for evaluation in evaluations),
        "versions": distinct(
            part["versions"] for outcome in outcomes for part in (outcome.results, outcome.evaluation)
        ),
        "commit": distinct(part["commit"] for outcome in outcomes for part in (outcome.results, outcome.evaluation)),
        "recipe": shared_recipe(outcomes[0].run),
    }


def steps_table(records: list[dict]) -> str:
    groups = records[0]["by_num_steps"]
    header = ["accuracy by written steps of a row", *(f"{steps} (n = {groups[steps]['n']})" for steps in groups)]
    rows = []
    for record in records:
        estimates = [str(Estimate.of(group)) for group in record["by_num_steps"].values()]
        rows.append([f"`{record['mode']}`", *estimates])
    return markdown_table(header, rows)


def listed(values) -> str:
    """Format distinct values in one line; mappings as `torch 2.13.0, …`."""
    parts = [
        ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        for value in values
    ]
    return "; ".join(parts)


def audit_notes(summary: dict) -> list[str]:
    """Explain the columns of the audits, if there are any."""
    if not any(record.get("verdicts") for record in summary["modes"]):
        return []
    return [
        f"Audits use at most {AUDITED_ROWS} rows per run. `answer on thoughts` tests the dependence by giving "
        "rows the thoughts of other rows. `thoughts alone`: accuracy if the answer sees nothing else; a "
        "model that was not trained with `answer_sees: thoughts` may fail for that reason only. `positions alone`: "
        "whether latents that feed nothing back suffice, from the runs of `pause` and `markers` with the same "
        "seed, if any, and from this model with the latent token's embedding in place of its thoughts. "
        "`probe`: accuracy of a linear classifier on held-out rows, for the written step or answer that it "
        "reads best in each thought; the mean over thoughts. "
        "Modes that feed back no thought are not audited."
    ]


def markdown(summary: dict) -> str:
    """Return compare.md: the table, accuracy by number of steps, and the settings of the comparison."""
    commonest = summary["commonest_answer"]
    seeds = ", ".join(map(str, summary["seeds"]))
    notes = [
        f"{summary['n']} rows of `{summary['dataset']}` ({summary['split']}), metric `{summary['metric']}`. Each line "
        f"was trained on the same rows in the same order, with the seeds {seeds}. "
        f"{intervals(len(summary['seeds']))} Always answering `{commonest['answer']}`, the most common answer, gives "
        f"{percent(commonest['accuracy'])}.",
        "Training seconds include the evaluation at the end of each stage, seconds per update do not; both depend on "
        "other load of the machine. MB: peak memory of the training process.",
        *audit_notes(summary),
        f"Trained on {listed(summary['machine'])}; evaluated on {listed(summary['evaluation_machine'])}; "
        f"{listed(summary['versions'])}; commit {listed(summary['commit'])}; {summary['date']}:",
    ]
    parts = [main_table(summary["modes"]), steps_table(summary["modes"]), *notes]
    return "\n\n".join([*parts, f"```bash\n{summary['command']}\n```"]) + "\n"


def error_bars(estimates: list[dict]) -> np.ndarray:
    """Return the lengths (2, number) of the bars below and above the means, in %."""
    below = [estimate["mean"] - estimate["low"] for estimate in estimates]
    above = [estimate["high"] - estimate["mean"] for estimate in estimates]
    return 100 * np.maximum([below, above], 0)


def style_of(name: str) -> dict:
    """Return colour and marker of a variant: its mode's, and a plus with objectives."""
    start, _, objectives = name.partition("+")
    return STYLES[start] | ({"marker": "P"} if objectives else {})


def draw_modes(axes, records: list[dict], commonest: dict) -> None:
    """Draw each variant's accuracy with its interval and, smaller, its seeds; a line marks the most common answer."""
    for place, record in enumerate(records):
        style, accuracy = style_of(record["mode"]), record["accuracy"]
        bars = error_bars([accuracy])
        axes.errorbar(100 * accuracy["mean"], place, xerr=bars, markersize=6, capsize=3, **style)
        seeds = [100 * share for share in record["accuracy_by_seed"].values()]
        axes.plot(seeds, [place + 0.27] * len(seeds), linestyle="", marker="|", color=style["color"], markersize=5)
    axes.axvline(100 * commonest["accuracy"], color="grey", linestyle=":", label="most common answer")
    axes.set_yticks(range(len(records)), [record["mode"] for record in records])
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("accuracy, %, its interval and its seeds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def draw_steps(axes, records: list[dict]) -> None:
    """Draw accuracy by the number of written steps as colours and numbers, one line per variant."""
    steps = list(records[0]["by_num_steps"])
    shares = np.array([[100 * group["mean"] for group in record["by_num_steps"].values()] for record in records])
    axes.imshow(shares, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for (line, column), share in np.ndenumerate(shares):
        colour = "white" if share > 60 else "black"
        axes.text(column, line, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(steps)), steps)
    axes.tick_params(left=False, labelleft=False)
    axes.set_xlabel("accuracy, %, by written steps")


def draw(summary: dict, file: Path) -> None:
    """Draw compare.png, 1600 pixels wide and as high as its lines need, to be shown at half that size."""
    from matplotlib.figure import Figure

    records = summary["modes"]
    figure = Figure(figsize=(8, 1.4 + 0.3 * max(len(records), 3)), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 2]})
    draw_steps(right, records)
    draw_modes(left, records, summary["commonest_answer"])
    figure.savefig(file)


def check_start(runs: list[Run], *, overwrite: bool) -> None:
    """Check at the start what would otherwise stop the comparison at its end."""
    needed = {"matplotlib": "draws its table", "sklearn": "audits thoughts"}
    for name, does in needed.items():
        if find_spec(name) is None:
            raise ImportError(f"A comparison {does} with {name}, which is missing: pip install mmcoconut[audit]")
    if "LOCAL_RANK" in os.environ:
        raise UsageError("A comparison launches its runs itself. Start it with `python train_hf.py`, in one process.")
    if overwrite:
        clear(runs)
    check_folders(runs)


def compare(model_args, data_args, curriculum_args, run_args, *, script: str, argv: list[str]) -> dict:
    """Train, evaluate, audit and tabulate every variant in `run_args.compare`; return the content of compare.json.

    Args:
        script: path of train_hf.py, which trains each run.
        argv: the command line, to be saved with the results.

    Raises:
        ComparisonError: failed runs; finished runs are kept.
        ValueError: folders of another recipe, or runs that do not compare.
    """
    folder = Path(run_args.output_dir)
    runs = plan_runs(model_args, data_args, curriculum_args, run_args)
    check_start(runs, overwrite=run_args.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    options = evaluation_options(data_args, run_args)
    runner = Runner(script, options=options, device=device_of_runs(run_args.device), jobs=run_args.jobs)
    check_finished(runner.finish_all(runs), len(runs))
    outcomes = [read_outcome(run) for run in runs]
    check_matched(outcomes)
    command = shlex.join(["python", Path(script).name, *without_tokens(argv)])
    summary = summarise(outcomes, command=command)
    write_json(folder / "compare.json", summary)
    (folder / "compare.md").write_text(markdown(summary), encoding="utf-8")
    draw(summary, folder / "compare.png")
    print(markdown(summary))
    return summary
