"""Run the tests that skip without a GPU, and write a row a test.

    python benchmarks/kernel_tests.py FOLDER

It fails if a test fails, if one is skipped, or if none is found: on a GPU nothing of them may be left out.
--dry_run runs two of the same tests in Triton's interpreter on the CPU.
"""

import argparse
import csv
import sys
from pathlib import Path

import pytest
from measuring import DRY_RUN


ROOT = Path(__file__).resolve().parent.parent
# Every test file that holds tests which skip without a GPU; their cases have `cuda` in their names.
FILES = ["tests/test_attention_triton.py"]


class Recorder:
    """Of every test that pytest runs: its name, what came of it, and its seconds."""

    def __init__(self):
        self.rows = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.rows.append({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry_run", action="store_true")
    arguments = parser.parse_args()
    recorder, chosen = Recorder(), "prefix_of_no_keys and cpu" if arguments.dry_run else "cuda"
    files = [str(ROOT / file) for file in FILES]
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    status = pytest.main([*options, "-k", chosen, *files], plugins=[recorder])
    mark = {"dry_run": DRY_RUN} if arguments.dry_run else {}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    name = "kernel_tests_dry-run.csv" if arguments.dry_run else "kernel_tests.csv"
    with (arguments.folder / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=[*mark, "test", "outcome", "seconds"])
        writer.writeheader()
        writer.writerows(mark | row for row in recorder.rows)
    outcomes = {row["outcome"] for row in recorder.rows}
    if outcomes != {"passed"}:
        print(f"Not all tests passed: {sorted(outcomes) or 'none was found'}.")
    sys.exit(int(status) or outcomes != {"passed"})


if __name__ == "__main__":
    main()
