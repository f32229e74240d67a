"""benchmarks/results/recipe_costs.csv, and with it the table of docs/scaling.md, is what recipes and shapes give."""

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import published_shapes  # noqa: E402
import recipe_costs  # noqa: E402
from tables import read_rows  # noqa: E402


def test_every_recipe_has_a_line_or_a_reason():
    recipes = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert recipes == {*recipe_costs.DATA, *recipe_costs.SKIPPED}
    assert not recipe_costs.DATA.keys() & recipe_costs.SKIPPED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", published_shapes.TOTALS)
def test_shapes_have_the_published_numbers_of_parameters(name):
    model = recipe_costs.vlm_of({"vlm": name})
    billions = recipe_costs.count(model.parameters()) / 1e9
    assert billions == pytest.approx(published_shapes.TOTALS[name], abs=0.005)


def test_a_tiny_model_counts_as_worked_by_hand():
    values = recipe_costs.values_of("quickstart")
    model = recipe_costs.model_of(values)
    decoder = model.get_decoder()
    layer = 12 * 96 * 96 + 13 * 96  # GPT-2: products, and biases and norms
    assert recipe_costs.count(decoder.parameters()) == 3 * layer + 2 * 96 + (404 + 64) * 96
    assert recipe_costs.updates_of(values, recipe_costs.DATA["quickstart"]) == (12_800, 3_000)
    assert recipe_costs.thoughts_of(values) == [0] * 8 + [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_the_file_is_what_the_script_gives():
    found = [recipe_costs.row_of(recipe) for recipe in recipe_costs.DATA]
    assert read_rows(recipe_costs.FILE) == [{name: str(value) for name, value in row.items()} for row in found]
