"""The notebook runs from its first to its last cell on a machine without a checkpoint, and is kept without outputs."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
UPDATES = "1"  # an epoch
SECONDS = 90


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The quickstart's cells with their outputs, run in a folder that holds only the recipes and the script."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copy(ROOT / "train_hf.py", folder)
    shutil.copy(ROOT / "model_card.md", folder)
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MMCOCONUT_NOTEBOOK_STEPS", UPDATES)
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"], folder


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_without_a_checkpoint_it_trains_one_and_asks_it(executed):
    cells, folder = executed
    assert (folder / "outputs" / "notebook" / "model.safetensors").is_file()
    assert "3 thoughts per question" in printed(cells[2])
    assert printed(cells[2]).count("The model says") == 4


def test_it_shows_the_thoughts_of_a_maze_as_a_picture_with_their_figures(executed):
    cells, _ = executed
    assert [output for output in cells[3].outputs if "image/png" in output.get("data", {})]
    figures = dict(line.split(maxsplit=1) for line in printed(cells[4]).splitlines())
    norms = [float(number) for number in figures["norm_ratio"].split()]
    assert norms == [1.0, 1.0, 1.0]  # thought_norm: embedding


def test_it_fine_tunes_at_the_last_stage(executed):
    cells, _ = executed
    assert "stage 4 begins, latents: 3" in printed(cells[-1])
    assert "before" in printed(cells[-1]) and "after" in printed(cells[-1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
