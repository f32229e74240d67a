"""Runs of train_hf.py in two processes equal those of one with twice the batch.

All are in one launch, as starting processes takes longest. The two have different numbers of latents in a batch.
"""

import json

import pytest
from safetensors.torch import load_file
from test_family_runs import FAMILIES, write_recipe
from test_grouping import GROUPED
from test_objectives_training import ALIGNED, EVERY, TWO, history
from test_train import ROOT, launch, losses

import train_hf


pytestmark = pytest.mark.slow


RAGGED = ["--uniform_prob", "0.5", "--pad_latent_to_max", "false"]
HALF = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3"]  # 8 rows: some are repeated
# Recipe, options of both sides, options of the two processes.
EQUAL = {
    "plain": ("tiny", [], []),
    "checkpointed": ("tiny", [], ["--activation_checkpointing"]),
    "grouped": ("tiny", GROUPED, []),
    "cross_attention": ("cross_attention", [], []),
    "encoder": ("encoder", [], []),
    "objectives": ("tiny", [*EVERY, *ALIGNED, "state", "--log_gradient_cosine"], ["--activation_checkpointing"]),
    "objectives, encoder": ("encoder", TWO, []),
}
FROZEN = ["--num_train_epochs", "1", "--freeze", "vision_tower"]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """A folder with recipes, and the runs of two processes by name."""
    folder = tmp_path_factory.mktemp("two")
    for family in FAMILIES:
        write_recipe(family, folder)

    def run(name: str, recipe: str, options: list[str]) -> list[str]:
        return [str(folder / f"{recipe}.yaml"), "--output_dir", str(folder / name), *options]

    runs = [run(name, recipe, [*both, *RAGGED, *HALF, *own]) for name, (recipe, both, own) in EQUAL.items()]
    runs.append(run("kept", "tiny", [*FROZEN, *HALF, *kept_in(folder / "cache")]))
    launch(json.dumps(runs), folder=folder, script=ROOT / "tests" / "several_runs.py")
    return folder


def kept_in(cache) -> list[str]:
    return ["--precompute_image_features", "true", "--image_features_cache", str(cache)]


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one_with_twice_the_batch(name, of_two, tmp_path):
    recipe, both, _ = EQUAL[name]
    one, two = tmp_path / "one", of_two / name
    train_hf.main([str(of_two / f"{recipe}.yaml"), "--output_dir", str(one), *both, *RAGGED])
    assert list(losses(one)) == list(losses(two)) == list(range(1, 19))
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), abs=2e-4)
    stages = [json.loads((run / "results.json").read_text())["stages"] for run in (one, two)]
    for row, other in zip(*stages, strict=True):
        assert all(row[key] == other[key] for key in ("accuracy", "generated_tokens", "n"))
        for key in [key for key in row if key.endswith("loss")]:
            assert row[key] == pytest.approx(other[key], abs=1e-3)
    records, others = ([record for record in history(run) if "loss" in record] for run in (one, two))
    for record, other in zip(records, others, strict=True):
        for key in [key for key in record if key.endswith("_loss") or key.startswith("cosine_")]:
            assert record[key] == pytest.approx(other[key], abs=1e-3)


def test_two_processes_share_the_pictures_and_equal_one(of_two, tmp_path):
    one = [*FROZEN, *kept_in(tmp_path / "cache"), "--per_device_train_batch_size", "8"]
    train_hf.main([str(of_two / "tiny.yaml"), "--output_dir", str(tmp_path / "one"), *one])
    keys = []
    for folder in (tmp_path, of_two):
        shards = sorted((folder / "cache").glob("*/*.safetensors"))
        keys.append([key for path in shards for key in load_file(path)])
    assert sorted(keys[0]) == sorted(keys[1]) and len(keys[1]) == len({*keys[1]})
    assert len(list((of_two / "cache").glob("*/*.safetensors"))) == 2
    assert losses(of_two / "kept") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
