"""Every data set is scored by its metric, from references that the metric takes, also from an installed package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmcoconut.data import DATASETS, TEST_ONLY, load_examples, loader_of, scoring
from mmcoconut.data.scoring import (
    METRIC_OF_DATASET,
    REFERENCES,
    default_metric,
    load_metric,
    metric_folder,
    references_of,
    score,
)


ROOT = Path(__file__).resolve().parent.parent
# All others have exact_match.
METRICS = {
    "aokvqa": "aokvqa_mc",
    "flickr30k": "captions",
    "gsm8k_aug": "numeric_answer",
    "mmvp": "pair_accuracy",
    "path_vqa": "medical_vqa",
    "vqa_rad": "medical_vqa",
    "vqav2": "vqa_accuracy",
}
ROW = {"row_id": "row 4", "choices": ["kite", "bird", "7"], "answers": ["7", "seven"]}
INSTALLED = (
    "from mmcoconut.data.scoring import REFERENCES, metric_folder; print(*map(metric_folder, REFERENCES), sep='\\n')"
)


def sample(name: str, folder: Path, **options):
    split = "test" if name in TEST_ONLY else "validation"
    return load_examples(name, split=split, **loader_of(name).write_sample(folder, num_rows=4, seed=0), **options)


def scores_of(metric: str, answers: list[str], rows) -> list[float]:
    return score(metric, [f"so it is\n### {answer}" for answer in answers], answers, rows=list(rows))["scores"]


@pytest.mark.parametrize("name", DATASETS)
def test_gold_answers_of_every_data_set_are_right_and_others_wrong(name, tmp_path):
    rows = sample(name, tmp_path)
    metric = default_metric(name, rows[0])
    assert metric == METRICS.get(name, "exact_match")
    gold = [row["answers"][0] for row in rows]
    assert scores_of(metric, gold, rows) == [1.0] * len(rows)
    assert scores_of(metric, ["-1.5"] * len(rows), rows) == [0.0] * len(rows)
    assert scores_of(metric, [""] * len(rows), rows) == [0.0] * len(rows)


def test_metrics_are_named_for_data_sets_that_exist():
    assert METRIC_OF_DATASET.keys() <= DATASETS.keys()
    assert {*METRIC_OF_DATASET.values()} <= REFERENCES.keys()


def test_aokvqa_is_scored_by_the_task_that_was_loaded(tmp_path):
    rows = sample("aokvqa", tmp_path / "choices")
    index = str(rows[0]["choices"].index(rows[0]["answers"][0]))
    assert scores_of(default_metric("aokvqa", rows[0]), [index], [rows[0]]) == [1.0]  # the choice's number counts too
    rows = sample("aokvqa", tmp_path / "direct", task="direct_answer")
    metric = default_metric("aokvqa", rows[0])
    assert metric == "aokvqa_da"
    gold, once = rows[0]["answers"][0], "arrow"  # nine people gave the one, one the other
    assert scores_of(metric, [gold, once, "kite"], [rows[0]] * 3) == pytest.approx([1.0, 1 / 3, 0.0])
    assert len(scores_of(metric, [gold] * 4, rows)) == 4  # no row is left out as difficult


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("aokvqa_da", {"direct_answers": ["7", "seven"], "difficult_direct_answer": False}),
        ("aokvqa_mc", {"choices": ["kite", "bird", "7"], "correct_choice_idx": 2}),
        ("captions", ["7", "seven"]),
        ("exact_match", ["7", "seven"]),
        ("medical_vqa", "7"),
        ("numeric_answer", "7"),
        ("vqa_accuracy", ["7", "seven"]),
    ],
)
def test_references_are_what_the_metric_takes(name, reference):
    assert references_of(name, [ROW]) == [reference]
    assert score(name, ["### 7"], ["7"], rows=[ROW])["n"] == 1  # and the metric takes them


def test_every_metric_that_can_be_named_has_its_folder():
    assert sorted(REFERENCES) == sorted(path.parent.name for path in (ROOT / "metrics").glob("*/requirements.txt"))
    assert {name: metric_folder(name) for name in REFERENCES} == {name: ROOT / "metrics" / name for name in REFERENCES}


def test_only_numeric_answers_read_the_whole_text():
    rows = [ROW, ROW]
    outputs, answers = ["1 + 6 = 7\n### 7", "1 + 6 = 7\n### 8"], ["8", "7"]
    assert score("numeric_answer", outputs, answers, rows=rows)["scores"] == [1.0, 0.0]
    assert score("exact_match", outputs, answers, rows=rows)["scores"] == [0.0, 1.0]
    assert score("numeric_answer", ["7"], ["7"], rows=[ROW])["scores"] == [0.0]  # no marker, no answer


@pytest.mark.parametrize(
    ("prediction", "score_of_row"),
    [
        ("seven", 1.0),  # any of the answers
        (" SEVEN\n", 1.0),
        ("seven.", 0.0),
        ("7 or seven", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_takes_any_answer_and_nothing_around_it(prediction, score_of_row):
    assert score("exact_match", [""], [prediction], rows=[ROW])["scores"] == [score_of_row]


@pytest.mark.parametrize("answers", [[], [""], ["7", " "]])
def test_exact_match_refuses_a_row_without_a_gold_answer(answers):
    with pytest.raises(ValueError, match="row 1: the references are .*; give one or more answers, none of them empty"):
        score("exact_match", ["", ""], ["7", "7"], rows=[ROW, {**ROW, "answers": answers}])


def test_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown metric 'exact_mach'; did you mean 'exact_match'"):
        metric_folder("exact_mach")


def test_answer_that_is_no_choice_is_refused_with_its_row():
    with pytest.raises(ValueError, match=r"row 4: the answer 'cat' is none of the choices \['kite', 'bird', '7'\]"):
        score("aokvqa_mc", [""], ["cat"], rows=[{**ROW, "answers": ["cat"]}])


def test_refused_rows_leave_nothing_behind_in_the_metric():
    with pytest.raises(ValueError, match="row 1: the reference is 'cat'"):
        score("numeric_answer", ["### 7"] * 2, ["7"] * 2, rows=[ROW, {**ROW, "answers": ["cat"]}])
    with pytest.raises(ValueError, match="Mismatch in the number"):
        score("numeric_answer", ["### 7"] * 3, ["7"] * 3, rows=[ROW])
    results = score("numeric_answer", ["### 8"], ["8"], rows=[ROW])
    assert (results["scores"], results["n"]) == ([0.0], 1)
    assert load_metric("numeric_answer") is load_metric("numeric_answer")


@pytest.mark.slow
def test_installed_package_brings_its_metrics_and_files(tmp_path, monkeypatch):
    """The wheel of what git would hold, unpacked as pip does, imported where no repository is near."""
    source, target = tmp_path / "source", tmp_path / "site"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    for name in names:
        if name.startswith("tests/") or not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(target)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    script = [sys.executable, "-c", INSTALLED]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    folders = {name: target / "mmcoconut" / "metrics" / name for name in REFERENCES}
    assert done.stdout.splitlines() == [str(folder) for folder in folders.values()]
    package = [name for name in names if name.startswith("mmcoconut/") and (ROOT / name).is_file()]
    assert package and not [name for name in package if not (target / name).is_file()]
    monkeypatch.setattr(scoring, "metric_folder", folders.get)
    load_metric.cache_clear()
    for name, folder in folders.items():
        assert {path.name for path in folder.iterdir()} == {
            path.name for path in (ROOT / "metrics" / name).glob("*.*")
        }
        row = {**ROW, "answers": ["7"] * 4, "pair": "a"}
        expected = [0.0, 0.0] if name == "pair_accuracy" else [1.0, 0.0]  # half of a pair is worth nothing
        assert score(name, ["### 7", "### 8"], ["7", "8"], rows=[row, row])["scores"] == expected
    load_metric.cache_clear()
