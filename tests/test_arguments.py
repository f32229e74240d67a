"""A recipe means what it says, and everything that is wrong with it is said at once."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import yaml

from mmcoconut.arguments import conflicts
from mmcoconut.arguments.choices import LIMITS
from mmcoconut.arguments.coconut_recipes import translate_coconut_keys
from mmcoconut.arguments.fields import CLASSES, RunArguments
from mmcoconut.arguments.recipe_files import read_recipe_file
from mmcoconut.arguments.recipes import parse_recipe, read_recipe, save_recipe
from mmcoconut.arguments.variants import compared_modes
from mmcoconut.data import options_of
from mmcoconut.errors import RecipeError, run_command


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SCRATCH = """
vision_config: {model_type: clip_vision_model, hidden_size: 32}
text_config: {model_type: gpt2, hidden_size: 96, layer_norm_epsilon: 1e-5}
tokenizer: train
use_cpu: true
"""

MADE_UP = ("noise", "rows", "names", "home", "images_required", "image_root", "file", "folder")


@pytest.fixture(autouse=True)
def options_of_a_data_set(request, monkeypatch):
    """How values are merged is tested with options that no data set has."""
    if "own_options" not in request.fixturenames:
        monkeypatch.setattr(conflicts, "options_of", lambda name: dict.fromkeys(MADE_UP) | options_of(name))


@pytest.fixture
def own_options():
    """The options of the data sets themselves."""


def test_options_of_another_data_set_are_all_named_with_their_values_and_files(recipe, own_options):
    recipe(f"{SCRATCH}\ndataset: arrow_mazes\ndataset_options: {{max_hops: 6, seed: 1}}", "a.yaml")
    options = "dataset_options: {images_required: false, fraction: [1, 0, 0]}"
    found = problems(recipe(f"base: a.yaml\ndataset: json_steps\n{options}"))
    remedies = {(key, str(value)): remedy for key, value, remedy in found}
    remedy = remedies["dataset_options.max_hops", "6"]
    assert remedy.startswith("data set 'json_steps' has no such option: remove it, or set it to null where a `base`")
    assert "valid are: file, image_root, images_required, fractions" in remedy and "a.yaml" in remedy
    assert ("dataset_options.seed", "1") in remedies
    assert "did you mean `fractions`?" in remedies["dataset_options.fraction", "[1, 0, 0]"]
    nulls = "dataset_options: {max_hops: null, seed: null, images_required: false, fractions: [1, 0, 0]}"
    parse_recipe([recipe(f"base: a.yaml\ndataset: json_steps\n{nulls}")])


def test_a_misspelt_file_names_the_one_beside_it(recipe, tmp_path):
    recipe(SCRATCH, "mine.yaml")
    assert only_problem(str(tmp_path / "mien.yaml"))[2].endswith(f"did you mean `{tmp_path / 'mine.yaml'}`?")


def test_a_base_may_be_a_recipe_of_the_package(recipe):
    for base in ("quickstart.yaml", "quickstart"):
        assert parse_recipe([recipe(f"base: {base}\nmax_latent_stage: 2")])[2].max_latent_stage == 2
    recipe(f"{SCRATCH}\nseed: 5", "quickstart.yaml")  # a file beside the recipe comes first
    assert parse_recipe([recipe("base: quickstart.yaml")])[-1].seed == 5


# args/gsm_coconut.yaml of the original, with paths
COCONUT = """
project: coconut
save_path: runs
name: gsm-coconut

only_eval: False

coconut: True
cot: False
no_thoughts: False
no_cot: False

c_thought: 2
epochs_per_stage: 3
max_latent_stage: 3
pad_latent_to_max: True

save_only_improve: False
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: "None"
seed: 0
resume: 3
bf16: False
train_path: {folder}/gsm_train.json
val_path: {folder}/gsm_valid.json
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: 0.01
use_cpu: true
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text: str, name: str = "maze.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def coconut(recipe, tmp_path):
    """The path of the original's recipe after replacements, its data files in place."""
    for name in ("gsm_train.json", "gsm_valid.json"):
        (tmp_path / name).write_text("[]")

    def write(**changes) -> str:
        values = yaml.safe_load(COCONUT.replace("{folder}", str(tmp_path))) | changes
        return recipe(yaml.safe_dump(values), "gsm_coconut.yaml")

    return write


def problems(path: str, *words: str) -> list[tuple]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe([path, *words])
    return caught.value.problems


def only_problem(path: str, *words: str) -> tuple:
    (problem,) = problems(path, *words)
    assert str(RecipeError(path, [problem])).count("\n") == 1
    return problem


def test_an_empty_field_keeps_its_default(recipe):
    model, data, curriculum, run = parse_recipe([recipe(SCRATCH)])
    assert (model.image_fusion, model.projector_type, model.markers, model.freeze) == ("replace", "linear", "both", [])
    assert (model.vision_feature_layer, model.vision_feature_select_strategy) == (-1, "default")
    assert (data.dataset, data.dataset_options, data.eval_split) == ("arrow_mazes", {}, "validation")
    assert dataclasses.asdict(curriculum) == {
        "objective": "supervised",
        "objectives": None,
        "log_gradient_cosine": False,
        "rewards": None,
        "rl": {},
        "thought_noise": 0.0,
        "mode": "coconut",
        "c_thought": 1,
        "max_latent_stage": 3,
        "epochs_per_stage": 1,
        "uniform_prob": 0.0,
        "pad_latent_to_max": True,
        "thoughts_per_turn": 0,
        "reset_optimizer": False,
        "start_epoch": 0,
        "align_weight": 0.0,
        "ce_weight": 1.0,
        "align_warmup_epochs": 0,
        "alignment_target": ["question", "answer"],
    }
    assert (run.remove_unused_columns, run.report_to, run.do_train, run.smoke_test) == (False, [], True, False)
    assert run.output_dir == "outputs/maze"


def test_every_field_says_what_it_is_for_and_stands_in_one_class():
    names = [field.name for cls in CLASSES for field in dataclasses.fields(cls) if field.init]
    assert len(names) == len(set(names))
    for cls in CLASSES[:-1]:
        assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", '"1e-5"', 1e-5),
        ("learning_rate", "1", 1.0),
        ("max_train_samples", "1e4", 10000),
        ("max_train_samples", "null", None),
        ("epochs_per_stage", "[3, 1]", [3, 1]),
        ("freeze", "vision_tower", ["vision_tower"]),
        ("run_name", '"2024"', "2024"),
        ("bf16", "no", False),
        ("resume_from_checkpoint", "true", True),
        ("eval_steps", "10", 10.0),
        ("lr_scheduler_kwargs", "{num_cycles: 2}", {"num_cycles": 2}),
        ("label_names", "[labels]", ["labels"]),
        ("optim_target_modules", "all-linear", "all-linear"),
    ],
)
def test_yaml_is_read_as_the_type_of_the_field(recipe, field, text, value):
    arguments = parse_recipe([recipe(f"{SCRATCH}\n{field}: {text}")])
    (read,) = [getattr(part, field) for part in arguments if hasattr(part, field)]
    assert read == value and type(read) is type(value)


def test_a_bare_no_is_a_strategy_where_no_is_one(recipe):
    run = parse_recipe([recipe(f"{SCRATCH}\neval_strategy: no\nsave_strategy: no")])[-1]
    assert (run.eval_strategy.value, run.save_strategy.value) == ("no", "no")


def test_numbers_inside_mappings_are_numbers(recipe):
    assert parse_recipe([recipe(SCRATCH)])[0].text_config["layer_norm_epsilon"] == 1e-5


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--seed", "3", "--seed", "4"], "seed", 4),
        (["--reset_optimizer"], "reset_optimizer", True),
        (["--reset_optimizer", "true"], "reset_optimizer", True),
        (["--pad_latent_to_max", "false"], "pad_latent_to_max", False),
        (["--pad_latent_to_max=no"], "pad_latent_to_max", False),
        (["--freeze", "vision_tower", "language_model"], "freeze", ["vision_tower", "language_model"]),
        (["--freeze", "vision_tower"], "freeze", ["vision_tower"]),
        (["--freeze", '["vision_tower"]'], "freeze", ["vision_tower"]),
        (["--freeze", "[]"], "freeze", []),
        (["--epochs_per_stage", "3", "1"], "epochs_per_stage", [3, 1]),
        (["--epochs_per_stage", "3"], "epochs_per_stage", 3),
        (["--vision_feature_layer", "-2"], "vision_feature_layer", -2),
        (["--run_name", "7"], "run_name", "7"),
        (["--run_name", "2024-13-01"], "run_name", "2024-13-01"),
        (["--run_name", "{a"], "run_name", "{a"),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--new_token_init", "null"], "new_token_init", None),
        (["--new_token_init", "<<"], "new_token_init", "<<"),
        (["--dataset_options.num_rows", "100"], "dataset_options", {"num_rows": 100, "noise": {"level": 1}}),
        (["--dataset_options.noise.level", "1e-2"], "dataset_options", {"num_rows": 8, "noise": {"level": 0.01}}),
        (["--dataset_options", '{"num_rows": 2}'], "dataset_options", {"num_rows": 2}),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)
def test_the_command_line_wins_over_the_file(recipe, words, field, value):
    text = f"{SCRATCH}\nlearning_rate: 1.0\nfreeze: [x]\nepochs_per_stage: 9\nnew_token_init: a\n"
    path = recipe(f"{text}dataset_options: {{num_rows: 8, noise: {{level: 1}}}}\neval_strategy: epoch")
    (read,) = [getattr(part, field) for part in parse_recipe([path, *words]) if hasattr(part, field)]
    assert read == value


def test_a_dotted_key_changes_one_entry_of_a_mapping(recipe):
    model = parse_recipe([recipe(SCRATCH), "--text_config.hidden_size", "64"])[0]
    assert model.text_config == {"model_type": "gpt2", "hidden_size": 64, "layer_norm_epsilon": 1e-5}


def test_a_dotted_key_fills_a_mapping_that_is_not_there(recipe):
    assert parse_recipe([recipe(SCRATCH), "--dataset_options.seed", "1"])[1].dataset_options == {"seed": 1}


def test_variables_are_expanded_also_inside_mappings(recipe, monkeypatch):
    monkeypatch.setenv("MMC_RATE", "1e-3")
    monkeypatch.setenv("MMC_NAME", "7")
    monkeypatch.setenv("MMC_EMPTY", "")
    text = "learning_rate: ${MMC_RATE}\nrun_name: ${MMC_NAME}\nseed: ${MMC_UNSET:-5}\noutput_dir: ${MMC_EMPTY:-out}/x"
    options = "dataset_options: {rows: '${MMC_NAME}', names: ['a-${MMC_NAME}', '${MMC_UNSET:-b}'], home: ~/x}"
    _, data, _, run = parse_recipe([recipe(f"{SCRATCH}\n{text}\n{options}")])
    assert (run.learning_rate, run.run_name, run.seed, run.output_dir) == (1e-3, "7", 5, "out/x")
    assert data.dataset_options == {"rows": 7, "names": ["a-7", "b"], "home": os.path.expanduser("~/x")}


def test_a_variable_that_is_not_set_is_named_with_its_key(recipe):
    key, value, remedy = only_problem(recipe(f"{SCRATCH}\ndataset_options: {{note: 'x/${{MMC_UNSET}}'}}"))
    assert (key, value) == ("dataset_options.note", "x/${MMC_UNSET}")
    assert "MMC_UNSET" in remedy and "${MMC_UNSET:-default}" in remedy


def test_the_command_line_replaces_a_variable_that_is_not_set(recipe):
    path = recipe(f"{SCRATCH}\nrun_name: ${{MMC_UNSET}}")
    assert parse_recipe([path, "--run_name", "x"])[-1].run_name == "x"


@pytest.mark.parametrize(
    ("line", "key", "value", "remedy"),
    [
        ("learning_rte: 1", "learning_rte", 1, "did you mean `learning_rate`?"),
        ("c_thougt: 1", "c_thougt", 1, "did you mean `c_thought`?"),
        ("qqqqqqqq: 1", "qqqqqqqq", 1, "no such key"),
        ("seed: three", "seed", "three", "expected int"),
        ("seed: 1.5", "seed", 1.5, "expected int"),
        ("seed: true", "seed", True, "expected int"),
        ("learning_rate: fast", "learning_rate", "fast", "expected float"),
        ("bf16: 3", "bf16", 3, "expected bool"),
        ("run_name: 7", "run_name", 7, "expected str | None"),
        ("dataset_options: [1]", "dataset_options", [1], "expected dict"),
        ("freeze: [1]", "freeze", [1], "expected list[str]"),
        ("epochs_per_stage: [a]", "epochs_per_stage", ["a"], "expected int | list[int]"),
        ("max_new_tokens:", "max_new_tokens", None, "expected int"),
        ("c_thought: -1", "c_thought", -1, "between 0 and inf"),
        ("start_epoch: -1", "start_epoch", -1, "between 0 and inf"),
        ("max_train_samples: 0", "max_train_samples", 0, "between 1 and inf"),
        ("epochs_per_stage: 0", "epochs_per_stage", 0, "between 1 and inf"),
        ("epochs_per_stage: [2, 0]", "epochs_per_stage", [2, 0], "between 1 and inf"),
        ("epochs_per_stage: []", "epochs_per_stage", [], "between 1 and inf"),
        ("warmup_steps: -1", "warmup_steps", -1, "between 0 and inf"),
        ("save_total_limit: -1", "save_total_limit", -1, "between 0 and inf"),
        ("adam_beta1: 1.1", "adam_beta1", 1.1, "between 0 and 1"),
        ("seed: -1", "seed", -1, "between 0 and 4294967295"),
        ("max_steps: -2", "max_steps", -2, "between -1 and inf"),
        ("image_size: 0", "image_size", 0, "between 1 and inf"),
        ("min_tiles: 0", "min_tiles", 0, "between 1 and inf"),
        ("max_tiles: -1", "max_tiles", -1, "between 1 and inf"),
        ("uniform_prob: 1.5", "uniform_prob", 1.5, "between 0 and 1"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size", 0, "between 1 and inf"),
        ("mode: coconot", "mode", "coconot", "did you mean `coconut`?"),
        ("image_fusion: replce", "image_fusion", "replce", "did you mean `replace`?"),
        ("dataset: arrow_maze", "dataset", "arrow_maze", "did you mean `arrow_mazes`?"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type", "cosin", "did you mean `cosine`?"),
        ("thought_norm: 1", "thought_norm", 1, "choose one of none, embedding, projection"),
        ("thought_schedule: jacoby", "thought_schedule", "jacoby", "did you mean `jacobi`?"),
        ("thought_schedule: jacobi", "jacobi_iterations", None, "set 1 or more"),
        ("{thought_schedule: jacobi, jacobi_iterations: 0}", "jacobi_iterations", 0, "between 1 and inf"),
        ("{thought_schedule: jacobi, jacobi_iterations: 1.5}", "jacobi_iterations", 1.5, "expected int | None"),
        ("jacobi_iterations: 2", "jacobi_iterations", 2, "set `thought_schedule: jacobi` too"),
        (
            "{thought_schedule: jacobi, jacobi_iterations: 2, mode: pause}",
            "thought_schedule",
            "jacobi",
            "feeds no thought back",
        ),
        (
            "{thought_schedule: jacobi, jacobi_iterations: 2, compare: 'coconut,pause'}",
            "thought_schedule",
            "jacobi",
            "feeds no thought back",
        ),
        ("answer_sees: image", "answer_sees", "image", "choose one of all, no_image, thoughts"),
        ("{answer_sees: thoughts, thoughts_per_turn: 2}", "answer_sees", "thoughts", "train on rows of one turn"),
        ("bptt_thoughts: -1", "bptt_thoughts", -1, "between 0 and inf"),
        ("bptt_thought: 1", "bptt_thought", 1, "did you mean `bptt_thoughts`?"),
        ("unreadable_images: zeros", "unreadable_images", "zeros", "choose one of error, skip"),
        ("remove_unused_columns: true", "remove_unused_columns", True, "drop the images"),
        ("dataloader_persistent_workers: true", "dataloader_persistent_workers", True, "stage 0"),
        ("max_latent_stage: 0", "max_latent_stage", 0, "no latents"),
        ("{mode: pause, c_thought: 0}", "c_thought", 0, "no latents"),
        ("fp16: true\nbf16: true", "TrainingArguments", "ValueError", "fp16"),
        ("load_best_model_at_end: true", "load_best_model_at_end", True, "stages/ keeps the best of each"),
        ("fsdp: full_shard", "fsdp", "full_shard", "fsdp2_8gpu.yaml"),
        ("do_train: false", "model", None, "nothing to evaluate: name a checkpoint"),
        ("compare: cot,coconot", "compare", "coconot", "did you mean `coconut`?"),
        ("compare: [cot, nocot]", "compare", "nocot", "did you mean `no_cot`?"),
        ("compare: []", "compare", "", "choose from coconut, cot, no_cot, no_thoughts, markers, pause, icot, jacobi"),
        ("compare: jacoby", "compare", "jacoby", "did you mean `jacobi`?"),
        ("compare: cot,coconut,cot", "compare", "cot", "it is `cot` again: name it once"),
        ("compare: coconut+codi", "compare", "coconut+codi", "no objective 'codi': choose from"),
        ("{mode: markers, markers: none}", "markers", "none", "set both or start, or `mode: no_thoughts`"),
        ("jobs: 2", "jobs", 2, "only a comparison has several runs"),
        ("compare: 3", "compare", 3, "expected str | list[str] | None"),
        ("{compare: cot, seeds: 0}", "seeds", 0, "between 1 and inf"),
        ("num_train_epochs: 0", "num_train_epochs", 0, "nothing would be trained: set more than 0"),
        ("max_steps: 0", "max_steps", 0, "nothing would be trained: set 1 or more"),
        ("{overwrite: true, resume_from_checkpoint: true}", "overwrite", True, "is resumed, not deleted"),
        ("prediction_loss_only: true", "prediction_loss_only", True, "always generates answers"),
        ("batch_eval_metrics: true", "batch_eval_metrics", True, "need the whole split"),
        ("eval_do_concat_batches: false", "eval_do_concat_batches", False, "need the whole split"),
        ("do_predict: true", "do_predict", True, "`test_split` evaluates"),
        ("greater_is_better: false", "greater_is_better", False, "set `metric_for_best_model` too"),
        ("checkpointed_passes: first", "checkpointed_passes", "first", "set `activation_checkpointing: true`"),
        ("ce_weight: 0.5", "ce_weight", 0.5, "there is no alignment: set `align_weight` too"),
        ("alignment_target: [answer]", "alignment_target", ["answer"], "there is no alignment"),
        ("projector_num_heads: 4", "projector_num_heads", 4, "only a projector_type of transformer"),
        ("num_visual_tokens: 4", "num_visual_tokens", 4, "only a projector_type of pooled_prefix"),
        ("image_pooling: cls", "image_pooling", "cls", "only a projector_type of pooled_prefix"),
        ("alignment_adapter: false", "alignment_adapter", False, "only a projector_type of pooled_prefix"),
        ("{vision_last_norm: true, vision_feature_layer: -2}", "vision_last_norm", True, "only layer -1"),
        ("{vision_last_norm: true, vision_feature_layer: [1, 2]}", "vision_last_norm", True, "layer is [1, 2]"),
        ("{thoughts_per_turn: 2, reset_optimizer: true}", "reset_optimizer", True, "there are no stages"),
        ("{tokenizer: a/b, tokenizer_vocab_size: 300}", "tokenizer_vocab_size", 300, "set `tokenizer: train`"),
        ("seeds: 3", "seeds", 3, "set `compare` to its modes"),
        ("hub_strategy: all_checkpoints", "hub_strategy", "all_checkpoints", "each save is a revision already"),
        ("{compare: cot, push_to_hub: true}", "push_to_hub", True, "overwrite each other on the Hub"),
        ("{compare: cot, resume_from_checkpoint: true}", "resume_from_checkpoint", True, "resumes by itself"),
        (
            "{compare: cot, model: a/b, vision_config: null, text_config: null, tokenizer: null, do_train: false}",
            "do_train",
            False,
            "a comparison trains every mode",
        ),
        ("{compare: 'cot, pause', c_thought: 0}", "c_thought", 0, "`mode: pause` would have no latents"),
        (
            "vision_config: {model_type: clip_vision_model, num_hiden_layers: 3}",
            "vision_config.num_hiden_layers",
            3,
            "CLIPVisionConfig has no such field; did you mean `num_hidden_layers`?",
        ),
        ("text_config: {model_type: gpt22}", "text_config", "gpt22", "no such architecture; did you mean `gpt2`?"),
        ("text_config: {hidden_size: 8}", "text_config", {"hidden_size": 8}, "model_type"),
        ("tokenizer: null", "tokenizer", None, "tokenizer: train"),
        ("text_config: null", "text_model", None, "set `text_model` or `text_config`"),
        ("vision_config: null", "vision_model", None, "set `vision_model` or `vision_config`"),
        ("vision_model: a/b", "vision_model", "a/b", "`vision_config` is set too"),
        ("tokenizer: ./nowhere", "tokenizer", "./nowhere", "no such folder"),
        (
            "dataset_options: {images_required: false, image_root: .}",
            "dataset_options.images_required",
            False,
            "no image would be read",
        ),
        (
            "gradient_checkpointing_kwargs: {use_reentrant: true}",
            "gradient_checkpointing_kwargs",
            {"use_reentrant": True},
            "use_reentrant: false",
        ),
        (
            "activation_checkpointing_kwargs: '{\"use_reentrant\": true}'",
            "activation_checkpointing_kwargs",
            {"use_reentrant": True},
            "use_reentrant: false",
        ),
    ],
)
def test_a_problem_is_reported_with_key_value_and_remedy(recipe, line, key, value, remedy):
    values = yaml.safe_load(SCRATCH) | yaml.safe_load(line)
    found = only_problem(recipe(yaml.safe_dump(values)))
    assert found[:2] == (key, value)
    assert remedy in found[2]
    assert str(RecipeError("r", [found])) == f"r: 1 problem(s)\n  - {key} = {value!r}: {' '.join(found[2].split())}"


@pytest.mark.parametrize("key", ["overwrite", "resume_from_checkpoint"])
def test_an_evaluation_neither_deletes_nor_resumes_a_run(key, recipe):
    found = only_problem(recipe(f"model: a/b\nuse_cpu: true\ndo_train: false\n{key}: true"))
    assert found == (key, True, "with `do_train: false` nothing is trained: remove this key")


@pytest.mark.parametrize(
    "key, value", [("num_visual_tokens", 4), ("projector_num_heads", 4), ("image_pooling", "cls")]
)
def test_a_vision_language_model_brings_its_projector(key, value, recipe):
    found = only_problem(recipe(f"vlm: a/b\nuse_cpu: true\n{key}: {value}"))
    assert found == (key, value, "the `vlm` has its own: remove this key")


@pytest.mark.parametrize("words", [["--num_train_epochs", "0", "--max_steps", "5"], ["--num_train_epochs", "0.01"]])
def test_updates_may_be_fewer_than_an_epoch(words, recipe):
    parse_recipe([recipe(SCRATCH), *words])


@pytest.mark.parametrize(
    "words, lines",
    [
        ([], []),
        (["--c_thought", "2", "--hub_model_id", "a/b", "--push_to_hub", "true"], []),
        (["--mode", "cot", "--c_thought", "1"], []),
        (
            ["--mode", "cot", "--c_thought", "2", "--markers", "start", "--thought_norm", "embedding"],
            ["`mode: cot`: c_thought: 2; markers: start; thought_norm: embedding"],
        ),
        (
            ["--mode", "no_thoughts", "--c_thought", "2", "--max_latent_stage", "2"],
            ["`mode: no_thoughts`: c_thought: 2"],
        ),
        (["--mode", "pause", "--bptt_thoughts", "1", "--c_thought", "2"], ["`mode: pause`: bptt_thoughts: 1"]),
        (["--compare", "cot,coconut", "--c_thought", "2", "--uniform_prob", "0.1"], []),
        (["--compare", "cot,no_cot", "--uniform_prob", "0.1"], ["`mode: cot, no_cot`: uniform_prob: 0.1"]),
        (
            ["--max_latent_stage", "1", "--epochs_per_stage", "1", "1", "1", "4"],
            ["`max_latent_stage: 1` (the last entries): epochs_per_stage: [1, 1, 1, 4]"],
        ),
        (["--max_latent_stage", "1", "--epochs_per_stage", "1", "1", "1"], []),
        (["--hub_model_id", "a/b"], ["`push_to_hub: false`: hub_model_id: a/b"]),
    ],
)
def test_keys_that_this_run_leaves_idle_are_warned_of_in_one_line_a_reason(words, lines, recipe, caplog):
    parse_recipe([recipe(SCRATCH), *words])
    assert [record.message for record in caplog.records] == [f"Without effect with {line}" for line in lines]


def test_a_model_and_its_config_exclude_each_other(recipe):
    path = recipe(f"{SCRATCH}\ntext_model: gpt2\n".replace("tokenizer: train", ""))
    assert only_problem(path) == ("text_model", "gpt2", "`text_config` is set too: keep one")


def test_a_checkpoint_excludes_other_backbones(recipe):
    found = problems(recipe("model: user/mmcoconut\ntext_model: gpt2\ntokenizer: gpt2\nuse_cpu: true"))
    assert [key for key, _, _ in found] == ["text_model", "tokenizer"]
    assert "--text_model null" in found[0][2]


def test_a_checkpoint_needs_nothing_else(recipe):
    assert parse_recipe([recipe("model: user/mmcoconut\nuse_cpu: true")])[0].model == "user/mmcoconut"


def test_a_pretrained_language_model_keeps_its_tokenizer(recipe):
    path = recipe("vision_model: a/b\ntext_model: gpt2\ntokenizer: train\nuse_cpu: true")
    assert only_problem(path)[0] == "tokenizer"


def test_controls_without_latents_may_have_no_latent_stage(recipe):
    for mode in ("cot", "no_cot", "no_thoughts"):
        words = ["--mode", mode, "--max_latent_stage", "0", "--c_thought", "0"]
        assert parse_recipe([recipe(SCRATCH), *words])[2].max_latent_stage == 0


def test_compared_controls_without_latents_may_have_no_latent_stage(recipe):
    words = ["--compare", "cot,no_thoughts", "--max_latent_stage", "0", "--seeds", "3"]
    run = parse_recipe([recipe(SCRATCH), *words])[3]
    assert (compared_modes(run.compare), run.seeds) == (["cot", "no_thoughts"], 3)


def test_compared_modes_are_a_list_or_words_with_commas(recipe):
    for words in (["--compare=cot,coconut"], ["--compare=[cot, coconut]"], ["--compare", "cot", "coconut"]):
        assert compared_modes(parse_recipe([recipe(SCRATCH), *words])[3].compare) == ["cot", "coconut"]


def test_an_answer_that_sees_less_and_rows_that_stop_are_refused(recipe):
    found = problems(recipe(f"{SCRATCH}\nanswer_sees: no_image\nstop_head: true"))
    assert ("answer_sees", "no_image") in [problem[:2] for problem in found]
    assert "or remove `stop_head`" in next(remedy for key, _, remedy in found if key == "answer_sees")


def test_all_problems_are_listed_at_once(recipe):
    text = """
text_modle: gpt2
vision_model: /nowhere/clip
seed: three
uniform_prob: 2
mode: coconot
mode: coconot
remove_unused_columns: true
dataset_options: {file: /nowhere/x.json}
freeze: ${MMC_UNSET}
"""
    with pytest.raises(RecipeError) as caught:
        parse_recipe([recipe(text), "loose", "--c_thought", "-1", "--seed.x", "1"])
    keys = [key for key, _, _ in caught.value.problems]
    ours = ["uniform_prob", "mode", "mode", "c_thought", "vision_model", "text_model", "dataset_options.file"]
    theirs = ["seed", "remove_unused_columns"]
    assert sorted(keys) == sorted(["command line", "seed.x", "freeze", "text_modle", *ours, *theirs])
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + len(keys) and lines[0].endswith("maze.yaml: 13 problem(s)")
    assert all(f"  - {key} = " in line for key, line in zip(keys, lines[1:], strict=True))


def test_the_message_of_training_arguments_stands_beside_ours(recipe):
    found = problems(recipe(f"{SCRATCH}\nfp16: true\nbf16: true\nuniform_prob: 2"))
    assert [key for key, _, _ in found] == ["uniform_prob", "TrainingArguments"]


def test_a_key_written_twice_is_named_with_its_lines(recipe):
    text = "seed: 1\nvision_config:\n  model_type: a\n  model_type: vit\nseed: 2\ntext_model: gpt2\nuse_cpu: true\n"
    assert problems(recipe(text)) == [
        ("seed", "line 5", "already set in line 1: keep one"),
        ("model_type", "line 4", "already set in line 3: keep one"),
    ]
    assert ("a", "line 1", "already set in line 1: keep one") in problems(recipe("dataset_options: {a: 1, a: 2}"))


def test_a_recipe_that_cannot_be_read_says_why(recipe, tmp_path):
    assert only_problem(str(tmp_path / "none.yaml"))[2].startswith("no such file")
    assert only_problem(recipe("a: [1"))[2].startswith("not YAML")
    assert only_problem(recipe("seed: \x07"))[2].startswith("not YAML")
    assert only_problem(recipe("just text"))[1] == "just text"
    (tmp_path / "latin.yaml").write_bytes("run_name: é".encode("latin-1"))
    assert only_problem(str(tmp_path / "latin.yaml"))[2].startswith("not YAML")
    with pytest.raises(RecipeError, match="no such file"):
        parse_recipe([])


@pytest.mark.parametrize("key", ["model", "vision_model", "text_model", "tokenizer", "resume_from_checkpoint"])
def test_a_local_folder_must_exist_and_a_hub_id_is_not_looked_up(recipe, tmp_path, key):
    base = {"use_cpu": True} if key == "model" else {"vision_model": "a/b", "text_model": "c/d", "use_cpu": True}
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "state.bin").write_text("")
    for value in ("x/y", "gpt2", str(tmp_path / "weights")):
        arguments = parse_recipe([recipe(yaml.safe_dump(base | {key: value}))])
        assert value in [getattr(part, key, None) for part in arguments]
    for value in ("./nowhere", "/nowhere/x", str(tmp_path / "weights" / "state.bin")):
        assert only_problem(recipe(yaml.safe_dump(base | {key: value})))[:2] == (key, value)


def test_data_paths_must_exist_for_the_splits_in_use(recipe, tmp_path):
    (tmp_path / "train.json").write_text("[]")
    (tmp_path / "images").mkdir()
    pattern, images = str(tmp_path / "{split}.json"), str(tmp_path / "images")
    path = recipe(SCRATCH + yaml.safe_dump({"dataset_options": {"file": pattern, "image_root": images}}))
    missing = (
        "dataset_options.file",
        str(tmp_path / "validation.json"),
        "no such file or folder: a relative path starts where you run this",
    )
    assert problems(path) == [missing]
    assert parse_recipe([path, "--eval_split", "train"])[1].dataset_options["image_root"] == images
    words = ("--eval_split", "train", "--test_split", "test")
    assert only_problem(path, *words)[2].endswith("It is read because test_split is 'test'; null goes without one")
    by_split = {"train": str(tmp_path / "none.json"), "validation": str(tmp_path / "train.json")}
    path = recipe(SCRATCH + yaml.safe_dump({"dataset_options": {"file": by_split}}))
    assert only_problem(path)[1] == by_split["train"]
    assert parse_recipe([path, "--do_train", "false", "--tokenizer", "gpt2"])[1].dataset_options == {"file": by_split}
    assert only_problem(recipe(SCRATCH), "--dataset_options.folder", "./none")[0] == "dataset_options.folder"


def test_a_smoke_test_needs_neither_data_nor_weights_nor_variables(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"dataset_options": {"file": "/nowhere/x.json", "image_root": "${MMC_UNSET}/images"}, "bf16": True}
    backbones = {"vision_model": "/nowhere/clip", "text_model": "/nowhere/gpt2", "text_model_type": "gpt2"}
    path = recipe(yaml.safe_dump(backbones | options))
    run = parse_recipe([path, "--smoke_test"])[-1]
    assert run.smoke_test and not run.bf16
    assert {"vision_model", "text_model", "dataset_options.file"} < {key for key, _, _ in problems(path)}
    assert only_problem(path, "--smoke_test", "--seed", "x")[0] == "seed"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, which bf16 trains on")
def test_bf16_trains_on_a_cpu_where_there_is_nothing_else(recipe):
    run = parse_recipe([recipe("vision_model: a/b\ntext_model: c/d\nbf16: true")])[-1]
    assert run.bf16 and run.device.type == "cpu"


def test_an_original_recipe_is_translated(coconut, tmp_path):
    model, data, curriculum, run = parse_recipe([coconut()])
    assert (model.text_model, model.model, model.new_token_init) == ("openai-community/gpt2", None, "<<")
    assert model.vision_model == "openai/clip-vit-base-patch32"
    files = {"train": str(tmp_path / "gsm_train.json"), "validation": str(tmp_path / "gsm_valid.json")}
    assert (data.dataset, data.dataset_options) == ("json_steps", {"file": files, "images_required": False})
    assert (data.max_new_tokens, data.max_train_samples) == (64, None)
    assert (curriculum.mode, curriculum.c_thought, curriculum.epochs_per_stage) == ("coconut", 2, 3)
    assert (curriculum.start_epoch, curriculum.reset_optimizer, curriculum.pad_latent_to_max) == (3, True, True)
    assert (run.num_train_epochs, run.per_device_train_batch_size, run.learning_rate) == (22, 32, 1e-4)
    assert (run.output_dir, run.run_name, run.project) == ("runs/gsm-coconut", "gsm-coconut", "coconut")
    assert (run.weight_decay, run.seed, run.bf16, run.do_train, run.debug) == (0.01, 0, False, True, [])
    assert (run.save_strategy.value, run.eval_strategy.value, run.max_grad_norm) == ("epoch", "epoch", 0.0)
    assert run.lr_scheduler_type.value == "constant"


def test_the_vision_tower_taken_for_an_original_recipe_is_said(monkeypatch):
    said = []
    monkeypatch.setattr("mmcoconut.arguments.coconut_recipes.logger.warning", said.append)
    translate_coconut_keys({"model_id": "gpt2", "clip_id": "a/b"})
    assert said == []
    translate_coconut_keys({"model_id": "gpt2"})
    assert "openai/clip-vit-base-patch32" in said[0]


@pytest.mark.parametrize("mode", ["coconut", "cot", "no_thoughts", "no_cot"])
def test_the_original_mode_is_the_flag_that_is_true(coconut, mode):
    flags = {key: key == mode for key in ("coconut", "cot", "no_thoughts", "no_cot")}
    assert parse_recipe([coconut(**flags)])[2].mode == mode


def test_an_original_recipe_has_exactly_one_mode(coconut):
    assert only_problem(coconut(coconut=False))[0] == "coconut"
    assert only_problem(coconut(cot=True)) == ("cot", "cot", "`mode` is set too: keep one of them")


def test_original_flags_are_translated():
    base = {"model_id": "gpt2", "coconut": True, "val_path": "data/prosqa_valid.json"}
    assert translate_coconut_keys(base)["max_new_tokens"] == 128
    new = translate_coconut_keys(base | {"only_eval": True, "debug": True, "save_only_improve": True})
    assert (new["do_train"], new["do_eval"]) == (False, True)
    assert (new["max_train_samples"], new["max_eval_samples"]) == (32, 32)
    assert new["save_strategy"] == "no"
    assert "debug" not in new
    assert translate_coconut_keys(base | {"debug": "underflow_overflow"})["debug"] == "underflow_overflow"


def test_the_multimodal_keys_are_translated():
    for key in ("clip_id", "vision_model_id"):
        new = translate_coconut_keys({"model_id": "gpt2", key: "a/b", "train_path": "x", "image_root": "images"})
        assert (new["vision_model"], new["text_model"]) == ("a/b", "gpt2")
        assert new["dataset_options"] == {"file": {"train": "x"}, "image_root": "images"}


def test_an_original_checkpoint_replaces_the_backbones(coconut):
    model = parse_recipe([coconut(load_model_path="user/gsm-cot", clip_id="a/b")])[0]
    assert (model.model, model.text_model, model.vision_model) == ("user/gsm-cot", None, None)


def test_a_new_recipe_is_not_translated():
    values = {"text_model": "gpt2", "project": "x", "debug": "underflow_overflow", "c_thought": 2}
    assert translate_coconut_keys(values) == values


def test_an_old_key_alone_does_not_bring_the_habits_of_the_original():
    assert translate_coconut_keys({"text_model": "gpt2", "lr": 1e-4}) == {"text_model": "gpt2", "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("lr", "learning_rate", 1e-3),
        ("num_epochs", "num_train_epochs", 2),
        ("train_path", "dataset_options", {"file": {}}),
        ("save_only_improve", "save_strategy", "steps"),
        ("model_id", "text_model", "gpt2"),
    ],
)
def test_an_old_key_beside_its_new_name_is_refused(coconut, old, new, value):
    (key, _, remedy), *_ = problems(coconut(**{new: value}))
    assert remedy == f"`{new}` is set too: keep one of them"
    assert key in (old, "val_path")


def test_two_old_keys_of_one_meaning_are_refused():
    with pytest.raises(RecipeError, match="`vision_model` is set too"):
        translate_coconut_keys({"clip_id": "a", "vision_model_id": "b"})


def test_epochs_of_an_original_recipe_are_numbers(coconut):
    assert only_problem(coconut(resume="later")) == ("resume", "later", "expected int")
    assert only_problem(coconut(resume=30))[:2] == ("num_train_epochs", -5)


def test_the_command_line_wins_over_an_original_recipe_in_both_spellings(coconut, monkeypatch):
    monkeypatch.setenv("MMC_EPOCHS", "9")
    words = ["--lr", "1e-2", "--num_epochs", "10", "--max_new_tokens", "7"]
    _, data, _, run = parse_recipe([coconut(), *words, "--dataset_options.images_required", "true"])
    assert (run.learning_rate, run.num_train_epochs, data.max_new_tokens) == (1e-2, 7, 7)
    assert data.dataset_options["images_required"] is True
    run = parse_recipe([coconut(num_epochs="${MMC_EPOCHS}"), "--learning_rate", "1e-2"])[-1]
    assert (run.learning_rate, run.num_train_epochs) == (1e-2, 6)
    assert parse_recipe([coconut(), "--mode", "pause"])[2].mode == "pause"


def test_a_recipe_takes_from_its_base_what_it_does_not_say(recipe):
    recipe(
        f"{SCRATCH}\nseed: 1\nlearning_rate: 1e-3\nc_thought: 2\ndataset_options: {{num_rows: 8, seed: 3}}", "a.yaml"
    )
    recipe("base: a.yaml\nseed: 2\nc_thought: 4\ndataset_options: {noise: {level: 1, kind: x}}", "b.yaml")
    path = recipe(
        "base: b.yaml\nc_thought: 5\ndataset_options: {seed: 4, noise: {level: 2}}\nvision_config: {hidden_size: 8}"
    )
    model, data, curriculum, run = parse_recipe([path, "--weight_decay", "0.5"])
    assert (curriculum.c_thought, run.seed, run.learning_rate, run.weight_decay) == (5, 2, 1e-3, 0.5)
    assert data.dataset_options == {"num_rows": 8, "seed": 4, "noise": {"level": 2, "kind": "x"}}
    assert model.vision_config == {"model_type": "clip_vision_model", "hidden_size": 8}
    assert run.output_dir == "outputs/maze"
    assert parse_recipe([path, "--c_thought", "6", "--dataset_options.seed", "7"])[2].c_thought == 6


def test_a_null_takes_an_inherited_value_away(recipe):
    options = "dataset_options: {num_rows: 8, noise: {level: 1, kind: x}}"
    recipe(f"{SCRATCH}\nc_thought: 2\nnew_token_init: a\n{options}", "a.yaml")
    path = recipe(
        "base: a.yaml\nc_thought: null\nnew_token_init:\ndataset_options: {num_rows: null, noise: {kind: null}}"
    )
    model, data, curriculum, _ = parse_recipe([path])
    assert (curriculum.c_thought, model.new_token_init) == (1, None)
    assert data.dataset_options == {"noise": {"level": 1}}
    assert only_problem(recipe("base: a.yaml\nc_thought: 1\nmax_new_tokens: null"))[0] == "max_new_tokens"


def test_a_mapping_and_a_plain_value_replace_each_other(recipe):
    recipe(f"{SCRATCH}\ndataset_options: {{rows: 8, names: {{a: 1}}}}", "a.yaml")
    options = parse_recipe([recipe("base: a.yaml\ndataset_options: {rows: {train: 1}, names: b}")])[1].dataset_options
    assert options == {"rows": {"train": 1}, "names": "b"}


def test_a_base_is_found_from_the_folder_of_the_recipe_that_names_it(recipe, tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    recipe(f"{SCRATCH}\nseed: 5", "a.yaml")
    recipe("base: ../${MMC_BASE:-none}.yaml", "deep/b.yaml")
    path = recipe(f"base: {tmp_path}/deep/b.yaml", "deep/er/c.yaml")
    monkeypatch.setenv("MMC_BASE", "a")
    monkeypatch.chdir(tmp_path / "deep")
    assert parse_recipe([path])[-1].seed == 5
    assert parse_recipe(["er/c.yaml"])[-1].seed == 5
    monkeypatch.delenv("MMC_BASE")
    assert "none.yaml" in only_problem(path)[1]


def test_a_base_that_cannot_be_read_is_refused_with_the_files_that_lead_to_it(recipe, tmp_path):
    def found(text: str) -> tuple:
        recipe(text, "b.yaml")
        return only_problem(recipe("base: b.yaml", "c.yaml"))

    b, c = tmp_path / "b.yaml", tmp_path / "c.yaml"
    for text, value, words in (
        (
            "base: a.yaml",
            str(tmp_path / "a.yaml"),
            "no such file: a path starts at the recipe's own folder; `mmcoconut recipes` lists the names",
        ),
        ("just text", "just text", "expected lines of `key: value`"),
        ("a: [1", str(b), "not YAML"),
        ("base: [x]", ["x"], "expected the path of one recipe"),
        ("base: ${MMC_UNSET}", "${MMC_UNSET}", "set the environment variable MMC_UNSET"),
        ("base: ../" + tmp_path.name + "/c.yaml", "../" + tmp_path.name + "/c.yaml", "cannot be a base of itself"),
    ):
        key, said, remedy = found(text)
        assert (key, said) == ("base", value) and words in remedy
        assert f"the files: {c} → {b}" in remedy
    assert str(tmp_path / "a.yaml") in found("base: a.yaml")[2]
    assert only_problem(recipe("base: c.yaml", "c.yaml"))[2].endswith(f"{c} → {c}")


def test_a_problem_names_the_base_that_its_value_comes_from(recipe, tmp_path):
    base = tmp_path / "a.yaml"
    recipe(f"{SCRATCH}\nseed: three\nc_thought: -1\nlerning_rate: 1\nmode: cot\nmode: no_cot", "a.yaml")
    found = problems(recipe("base: a.yaml\nuniform_prob: 2\nmax_latent_stage: 0"), "--c_thought", "-2")
    remedies = {key: remedy for key, _, remedy in found}
    assert remedies["seed"] == f"expected int; `seed` is set in {base}"
    assert remedies["lerning_rate"].endswith(f"`lerning_rate` is set in {base}")
    assert (remedies["uniform_prob"], remedies["c_thought"]) == (
        "must lie between 0 and 1",
        "must lie between 0 and inf",
    )
    assert ("mode", f"line 11 of {base}") in [problem[:2] for problem in found]


def test_a_problem_inside_a_mapping_names_the_files_that_fill_it(recipe, tmp_path):
    recipe(SCRATCH.replace("layer_norm_epsilon", "layer_norm_epsilom"), "a.yaml")
    path = recipe("base: a.yaml\ntext_config: {n_hed: 2}")
    (_, _, far), (_, _, near) = problems(path)
    assert f"{tmp_path}/a.yaml" in far and "is set in" not in near
    recipe(f"{SCRATCH}\ndataset_options: {{names: ['${{MMC_UNSET}}']}}", "a.yaml")
    key, _, remedy = only_problem(recipe("base: a.yaml"))
    assert key == "dataset_options.names.0" and remedy.endswith(f"is set in {tmp_path}/a.yaml")
    recipe(f"{SCRATCH}\ndataset_options: {{file: {{train: ./none.json}}}}", "a.yaml")
    path = recipe("base: a.yaml\ndataset_options: {file: {validation: ./neither.json}}")
    assert all(f"set in {tmp_path}/a.yaml, {path}" in remedy for _, _, remedy in problems(path))
    (tmp_path / "here.json").write_text("[]")
    found = problems(path, "--dataset_options.file", f"{{train: ./x.json, validation: {tmp_path}/here.json}}")
    assert found == [
        ("dataset_options.file", "./x.json", "no such file or folder: a relative path starts where you run this")
    ]


def test_two_keys_that_exclude_each_other_name_the_base_that_sets_one(recipe, tmp_path):
    recipe(SCRATCH, "a.yaml")
    assert only_problem(recipe("base: a.yaml\nvision_model: b/c")) == (
        "vision_model",
        "b/c",
        f"`vision_config` is set too: keep one; `vision_config` is set in {tmp_path}/a.yaml",
    )
    assert parse_recipe([recipe("base: a.yaml\nvision_model: b/c\nvision_config: null")])[0].vision_config is None


def test_a_base_in_the_keys_of_the_original_is_translated_with_the_recipe(coconut, recipe, tmp_path):
    base = coconut(num_epochs=10)
    path = recipe("base: gsm_coconut.yaml\ncoconut: false\ncot: true\nlr: 1e-2\nc_thought: 3\nresume: 0")
    _, data, curriculum, run = parse_recipe([path])
    assert (curriculum.mode, curriculum.c_thought, run.learning_rate, run.num_train_epochs) == ("cot", 3, 1e-2, 10)
    assert data.dataset_options["file"]["train"] == str(tmp_path / "gsm_train.json")
    note = f"is set in {base}"
    key, value, remedy = only_problem(recipe("base: gsm_coconut.yaml\nlearning_rate: 1e-2"))
    assert (key, value, remedy) == ("lr", 1e-4, f"`learning_rate` is set too: keep one of them; `lr` {note}")
    assert only_problem(recipe("base: gsm_coconut.yaml\ncot: true"))[2].endswith(f"keep one of them; `mode` {note}")
    assert only_problem(recipe("base: gsm_coconut.yaml\ncoconut: false"))[2].endswith("to true")
    found = only_problem(recipe("base: gsm_coconut.yaml\nresume: 11"))
    assert found[:2] == ("num_train_epochs", -1) and found[2].endswith(f"`num_train_epochs` {note}")
    coconut(train_path="./none.json")
    path = recipe(f"base: gsm_coconut.yaml\nval_path: {tmp_path}/gsm_train.json")
    assert f"set in {base}, {path}" in only_problem(path)[2]
    coconut()
    found = only_problem(recipe("base: gsm_coconut.yaml"), "--lr", "-1")
    assert found == ("learning_rate", -1, "must lie between 0 and inf")


def test_a_saved_recipe_needs_no_base(recipe, tmp_path):
    recipe(f"{SCRATCH}\nlearning_rate: 1e-3\ndataset_options: {{seed: 3}}", "a.yaml")
    arguments = parse_recipe([recipe("base: a.yaml\ndataset_options: {num_rows: 4}")])
    save_recipe(tmp_path / "run" / "recipe.yaml", *arguments)
    (tmp_path / "a.yaml").unlink()
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert "base" not in saved and saved["dataset_options"] == {"seed": 3, "num_rows": 4}
    assert parse_recipe([str(tmp_path / "run" / "recipe.yaml")]) == arguments


def test_evaluation_reads_a_recipe_with_its_base(recipe, tmp_path):
    recipe("dataset: json_steps\nmax_new_tokens: 9\ndataset_options: {image_root: x}", "a.yaml")
    values = read_recipe(recipe("base: a.yaml\ndataset_options: {file: y}"))
    assert values == {
        "dataset": "json_steps",
        "max_new_tokens": 9,
        "dataset_options": {"image_root": "x", "file": "y"},
    }
    recipe("max_new_tokens: 0", "a.yaml")
    with pytest.raises(RecipeError, match=f"`max_new_tokens` is set in {tmp_path}/a.yaml"):
        read_recipe(recipe("base: a.yaml"))


def test_a_base_stands_in_a_file(recipe):
    assert only_problem(recipe(SCRATCH), "--base", "a.yaml") == (
        "base",
        "a.yaml",
        "a base belongs in a recipe: remove it from the command line",
    )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_saved_recipe_gives_the_same_arguments(recipe, tmp_path):
    words = ["--epochs_per_stage", "2", "1", "--freeze", "vision_tower", "--new_token_init", "1e5", "--lr", "1e-5"]
    words += ["--eval_strategy", "steps", "--eval_steps", "10", "--save_strategy", "best", "--logging_steps", "5"]
    words += ["--metric_for_best_model", "accuracy", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.1"]
    words += ["--gradient_checkpointing", "--gradient_checkpointing_kwargs.use_reentrant", "false"]
    words += ["--debug", "underflow_overflow", "--report_to", "tensorboard", "--dataset_options.num_rows.train", "3"]
    words += ["--accelerator_config.even_batches", "false", "--run_name", "no"]
    arguments = parse_recipe([recipe(SCRATCH), *words])
    save_recipe(tmp_path / "run" / "recipe.yaml", *arguments)
    assert parse_recipe([str(tmp_path / "run" / "recipe.yaml")]) == arguments


@pytest.mark.parametrize("key", ["overwrite", "resume_from_checkpoint"])
def test_a_saved_recipe_does_not_delete_or_resume_the_run_it_came_from(key, recipe, tmp_path):
    words = [f"--{key}", "true"]
    save_recipe(tmp_path / "recipe.yaml", *parse_recipe([recipe(SCRATCH), *words]))
    run = parse_recipe([str(tmp_path / "recipe.yaml")])[3]
    assert (run.overwrite, run.resume_from_checkpoint) == (False, None)


def test_a_saved_recipe_is_one_run_of_a_comparison(recipe, tmp_path):
    words = ["--compare", "cot,coconut", "--seeds", "2"]
    save_recipe(tmp_path / "recipe.yaml", *parse_recipe([recipe(SCRATCH), *words]))
    run = parse_recipe([str(tmp_path / "recipe.yaml")])[3]
    assert (run.compare, run.seeds) == (None, 1)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_number_of_a_recipe_has_limits(path):
    values = read_recipe_file(str(path)).values
    numbers = {key for key, value in values.items() if type(value) in (int, float)}
    assert numbers and not numbers - LIMITS.keys()


def test_the_internvl_recipes_differ_where_they_say_so():
    def settings(name: str) -> dict:
        parts = parse_recipe([str(RECIPES / f"internvl3_{name}.yaml"), "--smoke_test", "--bf16", "false"])
        fields = {key: value for part in parts[:3] for key, value in vars(part).items()}
        run = ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "num_train_epochs", "do_train")
        return fields | {key: getattr(parts[3], key) for key in (*run, "gradient_accumulation_steps")}

    whole = settings("coconut")
    stages = {"c_thought": 2, "max_latent_stage": 4, "epochs_per_stage": 5, "uniform_prob": 0.1}
    updates = {"learning_rate": 1e-5, "weight_decay": 0.01, "warmup_steps": 1000, "max_grad_norm": 1.0}
    assert whole | stages | updates == whole
    place = {"vlm", "model", "max_tiles"}
    few = {"max_train_samples", "max_eval_samples", "max_new_tokens", "max_tiles", "gradient_accumulation_steps"}
    for name, changed in (
        ("cot", {"mode", "num_train_epochs"}),
        ("coconut_from_cot", place | {"start_epoch", "num_train_epochs"}),
        ("eval", place | {"dataset_options", "eval_split", "do_train"}),
        ("debug", few | {"c_thought", "max_latent_stage", "epochs_per_stage", "num_train_epochs", "warmup_steps"}),
    ):
        variant = settings(name)
        assert {key for key in whole if whole[key] != variant[key]} == changed, name
    assert settings("coconut_from_cot")["start_epoch"] == settings("cot")["num_train_epochs"] == 5


def test_the_fewest_tiles_are_no_more_than_the_most(recipe):
    values = "vlm: a/b\nuse_cpu: true\nmin_tiles: 3\nmax_tiles: "
    assert only_problem(recipe(f"{values}2"))[:2] == ("min_tiles", 3)
    assert parse_recipe([recipe(f"{values}3")])[0].max_tiles == 3


def test_help_names_every_field_of_ours(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{field.name}:" in printed for cls in CLASSES[:-1] for field in dataclasses.fields(cls))
    assert "--overwrite:" in printed and "base: other.yaml" in printed


def test_a_saved_original_recipe_gives_the_same_arguments(coconut, tmp_path):
    arguments = parse_recipe([coconut()])
    save_recipe(tmp_path / "recipe.yaml", *arguments)
    assert parse_recipe([str(tmp_path / "recipe.yaml")]) == arguments


def test_a_saved_recipe_holds_all_of_ours_and_what_is_not_default_of_the_rest(recipe, tmp_path):
    arguments = parse_recipe([recipe(SCRATCH), "--learning_rate", "1e-3"])
    save_recipe(tmp_path / "recipe.yaml", *arguments)
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    ours = {field.name for cls in CLASSES[:-1] for field in dataclasses.fields(cls)}
    assert ours < saved.keys()
    rest = {key: saved[key] for key in saved.keys() - ours}
    on_cpu = {"use_cpu": True, "dataloader_pin_memory": False}
    assert rest == {"output_dir": "outputs/maze", "learning_rate": 1e-3, **on_cpu}


def test_the_hub_token_is_neither_saved_nor_printed(recipe, tmp_path):
    arguments = parse_recipe([recipe(SCRATCH), "--hub_token", "hf_secret"])
    save_recipe(tmp_path / "recipe.yaml", *arguments)
    assert arguments[-1].hub_token == "hf_secret"
    assert "hf_secret" not in (tmp_path / "recipe.yaml").read_text() + repr(arguments[-1])
    assert isinstance(arguments[-1], RunArguments)


def test_a_command_says_what_is_wrong_in_lines_without_a_traceback(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: parse_recipe([recipe(SCRATCH), "--c_thougth", "2"]))
    assert "did you mean `c_thought`" in capsys.readouterr().err
    assert ended.value.code == 2 and ended.value.__cause__ is None
    assert ended.value.__suppress_context__
