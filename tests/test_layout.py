"""A checkpoint decides its own layout: what a recipe leaves open is its own, and what it says otherwise is told."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from test_train import TINY

import train_hf
from mmcoconut.arguments.fields import default_of
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.errors import RecipeError, run_command
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.models import CheckpointError
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.training.layout import read_layout, settle


# Everywhere another value than a new model's.
LAYOUT = """
markers: start
thought_norm: embedding
thought_schedule: jacobi
jacobi_iterations: 2
projector_type: mlp
c_thought: 2
"""
RUN = """
dataset: arrow_mazes
dataset_options: {grid_size: 3, max_hops: 2, num_rows: {train: 48, validation: 8}, cell_size: 8}
max_new_tokens: 4
per_device_train_batch_size: 8
logging_steps: 1
save_strategy: "no"
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


def train(folder, text: str, *options: str):
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text(text)
    train_hf.main([str(recipe), "--output_dir", str(folder), *options])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in two stages, the last one with four thoughts."""
    return train(tmp_path_factory.mktemp("runs") / "trained", f"{TINY}{LAYOUT}")


@pytest.fixture(scope="module")
def cot(tmp_path_factory):
    text = f"{TINY}{LAYOUT.replace('jacobi_iterations: 2', '').replace('jacobi', 'sequential')}"
    return train(tmp_path_factory.mktemp("runs") / "cot", text, "--mode", "cot", "--max_steps", "1")


@pytest.fixture
def bare(trained, tmp_path):
    """The same checkpoint without the run's recipe, as somebody may have uploaded it."""
    folder = tmp_path / "bare"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("recipe.yaml", "stages", "checkpoint-*"))
    return folder


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "asks.yaml"
    path.write_text(RUN)
    return str(path)


def settled(recipe, model, *options: str) -> dict:
    arguments = settle(parse_recipe([recipe, "--model", str(model), *options]), recipe)
    return {key: value for part in arguments[:3] for key, value in vars(part).items()}


def problems(recipe, model, *options: str) -> list[tuple]:
    with pytest.raises(RecipeError) as caught:
        settled(recipe, model, *options)
    return caught.value.problems


def warnings(caplog, recipe, model, *options: str) -> list[str]:
    caplog.clear()
    settled(recipe, model, *options)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_what_a_recipe_leaves_open_is_what_the_checkpoint_has(recipe, trained, caplog):
    found = settled(recipe, trained)
    own = yaml.safe_load(LAYOUT) | {"mode": "coconut", "max_latent_stage": 2, "thoughts_per_turn": 0}
    assert {key: found[key] for key in own} == own
    assert all(own[key] != default_of(key) for key in yaml.safe_load(LAYOUT))
    assert warnings(caplog, recipe, trained) == []
    assert warnings(caplog, recipe, trained, *(w for k, v in own.items() for w in (f"--{k}", str(v)))) == []


def test_evaluation_needs_no_layout_in_the_recipe_and_asks_with_the_checkpoints(recipe, trained, tmp_path):
    metrics = train_hf.main([recipe, "--model", str(trained), "--do_train", "false", "--output_dir", str(tmp_path)])
    last = json.loads((trained / "results.json").read_text())["stages"][-1]
    assert (metrics["eval_stage"], metrics["eval_num_latents"]) == (last["stage"], 4)
    assert metrics["eval_loss"] == pytest.approx(last["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "own"),
    [
        ("markers", "both", "start"),
        ("mode", "pause", "coconut"),
        ("mode", "cot", "coconut"),
        ("thought_norm", "none", "embedding"),
        ("jacobi_iterations", 3, 2),
        ("answer_sees", "no_image", "all"),
        ("stop_head", True, False),
        ("projector_type", "linear", "mlp"),
        ("c_thought", 1, 2),
        ("thoughts_per_turn", 4, 0),
        ("image_size", 48, 24),
    ],
)
def test_an_evaluation_that_says_otherwise_is_refused_with_both_values(recipe, trained, key, value, own):
    (problem,) = [each for each in problems(recipe, trained, "--do_train", "false", f"--{key}", str(value)) if each]
    assert problem[:2] == (key, value)
    assert f"the checkpoint {trained} has {own!r}" in problem[2] and "remove this key" in problem[2]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--markers", "both"], ["markers is 'start' in the checkpoint .* becomes 'both'"]),
        (["--mode", "cot"], ["mode is 'coconut' in the checkpoint .* becomes 'cot'"]),
        (["--c_thought", "1"], ["c_thought is 2 in the checkpoint .* becomes 1"]),
        (["--thought_schedule", "sequential"], ["thought_schedule is 'jacobi' in .* becomes 'sequential'"]),
        (["--thought_norm", "none", "--jacobi_iterations", "1"], ["thought_norm is", "jacobi_iterations is 2"]),
    ],
    ids=str,
)
def test_training_that_says_otherwise_is_warned_of_with_both_values(recipe, trained, caplog, options, changes):
    found = warnings(caplog, recipe, trained, *options)
    assert len(found) == len(changes)
    assert all(re.search(change, text) for change, text in zip(changes, found))


@pytest.mark.parametrize("option", [("projector_type", "linear"), ("image_fusion", "add"), ("max_tiles", "3")])
def test_training_cannot_change_what_the_weights_were_made_for(recipe, trained, option):
    key, value = option
    assert problems(recipe, trained, f"--{key}", value)[0][0] == key


def test_fine_tuning_keeps_the_layout_and_the_saved_files_say_so(recipe, trained, tmp_path):
    train_hf.main([recipe, "--model", str(trained), "--output_dir", str(tmp_path / "next"), "--max_steps", "1"])
    assert MMCoconutProcessor.from_pretrained(tmp_path / "next").markers == "start"
    config = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "next").config
    assert (config.thought_norm, config.jacobi_iterations, config.thought_mode) == ("embedding", 2, "feedback")
    own, found = (read_layout(str(folder)).values for folder in (trained, tmp_path / "next"))
    assert own == found
    said = yaml.safe_load((tmp_path / "next" / "recipe.yaml").read_text())
    assert {key: said[key] for key in ("markers", "mode", "c_thought")} == {
        "markers": "start", "mode": "coconut", "c_thought": 2
    }  # fmt: skip
    settled(str(tmp_path / "next" / "recipe.yaml"), tmp_path / "next", "--do_train", "false")


def test_coconut_starts_from_a_cot_checkpoint_with_its_runs_layout(recipe, cot, tmp_path, caplog):
    assert settled(recipe, cot)["mode"] == "cot"
    (found,) = warnings(caplog, recipe, cot, "--mode", "coconut")
    assert "mode is 'cot' in the checkpoint" in found and "becomes 'coconut'" in found
    found = settled(recipe, cot, "--mode", "coconut")
    assert (found["markers"], found["c_thought"], found["max_latent_stage"]) == ("start", 2, 2)
    assert problems(recipe, cot, "--mode", "coconut", "--do_train", "false")[0][:2] == ("mode", "coconut")
    options = ["--mode", "coconut", "--start_epoch", "1", "--max_steps", "1"]
    train_hf.main([recipe, "--model", str(cot), "--output_dir", str(tmp_path / "next"), *options])
    processor = MMCoconutProcessor.from_pretrained(tmp_path / "next")
    assert (processor.markers, processor.num_latents) == ("start", 2)


def test_a_checkpoint_without_thoughts_or_recipe_wants_a_mode(recipe, cot, tmp_path):
    folder = shutil.copytree(cot, tmp_path / "bare", ignore=shutil.ignore_patterns("recipe.yaml"))
    assert "set it to cot, no_cot, no_thoughts or icot" in problems(recipe, folder)[0][2]
    assert settled(recipe, folder, "--mode", "no_cot", "--do_train", "false")["mode"] == "no_cot"
    assert problems(recipe, folder, "--mode", "coconut", "--do_train", "false")[0][0] == "mode"


def test_a_pause_checkpoint_is_evaluated_as_one(recipe, tmp_path):
    folder = train(tmp_path / "pause", TINY, "--mode", "pause", "--max_steps", "1")
    assert settled(recipe, folder, "--do_train", "false")["mode"] == "pause"
    assert problems(recipe, folder, "--do_train", "false", "--mode", "coconut")[0][:2] == ("mode", "coconut")


def test_a_markers_checkpoint_is_evaluated_as_one(recipe, tmp_path):
    folder = train(tmp_path / "markers", TINY, "--mode", "markers", "--max_steps", "1")
    assert settled(recipe, folder, "--do_train", "false")["mode"] == "markers"
    assert settled(recipe, folder, "--do_train", "false")["markers"] == "both"
    assert problems(recipe, folder, "--do_train", "false", "--mode", "coconut")[0][:2] == ("mode", "coconut")
    assert problems(recipe, folder, "--do_train", "false", "--markers", "start")[0][:2] == ("markers", "start")
    options = ["--model", str(folder), "--do_train", "false", "--output_dir", str(tmp_path / "evaluated")]
    assert train_hf.main([recipe, *options])["eval_num_latents"] == 0
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("recipe.yaml"))
    assert settled(recipe, bare, "--do_train", "false", "--mode", "markers")["mode"] == "markers"
    assert settled(recipe, bare, "--do_train", "false")["mode"] == "coconut"


def test_the_number_of_thoughts_alone_tells_what_an_evaluation_needs(recipe, bare, tmp_path):
    assert read_layout(str(bare)).num_latents == 4
    metrics = train_hf.main([recipe, "--model", str(bare), "--do_train", "false", "--output_dir", str(tmp_path / "e")])
    assert metrics["eval_num_latents"] == 4
    options = {"--c_thought 2": (2, 2), "--max_latent_stage 1": (4, 1), "--c_thought 1 --max_latent_stage 5": (1, 5)}
    for words, counts in options.items():
        found = settled(recipe, bare, "--do_train", "false", *words.split())
        assert (found["c_thought"], found["max_latent_stage"]) == counts
    (problem,) = problems(recipe, bare, "--do_train", "false", "--c_thought", "3")
    assert problem[:2] == ("c_thought", 3) and "has 4" in problem[2]


def test_a_stage_of_a_run_is_known_by_the_runs_recipe(recipe, trained):
    layout = read_layout(str(trained / "stages" / "stage-1"))
    assert (layout.num_latents, layout.values["c_thought"], layout.counts_known) == (2, 2, True)
    found = settled(recipe, trained / "stages" / "stage-1", "--do_train", "false")
    assert (found["c_thought"], found["max_latent_stage"]) == (2, 2)


def test_an_objective_of_one_stage_takes_the_thoughts_that_the_checkpoint_was_saved_with(recipe, trained, caplog):
    stage, options = trained / "stages" / "stage-1", ["--thought_schedule", "sequential", "--stop_head", "true"]
    distils = ["--objective", "distill_stops", *options]
    found = settled(recipe, stage, *distils)
    assert found["c_thought"] * found["max_latent_stage"] == 2
    *_, told = warnings(caplog, recipe, stage, *distils, "--c_thought", "2", "--max_latent_stage", "2")
    assert "thinks 2 thoughts and is trained with 4" in told


def test_what_the_checkpoint_brings_is_checked_against_the_rest_of_the_recipe(recipe, trained):
    (problem,) = problems(recipe, trained, "--mode", "pause")
    assert problem[0] == "thought_schedule" and "`mode: pause` feeds no thought back" in problem[2]
    assert ("stop_head", False) in [
        problem[:2] for problem in problems(recipe, trained, "--objective", "distill_stops")
    ]


def test_compared_modes_start_from_one_checkpoint_with_its_layout(recipe, trained, caplog):
    caplog.clear()
    arguments = parse_recipe([recipe, "--model", str(trained), "--compare", "cot,no_cot,coconut"])
    model_args, _, curriculum_args, run_args = settle(arguments, recipe)
    assert (model_args.markers, curriculum_args.c_thought) == ("start", 2)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    run_args.compare = None
    one = settle((model_args, arguments[1], replace(curriculum_args, mode="no_cot"), run_args), recipe)
    assert one[2].mode == "no_cot"


def test_a_new_model_has_the_defaults_and_its_recipe_says_them(tmp_path):
    path = tmp_path / "new.yaml"
    path.write_text(TINY)
    model_args, _, curriculum_args, _ = parse_recipe([str(path)])
    assert (model_args.markers, model_args.projector_type, model_args.stop_head) == ("both", "linear", False)
    assert (curriculum_args.mode, curriculum_args.c_thought, curriculum_args.thoughts_per_turn) == ("coconut", 1, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nobody/nothing-of-that-name", "model = 'nobody/nothing-of-that-name': .* Give an existing folder or a Hub id"),
     ("empty", "model = .*empty.* Give an existing folder"), ("other", "is a 'gpt2', not an mmcoconut checkpoint")],
)  # fmt: skip
def test_a_name_without_a_checkpoint_is_one_line(recipe, tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "/" not in name:
        (tmp_path / name).mkdir()
        name = str(tmp_path / name)
    if name.endswith("other"):
        (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=message):
        settled(recipe, name)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda _: train_hf.main([recipe, "--model", name, "--do_train", "false"]))
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("key", ["text_model", "vision_model", "vlm", "tokenizer"])
def test_every_model_that_a_recipe_names_is_looked_for_before_anything_is_built(tmp_path, monkeypatch, key):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tower = yaml.safe_load(TINY)
    start = {"vlm": ["vision_config", "text_config", "tokenizer"], "text_model": ["text_config", "tokenizer"],
             "vision_model": ["vision_config"], "tokenizer": ["tokenizer"]}[key]  # fmt: skip
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in tower.items() if name not in start}))
    with pytest.raises(CheckpointError, match=f"^{key} = 'nobody/nothing': .* Give an existing folder or a Hub id"):
        train_hf.main([str(path), f"--{key}", "nobody/nothing", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_what_the_checkpoints_mode_leaves_idle_is_said_of_keys_that_the_recipe_says(recipe, trained, cot, caplog):
    (found,) = warnings(caplog, recipe, cot, "--markers", "none", "--epochs_per_stage", "2")
    assert found == "Without effect with `mode: cot`: markers: none; epochs_per_stage: 2"
    (found,) = warnings(caplog, recipe, trained, "--tokenizer_vocab_size", "300")
    assert found == "Without effect with the checkpoint `model` (it has its own): tokenizer_vocab_size: 300"
    assert warnings(caplog, recipe, cot) == warnings(caplog, recipe, trained, "--epochs_per_stage", "2") == []
