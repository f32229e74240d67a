"""Runs of vision-language models in their own class: resumed, gone on from, evaluated; what their recipes may say."""

import json
import shutil

import pytest
import torch
from test_train import losses

import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build.tiny_models import write_tiny_vlm
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation import evaluate as evaluation
from mmcoconut.models import load_model, load_processor
from mmcoconut.training.layout import read_layout
from mmcoconut.vlm_mmcoconut import ThinkingVLM


RECIPE = """
vlm: {vlm}
dataset: arrow_mazes
dataset_options: {{grid_size: 3, max_hops: 2, num_rows: {{train: 8, validation: 4}}, cell_size: 8}}
max_new_tokens: 4
c_thought: 1
max_latent_stage: 1
num_train_epochs: 2
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
learning_rate: 1.0e-3
logging_steps: 1
use_cpu: true
disable_tqdm: true
report_to: none
save_strategy: steps
save_steps: 2
"""
TYPES = ("qwen2_5_vl", "smolvlm")


@pytest.fixture(params=TYPES)
def recipe(request, tmp_path):
    return written(request.param, tmp_path)


def written(model_type: str, folder, more: str = "") -> str:
    """A recipe that starts from a tiny model of a type, both in this folder."""
    write_tiny_vlm(folder / "vlm", model_type)
    path = folder / f"{model_type}.yaml"
    path.write_text(RECIPE.format(vlm=folder / "vlm") + more)
    return str(path)


def weights_of(folder) -> dict:
    return load_model(str(folder)).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora.r", "4"]], ids=["whole", "adapters"])
def test_a_run_resumed_inside_a_stage_continues_exactly(recipe, more, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    results = train_hf.main([recipe, "--output_dir", str(whole), *more])
    assert [row["num_latents"] for row in results["stages"]] == [0, 1]
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    train_hf.main([recipe, "--output_dir", str(resumed), "--resume_from_checkpoint", "true", *more])
    assert losses(resumed) == losses(whole)
    before, after = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(before[name], weight) for name, weight in after.items())


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_a_stop_head_and_is_evaluated(tmp_path):
    recipe = written("qwen2_5_vl", tmp_path)
    train_hf.main([recipe, "--output_dir", str(tmp_path / "first")])
    layout = read_layout(str(tmp_path / "first"))
    assert (layout.num_latents, layout.values["mode"], layout.values["use_thumbnail"]) == (1, "coconut", None)
    go_on = [recipe, "--vlm", "null", "--model", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second")]
    results = train_hf.main([*go_on, "--stop_head", "true", "--max_latent_stage", "2", "--num_train_epochs", "3"])
    assert [row["num_latents"] for row in results["stages"]] == [0, 1, 2]
    model, processor = load_model(str(tmp_path / "second")), load_processor(str(tmp_path / "second"))
    assert isinstance(model, ThinkingVLM) and model.config.stop_head and processor.num_latents == 2
    words = ["--model", str(tmp_path / "second"), "--split", "validation", "--output_dir", str(tmp_path / "found")]
    evaluation.main([*words, "--num_beams", "2"])
    found = json.loads((tmp_path / "found" / evaluation.RECORD_FILE).read_text())
    assert found["n"] == 4


@pytest.mark.slow
def test_checkpointed_activations_change_no_update(tmp_path):
    recipe = written("qwen2_5_vl", tmp_path)
    runs = {"plain": [], "checkpointed": ["--activation_checkpointing", "true"]}
    for name, options in runs.items():
        train_hf.main([recipe, "--output_dir", str(tmp_path / name), *options])
    plain, checkpointed = (losses(tmp_path / name) for name in runs)
    assert plain.keys() == checkpointed.keys()
    assert all(abs(plain[step] - checkpointed[step]) <= 1e-3 for step in plain)


def test_image_options_reach_the_processor_and_the_check_can_be_left_out(tmp_path, monkeypatch):
    recipe = written("qwen2_5_vl", tmp_path, "image_options: {max_pixels: 1024}\ncheck_vlm: false\n")
    monkeypatch.setattr("mmcoconut.build.vlms.check_thoughts", lambda *args: pytest.fail("checked"))
    _, processor = train_hf.build_from_vlm(parse_recipe([recipe])[0])
    small = load_processor_options(processor)
    assert small["max_pixels"] == 1024 or small["size"]["longest_edge"] == 1024


def load_processor_options(processor) -> dict:
    return {"max_pixels": None, **processor.image_processor.to_dict()}


@pytest.mark.parametrize(
    "said, key, remedy",
    [
        ({"image_size": 32}, "image_size", "set its `image_options`, or `composed: true`"),
        ({"use_thumbnail": False}, "use_thumbnail", "set its `image_options`, or `composed: true`"),
        ({"composed": True, "image_options": {"a": 1}}, "image_options", "remove this key, or `composed`"),
        ({"precompute_image_features": True, "freeze": ["vision_tower"]}, "precompute_image_features", "composed: tr"),
        ({"vlm": None, "vision_model": "a", "text_model": "b", "composed": True}, "composed", "there is none"),
        ({"vlm": None, "vision_model": "a", "text_model": "b", "check_vlm": False}, "check_vlm", "there is none"),
    ],
)
def test_what_a_vlm_in_its_own_class_has_no_use_for_is_refused(said, key, remedy, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"vlm": "a/b", "dataset": "arrow_mazes", "use_cpu": True, **said}))  # JSON is YAML
    with pytest.raises(RecipeError) as error:
        parse_recipe([str(path)])
    ((found, _, why),) = error.value.problems
    assert found == key and remedy in why


def test_cached_features_of_a_checkpoint_in_its_own_class_are_refused(tmp_path):
    recipe = written("internvl", tmp_path)
    train_hf.main([recipe, "--output_dir", str(tmp_path / "first")])
    words = [recipe, "--vlm", "null", "--model", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second")]
    words += ["--precompute_image_features", "true", "--freeze", "[vision_tower]", "--image_features_cache", "cache"]
    with pytest.raises(ValueError, match="precompute_image_features = True: a vlm's own class"):
        train_hf.main(words)


def test_a_composed_recipe_has_the_form_of_backbones(tmp_path):
    recipe = written("internvl", tmp_path, "composed: true\nfreeze: [vision_tower]\nprecompute_image_features: true\n")
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--image_features_cache", str(tmp_path / "cache")])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "mmcoconut"
    assert any((tmp_path / "cache").iterdir())
