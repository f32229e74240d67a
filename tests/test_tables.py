"""Tables of the pages are those of the benchmarks' files."""

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


def test_the_pages_show_the_files_that_are_kept():
    shown = [page.name for page in tables.pages() if tables.TABLE.search(page.read_text(encoding="utf-8"))]
    assert shown == ["scaling.md"]
    subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=BENCHMARKS.parent, check=True)
