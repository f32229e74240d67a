"""Matched controls of an audited checkpoint: runs trained with markers or idle positions instead of thoughts.

A run is read from the output of `mmcoconut.evaluation`, and paired with the audited rows one by one. Its evaluation
settings and its number of updates are checked against the audit; that the rest of its recipe matches, as within a
comparison, is up to the user.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmcoconut.errors import UsageError
from mmcoconut.evaluation.evaluate import PREDICTIONS_FILE, RECORD_FILE
from mmcoconut.records import changed_settings, read_json, read_lines
from mmcoconut.statistics import Estimate, bootstrap_difference, bootstrap_mean


# Instead of thoughts: nothing between the markers, or latents that feed nothing back.
CONTROL_MODES = ("markers", "pause")
SAME = ("dataset", "dataset_options", "split", "metric", "score_by")


@dataclass(frozen=True)
class Control:
    """A run and its scores (n,) on the rows of an audit. seed: of its training; None if unknown."""

    folder: str
    mode: str
    seed: int | None
    scores: list[float] = field(repr=False)


@dataclass(frozen=True)
class ControlOutcome:
    """A control compared with the audited checkpoint: paired `difference` of accuracies; rows lost and gained."""

    folder: str
    mode: str
    seed: int | None
    accuracy: Estimate
    difference: Estimate
    num_lost: int
    num_gained: int

    def asdict(self) -> dict:
        return asdict(self)


def evaluations_in(folder: Path, seed: int | None) -> list[Path]:
    """Return the evaluations in the folder, in that of its run, or in its comparison's runs with this seed.

    Raises:
        UsageError: there is none.
    """
    for place in (folder, folder / "evaluation"):
        if (place / RECORD_FILE).exists():
            return [place]
    runs = "seed*" if seed is None else f"seed{seed}"
    found = [file.parent for mode in CONTROL_MODES for file in folder.glob(f"{mode}-{runs}/evaluation/{RECORD_FILE}")]
    if not found:
        raise UsageError(
            f"controls: {folder} holds no {RECORD_FILE}, and no folder such as {CONTROL_MODES[-1]}-{runs} that does: "
            "give the folder of an evaluation, of a run of mode markers or pause, or of a comparison."
        )
    return sorted(found)


def check_control(folder: Path, record: Mapping, asked: Mapping, trained: Mapping | None) -> None:
    """Raise UsageError unless a run is a control with the same evaluation settings and number of updates.

    Raises:
        UsageError: names what differs, with both values.
    """
    run = record["trained_with"] or {}
    if run.get("mode") not in CONTROL_MODES:
        raise UsageError(
            f"controls: {folder} has mode {run.get('mode')!r}, which is no control for positions: give runs of mode "
            f"{' or '.join(CONTROL_MODES)}."
        )
    changes = changed_settings({key: record[key] for key in SAME}, {key: asked[key] for key in SAME})
    if changes:
        raise UsageError(f"controls: {folder} was evaluated with other settings ({changes}): use those of the audit.")
    steps = run["train_steps"], (trained or run)["train_steps"]
    if steps[0] != steps[1]:
        raise UsageError(
            f"controls: {folder} made {steps[0]} updates and the audited checkpoint {steps[1]}, so they cannot be "
            "compared: give a matched run, such as one of the same comparison."
        )


def scores_on(rows: Iterable[Mapping], lines: Sequence[Mapping], folder: Path) -> list[float]:
    """Return the scores of these rows among the lines of a predictions.jsonl.

    Raises:
        UsageError: some rows are not among them.
    """
    known = {(line["row_id"], line["question"], *line["gold"]): line["score"] for line in lines}
    keys = [(row["row_id"], row["question"], *row["answers"]) for row in rows]
    missing = [key for key in keys if key not in known]
    if missing:
        raise UsageError(
            f"controls: {folder} was evaluated on {len(lines)} rows, and {len(missing)} of the {len(keys)} audited "
            f"rows are not among them, such as {missing[0][0]}: evaluate the control on all rows of the split."
        )
    return [known[key] for key in keys]


def read_controls(folders: Iterable[str], rows, asked: Mapping, trained: Mapping | None) -> list[Control]:
    """Return the controls in these folders, see `evaluations_in`, with their scores on the rows of an audit.

    Args:
        asked: the audit's evaluation settings, the keys of `SAME`.
        trained: training record of the audited checkpoint, from results.json; None if unknown.

    Raises:
        UsageError: a folder has no evaluation, or one that cannot be compared.
    """
    rows = rows.remove_columns("images") if hasattr(rows, "remove_columns") else rows
    places = [place for folder in folders for place in evaluations_in(Path(folder), (trained or {}).get("seed"))]
    return [read_control(place, rows, asked, trained) for place in dict.fromkeys(places)]


def read_control(place: Path, rows, asked: Mapping, trained: Mapping | None) -> Control:
    """Return the control of one evaluation, see `read_controls`."""
    record = read_json(place / RECORD_FILE)
    check_control(place, record, asked, trained)
    scores = scores_on(rows, read_lines(place / PREDICTIONS_FILE), place)
    return Control(str(place), record["trained_with"]["mode"], record["trained_with"]["seed"], scores)


def beside(controls: Iterable[Control], scores: Sequence[float], *, seed: int) -> Iterator[ControlOutcome]:
    """Yield each control compared with the audited checkpoint's scores (n,) on the same rows."""
    for control in controls:
        pairs = list(zip(control.scores, scores, strict=True))
        yield ControlOutcome(
            folder=control.folder,
            mode=control.mode,
            seed=control.seed,
            accuracy=bootstrap_mean(control.scores, seed=seed),
            difference=bootstrap_difference(control.scores, scores, seed=seed),
            num_lost=sum(now < then for now, then in pairs),
            num_gained=sum(now > then for now, then in pairs),
        )
