"""docs/api_map.md and docs/migration.md send nobody to a name that is not there."""

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from mmcoconut.arguments.fields import CLASSES
from mmcoconut.arguments.recipes import read_recipe
from mmcoconut.data import json_steps
from mmcoconut.errors import RecipeError


ROOT = Path(__file__).resolve().parent.parent
PAGES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api_map.md", "migration.md")]
FIELDS = {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
OPTIONS = inspect.signature(json_steps.load).parameters


def rows() -> list[list[str]]:
    """The cells of all tables without their heads; tables in code blocks are outputs."""
    pages = [re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE) for page in PAGES]
    lines = [line.strip("|").split(" | ") for page in pages for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip() not in ("there", "---|---|---")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def check(name: str, tmp_path: Path) -> None:
    """Raise unless the name is a file, an object or its argument, a recipe's key, or a key with a value it takes."""
    key, _, value = name.partition(": ")
    parameter = re.fullmatch(r"(.+)\((\w+)\)", name)
    if name.endswith((".py", ".yaml")):
        assert (ROOT / name).is_file(), name
    elif parameter:
        function, argument = parameter.groups()
        assert argument in inspect.signature(pkgutil.resolve_name(function)).parameters, name
    elif value:
        (tmp_path / "recipe.yaml").write_text(name)
        assert key in read_recipe(tmp_path / "recipe.yaml"), name
    elif key.startswith("dataset_options."):
        assert key.removeprefix("dataset_options.") in OPTIONS, name
    elif "." in key:
        pkgutil.resolve_name(key)
    else:
        assert key in FIELDS, name


@pytest.mark.parametrize("cells", rows(), ids=lambda cells: cells[0])
def test_every_name_that_the_map_gives_exists(cells, tmp_path):
    there, here, _ = cells
    assert there and (names(here) or here == "—")
    for name in names(here):
        check(name, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "recipes/none.yaml",
        "mmcoconut.Curiculum",
        "mmcoconut.Curriculum.stage_of",
        "mmcoconut.Curriculum.plan(steps)",
        "max_patches",
        "dataset_options.files",
        "mode: cott",
        "modes: cot",
    ],
)
def test_a_name_that_does_not_exist_is_noticed(name, tmp_path):
    with pytest.raises((AssertionError, AttributeError, RecipeError)):
        check(name, tmp_path)


def test_the_map_holds_the_documented_names():
    there = {name.split("(")[0] for cells in rows() for name in names(cells[0])}
    classes = {"Config", "StageManager", "MultimodalCollator", "MultimodalCoconut", "MultimodalDataset"}
    functions = {"load_config", "validate_config", "create_config_from_template", "dynamic_preprocess"}
    stages = {"c_thought", "max_latent_stage", "epochs_per_stage", "uniform_prob", "pad_latent_to_max", "coconut"}
    modes = {"cot", "no_thoughts", "no_cot", "only_eval", "reset_optimizer", "save_only_improve", "resume"}
    images = {"image_size", "max_num_patches", "use_thumbnail"}
    updates = {"batch_size_training", "gradient_accumulation_steps", "lr", "weight_decay", "bf16", "load_model_path"}
    assert not (classes | functions | stages | modes | images | updates) - there
