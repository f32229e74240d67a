"""train_hf.py as a user runs it: recipes, resuming, two processes, bad pictures."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TEXT_CONFIGS, tiny_model
from transformers import TrainerCallback

import train_hf
from mmcoconut.arguments.fields import CurriculumArguments, DataArguments
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.build.tiny_models import write_tiny_vlm
from mmcoconut.data import json_steps
from mmcoconut.errors import UsageError
from mmcoconut.images_mmcoconut import UnreadableImageError
from mmcoconut.kernels.latent import LATENT_WHERE_LEANER
from mmcoconut.kernels.private import attention_of
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.models import class_of, load_processor, read_config
from mmcoconut.processing_mmcoconut import MMCoconutProcessor
from mmcoconut.schedules_mmcoconut import ThinkTogether
from mmcoconut.training import trainer
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.layout import settle


ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # processes that wait for each other for ever fail the tests here
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
FAST_RECIPES = ("gpt2_clip_aokvqa.yaml", "quickstart.yaml", "internvl3_coconut.yaml", "jepa_pathvqa.yaml")
TINY = """
vision_config: {model_type: clip_vision_model, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
  num_attention_heads: 2, image_size: 24, patch_size: 8}
text_config: {model_type: gpt2, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2,
  max_position_embeddings: 64, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}
tokenizer: train
dataset: arrow_mazes
dataset_options: {grid_size: 3, max_hops: 2, num_rows: {train: 48, validation: 8}, cell_size: 8}
max_new_tokens: 4
max_latent_stage: 2
epochs_per_stage: 1
num_train_epochs: 3
per_device_train_batch_size: 8
learning_rate: 3.0e-3
logging_steps: 1
save_strategy: "no"
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


def recipes_in_order() -> list:
    """Return all recipes, of which one of each kind is in the fast suite."""
    return [pytest.param(name, marks=() if name in FAST_RECIPES else pytest.mark.slow) for name in RECIPES]


def losses(folder: Path) -> dict[int, float]:
    """Loss of every update, out of the newest checkpoint's log."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {record["step"]: record["loss"] for record in history if "loss" in record}


def launch(*words: str, folder: Path, script: Path = ROOT / "train_hf.py", processes: int = 2, **variables) -> None:
    """`accelerate launch script words` in a folder; on a machine without a GPU only --multi_gpu starts several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"] * (processes > 1) + ["--num_machines", "1", "--main_process_port", str(port)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", recipes_in_order())
def test_recipe_trains_evaluates_saves_and_reloads_in_a_smoke_test(name, tmp_path):
    results = train_hf.main(
        [str(ROOT / "recipes" / name), "--smoke_test", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    )
    folder = tmp_path / "run-smoke"
    assert json.loads((folder / "results.json").read_text()) == results
    assert all(math.isfinite(row["loss"]) and row["n"] > 0 for row in results["stages"])
    config = read_config(str(folder))
    model, info = class_of(config).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = load_processor(str(folder))
    assert processor.num_latents == results["stages"][-1]["num_latents"]
    inputs = processor(images=Image.new("RGB", (32, 32)), text="Which?", return_tensors="pt")
    prompt_ids = processor.prompt_names[0]
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs[prompt_ids].shape[1] + 2
    assert "processor.decode_answers(tokens, inputs)" in (folder / "README.md").read_text()


def test_a_thumbnail_switched_off_where_there_are_no_tiles_is_refused(tmp_path):
    write_tiny_vlm(tmp_path / "vlm", "llava")
    (tmp_path / "r.yaml").write_text(f"vlm: {tmp_path / 'vlm'}\nuse_cpu: true\ncomposed: true\nuse_thumbnail: false\n")
    with pytest.raises(ValueError, match="use_thumbnail: false has no effect, .* cuts no tiles: remove this key"):
        train_hf.build_from_vlm(parse_recipe([str(tmp_path / "r.yaml")])[0])


@pytest.mark.parametrize("max_length, limit, warned", [(None, 64, False), (40, 40, False), (90, 64, True)])
def test_the_language_models_positions_limit_max_length(max_length, limit, warned, caplog):
    assert train_hf.max_length_of(tiny_model(TEXT_CONFIGS["gpt2"](n_positions=64)), max_length) == limit
    assert [record.message for record in caplog.records] == [
        "max_length is 90, and the language model has 64 positions: the lower one counts"
    ] * warned


def test_rows_cut_to_no_length_are_refused():
    arguments = {"data_args": DataArguments(long_rows="cut"), "curriculum_args": CurriculumArguments()}
    collator = CurriculumCollator(Curriculum(), None, max_length=None)
    with pytest.raises(ValueError, match="long_rows: cut has no effect, .* Set max_length"):
        train_hf.fit({}, collator, **arguments, run_args=None)


@pytest.mark.slow
def test_internvl_recipes_go_from_cot_over_coconut_to_evaluation(tmp_path, monkeypatch):
    write_tiny_vlm(tmp_path / "vlm", "internvl")
    json_steps.write_sample(tmp_path / "steps", num_rows=8, seed=0)
    for name, place in (("STEPS", "steps"), ("COT", "cot"), ("CHECKPOINT", "coconut")):
        monkeypatch.setenv(name, str(tmp_path / place))

    def run(name: str, folder: str, *options: str) -> dict:
        tiny = ["--bf16", "false", "--use_cpu", "true", "--max_new_tokens", "4", "--disable_tqdm", "true", *options]
        recipe = str(ROOT / "recipes" / f"internvl3_{name}.yaml")
        return train_hf.main([recipe, *tiny, "--output_dir", str(tmp_path / folder)])

    few = ["--gradient_accumulation_steps", "4", "--warmup_steps", "0", "--save_strategy", "no"]
    cot = run("cot", "cot", "--vlm", str(tmp_path / "vlm"), *few, "--num_train_epochs", "1", "--max_tiles", "2")
    assert (cot["mode"], [row["num_latents"] for row in cot["stages"]]) == ("cot", [0])
    coconut = run("coconut_from_cot", "coconut", *few, "--num_train_epochs", "1")
    assert [(row["stage"], row["num_latents"]) for row in coconut["stages"]] == [(1, 2)]
    processor = load_processor(str(tmp_path / "coconut"))
    assert (processor.markers, processor.image_processor.max_patches) == ("both", 2)
    metrics = run("eval", "eval")
    assert (metrics["eval_stage"], metrics["eval_num_latents"], metrics["eval_n"]) == (1, 2, 8)
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["eval_test.json"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max_new_tokens", "50"], r"mazes validation row \d: the prompt of stage 2 with 50 new tokens .* takes"),
        (["--c_thought", "20"], r"mazes validation row \d+: the .* of stage [23] .*takes .*max_length, is 64"),
        (["--max_length", "20"], r"mazes validation row \d+: the sequence of stage 0 takes .*max_length, is 20"),
        (["--metric", "numeric_answer"], "mazes validation row 0, field 'answers': .* give a number"),
        (["--metric", "aokvqa_mc"], "mazes validation row 0, field 'answers': .* none of the choices"),
    ],
)
def test_a_mistake_that_a_later_stage_would_meet_is_refused_before_the_first_update(
    words, message, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_hf, "train", lambda *args: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *words])


def test_every_stage_is_logged_evaluated_and_keeps_its_best_checkpoint(recipe, tmp_path):
    results = train_hf.main([recipe, "--output_dir", str(tmp_path / "run")])
    assert [(row["stage"], row["num_latents"], row["n"]) for row in results["stages"]] == [
        (0, 0, 8),
        (1, 1, 8),
        (2, 2, 8),
    ]
    state = json.loads((tmp_path / "run" / "checkpoint-18" / "trainer_state.json").read_text())
    stages = [record["stage"] for record in state["log_history"] if "loss" in record]
    assert stages == [0] * 6 + [1] * 6 + [2] * 6
    for stage in range(3):
        folder = tmp_path / "run" / "stages" / f"stage-{stage}"
        assert json.loads((folder / "stage.json").read_text())["eval_stage"] == stage
        assert MMCoconutProcessor.from_pretrained(folder).num_latents == stage


@pytest.mark.parametrize("step", [8, 12])
def test_run_resumed_in_a_stage_or_between_two_continues_exactly(recipe, tmp_path, step):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ["--save_strategy", "steps", "--save_steps", "4", "--reset_optimizer", "--uniform_prob", "0.3"]
    options += ["--text_config.resid_pdrop", "0.1"]
    train_hf.main([recipe, "--output_dir", str(whole), *options])
    shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
    train_hf.main([recipe, "--output_dir", str(resumed), *options, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)
    weights = [MMCoconutForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (whole, resumed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=0, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("tower, sizes", [("vit", {"intermediate_size": 32}), ("dinov2", {"mlp_ratio": 2})])
def test_resuming_restores_towers_with_older_key_names(recipe, tmp_path, tower, sizes):
    config = {"model_type": tower, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **sizes}
    options = ["--vision_config", json.dumps({**config, "image_size": 24, "patch_size": 8})]
    options += ["--save_steps", "6", "--save_strategy", "steps"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_hf.main([recipe, "--output_dir", str(whole), *options])
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    train_hf.main([recipe, "--output_dir", str(resumed), *options, "--resume_from_checkpoint", "true"])
    assert losses(resumed) == losses(whole)


def test_frozen_part_keeps_its_weights_and_the_rest_learns(recipe, tmp_path):
    train_hf.main(
        [recipe, "--output_dir", str(tmp_path / "run"), "--freeze", "vision_tower", "--num_train_epochs", "1"]
    )
    trained = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    train_hf.main(
        [recipe, "--output_dir", str(tmp_path / "none"), "--num_train_epochs", "1", "--learning_rate", "0.0"]
    )
    fresh = MMCoconutForConditionalGeneration.from_pretrained(tmp_path / "none").state_dict()
    changed = {name for name, weight in trained.items() if not torch.equal(weight, fresh[name])}
    assert not any("vision_tower" in name for name in changed)
    assert "model.multi_modal_projector.weight" in changed and "model.language_model.wte.weight" in changed


def test_unknown_part_to_freeze_is_refused_with_the_nearest_name(recipe, tmp_path):
    with pytest.raises(ValueError, match="no sub-module 'vision_towr': did you mean 'vision_tower'"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--freeze", "vision_towr"])


def test_folder_of_an_earlier_run_is_refused_unless_told(recipe, tmp_path):
    start = [recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    train_hf.main(start)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds an earlier run. Set --resume_from_checkpoint"):
        train_hf.main(start)
    train_hf.main([*start, "--overwrite", "true"])
    assert not (tmp_path / "run" / "notes.txt").exists()


def test_folder_that_is_no_run_is_never_deleted(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run of this script: --overwrite does not delete it"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--overwrite", "true"])
    assert (tmp_path / "run" / "notes.txt").exists()


def test_resuming_without_a_checkpoint_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint to resume"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"])


def test_resuming_a_finished_run_keeps_its_latents(recipe, tmp_path):
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run")])
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"])
    assert MMCoconutProcessor.from_pretrained(tmp_path / "run").num_latents == 2


def test_what_the_answer_sees_is_saved_with_the_weights_and_training_may_change_it(recipe, tmp_path):
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--answer_sees", "thoughts"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["answer_sees"] == "thoughts"
    start = ["--model", str(tmp_path / "run"), "--vision_config", "null", "--text_config", "null"]
    for told, expected in (([], "thoughts"), (["--answer_sees", "no_image"], "no_image")):
        model_args, _, curriculum_args, _ = settle(
            parse_recipe([recipe, *start, "--tokenizer", "null", "--output_dir", str(tmp_path / "again"), *told]),
            recipe,
        )
        model, _ = train_hf.build(model_args, curriculum_args, None)
        assert model.config.answer_sees == expected


def test_schedule_is_saved_with_the_weights_and_truncation_with_the_recipe(recipe, tmp_path):
    parallel = ["--thought_schedule", "jacobi", "--jacobi_iterations", "2", "--bptt_thoughts", "1"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *parallel])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["thought_schedule"], config["jacobi_iterations"]) == ("jacobi", 2)
    assert "bptt_thoughts" not in config
    model_args, data_args, curriculum_args, run_args = parse_recipe([str(tmp_path / "run" / "recipe.yaml")])

    def built(*parts):
        model_args, _, curriculum_args, _ = settle((parts[0], data_args, parts[1], run_args), "recipe.yaml")
        return train_hf.build(model_args, curriculum_args, None)

    assert model_args.bptt_thoughts == 1
    start = {"model": str(tmp_path / "run"), "vision_config": None, "text_config": None, "tokenizer": None}
    model, _ = built(replace(model_args, **start), curriculum_args)
    assert (model.model.bptt_thoughts, model.config.jacobi_iterations) == (1, 2)
    assert model.model.schedule_of_call(None) == ThinkTogether(2)
    assert attention_of(model.get_decoder().config) == "sdpa"  # whose keys are read again
    sequential = {"thought_schedule": "sequential", "jacobi_iterations": None, "bptt_thoughts": None}
    model, _ = built(replace(model_args, **start, **sequential), curriculum_args)
    assert (model.model.bptt_thoughts, model.config.thought_schedule) == (None, "sequential")
    assert attention_of(model.get_decoder().config) == LATENT_WHERE_LEANER
    model, _ = built(replace(model_args, **start, **sequential, attn_implementation="sdpa"), curriculum_args)
    assert attention_of(model.get_decoder().config) == "sdpa"


@pytest.fixture
def json_data(tmp_path):
    options = json_steps.write_sample(tmp_path / "data", num_rows=6, seed=0)
    picture = next(Path(options["image_root"].replace("{split}", "train")).rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:60])
    return ["--dataset", "json_steps", "--dataset_options", json.dumps(options), "--text_config", json.dumps(
        {"model_type": "gpt2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 512})]  # fmt: skip


def test_unreadable_picture_ends_training_with_row_and_remedy(recipe, tmp_path, json_data):
    with pytest.raises(UnreadableImageError, match=r"train.* row \d"):
        train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *json_data, "--num_train_epochs", "1"])


def test_an_unreadable_picture_of_the_test_split_is_told_with_where_the_model_is(recipe, tmp_path, json_data):
    pictures = sorted((tmp_path / "data" / "images").glob("*.png"))
    whole = max((picture.read_bytes() for picture in pictures), key=len)
    for picture in pictures:
        picture.write_bytes(b"no picture" if picture.name == "test_0000.png" else whole)
    options = [*json_data, "--test_split", "test", "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"]
    with pytest.raises(UsageError, match=r"test.json row 0.*\n.*saved in .*run; .* mmcoconut eval .*run --split test"):
        train_hf.main([recipe, *options])
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_unreadable_picture_is_left_out_counted_and_reported_when_told(recipe, tmp_path, json_data):
    options = ["--output_dir", str(tmp_path / "run"), *json_data, "--num_train_epochs", "1"]
    results = train_hf.main([recipe, *options, "--unreadable_images", "skip"])
    assert len(results["unreadable_images"]) == 1
    assert "row" in results["unreadable_images"][0]


def test_checkpoint_is_trained_on_and_evaluated_without_training(recipe, tmp_path):
    train_hf.main([recipe, "--output_dir", str(tmp_path / "first"), "--num_train_epochs", "1"])
    start = [recipe, "--model", str(tmp_path / "first"), "--vision_config", "null", "--text_config", "null"]
    start += ["--tokenizer", "null"]
    train_hf.main([*start, "--output_dir", str(tmp_path / "second"), "--start_epoch", "1", "--num_train_epochs", "1"])
    assert MMCoconutProcessor.from_pretrained(tmp_path / "second").num_latents == 1
    before = (tmp_path / "second" / "results.json").read_text()
    metrics = train_hf.main([*start, "--output_dir", str(tmp_path / "second"), "--do_train", "false"])
    assert (metrics["eval_n"], metrics["eval_stage"], metrics["eval_num_latents"]) == (8, 0, 0)  # of `first`
    assert json.loads((tmp_path / "second" / "eval_validation.json").read_text()) == metrics
    assert (tmp_path / "second" / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("metric", "figures"),
    [
        ("medical_vqa", {"accuracy": 0.5, "yes_no_accuracy": 2 / 3, "open_exact_match": 0, "open_f1": 0, "n_open": 1}),
        # One word has no 4-gram, and of the four cosines of CIDEr it has the first: 10 / 4 for half of the rows.
        ("captions", {"accuracy": 0.5, "rouge_l": 0.5, "bleu4": 0, "cider": 1.25}),
    ],
)
def test_evaluation_in_training_logs_every_figure_of_the_metric(metric, figures, recipe, tmp_path, monkeypatch):
    rows = [{"question": "?", "steps": [], "answer": answer} for answer in ("yes", "yes", "no", "red")]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    source = json.dumps({"file": str(tmp_path / "{split}.json"), "images_required": False})
    options = ["--dataset", "json_steps", "--dataset_options", source, "--metric", metric, "--num_train_epochs", "1"]
    monkeypatch.setattr(trainer, "parse_answer", lambda text: "yes")
    train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])
    record = json.loads((tmp_path / "run" / "stages" / "stage-0" / "stage.json").read_text())
    assert {name: record[f"eval_{name}"] for name in figures} == pytest.approx(figures)


def test_accumulated_gradients_equal_one_batch(recipe, tmp_path):
    options = ["--num_train_epochs", "2", "--seed", "3"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "one"), *options])
    parts = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "two"), *options, *parts])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), abs=2e-4)


def test_bf16_training_is_close_to_float32(recipe, tmp_path):
    options = ["--num_train_epochs", "2"]
    train_hf.main([recipe, "--output_dir", str(tmp_path / "float32"), *options])
    train_hf.main([recipe, "--output_dir", str(tmp_path / "bf16"), *options, "--bf16"])
    one, two = losses(tmp_path / "float32"), losses(tmp_path / "bf16")
    assert list(two.values()) == pytest.approx(list(one.values()), abs=0.05)
    assert two != one


def test_checkpointed_training_has_the_same_losses(recipe, tmp_path):
    train_hf.main([recipe, "--output_dir", str(tmp_path / "one")])
    train_hf.main([recipe, "--output_dir", str(tmp_path / "two"), "--gradient_checkpointing"])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), abs=2e-4)


def test_recipe_of_the_original_code_runs(tmp_path):
    recipe = tmp_path / "gsm_coconut.yaml"
    recipe.write_text(
        f"project: coconut\nsave_path: {tmp_path}\nname: gsm\nonly_eval: False\ncoconut: True\ncot: False\n"
        "no_thoughts: False\nno_cot: False\nc_thought: 2\nepochs_per_stage: 3\nmax_latent_stage: 3\n"
        "pad_latent_to_max: True\nsave_only_improve: False\nuniform_prob: 0.0\nmodel_id: openai-community/gpt2\n"
        "load_model_path: None\nseed: 0\nresume: 3\nbf16: False\ntrain_path: data/gsm_train.json\n"
        "val_path: data/gsm_valid.json\nreset_optimizer: True\nbatch_size_training: 4\ndebug: False\n"
        'gradient_accumulation_steps: 1\nnum_epochs: 25\nlr: !!float "1e-4"\nweight_decay: 0.01\n'
    )
    results = train_hf.main([str(recipe), "--smoke_test", "--disable_tqdm", "true"])
    assert [(row["stage"], row["num_latents"]) for row in results["stages"]] == [(0, 0), (1, 2)]
    assert (tmp_path / "gsm-smoke" / "results.json").exists()


def test_icot_forgets_the_moments_of_the_optimizer_whenever_more_steps_go(recipe, tmp_path, monkeypatch):
    ages = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            weights = getattr(optimizer, "optimizer", optimizer).state.values()
            ages[state.global_step] = max(int(values["step"]) for values in weights)

    init = trainer.CurriculumTrainer.__init__

    def watched(self, **kwargs):
        init(self, **kwargs)
        self.add_callback(Watch())

    monkeypatch.setattr(trainer.CurriculumTrainer, "__init__", watched)
    options = ["--output_dir", str(tmp_path / "run"), "--mode", "icot", "--max_eval_samples", "2"]
    results = train_hf.main([recipe, *options, "--save_strategy", "no"])
    per_stage = results["train_steps"] // 3
    assert [ages[step] for step in sorted(ages)] == [*range(1, per_stage + 1)] * 3
    assert [row["num_latents"] for row in results["stages"]] == [0, 0, 0]


@pytest.mark.slow
def test_seconds_of_an_update_leave_out_evaluations_and_checkpoints(recipe, tmp_path, monkeypatch):
    """Evaluations that sleep make training longer, and not its updates."""
    evaluation_loop = trainer.CurriculumTrainer.evaluation_loop

    def slow(self, *args, **kwargs):
        time.sleep(0.5)
        return evaluation_loop(self, *args, **kwargs)

    monkeypatch.setattr(trainer.CurriculumTrainer, "evaluation_loop", slow)
    results = train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), "--max_eval_samples", "2"])
    spent = results["seconds_per_update"] * results["train_steps"]
    assert 0 < spent < results["train_seconds"] - 1.4  # half a second after each of the three stages
    assert results["peak_memory_mb"] > 100
    folder = tmp_path / "run"
    again = train_hf.main([str(folder / "recipe.yaml"), "--resume_from_checkpoint", str(folder / "checkpoint-18")])
    assert (again["train_steps"], again["seconds_per_update"]) == (18, None)


def test_test_split_is_evaluated_once_at_the_last_stage(recipe, tmp_path):
    options = ["--test_split", "test", "--dataset_options.num_rows.test", "6"]
    results = train_hf.main([recipe, "--output_dir", str(tmp_path / "run"), *options])
    assert (results["test"]["test_n"], results["test"]["test_stage"]) == (6, 2)
    assert [row["n"] for row in results["stages"]] == [8, 8, 8]


def test_evaluation_loss_belongs_to_the_stage_that_is_evaluated(recipe, tmp_path):
    """With every training row at a random stage, the loss of evaluation still has the stage's latents."""
    collator = train_hf.CurriculumCollator(
        train_hf.Curriculum(uniform_prob=1.0, max_latent_stage=2, pad_latent_to_max=False),
        MMCoconutProcessor.from_pretrained(trained(recipe, tmp_path)),
    )
    collator.fixed_stage = 2
    rows = train_hf.load_examples("arrow_mazes", split="validation", num_rows=8, max_hops=2, cell_size=8)
    batch = collator.prompts([{**row, "index": index} for index, row in enumerate(rows)])
    latent = collator.processor.latent_token_id
    assert (batch["supervised"]["input_ids"] == latent).sum(1).tolist() == [2] * 8
    assert (batch["input_ids"] == latent).sum(1).tolist() == [2] * 8


def trained(recipe: str, folder: Path) -> Path:
    train_hf.main([recipe, "--output_dir", str(folder / "trained"), "--max_steps", "1"])
    return folder / "trained"
