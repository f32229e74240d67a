"""benchmarks/gpu_session.sh: its dry run, what it does when a part fails, and that it fits into twelve minutes."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"
MARK = "tiny sizes on a CPU: no measurement"
LIMIT = 12 * 60


def session(folder: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPT), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows_of(file: Path) -> list[dict]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_budgets_with_a_gpu_are_below_twelve_minutes_together():
    with_gpu = SCRIPT.read_text().split("\nelse\n")[-1]
    budgets = [int(number) for number in re.findall(r"^  bench \S+ (\d+) ", with_gpu, re.MULTILINE)]
    assert len(budgets) == 9 and sum(budgets) < LIMIT


@pytest.mark.slow  # it imports torch
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would start")
def test_without_a_gpu_it_measures_nothing(tmp_path):
    ended = session(tmp_path / "results")
    assert ended.returncode == 2 and "--dry-run" in ended.stderr
    assert not any((tmp_path / "results").iterdir())


@pytest.mark.parametrize("options, said", [(["--machine"], "needs a value"), (["--dry"], "no option")])
def test_options_that_it_does_not_know_are_named(tmp_path, options, said):
    ended = session(tmp_path, *options)
    assert ended.returncode == 2 and said in ended.stderr and "Everything that waits for a GPU" in ended.stderr


@pytest.mark.slow
def test_a_dry_run_runs_every_part_and_every_row_says_so(tmp_path):
    ended = session(tmp_path, "--dry-run")
    assert ended.returncode == 0, (tmp_path / "session_dry-run.log").read_text()[-3000:]
    files = sorted(tmp_path.glob("*.csv"))
    kinds = ("bench_attention", "bench_generate", "bench_latent_step", "bench_pretrained_step", "bench_ragged_step")
    assert [file.stem for file in files] == [f"{kind}_dry-run" for kind in (*kinds, "kernel_tests", "summary")]
    for file in files:
        marked = {row.get("dry_run") or row["note"] for row in rows_of(file)}
        assert marked == {MARK}, file.name
    assert {row["outcome"] for row in rows_of(tmp_path / "summary_dry-run.csv")} == {"passed"}
    trained = {row["model"] for row in rows_of(tmp_path / "bench_pretrained_step_dry-run.csv")}
    assert trained == {"smollm2_135m", "qwen2_1_5b"}


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    options = ["--dry-run", "--smollm2", str(tmp_path / "absent"), "--only", "smollm2_step,attention"]
    ended = session(tmp_path / "results", *options)
    outcomes = {row["part"]: row["outcome"] for row in rows_of(tmp_path / "results" / "summary_dry-run.csv")}
    assert ended.returncode == 1
    assert outcomes == {"attention": "passed", "smollm2_step": "failed"}


def test_parts_that_do_not_exist_are_no_success(tmp_path):
    ended = session(tmp_path, "--dry-run", "--only", "nothing")
    assert ended.returncode == 2 and "names no part" in ended.stderr
