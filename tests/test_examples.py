"""examples/: what they draw of a checkpoint that was trained for a moment."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from test_train import TINY

import train_hf


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import animate_maze  # noqa: E402


@pytest.mark.slow
def test_an_animation_has_a_frame_for_the_question_each_thought_and_the_answer(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(TINY)
    train_hf.main([str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "run"), "--max_train_samples", "8"])
    words = ["animate_maze.py", str(tmp_path / "run"), str(tmp_path / "a.gif"), "--hops", "2"]
    monkeypatch.setattr(sys, "argv", words)
    animate_maze.main()
    assert Image.open(tmp_path / "a.gif").n_frames == 4
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "run", "a.gif"}


def test_cells_are_numbered_where_they_are_and_other_words_nowhere():
    maze, _ = animate_maze.maze_of({"grid_size": 3, "seed": 1}, hops=2, index=0)
    plain = animate_maze.walked(maze, ["###", "the"])
    numbered = animate_maze.walked(maze, ["B3", "B3", "###"])
    changed = [
        animate_maze.arrow_mazes.cell_name((row, column))
        for row in range(3)
        for column in range(3)
        if plain.crop(box(row, column)).tobytes() != numbered.crop(box(row, column)).tobytes()
    ]
    assert changed == ["B3"]


def box(row: int, column: int) -> tuple[int, int, int, int]:
    return animate_maze.arrow_mazes.box_of((row, column), animate_maze.SIDE // 3)
