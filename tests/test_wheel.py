"""The wheel, installed away from the repository, trains, evaluates, audits and shows the demo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
ROWS = ["--dataset_options.num_rows", "40", "--max_samples", "4"]
WORK = f"""
import sys
from pathlib import Path
import mmcoconut
from mmcoconut_cli.commands import main

assert Path(mmcoconut.__file__).is_relative_to(sys.argv[1]), mmcoconut.__file__
main(["train", "quickstart", "--smoke_test", "--output_dir", "run"])
main(["eval", "run-smoke", "--output_dir", "evaluation", *{ROWS!r}])
main(["audit", "run-smoke", "--output_dir", "audit", "--parts", "verdict", *{ROWS!r}])
import mmcoconut.demo.page
import mmcoconut.serve
"""


def call(words: list[str], folder: Path, **environment: str) -> str:
    """Run a command in a folder; what it printed."""
    values = {**os.environ, "PYTHONPATH": "", **environment}
    done = subprocess.run(words, cwd=folder, env=values, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source.mkdir()
    call(["tar", "-cf", str(tmp_path / "source.tar"), *tracked.splitlines()], ROOT)
    call(["tar", "-xf", str(tmp_path / "source.tar")], source)
    pip = [sys.executable, "-m", "pip", "-q"]
    call([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."], source)
    [wheel] = tmp_path.glob("mmcoconut-*.whl")
    call([*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    away = {"PYTHONPATH": str(installed)}
    listed = call([sys.executable, str(installed / "bin" / "mmcoconut"), "recipes"], elsewhere, **away)
    assert listed.startswith("captioner") and f"{installed}" in listed
    call([sys.executable, "-c", WORK, str(installed)], elsewhere, **away)
    for file in ("run-smoke/results.json", "evaluation/evaluation.json", "audit/audit.json"):
        assert (elsewhere / file).is_file()
