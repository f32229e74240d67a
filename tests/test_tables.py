"""Tables of the pages are those of the benchmarks' files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import tables  # noqa: E402


FILE = "side,prompt,n,ratio\nplain,64,0,1.0\nours,64,0,0.6\nplain,64,8,1.0\nours,64,8,0.9\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bench.csv").write_text(FILE)
    return tmp_path


def test_a_pivoted_table_has_a_column_for_each_side(folder):
    text = tables.table_of(folder / "bench.csv", rows="prompt,n", pivot="side", value="ratio")
    assert text == (
        "| prompt | n | plain | ours |\n|---|---|---|---|\n| 64 | 0 | 1.0 | 0.6 |\n| 64 | 8 | 1.0 | 0.9 |\n"
    )


def test_columns_are_shown_as_they_are_and_lines_chosen(folder):
    text = tables.table_of(folder / "bench.csv", rows="n", show="ratio,prompt", where="side:ours")
    assert text == "| n | ratio | prompt |\n|---|---|---|\n| 0 | 0.6 | 64 |\n| 8 | 0.9 | 64 |\n"


def test_only_what_stands_between_the_comments_changes(folder):
    head, end = "<!-- table: bench.csv rows=n show=ratio where=side:ours -->\n", "<!-- end of table -->"
    found = tables.with_tables(f"before\n{head}old\n{end} after", folder)
    assert found == f"before\n{head}| n | ratio |\n|---|---|\n| 0 | 0.6 |\n| 8 | 0.9 |\n{end} after"


def test_a_column_that_is_not_there_is_named(folder):
    with pytest.raises(KeyError, match="seconds"):
        tables.table_of(folder / "bench.csv", rows="n", show="seconds")


def test_a_comparison_has_a_line_a_variant_with_the_figures_of_each_task(tmp_path):
    def record(mode: str, share: float, **others) -> dict:
        found = {
            "mode": mode,
            "accuracy": {"mean": share},
            "verdicts": None,
            "necessity": None,
            "probe_accuracy": None,
        }
        return {**found, **others}

    audited = {"verdicts": ["depends", "depends", "cannot be told"], "necessity": {"accuracy": 0.25}}
    files = {"a": [record("cot", 1.0), record("coconut", 0.5, **audited)], "b": [record("cot", 0.75)]}
    for name, modes in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps({"modes": modes}))
    text = tables.comparison_of(tmp_path, **{"in": "one:a,two:b", "show": "accuracy,alone"})
    assert text.splitlines() == [
        "| | one: accuracy | one: thoughts alone | two: accuracy | two: thoughts alone |",
        "|---|---|---|---|---|",
        "| `cot` | 100.0 % | – | 75.0 % | – |",
        "| `coconut` | 50.0 % | 25.0 % | – | – |",
    ]
    shown = tables.comparison_of(tmp_path, **{"in": ":a", "show": "thoughts"}).splitlines()
    assert shown[0] == "| | answer on thoughts |" and shown[-1] == "| `coconut` | depends (2), cannot be told (1) |"


def test_the_pages_show_the_files_that_are_kept():
    shown = [page.name for page in tables.pages() if tables.TABLE.search(page.read_text(encoding="utf-8"))]
    assert shown == ["README.md", "objectives.md", "scaling.md"]
    subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=BENCHMARKS.parent, check=True)
