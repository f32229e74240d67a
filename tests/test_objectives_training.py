"""Objectives in training: what a run minimises, logs, saves and resumes with them, and what stays as it was."""

import copy
import json
import shutil
from pathlib import Path

import guess
import pytest
import torch
from guess import Guess
from safetensors.torch import load_file
from test_objectives import row_of
from test_train import TINY, losses
from test_vlm_calls import thinking_pair
from tiny import tiny_model, tiny_processor, tiny_seq2seq
from torch.utils._pytree import tree_flatten, tree_unflatten

import train_hf
from mmcoconut.arguments.recipes import parse_recipe
from mmcoconut.data import Example, to_dataset
from mmcoconut.errors import RecipeError, UsageError, run_command
from mmcoconut.hub.uploads import copy_model
from mmcoconut.models import load_model
from mmcoconut.objectives.attach import INPUTS, LOSSES, Objectives, attach, attached_to, load_weights, own_weights
from mmcoconut.objectives.registry import make_objective, make_objectives
from mmcoconut.objectives.step_decoder import StepDecoder
from mmcoconut.objectives.step_tokens import StepTokens
from mmcoconut.training.collator import CurriculumCollator
from mmcoconut.training.curriculum import Curriculum
from mmcoconut.training.gradient_cosines import GradientCosines
from mmcoconut.training.row_checks import check_lengths, check_objectives
from mmcoconut.training.sharing import check_not_replicated, check_sharded_objectives


OWN = "--objectives.guess:Guess"
TWO = ["--objectives.step_tokens", "0.5", OWN, "0.3"]
EVERY = [
    "--objectives",
    json.dumps({"step_tokens": 0.5, "step_decoder": 1, "self_distillation": 0.7, "guess:Guess": 0.3}),
]
ALIGNED = ["--objectives.image_alignment.weight", "0.5", "--objectives.image_alignment.latents_read"]
SHORT = ["--num_train_epochs", "2", "--max_latent_stage", "1"]
RESUMED = ["--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipe of all runs here."""
    made = tmp_path_factory.mktemp("objectives")
    (made / "tiny.yaml").write_text(TINY)
    return made


def run(folder: Path, name: str, *options: str) -> dict:
    return train_hf.main([str(folder / "tiny.yaml"), "--output_dir", str(folder / name), *SHORT, *options])


@pytest.fixture(scope="module")
def plain(folder):
    """A run without objectives."""
    run(folder, "plain")
    return folder / "plain"


@pytest.fixture(scope="module")
def both(folder):
    """A run with two objectives, one of which has weights, of 12 updates, and its results."""
    results = run(folder, "both", *TWO, "--save_strategy", "steps", "--save_steps", "4")
    return folder / "both", results


def history(folder: Path) -> list[dict]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def figures(folder: Path) -> list[dict]:
    """The log without what differs from launch to launch."""
    return [{name: value for name, value in record.items() if "_per_second" not in name and "runtime" not in name}
            for record in history(folder)]  # fmt: skip


def assert_equal_weights(one: Path, other: Path) -> None:
    weights, others = load_file(one), load_file(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def assert_equal_runs(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    assert_equal_weights(one / "model.safetensors", other / "model.safetensors")


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("weight", ["0", "[0, 0.0]"])
def test_weight_0_equals_the_run_without_to_the_bit(weight, folder, plain):
    name = f"weight {weight}"
    results = run(folder, name, "--objectives.step_tokens", weight, OWN, weight)
    assert_equal_runs(folder / name, plain)
    assert "objective_parameters" not in results


def test_a_term_begins_with_the_stage_that_gives_it_a_weight(folder, plain):
    run(folder, "later", OWN, "[0, 1.0]", "--objectives.step_tokens", "0")
    assert [losses(folder / "later")[step] for step in range(1, 7)] == [losses(plain)[step] for step in range(1, 7)]
    records = [record for record in history(folder / "later") if "loss" in record]
    assert ["guess_loss" in record for record in records] == [record["stage"] == 1 for record in records]
    assert len(records) == 12 and all("ce_loss" in record for record in records)
    assert not any("step_tokens_loss" in record for record in records)  # of weight 0 at all stages


def test_all_terms_are_logged_and_add_up_in_training_evaluation_and_results(both):
    _, results = both
    records = [record for record in history(both[0]) if "loss" in record]
    rows = [record for record in history(both[0]) if "eval_loss" in record]
    rows = [{name.removeprefix("eval_"): value for name, value in row.items()} for row in rows]
    assert len(records) == 12 and len(rows) == 2
    for record in [*records, *rows, *results["stages"]]:
        expected = record["ce_loss"] + 0.5 * record["step_tokens_loss"] + 0.3 * record["guess_loss"]
        assert record["loss"] == pytest.approx(expected, abs=1e-3)
    assert [record["step_tokens_loss"] > 0 for record in rows] == [False, True]  # there are no latents at stage 0
    assert all(record["guess_loss"] > 0 for record in rows)


def test_an_objective_trains_its_weights_and_the_models(both, plain):
    trained = load_file(both[0] / "objectives" / "guess.safetensors")
    begun = Guess()
    begun.build(load_model(str(plain)))
    assert trained.keys() == begun.state_dict().keys()
    assert not torch.equal(trained["layer.weight"], begun.layer.weight)
    weights, others = load_file(both[0] / "model.safetensors"), load_file(plain / "model.safetensors")
    assert not all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_no_saved_model_holds_objectives_and_a_checkpoint_has_them_beside_it(both, plain, tmp_path):
    folder, results = both
    plain_names = load_file(plain / "model.safetensors").keys()
    saved = [folder, folder / "stages" / "stage-0", folder / "stages" / "stage-1", *folder.glob("checkpoint-*")]
    assert len(saved) == 7  # 4, 6, 8, 12
    for place in saved:
        assert load_file(place / "model.safetensors").keys() == plain_names
        assert (place / "objectives.safetensors").exists() == place.name.startswith("checkpoint-")
        assert (place / "objectives").exists() == (place == folder)
    names = {f"guess.layer.{kind}" for kind in ("weight", "bias")}
    assert load_file(folder / "checkpoint-12" / "objectives.safetensors").keys() == names
    assert json.loads((folder / "objectives" / "guess.json").read_text()) == {"gives": False}
    assert sorted(path.name for path in (folder / "objectives").iterdir()) == ["guess.json", "guess.safetensors"]
    assert results["objective_parameters"] == 16 * 17
    assert results["parameters"] == sum(weight.numel() for weight in load_model(str(folder)).parameters())
    for place in (folder, folder / "checkpoint-12"):
        copy_model(place, tmp_path / place.name)
        published = sorted(str(path.relative_to(tmp_path / place.name)) for path in (tmp_path / place.name).rglob("*"))
        assert "model.safetensors" in published and not any("objectives" in name for name in published)


def test_accumulated_batches_equal_one(folder, both):
    run(folder, "halves", *TWO, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    names = ("loss", "ce_loss", "step_tokens_loss", "guess_loss", "eval_loss", "eval_guess_loss")
    records = [[{name: record[name] for name in names if name in record} for record in history(place)]
               for place in (folder / "halves", both[0])]  # fmt: skip
    for record, other in zip(*([record for record in some if record] for some in records), strict=True):
        assert record == pytest.approx(other, abs=2e-4)


@pytest.mark.slow
def test_checkpointed_layers_change_nothing(folder, both):
    run(folder, "checkpointed", *TWO, "--log_gradient_cosine", "--activation_checkpointing")
    assert losses(folder / "checkpointed") == pytest.approx(losses(both[0]), abs=1e-5)


def test_comparing_gradients_changes_nothing_to_the_bit(folder, both):
    run(folder, "compared", *TWO, "--log_gradient_cosine", "--logging_steps", "3")
    assert_equal_weights(folder / "compared" / "model.safetensors", both[0] / "model.safetensors")
    records = {record["step"]: record for record in history(folder / "compared") if "loss" in record}
    assert [*records] == [3, 6, 9, 12]
    assert ["cosine_step_tokens" in record for record in records.values()] == [False, False, True, True]
    for record in records.values():
        assert abs(record["cosine_guess"]) <= 1 and record["cosine_guess"] != 0


@pytest.mark.parametrize("cut", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_run_ends_as_the_one_that_was_never_stopped(cut, folder, both):
    stopped = folder / f"stopped {cut}"
    for name in ("checkpoint-4", "checkpoint-8"):
        shutil.copytree(both[0] / name, stopped / name)
    shutil.copy(both[0] / "recipe.yaml", stopped)
    if cut:  # the one before is taken
        (stopped / "checkpoint-8" / "objectives.safetensors").unlink()
    run(folder, stopped.name, *TWO, "--save_strategy", "steps", "--save_steps", "4", *RESUMED)
    assert_equal_runs(stopped, both[0])
    assert_equal_weights(stopped / "objectives" / "guess.safetensors", both[0] / "objectives" / "guess.safetensors")


def test_checkpoint_without_the_objectives_weights_or_with_others_is_refused(folder, both):
    trained = tiny_model()
    attached = attach(trained, [make_objective("guess:Guess", 1.0)], tiny_processor(trained))
    stopped = folder / "bare" / "checkpoint-4"
    shutil.copytree(both[0] / "checkpoint-4", stopped)
    options = [*TWO, "--save_strategy", "steps", "--save_steps", "4", *RESUMED]
    (stopped / "course.json").unlink()  # which would know that a file is missing
    (stopped / "objectives.safetensors").unlink()
    with pytest.raises(ValueError, match="no readable objectives.safetensors, but step_tokens, guess have 2"):
        run(folder, "bare", *options)
    with pytest.raises(
        ValueError, match="differ in 2, such as guess.layer.weight: set `objectives` as when the run was"
    ):
        load_weights(attached, both[0] / "checkpoint-4")  # of a model with other sizes


@pytest.mark.parametrize(
    "options",
    [["--objectives.step_tokens", "0.4", OWN, "0.3"], [OWN, "0.3"], []],
)
def test_run_with_other_objectives_is_not_resumed(options, folder, both):
    stopped = folder / "other"
    shutil.rmtree(stopped, ignore_errors=True)
    shutil.copytree(both[0] / "checkpoint-4", stopped / "checkpoint-4")
    with pytest.raises(ValueError, match=r"objectives.*0\.5.* in the checkpoint, .* now"):
        run(folder, "other", *options, "--save_strategy", "steps", "--save_steps", "4", *RESUMED)


@pytest.mark.slow
@pytest.mark.parametrize("read, adapted", [("state", False), ("target", False), ("state", True)])
def test_a_run_with_every_objective_resumes_and_leaves_the_decoder_of_steps(read, adapted, folder):
    every = [*EVERY, *ALIGNED, read, "--log_gradient_cosine", "--save_strategy", "steps", "--save_steps", "4"]
    if read == "target":  # of which nothing reaches a model by the decoder of steps
        every += ["--objectives.step_decoder", "[1, 0]", "--objectives.image_alignment.weight", "[0, 0.5]"]
    if adapted:
        pytest.importorskip("peft")
        every += ["--lora.r", "4"]
    whole, stopped = folder / f"every {read} {adapted}", folder / f"every {read} {adapted} stopped"
    results = run(folder, whole.name, *every)
    names = ["step_tokens", "self_distillation", "guess", "image_alignment", *["step_decoder"] * (read == "state")]
    assert {f"{name}_loss" for name in names} < results["stages"][-1].keys()
    latest = [record for record in history(whole) if "loss" in record][-1]
    assert all(latest[f"{name}_loss"] > 0 for name in names)
    assert all(abs(latest[f"cosine_{name}"]) > 0 for name in names)
    shutil.copytree(whole / "checkpoint-8", stopped / "checkpoint-8")
    run(folder, stopped.name, *every, *RESUMED)
    assert_equal_runs(stopped, whole)
    files = sorted(path.name for path in (whole / "objectives").iterdir())
    assert files == ["guess.json", "guess.safetensors", "step_decoder.json", "step_decoder.safetensors"]
    assert StepDecoder.load(whole / "objectives").width == 16


@pytest.mark.slow
def test_run_may_begin_to_compare_gradients_when_it_is_resumed(folder, both):
    stopped = folder / "compares"
    shutil.copytree(both[0] / "checkpoint-8", stopped / "checkpoint-8")
    options = ["--save_strategy", "steps", "--save_steps", "4", "--log_gradient_cosine", *RESUMED]
    run(folder, "compares", *TWO, *options)
    assert losses(stopped) == losses(both[0])


@pytest.mark.slow
def test_adapters_are_trained_saved_and_resumed_beside_objectives(folder):
    pytest.importorskip("peft")
    lora = [*TWO, "--lora.r", "4", "--save_strategy", "steps", "--save_steps", "4"]
    results = run(folder, "lora", *lora)
    whole, stopped = folder / "lora", folder / "lora stopped"
    adapter = load_file(whole / "checkpoint-8" / "adapter_model.safetensors")
    for names in (
        adapter,
        load_file(whole / "model.safetensors"),
        load_file(whole / "adapter" / "adapter_model.safetensors"),
    ):
        assert names and not any("guess" in name or "objectives" in name for name in names)
    assert results["objective_parameters"] == 16 * 17
    model = load_model(str(whole))
    assert attached_to(model) is None
    shutil.copytree(whole / "checkpoint-8", stopped / "checkpoint-8")
    run(folder, stopped.name, *lora, *RESUMED)
    assert_equal_runs(stopped, whole)
    assert_equal_weights(stopped / "objectives" / "guess.safetensors", whole / "objectives" / "guess.safetensors")


@pytest.mark.slow
def test_a_run_in_bfloat16_computes_its_terms_in_bfloat16_too(folder, both):
    run(folder, "bf16", *TWO, "--bf16", "true", "--log_gradient_cosine")
    names = ("step_tokens_loss", "guess_loss")
    for record, other in zip(history(folder / "bf16"), history(both[0]), strict=True):
        if "loss" in record:
            assert {name: record[name] for name in names} == pytest.approx(
                {name: other[name] for name in names}, rel=0.05
            )


@pytest.mark.slow
def test_the_best_checkpoint_may_be_chosen_by_a_term_that_all_stages_have(folder):
    options = [OWN, "0.3", "--objectives.step_tokens", "[0, 1]"]
    run(folder, "best", *options, "--metric_for_best_model", "guess_loss")
    with pytest.raises(
        ValueError, match="'step_tokens_loss'. Choose one of accuracy, ce_loss, exact_match, generated"
    ):
        run(folder, "none", *options, "--metric_for_best_model", "step_tokens_loss")


def test_controls_without_latents_leave_objectives_out(folder, caplog):
    results = run(folder, "no_cot", *TWO, "--mode", "no_cot", "--num_train_epochs", "1")
    assert "step_tokens_loss" not in results["stages"][0] and "objective_parameters" not in results
    assert not list((folder / "no_cot").rglob("objectives*"))
    assert "`mode: no_cot`: " in caplog.text and "objectives: {'step_tokens': 0.5, 'guess:Guess': 0.3}" in caplog.text


# --- a model with objectives -----------------------------------------------------------------------------------------
def model_and_processor(family: str):
    if family == "seq2seq":
        model = tiny_seq2seq()
        return model, tiny_processor(model)
    if family == "qwen2_5_vl":
        return thinking_pair(family)
    model = tiny_model("gpt2", image_fusion="cross_attention") if family == "cross_attention" else tiny_model(family)
    return model, tiny_processor(model)


def some_rows() -> list[dict]:
    """Rows with and without a picture; of one step and of three."""
    rows = [row_of("a", answer="red or blue"), row_of("b", num_images=0), row_of("c", num_images=2)]
    return [{**row, "index": index, "steps": steps} for index, (row, steps) in enumerate(
        zip(rows, (["green"], ["red blue", "green", "blue"], ["red", "blue"])))]  # fmt: skip


def collator_of(processor, objectives=(), *, stage: int = 2, **curriculum) -> CurriculumCollator:
    collator = CurriculumCollator(Curriculum(c_thought=2, **curriculum), processor, objectives=objectives)
    collator.fixed_stage = stage
    return collator


FAMILIES = ("gpt2", "cross_attention", "seq2seq", "qwen2_5_vl")


@pytest.mark.whole_on_the_first("training")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_the_forward_gives_a_loss_a_row_and_the_rest_as_before(family, training):
    """Each row's losses do not depend on the other rows, and the answer's loss and gradients are what they were."""
    model, processor = model_and_processor(family)
    model = copy.deepcopy(model).train(training)  # thinking_pair's is shared
    collator = collator_of(processor)
    expected = model(**collator(some_rows()))
    collator.objectives = make_objectives({"step_tokens": 1.0, "guess:Guess": 1.0})
    attached = attach(model, collator.objectives, processor)
    batch = collator(some_rows())
    outputs = model(**batch)
    assert torch.equal(outputs.loss, expected.loss)
    assert not outputs.get("view")
    found = torch.stack([*outputs[LOSSES].values()])  # (2, B)
    assert [*outputs[LOSSES]] == ["step_tokens", "guess"] and found.shape == (2, 3) and (found > 0).all()
    for index, row in enumerate(some_rows()):
        alone = torch.stack([*model(**collator([row]))[LOSSES].values()])  # (2, 1)
        torch.testing.assert_close(alone[:, 0], found[:, index], atol=1e-5, rtol=1e-4)
    taken_apart, form = tree_flatten(outputs)  # as wrappers do
    assert torch.equal(torch.stack([*tree_unflatten(taken_apart, form)[LOSSES].values()]), found)
    found.sum().backward()
    assert attached["guess"].layer.weight.grad.abs().max() > 0
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.get_decoder().parameters())
    without = {name: value for name, value in batch.items() if name != INPUTS}
    assert LOSSES not in model(**without) and torch.equal(model(**without).loss, expected.loss)


def test_a_compiled_model_has_the_same_losses(fresh_compiler):
    model, processor = model_and_processor("gpt2")
    collator = collator_of(processor, make_objectives({"step_tokens": 1.0, "guess:Guess": 1.0}))
    attach(model, collator.objectives, processor)
    batch = collator(some_rows())
    expected, found = (each(**batch)[LOSSES] for each in (model, torch.compile(model, backend="eager")))
    assert expected.keys() == found.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)


def test_layers_that_are_recomputed_give_the_same_losses_and_gradients():
    found = []
    for recomputes in (False, True):
        model, processor = model_and_processor("gpt2")
        if recomputes:
            model.gradient_checkpointing_enable()
        collator = collator_of(processor, make_objectives({"step_tokens": 1.0, "guess:Guess": 1.0}))
        attach(model, collator.objectives, processor)
        losses = torch.stack([*model.train()(**collator(some_rows()))[LOSSES].values()])  # (2, B)
        losses.sum().backward()
        found.append((losses, [weight.grad for weight in model.parameters() if weight.grad is not None]))
    (losses, gradients), (again, others) = found
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close(others, gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_knows_the_step_of_each_latent_and_the_column_before_the_answer(family, monkeypatch):
    model, processor = model_and_processor(family)
    model, seen = copy.deepcopy(model), []
    monkeypatch.setattr(
        StepTokens, "loss", lambda self, view, inputs, run: seen.append(view) or view.after.sum((1, 2))
    )
    collator = collator_of(processor, make_objectives({"step_tokens": 1.0}))
    attach(model, collator.objectives, processor)
    batch = collator(some_rows())
    model(**batch)
    [view] = seen
    assert view.step.tolist() == [[0, 0, -1, -1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert view.place.tolist() == [[0, 1, 0, 1]] * 3
    assert view.mask.shape == view.step.shape and view.mask.all()
    ids = batch[processor.prompt_names[0]]
    for row, columns, column in zip(ids, view.columns, view.answer_column):
        assert (row[columns] == processor.latent_token_id).all()
        assert processor.tokenizer.decode(row[column]).strip().endswith("#")
        assert processor.tokenizer.decode(row[column + 1]).strip()[:1] == "r"  # "red", "red or blue"


def test_rows_that_cap_their_latents_by_their_steps_are_aligned_with_the_views_mask():
    _, processor = model_and_processor("gpt2")
    collator = collator_of(processor, make_objectives({"step_tokens": 1.0}), pad_latent_to_max=False)
    inputs = collator(some_rows())[INPUTS]
    assert inputs["steps"].tolist() == [[0, 0, -1, -1], [0, 0, 1, 1], [0, 0, 1, 1]]
    collator.fixed_stage = 0
    inputs = collator(some_rows())[INPUTS]
    assert inputs["steps"].shape == inputs["places"].shape == (3, 0)


def test_given_thoughts_are_read_in_training_alone(monkeypatch):
    model, processor = model_and_processor("gpt2")
    seen = []
    own = Guess.loss
    monkeypatch.setattr(Guess, "loss", lambda self, view, *args: seen.append(view.thoughts) or own(self, view, *args))
    collator = collator_of(processor, make_objectives({"guess:Guess": {"gives": True}}))
    attach(model, collator.objectives, processor)
    for training in (True, False):
        model.train(training)(**collator(some_rows()))
        assert bool(seen[-1].any()) != training
    other = type("Other", (Guess,), {"name": "other"})(gives=True)
    collator.objectives, model = [*collator.objectives, other], tiny_model()
    attach(model, collator.objectives, processor)
    with pytest.raises(ValueError, match="objectives guess, other each give the thoughts that latents read"):
        model.train()(**collator(some_rows()))


def test_a_copy_and_an_answer_know_nothing_of_objectives():
    model, processor = model_and_processor("gpt2")
    collator = collator_of(processor)
    prompts = collator.prompts(some_rows())
    prompts = {name: prompts[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    tokens = model.generate(**prompts, max_new_tokens=3, do_sample=False)
    names = [*model.state_dict()]
    attach(model, make_objectives({"guess:Guess": 1.0}), processor)
    assert [*model.state_dict()] != names
    assert torch.equal(model.generate(**prompts, max_new_tokens=3, do_sample=False), tokens)
    copied = copy.deepcopy(model)
    assert [*copied.state_dict()] == names and not len(attached_to(copied))
    assert torch.equal(copied.generate(**prompts, max_new_tokens=3, do_sample=False), tokens)


def test_building_objectives_draws_nothing_of_the_runs_numbers(monkeypatch):
    monkeypatch.setattr(Guess, "build", lambda self, model: setattr(self, "layer", torch.nn.Linear(2, 2)))
    model, processor = model_and_processor("gpt2")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    attach(model, [Guess()], processor)
    assert torch.equal(torch.rand(1), expected)


def test_a_loss_that_is_not_one_number_a_row_is_refused(monkeypatch):
    model, processor = model_and_processor("gpt2")
    monkeypatch.setattr(StepTokens, "loss", lambda self, view, inputs, run: view.after.sum())
    collator = collator_of(processor, make_objectives({"step_tokens": 1.0}))
    attach(model, collator.objectives, processor)
    with pytest.raises(
        ValueError, match=r"step_tokens returned a loss of shape \(\) for 3 rows: return one number per"
    ):
        model(**collator(some_rows()))


@pytest.mark.whole_on_the_first("adapted")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_objective_that_reads_images_in_the_text_needs_a_model_that_does(family, adapted):
    model, processor = model_and_processor(family)
    model, reads = copy.deepcopy(model), type("Reads", (Guess,), {"needs_images": True})()
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    if family in ("gpt2", "qwen2_5_vl"):
        attach(model, [reads], processor)
        return
    with pytest.raises(ValueError, match="objectives.guess reads image features in the text, but this MMCoconutFor"):
        attach(model, [reads], processor)


# --- gradients -------------------------------------------------------------------------------------------------------
class OneProcess:
    def reduce(self, tensor, reduction):
        return tensor


def test_the_cosine_is_that_of_an_updates_gradients_over_the_weights_of_the_model():
    """By hand: answer (1, 0) + (2, 0) = (3, 0), term (1, 1) + (0, 3) = (1, 4); cosine 3 / (3 √17)."""
    weight, own = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    cosines = GradientCosines([weight, frozen])
    vectors = [[(1.0, 0.0), (1.0, 1.0)], [(2.0, 0.0), (0.0, 3.0)]]
    for answer, term in vectors:
        answer, term = (torch.tensor(vector) @ weight for vector in (answer, term))
        cosines.add(4, answer, {"term": term + own.sum(), "no_gradient": torch.tensor(1.0)})
    assert cosines.cosines(OneProcess()) == pytest.approx({"term": 17**-0.5})
    assert cosines.cosines(OneProcess()) == {}
    assert weight.grad is None and own.grad is None
    cosines.add(4, weight[0], {"term": weight[1]})
    cosines.add(5, weight[0], {"term": -weight[0]})  # another update
    assert cosines.cosines(OneProcess()) == {"term": -1.0}


def test_the_logged_cosine_equals_one_of_two_backward_passes():
    model, processor = model_and_processor("gpt2")
    collator = collator_of(processor, make_objectives({"guess:Guess": 1.0}))
    attach(model, collator.objectives, processor)
    gradients, cosines = [], GradientCosines(own_weights(model))
    for part in ("answer", "guess"):
        model.zero_grad()
        outputs = model.train()(**collator(some_rows()))
        loss = outputs.loss if part == "answer" else outputs[LOSSES]["guess"].mean()
        loss.backward()
        found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in own_weights(model)]
        gradients.append(torch.cat([each.flatten() for each in found]))
    outputs = model(**collator(some_rows()))
    cosines.add(1, outputs.loss, {"guess": outputs[LOSSES]["guess"].mean()})
    expected = torch.cosine_similarity(*gradients, dim=0).item()
    assert 1e-3 < abs(expected) < 0.999
    assert cosines.cosines(OneProcess()) == {"guess": pytest.approx(expected, abs=1e-5)}


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, key, remedy",
    [
        (["--objectives.step_token", "1"], "objectives.step_token", "no such objective; did you mean 'step_tokens'?"),
        ([f"{OWN}.give", "1"], "objectives.guess:Guess.give", "no such option; did you mean 'gives'?"),
        ([OWN, "much"], "objectives.guess:Guess", "a weight is a finite number of at least 0"),
        ([OWN, "true"], "objectives.guess:Guess", "a weight is a finite number of at least 0"),
        ([f"{OWN}.weight", "[1, -1]"], "objectives.guess:Guess.weight", "a weight is a finite number of at least 0"),
        ([OWN, "[]"], "objectives.guess:Guess", "a weight is a finite number of at least 0, or a list"),
        (["--objectives.step_tokens.tokens", "all"], "objectives.step_tokens", "is not one of in_order, bag"),
        (["--objective", "distill_stops", *TWO], "objectives", "`objective: distill_stops` has no labelled answer"),
        (["--thoughts_per_turn", "2", *TWO], "objectives.guess:Guess", "with `thoughts_per_turn` no thought replaces"),
        ([*ALIGNED, "target", "--objectives.step_decoder", "1"], "objectives.step_decoder", "but it trains the mo"),
        ([*ALIGNED, "target", "--mode", "pause"], "objectives.image_alignment", "`mode: pause` feeds"),
        (["--log_gradient_cosine"], "log_gradient_cosine", "there are no `objectives` to compare"),
    ],
)  # fmt: skip
def test_recipe_with_objectives_that_cannot_be_is_refused(options, key, remedy, folder):
    with pytest.raises(RecipeError) as caught:
        parse_recipe([str(folder / "tiny.yaml"), *options])
    assert any(found == key and remedy in said for found, _, said in caught.value.problems), caught.value


def test_recipe_with_objectives_says_the_same_again(folder, both):
    again = parse_recipe([str(both[0] / "recipe.yaml")])[2].objectives
    assert again == {"step_tokens": 0.5, "guess:Guess": 0.3}


def test_weights_of_objectives_are_not_sharded():
    model, processor = model_and_processor("gpt2")
    attached = attach(model, make_objectives({"step_tokens": 1.0}), processor)
    check_sharded_objectives(attached, compares_gradients=False)
    check_sharded_objectives(None, compares_gradients=True)
    with pytest.raises(ValueError, match="`log_gradient_cosine` needs whole gradients, which FSDP shards: use DDP"):
        check_sharded_objectives(attached, compares_gradients=True)
    for name, message in (
        ("step_decoder", "has weights of its own"),
        ("guess:Guess", "runs further forward passes"),
    ):
        attached = attach(tiny_model(), make_objectives({name: 1.0}), processor)
        with pytest.raises(ValueError, match=rf"objectives.\w+ {message}.* use DDP"):
            check_sharded_objectives(attached, compares_gradients=False)


def test_objectives_in_several_gpus_need_a_process_for_each():
    check_not_replicated(None, 2)
    check_not_replicated(Objectives([Guess()]), 1)
    with pytest.raises(
        ValueError, match="objectives guess need one process for each of the 2 GPUs: start the run with"
    ):
        check_not_replicated(Objectives([Guess()]), 2)


def dataset_of(*steps: list[str]):
    return to_dataset(
        Example([], "Which?", choices=[], steps=some, answers=["red"], row_id=f"train.json row {index}")
        for index, some in enumerate(steps)
    )


def test_rows_without_what_an_objective_needs_are_refused_by_the_first(caplog):
    check_objectives(dataset_of([], ["red"]), [StepTokens()], None)
    with pytest.raises(UsageError, match=r"json row 0, field 'steps': found none, and objectives.step_tokens needs"):
        check_objectives(dataset_of([], []), [StepTokens()], None)
    boxed = type("Boxed", (Guess,), {"fields": ("boxes",)})()
    rows = dataset_of(["red"], ["red"])
    with pytest.raises(UsageError, match=r"row 0, field 'boxes': found none, .* \(none of 2 rows has it\): take a"):
        check_objectives(rows, [boxed], None)
    check_objectives(rows.add_column("boxes", [[1], [2]]), [boxed], None)
    with caplog.at_level("INFO", logger="mmcoconut"):
        check_objectives(rows.add_column("boxes", [[1], []]), [boxed], None)
    assert "field boxes: 1 of 2 rows have none; objectives.guess skips them" in caplog.text
    picky = type("Picky", (Guess,), {"check": lambda self, row, processor: 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        check_objectives(rows, [picky], None)


def test_what_an_objective_refuses_of_a_row_is_said_without_a_traceback(capsys):
    def refuse(self, row, processor):
        raise ValueError(f"{row['row_id']}: too short")

    picky = type("Picky", (Guess,), {"check": refuse})()
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda _: check_objectives(dataset_of(["red"]), [picky], None))
    assert capsys.readouterr().err == "train.json row 0: too short\n"


def test_rows_are_measured_as_objectives_lay_them_out():
    """At stage 3 all steps are gone, and the objective reads them written."""
    _, processor = model_and_processor("gpt2")
    rows, objectives = dataset_of(["red blue green"] * 3), make_objectives({"guess:Guess": 1.0})
    collator = collator_of(processor, stage=3)
    short = collator.longest(rows[0])
    collator.objectives = objectives
    written = collator.longest(rows[0])
    assert written > short
    collator.max_length = written
    check_lengths(rows, collator)
    collator([{**rows[0], "index": 0}])
    collator.max_length = written - 1
    with pytest.raises(ValueError, match=f"the sequence of stage 3 for objectives.guess takes {written} tokens"):
        check_lengths(rows, collator)
    collator.objectives = make_objectives({"guess:Guess": [1.0, 0]})
    check_lengths(rows, collator)


@pytest.mark.parametrize("name", ["steps", "ce", "a.b"])
def test_an_objective_of_a_users_own_may_not_take_the_name_of_another_part(name, folder, monkeypatch):
    monkeypatch.setattr(guess, "Taken", type("Taken", (Guess,), {"name": name}), raising=False)
    recipe = folder / "taken.yaml"
    recipe.write_text('base: tiny.yaml\nobjectives: {"guess:Taken": 1.0}\n')
    with pytest.raises(RecipeError, match=f"its name '{name}' has a dot or is one of steps, places, answer_col"):
        parse_recipe([str(recipe)])
