"""Controls of an audit are matched runs, paired with its rows; what does not compare is refused with the reason."""

import json
from pathlib import Path

import pytest

from mmcoconut.audit.controls import Control, beside, read_controls
from mmcoconut.errors import UsageError


ASKED = {
    "dataset": "arrow_mazes",
    "dataset_options": {"grid_size": 3},
    "split": "test",
    "metric": "exact_match",
    "score_by": "generation",
}
TRAINED = {"mode": "coconut", "seed": 2, "train_steps": 100}
ROWS = [{"row_id": f"row {index}", "question": "Which?", "answers": ["red"], "images": []} for index in range(6)]


def write_evaluation(folder: Path, mode: str = "pause", *, scores=(0, 1, 0, 1, 1, 1), seed=2, steps=100, **changed):
    """An evaluation of six rows, in an order that is not the audit's."""
    folder.mkdir(parents=True)
    trained = {"mode": mode, "seed": seed, "train_steps": steps}
    (folder / "evaluation.json").write_text(json.dumps({**ASKED, "trained_with": trained, **changed}))
    lines = [
        json.dumps({"row_id": row["row_id"], "question": row["question"], "gold": row["answers"], "score": score})
        for row, score in zip(ROWS, scores)
    ]
    (folder / "predictions.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return folder


def read(*folders, rows=ROWS, trained=TRAINED) -> list[Control]:
    return read_controls([str(folder) for folder in folders], rows, ASKED, trained)


def test_scores_are_those_of_the_audited_rows_in_their_order(tmp_path):
    [control] = read(write_evaluation(tmp_path / "control"), rows=[ROWS[3], ROWS[0], ROWS[1]])
    assert (control.mode, control.seed, control.scores) == ("pause", 2, [1, 0, 1])
    [outcome] = beside([control], [1.0, 1.0, 0.0], seed=0)
    assert (outcome.num_lost, outcome.num_gained) == (1, 1)
    assert outcome.accuracy.mean == pytest.approx(2 / 3) and outcome.difference.mean == 0


def test_a_folder_is_an_evaluation_a_run_or_a_comparison(tmp_path):
    compared = tmp_path / "compared"
    for mode in ("cot", "markers", "pause"):
        for seed in (1, 2):
            write_evaluation(compared / f"{mode}-seed{seed}" / "evaluation", mode, seed=seed)
    of_run = read(compared / "pause-seed1")
    assert [(control.mode, control.seed) for control in of_run] == [("pause", 1)]
    assert of_run == read(compared / "pause-seed1" / "evaluation")
    assert [(control.mode, control.seed) for control in read(compared)] == [("markers", 2), ("pause", 2)]
    assert len(read(compared, trained=None)) == 4
    assert len(read(compared, compared / "pause-seed2")) == 2  # each once


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"mode": "cot"}, "has mode 'cot', which is no control"),
        ({"trained_with": None}, "has mode None, which is no control"),
        ({"split": "train"}, "split was 'train' and is 'test'"),
        ({"dataset_options": {"grid_size": 4}}, "dataset_options was"),
        ({"score_by": "likelihood"}, "score_by was 'likelihood' and is 'generation'"),
        ({"steps": 90}, "made 90 updates and the audited checkpoint 100"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path, made, message):
    with pytest.raises(UsageError, match=message):
        read(write_evaluation(tmp_path / "control", **made))


def test_rows_that_were_not_evaluated_are_counted(tmp_path):
    folder = write_evaluation(tmp_path / "control", scores=(1, 1))
    with pytest.raises(UsageError, match="on 2 rows, and 4 of the 6 audited rows.*such as row 2: evaluate"):
        read(folder)


def test_a_folder_without_evaluations_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no evaluation.json, and no folder such as pause-seed2 that does"):
        read(tmp_path)
